"""Writes, updates, prunes and archives the checkpoint folders of a run."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vqf.atomic import atomic_folder, link_or_copy, recover_interrupted, write_torch, write_weights
from vqf.runs.checkpoint import CHECKPOINTS_FOLDER, FORMAT, checkpoint_folders, folder_name, step_of
from vqf.runs.checkpoint_files import MANIFEST, STATE, file_entry, read_json
from vqf.runs.retention import BestCriterion, prune_checkpoints
from vqf.terminal import log

ARCHIVE_PREFIX = "aside-"  # before the name of a checkpoint that the run no longer counts


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
    """Write the checkpoint of `state["step"]`, then delete old ones.

    Args:
        state: Content of state.json; needs "kind" and "step".
        weights: State dicts by file name: {"model": ..., "ema": ...}.
        keep: How many of the newest are kept; 0: all.
        every: The newest at a multiple of this step is kept, too.

    Raises:
        OSError: If it cannot be written; earlier ones are untouched.
    """
    final = run_dir / CHECKPOINTS_FOLDER / folder_name(state["step"])
    with atomic_folder(final) as temporary:
        for name, tensors in weights.items():
            write_weights(tensors, temporary / f"{name}.safetensors")
        write_torch(optimizers, temporary / "optimizers.pt")
        (temporary / STATE).write_text(json.dumps(state, indent=1))
        OmegaConf.save(config, temporary / "config.yaml", resolve=True)
        _write_manifest(temporary, state)
    _prune(run_dir, keep, best, every)
    return final


def update_state(
    run_dir: Path, state: Mapping[str, Any], *, keep: int, best: BestCriterion | None = None, every: int | None = None
) -> Path:
    """Replace state.json of the checkpoint of `state["step"]`, hard-linking its other files.

    Raises:
        OSError: If it cannot be written; the checkpoint is unchanged.
    """
    final = run_dir / CHECKPOINTS_FOLDER / folder_name(state["step"])
    manifest = read_json(final / MANIFEST)
    with atomic_folder(final) as temporary:
        for name in manifest["files"].keys() - {STATE}:
            link_or_copy(final / name, temporary / name)
        (temporary / STATE).write_text(json.dumps(state, indent=1))
        manifest["files"][STATE] = file_entry(temporary / STATE)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _prune(run_dir, keep, best, every)
    return final


def _prune(run_dir: Path, keep: int, best: BestCriterion | None, every: int | None) -> None:
    folders = checkpoint_folders(run_dir / CHECKPOINTS_FOLDER)
    regular = [folder for folder in folders if every and step_of(folder) % every == 0]
    prune_checkpoints(folders, keep, best, keep_also=regular[-1] if regular else None)


def archive_later(run_dir: Path, step: int) -> None:
    """Rename the checkpoints after `step`, from which a run resumes, and clean up after killed writers."""
    # They are broken or of the abandoned continuation. In place they would be resumed as the newest, and pruning would
    # keep them instead of the new ones.
    folder = run_dir / CHECKPOINTS_FOLDER
    recover_interrupted(folder, "step-*")
    for later in checkpoint_folders(folder):
        if step_of(later) > step:
            archived = folder / f"{ARCHIVE_PREFIX}{later.name}"
            shutil.rmtree(archived, ignore_errors=True)
            later.rename(archived)
            log.warning("archived as %s: resuming from step %d", archived, step)


def _write_manifest(folder: Path, state: Mapping[str, Any]) -> None:
    files = {file.name: file_entry(file) for file in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "kind": state["kind"], "step": state["step"], "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
