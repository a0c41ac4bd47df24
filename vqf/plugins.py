"""Import the modules outside vqf that register components."""

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
    """Import every installed plugin, then `modules`: dotted names or paths of .py files.

    Raises:
        UserError: If a plugin cannot be found, or an installed one fails to import.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            importlib.import_module(point.module)
        except Exception as error:
            owner = point.dist.name if point.dist else point.value
            raise UserError(
                f"plugins: installed package '{owner}' fails to import: {error}; fix it or pip uninstall {owner}"
            ) from error
    for module in [modules] if isinstance(modules, str) else modules:
        if module.endswith(".py"):
            _import_file(Path(module))
        else:
            _import_module(module)


def plugins_from_cli(arguments: Sequence[str]) -> list[str]:
    """Read the `plugins=` override, which must act before Hydra composes the rest."""
    modules: list[Any] = []
    for argument in arguments:
        if argument.lstrip("+").startswith("plugins="):
            try:
                (override,) = OverridesParser.create().parse_overrides([argument])
            except OverrideParseException:
                continue  # worded with the rest of the command line
            if override.is_sweep_override():
                raise UserError("plugins: name every module of the sweep at once, plugins=[a,b]")
            value = override.value()
            modules += value if isinstance(value, list) else [value]
    if wrong := [each for each in modules if not isinstance(each, str)]:
        raise UserError(f"plugins: '{wrong[0]}' is not a module; plugins=[my_package.my_module,./my_file.py]")
    return modules


def _import_module(module: str) -> None:
    # `python -m` puts the current folder on the path, a console script does not.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise  # the plugin was found; something it imports was not
        raise UserError(
            f"plugins: no module named '{module}'; give a module that Python can import, or the path of a .py file"
        ) from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"plugins: no file '{path}' in {Path.cwd()}")
    found = sys.modules.get(path.stem) or importlib.util.find_spec(path.stem)
    origin = getattr(found, "__file__", None) or getattr(found, "origin", None)
    if found and (origin is None or Path(origin).resolve() != path.resolve()):
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
