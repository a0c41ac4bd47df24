"""Keep some codes of images and sample the others.

VQGAN, https://arxiv.org/abs/2012.09841, section 4.2.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Interval
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor

from vqf import terminal
from vqf.batch import Batch
from vqf.dataloading.image_files import use_image_folder
from vqf.dataloading.loader import sequential_batches
from vqf.distributed.threads import cpu_threads
from vqf.errors import UserError
from vqf.images import read_image
from vqf.models.completion import mask_to_pixels, upper_rows_mask
from vqf.models.condition_batch import image_fields
from vqf.models.generator import Generator
from vqf.models.sample_request import check_raster
from vqf.options.ranges import PositiveInt
from vqf.pipelines.sampling.image_folder import ResumableImageFolder, condition_digest
from vqf.pipelines.sampling.open_run import open_run
from vqf.registry import build, register
from vqf.runs.provenance import ResourceMeter
from vqf.runs.run_logger import start_run
from vqf.terminal import log

PREVIEW_ROWS = 16  # rows of the grid


@register("pipeline", "complete")
class Complete:
    """Complete validation images of a stage-2 run's data, or images of any folder.

    `resume=true` continues an interrupted run; a folder with other settings is refused.

    Args:
        keep: Fraction of the rows of codes to keep, from the top; 0.5 if no mask is given.
        mask: An image that is white where images are kept and black where they are sampled again, stretched to their
            size. A code is kept if all of its pixels are.
        images: Folder of images, scaled and cropped as `data=folder` does; by default the validation split of the
            run's data.
        label: Class of all images, by name or number; by default their own, or classes take turns.
        count: Number of images, spread evenly over the split.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        keep: Annotated[float, Interval(gt=0, lt=1)] | None = None,
        mask: str | None = None,
        images: str | None = None,
        label: str | None = None,
        count: PositiveInt = 16,
    ) -> None:
        if keep is not None and mask is not None:
            raise UserError("keep and mask: both say what is kept; give one of them")
        self.config, self.run_dir, self.keep, self.count = config, run_dir, 0.5 if keep is None else keep, count
        self.mask, self.images, self.label = mask, images, label
        self.captions: list[str] = []

    def run(self) -> None:
        meter = ResourceMeter()
        opened = open_run(self.config)
        config, generator = opened.config, opened.generator
        if self.images is not None:
            self._use_image_folder(config, self.images, generator)
        label = opened.class_name(self.label)
        mask = self._mask(generator)
        settings = opened.settings(label=label, kept=mask.flatten().int().tolist())
        rows = self._complete(generator, mask, config, settings)
        with start_run(config, self.run_dir, meter) as journal:
            journal.images(opened.checkpoint.step, "completions", rearrange(rows, "b three c h w -> (b three) c h w"))
            journal.write_details({"completions": {"captions": self.captions[:PREVIEW_ROWS]}})
        log.info("images in %s", self.run_dir / "completions")

    @staticmethod
    def _use_image_folder(config: DictConfig, folder: str, generator: Generator) -> None:
        if "conditions" in image_fields(generator.conditioner).values():
            raise UserError(
                "images: this prior is also conditioned on maps; give images with maps, data=pairs data.root=FOLDER"
            )
        use_image_folder(config, folder, labels=False)

    def _mask(self, generator: Generator) -> Tensor:
        if self.mask is None:
            return upper_rows_mask(generator, self.keep)
        return read_mask(Path(self.mask).expanduser(), generator)

    def _complete(self, generator: Generator, mask: Tensor, config: DictConfig, settings: Mapping[str, Any]) -> Tensor:
        """Return the first rows (B, 3, 3, H, W): originals, kept pixels on gray, completions."""
        data = build("data", config.data, image_size=generator.tokenizer.image_size, seed=config.seed)
        loading = {"workers": config.workers, "timeout": config.worker_timeout}
        batches = sequential_batches(data.split("validation"), config.batch_size, count=self.count, **loading)
        folder, rows, first = ResumableImageFolder(self.run_dir / "completions", bool(config.resume)), [], 0
        with terminal.progress("complete", self.count) as bar:
            for loaded in batches:
                batch = self._prepare_batch(loaded, generator)
                images = {
                    f"{first + i:06d}": {**settings, "image": condition_digest(batch, i)} for i in range(len(batch))
                }
                folder.fill(images, partial(_complete_batch, generator, batch, mask, settings["seed"], first))
                if first < PREVIEW_ROWS:
                    assert batch.images is not None
                    completed = torch.stack([folder.read(name) for name in images])
                    kept = batch.images.masked_fill(~mask_to_pixels(mask, generator).cpu(), 0)
                    rows.append(torch.stack([batch.images, kept, completed], dim=1))
                first += len(batch)
                bar.advance(len(batch))
        return torch.cat(rows)[:PREVIEW_ROWS]

    def _prepare_batch(self, batch: Batch, generator: Generator) -> Batch:
        if self.label is not None:
            batch = replace(batch, labels=torch.full((len(batch),), generator.class_index(self.label)))
        if batch.labels is not None and generator.classes:
            self.captions += [generator.classes[label] for label in batch.labels.tolist()]
        return replace(batch, masks=None)


@cpu_threads.watch("complete")
def _complete_batch(generator: Generator, batch: Batch, mask: Tensor, seed: int, first: int) -> Tensor:
    batch = batch.to(generator.device)
    assert batch.images is not None
    return generator.complete(
        batch.images, mask, conditions=batch, seed=seed, first=first, batch_size=len(batch.images)
    )


def read_mask(path: Path, generator: Generator) -> Tensor:
    """Read the mask (h, w) of known codes: no pixel of a known code is black.

    Raises:
        UserError: If the file cannot be read, or has no black pixel.
    """
    hidden = (read_image(path).mean(0) < 0).float()
    if not hidden.any():
        raise UserError(f"mask={path}: no pixel is black, so there is nothing to sample; white is what is kept")
    grid, _ = check_raster(generator.tokenizer.layout, "mask")
    return F.adaptive_max_pool2d(hidden[None, None], grid)[0, 0].to(generator.device) == 0
