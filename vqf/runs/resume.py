"""Which checkpoint a run goes on from, and whether it is still the run that was: both configs side by side."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.config.settings import written
from vqf.distributed import comm
from vqf.errors import UserError
from vqf.runs import checkpoint as checkpoints
from vqf.runs.checkpoint import Checkpoint
from vqf.terminal import log

# Another value makes another run.
SAME = {
    "stage1": (
        *("model.encoder", "model.quantizer", "model.decoder", "model.loss"),
        *("model.discriminator", "model.adversary", "model.regularizer"),
    ),
    "stage2": ("model.prior", "model.conditioner", "tokens.views"),
}
SAME_EVERYWHERE = ("data", "subject", "image_size", "batch_size", "seed", "optimizer", "schedule", "clip", "ema")

# Another value is the same run, but not to the last bit.
CLOSE = ("steps", "accumulate", "precision", "compile", "engine", "device")

# Options that say where something is, or how it is computed, not what it is.
PLACES = ("root", "index", "hint", "run", "gradient_checkpointing")

ABSENT = object()


def find_resume(resume: bool | str, run_dir: Path) -> Checkpoint | None:
    """Open the checkpoint that `resume=` means: of this run's folder, or the one that is named.

    Raises:
        UserError: If a named folder has none. `resume=true` without any starts from the beginning, so that
            one command serves the first and every later process of a job.
    """
    if resume is False:
        return None
    path = run_dir if resume is True else Path(str(resume)).expanduser()
    named = (path / checkpoints.MANIFEST).is_file()
    found = shared(lambda: checkpoints.open_checkpoint(path) if named else checkpoints.newest(path))
    if found is None and resume is not True:
        raise UserError(f"resume={resume}: no whole checkpoint there; give a run's folder or one of its checkpoints")
    return found


def shared(find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Let the first process find a checkpoint, which says what it passes over, and all take the same one."""
    if not comm.first():
        place = comm.same(None)
        return None if place is None else checkpoints.open_checkpoint(place)
    found = find()
    comm.same(None if found is None else found.path)
    return found


def refuse_to_overwrite(run_dir: Path) -> None:
    """Refuse to begin a run where another is.

    Raises:
        UserError: If there is a checkpoint in the folder, be it whole or not.
    """
    if other := shared(lambda: checkpoints.newest(run_dir)):
        raise UserError(
            f"run_dir={run_dir}: holds a run at step {other.step}; resume=true goes on with it, "
            "another run_dir starts a new one"
        )
    if broken := comm.same(checkpoints.names(run_dir)):
        raise UserError(
            f"run_dir={run_dir}: holds a run, but none of its checkpoints is whole ({', '.join(broken)}); nothing was "
            "touched. Bring one back from a copy, or give another run_dir to start a new run"
        )


def find_start(config: DictConfig, run_dir: Path, kind: str) -> Checkpoint | None:
    """Find the checkpoint that a run of a stage goes on from; None where it begins.

    Raises:
        UserError: If it would overwrite a run, or cannot be the one that was saved.
    """
    found = find_resume(config.resume, run_dir)
    if found is None or checkpoints.run_folder(found.path).resolve() != run_dir.resolve():
        refuse_to_overwrite(run_dir)
    if found is None:
        return None
    if found.kind != kind:
        raise UserError(f"resume: {found.path} is of a {found.kind} run, and this is {kind}")
    if config.minutes is None and found.step > config.steps:
        raise UserError(f"steps={config.steps}: counts from the start, and {found.path} is at {found.step}")
    return found


def refuse(config: DictConfig, run_dir: Path, kind: str) -> None:
    """Refuse a run of a stage for what its config says, before data and weights load.

    Raises:
        UserError: As `find_start` and `check_fit` do.
    """
    if found := find_start(config, run_dir, kind):
        check_fit(found, config, {})


def check_fit(found: Checkpoint, config: DictConfig, facts: Mapping[str, Any]) -> None:
    """Compare a run with the checkpoint that it goes on from.

    Options that one side does not know are of another version of vqf and do not count. A checkpoint that was
    imported from another project has no such past.

    Args:
        found: The checkpoint.
        config: Of this run.
        facts: What the stage will write into `state.json`.

    Raises:
        UserError: If they differ in what makes the run, unless allow_changes is true: one line with each difference.
    """
    if found.state.get("data") is None:
        _check_classes(found, facts)
        return
    differ = [*_differences(found.config, config, (*SAME[found.kind], *SAME_EVERYWHERE)), *_other(found.state, facts)]
    if differ and not config.allow_changes:
        raise UserError(
            f"resume: {found.path} is of another config: {', '.join(differ)}. Set them back, "
            "give another run_dir to start anew, or go on all the same with allow_changes=true"
        )
    if differ := [*differ, *_differences(found.config, config, CLOSE)]:
        log.warning("not bit for bit the run that was saved: %s", ", ".join(differ))


def _check_classes(found: Checkpoint, facts: Mapping[str, Any]) -> None:
    """Refuse to train an imported prior on other classes than its own: they would take over each other's tokens."""
    then: list[str] = found.state.get("classes") or []
    now = facts.get("classes", then)
    if found.kind == "stage2" and then and len(now) != len(then):
        raise UserError(f"resume: {found.path} was trained on {len(then)} classes, and the data has {len(now)}")


def _differences(then: DictConfig, now: DictConfig, places: tuple[str, ...]) -> Iterator[str]:
    for place in places:
        yield from _compare(place, _plain(then, place), _plain(now, place))


def _compare(place: str, then: Any, now: Any) -> Iterator[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping) and then.get("name") == now.get("name"):
        for key in [*then, *(key for key in now if key not in then)]:
            if key not in PLACES:
                yield from _compare(f"{place}.{key}", then.get(key, ABSENT), now.get(key, ABSENT))
        return
    if ABSENT in (then, now) and not isinstance(now if then is ABSENT else then, Mapping):
        return
    if then != now:
        yield f"{place} {_word(then)} → {_word(now)}"


def _other(state: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is told by fingerprints: pictures, and the tokenizer that stage 2 stands on."""
    for key, what in (("data", "the training pictures"), ("tokenizer", "the tokenizer")):
        if key in state and key in facts and state[key] != facts[key]:
            yield f"{what} ({str(state[key])[:8]} → {str(facts[key])[:8]})"


def _plain(config: DictConfig, place: str) -> Any:
    node = OmegaConf.select(config, place, default=ABSENT)
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _word(value: Any) -> str:
    """Word a component by its name, anything else as on the command line."""
    if value is ABSENT:
        return "null"
    return str(value.get("name", sorted(value))) if isinstance(value, Mapping) else written(value)
