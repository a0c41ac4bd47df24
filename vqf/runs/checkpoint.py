"""Checkpoints: folders that are either whole or not there, see also `keeping`.

`step-00001234/` holds weights as safetensors, the optimizers as a plain dict that `torch.load(weights_only=True)`
reads, `state.json`, `config.yaml`, and `manifest.json` with the size and hash of every other file. It is written
beside its final name, flushed to disk, and renamed; the manifest is what makes a reader trust it, since neither
safetensors nor torch notices a flipped byte.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

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
REQUIRED_FILES = ("model.safetensors", "optimizers.pt", STATE, "config.yaml")  # that no checkpoint is without
STAGES = ("stage1", "stage2")


class BrokenCheckpointError(UserError):
    """A checkpoint that is not whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    state: Mapping[str, Any]
    config: DictConfig

    @property
    def kind(self) -> str:
        """What it holds: "stage1" or "stage2"."""
        return self.state["kind"]

    @property
    def step(self) -> int:
        """Steps that were done when it was written."""
        return self.state["step"]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its images.

        Raises:
            BrokenCheckpointError: If it does not say so.
        """
        size = self.state.get("image_size")
        if not isinstance(size, list) or len(size) != 2 or any(type(each) is not int or each < 1 for each in size):
            raise BrokenCheckpointError(f"{self.path}: {STATE} does not say how large its images are")
        return size[0], size[1]

    @property
    def channels(self) -> int:
        """Channels of its images.

        Raises:
            BrokenCheckpointError: If it says something else.
        """
        channels = self.state.get("channels", 3)
        if type(channels) is not int or channels < 1:
            raise BrokenCheckpointError(f"{self.path}: {STATE} does not say how many channels its images have")
        return channels

    @property
    def classes(self) -> list[str]:
        """Names of the classes that it was told.

        Raises:
            BrokenCheckpointError: If it does not say so.
        """
        classes = self.state.get("classes")
        if not isinstance(classes, list) or any(not isinstance(each, str) for each in classes):
            raise BrokenCheckpointError(f"{self.path}: {STATE} does not name the classes")
        return classes

    def has_weights(self, name: str) -> bool:
        """Tell whether weights of this name are inside."""
        return (self.path / f"{name}.safetensors").is_file()

    def load_weights(self, name: str) -> dict[str, Tensor]:
        """Read weights, on the CPU.

        Raises:
            BrokenCheckpointError: If the file is none.
        """
        try:
            return load_file(self.path / f"{name}.safetensors")
        except SafetensorError as error:
            raise BrokenCheckpointError(f"{self.path}: {name}.safetensors holds no weights ({error})") from error

    def load_optimizers(self) -> dict[str, Any]:
        """Read the states of optimizers and schedules, on the CPU.

        Raises:
            BrokenCheckpointError: If there is more in the file than numbers.
        """
        try:
            return torch.load(self.path / "optimizers.pt", map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            reason = str(error).partition("\n")[0]
            raise BrokenCheckpointError(f"{self.path}: optimizers.pt is none of vqf's ({reason})") from error


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder after verifying every file of it.

    Raises:
        BrokenCheckpointError: If a file is missing, short or changed.
    """
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise BrokenCheckpointError(
            f"{path}: a checkpoint of format {manifest.get('format')}, and this vqf reads format {FORMAT}; "
            "use the version of vqf that wrote it, or train again"
        )
    listed = _as_mapping(manifest.get("files"))
    for name, facts in listed.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise BrokenCheckpointError(f"{path}: {name} is missing")
        if file.stat().st_size != _as_mapping(facts).get("size") or sha256_of_file(file) != facts.get("sha256"):
            raise BrokenCheckpointError(f"{path}: {name} is not what was written (size or hash differ)")
    weights = [file.name for file in sorted(path.glob("*.safetensors"))]
    for name in (each for each in (*REQUIRED_FILES, *weights) if each not in listed):
        raise BrokenCheckpointError(f"{path}: {name} is not in its manifest")
    state, config = read_json(path / STATE), _read_config(path / "config.yaml")
    check_no_interpolations(state.get("condition_tokenizers"), path / STATE)  # which become config, too
    if state.get("kind") not in STAGES or type(state.get("step")) is not int:
        raise BrokenCheckpointError(f"{path}: state.json does not say of which stage and step it is")
    return Checkpoint(path, state, config)


