"""Imports plugins: modules that register components."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from vqf.errors import UserError

ENTRY_POINTS = "vqf.components"
EXAMPLE = "Give modules or .py files, plugins=[my_package.my_module,./my_file.py]"


def load_plugins(modules: str | Sequence[str] = ()) -> None:
    """Import the installed plugins (entry points of group `vqf.components`), then modules or .py files.

    Raises:
        UserError: If a module does not exist or fails to import; the message has file and line.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            importlib.import_module(point.module)
        except (Exception, SystemExit) as error:
            package = point.dist.name if point.dist else point.value
            cure = f"fix it or pip uninstall {package}"
            raise _import_error(f"installed package '{package}'", error, cure) from error
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
        raise UserError(f"plugins: '{invalid[0]}' is not a module. {EXAMPLE}")
    return modules


def _import_module(module: str) -> None:
    if not all(part.isidentifier() for part in module.split(".")):
        found = Path(f"{module}.py").expanduser()
        close = f" Did you mean '{found}'?" if found.is_file() else ""
        raise UserError(f"plugins: '{module}' is neither a module nor a .py file.{close} {EXAMPLE}")
    # `python -m` puts the current folder on sys.path, a console script does not.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{module}.".startswith(f"{absent}."):
            raise UserError(
                f"plugins: no module named '{module}'; give a module that Python can import, or the path of a .py file"
            ) from error
        raise _import_error(f"'{module}'", error) from error


def _import_error(plugin: str, error: BaseException, cure: str = "fix it, or leave the plugin out") -> UserError:
    if isinstance(error, UserError):  # of the registry, which names the component
        return UserError(f"plugins: {plugin}{_line_of(error)}: {error}")
    reason = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).splitlines()[:1])
    description = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return UserError(f"plugins: {plugin} fails to import{_line_of(error)}: {description}; {cure}")


def _line_of(error: BaseException) -> str:
    """The last line of the plugin's own folder that an error has passed: " at mine.py:3", else ""."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    files = [(Path(frame.filename), frame.lineno) for frame in frames if not frame.filename.startswith("<")]
    outside = {Path(__file__), Path(importlib.__file__)}
    own = [(path, line) for path, line in files if path not in outside]
    lines = [f" at {path}:{line}" for path, line in own if path.parent == own[0][0].parent]
    return lines[-1] if lines else ""


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"plugins: no file '{path}' in {Path.cwd()}")
    if "." in path.stem:
        raise UserError(f"plugins: '{path}' cannot be imported: a module's name has no dot; rename the file")
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
    except (Exception, SystemExit) as error:
        del sys.modules[path.stem]
        raise _import_error(f"'{path}'", error) from error
