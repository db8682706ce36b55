// Every update rule, simplest first: how one element moves. The twin is adamfused/rules.py, line by line.
//
// A rule may use + - * /, root, comparisons and selection, each correctly rounded. Nothing else: no fma, no pow,
// no reassociation. That is what makes every target give the same bits. T is float, or double for float64
// parameters. Numbers that are the same for all elements are made once per step, in double, by `prepare`, and
// rounded once to T.
//
// `operator()` takes numbers N: T itself, or a vector of T's that a CPU works on at once; the rule's own numbers are T
// in both. So a condition on those is one branch for all elements, and one on elements is a choice without a branch.
//
// To add a rule: a struct with `Hyper`, `states`, `prepare` and `operator()` (or, of Adam's kin, what Moments asks
// for), a line in ADAMFUSED_RULES below, its twin in rules.py. Every rule also comes as Averaged<Rule>.
#pragma once

#include "target.h"

namespace adamfused {
namespace ADAMFUSED_TARGET {

ADAMFUSED_HD float root(float x) { return sqrtf(x); }
ADAMFUSED_HD double root(double x) { return sqrt(x); }
template <class Vector>
ADAMFUSED_HD Vector root(Vector x) {
  for (size_t i = 0; i < sizeof x / sizeof x[0]; ++i) x[i] = root(x[i]);
  return x;
}

// x^n by squaring. Not pow(): libraries differ in its last bit, and the host and the GPU must agree.
ADAMFUSED_HD double power(double x, int64_t n) {
  double result = 1.0;
  for (; n > 0; n >>= 1) {
    if (n & 1) result = result * x;
    x = x * x;
  }
  return result;
}

// What a step knows besides a rule's own numbers.
struct Now {
  double lr, t;      // t counts the parameter's own steps, this one too
  double factor;     // what unscaling and clipping multiply the gradient by
  double ema_decay;  // of the average of the weights
  double carried = 1.0;
};

// A rule's own numbers, from the row of them that a job has.
template <class Hyper>
ADAMFUSED_HD Hyper hyper_of(const double* numbers) {
  Hyper hyper;
  __builtin_memcpy(&hyper, numbers, sizeof hyper);
  return hyper;
}

// Some rules carry a number from step to step that is the same for all elements and cannot be told from the count. It
// begins with 1 and lies beside the count; after(hyper, t, before) is what it is in step t.
template <class Hyper>
struct Carried {
  static constexpr bool any = false;
  ADAMFUSED_HD static double after(const Hyper&, double, double before) { return before; }
};

// The weight of the new value in a running average with decay rate beta. Rounding 1 - beta keeps the small number
// exact to 2^-24 of itself; rounding beta, as beta * a + (1 - beta) * b does, is what drifts: for beta = 0.999
// the average settles 1.3e-5 away. Below one half beta is the small number, so the average is told from its far
// end; beta = 0 is then exactly the new value.
template <class T>
struct Weight {
  T c;
  bool far;
};

template <class T>
ADAMFUSED_HD Weight<T> weight(double beta) {
  return beta < 0.5 ? Weight<T>{T(-beta), true} : Weight<T>{T(1.0 - beta), false};
}

template <class N, class T>
ADAMFUSED_HD N average(N a, N b, const Weight<T>& w) {
  N d = b - a;
  return (w.far ? b : a) + w.c * d;
}

// beta * a + b, with the same care for beta.
template <class N, class T>
ADAMFUSED_HD N decayed_sum(N a, N b, const Weight<T>& w) {
  return ((w.far ? N{} : a) - w.c * a) + b;
}

// What the gradient is multiplied by: unscaled, clipped and, to climb, turned round in one.
template <class T>
ADAMFUSED_HD T gradient_factor(const Now& now, double maximize) {
  return T(maximize != 0 ? -now.factor : now.factor);
}

// The gradient as the rule sees it, with coupled (L2) decay. A decay of 0 is skipped, not multiplied: 0 * inf is NaN.
template <class N, class T>
ADAMFUSED_HD N directed(N p, N g, T factor, T l2) {
  g = factor * g;
  return l2 != T(0) ? g + l2 * p : g;
}

// A NaN in either stays.
template <class N>
ADAMFUSED_HD N larger(N a, N b) {
  return ((b > a) | (b != b)) ? b : a;
}

// 1, -1, or what is neither above nor below zero: a zero, or a NaN, which stays.
template <class N>
ADAMFUSED_HD N sign(N x) {
  const N zero{};
  return x > zero ? zero + 1 : x < zero ? zero - 1 : x;
}

// Stochastic gradient descent: Robbins & Monro 1951, as torch.optim has it.
struct SGDHyper {
  double weight_decay, momentum, dampening, nesterov, maximize;
};

template <class T>
struct SGD {
  using Hyper = SGDHyper;
  static constexpr int states = 0;
  static constexpr uint32_t never_negative = 0;
  static constexpr bool averages = false;
  T factor, l2, lr;

