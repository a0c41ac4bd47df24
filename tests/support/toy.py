"""A plugin for tests of the command line: a pipeline that does as it is told."""

import time
from pathlib import Path

from omegaconf import DictConfig

from vqf import register
from vqf.errors import UserError
from vqf.terminal import log


@register("pipeline", "toy")
class Toy:
    """Write `count` into a file, then do as told."""

    def __init__(self, config: DictConfig, run_dir: Path, *, count: int = 1, do: str = "nothing") -> None:
        self.config, self.run_dir, self.count, self.do = config, run_dir, count, do

    def run(self) -> float:
        """Return the count."""
        log.info("the toy runs")
        (self.run_dir / "count").write_text(str(self.count))
        if self.do == "refuse" and self.count == 2:
            raise UserError("count=2: the toy wants another")
        if self.do == "break":
            raise IndexError("a bug")
        if self.do == "misread":
            return self.config.no_such_word
        if self.do == "look":
            return float(len(self.config.metric) + len(self.config.model.loss) + (self.config.data is None))
        if self.do == "wait":
            print("waiting", flush=True)
            time.sleep(60)
        return float(self.count)
