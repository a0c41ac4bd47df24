"""What a comparison is: declared above a test, measured inside it, listed in docs/fidelity.md."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Tensors = Tensor | Mapping[str, Tensor]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass(frozen=True)
class Comparison:
    """One row of the table."""

    part: str  # of vqf
    peer: str  # the package and class it is compared with
    what: str
    exact: bool = field(default=False, compare=False)  # in float64 alone


@dataclass(frozen=True)
class Gap:
    """How far apart two sides are, or, where `peer` is a number, how far each is from the float64 truth."""

    ours: float
    peer: float | None = None

    def __str__(self) -> str:
        own = f"{self.ours:.0e}" if self.ours else "equal"
        return own if self.peer is None else f"{own}, peer {self.peer:.0e}"


@dataclass(frozen=True)
class Declared:
    """What stands above a test: the first lines of its module's and its own docstring, and the dtypes it runs in."""

    title: str
    how: str
    dtypes: tuple[torch.dtype, ...]


Results = dict[tuple[Comparison, torch.dtype], Gap]  # the largest of each
RESULTS = pytest.StashKey[Results]()


def compares(part: str, peer: str, *what: str, exact: bool = False) -> pytest.MarkDecorator:
    """Declare what a test compares. It must `record` all of it, and nothing else.

    `exact` is for gradients: through forty layers the rounding of float32 is as large as a small mistake, and it
    moves units over the edge of their ReLU. They are compared in float64 alone; test_rounding measures them in float32.
    """
    return pytest.mark.compares(*(Comparison(part, peer, each, exact) for each in what))


def difference(ours: Tensors, theirs: Tensors) -> float:
    """Return max |ours - theirs| / max |theirs|.

    Of named tensors it is the largest such number of a layer: weight and bias have one maximum, since the gradient
    of a key's bias, say, is 0 in exact arithmetic and only rounding in floating point.
    """
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return difference({"": ours}, {"": theirs})  # type: ignore[dict-item]
    assert set(ours) == set(theirs), f"only one side has {sorted(set(ours) ^ set(theirs))}"
    scales: dict[str, float] = {}
    for name, each in theirs.items():
        layer = name.rpartition(".")[0]
        scales[layer] = max(scales.get(layer, 0.0), _largest(each))
    return max(_largest_gap(ours[name], theirs[name]) / (scales[name.rpartition(".")[0]] or 1.0) for name in theirs)


def distance(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Return |found - truth| / |truth|, of all tensors as one vector."""
    assert set(found) == set(truth), f"only one side has {sorted(set(found) ^ set(truth))}"
    gaps = torch.stack([(found[name].double() - truth[name].double()).norm() for name in truth])
    return float(gaps.norm() / torch.stack([each.double().norm() for each in truth.values()]).norm())


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of all parameters, which must all have one."""
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(each is not None for each in found.values()), [name for name, each in found.items() if each is None]
    return found  # type: ignore[return-value]


def declared() -> dict[Comparison, Declared]:
    """Return every comparison of this folder."""
    found: dict[Comparison, Declared] = {}
    for module, test in _tests():
        for mark in getattr(test, "pytestmark", []):
            for each in mark.args if mark.name == "compares" else ():
                assert each not in found, f"{each} is declared twice"
                found[each] = Declared(_first_line(module), _first_line(test), _dtypes(test, each))
    return found


def lacking(results: Results) -> list[str]:
    """Name the numbers that `results` ought to hold and does not."""
    wanted = [(each, dtype) for each, about in declared().items() for dtype in about.dtypes]
    return [f"{each.part}, {each.peer}: {each.what}, {dtype}" for each, dtype in wanted if (each, dtype) not in results]


def _dtypes(test: Callable[..., Any], comparison: Comparison) -> tuple[torch.dtype, ...]:
    """Return the dtypes that a test is run in: those of its own `dtype`, of the fixture, or float64."""
    own = [mark.args[1] for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] == "dtype"]
    if own:
        return tuple(own[0])
    takes = "dtype" in inspect.signature(test).parameters and not comparison.exact
    return tuple(TOLERANCE) if takes else (torch.float64,)


def _tests() -> Iterator[tuple[Any, Callable[..., Any]]]:
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.name.startswith("test_"):
            module = importlib.import_module(f"{__package__}.{info.name}")
            yield from ((module, each) for name, each in vars(module).items() if name.startswith("test_"))


def _first_line(of: Any) -> str:
    text = inspect.getdoc(of)
    assert text, f"{of} has no docstring, which the table needs"
    return text.split("\n\n")[0].replace("\n", " ")


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().double().abs().max())


def _largest_gap(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{ours.dtype} and {theirs.dtype}"
    gap = _largest(ours.detach().double() - theirs.detach().double())
    assert gap == gap, "not a number"
    return gap