  ADAMFUSED_HD static SGD prepare(const Hyper& h, const Now& now) {
    return {gradient_factor<T>(now, h.maximize), T(h.weight_decay), T(now.lr)};
  }
  ADAMFUSED_HD bool is_usual() const { return true; }
  ADAMFUSED_HD void take_as_usual() {}
  template <class N>
  ADAMFUSED_HD void operator()(N& p, N g) const {
    p = p - lr * directed(p, g, factor, l2);
  }
};

// With momentum (Polyak 1964), or Nesterov's (Sutskever et al. 2013). The first gradient is the first sum, not
// dampened.
template <class T>
struct SGDMomentum : SGD<T> {
  static constexpr int states = 1;
  Weight<T> mu, ahead;
  T taken;
  bool nesterov;

  ADAMFUSED_HD static SGDMomentum prepare(const SGDHyper& h, const Now& now) {
    const bool first = now.t == 1;
    return {SGD<T>::prepare(h, now), weight<T>(first ? 0.0 : h.momentum), weight<T>(h.momentum),
            T(first ? 1.0 : 1.0 - h.dampening), h.nesterov != 0};
  }
  ADAMFUSED_HD bool is_usual() const { return !mu.far && !ahead.far; }
  ADAMFUSED_HD void take_as_usual() { mu.far = ahead.far = false; }
  template <class N>
  ADAMFUSED_HD void operator()(N& p, N g, N& buf) const {
    g = directed(p, g, this->factor, this->l2);
    buf = decayed_sum(buf, taken * g, mu);
    p = p - this->lr * (nesterov ? decayed_sum(buf, g, ahead) : buf);
  }
};

// Adagrad: Duchi, Hazan & Singer 2011, with a learning rate that may decay as in torch.optim.
struct AdagradHyper {
  double lr_decay, eps, weight_decay, maximize;
};

template <class T>
struct Adagrad {
  using Hyper = AdagradHyper;
  static constexpr int states = 1;
  static constexpr uint32_t never_negative = 1;
  static constexpr bool averages = false;
  T factor, l2, lr, eps;

  ADAMFUSED_HD static Adagrad prepare(const Hyper& h, const Now& now) {
    return {gradient_factor<T>(now, h.maximize), T(h.weight_decay), T(now.lr / (1.0 + (now.t - 1.0) * h.lr_decay)),
            T(h.eps)};
  }
  ADAMFUSED_HD bool is_usual() const { return true; }
  ADAMFUSED_HD void take_as_usual() {}
  template <class N>
  ADAMFUSED_HD void operator()(N& p, N g, N& sum) const {
    g = directed(p, g, factor, l2);
    sum = sum + g * g;
    p = p - lr * (g / (root(sum) + eps));
  }
};

// RMSprop: Tieleman & Hinton 2012, lecture 6.5; epsilon outside the root as in torch.optim.
struct RMSpropHyper {
  double alpha, eps, weight_decay, momentum, maximize;
};

template <class T>
struct RMSprop {
  using Hyper = RMSpropHyper;
  static constexpr int states = 1;
  static constexpr uint32_t never_negative = 1;
  static constexpr bool averages = false;
  Weight<T> w, mu;
  T factor, l2, lr, eps;

