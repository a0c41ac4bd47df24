"""The checkpoint format: opens a checkpoint, verifies it, and finds the newest one of a run.

A run has one folder per saved step, `checkpoints/step-00001234/`:

    model.safetensors           trained weights
    ema.safetensors             their exponential moving average, if any
    usage.safetensors           stage 1: steps since each code was last used
    discriminator.safetensors   stage 1: discriminator and regularizers, if any
    tokenizer.safetensors       stage 2: the frozen tokenizer
    conditioner.safetensors     stage 2: the conditioners, if they have weights
    optimizers.pt               optimizers and schedules, for torch.load(weights_only=True)
    state.json                  kind ("stage1" or "stage2"), step, position in the data, image size, classes, ...
    config.yaml                 the composed, resolved config
    manifest.json               format, kind, step; size and SHA-256 of every other file

The writer renames complete folders. The reader verifies hashes: safetensors and torch miss flipped bytes.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqf.config.untrusted import check_no_interpolations
from vqf.errors import UserError, import_command, not_a_run_message
from vqf.networks.file_content import describe_content
from vqf.networks.weights import read_safetensors, read_torch_file
from vqf.runs.checkpoint_files import (
    MANIFEST,
    STATE,
    BrokenCheckpointError,
    as_mapping,
    read_config,
    read_json,
    verify_files,
)
from vqf.runs.optimizer_states import check_optimizer_states
from vqf.terminal import log

FORMAT = 2
CHECKPOINTS_FOLDER = "checkpoints"
FOREIGN_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")  # of weights that pipeline=import reads
STAGES = ("stage1", "stage2")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; weights are read only on request."""

    path: Path
    state: Mapping[str, Any]
    config: DictConfig

    @property
    def kind(self) -> str:
        """ "stage1" (a tokenizer) or "stage2" (a prior and its tokenizer)."""
        return self.state["kind"]

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels.

        Raises:
            BrokenCheckpointError: If state.json lacks them.
        """
        size = self.state.get("image_size")
        if not isinstance(size, list) or len(size) != 2 or any(type(each) is not int or each < 1 for each in size):
            raise BrokenCheckpointError(f"{self.path}: {STATE} has no valid image_size")
        return size[0], size[1]

    @property
    def channels(self) -> int:
        """Channels of its images, by default 3.

        Raises:
            BrokenCheckpointError: If they are not a positive integer.
        """
        channels = self.state.get("channels", 3)
        if type(channels) is not int or channels < 1:
            raise BrokenCheckpointError(f"{self.path}: {STATE} has no valid number of channels")
        return channels

    @property
    def output(self) -> Literal["image", "logits"]:
        """What its tokenizer gives: by default logits of classes where channels cannot be those of an image."""
        return "logits" if self.state.get("output", default_output(self.channels)) == "logits" else "image"

    @property
    def classes(self) -> list[str]:
        """Names of its classes, in the order of their numbers.

        Raises:
            BrokenCheckpointError: If state.json lacks them.
        """
        classes = self.state.get("classes")
        if not isinstance(classes, list) or any(not isinstance(each, str) for each in classes):
            raise BrokenCheckpointError(f"{self.path}: {STATE} has no valid list of classes")
        return classes

    def has_weights(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").is_file()

    def load_weights(self, name: str) -> dict[str, Tensor]:
        """Read `{name}.safetensors`, on the CPU.

        Raises:
            BrokenCheckpointError: If it has another format.
        """
        try:
            return read_safetensors(self.path / f"{name}.safetensors")
        except UserError as error:
            reason = _reason(error)
            raise BrokenCheckpointError(f"{self.path}: {name}.safetensors holds no weights ({reason})") from error

    def count_stored(self) -> tuple[int, int]:
        """Count the tensors in all weight files, and the numbers in them, by the headers.

        Raises:
            BrokenCheckpointError: If one has another format.
        """
        sizes: list[int] = []
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as opened:
                    sizes += [math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118
            except SafetensorError as error:
                reason = describe_content(file)
                raise BrokenCheckpointError(f"{self.path}: {file.name} holds no weights ({reason})") from error
        return len(sizes), sum(sizes)

    def load_optimizers(self) -> dict[str, Any]:
        """Read optimizers.pt, on the CPU: state dicts in "optimizers" and "schedules", by name.

        Raises:
            BrokenCheckpointError: If it holds anything else.
        """
        try:
            content = read_torch_file(self.path / "optimizers.pt")
            check_optimizer_states(content)
        except (UserError, ValueError) as error:
            raise BrokenCheckpointError(
                f"{self.path}: optimizers.pt has no optimizer states ({_reason(error)})"
            ) from error
        return content


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify every file of a checkpoint folder and open it.

    Raises:
        BrokenCheckpointError: If a file is missing, changed or unlisted, or the format is not `FORMAT`.
    """
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise BrokenCheckpointError(
            f"{path}: checkpoint format {manifest.get('format')}, but this version of vqf reads format {FORMAT}; "
            "use the version of vqf that wrote it, or train again"
        )
    verify_files(path, as_mapping(manifest.get("files")))
    state, config = read_json(path / STATE), read_config(path / "config.yaml")
    check_no_interpolations(state.get("condition_tokenizers"), path / STATE)  # `load` builds models from these configs
    if state.get("kind") not in STAGES or type(state.get("step")) is not int:
        raise BrokenCheckpointError(f"{path}: state.json has no valid kind and step")
    return Checkpoint(path, state, config)


