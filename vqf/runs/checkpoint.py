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

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from yaml import YAMLError

from vqf.config.untrusted import check_no_interpolations
from vqf.errors import UserError
from vqf.hashing import sha256_of_file
from vqf.terminal import log

FORMAT = 2
CHECKPOINTS_FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
REQUIRED_FILES = ("model.safetensors", "optimizers.pt", STATE, "config.yaml")
STAGES = ("stage1", "stage2")


class BrokenCheckpointError(UserError):
    """A checkpoint with a missing, damaged or unreadable file."""


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
            return load_file(self.path / f"{name}.safetensors")
        except SafetensorError as error:
            raise BrokenCheckpointError(f"{self.path}: {name}.safetensors holds no weights ({error})") from error

    def load_optimizers(self) -> dict[str, Any]:
        """Read optimizers.pt, on the CPU.

        Raises:
            BrokenCheckpointError: If it holds more than tensors and plain containers.
        """
        try:
            return torch.load(self.path / "optimizers.pt", map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            reason = str(error).partition("\n")[0]
            raise BrokenCheckpointError(f"{self.path}: optimizers.pt has no optimizer states ({reason})") from error


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
    _verify_files(path, _as_mapping(manifest.get("files")))
    state, config = read_json(path / STATE), _read_config(path / "config.yaml")
    check_no_interpolations(state.get("condition_tokenizers"), path / STATE)  # `load` builds models from these configs
    if state.get("kind") not in STAGES or type(state.get("step")) is not int:
        raise BrokenCheckpointError(f"{path}: state.json has no valid kind and step")
    return Checkpoint(path, state, config)


def _verify_files(path: Path, entries: Mapping[str, Any]) -> None:
    for name, entry in entries.items():
        file = path / name
        if Path(name).name != name or not file.is_file():  # a name with a folder would lead out of the checkpoint
            raise BrokenCheckpointError(f"{path}: {name} is missing")
        if file.stat().st_size != _as_mapping(entry).get("size") or sha256_of_file(file) != entry.get("sha256"):
            raise BrokenCheckpointError(f"{path}: {name} was changed after it was written (size or hash differ)")
    weights = [file.name for file in sorted(path.glob("*.safetensors"))]
    for name in (*REQUIRED_FILES, *weights):
        if name not in entries:
            raise BrokenCheckpointError(f"{path}: {name} is not in its manifest")


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
    raise UserError(f"run={path}: no intact checkpoint in it; give {description}")


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


def file_entry(file: Path) -> dict[str, Any]:
    """Entry of a file in the manifest."""
    return {"size": file.stat().st_size, "sha256": sha256_of_file(file)}


def checkpoint_folders(folder: Path) -> list[Path]:
    """List checkpoint folders by step, with backups of those that a killed `atomic_folder` has moved."""
    if not folder.is_dir():
        return []
    backups = {path.name[1:].removesuffix(".former"): path for path in folder.glob(".step-*.former")}
    by_name = backups | {path.name: path for path in folder.glob("step-*")}
    return [by_name[name] for name in sorted(by_name)]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        BrokenCheckpointError: If it is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenCheckpointError(f"{path.parent}: {path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise BrokenCheckpointError(f"{path.parent}: {path.name} is not a mapping")
    return content


def _as_mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_config(path: Path) -> DictConfig:
    try:
        config = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise BrokenCheckpointError(f"{path.parent}: {path.name} cannot be read ({reason})") from error
    if not isinstance(config, DictConfig):
        raise BrokenCheckpointError(f"{path.parent}: {path.name} is not a config")
    check_no_interpolations(OmegaConf.to_container(config, resolve=False), path)
    return config


def default_output(channels: int) -> Literal["image", "logits"]:
    """What a tokenizer gives whose checkpoint does not say so."""
    return "image" if channels in (1, 3) else "logits"
