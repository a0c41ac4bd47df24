"""Checkpoints: folders that are either whole or not there.

`step-00001234/` holds weights as safetensors, the optimizers as a plain dict that `torch.load(weights_only=True)`
reads, `state.json`, `config.yaml`, and `manifest.json` with the size and hash of every other file. It is written
beside its final name, flushed to disk, and renamed; the manifest is what makes a reader trust it, since neither
safetensors nor torch notices a flipped byte.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqf.errors import UserError
from vqf.terminal import log

FORMAT = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"


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

    def has(self, name: str) -> bool:
        """Tell whether weights of this name are inside."""
        return (self.path / f"{name}.safetensors").is_file()

    def weights(self, name: str) -> dict[str, Tensor]:
        """Read weights, on the CPU."""
        return load_file(self.path / f"{name}.safetensors")

    def optimizers(self) -> dict[str, Any]:
        """Read the states of optimizers and schedules, on the CPU."""
        return torch.load(self.path / "optimizers.pt", map_location="cpu", weights_only=True)


def save(
    run_dir: Path,
    *,
    state: Mapping[str, Any],
    config: DictConfig,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizers: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `state["step"]` and delete all but the newest `keep`.

    Raises:
        OSError: If it cannot be written; earlier checkpoints are untouched then.
    """
    folder = run_dir / FOLDER
    final = folder / f"step-{state['step']:08d}"
    with _beside(final) as folder_now:
        for name, tensors in weights.items():
            save_file(
                {key: each.detach().contiguous() for key, each in tensors.items()}, folder_now / f"{name}.safetensors"
            )
        torch.save(dict(optimizers), folder_now / "optimizers.pt")
        (folder_now / "state.json").write_text(json.dumps(state, indent=1))
        OmegaConf.save(config, folder_now / "config.yaml", resolve=True)
        _write_manifest(folder_now, state)
    for old in _folders(folder)[:-keep] if keep > 0 else []:
        shutil.rmtree(old, ignore_errors=True)
    return final


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder after verifying every file of it.

    Raises:
        BrokenCheckpointError: If a file is missing, short or changed.
    """
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise BrokenCheckpointError(f"{path}: format {manifest.get('format')} of a checkpoint; this vqf reads {FORMAT}")
    for name, facts in manifest["files"].items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise BrokenCheckpointError(f"{path}: {name} is missing")
        if file.stat().st_size != facts["size"] or _sha256(file) != facts["sha256"]:
            raise BrokenCheckpointError(f"{path}: {name} is not what was written (size or hash differ)")
    config = OmegaConf.load(path / "config.yaml")
    assert isinstance(config, DictConfig)
    return Checkpoint(path, _read_json(path / "state.json"), config)


def newest(run_dir: Path) -> Checkpoint | None:
    """Open the newest whole checkpoint of a run; those passed over are named in the log."""
    for path in reversed(_folders(run_dir / FOLDER)):
        try:
            return open_checkpoint(path)
        except BrokenCheckpointError as error:
            log.warning("passing over a broken checkpoint: %s", error)
    return None


def locate(path: str | Path | None, accepts: Callable[[Checkpoint], bool], wanted: str, cure: str) -> Checkpoint:
    """Find the checkpoint that `run=PATH` means: a run's folder, or one of its checkpoints.

    Args:
        path: What the user gave.
        accepts: Whether a checkpoint is of the kind that is asked for.
        wanted: Words for that kind.
        cure: What to do where there is none.

    Raises:
        UserError: If there is none, in one line.
    """
    if path is None:
        raise UserError(f"run: give run=FOLDER, {wanted}; {cure}")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"run={path}: no such folder; give {wanted}")
    # the folder of pipeline=full holds one run for each stage
    found = [open_checkpoint(root)] if (root / MANIFEST).is_file() else []
    found += [each for each in map(newest, (root, root / "stage2", root / "stage1")) if each and not found]
    for checkpoint in found:
        if accepts(checkpoint):
            return checkpoint
    if found:
        raise UserError(f"run={path} holds a {found[0].kind} run, but this needs {wanted}; {cure}")
    raise UserError(f"run={path}: no whole checkpoint in it; give {wanted}")


def run_folder(checkpoint: Path) -> Path:
    """Return the run's folder that a checkpoint's folder lies in, or the path itself if it is no checkpoint."""
    return checkpoint.parent.parent if checkpoint.parent.name == FOLDER else checkpoint


@contextmanager
def _beside(final: Path) -> Iterator[Path]:
    """Write a folder under a temporary name, flush it, and rename it when it is complete."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in [*temporary.iterdir(), temporary]:
            _flush(file)
        if final.exists():  # the same step again, after a resume
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_manifest(folder: Path, state: Mapping[str, Any]) -> None:
    files = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "kind": state["kind"], "step": state["step"], "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BrokenCheckpointError(f"{path.parent}: {path.name} cannot be read ({error})") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
