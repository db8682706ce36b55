"""torch.compile: a compiled step is one graph, gives the eager step's bits, and goes through a registered operator."""

from __future__ import annotations

import pytest
import torch

import adamfused
from adamfused import rules

pytestmark = pytest.mark.native

CASES = [
    (adamfused.AdamW, {}),
    (adamfused.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (adamfused.RMSprop, {"momentum": 0.9, "centered": True}),
    (adamfused.SGD, {}),
    (adamfused.NAdam, {"weight_decay": 0.1}),
]


def train(optimizer_class: type, step_of, lr, steps: int = 4, **options):
    """The parameters and states, in order, of a small model after some steps made by `step_of(optimizer)`."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    optimizer = optimizer_class(model.parameters(), lr=lr, **options)
    step = step_of(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        step()
    return [t for p in model.parameters() for t in (p.detach(), *optimizer.state[p].values())]


def compiled(optimizer):
    torch._dynamo.reset()
    return torch.compile(lambda: optimizer.step(), fullgraph=True)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
@pytest.mark.parametrize(("optimizer_class", "options"), CASES)
def test_compiled_step_is_one_graph_with_the_same_bits(optimizer_class, options, lr) -> None:
    eager = train(optimizer_class, lambda o: o.step, lr, **options)
    whole = train(optimizer_class, compiled, lr, **options)
    assert all(torch.equal(a, b) for a, b in zip(eager, whole, strict=True))
    fewer = train(optimizer_class, compiled, lr, steps=3, **options)  # the comparison can fail
    assert not any(torch.equal(a, b) for a, b in zip(eager, fewer, strict=True))


def test_compiled_step_goes_through_the_operator() -> None:
    calls = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        calls.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    p = torch.ones(4, requires_grad=True)
    p.grad = torch.ones(4)
    optimizer = adamfused.AdamW([p])
    torch._dynamo.reset()
    torch.compile(lambda: optimizer.step(), fullgraph=True, backend=look)()
    assert torch.ops.adamfused.step_ in calls or torch.ops.adamfused.step_.default in calls
    assert optimizer.state[p]["step"] == 1


def test_a_changing_tensor_lr_does_not_recompile() -> None:
    compiles = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        compiles.append(graph)
        return graph.forward

    p = torch.ones(4, requires_grad=True)
    p.grad = torch.ones(4)
    lr = torch.tensor(0.1)
    optimizer = adamfused.AdamW([p], lr=lr)
    torch._dynamo.reset()
    step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend=count)
    step()
    step()
    settled = len(compiles)
    moves = []
    for value in (0.1, 0.05, 0.01):
        lr.fill_(value)
        before = p.detach().clone()
        step()
        moves.append(float((p.detach() - before).abs().max()))
    assert len(compiles) == settled
    assert moves[0] > 1.5 * moves[1] > 3 * moves[2]  # each value was read


def operator_arguments(rule: str, states: int, hyper: list[float], copies: bool = False):
    torch.manual_seed(0)
    params = [torch.randn(5), torch.randn(2, 3)]
    grads = [torch.randn_like(p) for p in params]
    counts = [torch.zeros(()) for _ in params]
    return (
        params,
        grads,
        [torch.zeros_like(p) for p in params for _ in range(states)],
        counts,
        [torch.empty_like(p, dtype=torch.bfloat16) for p in params] if copies else [],
        [],  # masters
        [],  # scales
        [torch.ones(()) for _ in params] if rule in rules.CARRIED else [],
        rule,
        hyper,
        0.1,
    )


ADAM_HYPER = [0.9, 0.999, 1e-8, 0.01, 1.0, 0.0, 1.0]
RMSPROP_HYPER = [0.99, 1e-8, 0.0, 0.9, 0.0]


@pytest.mark.parametrize(
    ("rule", "states", "hyper"),
    [
        ("adam", 2, ADAM_HYPER),
        ("amsgrad", 3, ADAM_HYPER),
        ("rmsprop_centered_momentum", 3, RMSPROP_HYPER),
    ],
)
def test_opcheck(rule: str, states: int, hyper: list[float]) -> None:
    torch.library.opcheck(
        torch.ops.adamfused.step_.default, operator_arguments(rule, states, hyper)
    )


def test_opcheck_of_the_whole_step() -> None:
    """With an average, the gradients' factor and a copy of the weights; and of the sum that the norm is made from."""
    arguments = operator_arguments("adam", 3, ADAM_HYPER, copies=True)
    more = {"ema_decay": 0.9, "factor": torch.tensor(0.5, dtype=torch.float64)}
    torch.library.opcheck(torch.ops.adamfused.step_.default, arguments, more)
    for largest in (False, True):
        torch.library.opcheck(
            torch.ops.adamfused.gradient_norm.default, (arguments[0], arguments[1], largest)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "adm"}, "adamfused::step_: no rule is called 'adm'"),
        ({"hyper": [0.9]}, "adamfused::step_: rule 'adam' takes 7 hyper-parameters, got 1"),
        (
            {"grads": []},
            "adamfused::step_: 2 params need as many grads and steps and 4 states, got 0, 2 and 4",
        ),
        (
            {"copies": [torch.zeros(5)]},
            "adamfused::step_: expected no copies or 2, got 1",
        ),
        (
            {"carried": [torch.ones(())]},
            "adamfused::step_: rule 'adam' carries nothing, got 1 tensors",
        ),
    ],
)
def test_operator_refuses_wrong_lists(change: dict, message: str) -> None:
    names = (
        "params",
        "grads",
        "states",
        "steps",
        "copies",
        "masters",
        "scales",
        "carried",
        "rule",
        "hyper",
        "lr",
    )
    arguments = dict(zip(names, operator_arguments("adam", 2, ADAM_HYPER), strict=True)) | change
    before = [p.clone() for p in arguments["params"]]
    with pytest.raises(RuntimeError) as error:
        torch.ops.adamfused.step_(**arguments)
    assert str(error.value).splitlines()[0] == message
    assert all(torch.equal(a, b) for a, b in zip(before, arguments["params"], strict=True))