  ADAMFUSED_HD static RMSprop prepare(const Hyper& h, const Now& now) {
    return {weight<T>(h.alpha),
            weight<T>(h.momentum),
            gradient_factor<T>(now, h.maximize),
            T(h.weight_decay),
            T(now.lr),
            T(h.eps)};
  }
  ADAMFUSED_HD bool is_usual() const { return !w.far && !mu.far && l2 == T(0); }
  ADAMFUSED_HD void take_as_usual() { w.far = mu.far = false, l2 = T(0); }
  template <class N>
  ADAMFUSED_HD void operator()(N& p, N g, N& v) const {
    g = directed(p, g, factor, l2);
    v = average(v, g * g, w);
    p = p - lr * (g / (root(v) + eps));
  }
};

template <class T>
struct RMSpropMomentum : RMSprop<T> {
  static constexpr int states = 2;

  ADAMFUSED_HD static RMSpropMomentum prepare(const RMSpropHyper& h, const Now& now) {
    return {RMSprop<T>::prepare(h, now)};
  }
  template <class N>
  ADAMFUSED_HD void operator()(N& p, N g, N& v, N& buf) const {
    g = directed(p, g, this->factor, this->l2);
    v = average(v, g * g, this->w);
    buf = decayed_sum(buf, g / (root(v) + this->eps), this->mu);
    p = p - this->lr * buf;
  }
};

// Centered (Graves 2013, arXiv:1308.0850, eq. 38-41): divide by the spread of g instead of its size. v - mean^2 is
// never negative, but rounded it may be, and the root of that would be NaN.
template <class T>
struct RMSpropCentered : RMSprop<T> {
  static constexpr int states = 2;

  ADAMFUSED_HD static RMSpropCentered prepare(const RMSpropHyper& h, const Now& now) {
    return {RMSprop<T>::prepare(h, now)};
  }
  template <class N>
  ADAMFUSED_HD static N spread(N v, N mean) {
    N d = v - mean * mean;
    return d < T(0) ? T(0) : d;
  }
  template <class N>
  ADAMFUSED_HD void operator()(N& p, N g, N& v, N& mean) const {
    g = directed(p, g, this->factor, this->l2);
    v = average(v, g * g, this->w);
    mean = average(mean, g, this->w);
    p = p - this->lr * (g / (root(spread(v, mean)) + this->eps));
  }
};

template <class T>
struct RMSpropCenteredMomentum : RMSpropCentered<T> {
  static constexpr int states = 3;

  ADAMFUSED_HD static RMSpropCenteredMomentum prepare(const RMSpropHyper& h, const Now& now) {
    return {RMSpropCentered<T>::prepare(h, now)};
  }
  template <class N>
  ADAMFUSED_HD void operator()(N& p, N g, N& v, N& buf, N& mean) const {
    g = directed(p, g, this->factor, this->l2);
    v = average(v, g * g, this->w);
    mean = average(mean, g, this->w);
    buf = decayed_sum(buf, g / (root(this->spread(v, mean)) + this->eps), this->mu);
    p = p - this->lr * buf;
  }
};

// Adadelta: Zeiler 2012 (arXiv:1212.5701), Algorithm 1, with a learning rate as in torch.optim.
struct AdadeltaHyper {
  double rho, eps, weight_decay, maximize;
};

template <class T>
struct Adadelta {
  using Hyper = AdadeltaHyper;
  static constexpr int states = 2;
  static constexpr uint32_t never_negative = 3;
  static constexpr bool averages = false;
  Weight<T> w;
  T factor, l2, lr, eps;

