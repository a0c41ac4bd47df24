"""What runs were configured with differently, in the words of the command line."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqf.config.settings import SECTIONS, written
from vqf.registry import KINDS

# What says where, on what and how often a run did something, not what it did; steps have a column of their own.
IGNORED = {
    *("run", "run_dir", "resume", "plugins", "device", "workers", "steps", "minutes", "allow_changes"),
    *("log", "checkpoint", "evaluate", "logger", "pipeline", "metric", "protocol", "hydra"),
}
ABSENT = "–"

GROUPS = {facts.group.replace("/", "."): facts for facts in KINDS.values()}


def differing(configs: Sequence[DictConfig | None]) -> dict[str, list[str]]:
    """Return the options in which runs differ, each with its value in every run.

    Components are told by name. An option of a component counts only where two runs that have this component differ
    in it: the others never had the choice.

    Args:
        configs: As composed; None where it is not known.
    """
    flat = [{} if config is None else dict(_flatten(config)) for config in configs]
    found: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for values in flat for key in values):
        if len({values[key] for values in flat if key in values}) > 1:
            column = found.setdefault(_word(key), [ABSENT] * len(flat))
            for i, values in enumerate(flat):
                column[i] = values.get(key, column[i])
    return found


def _flatten(config: DictConfig) -> Iterator[tuple[str, str]]:
    """Yield place and value of everything that makes a difference.

    A component's options stand behind its name, `model.quantizer.ema.decay`, so that those of one are never compared
    with those of another.
    """
    content = _plain(config)
    for key, value in content.items():
        if key in SECTIONS:
            yield from _section(key, value, content)
        elif key not in IGNORED:
            yield from _places(key, value)


def _section(name: str, values: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a section says differently from the run around it."""
    if (whole.get("pipeline") or {}).get("name") == "full":
        for key, value in values.items():
            if key not in IGNORED and value != whole.get(key):
                yield from _places(key, value, f"{name}.")


def _places(key: str, value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    facts = GROUPS.get(key)
    if facts is not None and facts.many:
        members = {name: node for name, node in (value or {}).items() if node}
        yield f"{prefix}{key}", f"[{','.join(sorted(members))}]"
        for name, node in members.items():
            yield from _leaves(f"{prefix}{key}.{name}", node)
    elif facts is not None:
        name = (value or {}).get("name")
        yield f"{prefix}{key}", _text(name)
        yield from _leaves(f"{prefix}{key}.{name}", value or {})
    elif isinstance(value, Mapping):
        for part, each in value.items():
            yield from _places(f"{key}.{part}", each, prefix)
    else:
        yield f"{prefix}{key}", _text(value)


def _leaves(place: str, node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if key != "name":
            yield f"{place}.{key}", _text(value)


def _word(key: str) -> str:
    """Write a place as the command line does: model/quantizer, model.quantizer.decay, model.loss.l1.weight."""
    if key in GROUPS:
        return GROUPS[key].group
    owner = next((group for group in GROUPS if key.startswith(f"{group}.") and not GROUPS[group].many), None)
    return key if owner is None else f"{owner}.{key.removeprefix(f'{owner}.').partition('.')[2]}"


def _plain(config: DictConfig) -> dict[str, Any]:
    """Resolve what can be: of a run that never began there is only what was composed for it."""
    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException:  # it refers to what is not there any more
        return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]


def _text(value: Any) -> str:
    return json.dumps(value).replace(" ", "") if isinstance(value, list | dict) else written(value)
