"""What a file of somebody else may not say: which code runs, and where it writes. Only the command line does."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.errors import UserError

# The words that name code, or where a run writes.
OWN_WORDS = (
    *("plugins", "run_dir", "resume", "tokens.root", "to", "statistics", "data.index"),
    *("hydra.callbacks", "hydra.hydra_logging", "hydra.job_logging", "hydra.launcher", "hydra.sweeper._target_"),
    *("hydra.job.chdir", "hydra.job.env_copy", "hydra.job.env_set", "hydra.output_subdir", "hydra.run", "hydra.sweep"),
    "hydra.searchpath",
)

SERVICE_LOG = "wandb/*run-*/logs/debug-core.log"  # made once, by name, and never opened for writing through the link


def foreign_words(config: DictConfig, own: Sequence[DictConfig], given: Collection[str]) -> Iterator[str]:
    """Yield a line for every word that a file sets, and only the command line may.

    Args:
        config: As composed, its `hydra` node included.
        own: As it may be without anybody's files.
        given: The dotted keys that the command line sets.
    """
    for place in OWN_WORDS:
        told = _told(config, place)
        if told is not None and told not in [_told(each, place) for each in own] and not _is_given(place, given):
            yield (
                f"{place}: a config file sets it; which code runs and where it writes is said on the command line "
                f"alone, {place}=..."
            )


def check_resolved(content: Any, path: Path) -> None:
    """Refuse interpolations, which could read the environment of whoever opens a file.

    Raises:
        UserError: If there is one in a string, however deep.
    """
    for each in _strings(content):
        if "${" in each:
            raise UserError(f"{path}: holds '{each}', to be looked up where it is read; vqf writes no such thing")


def check_links(folder: Path) -> None:
    """Refuse a folder to write in that has a link out of it: what a run writes would land there.

    The link that wandb itself makes is none of them: to a log that its service keeps elsewhere, and writes there.

    Raises:
        UserError: Naming the link.
    """
    root = folder.resolve()
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.is_symlink() and not path.resolve().is_relative_to(root) and not path.match(SERVICE_LOG):
            raise UserError(
                f"{folder}: '{path.relative_to(folder)}' is a link to {path.resolve()}, outside of this folder, and a "
                "run would write there; take it away, or name another run_dir"
            )


def _is_given(place: str, given: Collection[str]) -> bool:
    """Tell whether the command line sets a place, a part of it, or chooses the part of Hydra's that it is in."""
    chosen = {place, place.rpartition(".")[0]} if place.startswith("hydra.") else {place}
    return any(key in chosen or key.startswith(f"{place}.") for key in given)


def _told(config: DictConfig, place: str) -> Any:
    """Return what a config says at a place, not looked up; None for nothing."""
    *parents, last = place.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, DictConfig) else None
    if not isinstance(node, DictConfig) or last not in node:
        return None
    value = node._get_node(last)
    plain = OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value._value()  # type: ignore[union-attr]
    return None if plain in ([], {}) else plain


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _strings(key)
            yield from _strings(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _strings(value)
