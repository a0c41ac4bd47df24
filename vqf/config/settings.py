"""The words of the command line that belong to no component: `steps`, `batch_size`, `run`, ...

Their defaults stand in conf/config.yaml; here is what each may be, so that a slip is caught before anything starts.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from vqf.errors import UserError, unknown_key_message, unknown_message
from vqf.registry import KINDS, components, config_errors

TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    Path: "a path",
    list: "a list",
}


@dataclass(frozen=True)
class Setting:
    """What one word may be: of one of `types`, and null if `optional`; numbers from `minimum`, and `below` another.

    A list that is more than some words has so many `element_names`, each with a name.
    """

    types: tuple[type, ...]
    optional: bool = False
    minimum: float | None = None
    below: float | None = None
    must_exist: bool = False  # a path that must be there already
    choices: tuple[str, ...] = ()
    element_names: tuple[str, ...] = ()


SETTINGS = {
    "plugins": Setting((list, str)),
    "seed": Setting((int,), minimum=0),
    "image_size": Setting((int, list), minimum=1, element_names=("height", "width")),
    "target": Setting((str,)),
    "device": Setting((str,)),
    "precision": Setting((str,)),
    "engine": Setting((str,)),
    "compile": Setting((bool,)),
    "deterministic": Setting((bool,)),
    "steps": Setting((int,), minimum=0),
    "minutes": Setting((float,), optional=True, minimum=0),
    "batch_size": Setting((int,), minimum=1),
    "accumulate": Setting((int,), minimum=1),
    "clip": Setting((float,), optional=True, minimum=0),
    "ema": Setting((float,), optional=True, minimum=0, below=1),
    "workers": Setting((int,), minimum=0),
    "worker_timeout": Setting((float,), minimum=1),
    "run": Setting((Path,), optional=True, must_exist=True),
    "run_dir": Setting((Path,), optional=True),
    "resume": Setting((bool, Path), must_exist=True),
    "checkpoint.every": Setting((int,), minimum=1),
    "allow_changes": Setting((bool,)),
    "checkpoint.keep": Setting((int,), minimum=0),
    "checkpoint.best": Setting((str,), optional=True),
    "checkpoint.background": Setting((bool,)),
    "checkpoint.on_failure": Setting((str,), choices=("stop", "continue")),
    "nonfinite.action": Setting((str,), choices=("stop", "skip", "rollback")),
    "nonfinite.limit": Setting((int,), minimum=0),
    "log.every": Setting((int,), minimum=1),
    "evaluate.every": Setting((int,), minimum=1),
    "evaluate.count": Setting((int,), optional=True, minimum=1),
    "evaluate.samples": Setting((int,), minimum=0),
    "tokens.root": Setting((Path,), optional=True),
    "tokens.augmentations": Setting((int,), minimum=1),
}

SECTIONS = ("stage2", "maps")  # hold some of the words again, for one part of pipeline=full


def check_config(config: DictConfig) -> None:
    """Check everything that a composed config says, before data or weights load.

    Raises:
        UserError: All the mistakes, a line each.
    """
    mistakes = [
        *_name_clashes(config),
        *_unknown_keys(config, known_keys(config)),
        *_invalid_values(config),
        *config_errors(config),
    ]
    for name in SECTIONS:
        if isinstance(part := config.get(name), DictConfig):
            mistakes += [*_invalid_values(part, f"{name}."), *config_errors(part, f"{name}.")]
    if mistakes:
        raise UserError("\n".join(mistakes))


def fill_missing_groups(config: DictConfig) -> DictConfig:
    """Return a config that has every group: null, or an empty mapping, where nothing is chosen."""
    config = config.copy()
    with open_dict(config):
        for facts in KINDS.values():
            place = facts.group.replace("/", ".")
            if OmegaConf.select(config, place) is None:
                OmegaConf.update(config, place, {} if facts.multiple else None)
    return config


def known_keys(config: DictConfig) -> set[str]:
    """List the dotted keys that something reads: words, groups, and the options of the pipeline that is chosen."""
    name = OmegaConf.select(config, "pipeline.name")
    options = {key for each in components("pipeline") if each.name == name for key in each.options}
    groups = {kind.group.replace("/", ".") for kind in KINDS.values()}
    return {*SETTINGS, *groups, *options, *(f"{part}.{each}" for part in SECTIONS for each in (*SETTINGS, *groups))}


def _name_clashes(config: DictConfig) -> Iterator[str]:
    """Yield a line for every option of the pipeline that would replace a word that every run has."""
    name = OmegaConf.select(config, "pipeline.name")
    taken = {each.split(".")[0] for each in known_keys(OmegaConf.create())}
    for component in components("pipeline"):
        for key in taken & component.options.keys() if component.name == name else ():
            yield f"{component}: every run has a word '{key}'; give this option another name"


def _unknown_keys(config: Mapping[Any, Any], known: set[str], prefix: str = "") -> Iterator[str]:
    """Yield a line for every key that nothing reads, which only a file or a `+` can bring in."""
    for key in config:
        place = f"{prefix}{key}"
        if place in known:
            continue
        if place == "experiment":  # its file stands under its own name
            yield "experiment: the first line of its file must be '# @package _global_'"
            continue
        if not any(each.startswith(f"{place}.") for each in known):
            yield f"{place}: {unknown_key_message(place, known)}"
        elif isinstance(config[key], Mapping):
            yield from _unknown_keys(config[key], known, f"{place}.")
        else:
            parts = sorted(each for each in known if each.startswith(f"{place}."))
            yield f"{place}={to_cli(config[key])}: '{place}' is not a word by itself; give {parts[0]}=... or the like"


def _invalid_values(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield a line for every word whose value is not what it may be; absent ones are left alone."""
    for key, setting in SETTINGS.items():
        try:
            if prefix and OmegaConf.is_interpolation(config, key):
                continue  # a copy of a word that is checked by itself
            value = OmegaConf.select(config, key, default=setting, throw_on_missing=True)
        except (ConfigKeyError, ConfigAttributeError):
            continue
        except OmegaConfBaseException as error:
            yield f"{prefix}{key}: {str(error).splitlines()[0]}; give {prefix}{key}=..."
            continue
        if value is not setting and (fault := _value_error(setting, value)):
            yield f"{prefix}{key}={to_cli(value)}: {fault}"


