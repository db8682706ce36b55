"""Optimizers by name: what is read, what is refused, what an optimizer is made with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adamfused.spec import Spec, Unsupported, parse_list

pytestmark = pytest.mark.reference


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


def test_a_list_may_have_commas_in_brackets() -> None:
    text = "torch.optim:AdamW[fused=True,betas=(0.9,0.95)], torch.optim:Adam[foreach=False]"
    first, second = parse_list(text)
    assert first.options == {"fused": True, "betas": (0.9, 0.95)}
    assert str(second) == "torch.optim:Adam[foreach=False]"
    made = first.make(params(), lr=0.5)
    assert made.defaults["betas"] == (0.9, 0.95) and made.defaults["lr"] == 0.5


@pytest.mark.parametrize(
    "text, family",
    [
        ("adamfused:Adam", "Adam"),
        ("torch.optim:AdamW", "AdamW"),
        ("torch.optim:Adam[decoupled_weight_decay=True]", "AdamW"),
        ("torch.optim:RMSprop", "RMSprop"),
        ("torch.optim:Adamax", None),
        ("torch.optim:NAdam", "NAdam"),
        ("torch.optim:NAdam[decoupled_weight_decay=True]", "NAdam"),
        ("torch.optim:SGD", "SGD"),
        ("adamfused:Lion", "Lion"),
        ("torch.optim:SparseAdam", None),
        ("torch.optim:ASGD", None),
        ("torch.optim:LBFGS", None),
    ],
)
def test_the_family_is_told_from_the_name(text: str, family: str | None) -> None:
    assert Spec.parse(text).family == family


def test_a_subclass_is_of_the_family_of_torchs_class() -> None:
    class MyAdam(torch.optim.AdamW):
        pass

    assert Spec.of(MyAdam).family == "AdamW"


@pytest.mark.parametrize(
    "name, family",
    [
        ("Lion8bit", "Lion"),
        ("PagedLion32bit", "Lion"),
        ("DeepSpeedCPULion", "Lion"),
        ("FusedSGD", "SGD"),
        ("FusedAdagrad", "Adagrad"),
        ("SGDScheduleFree", None),
        ("RAdamScheduleFree", None),
        ("SGDP", None),
        ("Stallion", None),
        ("MyRMSpropTF", "RMSprop"),
        ("QHAdamW", "AdamW"),
    ],
)
def test_other_libraries_names(name: str, family: str | None) -> None:
    assert Spec.of(type(name, (), {})).family == family


def test_apex_and_deepspeed_call_adamw_adam() -> None:
    def fused_adam(params, adam_w_mode=True):  # apex's default
        return torch.optim.AdamW(params)

    assert Spec.of(fused_adam).family == "AdamW"
    assert Spec.of(fused_adam, options={"adam_w_mode": False}).family == "Adam"


def test_dtypes_and_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nclass Adam(torch.optim.Adam):\n"
        "    def __init__(self, params, lr=1e-3, dtype=None):\n"
        "        super().__init__(params, lr); self.dtype = dtype\n"
    )
    spec = Spec.parse(f"{file}:Adam[dtype=torch.bfloat16]")
    assert spec.make(params()).dtype is torch.bfloat16


def test_what_is_off_need_not_be_taken_and_what_is_on_must() -> None:
    def plain(params, lr):
        return torch.optim.Adam(params, lr)

    def strict(params, lr, **others):
        assert not others
        return torch.optim.Adam(params, lr)

    for function in (plain, strict):
        spec = Spec.of(function, family="Adam")
        assert spec.make(params(), lr=0.1, amsgrad=False).defaults["lr"] == 0.1
    with pytest.raises(Unsupported, match="it takes no amsgrad"):
        Spec.of(plain).make(params(), lr=0.1, amsgrad=True)
    with pytest.raises(Unsupported, match="ValueError: Invalid learning rate: -1"):
        Spec.parse("torch.optim:Adam").make(params(), lr=-1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("torch.optim.Adam", "does not name an optimizer; expected module:Class"),
        ("torch.optim:Adam[fused=True", "does not name an optimizer"),
        ("torch.optim:Adam[fused]", r"options of .* cannot be read; expected name=value"),
        ("torch.optim:Adam[lr=__import__('os')]", "cannot be read"),
        ("torch.optim:Adam[dtype=torch.load]", "cannot be read"),
        ("torch.optim:Admm", "torch.optim has no Admm; the optimizers in it: .*AdamW"),
        ("no.such.module:Adam", "no.such.module cannot be imported: ModuleNotFoundError"),
        ("no_such_file.py:Adam", "no_such_file.py cannot be imported: .*no such file"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spec.parse(text)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="'' names no optimizer"):
        parse_list("")
    with pytest.raises(ValueError, match="expected module:Class or an optimizer class; got int 3"):
        Spec.of(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="family must be one of SGD, .*, Lion; got 'ASGD'"):
        Spec.of("torch.optim:Adam", family="ASGD")
