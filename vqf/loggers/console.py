"""Numbers on the terminal and in the run's log.txt."""

import logging
from collections.abc import Mapping

from torch import Tensor

from vqf.protocols import VALIDATION_PREFIX
from vqf.registry import register


@register("logger", "console")
class ConsoleLogger:
    """Says the held-out numbers, a line for each look; those of training stand behind the progress bar."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Print what was measured on held-out data."""
        held_out = {
            key.removeprefix(VALIDATION_PREFIX): value
            for key, value in values.items()
            if key.startswith(VALIDATION_PREFIX)
        }
        if held_out:
            numbers = "  ".join(f"{key} {value:.4g}" for key, value in held_out.items())
            logging.getLogger("vqf").info("step %d, held out:  %s", step, numbers)

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Leave images to others."""

    def close(self) -> None:
        """Nothing is open."""
