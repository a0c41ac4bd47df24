"""Which checkpoint a run goes on from, and whether it is still the run that was: both configs side by side."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.config.settings import to_cli
from vqf.distributed import comm
from vqf.errors import UserError
from vqf.runs import checkpoint as checkpoints
from vqf.runs.checkpoint import Checkpoint
from vqf.terminal import log

# Another value makes another run.
FIXED_KEYS = {
    "stage1": (
        *("model.encoder", "model.quantizer", "model.decoder", "model.loss"),
        *("model.discriminator", "model.adversary", "model.regularizer"),
    ),
    "stage2": ("model.prior", "model.conditioner", "tokens.augmentations"),
}
COMMON_FIXED_KEYS = ("data", "target", "image_size", "batch_size", "seed", "optimizer", "schedule", "clip", "ema")

# Another value is the same run, but not to the last bit.
BITWISE_KEYS = ("steps", "accumulate", "precision", "compile", "engine", "device")

# Options that say where something is, or how it is computed, not what it is.
IGNORED_OPTIONS = ("root", "index", "source_hint", "run", "gradient_checkpointing")

ABSENT = object()


def find_resume_checkpoint(resume: bool | str, run_dir: Path) -> Checkpoint | None:
    """Open the checkpoint that `resume=` means: of this run's folder, or the one that is named.

    Raises:
        UserError: If a named folder has none. `resume=true` without any starts from the beginning, so that
            one command serves the first and every later process of a job.
    """
    if resume is False:
        return None
    path = run_dir if resume is True else Path(str(resume)).expanduser()
    named = (path / checkpoints.MANIFEST).is_file()
    found = find_on_main(lambda: checkpoints.open_checkpoint(path) if named else checkpoints.latest_checkpoint(path))
    if found is None and resume is not True:
        raise UserError(f"resume={resume}: no whole checkpoint there; give a run's folder or one of its checkpoints")
    return found


def find_on_main(find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Let the first process find a checkpoint, which says what it passes over, and all take the same one."""
    if not comm.is_main():
        place = comm.broadcast_object(None)
        return None if place is None else checkpoints.open_checkpoint(place)
    found = find()
    comm.broadcast_object(None if found is None else found.path)
    return found


def check_not_overwriting(run_dir: Path) -> None:
    """Refuse to begin a run where another is.

    Raises:
        UserError: If there is a checkpoint in the folder, be it whole or not.
    """
    if other := find_on_main(lambda: checkpoints.latest_checkpoint(run_dir)):
        raise UserError(
            f"run_dir={run_dir}: holds a run at step {other.step}; resume=true goes on with it, "
            "another run_dir starts a new one"
        )
    if broken := comm.broadcast_object(checkpoints.checkpoint_names(run_dir)):
        raise UserError(
            f"run_dir={run_dir}: holds a run, but none of its checkpoints is whole ({', '.join(broken)}); nothing was "
            "touched. Bring one back from a copy, or give another run_dir to start a new run"
        )


def find_start_checkpoint(config: DictConfig, run_dir: Path, kind: str) -> Checkpoint | None:
    """Find the checkpoint that a run of a stage goes on from; None where it begins.

    Raises:
        UserError: If it would overwrite a run, or cannot be the one that was saved.
    """
    found = find_resume_checkpoint(config.resume, run_dir)
    if found is None or checkpoints.run_dir_of(found.path).resolve() != run_dir.resolve():
        check_not_overwriting(run_dir)
    if found is None:
        return None
    if found.kind != kind:
        raise UserError(f"resume: {found.path} is of a {found.kind} run, and this is {kind}")
    if config.minutes is None and found.step > config.steps:
        raise UserError(f"steps={config.steps}: counts from the start, and {found.path} is at {found.step}")
    return found


def check_can_start(config: DictConfig, run_dir: Path, kind: str) -> None:
    """Refuse a run of a stage for what its config says, before data and weights load.

    Raises:
        UserError: As `find_start_checkpoint` and `check_same_run` do.
    """
    if found := find_start_checkpoint(config, run_dir, kind):
        check_same_run(found, config, {})


def check_same_run(checkpoint: Checkpoint, config: DictConfig, metadata: Mapping[str, Any]) -> None:
    """Compare a run with the checkpoint that it goes on from.

    Options that one side does not know are of another version of vqf and do not count. A checkpoint that was
    imported from another project has no such past.

    Args:
        checkpoint: The checkpoint.
        config: Of this run.
        metadata: What the stage will write into `state.json`.

    Raises:
        UserError: If they differ in what makes the run, unless allow_changes is true: one line with each difference.
    """
    if checkpoint.state.get("data") is None:
        _check_classes(checkpoint, metadata)
        return
    differ = [
        *_config_differences(checkpoint.config, config, (*FIXED_KEYS[checkpoint.kind], *COMMON_FIXED_KEYS)),
        *_fingerprint_differences(checkpoint.state, metadata),
    ]
    if differ and not config.allow_changes:
        raise UserError(
            f"resume: {checkpoint.path} is of another config: {', '.join(differ)}. Set them back, "
            "give another run_dir to start anew, or go on all the same with allow_changes=true"
        )
    if differ := [*differ, *_config_differences(checkpoint.config, config, BITWISE_KEYS)]:
        log.warning("not bit for bit the run that was saved: %s", ", ".join(differ))


def _check_classes(checkpoint: Checkpoint, metadata: Mapping[str, Any]) -> None:
    """Refuse to train an imported prior on other classes than its own: they would take over each other's tokens."""
    then: list[str] = checkpoint.state.get("classes") or []
    now = metadata.get("classes", then)
    if checkpoint.kind == "stage2" and then and len(now) != len(then):
        raise UserError(f"resume: {checkpoint.path} was trained on {len(then)} classes, and the data has {len(now)}")


def _config_differences(then: DictConfig, now: DictConfig, keys: tuple[str, ...]) -> Iterator[str]:
    for place in keys:
        yield from _compare_values(place, _plain_value(then, place), _plain_value(now, place))


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
    """Yield what is told by fingerprints: images, and the tokenizer that stage 2 stands on."""
    for key, what in (("data", "the training images"), ("tokenizer", "the tokenizer")):
        if key in state and key in metadata and state[key] != metadata[key]:
            yield f"{what} ({str(state[key])[:8]} → {str(metadata[key])[:8]})"


def _plain_value(config: DictConfig, config_key: str) -> Any:
    node = OmegaConf.select(config, config_key, default=ABSENT)
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _format_value(value: Any) -> str:
    """Word a component by its name, anything else as on the command line."""
    if value is ABSENT:
        return "null"
    return str(value.get("name", sorted(value))) if isinstance(value, Mapping) else to_cli(value)