def _value_error(setting: Setting, value: Any) -> str | None:
    if value is None and setting.optional:
        return None
    if not any(_is_type(value, each) for each in setting.types):
        kinds = [TYPE_NAMES[each] for each in setting.types] + ["null"] * setting.optional
        return f"'{to_cli(value)}' is not {' or '.join(kinds)}"
    if setting.choices and value not in setting.choices:
        return unknown_message("value", value, setting.choices)
    numbers = value if isinstance(value, ListConfig) else [value]
    if setting.element_names and isinstance(value, ListConfig) and len(value) != len(setting.element_names):
        return f"a list of {len(value)}; give {' and '.join(setting.element_names)}, or one number for both"
    if setting.minimum is not None and not all(
        _is_type(each, setting.types[0]) and each >= setting.minimum for each in numbers
    ):
        return f"must be {TYPE_NAMES[setting.types[0]]} of at least {setting.minimum}"
    if setting.below is not None and value >= setting.below:
        return f"must be below {setting.below}"
    if setting.must_exist and isinstance(value, str) and not Path(value).expanduser().is_dir():
        return f"no such folder in {Path.cwd()}"
    return None


def _is_type(value: Any, kind: type) -> bool:
    if kind in (str, Path):
        return isinstance(value, str)
    if kind is list:
        return isinstance(value, ListConfig)
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int) or (kind is float and isinstance(value, float))


def to_cli(value: Any) -> str:
    """Write a value as it stands on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return re.sub(r"[' ]", "", str(value)) if isinstance(value, ListConfig) else str(value)
