"""Rewords errors of Hydra and OmegaConf."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf

from vqf.config.arguments import shell_word
from vqf.errors import closest_match, unknown_key_message, unknown_message
from vqf.registry import KINDS, components

OMEGACONF_TYPES = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false", "Path": "a path"}

SKIPPED_LINES = ("full_key:", "object_type=", "reference_type=", "See ")

# Pattern of a message of OmegaConf or Hydra, and the message that replaces it.
REWORDED = (
    (r"Value '(?P<value>.*?)' .*?could not be converted to (?P<type>\w+)", "'{value}' is not {type}"),
    (r"Value '(?P<value>.*?)' is not a valid bool", "'{value}' is not true or false"),
    (r"Invalid value assigned: \w+ is not a ListConfig", "not a list; write it as '{key}=[a,b]'"),
    (r"Cannot assign \w+ to dict", "not a mapping; write it as '{key}={{a:1,b:2}}'"),
    (r"field '.*' is not Optional", "null is not allowed"),
    (r"Could not delete from config", "no such option to remove"),
    (r"An item is already at", "this option exists already; remove the +"),
)


def explain(error: BaseException) -> str:
    """Message for an error of composing."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_config_message(error)
    if error.__cause__ is not None and ("Error merging" in text or not text):
        text = str(error.__cause__)
    for pattern, message in REWORDED:
        if match := re.search(pattern, text):
            groups = match.groupdict()
            groups["type"] = OMEGACONF_TYPES.get(groups.get("type", ""), "of its type")
            groups["key"] = next(iter(re.findall(r"full_key: (\S+)", text)), "KEY")
            return _file_prefix(text) + message.format(**groups)
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if not line.startswith(SKIPPED_LINES))


def unknown_group(group: str, groups: Sequence[str]) -> str:
    """Message for an unknown config group."""
    known = [each.replace("/", ".") for each in groups if not each.startswith("hydra") or group.startswith("hydra")]
    return unknown_key_message(group.replace("/", "."), known)


def unknown_key(override: Override, config: DictConfig, groups: Sequence[str]) -> str:
    """Message for `stepz=5`, or `model.quantiser.beta=1`.

    Args:
        config: Config composed without it.
    """
    key = override.key_or_group
    if group := closest_match(key, [each for each in groups if each.rpartition("/")[2] == key]):
        return f"write {shell_word(f'{group}={override.get_value_string()}')}"
    if hint := _missing_component_hint(key, config):
        return hint
    if owners := [each.name for each in components("pipeline") if key in each.options]:
        return f"an option of pipeline={' or '.join(owners)}; this is pipeline={config.pipeline.name}"
    return unknown_key_message(key, _keys(config))


def _missing_component_hint(key: str, config: DictConfig) -> str | None:
    group_key, _, option = key.rpartition(".")
    for name, kind in KINDS.items():
        if group_key != kind.key or kind.multiple or OmegaConf.select(config, group_key) is not None:
            continue
        if known := components(name):
            names = [each.name for each in known if option in each.options] or [each.name for each in known]
            return f"no {name} is chosen; add {kind.group}={' or '.join(names)}"
    return None


def null_hint(group: str) -> str:
    """Message for `group=null`."""
    multiple = any(kind.multiple for kind in KINDS.values() if kind.group == group)
    null = f"{group.replace('/', '.')}=null" if "/" in group else f"~{group}"
    return f"write {shell_word(f'{group}=[]' if multiple else null)} to choose none"


def _missing_config_message(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    return unknown_message(group.rpartition("/")[2] or "config", name, error.options or [])


def _file_prefix(text: str) -> str:
    file = re.search(r"In '(.*?)'", text)
    key = re.search(r"full_key: (\S+)", text)
    return (f"in {file[1]}: " + (f"{key[1]}: " if key else "")) if file and file[1] != "config" else ""


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, ListConfig) or not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        yield prefix[:-1]
        return
    for key, value in node.items_ex(resolve=False):
        yield from _keys(value, f"{prefix}{key!s}.")
