"""The options of no component, with types and ranges, and the check of a config."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from vqf.errors import UserError, not_a_run_message, unknown_key_message, unknown_message
from vqf.options.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Rate, Sides, mismatch
from vqf.options.typed_nodes import literal_choices, to_cli
from vqf.registry import KINDS, components, config_errors

OPTIONS: dict[str, Any] = {
    "plugins": Sequence[str] | str,
    "seed": NonNegativeInt,
    "image_size": Sides,
    "target": str,
    "device": str,
    "threads": Literal["auto"] | Annotated[int, Interval(ge=1, le=4096)],
    "precision": str,
    "engine": str,
    "compile": bool,
    "deterministic": bool,
    "steps": NonNegativeInt,
    "minutes": Annotated[float, Interval(gt=0, le=10_000_000)] | None,
    "batch_size": PositiveInt,
    "accumulate": PositiveInt,
    "clip": PositiveFloat | None,
    "ema": Rate | None,
    "workers": NonNegativeInt,
    "worker_timeout": Annotated[float, Interval(ge=1, le=1_000_000)],
    "run": Path | None,
    "run_dir": Path | None,
    "resume": bool | Path,
    "checkpoint.every": PositiveInt,
    "allow_changes": bool,
    "checkpoint.keep": NonNegativeInt,
    "checkpoint.best": str | None,
    "checkpoint.background": bool,
    "checkpoint.on_failure": Literal["stop", "continue"],
    "nonfinite.action": Literal["stop", "skip", "rollback"],
    "nonfinite.limit": NonNegativeInt,
    "log.every": PositiveInt,
    "evaluate.every": PositiveInt,
    "evaluate.count": PositiveInt | None,
    "evaluate.samples": NonNegativeInt,
    "model.projection": PositiveInt | None,
    "tokens.root": Path | None,
    "tokens.augmentations": PositiveInt,
}
MUST_EXIST = ("run", "resume")  # paths of folders

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
    for key, hint in OPTIONS.items():
        try:
            if prefix and OmegaConf.is_interpolation(config, key):
                continue  # refers to the option outside the section, which is checked there
            value = OmegaConf.select(config, key, default=OPTIONS, throw_on_missing=True)
        except (ConfigKeyError, ConfigAttributeError):
            continue
        except OmegaConfBaseException as error:
            yield f"{prefix}{key}: {str(error).splitlines()[0]}; give {prefix}{key}=..."
            continue
        if value is not OPTIONS and (message := _value_error(key, hint, value)):
            yield f"{prefix}{key}={to_cli(value)}: {message}"


def _value_error(key: str, hint: Any, value: Any) -> str | None:
    value = OmegaConf.to_object(value) if isinstance(value, ListConfig) else value
    if isinstance(value, str) and (choices := literal_choices(hint)) and value not in choices:
        return unknown_message("value", value, choices)
    if message := mismatch(hint, value):
        return message
    if key in MUST_EXIST and isinstance(value, str) and not (path := Path(value).expanduser()).is_dir():
        return not_a_run_message(path) if path.is_file() else f"no such folder in {Path.cwd()}"
    return None
