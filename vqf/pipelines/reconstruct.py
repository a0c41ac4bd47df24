"""Reconstruct images and measure the error."""

from pathlib import Path
from typing import Literal

import torch
from omegaconf import DictConfig

from vqf import terminal
from vqf.config.inherit import inherit
from vqf.dataloading.image_files import ImageFileSplit, use_image_folder
from vqf.dataloading.loader import sequential_batches
from vqf.dataloading.training_target import build_target_data
from vqf.distributed.engine import Engine, make_engine
from vqf.errors import UserError
from vqf.evaluation import reconstruction
from vqf.evaluation.image_panels import ImagePanels
from vqf.evaluation.validation import ValidationResult
from vqf.images import save_images
from vqf.models.tokenizer import Tokenizer
from vqf.options.ranges import PositiveInt
from vqf.pipelines.reconstruction.own_size import reconstruct_files
from vqf.protocols import VALIDATION_PREFIX, Metric, Reconstruction, Split
from vqf.registry import register
from vqf.runs.load import find_tokenizer_checkpoint, load_tokenizer
from vqf.runs.run_logger import save_metrics, start_run
from vqf.terminal import log

Titled = tuple[str, ValidationResult]

MAX_PIXELS = 178_956_970  # of an image at its own size: more, Pillow does not open


@register("pipeline", "reconstruct")
class Reconstruct:
    """Reconstruct the validation images of a run, or the images of any folder.

    Args:
        images: Folder of images, all of which are used; by default the validation split of the run's data.
        size: `own` reconstructs each image at its own size, cropped at the right and bottom to a multiple of the
            stride, and names the result like it; images above 1,024 pixels pass in tiles. `training` scales and crops
            images to the size of training, as validation does, and numbers them. By default `own` for `images`.
        count: Number of images, spread evenly over the split; by default all.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        images: str | None = None,
        size: Literal["own", "training"] | None = None,
        count: PositiveInt | None = None,
    ) -> None:
        if size == "own" and images is None:
            raise UserError("size=own: only image files have a size of their own; give images=FOLDER, too")
        self.config, self.run_dir, self.images, self.count = config, run_dir, images, count
        self.own_size = images is not None and size != "training"

    def run(self) -> None:
        checkpoint = find_tokenizer_checkpoint(self.config.run)
        config = inherit(self.config, checkpoint.config, ["data", "target", "image_size", "batch_size"])
        if self.images is not None:
            self._use_image_folder(config, self.images)
        engine = make_engine(config)
        tokenizer = engine.prepare(load_tokenizer(checkpoint))
        if self.own_size:
            _check_own_size(tokenizer)
        split = build_target_data(config, tokenizer.image_size).split("validation")
        reconstruct = self._at_own_size if self.own_size else self._at_training_size
        title, result = reconstruct(tokenizer, split, config, engine)
        scalars = result.scalars
        with start_run(config, self.run_dir) as journal:
            journal.scalars(checkpoint.step, {f"{VALIDATION_PREFIX}{key}": value for key, value in scalars.items()})
            for name, grid in result.images.items():
                journal.images(checkpoint.step, name, grid)
            journal.write_details(result.details)
        save_metrics(self.run_dir, {title: scalars})
        terminal.print_table(title, ("metric", "value"), [(key, f"{value:.4g}") for key, value in scalars.items()])
        log.info("images in %s", self.run_dir / "reconstructions")

    def _use_image_folder(self, config: DictConfig, folder: str) -> None:
        own = {"max_pixels": MAX_PIXELS, "labels": False} if self.own_size else {}
        use_image_folder(config, folder, **own)

    def _at_own_size(self, tokenizer: Tokenizer, split: Split, config: DictConfig, engine: Engine) -> Titled:
        assert isinstance(split, ImageFileSplit)
        metrics = reconstruction.build_metrics(config, tokenizer.layout, engine)
        count = min(self.count or len(split), len(split))
        indices = [i * len(split) // count for i in range(count)]
        result = reconstruct_files(tokenizer, split, indices, metrics, engine, self.run_dir / "reconstructions")
        scalars = {key: value for metric in metrics.values() for key, value in metric.compute().items()}
        title = f"reconstruction of {result.written} images at their own size"
        return title, ValidationResult(scalars, {"reconstructions": torch.stack(result.previews)})

    def _at_training_size(self, tokenizer: Tokenizer, split: Split, config: DictConfig, engine: Engine) -> Titled:
        panels = ImagePanels(tokenizer.layout, engine.device)
        scalars = self._evaluate(tokenizer, split, config, engine, panels)
        height, width = tokenizer.image_size
        count = min(self.count or len(split), len(split))
        title = f"reconstruction of {count} images at {width} x {height} pixels"
        images = {"reconstructions": reconstruction.side_by_side(tokenizer, split, engine), **panels.images()}
        return title, ValidationResult(scalars, images, panels.details())

    def _evaluate(
        self, tokenizer: Tokenizer, split: Split, config: DictConfig, engine: Engine, panels: ImagePanels
    ) -> dict[str, float]:
        count = min(self.count or len(split), len(split))
        loading = {"workers": config.workers, "timeout": config.worker_timeout}
        batches = sequential_batches(split, config.batch_size, count=count, **loading)
        metrics: dict[str, Metric] = reconstruction.build_metrics(config, tokenizer.layout, engine)
        metrics |= {"saved": _ImageWriter(self.run_dir / "reconstructions"), "panels": panels}
        return reconstruction.evaluate(tokenizer, batches, count, metrics, engine)


def _check_own_size(tokenizer: Tokenizer) -> None:
    if tokenizer.channels != 3 or tokenizer.output != "image":
        raise UserError(f"images: this run's tokenizer is of maps of {tokenizer.channels} channels, not images")
    if tokenizer.stride is None or len(tokenizer.layout.scales) > 1:
        raise UserError("images: the codes of this run's tokenizer fit one image size; give size=training, too")


class _ImageWriter:
    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def update(self, batch: Reconstruction) -> None:
        count = len(batch.reconstructions)
        save_images(batch.reconstructions, self.folder, (f"{self.count + i:06d}" for i in range(count)))
        self.count += count

    def compute(self) -> dict[str, float]:
        return {}
