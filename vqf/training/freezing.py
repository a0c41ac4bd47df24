"""Frozen parts of a model: no gradient, no update, eval mode."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from vqf.errors import UserError, unknown_message
from vqf.terminal import log


class FrozenParts:
    """The parts of a model whose names `patterns` match; call it before the optimizer is built.

    Args:
        patterns: Names of modules, parameters or buffers, such as "encoder", or patterns such as "blocks.[01].*". A
            module's name stands for all that is in it.

    Raises:
        UserError: If a pattern matches nothing, or nothing is left to train.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str]) -> None:
        self.modules: list[nn.Module] = []
        if not patterns:
            return
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        names = [*parameters, *buffers]
        for pattern in patterns:
            if not any(_matches(name, [pattern]) for name in names):
                parts = sorted({name.split(".")[0] for name in names})
                raise UserError(f"freeze={pattern}: {unknown_message('part of the model', pattern, parts)}")
        frozen = {name for name in names if _matches(name, patterns)}
        if frozen >= parameters.keys():
            raise UserError(f"freeze=[{','.join(patterns)}]: nothing is left to train")
        for name in frozen & parameters.keys():
            parameters[name].requires_grad_(False)
        self.modules = [module for name, module in model.named_modules() if name and _is_within(name, names, frozen)]
        count = sum(parameters[name].numel() for name in frozen & parameters.keys())
        total = sum(parameter.numel() for parameter in parameters.values())
        log.info("frozen: %s, %s of %s parameters", ", ".join(patterns), f"{count:,}", f"{total:,}")

    def eval(self) -> None:
        """Put the frozen modules into eval mode, after the model was put into train mode."""
        for module in self.modules:
            module.eval()

    def __contains__(self, module: object) -> bool:
        return any(module is each for each in self.modules)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    parts = name.split(".")
    heads = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(head, pattern) for pattern in patterns for head in heads)


def _is_within(module: str, names: Iterable[str], frozen: set[str]) -> bool:
    inside = [name for name in names if name.startswith(f"{module}.")]
    return bool(inside) and frozen.issuperset(inside)
