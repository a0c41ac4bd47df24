"""The same held-out pictures through the tokenizer of every run."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn

from vqf.batch import Batch, Size
from vqf.dataloading.subject import build_subject
from vqf.distributed.engine import Engine
from vqf.errors import UserError
from vqf.evaluation import reconstruction
from vqf.images import as_colours, to_image
from vqf.models.tokenizer import Tokenizer
from vqf.pipelines.comparison.runs import Run
from vqf.protocols import Split
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.load import Coders, build_generator, load_tokenizer

GAP = 2  # white pixels between pictures


@dataclass
class Panel:
    """Runs that saw the same held-out pictures: the originals, and what came back of each run."""

    about: str
    originals: Image.Image
    strips: dict[int, Image.Image] = field(default_factory=dict)  # by the run's place in the list


@dataclass
class Album:
    """Pictures of runs, a panel for all that share their originals; and why others are not in it."""

    panels: list[Panel] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    parameters: list[int | None] = field(default_factory=list)


class Originals:
    """Held-out pictures by data source, opened once for all runs that share it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.known: dict[str, Split] = {}

    def of(self, checkpoint: Checkpoint, size: Size) -> tuple[str, Batch]:
        """Return what tells the pictures of a run from others, and so many of them, spread evenly.

        Raises:
            UserError: If the data is not there, or not what the run was trained with.
        """
        config = OmegaConf.merge({"subject": "image"}, checkpoint.config)
        assert isinstance(config, DictConfig)
        asked = repr([OmegaConf.to_container(config.data), config.get("subject"), config.seed, size])
        if asked not in self.known:
            data = build_subject(config, size)
            known, found = checkpoint.state.get("data"), data.split("train").fingerprint
            if known and known != found:
                raise UserError(f"data '{config.data.name}' is not what it was in training")
            self.known[asked] = data.split("validation")
        split = self.known[asked]
        count = min(self.count, len(split))
        samples = [split.item(0, i * len(split) // count) for i in range(count)]
        about = f"{config.data.name}, {len(split)} held-out pictures of {size[0]} x {size[1]}"
        return f"{about} ({split.fingerprint[:8]})", Batch.collate(samples)


def draw(runs: Sequence[Run], count: int, engine: Engine) -> Album:
    """Reconstruct so many held-out pictures by every run, one run after the other."""
    album, originals, panels = Album(), Originals(count), dict[str, Panel]()
    for i, run in enumerate(runs):
        album.parameters.append(None)
        checkpoint = run.tokenizer
        if checkpoint is None:
            continue
        try:
            tokenizer = engine.place(load_tokenizer(checkpoint))
            album.parameters[i] = count_parameters(run, tokenizer)
            about, batch = originals.of(checkpoint, tokenizer.image_size)
        except (UserError, RuntimeError) as error:  # the latter where the weights are of an older vqf
            album.absent.append(f"{run.name}: {str(error).splitlines()[0]}")
            continue
        shown = reconstruction.reconstruct(tokenizer, batch.to(engine.device), engine)
        panel = panels.setdefault(about, Panel(about, strip(shown.images)))
        panel.strips[i] = strip(shown.reconstructions)
    album.panels = list(panels.values())
    return album


def drawn(run: Run) -> str | None:
    """Return the samples that a run drew last, as an address; None where it has none."""
    for folder in (run.folder, run.folder / "stage2"):
        path = folder / "images" / "samples-latest.png"
        if path.is_file():
            return _uri(path.read_bytes())
    return None


def count_parameters(run: Run, tokenizer: Tokenizer) -> int | None:
    """Count the parameters of a run's tokenizer, and of its prior where it has one, which is not read for it.

    None where the prior cannot be built without content.
    """
    count = sum(each.numel() for each in tokenizer.parameters())
    if run.prior is None:
        return count
    coders = Coders(run.prior.state.get("coders", {}))
    try:
        with torch.device("meta"):
            prior = build_generator(run.prior.config, tokenizer, run.prior.state["classes"], coders).prior
    except RuntimeError:
        return None
    assert isinstance(prior, nn.Module)
    return count + sum(each.numel() for each in prior.parameters())


def strip(images: Tensor) -> Image.Image:
    """Lay pictures (B, C, H, W) out in one row."""
    pictures = as_colours(images).detach().float().cpu()
    row = pictures.new_ones(3, pictures.shape[2], len(pictures) * (pictures.shape[3] + GAP) - GAP)
    for i, picture in enumerate(pictures):
        left = i * (picture.shape[2] + GAP)
        row[:, :, left : left + picture.shape[2]] = picture
    return to_image(row)


def as_uri(picture: Image.Image) -> str:
    """Write a picture into an address, for a page that needs no other file."""
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return _uri(content.getvalue())


def _uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