def checkpoint_names(run_dir: Path) -> list[str]:
    """Name the checkpoints of a run in the order of their steps, whole or not."""
    return [path.name for path in checkpoint_folders(run_dir / CHECKPOINTS_FOLDER)]


def latest_checkpoint(run_dir: Path, every: int = 1) -> Checkpoint | None:
    """Open the newest whole checkpoint of a run; those passed over are named in the log.

    Args:
        run_dir: The run's folder.
        every: Only look at steps that are multiples of this.
    """
    for path in reversed(checkpoint_folders(run_dir / CHECKPOINTS_FOLDER)):
        if step_of(path) % every:
            continue
        try:
            return open_checkpoint(path)
        except BrokenCheckpointError as error:
            log.warning("passing over a broken checkpoint: %s", error)
    return None


def all_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Open the whole checkpoints of a run in the order of their steps; those passed over are named in the log."""
    found = []
    for path in checkpoint_folders(run_dir / CHECKPOINTS_FOLDER):
        try:
            found.append(open_checkpoint(path))
        except BrokenCheckpointError as error:
            log.warning("passing over a broken checkpoint: %s", error)
    return found


def find_checkpoint(
    path: str | Path | None, accepts: Callable[[Checkpoint], bool], description: str, hint: str
) -> Checkpoint:
    """Find the checkpoint that `run=PATH` means: a run's folder, or one of its checkpoints.

    Args:
        path: What the user gave.
        accepts: Whether a checkpoint is of the kind that is asked for.
        description: Words for that kind.
        hint: What to do where there is none.

    Raises:
        UserError: If there is none, in one line.
    """
    if path is None:
        raise UserError(f"run: give run=FOLDER, {description}; {hint}")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"run={path}: no such folder; give {description}")
    # the folder of pipeline=full holds one run for each stage
    found = [open_checkpoint(root)] if (root / MANIFEST).is_file() else []
    found += [each for each in map(latest_checkpoint, (root, root / "stage2", root / "stage1")) if each and not found]
    for checkpoint in found:
        if accepts(checkpoint):
            return checkpoint
    if found:
        raise UserError(f"run={path} holds a {found[0].kind} run, but this needs {description}; {hint}")
    raise UserError(f"run={path}: no whole checkpoint in it; give {description}")


def run_dir_of(checkpoint: Path) -> Path:
    """Return the run's folder that a checkpoint's folder lies in, or the path itself if it is no checkpoint."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS_FOLDER else checkpoint


def folder_name(step: int) -> str:
    """Name the folder of a checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Read the step of a checkpoint off its name; 0 where somebody gave it another."""
    found = re.search(r"step-(\d+)", path.name)
    return int(found[1]) if found else 0


def file_entry(file: Path) -> dict[str, Any]:
    """Return what a manifest says of a file."""
    return {"size": file.stat().st_size, "sha256": sha256_of_file(file)}


def checkpoint_folders(folder: Path) -> list[Path]:
    """List the checkpoints by step; where a writer was killed while it replaced one, the one that was there."""
    if not folder.is_dir():
        return []
    former = {path.name[1:].removesuffix(".former"): path for path in folder.glob(".step-*.former")}
    found = former | {path.name: path for path in folder.glob("step-*")}
    return [found[name] for name in sorted(found)]


def read_json(path: Path) -> dict[str, Any]:
    """Read a mapping of a checkpoint.

    Raises:
        BrokenCheckpointError: If it is none.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenCheckpointError(f"{path.parent}: {path.name} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise BrokenCheckpointError(f"{path.parent}: {path.name} is no mapping")
    return found


def _as_mapping(value: Any) -> dict[str, Any]:
    """Return what should be a mapping, and an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def _read_config(path: Path) -> DictConfig:
    """Read a config, which is numbers and names: nothing in it is looked up or run."""
    try:
        config = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise BrokenCheckpointError(f"{path.parent}: {path.name} cannot be read ({reason})") from error
    if not isinstance(config, DictConfig):
        raise BrokenCheckpointError(f"{path.parent}: {path.name} is no config")
    check_no_interpolations(OmegaConf.to_container(config, resolve=False), path)
    return config
