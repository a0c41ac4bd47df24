"""Compares the configs of runs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqf.config.settings import SECTIONS
from vqf.options.typed_nodes import to_cli
from vqf.registry import KINDS

# Keys that say where, on which device or how often, not what was trained; the table has its own column for steps.
IGNORED_KEYS = {
    *("run", "run_dir", "resume", "plugins", "device", "workers", "steps", "minutes", "allow_changes"),
    *("log", "checkpoint", "evaluate", "logger", "pipeline", "metric", "protocol", "hydra"),
}
MISSING = "–"

COMPONENT_KINDS = {kind.key: kind for kind in KINDS.values()}


def differing_options(configs: Sequence[DictConfig | None]) -> dict[str, list[str]]:
    """The options in which runs differ, with the value in every run.

    An option of a component is listed only if two runs with this component differ in it; other runs show `MISSING`.
    """
    flat = [{} if config is None else dict(_flatten(config)) for config in configs]
    columns: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for values in flat for key in values):
        if len({values[key] for values in flat if key in values}) > 1:
            column = columns.setdefault(_cli_key(key), [MISSING] * len(flat))
            for i, values in enumerate(flat):
                column[i] = values.get(key, column[i])
    return columns


def _flatten(config: DictConfig) -> Iterator[tuple[str, str]]:
    """A component's key includes its name, `model.quantizer.ema.decay`."""
    content = _to_container(config)
    for key, value in content.items():
        if key in SECTIONS:
            yield from _section(key, value, content)
        elif key not in IGNORED_KEYS:
            yield from _flatten_key(key, value)


def _section(name: str, values: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield only options that differ from those outside."""
    if (config.get("pipeline") or {}).get("name") == "full":
        for key, value in values.items():
            if key not in IGNORED_KEYS and value != config.get(key):
                yield from _flatten_key(key, value, f"{name}.")


def _flatten_key(key: str, value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    kind = COMPONENT_KINDS.get(key)
    if kind is not None and kind.multiple:
        members = {name: node for name, node in (value or {}).items() if node}
        yield f"{prefix}{key}", f"[{','.join(sorted(members))}]"
        for name, node in members.items():
            yield from _flatten_component(f"{prefix}{key}.{name}", node)
    elif kind is not None:
        name = (value or {}).get("name")
        yield f"{prefix}{key}", _to_text(name)
        yield from _flatten_component(f"{prefix}{key}.{name}", value or {})
    elif isinstance(value, Mapping):
        for name, child in value.items():
            yield from _flatten_key(f"{key}.{name}", child, prefix)
    else:
        yield f"{prefix}{key}", _to_text(value)


def _flatten_component(prefix: str, node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if key != "name":
            yield f"{prefix}.{key}", _to_text(value)


def _cli_key(key: str) -> str:
    if key in COMPONENT_KINDS:
        return COMPONENT_KINDS[key].group
    owner = next(
        (group for group in COMPONENT_KINDS if key.startswith(f"{group}.") and not COMPONENT_KINDS[group].multiple),
        None,
    )
    return key if owner is None else f"{owner}.{key.removeprefix(f'{owner}.').partition('.')[2]}"


def _to_container(config: DictConfig) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException:
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))


def _to_text(value: Any) -> str:
    return json.dumps(value).replace(" ", "") if isinstance(value, list | dict) else to_cli(value)
