"""Loggers and pipelines."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

VALIDATION_PREFIX = "validation/"  # of the log keys of validation metrics


class Logger(Protocol):
    """A destination of numbers and images. Wired: run_dir, config, subrun.

    `subrun` is the run's name in the folder above, as "stage1" of pipeline=full, or "".
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def images(self, step: int, name: str, images: Tensor) -> None: ...  # (B, 3, H, W), shown as a grid

    def close(self) -> None: ...


class Pipeline(Protocol):
    """A job of `python -m vqf.run`. Wired: config, run_dir."""

    def run(self) -> float | None: ...  # what a sweeper minimizes


@runtime_checkable
class Distributed(Protocol):
    """A pipeline that runs in every process of torchrun; others are refused there."""

    distributed: bool  # True


@runtime_checkable
class ChecksStart(Protocol):
    """A pipeline that refuses a bad start of its `run_dir` before anything is written."""

    def check_can_start(self) -> None:
        """Raises UserError if the run cannot start, or resume."""
        ...


def to_steps(value: float, steps: int) -> int:
    """Convert a number of steps, or below 1 a fraction of the run, to steps."""
    return round(value * steps) if 0 < value < 1 else int(value)
