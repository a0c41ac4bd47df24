"""YAML files, which may be made by someone else."""

import io
from pathlib import Path

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

MAX_YAML_CHARACTERS, MAX_YAML_VALUES, MAX_YAML_DEPTH = 2_000_000, 100_000, 100


def read_yaml(path: Path) -> DictConfig | ListConfig:
    """Read a YAML or JSON file as a config, unresolved.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no YAML, or has more values or levels than any config, its aliases expanded.
    """
    text = path.read_text(encoding="utf-8")
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"{len(text):,} characters, and no config has more than {MAX_YAML_CHARACTERS:,}")
    try:
        _check_expanded_size(text)
        return OmegaConf.load(io.StringIO(text))
    except Exception as error:  # yaml and omegaconf raise their own, Python others for what a text may name
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from error


def _check_expanded_size(text: str) -> None:
    """Count values with every alias (`*name`) expanded: each level of `[*a, *a]` doubles them."""
    size_of_anchor: dict[str | None, int] = {}
    open_collections: list[tuple[str | None, int]] = []  # the anchor of each, and the count where it began
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_collections.append((event.anchor, count))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, start = open_collections.pop()
            size_of_anchor[anchor] = count - start
        elif isinstance(event, yaml.AliasEvent):
            count += size_of_anchor.get(event.anchor, 0)
        count += isinstance(event, yaml.NodeEvent)
        if count > MAX_YAML_VALUES or len(open_collections) > MAX_YAML_DEPTH:
            raise ValueError(f"more than {MAX_YAML_VALUES:,} values, its aliases expanded, or {MAX_YAML_DEPTH} levels")