  ADAMFUSED_HD static Adadelta prepare(const Hyper& h, const Now& now) {
    return {weight<T>(h.rho), gradient_factor<T>(now, h.maximize), T(h.weight_decay), T(now.lr), T(h.eps)};
  }
  ADAMFUSED_HD bool is_usual() const { return !w.far && l2 == T(0); }
  ADAMFUSED_HD void take_as_usual() { w.far = false, l2 = T(0); }
  template <class N>
  ADAMFUSED_HD void operator()(N& p, N g, N& v, N& u) const {
    g = directed(p, g, factor, l2);
    v = average(v, g * g, w);
    N d = root(u + eps) / root(v + eps) * g;
    u = average(u, d * d, w);
    p = p - lr * d;
  }
};

// Lion: Chen et al. 2023 (arXiv:2302.06675), Algorithm 2. Decay and update are added and rounded together.
struct LionHyper {
  double beta1, beta2, weight_decay, maximize;
};

template <class T>
struct Lion {
  using Hyper = LionHyper;
  static constexpr int states = 1;
  static constexpr uint32_t never_negative = 0;
  static constexpr bool averages = false;
  Weight<T> w1, w2;
  T factor, decay, lr;

  ADAMFUSED_HD static Lion prepare(const Hyper& h, const Now& now) {
    return {weight<T>(h.beta1), weight<T>(h.beta2), gradient_factor<T>(now, h.maximize), T(now.lr * h.weight_decay),
            T(now.lr)};
  }
  ADAMFUSED_HD bool is_usual() const { return !w1.far && !w2.far; }
  ADAMFUSED_HD void take_as_usual() { w1.far = w2.far = false; }
  template <class N>
  ADAMFUSED_HD void operator()(N& p, N g, N& m) const {
    g = factor * g;
    N move = lr * sign(average(m, g, w1));
    p = p - (decay != T(0) ? decay * p + move : move);
    m = average(m, g, w2);
  }
};

// What Adam and its kin share: averages of the gradient and of its square, and that decay and update are added and
// rounded together. Decay is coupled (l2, Adam) or decoupled (decay, AdamW: Loshchilov & Hutter 2019,
// arXiv:1711.05101, Algorithm 2). In place of operator() each has gather(), in which the states take in the gradient,
// and update(), how far the weight moves then: so weights can wait until the states of many numbers are known.
template <class T>
struct Moments {
  static constexpr int states = 2;
  static constexpr uint32_t never_negative = 2;
  static constexpr bool averages = false;
  Weight<T> w1, w2;
  T factor, l2, decay, eps;

  template <class Hyper>
  ADAMFUSED_HD static Moments prepare(const Hyper& h, const Now& now) {
    const bool decoupled = h.decoupled != 0;
    return {weight<T>(h.beta1),
            weight<T>(h.beta2),
            gradient_factor<T>(now, h.maximize),
            T(decoupled ? 0.0 : h.weight_decay),
            T(decoupled ? now.lr * h.weight_decay : 0.0),
            T(h.eps)};
  }
  ADAMFUSED_HD bool is_usual() const { return !w1.far && !w2.far && l2 == T(0); }
  ADAMFUSED_HD void take_as_usual() { w1.far = w2.far = false, l2 = T(0); }

  // The gradient as the rule sees it.
  template <class N>
  ADAMFUSED_HD N seen(N p, N g) const {
    return directed(p, g, factor, l2);
  }
  template <class N>
  ADAMFUSED_HD void gather(N g, N& m, N& v) const {
    m = average(m, g, w1);
    v = average(v, g * g, w2);
  }
  template <class N>
  ADAMFUSED_HD N moved(N p, N move) const {
    return p - (decay != T(0) ? decay * p + move : move);
  }
};

// Adam: Kingma & Ba 2015 (arXiv:1412.6980), Algorithm 1.
struct AdamHyper {
  double beta1, beta2, eps, weight_decay, decoupled, maximize, bias_correction;
};

template <class T>
struct Adam : Moments<T> {
  using Hyper = AdamHyper;
  T step_size, inv_root_c2;

