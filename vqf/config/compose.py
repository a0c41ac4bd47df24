"""Checks the command line and reports every mistake in one line.

Hydra stops at the first. `Composer` then tries the arguments one by one.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from vqf.config import messages
from vqf.config.settings import check_config
from vqf.config.syntax_messages import rejoin_split, split_hint, sweep_hint, syntax_hint
from vqf.config.untrusted import cli_only_violations
from vqf.errors import UserError, printable, unknown_message

# Raised while composing; Hydra raises ValueError for a group set to null.
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
UNKNOWN_KEY_ERRORS = (ConfigKeyError, ConfigAttributeError)


def config_dir() -> Path:
    """Folder of the presets: beside the package, or inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Put flags before overrides, as argparse needs."""
    parsed = get_args_parser().parse_intermixed_args(list(arguments))
    flags = list(arguments)
    for override in parsed.overrides:
        flags.remove(override)
    if parsed.config_path:  # Hydra would look for it beside this file
        flags = [str(Path(flag).absolute()) if flag == parsed.config_path else flag for flag in flags]
    return [*flags, *parsed.overrides]


def check_command(arguments: Sequence[str]) -> None:
    """Compose and check the config of the arguments, every choice of a sweep at least once.

    Raises:
        UserError: With one line for each mistake.
    """
    flags = get_args_parser().parse_args(list(arguments))
    if flags.shell_completion or flags.hydra_help or flags.info is not None:
        return
    composer = Composer(flags)
    overrides, errors = _parse(flags.overrides, composer, flags.multirun)
    errors += composer.unprintable_choices() if flags.help else []
    sweep = [each for each in overrides if each.is_sweep_override()]
    if sweep and not flags.multirun and not composer.is_sweep(overrides):
        errors += [sweep_hint(override) for override in sweep]
    for job in [] if errors else _jobs(overrides):
        errors += composer.find_errors(job, runs=not flags.help and not flags.cfg)
    if errors:
        raise UserError(*dict.fromkeys(errors))


def compose_job(arguments: Sequence[str]) -> DictConfig | None:
    """Compose checked arguments; None unless they start exactly one job."""
    flags = get_args_parser().parse_args(list(arguments))
    if only_prints(arguments):
        return None
    config = Composer(flags).compose(flags.overrides) if not flags.multirun else None
    return None if config is None or config.hydra.mode == RunMode.MULTIRUN else config


def only_prints(arguments: Sequence[str]) -> bool:
    """Tell whether flags, such as --help, print something instead of starting jobs."""
    flags = get_args_parser().parse_args(list(arguments))
    return bool(flags.shell_completion or flags.hydra_help or flags.info is not None or flags.help or flags.cfg)


class Composer:
    """Composes configs as `hydra.main` does and explains errors."""

    def __init__(self, flags: argparse.Namespace) -> None:
        setup_globals()
        if flags.config_path and not Path(flags.config_path).is_dir():
            raise UserError(f"--config-path {flags.config_path}: no such folder")
        path = create_config_search_path(str(Path(flags.config_path or config_dir()).absolute()))
        self.has_foreign_files = bool(flags.config_path or flags.config_dir)  # config files that are not vqf's
        if flags.config_dir:
            extra = Path(flags.config_dir).absolute()
            if not extra.is_dir():
                raise UserError(f"--config-dir {flags.config_dir}: no such folder")
            path.prepend(provider="command-line", path=f"file://{extra}", anchor=SearchPathQuery(provider="schema"))
        self.name = flags.config_name or "config"
        self.loader = ConfigLoaderImpl(path)

    def compose(self, lines: Sequence[str]) -> DictConfig:
        return self.loader.load_configuration(self.name, list(lines), RunMode.RUN, from_shell=False)

    def is_sweep(self, overrides: Sequence[Override]) -> bool:
        try:
            config = self.compose([_input_line(each) for each in overrides if not each.is_sweep_override()])
        except COMPOSE_ERRORS:
            return False
        return config.hydra.mode == RunMode.MULTIRUN

    def find_errors(self, lines: Sequence[str], runs: bool) -> list[str]:
        """One line for each mistake; values may be missing unless the job `runs`."""
        try:
            config = self.compose(lines)
        except COMPOSE_ERRORS as error:
            return self._argument_errors(lines) or [messages.explain(error)]
        errors = list(self._cli_only_violations(config, lines))
        try:
            if runs:
                check_config(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
        except UserError as error:
            errors += str(error).splitlines()
        return errors

    def _cli_only_violations(self, config: DictConfig, lines: Sequence[str]) -> Iterator[str]:
        if not self.has_foreign_files:
            return
        overrides = OverridesParser.create().parse_overrides(list(lines))
        cli_keys = [override.key_or_group.replace("/", ".") for override in overrides]
        yield from cli_only_violations(config, _default_configs(), cli_keys)

    def group_choices(self) -> dict[str, str]:
        """The argument for each name: {"vqgan": "model=vqgan"}."""
        groups = [group for group in self._groups() if not group.startswith("hydra")]
        return {name: f"{group}={name}" for group in groups for name in self.loader.get_group_options(group)}

    def unprintable_choices(self) -> list[str]:
        """One line for each name of a file that --help, which Hydra prints, could not list in one line."""
        choices = self.group_choices()
        return [f"{choices[name]}: rename its file first" for name in choices if printable(name) != name]

    def _argument_errors(self, lines: Sequence[str]) -> list[str]:
        """Compose with each argument alone on the valid choices."""
        groups, valid, errors = list(self._groups()), list[str](), list[str]()
        overrides = OverridesParser.create().parse_overrides(list(lines))
        for override in sorted(overrides, key=lambda each: not _is_choice(each, groups)):
            is_choice = _is_choice(override, groups)
            find = self._choice_error if is_choice else self._value_error
            if message := find(override, groups, valid):
                errors.append(f"{_input_line(override)}: {message}")
            elif is_choice:
                valid.append(_input_line(override))
        return errors

    def _choice_error(self, override: Override, groups: Sequence[str], valid: list[str]) -> str | None:
        group, value = override.key_or_group, override.value()
        if group not in groups:
            return messages.unknown_group(group, groups)
        if value is None and not override.is_delete():
            return messages.null_hint(group)
        for name in [] if override.is_delete() else value if isinstance(value, list) else [value]:
            folder, _, file = f"{group}/{name}".rpartition("/")
            options = self.loader.get_group_options(folder, ObjectType.CONFIG, self.name, valid)
            if file not in options:
                return unknown_message(group.rpartition("/")[2], name, options)
        error = self._compose_error([*valid, _input_line(override)])
        return messages.explain(error) if error else None

    def _value_error(self, override: Override, groups: Sequence[str], valid: list[str]) -> str | None:
        error = self._compose_error([*valid, _input_line(override)])
        if error and isinstance(error.__cause__, UNKNOWN_KEY_ERRORS):
            return messages.unknown_key(override, self.compose(valid), groups)
        return messages.explain(error) if error else None

    def _compose_error(self, lines: Sequence[str]) -> Exception | None:
        try:
            self.compose(lines)
        except COMPOSE_ERRORS as error:
            return error
        return None

    def _groups(self, parent: str = "") -> Iterator[str]:
        for name in self.loader.list_groups(parent):
            group = f"{parent}/{name}" if parent else name
            yield group
            yield from self._groups(group)


def _default_configs() -> list[DictConfig]:
    """Hydra's, without and with vqf's config.yaml."""
    loader = ConfigLoaderImpl(create_config_search_path(None))
    plain = loader.load_configuration(None, [], RunMode.RUN, from_shell=False)
    config = OmegaConf.create({"hydra": OmegaConf.to_container(plain.hydra, resolve=False)})
    own = cast(DictConfig, OmegaConf.merge(config, OmegaConf.load(config_dir() / "config.yaml")))
    own.hydra.job_logging = OmegaConf.load(config_dir() / "hydra" / "job_logging" / "vqf.yaml")
    return [plain, own]


def _parse(lines: Sequence[str], composer: Composer, multirun: bool) -> tuple[list[Override], list[str]]:
    parser = OverridesParser.create(config_loader=composer.loader)
    overrides, errors = [], []
    before = None
    for group in rejoin_split(lines):
        try:
            overrides += parser.parse_overrides(group) if len(group) == 1 else []
        except OverrideParseException:
            errors.append(syntax_hint(group[0], before, composer.group_choices(), multirun))
        errors += [split_hint(group)] if len(group) > 1 else []
        before = group[-1]
    return overrides, errors


def _jobs(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Yield as few as show every choice of a sweep."""
    columns = [_sweep_choices(each) for each in overrides]
    if not columns:
        yield []
    for row in zip_longest(*columns):
        yield [column[-1] if line is None else line for line, column in zip(row, columns, strict=True)]


def _sweep_choices(override: Override) -> list[str]:
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [f"{override.get_key_element()}={value.start}"]
    if override.is_sweep_override():
        return [f"{override.get_key_element()}={choice}" for choice in override.sweep_string_iterator()]
    return [_input_line(override)]


def _input_line(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def _is_choice(override: Override, groups: Sequence[str]) -> bool:
    return override.key_or_group in groups or "/" in override.key_or_group
