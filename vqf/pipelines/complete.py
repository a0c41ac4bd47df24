"""Keep a part of images and draw the rest: completion, section 4.2 of the paper of VQGAN, in- and outpainting."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from vqf import terminal
from vqf.batch import Batch
from vqf.dataloading.loader import sequential_batches
from vqf.errors import UserError
from vqf.images import read_image
from vqf.models.completion import mask_to_pixels, upper_rows_mask
from vqf.models.condition_batch import image_fields
from vqf.models.generator import Generator
from vqf.pipelines.sampling.image_folder import ResumableImageFolder, condition_digest, sampling_settings
from vqf.pipelines.sampling.open_run import open_run
from vqf.registry import build, register
from vqf.runs.provenance import ResourceMeter
from vqf.runs.run_logger import start_run
from vqf.terminal import log

PREVIEW_ROWS = 16  # rows of the grid


@register("pipeline", "complete")
class Complete:
    """Complete held-out images of a stage-2 run's data, or images of any folder, from a part of them.

    `resume=true` goes on with a folder that was not finished; one of other settings is refused.

    Args:
        keep: Share of the rows of codes that is kept, from the top; half of them where no mask is given.
        mask: An image that is white where images are kept and black where they are drawn anew, stretched to their
            size. A code is kept where all of its pixels are.
        images: A folder of images, scaled and cropped as `data=folder` does; by default the validation split of the
            run's data.
        label: The class of all of them, by number or name; by default their own, or classes take turns.
        count: How many images, spread evenly.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        keep: float | None = None,
        mask: str | None = None,
        images: str | None = None,
        label: str | None = None,
        count: int = 16,
    ) -> None:
        if keep is not None and mask is not None:
            raise UserError("keep and mask: both say what is kept; give one of them")
        if keep is not None and not 0 < keep < 1:
            raise UserError(f"keep={keep}: must be between 0 and 1; pipeline=sample draws whole images")
        if count < 1:
            raise UserError(f"count={count}: complete at least one image")
        self.config, self.run_dir, self.keep, self.count = config, run_dir, 0.5 if keep is None else keep, count
        self.mask, self.images, self.label = mask, images, label
        self.captions: list[str] = []

    def run(self) -> None:
        """Write `completions/*.png` and a grid of originals, what was kept of them, and completions."""
        meter = ResourceMeter()
        drawing = open_run(self.config)
        config, generator = drawing.config, drawing.generator
        if self.images is not None:
            with open_dict(config):
                config.data = OmegaConf.create(
                    {"name": "folder", "root": self.images, "validation_fraction": 1.0, "labels": False}
                )
        label = None if self.label is None else generator.classes[generator.class_index(self.label)]
        if self.images is not None and "conditions" in image_fields(generator.conditioner).values():
            raise UserError("images: this prior draws by maps, too; give images and maps, data=pairs data.root=FOLDER")
        mask = (
            upper_rows_mask(generator, self.keep)
            if self.mask is None
            else read_mask(Path(self.mask).expanduser(), generator)
        )
        settings = sampling_settings(drawing.checkpoint, config, label=label, kept=mask.flatten().int().tolist())
        rows = self._complete(generator, mask, config, settings)
        with start_run(config, self.run_dir, meter) as journal:
            journal.images(drawing.checkpoint.step, "completions", rearrange(rows, "b three c h w -> (b three) c h w"))
            journal.write_details({"completions": {"captions": self.captions[:PREVIEW_ROWS]}})
        log.info("images in %s", self.run_dir / "completions")

    def _complete(self, generator: Generator, mask: Tensor, config: DictConfig, settings: Mapping[str, Any]) -> Tensor:
        """Draw and save; return the first rows (B, 3, 3, H, W): originals, their kept part on grey, completions."""
        data = build("data", config.data, image_size=generator.tokenizer.image_size, seed=config.seed)
        loading = {"workers": config.workers, "timeout": config.worker_timeout}
        batches = sequential_batches(data.split("validation"), config.batch_size, count=self.count, **loading)
        folder, rows, done = ResumableImageFolder(self.run_dir / "completions", bool(config.resume)), [], 0
        with terminal.progress("complete", self.count) as bar:
            for batch in batches:
                told = self._prepare_batch(batch, generator)
                names = {f"{done + i:06d}": {**settings, "image": condition_digest(told, i)} for i in range(len(told))}
                if not folder.has(names):
                    self._save(generator, folder, names, told, mask, done)
                if done < PREVIEW_ROWS:
                    assert told.images is not None
                    drawn = torch.stack([folder.read(name) for name in names])
                    kept = told.images.masked_fill(~mask_to_pixels(mask, generator).cpu(), 0)
                    rows.append(torch.stack([told.images, kept, drawn], dim=1))
                done += len(told)
                bar.advance(len(told))
        return torch.cat(rows)[:PREVIEW_ROWS]

    def _prepare_batch(self, batch: Batch, generator: Generator) -> Batch:
        """Return images with everything that is known of them, and note what they are called."""
        if self.label is not None:
            batch = replace(batch, labels=torch.full((len(batch),), generator.class_index(self.label)))
        if batch.labels is not None and generator.classes:
            self.captions += [generator.classes[each] for each in batch.labels.tolist()]
        return replace(batch, masks=None)

    @staticmethod
    def _save(
        generator: Generator,
        folder: ResumableImageFolder,
        names: Mapping[str, Mapping[str, Any]],
        told: Batch,
        mask: Tensor,
        first: int,
    ) -> None:
        assert told.images is not None
        settings: Mapping[str, Any] = next(iter(names.values()))
        completed = generator.complete(
            told.images.to(generator.device),
            mask,
            conditions=told.to(generator.device),
            seed=settings["seed"],
            first=first,
            batch_size=len(names),
        )
        for (name, each), image in zip(names.items(), completed, strict=True):
            folder.save(name, image, each)


def read_mask(path: Path, generator: Generator) -> Tensor:
    """Read which codes (h, w) are known: those of which no pixel of a mask, stretched to their grid, is black.

    Raises:
        UserError: If it cannot be read, or hides nothing.
    """
    hidden = (read_image(path).mean(0) < 0).float()
    if not hidden.any():
        raise UserError(f"mask={path}: no pixel is black, so there is nothing to draw; white is what is kept")
    return F.adaptive_max_pool2d(hidden[None, None], generator.tokenizer.grid)[0, 0].to(generator.device) == 0
