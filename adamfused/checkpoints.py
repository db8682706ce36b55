"""State dicts, pickles, and from one format into another."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from . import checks
from .base import BaseOptimizer
from .formats import Random, place_key
from .options import GROUP_EXTRAS
from .shards import first_number
from .storage import STEP, check_options, converted, in_float32, seed_of

_OWN_KEYS = ("state_dtype", "master_weights")  # of a group; what a checkpoint has does not matter


class Checkpoints(BaseOptimizer):
    """Saves and loads."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options, "_copies": self._copies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._results = {}
        loading: dict[Tensor, dict[str, Any]] | None = self.__dict__.get("_loading")
        for group in self.param_groups:
            for key, value in self._group_defaults.items():
                group.setdefault(key, value)
            for p in group["params"]:
                if loading is not None and p in loading:
                    self.state[p] = loading[p]
                entry = self.state.get(p)
                if not entry:
                    continue
                for key in self._counts():
                    count = entry[key]
                    if not isinstance(count, Tensor):
                        count = torch.tensor(float(count), dtype=torch.float32, device="cpu")
                    if loading is not None:
                        on_device = group.get("capturable", False)
                        device = p.device if on_device else torch.device("cpu")
                        narrow = count.is_floating_point() and count.dtype.itemsize < 4
                        dtype = torch.float32 if on_device or narrow else count.dtype
                        # a copy, because all parameters may share it
                        count = count.to(device=device, dtype=dtype, copy=True)
                    entry[key] = count

    @torch._disable_dynamo
    def state_dict(self, *, format: Literal["torch"] | None = None) -> dict[str, Any]:
        """A checkpoint: plain tensors and numbers, as ``torch.optim`` has it, in the formats of this optimizer.

        Args:
            format: ``"torch"`` for what the ``torch.optim`` namesake loads: states of 8 bits as float32, and nothing
                that it does not know. What it has no place for is left out: masters, averages of the weights, and the
                options of this library, such as ``bias_correction``.

        Raises:
            ValueError: for another ``format``.

        Example:
            >>> import torch, adamfused
            >>> weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
            >>> weight.grad = torch.ones_like(weight)
            >>> optimizer = adamfused.AdamW([weight], master_weights="split16", state_dtype="int8")
            >>> optimizer.step()
            >>> list(optimizer.state_dict()["state"][0])
            ['step', 'exp_avg', 'exp_avg_sq', 'master', 'exp_avg_scale', 'exp_avg_sq_scale']
            >>> list(optimizer.state_dict(format="torch")["state"][0])
            ['step', 'exp_avg', 'exp_avg_sq']
            >>> torch.optim.AdamW([weight]).load_state_dict(optimizer.state_dict(format="torch"))
        """
        if format not in (None, "torch"):
            raise ValueError(f"Invalid format value: {format!r}; expected None or 'torch'")
        saved = super().state_dict()
        if format is None:
            return saved
        ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
        params = {i: p for i, (_, _, p) in zip(ids, self._each(), strict=True)}
        counts = [key for key in self._counts() if key not in self._torch_lacks]
        states = {
            i: in_float32(params[i], entry, counts, self._known_states) if i in params else entry
            for i, entry in saved["state"].items()
        }
        states = {i: entry for i, entry in states.items() if entry}
        groups = [
            {key: value for key, value in group.items() if key not in self._extra_keys()}
            for group in saved["param_groups"]
        ]
        return {**saved, "state": states, "param_groups": groups}

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of its ``torch.optim`` namesake.

        Options come from the checkpoint, as in torch, except for ``state_dtype`` and ``master_weights``, which stay
        what they are: states and masters are converted where the checkpoint has them in another format. With
        ``state_dtype=None``, floating states keep the dtype that they have in the checkpoint. A master that the
        checkpoint lacks is made of the parameter as it is, so load the model first. Parameters are not written.

        Raises:
            ValueError: if a state does not fit its parameter; the optimizer is then as it was.
        """
        # The last hook: those of the user have run.
        handle = self.register_load_state_dict_pre_hook(lambda _, saved: self._taken(saved))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_loading", None)

    @torch.no_grad()
    def _taken(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Refuses what does not fit, keeps the entries for `__setstate__`, and leaves to torch what remains: it would
        cast them to the parameters' dtypes."""
        saved_groups = state_dict["param_groups"]
        lengths = [len(g["params"]) for g in saved_groups]
        if lengths != [len(g["params"]) for g in self.param_groups]:
            return state_dict  # torch's own message follows
        groups = [self._taken_group(j, saved) for j, saved in enumerate(saved_groups)]
        plans = [self._plan(self._group_defaults | group) for group in groups]
        states = dict(state_dict["state"].items())
        self._loading: dict[Tensor, dict[str, Any]] = {}
        ids = chain.from_iterable(g["params"] for g in saved_groups)
        for place, ((j, _, p), saved_id) in enumerate(zip(self._each(), ids, strict=True)):
            group = groups[j]
            problem = self._format_problem(p, group)
            entry = states.get(saved_id)
            if entry:
                entry = self._completed(entry)
            if entry and problem is None:
                late = [key for key in self._late_states if key not in entry]
                plan = plans[j]._replace(keys=tuple(k for k in plans[j].keys if k not in late))
                problem = checks.load_problem(
                    p, entry, plan, self._known_keys(), group.get("master_weights")
                )
            if problem:
                raise ValueError(f"{self._place(p)}: {problem}")
            if entry:
                del states[saved_id]
                key = place_key(seed_of(group), place)
                random = Random.at_step(key, float(entry[STEP]), first_number(p) or 0)
                self._loading[p] = converted(
                    p, entry, group, self._counts(), self._known_states, random
                )
        return {**state_dict, "state": states, "param_groups": groups}

    def _extra_keys(self) -> tuple[str, ...]:
        """What groups may have and torch's have not."""
        return (*GROUP_EXTRAS, *self._own_options)

    def _taken_group(self, j: int, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The j-th group of a checkpoint with this optimizer's own formats."""
        # torch puts differentiable=False into the defaults of what it has pickled or copied.
        optional = {*self._extra_keys(), *self._group_defaults, "differentiable"}
        lacking = [key for key in self.defaults if key not in saved and key not in optional]
        if lacking:
            raise ValueError(
                f"{type(self).__name__}: group {j} of the checkpoint lacks {', '.join(map(repr, lacking))}; "
                "expected all options of this optimizer; it was saved by another one, or is not whole"
            )
        own = {k: v for k, v in self.param_groups[j].items() if k in self._extra_keys()}
        group = own | {k: v for k, v in saved.items() if k not in _OWN_KEYS}
        whole = self._group_defaults | group
        self._check_group(whole)
        check_options(group)
        if not isinstance(
            whole.get("capturable", False), (bool, int)
        ):  # it is asked for when states have been replaced
            raise ValueError(
                f"Invalid capturable value: {whole['capturable']!r}; expected True or False"
            )
        self._check_average(whole)
        return group
