"""Resuming a run: from which checkpoint, and whether the config still describes the same run.

Options in `FIXED_KEYS` must not change; a change in `BITWISE_KEYS` changes rounding or length.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.distributed import comm
from vqf.errors import UserError
from vqf.options.typed_nodes import to_cli
from vqf.runs.checkpoint import Checkpoint, checkpoint_names, latest_checkpoint, open_checkpoint, run_dir_of
from vqf.runs.checkpoint_files import MANIFEST
from vqf.terminal import log

# A change makes it a different run.
FIXED_KEYS = {
    "stage1": (
        *("model.encoder", "model.quantizer", "model.decoder", "model.loss"),
        *("model.discriminator", "model.adversary", "model.regularizer", "model.projection", "freeze"),
    ),
    "stage2": ("model.prior", "model.conditioner", "tokens.augmentations", "freeze"),
}
COMMON_FIXED_KEYS = ("data", "target", "image_size", "batch_size", "seed", "optimizer", "schedule", "clip", "ema")

# A change gives the same run, but not bit for bit.
BITWISE_KEYS = ("steps", "accumulate", "precision", "compile", "engine", "device")

# Options of components that say where something is or how it is computed, not what it is.
IGNORED_OPTIONS = ("root", "index", "source_hint", "run", "gradient_checkpointing")

ABSENT = object()


def find_resume_checkpoint(resume: bool | str, run_dir: Path) -> Checkpoint | None:
    """Open the checkpoint that `resume=` names.

    `true`: the newest of `run_dir`, if any. A path: the newest of that run, or that checkpoint.

    Raises:
        UserError: If a path holds no intact checkpoint.
    """
    if resume is False:
        return None
    path = run_dir if resume is True else Path(str(resume)).expanduser()
    is_checkpoint = (path / MANIFEST).is_file()
    checkpoint = find_on_main(lambda: open_checkpoint(path) if is_checkpoint else latest_checkpoint(path))
    if checkpoint is None and resume is not True:
        raise UserError(f"resume={resume}: no intact checkpoint there; give a run's folder or one of its checkpoints")
    return checkpoint


def find_on_main(find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Find a checkpoint in the main process and open it in all."""
    if not comm.is_main():
        path = comm.broadcast_object(None)
        return None if path is None else open_checkpoint(path)
    checkpoint = find()
    comm.broadcast_object(None if checkpoint is None else checkpoint.path)
    return checkpoint


def check_not_overwriting(run_dir: Path) -> None:
    """Refuse to start a new run in another's folder.

    Raises:
        UserError: If it has any checkpoint.
    """
    if other := find_on_main(lambda: latest_checkpoint(run_dir)):
        raise UserError(
            f"run_dir={run_dir}: holds a run at step {other.step}; continue it with resume=true, "
            "or give another run_dir for a new run"
        )
    if broken := comm.broadcast_object(checkpoint_names(run_dir)):
        raise UserError(
            f"run_dir={run_dir}: holds a run, but none of its checkpoints is intact ({', '.join(broken)}); nothing was "
            "changed. Restore one from a backup, or give another run_dir to start a new run"
        )


def find_start_checkpoint(config: DictConfig, run_dir: Path, kind: str) -> Checkpoint | None:
    """Find the checkpoint that a run of `kind` ("stage1" or "stage2") resumes from, if any.

    Raises:
        UserError: If a new run would overwrite another, or it does not fit.
    """
    checkpoint = find_resume_checkpoint(config.resume, run_dir)
    if checkpoint is None or run_dir_of(checkpoint.path).resolve() != run_dir.resolve():
        check_not_overwriting(run_dir)
    if checkpoint is None:
        return None
    if checkpoint.kind != kind:
        raise UserError(f"resume: {checkpoint.path} is of a {checkpoint.kind} run, and this is {kind}")
    if config.minutes is None and checkpoint.step > config.steps:
        raise UserError(
            f"steps={config.steps}: must be at least {checkpoint.step}, the step of {checkpoint.path}; "
            "steps count from the start of the run"
        )
    return checkpoint


def check_can_start(config: DictConfig, run_dir: Path, kind: str) -> None:
    """Check a resumed run by its config alone.

    Raises:
        UserError: If it cannot resume.
    """
    if checkpoint := find_start_checkpoint(config, run_dir, kind):
        check_same_run(checkpoint, config, {})


def check_same_run(checkpoint: Checkpoint, config: DictConfig, metadata: Mapping[str, Any]) -> None:
    """Compare the config and data of a run with the checkpoint it resumes from.

    Options that one side lacks are ignored. Of an imported checkpoint only the number of classes is compared.

    Raises:
        UserError: If an option of `FIXED_KEYS` or a fingerprint differs without allow_changes.
    """
    if checkpoint.state.get("data") is None:
        _check_classes(checkpoint, metadata)
        return
    changes = [
        *_config_differences(checkpoint.config, config, (*FIXED_KEYS[checkpoint.kind], *COMMON_FIXED_KEYS)),
        *_fingerprint_differences(checkpoint.state, metadata),
    ]
    if changes and not config.allow_changes:
        raise UserError(
            f"resume: {checkpoint.path} was trained with another config: {', '.join(changes)}. Undo the changes, "
            "give another run_dir to start a new run, or resume anyway with allow_changes=true"
        )
    if changes := [*changes, *_config_differences(checkpoint.config, config, BITWISE_KEYS)]:
        log.warning("not bit for bit the run that was saved: %s", ", ".join(changes))


def _check_classes(checkpoint: Checkpoint, metadata: Mapping[str, Any]) -> None:
    then: list[str] = checkpoint.state.get("classes") or []
    now = metadata.get("classes", then)
    if checkpoint.kind == "stage2" and then and len(now) != len(then):
        raise UserError(f"resume: {checkpoint.path} was trained on {len(then)} classes, but the data has {len(now)}")


def _config_differences(then: DictConfig, now: DictConfig, keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        yield from _compare_values(key, _plain_value(then, key), _plain_value(now, key))


def _compare_values(config_key: str, then: Any, now: Any) -> Iterator[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping) and then.get("name") == now.get("name"):
        for key in [*then, *(key for key in now if key not in then)]:
            if key not in IGNORED_OPTIONS:
                yield from _compare_values(f"{config_key}.{key}", then.get(key, ABSENT), now.get(key, ABSENT))
        return
    if ABSENT in (then, now) and not isinstance(now if then is ABSENT else then, Mapping):
        return
    if then != now:
        yield f"{config_key} {_format_value(then)} → {_format_value(now)}"


def _fingerprint_differences(state: Mapping[str, Any], metadata: Mapping[str, Any]) -> Iterator[str]:
    for key, what in (("data", "the training images"), ("tokenizer", "the tokenizer")):
        if key in state and key in metadata and state[key] != metadata[key]:
            yield f"{what} ({str(state[key])[:8]} → {str(metadata[key])[:8]})"


def _plain_value(config: DictConfig, config_key: str) -> Any:
    node = OmegaConf.select(config, config_key, default=ABSENT)
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _format_value(value: Any) -> str:
    if value is ABSENT:
        return "null"
    return str(value.get("name", sorted(value))) if isinstance(value, Mapping) else to_cli(value)
