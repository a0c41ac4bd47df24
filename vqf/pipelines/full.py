"""Train both stages in one run."""

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, open_dict

from vqf import terminal
from vqf.config.access import group_nodes
from vqf.dataloading.training_target import target_is_class_map
from vqf.distributed import comm
from vqf.evaluation.likelihood import objective, prior_directions
from vqf.evaluation.reconstruction import metric_directions
from vqf.evaluation.validation import VALIDATION_TABLE, ValidationResult
from vqf.options.typed_nodes import to_cli
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.registry import register
from vqf.runs.checkpoint import checkpoint_names, latest_checkpoint
from vqf.runs.provenance import ResourceMeter
from vqf.runs.retention import parse_best_criterion
from vqf.runs.run_logger import save_metrics, start_run
from vqf.terminal import console, log

# Changes for a tokenizer of class maps, unless maps.model overrides them: their channels are class logits.
CLASS_MAP_MODEL = {"loss": {"bce": {"name": "bce"}}, "discriminator": None, "adversary": None, "regularizer": {}}


@register("pipeline", "full")
class Full:
    """Train both stages one after the other; `stage2.*` holds the options that differ in stage 2.

    A prior on condition maps without a `run` gets a tokenizer of maps first, with the overrides of `maps.*`.
    """

    distributed = True

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    def check_can_start(self) -> None:
        stage1, stage2 = self.run_dir / "stage1", self.run_dir / "stage2"
        Stage1(self._stage_config(stage1), stage1).check_can_start()
        if checkpoint_names(stage2):  # else there is nothing to damage, and maybe no stage 1 to inherit from
            Stage2(self._stage_config(stage2, run=stage1, **self._stage2_overrides()), stage2).check_can_start()

    def run(self) -> float | None:
        meter = ResourceMeter()
        directions = {**metric_directions(self.config), **prior_directions(self.config)}
        parse_best_criterion(self.config.checkpoint.best, directions)
        stage1, stage2 = self.run_dir / "stage1", self.run_dir / "stage2"
        self._train_map_tokenizer(self.run_dir / "maps")
        stage1_result = Stage1(self._stage_config(stage1), stage1).train("stage1")
        stage2_config = self._stage_config(stage2, run=stage1, **self._stage2_overrides())
        stage2_result = Stage2(stage2_config, stage2).train("stage2")
        if comm.is_main():
            self._write_results(stage1_result, stage2_result, meter)
        return objective(stage2_result.scalars)

    def _stage_config(self, run_dir: Path, **values: object) -> DictConfig:
        config = self.config.copy()
        with open_dict(config):
            config.run_dir = str(run_dir)
            # The report covers both stages and is written once, at the end.
            config.logger = {name: node for name, node in group_nodes(config, "logger").items() if name != "report"}
            if config.resume is not False:
                config.resume = True
            for key, value in values.items():
                config[key] = str(value) if isinstance(value, Path) else value
            directions = prior_directions(config) if run_dir.name == "stage2" else metric_directions(config)
            if config.checkpoint.best not in directions:
                config.checkpoint.best = None  # a metric of the other stage
        return config

    def _train_map_tokenizer(self, run_dir: Path) -> None:
        spatial = group_nodes(self.config.model, "conditioner").get("spatial")
        if spatial is None or spatial.run is not None:
            return
        self.config = self.config.copy()
        self.config.model.conditioner.spatial.run = str(run_dir)
        config = self._stage_config(run_dir, target="condition")
        if target_is_class_map(config):
            with open_dict(config):
                config.model.update(CLASS_MAP_MODEL)
            log.info("class maps: their tokenizer is trained with model/loss=[bce], without a discriminator")
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
        rows = [(key, f"{value:.4g}") for key, value in stage1.scalars.items()]
        rows += [*_prior_rows(stage2.scalars), *_class_rows(stage2.scalars)]
        terminal.print_table(
            f"{VALIDATION_TABLE}, after {terminal.format_seconds(meter.elapsed_seconds)}", ("metric", "value"), rows
        )
        self._print_next_steps()

    def _finished_steps(self, stage: str) -> int:
        checkpoint = latest_checkpoint(self.run_dir / stage)
        return self.config.steps if checkpoint is None else checkpoint.step

    def _print_next_steps(self) -> None:
        for path in [*sorted((self.run_dir / "images").glob("*-latest.png")), self.run_dir / "report.html"]:
            if path.is_file():
                log.info("%s", path)
        console.print("\nWhat to try next:", style="bold")
        for command in self._next_commands():
            log.info("  python -m vqf.run %s", command)

    def _next_commands(self) -> list[str]:
        plugins = f" plugins={to_cli(self.config.plugins)}" if self.config.plugins else ""
        run = f"{self.run_dir}{plugins}"
        return [
            f"pipeline=sample run={run} count=64 sampler.temperature=0.9",
            f"pipeline=reconstruct run={run} images=FOLDER_OF_YOUR_IMAGES",
            '-m experiment=quickstart pipeline=stage1 model/quantizer=vq,ema "model/loss=[l1],[l1,features]"',
        ]


def _prior_rows(scalars: Mapping[str, float]) -> list[tuple[str, str]]:
    if "nats_per_token" not in scalars:
        return [("stage 2, loss", f"{scalars['loss']:.3f}")]
    nats, uniform = scalars["nats_per_token"], scalars["uniform_nats"]
    return [("stage 2, nats per token", f"{nats:.3f}"), ("  uniform over the vocabulary", f"{uniform:.3f}")]


def _class_rows(scalars: Mapping[str, float]) -> list[tuple[str, str]]:
    if "class_accuracy" not in scalars:
        return []
    samples, real, chance = (f"{scalars[f'class_accuracy{suffix}']:.1%}" for suffix in ("", "_real", "_chance"))
    return [("stage 2, class accuracy of samples", samples), ("  of validation images; by chance", f"{real}; {chance}")]
