"""metrics.jsonl, the record of a run that every other view of it is made from, and the fan-out to loggers."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from vqf.protocols import Logger


class Journal:
    """Appends scalars to `metrics.jsonl` and hands them, and pictures, to every logger."""

    def __init__(self, run_dir: Path, loggers: Sequence[Logger]) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        self.loggers = loggers
        self.began = time.time()

    def rewind(self, step: int) -> None:
        """Forget what an interrupted process wrote after the checkpoint that the run goes on from."""
        if not self.path.is_file():
            return
        lines = [line for line in self.path.read_text().splitlines() if _step(line) <= step]
        self.path.write_text("".join(f"{line}\n" for line in lines))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of a step."""
        finite = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time() - self.began, 3), **finite}) + "\n")
        for logger in self.loggers:
            logger.scalars(step, values)

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Record pictures (B, 3, H, W) of a step."""
        for logger in self.loggers:
            logger.images(step, name, images)

    def close(self) -> None:
        """Let every logger finish."""
        for logger in self.loggers:
            logger.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that a killed process left half-written
        return math.inf
