"""The wheel: what is in it, and that it works away from the checkout."""

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from vqf import __version__

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("vqf-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    quiet = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, "--target", str(target), str(wheel)], check=True)
    return target


def files(folder: Path) -> set[str]:
    """Every file below a folder that git would keep."""
    listed = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path for path in listed if "__pycache__" not in path}


def test_the_wheel_holds_the_package_and_its_presets(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"vqf/{path}" for path in files(ROOT / "vqf")} | {f"vqf/conf/{path}" for path in files(ROOT / "conf")}
    assert {path for path in inside if not path.startswith("vqf-")} == expected
    for name in ("emoji", "earth"):
        assert any(path.startswith(f"vqf/data/assets/{name}/") for path in inside)
        assert any(path.endswith(f"licenses/vqf/data/assets/{name}/NOTICE") for path in inside)


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    facts = Parser().parsestr(archive.read(f"vqf-{__version__}.dist-info/METADATA").decode())
    assert facts["Name"] == "vqf" and facts["Version"] == __version__
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert b"vqf = vqf.run:main" in archive.read(f"vqf-{__version__}.dist-info/entry_points.txt")


def started(installed: Path, folder: Path, *command: str) -> str:
    """What a command says in a folder that is not the checkout, with the installed package first on the path."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_finds_the_presets_of_the_installed_package(installed: Path, tmp_path: Path) -> None:
    text = started(installed, tmp_path, str(installed / "bin" / "vqf"), "--info", "searchpath")
    assert f"file://{installed}/vqf/conf" in text


def test_the_module_lists_the_presets_of_the_installed_package(installed: Path, tmp_path: Path) -> None:
    lines = started(installed, tmp_path, "-m", "vqf.run", "--help").splitlines()
    for group in ("experiment", "model", "model/quantizer", "optimizer"):
        presets = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        (listed,) = [line for line in lines if line.startswith(f"{group}: ")]
        assert presets and presets <= set(listed.removeprefix(f"{group}: ").split(", "))
