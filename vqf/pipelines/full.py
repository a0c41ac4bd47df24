"""Everything in one go: a tokenizer, its tokens, a prior, samples, numbers and a page that shows them."""

import math
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, open_dict

from vqf import terminal
from vqf.config.access import group_nodes
from vqf.dataloading.training_target import target_is_class_map
from vqf.distributed import comm
from vqf.evaluation.reconstruction import PRIOR_METRIC_DIRECTIONS, metric_directions
from vqf.evaluation.validation import ValidationResult
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.registry import register
from vqf.runs.checkpoint import checkpoint_names, latest_checkpoint
from vqf.runs.provenance import ResourceMeter
from vqf.runs.retention import parse_best_criterion
from vqf.runs.run_logger import save_metrics, start_run
from vqf.terminal import console, log

VALIDATION_TABLE = "held-out images"
# What a tokenizer of maps of classes is trained by, where maps.model does not say otherwise; see `losses.classes`.
CLASS_MAP_MODEL = {"loss": {"bce": {"name": "bce"}}, "discriminator": None, "adversary": None, "regularizer": {}}


@register("pipeline", "full")
class Full:
    """Both stages after each other; `stage2.*` says what the second does differently.

    Where the prior reads maps and no run has their tokenizer, it is trained, too; `maps.*` says how it differs. Maps of
    classes learn by `bce`, without a discriminator.
    """

    distributed = True

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    def check_can_start(self) -> None:
        """Refuse what would spoil the run in the folder, before anything is written there."""
        stage1, stage2 = self.run_dir / "stage1", self.run_dir / "stage2"
        Stage1(self._stage_config(stage1), stage1).check_can_start()
        if checkpoint_names(stage2):
            Stage2(self._stage_config(stage2, run=stage1, **self._stage2_overrides()), stage2).check_can_start()

    def run(self) -> float | None:
        """Train both stages, write `metrics.json` and the report. Returns stage 2's nats per token."""
        meter = ResourceMeter()
        parse_best_criterion(self.config.checkpoint.best, {**metric_directions(self.config), **PRIOR_METRIC_DIRECTIONS})
        stage1, stage2 = self.run_dir / "stage1", self.run_dir / "stage2"
        self._train_map_tokenizer(self.run_dir / "maps")
        first = Stage1(self._stage_config(stage1), stage1).train("stage1")
        second = Stage2(self._stage_config(stage2, run=stage1, **self._stage2_overrides()), stage2).train("stage2")
        if comm.is_main():
            self._write_results(first, second, meter)
        return second.scalars["nats_per_token"]

    def _stage_config(self, run_dir: Path, **values: object) -> DictConfig:
        """Return the config of one stage: it keeps its own numbers, but the page is made once, at the end."""
        config = self.config.copy()
        with open_dict(config):
            config.run_dir = str(run_dir)
            config.logger = {name: node for name, node in group_nodes(config, "logger").items() if name != "report"}
            if config.resume is not False:
                config.resume = True
            for key, value in values.items():
                config[key] = str(value) if isinstance(value, Path) else value
            if config.checkpoint.best not in (
                PRIOR_METRIC_DIRECTIONS if run_dir.name == "stage2" else metric_directions(config)
            ):
                config.checkpoint.best = None  # a number of the other stage
        return config

    def _train_map_tokenizer(self, run_dir: Path) -> None:
        """Train the tokenizer of maps if the prior reads maps and nobody says which run has theirs."""
        told = group_nodes(self.config.model, "conditioner").get("spatial")
        if told is None or told.run is not None:
            return
        self.config = self.config.copy()
        self.config.model.conditioner.spatial.run = str(run_dir)
        config = self._stage_config(run_dir, target="condition")
        if target_is_class_map(config):
            with open_dict(config):
                config.model.update(CLASS_MAP_MODEL)
            log.info("maps of classes: their tokenizer learns by model/loss=[bce], with no discriminator")
        for key, value in self.config.maps.items():
            if key == "model":
                config.model.update(value)
            else:
                config[key] = value
        Stage1(config, run_dir).train("maps")

    def _stage2_overrides(self) -> dict[str, object]:
        return {str(key): value for key, value in self.config.stage2.items()}

    def _write_results(self, stage1: ValidationResult, stage2: ValidationResult, meter: ResourceMeter) -> None:
        save_metrics(self.run_dir, {VALIDATION_TABLE: stage1.scalars, "codes": stage2.scalars})
        with start_run(self.config, self.run_dir, meter) as journal:
            journal.images(self._finished_steps("stage1"), "reconstructions", stage1.images["reconstructions"])
            for name, images in stage2.images.items():
                journal.images(self._finished_steps("stage2"), name, images)
        seconds = meter.elapsed_seconds
        nats, most = stage2.scalars["nats_per_token"], stage2.scalars["uniform_nats"]
        rows = [(key, f"{value:.4g}") for key, value in stage1.scalars.items()]
        rows += [("stage 2, nats per token", f"{nats:.3f}"), ("  of a code drawn blindly", f"{most:.3f}")]
        rows += _class_rows(stage2.scalars)
        terminal.print_table(
            f"{VALIDATION_TABLE}, after {math.floor(seconds / 60)} min {seconds % 60:.0f} s", ("metric", "value"), rows
        )
        self._print_next_steps()

    def _finished_steps(self, stage: str) -> int:
        """Return the steps of a stage that is finished; `minutes` may have decided them."""
        found = latest_checkpoint(self.run_dir / stage)
        return self.config.steps if found is None else found.step

    def _print_next_steps(self) -> None:
        for path in [*sorted((self.run_dir / "images").glob("*-latest.png")), self.run_dir / "report.html"]:
            if path.is_file():
                log.info("%s", path)
        console.print("\nWhat to try next:", style="bold")
        for command in self._next_commands():
            log.info("  python -m vqf.run %s", command)

    def _next_commands(self) -> list[str]:
        run = self.run_dir
        return [
            f"pipeline=sample run={run} count=64 sampler.temperature=0.9",
            f"pipeline=reconstruct run={run} images=FOLDER_OF_YOUR_IMAGES",
            '-m experiment=quickstart pipeline=stage1 model/quantizer=vq,ema "model/loss=[l1],[l1,features]"',
        ]


def _class_rows(scalars: Mapping[str, float]) -> list[tuple[str, str]]:
    if "class_accuracy" not in scalars:
        return []
    samples, real, chance = (f"{scalars[f'class_accuracy{each}']:.1%}" for each in ("", "_real", "_chance"))
    return [("stage 2, samples seen as their class", samples), ("  held-out images; chance", f"{real}; {chance}")]
