"""The update rules as papers and textbooks have them, in plain numpy float64, and what rounding makes of our forms.

Of each rule there are two functions. The first is the rule, written from its source without a look at the package:
``rule(t, p, g, *states, **hyper)`` gives the new parameter and states, arrays of shape [n]; ``t`` counts from 1. The
second, with ``_bound`` behind its name, makes the same step with :class:`Rounded` numbers, by the operations that the
package promises, each of which float32 rounds once: so it bounds how far one step may be from the rule.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

U = 2.0**-24  # half the spacing of float32 numbers at 1: the largest relative error of one rounding
TINY = 2.0**-149  # the smallest float32


class Rounded:
    """An exact number (or an array of them), and the largest error that float32 arithmetic may have made of it.

    Running error analysis (Higham, Accuracy and Stability of Numerical Algorithms, section 3.3): every operation adds
    what it rounds off to what the errors of its operands make of it.
    """

    def __init__(self, x: Array | float, error: Array | float = 0.0) -> None:
        self.x, self.error = x, error

    @classmethod
    def once(cls, x: Array | float, error: Array | float = 0.0) -> Rounded:
        """What is within ``error`` of x, after one rounding."""
        return cls(x, error + U * (np.abs(x) + error) + TINY)

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded.once(self.x + other.x, self.error + other.error)

    def __sub__(self, other: Rounded) -> Rounded:
        return Rounded.once(self.x - other.x, self.error + other.error)

    def __mul__(self, other: Rounded) -> Rounded:
        mixed = np.abs(self.x) * other.error + np.abs(other.x) * self.error
        return Rounded.once(self.x * other.x, mixed + self.error * other.error)

    def __truediv__(self, other: Rounded) -> Rounded:
        with np.errstate(divide="ignore", invalid="ignore"):
            quotient, least = self.x / other.x, np.abs(other.x) - other.error
            error = (self.error + np.abs(quotient) * other.error) / least
            return Rounded.once(quotient, np.where(least > 0, error, np.inf))

    def root(self) -> Rounded:
        root, below = np.sqrt(self.x), np.sqrt(np.maximum(self.x - self.error, 0))
        return Rounded.once(root, np.maximum(root - below, np.sqrt(self.x + self.error) - root))


once = Rounded.once


def average(a: Rounded, b: Rounded, beta: float) -> Rounded:
    """a + (1 - beta) (b - a), or from the other end where beta is the smaller number."""
    return (b if beta < 0.5 else a) + once(-beta if beta < 0.5 else 1 - beta) * (b - a)


def decayed_sum(a: Rounded, b: Rounded, beta: float) -> Rounded:
    """beta a + b, told by the smaller of beta and 1 - beta."""
    return once(beta) * a + b if beta < 0.5 else (a - once(1 - beta) * a) + b


def directed(p: Rounded, g: Rounded, l2: float) -> Rounded:
    return g + once(l2) * p if l2 else g


def taken_from(p: Rounded, move: Rounded, decay: float) -> Rounded:
    return p - (once(decay) * p + move if decay else move)


def numbers(*arrays: Array) -> list[Rounded]:
    return [Rounded(a) for a in arrays]


# ---- momentum: Polyak 1964; Sutskever et al. 2013, eq. 3-4 in torch.optim's form -----------------------------------


def sgd(t, p, g, b, *, lr, wd=0.0, mu=0.0, dampening=0.0, nesterov=False):
    g = g + wd * p
    b = g if t == 1 else mu * b + (1 - dampening) * g
    step = g if mu == 0 else g + mu * b if nesterov else b
    return p - lr * step, b


def sgd_bound(t, p, g, b, *, lr, wd=0.0, mu=0.0, dampening=0.0, nesterov=False):
    p, g, b = numbers(p, g, b)
    g = directed(p, g, wd)
    if mu == 0:
        return p - once(lr) * g, b
    b = g if t == 1 else decayed_sum(b, once(1 - dampening) * g if dampening else g, mu)
    return p - once(lr) * (decayed_sum(b, g, mu) if nesterov else b), b


# ---- Adagrad: Duchi, Hazan & Singer 2011, figure 1 (diagonal) ------------------------------------------------------


def adagrad(t, p, g, s, *, lr, wd=0.0, eps=1e-10, lr_decay=0.0):
    g = g + wd * p
    s = s + g**2
    return p - lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(s) + eps), s


def adagrad_bound(t, p, g, s, *, lr, wd=0.0, eps=1e-10, lr_decay=0.0):
    p, g, s = numbers(p, g, s)
    g = directed(p, g, wd)
    s = s + g * g
    return p - once(lr / (1 + (t - 1) * lr_decay)) * (g / (s.root() + once(eps))), s


# ---- Adadelta: Zeiler 2012 (arXiv:1212.5701), Algorithm 1 ----------------------------------------------------------


def adadelta(t, p, g, v, u, *, lr, wd=0.0, rho=0.9, eps=1e-6):
    g = g + wd * p
    v = rho * v + (1 - rho) * g**2
    delta = -np.sqrt(u + eps) / np.sqrt(v + eps) * g
    u = rho * u + (1 - rho) * delta**2
    return p + lr * delta, v, u


def adadelta_bound(t, p, g, v, u, *, lr, wd=0.0, rho=0.9, eps=1e-6):
    p, g, v, u = numbers(p, g, v, u)
    g = directed(p, g, wd)
    v = average(v, g * g, rho)
    delta = (u + once(eps)).root() / (v + once(eps)).root() * g
    u = average(u, delta * delta, rho)
    return p - once(lr) * delta, v, u


# ---- RMSprop: Tieleman & Hinton 2012, lecture 6.5; centered: Graves 2013 (arXiv:1308.0850), eq. 38-41 --------------


def rmsprop(t, p, g, v, buf, mean, *, lr, wd=0.0, alpha=0.99, eps=1e-8, mu=0.0, centered=False):
    g = g + wd * p
    v = alpha * v + (1 - alpha) * g**2
    mean = alpha * mean + (1 - alpha) * g
    spread = np.maximum(v - mean**2, 0) if centered else v
    buf = mu * buf + g / (np.sqrt(spread) + eps)
    return p - lr * buf, v, buf, mean


def rmsprop_bound(
    t, p, g, v, buf, mean, *, lr, wd=0.0, alpha=0.99, eps=1e-8, mu=0.0, centered=False
):
    p, g, v, buf, mean = numbers(p, g, v, buf, mean)
    g = directed(p, g, wd)
    v, mean = average(v, g * g, alpha), average(mean, g, alpha)
    spread = v - mean * mean if centered else v
    spread = Rounded(np.maximum(spread.x, 0), spread.error)
    x = g / (spread.root() + once(eps))
    buf = decayed_sum(buf, x, mu) if mu else x
    return p - once(lr) * buf, v, buf, mean


# ---- Lion: Chen et al. 2023 (arXiv:2302.06675), Algorithm 2 --------------------------------------------------------


def lion(t, p, g, m, *, lr, wd=0.0, beta1=0.9, beta2=0.99):
    update = np.sign(beta1 * m + (1 - beta1) * g)
    m = beta2 * m + (1 - beta2) * g
    return p - lr * (update + wd * p), m


def lion_bound(t, p, g, m, *, lr, wd=0.0, beta1=0.9, beta2=0.99):
    p, g, m = numbers(p, g, m)
    c = average(m, g, beta1)
    wrong_way = 2 * lr * (np.abs(c.x) <= c.error)  # the sign is in doubt
    move = Rounded(lr * np.sign(c.x), U * lr + wrong_way)
    return taken_from(p, move, lr * wd), average(m, g, beta2)


# ---- Adam: Kingma & Ba 2015 (arXiv:1412.6980), Algorithm 1; decoupled: Loshchilov & Hutter 2019 (arXiv:1711.05101) -


def adam(
    t, p, g, m, v, *, lr, wd=0.0, decoupled=False, beta1=0.9, beta2=0.999, eps=1e-8, corrected=True
):
    g = g if decoupled else g + wd * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t) if corrected else m
    v_hat = v / (1 - beta2**t) if corrected else v
    decay = lr * wd * p if decoupled else 0.0
    return p - decay - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


def adam_bound(
    t, p, g, m, v, *, lr, wd=0.0, decoupled=False, beta1=0.9, beta2=0.999, eps=1e-8, corrected=True
):
    p, g, m, v = numbers(p, g, m, v)
    g = directed(p, g, 0.0 if decoupled else wd)
    m, v = average(m, g, beta1), average(v, g * g, beta2)
    c1, c2 = (1 - beta1**t, 1 - beta2**t) if corrected else (1.0, 1.0)
    move = once(lr / c1) * (m / (v.root() * once(1 / np.sqrt(c2)) + once(eps)))
    return taken_from(p, move, lr * wd if decoupled else 0.0), m, v


# ---- NAdam: Dozat 2016, Algorithm 2, with the schedule mu_t = beta1 (1 - 0.96^(t psi) / 2) that he proposes --------


def nadam(
    t, p, g, m, v, *, lr, wd=0.0, decoupled=False, beta1=0.9, beta2=0.999, eps=1e-8, psi=4e-3
):
    mu = lambda i: beta1 * (1 - 0.5 * 0.96 ** (i * psi))  # noqa: E731
    product = np.prod([mu(i) for i in range(1, t + 1)])
    g = g if decoupled else g + wd * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_bar = (1 - mu(t)) * g / (1 - product) + mu(t + 1) * m / (1 - product * mu(t + 1))
    decay = lr * wd * p if decoupled else 0.0
    return p - decay - lr * m_bar / (np.sqrt(v / (1 - beta2**t)) + eps), m, v


def nadam_bound(
    t, p, g, m, v, *, lr, wd=0.0, decoupled=False, beta1=0.9, beta2=0.999, eps=1e-8, psi=4e-3
):
    mu = lambda i: beta1 * (1 - 0.5 * 0.96 ** (i * psi))  # noqa: E731
    product = np.prod([mu(i) for i in range(1, t + 1)])
    p, g, m, v = numbers(p, g, m, v)
    g = directed(p, g, 0.0 if decoupled else wd)
    m, v = average(m, g, beta1), average(v, g * g, beta2)
    off = t * U * product  # the product is kept in float32, and rounded at every step
    of_g, of_m = lr * (1 - mu(t)) / (1 - product), lr * mu(t + 1) / (1 - product * mu(t + 1))
    of_g = once(of_g, of_g * off / (1 - product - off))
    of_m = once(of_m, of_m * off / (1 - product - off))
    move = (of_g * g + of_m * m) / (v.root() * once(1 / np.sqrt(1 - beta2**t)) + once(eps))
    return taken_from(p, move, lr * wd if decoupled else 0.0), m, v


# ---- RAdam: Liu et al. 2020 (arXiv:1908.03265), Algorithm 2, with torch.optim's bound of 5 -------------------------


def radam(t, p, g, m, v, *, lr, wd=0.0, decoupled=False, beta1=0.9, beta2=0.999, eps=1e-8):
    g = g if decoupled else g + wd * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    step = lr * m_hat
    if length > 5:
        r = np.sqrt(
            (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        )
        step = lr * m_hat * r * np.sqrt(1 - beta2**t) / (np.sqrt(v) + eps)
    return p - (lr * wd * p if decoupled else 0.0) - step, m, v


def radam_bound(t, p, g, m, v, *, lr, wd=0.0, decoupled=False, beta1=0.9, beta2=0.999, eps=1e-8):
    p, g, m, v = numbers(p, g, m, v)
    g = directed(p, g, 0.0 if decoupled else wd)
    m, v = average(m, g, beta1), average(v, g * g, beta2)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    size = lr / (1 - beta1**t)
    if length > 5:
        r = np.sqrt(
            (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        )
        move = once(size * r * np.sqrt(1 - beta2**t)) * (m / (v.root() + once(eps)))
    else:
        move = once(size) * m
    return taken_from(p, move, lr * wd if decoupled else 0.0), m, v
