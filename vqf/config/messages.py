"""Words for what Hydra and OmegaConf refuse: one line that says what was wrong, what is close, and what to do."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf

from vqf.errors import closest_match, unknown_key_message, unknown_message
from vqf.registry import KINDS, components

OMEGACONF_TYPES = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "Path": "a path"}

SKIPPED_LINES = ("full_key:", "object_type=", "reference_type=", "See ")

# What OmegaConf and Hydra say, and what it means to the person who typed it.
REWORDED = (
    (r"Value '(?P<value>.*?)' .*?could not be converted to (?P<type>\w+)", "'{value}' is not {type}"),
    (r"Value '(?P<value>.*?)' is not a valid bool", "'{value}' is not true or false"),
    (r"Invalid value assigned: \w+ is not a ListConfig", "not a list; write it as [a,b]"),
    (r"Cannot assign \w+ to dict", "not a mapping; write it as {{a:1,b:2}}"),
    (r"field '.*' is not Optional", "null is not possible here"),
    (r"Could not delete from config", "there is no such word to take away"),
    (r"An item is already at", "it is there already; leave out the +"),
)


def explain(error: BaseException) -> str:
    """Word an error of composing a config."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_config_message(error)
    if error.__cause__ is not None and ("Error merging" in text or not text):
        text = str(error.__cause__)
    for pattern, words in REWORDED:
        if found := re.search(pattern, text):
            facts = found.groupdict()
            return _file_prefix(text) + words.format(
                **facts | {"type": OMEGACONF_TYPES.get(facts.get("type", ""), "of its type")}
            )
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if not line.startswith(SKIPPED_LINES))


def unknown_group(group: str, groups: Sequence[str]) -> str:
    """Word the choice of a component of a kind that there is not."""
    known = [each.replace("/", ".") for each in groups if not each.startswith("hydra") or group.startswith("hydra")]
    return unknown_key_message(group.replace("/", "."), known)


def unknown_key(override: Override, config: DictConfig, groups: Sequence[str]) -> str:
    """Word an argument that sets what the config does not have.

    Args:
        override: `stepz=5`, or `model.quantiser.beta=1`.
        config: What the rest composes.
        groups: Every config group.
    """
    key = override.key_or_group
    if group := closest_match(key, [each for each in groups if each.rpartition("/")[2] == key]):
        return f"write {group}={override.get_value_string()}"
    if chooser := _missing_component_hint(key, config):
        return chooser
    if owners := [each.name for each in components("pipeline") if key in each.options]:
        return f"an option of pipeline={' or '.join(owners)}; this is pipeline={config.pipeline.name}"
    return unknown_key_message(key, _keys(config))


def _missing_component_hint(key: str, config: DictConfig) -> str | None:
    """Word an option of a component where none is chosen; None for any other key."""
    for kind, facts in KINDS.items():
        place, option, known = facts.group.replace("/", "."), key.rpartition(".")[2], components(kind)
        if key == f"{place}.{option}" and known and not facts.multiple and OmegaConf.select(config, place) is None:
            named = [each.name for each in known if option in each.options] or [each.name for each in known]
            return f"no {kind} is chosen here; choose one as well, {facts.group}={' or '.join(named)}"
    return None


def null_hint(group: str) -> str:
    """Word `group=null`, which Hydra does not know."""
    many = any(kind.multiple for kind in KINDS.values() if kind.group == group)
    place = group.replace("/", ".")
    instead = f"{group}=[]" if many else f"{place}=null" if "/" in group else f"~{group}"
    return f"write {instead} to do without"


def syntax_hint(line: str, error: OverrideParseException, choices: Mapping[str, str]) -> str:
    """Word an argument that is not `key=value`.

    Args:
        line: The argument.
        error: What Hydra says of it.
        choices: What a bare name could choose: {"quickstart": "experiment=quickstart"}.
    """
    if "=" not in line:
        close = closest_match(line, choices)
        hint = f"Did you mean {choices[close]}? " if close else ""
        return f"{line}: an argument has the form key=value. {hint}A flag begins with --, as in --help."
    if "." in line.split("=")[0] and "/" in line.split("=")[0]:
        return f"{line}: a slash chooses, a dot sets: write {line.replace('/', '.')}"
    reason = error.message.partition("\nSee")[0].splitlines()[-1]
    return f"{line}: cannot be read ({reason}); quote what holds spaces, brackets or commas: 'key=[1, 2]'"


def sweep_hint(override: Override) -> str:
    """Word several values where one is meant."""
    key, value = override.get_key_element(), override.get_value_string()
    return f"{key}={value}: several values are a sweep, which needs -m; a list is written {key}=[{value}]"


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
