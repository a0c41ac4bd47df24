"""The same held-out images through the tokenizer of every run."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
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
from vqf.runs.load import ConditionTokenizers, build_generator, load_tokenizer

GAP = 2  # white pixels between images


@dataclass
class Panel:
    """Runs that saw the same held-out images: the originals, and what came back of each run."""

    title: str
    originals: Image.Image
    reconstructions: dict[int, Image.Image] = field(default_factory=dict)  # by the run's place in the list


@dataclass
class ReconstructionPanels:
    """Images of runs, a panel for all that share their originals; and why others are not in it."""

    panels: list[Panel] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    parameters: list[int | None] = field(default_factory=list)


class HeldOutImages:
    """Held-out images by data source, opened once for all runs that share it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.splits: dict[str, Split] = {}

    def batch_for(self, checkpoint: Checkpoint, size: Size) -> tuple[str, Batch]:
        """Return what tells the images of a run from others, and so many of them, spread evenly.

        Raises:
            UserError: If the data is not there, or not what the run was trained with.
        """
        config = OmegaConf.merge({"target": "image"}, checkpoint.config)
        assert isinstance(config, DictConfig)
        asked = repr([OmegaConf.to_container(config.data), config.get("target"), config.seed, size])
        if asked not in self.splits:
            data = build_target_data(config, size)
            known, found = checkpoint.state.get("data"), data.split("train").fingerprint
            if known and known != found:
                raise UserError(f"data '{config.data.name}' is not what it was in training")
            self.splits[asked] = data.split("validation")
        split = self.splits[asked]
        count = min(self.count, len(split))
        samples = [split.item(0, i * len(split) // count) for i in range(count)]
        about = f"{config.data.name}, {len(split)} held-out images of {size[0]} x {size[1]}"
        return f"{about} ({split.fingerprint[:8]})", Batch.collate(samples)


def reconstruct_runs(runs: Sequence[Run], count: int, engine: Engine) -> ReconstructionPanels:
    """Reconstruct so many held-out images by every run, one run after the other."""
    album, originals, panels = ReconstructionPanels(), HeldOutImages(count), dict[str, Panel]()
    for i, run in enumerate(runs):
        album.parameters.append(None)
        checkpoint = run.tokenizer
        if checkpoint is None:
            continue
        try:
            tokenizer = engine.prepare(load_tokenizer(checkpoint))
            album.parameters[i] = count_parameters(run, tokenizer)
            about, batch = originals.batch_for(checkpoint, tokenizer.image_size)
        except (UserError, RuntimeError) as error:  # the latter where the weights are of an older vqf
            album.skipped.append(f"{run.name}: {str(error).splitlines()[0]}")
            continue
        shown = reconstruction.reconstruct(tokenizer, batch.to(engine.device), engine)
        panel = panels.setdefault(about, Panel(about, image_row(shown.images)))
        panel.reconstructions[i] = image_row(shown.reconstructions)
    album.panels = list(panels.values())
    return album


def latest_samples_uri(run: Run) -> str | None:
    """Return the samples that a run drew last, as an address; None where it has none."""
    for folder in (run.folder, run.folder / "stage2"):
        path = folder / "images" / "samples-latest.png"
        if path.is_file():
            return _png_data_uri(path.read_bytes())
    return None


def count_parameters(run: Run, tokenizer: Tokenizer) -> int | None:
    """Count the parameters of a run's tokenizer, and of its prior where it has one, which is not read for it.

    None where the prior cannot be built without content.
    """
    count = sum(each.numel() for each in tokenizer.parameters())
    if run.prior is None:
        return count
    coders = ConditionTokenizers(run.prior.state.get("condition_tokenizers", {}))
    try:
        with torch.device("meta"):
            prior = build_generator(run.prior.config, tokenizer, run.prior.state["classes"], coders).prior
    except RuntimeError:
        return None
    assert isinstance(prior, nn.Module)
    return count + sum(each.numel() for each in prior.parameters())


def image_row(images: Tensor) -> Image.Image:
    """Lay images (B, C, H, W) out in one row."""
    rgb = to_rgb(images).detach().float().cpu()
    row = rgb.new_ones(3, rgb.shape[2], len(rgb) * (rgb.shape[3] + GAP) - GAP)
    for i, image in enumerate(rgb):
        left = i * (image.shape[2] + GAP)
        row[:, :, left : left + image.shape[2]] = image
    return to_pil_image(row)


def to_data_uri(image: Image.Image) -> str:
    """Write an image into an address, for a page that needs no other file."""
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return _png_data_uri(content.getvalue())


def _png_data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
