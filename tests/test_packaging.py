"""The wheel: what is in it, and that it works away from the checkout."""

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from vqf import __version__

ROOT = Path(__file__).parents[1]

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
    assert any(path.startswith("vqf/data/assets/emoji/") for path in inside)


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    facts = Parser().parsestr(archive.read(f"vqf-{__version__}.dist-info/METADATA").decode())
    assert facts["Name"] == "vqf" and facts["Version"] == __version__
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert b"vqf = vqf.run:main" in archive.read(f"vqf-{__version__}.dist-info/entry_points.txt")


@pytest.mark.parametrize("start", [["-m", "vqf.run"], ["bin/vqf"]], ids=["module", "script"])
def test_the_installed_package_finds_its_presets(installed: Path, tmp_path: Path, start: list[str]) -> None:
    start = [str(installed / each) if each.startswith("bin/") else each for each in start]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *start, "--info", "searchpath"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"file://{installed}/vqf/conf" in done.stdout


def test_the_installed_package_runs(installed: Path, tmp_path: Path) -> None:
    script = f"""
import sys, vqf, vqf.run
from vqf.registry import build
assert vqf.__file__.startswith({str(installed)!r}), vqf.__file__
print(len(build("data", {{"name": "emoji"}}, image_size=16, seed=0).split("train")))
sys.argv[1:] = ["--help"]
vqf.run.main()
"""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pictures, *lines = done.stdout.splitlines()
    assert int(pictures) > 100
    assert any(line.startswith("model: ") and "vqgan" in line for line in lines)
