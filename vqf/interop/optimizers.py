"""Translates Adam states between projects by parameter names."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.optim import Optimizer

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


@dataclass
class OptimizerState:
    """State by parameter name, and hyperparameters."""

    entries: dict[str, dict[str, Tensor]]
    options: dict[str, Any]  # hyperparameters of its first group


def name_state(
    saved: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    renamed: Mapping[str, str],
    shapes: Mapping[str, Size],
) -> OptimizerState:
    """Name the entries of an optimizer's `state_dict()`, whose parameters have the source names `groups`.

    Raises:
        ValueError: If the number or shapes of the parameters differ, or it is no such state.
    """
    names = [name for group in groups for name in group]
    try:
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        states, options = saved["state"], _options(saved["param_groups"][0])
    except (LookupError, TypeError, AttributeError) as error:  # the values are the file's
        raise ValueError("it is not a state of a torch optimizer") from error
    if len(numbers) != len(names):
        raise ValueError(f"it is of {len(numbers)} parameters, but the model has {len(names)}")
    entries = {}
    for number, name in zip(numbers, names, strict=True):
        if number in states:
            new = renamed[name]
            entries[new] = _entry(states[number], name, shapes[new])
    return OptimizerState(entries, options)


def load_named_state(optimizer: Optimizer, module: nn.Module, state: OptimizerState) -> None:
    """Load a named state into the optimizer of a module."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    state_dict = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        if entry := state.entries.get(names[id(parameter)]):
            state_dict["state"][number] = entry
    optimizer.load_state_dict(state_dict)


def reorder_state(saved: Mapping[str, Any], order: Sequence[str], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Reorder a `state_dict()` from `order` to `groups`."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    entries = {name: saved["state"].get(number) for number, name in zip(numbers, order, strict=True)}
    result: dict[str, Any] = {"state": {}, "param_groups": []}
    first = 0
    for group, names in zip(saved["param_groups"], groups, strict=True):
        result["param_groups"].append({**group, "params": list(range(first, first + len(names)))})
        for name in names:
            if entries[name] is not None:
                result["state"][first] = entries[name]
            first += 1
    return result


def _entry(saved: Mapping[str, Any], name: str, shape: Size) -> dict[str, Tensor]:
    if not isinstance(saved, Mapping):
        raise ValueError(f"its entry of '{name}' is a {type(saved).__name__}")
    entry = {}
    for key in ADAM_MOMENTS:
        if isinstance(tensor := saved.get(key), Tensor):
            if tensor.ndim == 3:  # a position embedding, without the rows that no token reaches
                tensor = tensor[:, : shape[1]]
            if tensor.shape != shape:
                raise ValueError(f"its '{key}' of '{name}' has another shape than the parameter")
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise ValueError(f"its '{key}' of '{name}' is not finite")
            entry[key] = tensor.float().clone()
    step = saved.get("step", 0)  # a plain number before torch 1.12
    return {**entry, "step": torch.tensor(float(step))}


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: group[key] for key in HYPERPARAMETERS if isinstance(group.get(key), int | float | list | tuple)}
    options = {
        key: [float(each) for each in value] if isinstance(value, list | tuple) else float(value)
        for key, value in values.items()
    }
    for key, value in options.items():
        if not all(map(math.isfinite, value if isinstance(value, list) else [value])):
            raise ValueError(f"its {key} is {value}")
    return options