  ADAMFUSED_HD static Adam prepare(const Hyper& h, const Now& now) {
    const bool corrected = h.bias_correction != 0;
    const double c1 = corrected ? 1.0 - power(h.beta1, int64_t(now.t)) : 1.0;
    const double c2 = corrected ? 1.0 - power(h.beta2, int64_t(now.t)) : 1.0;
    return {Moments<T>::prepare(h, now), T(now.lr / c1), T(1.0 / root(c2))};
  }
  template <class N>
  ADAMFUSED_HD N update(N, N m, N v) const {
    return step_size * (m / (root(v) * inv_root_c2 + this->eps));
  }
};

// AMSGrad: Reddi, Kale & Kumar 2018 (arXiv:1904.09237), as torch.optim has it: the largest uncorrected v.
template <class T>
struct AmsGrad : Adam<T> {
  static constexpr int states = 3;
  static constexpr uint32_t never_negative = 6;

  ADAMFUSED_HD static AmsGrad prepare(const AdamHyper& h, const Now& now) { return {Adam<T>::prepare(h, now)}; }
  template <class N>
  ADAMFUSED_HD void gather(N g, N& m, N& v, N& top) const {
    Adam<T>::gather(g, m, v);
    top = larger(top, v);
  }
  template <class N>
  ADAMFUSED_HD N update(N g, N m, N, N top) const {
    return Adam<T>::update(g, m, top);
  }
};

// NAdam: Dozat 2016 (ICLR workshop), Algorithm 2, with the decay of the momentum that torch.optim has.
struct NAdamHyper {
  double beta1, beta2, eps, weight_decay, decoupled, maximize;
  double q;  // 0.96 to the power of the decay: q^t is then the same on every target

  ADAMFUSED_HD double mu(double t) const { return beta1 * (1.0 - 0.5 * power(q, int64_t(t))); }
};

// The product of all mu so far.
template <>
struct Carried<NAdamHyper> {
  static constexpr bool any = true;
  ADAMFUSED_HD static double after(const NAdamHyper& h, double t, double before) { return before * h.mu(t); }
};

template <class T>
struct NAdam : Moments<T> {
  using Hyper = NAdamHyper;
  T of_g, of_m, inv_root_c2;

  ADAMFUSED_HD static NAdam prepare(const Hyper& h, const Now& now) {
    const double mu = h.mu(now.t), next = h.mu(now.t + 1.0);
    return {Moments<T>::prepare(h, now), T(now.lr * (1.0 - mu) / (1.0 - now.carried)),
            T(now.lr * next / (1.0 - now.carried * next)), T(1.0 / root(1.0 - power(h.beta2, int64_t(now.t))))};
  }
  template <class N>
  ADAMFUSED_HD N update(N g, N m, N v) const {
    return (of_g * g + of_m * m) / (root(v) * inv_root_c2 + this->eps);
  }
};

// RAdam: Liu et al. 2020 (arXiv:1908.03265), Algorithm 2, with epsilon beside the uncorrected root as in torch.optim.
struct RAdamHyper {
  double beta1, beta2, eps, weight_decay, decoupled, maximize;
};

template <class T>
struct RAdam : Moments<T> {
  using Hyper = RAdamHyper;
  T step_size;
  bool rectified;  // there are steps enough to tell the variance

  ADAMFUSED_HD static RAdam prepare(const Hyper& h, const Now& now) {
    const double power2 = power(h.beta2, int64_t(now.t)), c2 = 1.0 - power2;
    const double most = 2.0 / (1.0 - h.beta2) - 1.0, length = most - 2.0 * now.t * power2 / c2;
    const bool rectified = length > 5.0;
    double size = now.lr / (1.0 - power(h.beta1, int64_t(now.t)));
    if (rectified)
      size = size * root((length - 4.0) * (length - 2.0) * most / ((most - 4.0) * (most - 2.0) * length)) * root(c2);
    return {Moments<T>::prepare(h, now), T(size), rectified};
  }
  template <class N>
  ADAMFUSED_HD N update(N, N m, N v) const {
    return step_size * (rectified ? m / (root(v) + this->eps) : m);
  }
};

// Whether the weights of a rule can wait.
template <class Rule>
inline constexpr bool waits =
    !Rule::averages && (__is_base_of(Moments<float>, Rule) || __is_base_of(Moments<double>, Rule));

// A number through a rule.
template <class Rule, class N, class... S>
ADAMFUSED_HD void apply(const Rule& rule, N& p, N g, S&... s) {
  if constexpr (waits<Rule>) {
    g = rule.seen(p, g);
    rule.gather(g, s...);
    p = rule.moved(p, rule.update(g, s...));
  } else {
    rule(p, g, s...);
  }
}

// A rule that also keeps an average of the weights, told of the new ones before they are rounded to the parameter's
// format. Its first value is the first new weight, as in torch.optim.swa_utils.AveragedModel, be that infinite.
template <template <class> class Rule, class T>
struct Averaged : Rule<T> {
  static constexpr int states = Rule<T>::states + 1;
  static constexpr bool averages = true;
  Weight<T> ema;

