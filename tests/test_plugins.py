"""Plugins as a file, a module and an installed package, and the three examples of the repository."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.support.composing import compose
from vqf.errors import UserError
from vqf.plugins import load_plugins, plugins_from_cli
from vqf.registry import build, component_names

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

COMPONENT = """
from vqf import register

@register("quantizer", "{name}")
class Mine:
    def __init__(self, *, bits: int = 3):
        self.bits = bits
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated: None) -> Iterator[Write]:
    """Write a module into the current folder, and undo its import afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)

    def written(path: str, text: str) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        importlib.invalidate_caches()
        return file

    yield written
    for module in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


@pytest.mark.parametrize("spelling", ["{file}", "a_plugin.py", "./a_plugin.py", "a_plugin"])
def test_a_file_registers_what_is_in_it(write: Write, spelling: str) -> None:
    file = write("a_plugin.py", COMPONENT.format(name="mine"))
    load_plugins([spelling.format(file=file)])
    assert "mine" in component_names("quantizer")
    assert build("quantizer", compose("model/quantizer=mine", "model.quantizer.bits=5").model.quantizer).bits == 5
    load_plugins([str(file), "./a_plugin.py"])


def test_a_module_of_a_package_registers_what_is_in_it(write: Write) -> None:
    write("a_package/__init__.py", "")
    write("a_package/inner.py", COMPONENT.format(name="inner"))
    load_plugins("a_package.inner")
    assert "inner" in component_names("quantizer")


def test_an_installed_package_needs_no_option(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("site/installed_one.py", COMPONENT.format(name="installed"))
    write("site/installed_one-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: installed-one\nVersion: 1.0\n")
    write("site/installed_one-1.0.dist-info/entry_points.txt", "[vqf.components]\nany = installed_one\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    load_plugins()
    assert "installed" in component_names("quantizer")
    write("site/installed_one.py", "import not_there")
    del sys.modules["installed_one"]
    with pytest.raises(UserError) as caught:
        load_plugins()
    assert str(caught.value) == (
        f"plugins: installed package 'installed-one' fails to import at {tmp_path}/site/installed_one.py:1: "
        "ModuleNotFoundError: No module named 'not_there'; fix it or pip uninstall installed-one"
    )


def test_a_plugin_that_cannot_be_loaded_is_reported_in_a_line(write: Write, tmp_path: Path) -> None:
    write("json.py", "")
    write("statistics_of_mine.py", "")
    for module, message in {
        "nowhere.py": f"plugins: no file 'nowhere.py' in {tmp_path}",
        "nowhere": "plugins: no module named 'nowhere'; give a module that Python can import, or the path of a .py",
        "nowhere.inner": "plugins: no module named 'nowhere.inner'; give a module",
        "json.py": "plugins: 'json.py' would hide the module 'json' (",
    }.items():
        with pytest.raises(UserError) as caught:
            load_plugins([module])
        assert str(caught.value).startswith(message)
    load_plugins(["statistics_of_mine.py"])


def test_a_file_may_not_hide_a_module_that_nobody_imported_yet(write: Write) -> None:
    assert "this" not in sys.modules
    write("elsewhere/this.py", "raise AssertionError('executed')")
    with pytest.raises(UserError, match=r"'elsewhere/this.py' would hide the module 'this' .*; rename the file"):
        load_plugins(["elsewhere/this.py"])


@pytest.mark.parametrize("plugin", ["broken.py", "broken"])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import not_installed", "broken.py:1: ModuleNotFoundError: No module named 'not_installed'"),
        ("import json\n\nundefined", "broken.py:3: NameError: name 'undefined' is not defined"),
        ("def f(:", "broken.py:1: SyntaxError: "),
        ("import torch\ntorch.zeros(-1)", "broken.py:2: RuntimeError: "),
        ("def f():\n    raise KeyError\nf()", "broken.py:2: KeyError; fix it"),
        ("import sys\nsys.exit(3)", "broken.py:2: SystemExit: 3"),
        ("import sibling", "sibling.py:1: ZeroDivisionError: division by zero"),
    ],
)
def test_a_plugin_that_fails_names_itself_and_its_line(
    write: Write, tmp_path: Path, plugin: str, source: str, words: str
) -> None:
    write("sibling.py", "1 / 0")
    write("broken.py", source)
    sys.path.insert(0, str(tmp_path))
    with pytest.raises(UserError) as caught:
        load_plugins([plugin])
    assert str(caught.value).startswith(f"plugins: '{plugin}' fails to import at ")
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert caught.value.__cause__ is not None
    write("broken.py", COMPONENT.format(name="mended"))
    load_plugins([plugin])
    assert "mended" in component_names("quantizer")


def test_a_plugin_that_registers_wrongly_names_itself(write: Write) -> None:
    write("doubled.py", COMPONENT.format(name="vq"))
    with pytest.raises(UserError, match=r"^plugins: 'doubled.py' at .*doubled.py:\d+: .*'vq'"):
        load_plugins(["doubled.py"])


@pytest.mark.parametrize("module", ["", ".", "..", "../p", "./p", "a..b", "a b", "a/b", ".p", "a.", "3"])
def test_what_is_no_name_of_a_module(write: Write, module: str) -> None:
    with pytest.raises(UserError) as caught:
        load_plugins([module])
    assert str(caught.value).startswith(f"plugins: '{module}' is neither a module nor a .py file. Give modules or")


def test_a_file_named_without_its_ending(write: Write) -> None:
    write("sub/p.py", "")
    with pytest.raises(UserError, match=r"Did you mean 'sub/p.py'\?"):
        load_plugins(["sub/p"])
    write("a.b.py", "")
    with pytest.raises(UserError, match=r"'a.b.py' cannot be imported: a module's name has no dot; rename the file"):
        load_plugins(["a.b.py"])


@pytest.mark.parametrize(
    ("arguments", "modules"),
    [
        (["plugins=[a,b.py]"], ["a", "b.py"]),
        (["model=vqgan", "+plugins=a.b", "seed=1"], ["a.b"]),
        (["++plugins=[./a.py]", "plugins=c"], ["./a.py", "c"]),
        (["plugins=["], []),
        (["-m", "seed=1,2"], []),
    ],
)
def test_plugins_are_read_from_the_command_line(arguments: list[str], modules: list[str]) -> None:
    assert plugins_from_cli(arguments) == modules


def test_plugins_are_not_swept() -> None:
    with pytest.raises(UserError, match=r"plugins: cannot be swept; list every module, plugins=\[a,b\]"):
        plugins_from_cli(["plugins=a,b"])
    with pytest.raises(UserError, match="plugins: '3' is not a module"):
        plugins_from_cli(["plugins=[a,3]"])


def lattice(**options: Any) -> Any:
    sys.modules.pop("lattice", None)  # or it would not register again
    load_plugins([str(EXAMPLES / "lattice.py")])
    return build("quantizer", {"name": "lattice", **options})


@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dim", "levels"), [(4, 5), (1, 2), (3, 8)])
def test_the_lattice_keeps_the_contract_of_a_quantizer(dim: int, levels: int, dtype: torch.dtype) -> None:
    quantizer = lattice(dim=dim, levels=levels).to(dtype).eval()
    z = (3 * torch.randn(2, dim, 3, 5, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    q = quantizer(z)
    assert torch.equal(quantizer.lookup(q.indices), q.latents) and q.latents.dtype == dtype
    assert 0 <= q.indices.min() and q.indices.max() < quantizer.vocab_size == levels**dim
    every = quantizer.lookup(torch.arange(levels**dim).view(1, 1, -1))
    distances = (torch.tanh(z.detach())[..., None] - every[:, :, :, None]).square().sum(1)  # to every code
    assert torch.equal(distances.argmin(-1), q.indices)
    q.latents.sum().backward()
    torch.testing.assert_close(z.grad, 1 - torch.tanh(z.detach()).square())


@pytest.mark.usefixtures("isolated")
def test_the_lattice_refuses_a_grid_of_one() -> None:
    with pytest.raises(UserError, match="quantizer 'lattice': levels=1: a grid needs at least 2"):
        lattice(levels=1)


def vqf(*arguments: str, path: Path, cwd: Path) -> str:
    environment = {"PYTHONPATH": str(path), "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vqf.run", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the examples, installed into a folder."""
    target = tmp_path_factory.mktemp("site")
    quiet = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    source = str(EXAMPLES / "vqf_schedules")
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, "--target", str(target), source], check=True)
    return target


