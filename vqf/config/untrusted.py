"""Rules for configs and folders of other people.

Only the command line may choose code to run or paths to write. Configs in checkpoints contain no interpolations, run
folders no symbolic links that lead out.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.errors import UserError

# Options that choose code to run, or paths to write.
CLI_ONLY_KEYS = (
    *("plugins", "run_dir", "resume", "tokens.root", "out", "path", "statistics", "data.index"),
    *("hydra.callbacks", "hydra.hydra_logging", "hydra.job_logging", "hydra.launcher", "hydra.sweeper._target_"),
    *("hydra.job.chdir", "hydra.job.env_copy", "hydra.job.env_set", "hydra.output_subdir", "hydra.run", "hydra.sweep"),
    "hydra.searchpath",
)

WANDB_LOG_LINK = "wandb/*run-*/logs/debug-core.log"  # wandb links its own log, and never writes through the link


def cli_only_violations(config: DictConfig, defaults: Sequence[DictConfig], cli_keys: Collection[str]) -> Iterator[str]:
    """Yield a message for every option of `CLI_ONLY_KEYS` that a config file sets, beyond the values in `defaults`."""
    for key in CLI_ONLY_KEYS:
        value = _raw_value(config, key)
        allowed = [None, *(_raw_value(default, key) for default in defaults)]
        if value not in allowed and not _is_set_on_cli(key, cli_keys):
            yield (
                f"{key}: set by a config file, but it chooses code to run or a path to write; "
                f"give it on the command line, {key}=..."
            )


def check_no_interpolations(content: Any, path: Path) -> None:
    """Refuse interpolations in a file's config: they could read the environment.

    Raises:
        UserError: If any string contains one.
    """
    for text in _strings(content):
        if "${" in text:
            raise UserError(f"{path}: contains the interpolation '{text}'; vqf writes none into checkpoints")


def check_symlinks(folder: Path) -> None:
    """Refuse a folder with a symbolic link that leads out of it, except wandb's log link.

    Raises:
        UserError: Naming the link.
    """
    root = folder.resolve()
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.is_symlink() and not path.resolve().is_relative_to(root) and not path.match(WANDB_LOG_LINK):
            raise UserError(
                f"{folder}: '{path.relative_to(folder)}' is a symbolic link to {path.resolve()}, outside this folder, "
                "and the run would write there; remove the link, or give another run_dir"
            )


def _is_set_on_cli(config_key: str, cli_keys: Collection[str]) -> bool:
    """Tell whether the key, one below it, or its `hydra` group is set."""
    sufficient = {config_key, config_key.rpartition(".")[0]} if config_key.startswith("hydra.") else {config_key}
    return any(key in sufficient or key.startswith(f"{config_key}.") for key in cli_keys)


def _raw_value(config: DictConfig, config_key: str) -> Any:
    *parents, last = config_key.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, DictConfig) else None
    if not isinstance(node, DictConfig) or last not in node:
        return None
    value: Any = node._get_node(last)
    plain = OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value._value()
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