def checkpoint_names(run_dir: Path) -> list[str]:
    """Names of a run's checkpoint folders by step."""
    return [path.name for path in checkpoint_folders(run_dir / CHECKPOINTS_FOLDER)]


def latest_checkpoint(run_dir: Path, every: int = 1) -> Checkpoint | None:
    """Open the newest intact checkpoint of a run at a multiple of `every`; log broken ones."""
    for path in reversed(checkpoint_folders(run_dir / CHECKPOINTS_FOLDER)):
        if step_of(path) % every == 0 and (checkpoint := _open_or_warn(path)):
            return checkpoint
    return None


def all_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Open the intact checkpoints of a run by step; log broken ones."""
    opened = map(_open_or_warn, checkpoint_folders(run_dir / CHECKPOINTS_FOLDER))
    return [checkpoint for checkpoint in opened if checkpoint]


def _open_or_warn(path: Path) -> Checkpoint | None:
    try:
        return open_checkpoint(path)
    except BrokenCheckpointError as error:
        log.warning("skipping a broken checkpoint: %s", error)
        return None


def find_checkpoint(
    path: str | Path | None, accepts: Callable[[Checkpoint], bool], description: str, hint: str
) -> Checkpoint:
    """Open the checkpoint that `run=PATH` names: the newest of a run's folder, or that checkpoint.

    Args:
        description: For the error, what is needed: "the run of a tokenizer".
        hint: For the error, how to get one.

    Raises:
        UserError: If there is none that `accepts` takes.
    """
    if path is None:
        raise UserError(f"run: give run=FOLDER, {description}; {hint}")
    root = Path(path).expanduser()
    if root.is_file():
        raise UserError(f"run={path}: {not_a_run_message(root)}")
    if not root.is_dir():
        raise UserError(f"run={path}: no such folder; give {description}")
    if (root / MANIFEST).is_file():
        candidates = [open_checkpoint(root)]
    else:  # pipeline=full writes a run for each stage into subfolders
        newest = map(latest_checkpoint, (root, root / "stage2", root / "stage1"))
        candidates = [checkpoint for checkpoint in newest if checkpoint]
    for checkpoint in candidates:
        if accepts(checkpoint):
            return checkpoint
    if candidates:
        raise UserError(f"run={path} holds a {candidates[0].kind} run, but this needs {description}; {hint}")
    foreign = any(file.suffix in FOREIGN_SUFFIXES for file in root.iterdir())
    cure = f"; {import_command(root)} makes a run of another project's weights" if foreign else ""
    raise UserError(f"run={path}: no intact checkpoint in it; give {description}{cure}")


def run_dir_of(checkpoint: Path) -> Path:
    """The run's folder of a checkpoint's folder; any other path as it is."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS_FOLDER else checkpoint


def folder_name(step: int) -> str:
    """Folder name of a step: step-00001234."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Step in the name of a checkpoint's folder, else 0."""
    match = re.search(r"step-(\d+)", path.name)
    return int(match[1]) if match else 0


def checkpoint_folders(folder: Path) -> list[Path]:
    """List checkpoint folders by step, with backups of those that a killed `atomic_folder` has moved."""
    if not folder.is_dir():
        return []
    backups = {path.name[1:].removesuffix(".former"): path for path in folder.glob(".step-*.former")}
    by_name = backups | {path.name: path for path in folder.glob("step-*")}
    return [by_name[name] for name in sorted(by_name)]


def default_output(channels: int) -> Literal["image", "logits"]:
    """What a tokenizer gives whose checkpoint does not say so."""
    return "image" if channels in (1, 3) else "logits"


def _reason(error: Exception) -> str:
    """What an error about a file says after the path."""
    return str(error).rpartition("not a weight file: ")[2]
