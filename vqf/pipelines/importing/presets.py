"""Presets to continue the training of an imported run."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.registry import KINDS, Kind

PRESETS_DIR = "conf"  # folder in the run for --config-dir


def write_presets(config: DictConfig, run_dir: Path) -> None:
    """Write the model as presets: a resumed run is composed from the command line again."""
    folder = run_dir / PRESETS_DIR
    choices: dict[str, Any] = {}
    for kind in KINDS.values():
        parent, _, key = kind.group.partition("/")
        if parent == "model":
            node = config.model.get(key)
            nodes = (node or {}) if kind.multiple else {"": node}
            names = [
                _write_variant(folder, kind, variant, name) for name, variant in nodes.items() if variant is not None
            ]
            choices[key] = names if kind.multiple else next(iter(names), None)
    absent = {key: None for key, choice in choices.items() if choice is None}
    preset = {"defaults": ["_self_", *({key: choice} for key, choice in choices.items())], **absent}
    _save_yaml(folder / "model" / "imported.yaml", preset)
    options = {option: value for option, value in config.optimizer.items() if option != "name"}
    values = {"image_size": config.image_size, "ema": config.ema, "optimizer": options}
    defaults = [{"override /model": "imported"}, {"override /optimizer": config.optimizer.name}]
    _save_yaml(folder / "experiment" / "imported.yaml", {"defaults": defaults, **values}, "# @package _global_\n")


def _write_variant(folder: Path, kind: Kind, node: DictConfig, key: str) -> str:
    name = f"imported_{key}" if key else "imported"
    options = {option: value for option, value in node.items() if option != "name"}
    header = f"# @package {kind.group.replace('/', '.')}.{key}\n" if key else ""
    _save_yaml(folder / kind.group / f"{name}.yaml", {"defaults": [node.name], **options}, header)
    return name


def _save_yaml(path: Path, content: Any, header: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + OmegaConf.to_yaml(OmegaConf.create(content), resolve=True))
