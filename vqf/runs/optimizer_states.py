"""Checks of optimizers.pt before it reaches an optimizer: torch takes any value, and fails at a later step."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

ELEMENTWISE = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}  # of the shape of their parameter


def check_optimizer_states(content: Any) -> None:
    """Check that `content` maps "optimizers" and "schedules" to state dicts by name.

    Raises:
        ValueError: If it has another structure.
    """
    _check_is(content, dict, "it")
    for kind in ("optimizers", "schedules"):
        states = content.get(kind, {})
        _check_is(states, dict, f"'{kind}'")
        for name, state in states.items():
            _check_is(state, dict, f"'{kind}.{name}'")
    for name, state in content.get("optimizers", {}).items():
        _check_structure(state, f"optimizers.{name}")


def _check_structure(state: Mapping[str, Any], where: str) -> None:
    entries: Any = state.get("state")
    groups: Any = state.get("param_groups")
    _check_is(entries, dict, f"'{where}.state'")
    _check_is(groups, list, f"'{where}.param_groups'")
    for number, entry in entries.items():
        _check_is(entry, dict, f"'{where}.state.{number}'")
    for group in groups:
        _check_is(group, dict, f"a group in '{where}.param_groups'")
        _check_is(group.get("params"), list, f"'params' in '{where}.param_groups'")


def check_fits_optimizer(saved: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Compare a state with the optimizer that is to load it: options, and the moments of each parameter.

    Raises:
        ValueError: If a value has another type or shape, or is not finite.
    """
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=False):  # torch compares the numbers
        for key in group.keys() & own.keys() - {"params"}:
            if problem := _option_problem(group[key], own[key]):
                raise ValueError(f"{key} is {problem}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entry in saved["state"].items():
        if not isinstance(number, int) or not 0 <= number < len(parameters):
            raise ValueError(f"it has a state of parameter {number}, and there are {len(parameters)}")
        for key, value in entry.items():
            if key in ELEMENTWISE and getattr(value, "shape", None) != parameters[number].shape:
                raise ValueError(f"'{key}' of parameter {number} has another shape than the parameter")


def check_fits_schedule(saved: Mapping[str, Any], schedule: LRScheduler) -> None:
    """Compare a state with the schedule that is to load it.

    Raises:
        ValueError: If a value is unknown, of another type, or not finite.
    """
    own = schedule.state_dict()
    for key, value in saved.items():
        if key not in own:
            raise ValueError(f"it has no '{key}'")
        if problem := _option_problem(value, own[key]):
            raise ValueError(f"'{key}' is {problem}")


def _option_problem(value: Any, own: Any) -> str | None:
    """What is wrong with a saved value in place of `own`, if anything."""
    if isinstance(own, bool | int | float) and not isinstance(value, bool | int | float | Tensor):
        return f"a {type(value).__name__}, not a number"
    if isinstance(own, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(own):
            return f"not {len(own)} values"
        return next(_problems(value, own), None)
    if isinstance(value, float) and not math.isfinite(value) and isinstance(own, float) and math.isfinite(own):
        return str(value)
    return None


def _problems(values: Any, own: Any) -> Iterator[str]:
    for value, own_value in zip(values, own, strict=True):
        if problem := _option_problem(value, own_value):
            yield problem


def _check_is(value: Any, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is a {type(value).__name__}, not a {kind.__name__}")
