"""The options of no component, with types and ranges, and the check of a config."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from vqf.errors import UserError, not_a_run_message, unknown_key_message, unknown_message
from vqf.registry import KINDS, components, config_errors

TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    list: "a list",
}


@dataclass(frozen=True)
class Option:
    """Allowed values of one option.

    Args:
        types: The first is that of a list's elements.
        below: Numbers must be smaller.
        must_exist: A path of an existing folder.
        choices: Allowed strings.
        element_names: Names of the elements of a list of fixed length.
    """

    types: tuple[type, ...]
    optional: bool = False
    minimum: float | None = None
    below: float | None = None
    must_exist: bool = False
    choices: tuple[str, ...] = ()
    element_names: tuple[str, ...] = ()


OPTIONS = {
    "plugins": Option((list, str)),
    "seed": Option((int,), minimum=0),
    "image_size": Option((int, list), minimum=1, element_names=("height", "width")),
    "target": Option((str,)),
    "device": Option((str,)),
    "threads": Option((int, str), minimum=1, choices=("auto",)),
    "precision": Option((str,)),
    "engine": Option((str,)),
    "compile": Option((bool,)),
    "deterministic": Option((bool,)),
    "steps": Option((int,), minimum=0),
    "minutes": Option((float,), optional=True, minimum=0),
    "batch_size": Option((int,), minimum=1),
    "accumulate": Option((int,), minimum=1),
    "clip": Option((float,), optional=True, minimum=0),
    "ema": Option((float,), optional=True, minimum=0, below=1),
    "workers": Option((int,), minimum=0),
    "worker_timeout": Option((float,), minimum=1),
    "run": Option((Path,), optional=True, must_exist=True),
    "run_dir": Option((Path,), optional=True),
    "resume": Option((bool, Path), must_exist=True),
    "checkpoint.every": Option((int,), minimum=1),
    "allow_changes": Option((bool,)),
    "checkpoint.keep": Option((int,), minimum=0),
    "checkpoint.best": Option((str,), optional=True),
    "checkpoint.background": Option((bool,)),
    "checkpoint.on_failure": Option((str,), choices=("stop", "continue")),
    "nonfinite.action": Option((str,), choices=("stop", "skip", "rollback")),
    "nonfinite.limit": Option((int,), minimum=0),
    "log.every": Option((int,), minimum=1),
    "evaluate.every": Option((int,), minimum=1),
    "evaluate.count": Option((int,), optional=True, minimum=1),
    "evaluate.samples": Option((int,), minimum=0),
    "model.projection": Option((int,), optional=True, minimum=1),
    "tokens.root": Option((Path,), optional=True),
    "tokens.augmentations": Option((int,), minimum=1),
}

SECTIONS = ("stage2", "maps")  # repeat some of the options, for one run within pipeline=full


def check_config(config: DictConfig) -> None:
    """Check keys, values and components of a config.

    Raises:
        UserError: With one line for each mistake.
    """
    messages = [
        *_name_clashes(config),
        *_unknown_keys(config, known_keys(config)),
        *_invalid_values(config),
        *config_errors(config),
    ]
    for name in SECTIONS:
        if isinstance(section := config.get(name), DictConfig):
            messages += [*_invalid_values(section, f"{name}."), *config_errors(section, f"{name}.")]
    if messages:
        raise UserError(*messages)


def fill_missing_groups(config: DictConfig) -> DictConfig:
    """Copy a config, with groups that are missing null or empty."""
    config = config.copy()
    with open_dict(config):
        for kind in KINDS.values():
            key = kind.key
            if OmegaConf.select(config, key) is None:
                OmegaConf.update(config, key, {} if kind.multiple else None)
    return config


def known_keys(config: DictConfig) -> set[str]:
    """Dotted keys of `OPTIONS`, config groups, and the chosen pipeline."""
    name = OmegaConf.select(config, "pipeline.name")
    pipeline_options = {key for pipeline in components("pipeline") if pipeline.name == name for key in pipeline.options}
    groups = {kind.key for kind in KINDS.values()}
    in_sections = {f"{section}.{key}" for section in SECTIONS for key in (*OPTIONS, *groups)}
    return {*OPTIONS, *groups, *pipeline_options, *in_sections}


def _name_clashes(config: DictConfig) -> Iterator[str]:
    name = OmegaConf.select(config, "pipeline.name")
    taken = {each.split(".")[0] for each in known_keys(OmegaConf.create())}
    for component in components("pipeline"):
        for key in taken & component.options.keys() if component.name == name else ():
            yield f"{component}: every run has an option '{key}'; rename this one"


def _unknown_keys(config: Mapping[Any, Any], known: set[str], prefix: str = "") -> Iterator[str]:
    for key in config:
        path = f"{prefix}{key}"
        if path in known:
            continue
        if path == "experiment":  # without the package line, the content of an experiment file lands under its group
            yield "experiment: the first line of its file must be '# @package _global_'"
            continue
        options = sorted(option for option in known if option.startswith(f"{path}."))
        if not options:
            yield f"{path}: {unknown_key_message(path, known)}"
        elif isinstance(config[key], Mapping):
            yield from _unknown_keys(config[key], known, f"{path}.")
        else:
            value = to_cli(config[key])
            yield f"{path}={value}: '{path}' is a group of options; set one of them, as in {options[0]}=..."


def _invalid_values(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key, option in OPTIONS.items():
        try:
            if prefix and OmegaConf.is_interpolation(config, key):
                continue  # refers to the option outside the section, which is checked there
            value = OmegaConf.select(config, key, default=option, throw_on_missing=True)
        except (ConfigKeyError, ConfigAttributeError):
            continue
        except OmegaConfBaseException as error:
            yield f"{prefix}{key}: {str(error).splitlines()[0]}; give {prefix}{key}=..."
            continue
        if value is not option and (message := _value_error(option, value)):
            yield f"{prefix}{key}={to_cli(value)}: {message}"


def _value_error(option: Option, value: Any) -> str | None:
    if value is None and option.optional:
        return None
    if not any(_is_type(value, kind) for kind in option.types):
        return f"'{to_cli(value)}' is not {' or '.join(_allowed(option) + ['null'] * option.optional)}"
    if option.choices and isinstance(value, str):
        return None if value in option.choices else unknown_message("value", value, _allowed(option))
    numbers = value if isinstance(value, ListConfig) else [value]
    if option.element_names and isinstance(value, ListConfig) and len(value) != len(option.element_names):
        return f"has {len(value)} elements; give [{','.join(option.element_names)}] or one number for both"
    if option.minimum is not None and not all(
        _is_type(number, option.types[0]) and number >= option.minimum for number in numbers
    ):
        return f"must be {TYPE_NAMES[option.types[0]]} of at least {option.minimum}"
    if option.below is not None and value >= option.below:
        return f"must be below {option.below}"
    if option.must_exist and isinstance(value, str) and not (path := Path(value).expanduser()).is_dir():
        return not_a_run_message(path) if path.is_file() else f"no such folder in {Path.cwd()}"
    return None


def _allowed(option: Option) -> list[str]:
    kinds = [TYPE_NAMES[kind] for kind in option.types if not (kind is str and option.choices)]
    return [*option.choices, *kinds]


def _is_type(value: Any, kind: type) -> bool:
    if kind in (str, Path):
        return isinstance(value, str)
    if kind is list:
        return isinstance(value, ListConfig)
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int) or (kind is float and isinstance(value, float))


def to_cli(value: Any) -> str:
    """Write a value as on the command line: null, true, [1,2]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return re.sub(r"[' ]", "", str(value)) if isinstance(value, ListConfig) else str(value)
