"""Reconstruct images and measure the error."""

import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from vqf import terminal
from vqf.config.inherit import inherit
from vqf.dataloading.loader import sequential_batches
from vqf.dataloading.training_target import build_target_data
from vqf.distributed.engine import Engine, make_engine
from vqf.evaluation import reconstruction
from vqf.evaluation.image_panels import ImagePanels
from vqf.images import save_images
from vqf.models.tokenizer import Tokenizer
from vqf.options.ranges import PositiveInt
from vqf.protocols import VALIDATION_PREFIX, Metric, Reconstruction, Split
from vqf.registry import register
from vqf.runs.load import find_tokenizer_checkpoint, load_tokenizer
from vqf.runs.run_logger import start_run
from vqf.terminal import log


@register("pipeline", "reconstruct")
class Reconstruct:
    """Reconstruct the validation images of a run, or the images of any folder.

    Args:
        images: Folder of images, all of which are used; by default the validation split of the run's data.
        count: Number of images, spread evenly over the split; by default all.
    """

    def __init__(
        self, config: DictConfig, run_dir: Path, *, images: str | None = None, count: PositiveInt | None = None
    ) -> None:
        self.config, self.run_dir, self.images, self.count = config, run_dir, images, count

    def run(self) -> None:
        checkpoint = find_tokenizer_checkpoint(self.config.run)
        config = inherit(self.config, checkpoint.config, ["data", "target", "image_size", "batch_size"])
        if self.images is not None:
            pixel_range = config.data.get("range") if config.data else None
            node = {"name": "folder", "root": self.images, "validation_fraction": 1.0, "range": pixel_range}
            with open_dict(config):
                config.target, config.data = "image", OmegaConf.create(node)
        engine = make_engine(config)
        tokenizer = engine.prepare(load_tokenizer(checkpoint))
        data = build_target_data(config, tokenizer.image_size)
        split = data.split("validation")
        panels = ImagePanels(tokenizer.layout, engine.device)
        scalars = self._reconstruct(tokenizer, split, config, engine, panels)
        with start_run(config, self.run_dir) as journal:
            journal.scalars(checkpoint.step, {f"{VALIDATION_PREFIX}{key}": value for key, value in scalars.items()})
            side_by_side = reconstruction.side_by_side(tokenizer, split, engine)
            for name, images in {"reconstructions": side_by_side, **panels.images()}.items():
                journal.images(checkpoint.step, name, images)
            journal.write_details(panels.details())
        (self.run_dir / "metrics.json").write_text(json.dumps({"reconstruction": scalars}, indent=1))
        terminal.print_table(
            "reconstruction", ("metric", "value"), [(key, f"{value:.4g}") for key, value in scalars.items()]
        )
        log.info("images in %s", self.run_dir / "reconstructions")

    def _reconstruct(
        self, tokenizer: Tokenizer, split: Split, config: DictConfig, engine: Engine, panels: ImagePanels
    ) -> dict[str, float]:
        count = min(self.count or len(split), len(split))
        loading = {"workers": config.workers, "timeout": config.worker_timeout}
        batches = sequential_batches(split, config.batch_size, count=count, **loading)
        metrics: dict[str, Metric] = reconstruction.build_metrics(config, tokenizer.layout, engine)
        metrics |= {"saved": _ImageWriter(self.run_dir / "reconstructions"), "panels": panels}
        return reconstruction.evaluate(tokenizer, batches, count, metrics, engine)


class _ImageWriter:
    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def update(self, batch: Reconstruction) -> None:
        count = len(batch.reconstructions)
        save_images(batch.reconstructions, self.folder, (f"{self.count + i:06d}" for i in range(count)))
        self.count += count

    def compute(self) -> dict[str, float]:
        return {}
