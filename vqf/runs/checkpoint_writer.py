"""Writes the checkpoints of a run, and decides which of them stay; `checkpoint` says what one is."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vqf.atomic import atomic_folder, link_or_copy, recover_interrupted, write_torch, write_weights
from vqf.runs.checkpoint import (
    CHECKPOINTS_FOLDER,
    FORMAT,
    MANIFEST,
    STATE,
    checkpoint_folders,
    file_entry,
    folder_name,
    read_json,
    step_of,
)
from vqf.runs.retention import BestCriterion, prune_checkpoints
from vqf.terminal import log

ARCHIVE_PREFIX = "aside-"  # in front of the name of a checkpoint that the run does not count any more


def write_checkpoint(
    run_dir: Path,
    *,
    state: Mapping[str, Any],
    config: DictConfig,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizers: Mapping[str, Any],
    keep: int,
    best: BestCriterion | None = None,
    every: int | None = None,
) -> Path:
    """Write the checkpoint of `state["step"]`, then delete others.

    Args:
        keep: How many of the newest stay; with 0, all.
        best: What tells which stays beside them.
        every: The newest at a multiple of this stays, too.

    Raises:
        OSError: If it cannot be written; earlier checkpoints are untouched then.
    """
    final = run_dir / CHECKPOINTS_FOLDER / folder_name(state["step"])
    with atomic_folder(final) as folder_now:
        for name, tensors in weights.items():
            write_weights(tensors, folder_now / f"{name}.safetensors")
        write_torch(optimizers, folder_now / "optimizers.pt")
        (folder_now / STATE).write_text(json.dumps(state, indent=1))
        OmegaConf.save(config, folder_now / "config.yaml", resolve=True)
        _write_manifest(folder_now, state)
    _prune(run_dir, keep, best, every)
    return final


def update_state(
    run_dir: Path, state: Mapping[str, Any], *, keep: int, best: BestCriterion | None = None, every: int | None = None
) -> Path:
    """Give the checkpoint of `state["step"]` another state; no other file of it is written again.

    Raises:
        OSError: If it cannot be written; the checkpoint is as it was then.
    """
    final = run_dir / CHECKPOINTS_FOLDER / folder_name(state["step"])
    manifest = read_json(final / MANIFEST)
    with atomic_folder(final) as folder_now:
        for name in manifest["files"].keys() - {STATE}:
            link_or_copy(final / name, folder_now / name)
        (folder_now / STATE).write_text(json.dumps(state, indent=1))
        manifest["files"][STATE] = file_entry(folder_now / STATE)
        (folder_now / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _prune(run_dir, keep, best, every)
    return final


def _prune(run_dir: Path, keep: int, best: BestCriterion | None, every: int | None) -> None:
    folders = checkpoint_folders(run_dir / CHECKPOINTS_FOLDER)
    regular = [folder for folder in folders if every and step_of(folder) % every == 0]
    prune_checkpoints(folders, keep, best, keep_also=regular[-1] if regular else None)


def archive_later(run_dir: Path, step: int) -> None:
    """Make the checkpoint of `step` the newest of a run that goes on from there, and clear what killed writers left.

    Later ones are broken, or of a time that is not to be; as they stand they would be taken for the newest, and push
    out those that count. They are renamed, not deleted.
    """
    folder = run_dir / CHECKPOINTS_FOLDER
    recover_interrupted(folder, "step-*")
    for later in checkpoint_folders(folder):
        if step_of(later) > step:
            aside = folder / f"{ARCHIVE_PREFIX}{later.name}"
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)
            log.warning("set aside as %s: the run goes on from step %d", aside, step)


def _write_manifest(folder: Path, state: Mapping[str, Any]) -> None:
    files = {file.name: file_entry(file) for file in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "kind": state["kind"], "step": state["step"], "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
