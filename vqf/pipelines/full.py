"""Everything in one go: a tokenizer, its tokens, a prior, samples, numbers and a page that shows them."""

import json
import math
import time
from pathlib import Path

from omegaconf import DictConfig, open_dict

from vqf import terminal
from vqf.pipelines.common import chosen, start_run
from vqf.pipelines.loop import Evaluation
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.registry import register
from vqf.terminal import console, log

TABLE = "held-out pictures"


@register("pipeline", "full")
class Full:
    """Both stages after each other; `stage2.*` says what the second does differently."""

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    def run(self) -> float | None:
        """Train both stages, write `metrics.json` and the report. Returns stage 2's nats per token."""
        began = time.monotonic()
        stage1, stage2 = self.run_dir / "stage1", self.run_dir / "stage2"
        first = Stage1(self._config(stage1), stage1).train()
        second = Stage2(self._config(stage2, run=stage1, **self._second()), stage2).train()
        self._conclude(first, second, began)
        return second.scalars["nats_per_token"]

    def _config(self, run_dir: Path, **values: object) -> DictConfig:
        """Return the config of one stage: it keeps its own numbers, but the page is made once, at the end."""
        config = self.config.copy()
        with open_dict(config):
            config.run_dir = str(run_dir)
            config.logger = {name: node for name, node in chosen(config, "logger").items() if name != "report"}
            if config.resume is not False:
                config.resume = True
            for key, value in values.items():
                config[key] = str(value) if isinstance(value, Path) else value
        return config

    def _second(self) -> dict[str, object]:
        return {str(key): value for key, value in self.config.stage2.items()}

    def _conclude(self, first: Evaluation, second: Evaluation, began: float) -> None:
        numbers = {TABLE: first.scalars, "codes": second.scalars}
        (self.run_dir / "metrics.json").write_text(json.dumps(numbers, indent=1))
        with start_run(self.config, self.run_dir, began) as journal:
            journal.images(self.config.steps, "reconstructions", first.images["reconstructions"])
            journal.images(self.config.stage2.steps, "samples", second.images["samples"])
        seconds = time.monotonic() - began
        nats, most = second.scalars["nats_per_token"], second.scalars["log_vocabulary"]
        rows = [(key, f"{value:.4g}") for key, value in first.scalars.items()]
        rows += [("stage 2, nats per token", f"{nats:.3f}"), ("  of a code drawn blindly", f"{most:.3f}")]
        terminal.table(f"{TABLE}, after {math.floor(seconds / 60)} min {seconds % 60:.0f} s", ("metric", "value"), rows)
        self._point()

    def _point(self) -> None:
        for path in [*sorted((self.run_dir / "images").glob("*-latest.png")), self.run_dir / "report.html"]:
            if path.is_file():
                log.info("%s", path)
        console.print("\nWhat to try next:", style="bold")
        for command in self._next():
            log.info("  python -m vqf.run %s", command)

    def _next(self) -> list[str]:
        run = self.run_dir
        return [
            f"pipeline=sample run={run} count=64 sampler.temperature=0.9",
            f"pipeline=reconstruct run={run} images=FOLDER_OF_YOUR_PICTURES",
            '-m experiment=quickstart pipeline=stage1 model/quantizer=vq,ema "model/loss=[l1],[l1,features]"',
        ]
