"""Reconstructions of the same validation images by every run."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from einops import rearrange
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn

from vqf.batch import Batch, Size
from vqf.dataloading.training_target import build_target_data
from vqf.distributed.engine import Engine
from vqf.errors import UserError
from vqf.evaluation import reconstruction
from vqf.images import to_pil_image, to_rgb
from vqf.models.tokenizer import Tokenizer
from vqf.pipelines.comparison.runs import Run
from vqf.protocols import Split
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.load import blank_generator, load_tokenizer

GAP = 2  # white pixels between images


@dataclass
class Panel:
    """Validation images, and reconstructions by all runs with the same data."""

    title: str
    originals: Image.Image
    reconstructions: dict[int, Image.Image] = field(default_factory=dict)  # by the index of the run


@dataclass
class ReconstructionPanels:
    """Reconstructions by all runs; a panel for each set of validation images."""

    panels: list[Panel] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    parameters: list[int | None] = field(default_factory=list)


class ValidationImages:
    """Validation images, shared by runs with the same data source."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.splits: dict[str, Split] = {}

    def batch_for(self, checkpoint: Checkpoint, size: Size) -> tuple[str, Batch]:
        """Return a unique description, and `count` images, spread evenly over the split.

        Raises:
            UserError: If the data is missing or changed.
        """
        config = OmegaConf.merge({"target": "image"}, checkpoint.config)
        assert isinstance(config, DictConfig)
        source = repr([OmegaConf.to_container(config.data), config.get("target"), config.seed, size])
        if source not in self.splits:
            data = build_target_data(config, size)
            trained_on = checkpoint.state.get("data")
            if trained_on and trained_on != data.split("train").fingerprint:
                raise UserError(f"data '{config.data.name}' has changed since training")
            self.splits[source] = data.split("validation")
        split = self.splits[source]
        count = min(self.count, len(split))
        samples = [split.item(0, i * len(split) // count) for i in range(count)]
        description = f"{config.data.name}, {len(split)} validation images of {size[0]} x {size[1]}"
        return f"{description} ({split.fingerprint[:8]})", Batch.collate(samples)


def reconstruct_runs(runs: Sequence[Run], count: int, engine: Engine) -> ReconstructionPanels:
    """Reconstruct `count` validation images by every run; one model is in memory at a time."""
    result, validation_images, panels = ReconstructionPanels(), ValidationImages(count), dict[str, Panel]()
    for i, run in enumerate(runs):
        result.parameters.append(None)
        checkpoint = run.tokenizer
        if checkpoint is None:
            continue
        try:
            tokenizer = engine.prepare(load_tokenizer(checkpoint))
            result.parameters[i] = count_parameters(run, tokenizer)
            title, batch = validation_images.batch_for(checkpoint, tokenizer.image_size)
        except (
            UserError,
            RuntimeError,
        ) as error:  # a RuntimeError by load_state_dict: weights of another version of vqf
            result.skipped.append(f"{run.name}: {str(error).splitlines()[0]}")
            continue
        pair = reconstruction.reconstruct(tokenizer, batch.to(engine.device), engine)
        panel = panels.setdefault(title, Panel(title, image_row(pair.images)))
        panel.reconstructions[i] = image_row(pair.reconstructions)
    result.panels = list(panels.values())
    return result


def latest_samples_uri(run: Run) -> str | None:
    """Return the newest samples of a run as a data: URI; None without any."""
    for folder in (run.folder, run.folder / "stage2"):
        path = folder / "images" / "samples-latest.png"
        if path.is_file():
            return _png_data_uri(path.read_bytes())
    return None


def count_parameters(run: Run, tokenizer: Tokenizer) -> int | None:
    """Count parameters."""
    count = sum(param.numel() for param in tokenizer.parameters())
    if run.prior is None:
        return count
    prior = blank_generator(run.prior, tokenizer).prior
    assert isinstance(prior, nn.Module)
    return count + sum(param.numel() for param in prior.parameters())


def image_row(images: Tensor) -> Image.Image:
    """Lay images (B, C, H, W) in [-1, 1] out in one row."""
    padded = F.pad(to_rgb(images).detach().float().cpu(), (0, GAP), value=1.0)
    return to_pil_image(rearrange(padded, "b c h w -> c h (b w)")[..., :-GAP])


def to_data_uri(image: Image.Image) -> str:
    """Encode an image as a PNG data: URI."""
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return _png_data_uri(content.getvalue())


def _png_data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