  ADAMFUSED_HD static Averaged prepare(const typename Rule<T>::Hyper& h, const Now& now) {
    return {Rule<T>::prepare(h, now), weight<T>(now.t == 1 ? 0.0 : now.ema_decay)};
  }
  template <class N>
  ADAMFUSED_HD N averaged(N e, N p) const {  // decays of 0 and 1 are exact, also where 0 * inf would be NaN
    return ema.c != T(0) ? average(e, p, ema) : ema.far ? p : e;
  }
  template <class N>
  ADAMFUSED_HD void operator()(N& p, N g, N& e) const {
    apply<Rule<T>>(*this, p, g);
    e = averaged(e, p);
  }
  template <class N>
  ADAMFUSED_HD void operator()(N& p, N g, N& a, N& e) const {
    apply<Rule<T>>(*this, p, g, a);
    e = averaged(e, p);
  }
  template <class N>
  ADAMFUSED_HD void operator()(N& p, N g, N& a, N& b, N& e) const {
    apply<Rule<T>>(*this, p, g, a, b);
    e = averaged(e, p);
  }
  template <class N>
  ADAMFUSED_HD void operator()(N& p, N g, N& a, N& b, N& c, N& e) const {
    apply<Rule<T>>(*this, p, g, a, b, c);
    e = averaged(e, p);
  }
};

// Of arrays with an entry for each state: no array has none.
template <class Rule>
constexpr int kRoom = Rule::states > 0 ? Rule::states : 1;

// The j-th of numbers through a rule; s[k] are its k-th states.
template <class Rule, class N, int Room, int E>
ADAMFUSED_HD void move(const Rule& rule, N (&p)[E], const N (&g)[E], N (&s)[Room][E], int j) {
  constexpr int S = Rule::states;
  static_assert(Room == kRoom<Rule>, "");
  if constexpr (S == 0) apply(rule, p[j], g[j]);
  if constexpr (S == 1) apply(rule, p[j], g[j], s[0][j]);
  if constexpr (S == 2) apply(rule, p[j], g[j], s[0][j], s[1][j]);
  if constexpr (S == 3) apply(rule, p[j], g[j], s[0][j], s[1][j], s[2][j]);
  if constexpr (S == 4) apply(rule, p[j], g[j], s[0][j], s[1][j], s[2][j], s[3][j]);
}

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused

// Every rule, and the name that Python knows it by.
#define ADAMFUSED_RULES(RULE)                                \
  RULE(SGD, "sgd")                                           \
  RULE(SGDMomentum, "sgd_momentum")                          \
  RULE(Adagrad, "adagrad")                                   \
  RULE(RMSprop, "rmsprop")                                   \
  RULE(RMSpropMomentum, "rmsprop_momentum")                  \
  RULE(RMSpropCentered, "rmsprop_centered")                  \
  RULE(RMSpropCenteredMomentum, "rmsprop_centered_momentum") \
  RULE(Adadelta, "adadelta")                                 \
  RULE(Lion, "lion")                                         \
  RULE(Adam, "adam")                                         \
  RULE(AmsGrad, "amsgrad")                                   \
  RULE(NAdam, "nadam")                                       \
  RULE(RAdam, "radam")