PLUGINS = "plugins=[lattice.py,my_components.losses]"


@pytest.mark.slow
def test_the_examples_are_listed(installed: Path) -> None:
    text = vqf("--help", PLUGINS, path=installed, cwd=EXAMPLES)
    groups = {line.split(":")[0]: line.split(": ")[1].split(", ") for line in text.splitlines() if ": " in line}
    assert "lattice" in groups["model/quantizer"]
    assert "charbonnier" in groups["model/loss"]
    assert "linear" in groups["schedule"]


@pytest.mark.slow
def test_the_examples_train(installed: Path, tmp_path: Path) -> None:
    tiny = ["model=small", "image_size=16", "batch_size=2", "steps=2", "evaluate.count=2", "device=cpu", "logger=[]"]
    mine = ["model/quantizer=lattice", "model.quantizer.levels=7", "model/loss=[charbonnier]", "schedule=linear"]
    vqf(*tiny, *mine, "schedule.end=0.5", PLUGINS, f"run_dir={tmp_path}/run", path=installed, cwd=EXAMPLES)
    config = OmegaConf.load(tmp_path / "run" / "checkpoints" / "step-00000002" / "config.yaml")
    assert config.model.quantizer == {"name": "lattice", "dim": 4, "levels": 7}
    assert config.model.loss == {"charbonnier": {"name": "charbonnier", "weight": 1.0, "epsilon": 1e-3}}
    assert config.schedule == {"name": "linear", "end": 0.5}
