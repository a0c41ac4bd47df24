"""What a file of somebody else may not say: which code runs, and where it writes. Only the command line does."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.errors import UserError

# The words that name code, or where a run writes.
CLI_ONLY_KEYS = (
    *("plugins", "run_dir", "resume", "tokens.root", "out", "statistics", "data.index"),
    *("hydra.callbacks", "hydra.hydra_logging", "hydra.job_logging", "hydra.launcher", "hydra.sweeper._target_"),
    *("hydra.job.chdir", "hydra.job.env_copy", "hydra.job.env_set", "hydra.output_subdir", "hydra.run", "hydra.sweep"),
    "hydra.searchpath",
)

WANDB_LOG_LINK = "wandb/*run-*/logs/debug-core.log"  # made once, by name, and never opened for writing through the link


def cli_only_violations(config: DictConfig, defaults: Sequence[DictConfig], cli_keys: Collection[str]) -> Iterator[str]:
    """Yield a line for every word that a file sets, and only the command line may.

    Args:
        config: As composed, its `hydra` node included.
        defaults: As it may be without anybody's files.
        cli_keys: The dotted keys that the command line sets.
    """
    for place in CLI_ONLY_KEYS:
        told = _raw_value(config, place)
        if (
            told is not None
            and told not in [_raw_value(each, place) for each in defaults]
            and not _is_set_on_cli(place, cli_keys)
        ):
            yield (
                f"{place}: a config file sets it; which code runs and where it writes is said on the command line "
                f"alone, {place}=..."
            )


def check_no_interpolations(content: Any, path: Path) -> None:
    """Refuse interpolations, which could read the environment of whoever opens a file.

    Raises:
        UserError: If there is one in a string, however deep.
    """
    for each in _strings(content):
        if "${" in each:
            raise UserError(f"{path}: holds '{each}', to be looked up where it is read; vqf writes no such thing")


def check_symlinks(folder: Path) -> None:
    """Refuse a folder to write in that has a link out of it: what a run writes would land there.

    The link that wandb itself makes is none of them: to a log that its service keeps elsewhere, and writes there.

    Raises:
        UserError: Naming the link.
    """
    root = folder.resolve()
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.is_symlink() and not path.resolve().is_relative_to(root) and not path.match(WANDB_LOG_LINK):
            raise UserError(
                f"{folder}: '{path.relative_to(folder)}' is a link to {path.resolve()}, outside of this folder, and a "
                "run would write there; take it away, or name another run_dir"
            )


def _is_set_on_cli(config_key: str, cli_keys: Collection[str]) -> bool:
    """Tell whether the command line sets a place, a part of it, or chooses the part of Hydra's that it is in."""
    chosen = {config_key, config_key.rpartition(".")[0]} if config_key.startswith("hydra.") else {config_key}
    return any(key in chosen or key.startswith(f"{config_key}.") for key in cli_keys)


def _raw_value(config: DictConfig, config_key: str) -> Any:
    """Return what a config says at a place, not looked up; None for nothing."""
    *parents, last = config_key.split(".")
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
