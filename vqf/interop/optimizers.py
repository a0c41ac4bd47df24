"""The state of Adam, from a list in somebody's order to names, and back to the order of an optimizer of vqf's."""

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
    """What an optimizer remembers of every parameter, by name, and what it was set to."""

    entries: dict[str, dict[str, Tensor]]
    options: dict[str, Any]  # of its first group


def name_state(
    saved: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    renamed: Mapping[str, str],
    shapes: Mapping[str, Size],
) -> OptimizerState:
    """Name the entries of a saved state.

    Args:
        saved: As `state_dict()` of the optimizer gives it.
        groups: The names of its parameters, in its order.
        renamed: From those names to vqf's.
        shapes: Of vqf's parameters.

    Raises:
        ValueError: If it is of another number of parameters, or of others.
    """
    names = [name for group in groups for name in group]
    try:
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        found, options = saved["state"], _options(saved["param_groups"][0])
    except (LookupError, TypeError) as error:
        raise ValueError("it is not a state of an optimizer of torch's") from error
    if len(numbers) != len(names):
        raise ValueError(f"it is of {len(numbers)} parameters and the model has {len(names)}")
    entries = {}
    for number, name in zip(numbers, names, strict=True):
        if number in found:
            new = renamed[name]
            entries[new] = _entry(found[number], name, shapes[new])
    return OptimizerState(entries, options)


def load_named_state(optimizer: Optimizer, module: nn.Module, state: OptimizerState) -> None:
    """Give an optimizer over the parameters of a module a state by their names."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    whole = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        if entry := state.entries.get(names[id(parameter)]):
            whole["state"][number] = entry
    optimizer.load_state_dict(whole)


def reorder_state(saved: Mapping[str, Any], order: Sequence[str], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Turn a state of vqf's into one in another order.

    Args:
        saved: As `state_dict()` gives it.
        order: The names of its parameters, in its order.
        groups: The same names, in the groups and the order that are wanted.
    """
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
    entry = {}
    for key in ADAM_MOMENTS:
        if isinstance(tensor := saved.get(key), Tensor):
            tensor = tensor[:, : shape[1]] if tensor.ndim == 3 else tensor  # positions that no token takes
            if tensor.shape != shape:
                raise ValueError(f"its '{key}' of '{name}' has another shape than the parameter")
            entry[key] = tensor.float().clone()
    step = saved.get("step", 0)  # a plain number before torch 1.12
    return {**entry, "step": torch.tensor(float(step))}


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: group[key] for key in HYPERPARAMETERS if isinstance(group.get(key), int | float | list | tuple)}
    return {
        key: [float(each) for each in value] if isinstance(value, list | tuple) else float(value)
        for key, value in found.items()
    }
