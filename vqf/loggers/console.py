"""The console logger."""

import logging
from collections.abc import Mapping

from torch import Tensor

from vqf.protocols import VALIDATION_PREFIX
from vqf.registry import register
from vqf.terminal import format_number


@register("logger", "console")
class ConsoleLogger:
    """Prints the metrics of every validation in one line."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        metrics = "  ".join(
            f"{key.removeprefix(VALIDATION_PREFIX)} {format_number(value)}"
            for key, value in values.items()
            if key.startswith(VALIDATION_PREFIX)
        )
        if metrics:
            logging.getLogger("vqf").info("step %d, validation:  %s", step, metrics)

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Ignore images."""

    def close(self) -> None:
        """Do nothing."""
