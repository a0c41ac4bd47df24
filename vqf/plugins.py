"""Imports plugins: modules that register components."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from vqf.errors import UserError

ENTRY_POINTS = "vqf.components"


def load_plugins(modules: str | Sequence[str] = ()) -> None:
    """Import the installed plugins (entry points of group `vqf.components`), then modules or .py files.

    Raises:
        UserError: If a module does not exist, or an installed plugin fails to import.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            importlib.import_module(point.module)
        except Exception as error:
            package = point.dist.name if point.dist else point.value
            raise UserError(
                f"plugins: installed package '{package}' fails to import: {error}; fix it or pip uninstall {package}"
            ) from error
    for module in [modules] if isinstance(modules, str) else modules:
        if module.endswith(".py"):
            _import_file(Path(module).expanduser())
        else:
            _import_module(module)


def plugins_from_cli(arguments: Sequence[str]) -> list[str]:
    """Modules of the `plugins=` argument.

    Raises:
        UserError: If it is a sweep, or a value is not a string.
    """
    modules: list[Any] = []
    for argument in arguments:
        if argument.lstrip("+").startswith("plugins="):
            try:
                (override,) = OverridesParser.create().parse_overrides([argument])
            except OverrideParseException:
                continue  # `check_command` reports it with the other arguments
            if override.is_sweep_override():
                raise UserError("plugins: cannot be swept; list every module, plugins=[a,b]")
            value = override.value()
            modules += value if isinstance(value, list) else [value]
    if invalid := [module for module in modules if not isinstance(module, str)]:
        raise UserError(f"plugins: '{invalid[0]}' is not a module; plugins=[my_package.my_module,./my_file.py]")
    return modules


def _import_module(module: str) -> None:
    # `python -m` puts the current folder on sys.path, a console script does not.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise  # the plugin exists; a module that it imports does not
        raise UserError(
            f"plugins: no module named '{module}'; give a module that Python can import, or the path of a .py file"
        ) from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"plugins: no file '{path}' in {Path.cwd()}")
    existing = sys.modules.get(path.stem) or importlib.util.find_spec(path.stem)
    origin = getattr(existing, "__file__", None) or getattr(existing, "origin", None)
    if existing and (origin is None or Path(origin).resolve() != path.resolve()):
        raise UserError(f"plugins: '{path}' would hide the module '{path.stem}' ({origin}); rename the file")
    if path.stem not in sys.modules:
        _execute(path)


def _execute(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
