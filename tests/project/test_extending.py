"""docs/extending.md is a promise: its components keep the contract of their kind, and train together."""

import inspect
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import test_contracts as contracts
from tests.project.test_docs import commands
from tests.support.composing import compose
from tests.training.test_trainer import TINY
from vqf import protocols, registry
from vqf.config.settings import check_config, fill_missing_groups
from vqf.errors import UserError
from vqf.models.generator import Generator
from vqf.pipelines.full import Full
from vqf.plugins import load_plugins
from vqf.registry import KINDS
from vqf.runs.load import load

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMPONENTS = re.findall(r'^@?register\("(\w+)", "(\w+)"', "\n".join(BLOCKS), re.MULTILINE)
build, paths = contracts.build, contracts.paths  # fixtures


def files() -> dict[str, str]:
    """The files of the page: a block with a name begins one, the others continue it."""
    found: dict[str, str] = {}
    for block in BLOCKS:
        name = block.split("\n", 1)[0].removeprefix("# ")
        if name.endswith(".py"):
            found[name] = ""
        found[list(found)[-1]] += "\n\n" + block
    return found


@pytest.fixture
def page(isolated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The files of the page, loaded as `plugins=` does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name, code in files().items():
        Path(name).write_text(code)
    load_plugins(list(files()))
    yield list(files())
    for name in files():
        del sys.modules[name.removesuffix(".py")]


def contract_tests(kind: str) -> list[Any]:
    """The contract tests of a kind, each with the values of every other parameter than `name`."""
    cases = []
    for title, test in vars(contracts).items():
        marks = getattr(test, "pytestmark", [])
        if title.startswith("test_") and any(mark is contracts.every[kind].mark for mark in marks):
            others = {mark.args[0]: mark.args[1] for mark in marks if mark.args[0] != "name"}
            cases += [(test, dict(zip(others, values, strict=True))) for values in itertools.product(*others.values())]
    return cases


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_a_component_keeps_the_contract(
    page: list[str], build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    monkeypatch.setitem(contracts.TINY, ("prior", "my_maskgit"), {"layers": 1, "heads": 2, "dim": 16})
    given = {"build": build, "name": name, "tmp_path": tmp_path, "monkeypatch": monkeypatch}
    cases = contract_tests(kind)
    assert cases
    for test, values in cases:
        needed = inspect.signature(test).parameters.keys() - values.keys()
        test(**values, **{key: given[key] for key in needed})


def test_a_range_of_the_page_is_checked(page: list[str]) -> None:
    for levels in ([5, 2], []):
        with pytest.raises(UserError, match=r"levels.* must be a list of at least 1, each an integer of at least 3"):
            registry.build("quantizer", {"name": "my_fsq", "levels": levels})


def test_every_kind_is_on_the_page() -> None:
    assert {kind for kind, _ in COMPONENTS} == KINDS.keys()


def test_every_capability_is_on_the_page() -> None:
    """Which are the protocols that `isinstance` can ask for."""
    named = {name: getattr(protocols, name) for name in protocols.__all__}
    capabilities = {name for name, each in named.items() if getattr(each, "_is_runtime_protocol", False)}
    assert "Layered" in capabilities
    assert [name for name in sorted(capabilities) if f"`{name}`" not in PAGE] == []


def test_the_commands_compose(page: list[str]) -> None:
    found = commands(ROOT / "docs" / "extending.md")
    assert len(found) >= 4
    for words in found:
        check_config(fill_missing_groups(compose(*(word for word in words if "=" in word))))


def test_the_three_examples_train_and_sample_together(page: list[str], tmp_path: Path) -> None:
    replaced = ("model.encoder.", "model.decoder.", "model.quantizer.")
    config = compose(
        *(each for each in TINY if not each.startswith(replaced)),
        *("pipeline=full", "model/encoder=my_vit", "model/decoder=my_vit"),
        *("model/quantizer=my_fsq", "model/prior=my_maskgit"),
        *("model.encoder.stride=4", "model.decoder.stride=4", "model.quantizer.levels=[4,3]"),
        *("sampler.steps=3", "model.conditioner.label.dropout=0.2"),
    )
    assert config.sampler.name == "my_masked", "the prior brings its sampler"
    Full(config, tmp_path / "run").run()
    generator = load(tmp_path / "run" / "stage2")
    assert isinstance(generator, Generator)
    images = generator.sample(3, label=1, seed=5)
    assert images.shape == (3, 3, 16, 16) and images.isfinite().all()
    torch.testing.assert_close(generator.sample(1, label=1, seed=5, first=2), images[2:])
    generator.sampler = registry.build("sampler", {"name": "my_masked", "guidance": 2.0})
    assert not torch.equal(generator.sample(3, label=1, seed=5), images)
    indices = generator.tokenizer.encode(images)
    assert indices.shape == (3, 4, 4) and generator.tokenizer.layout.vocab_size == 12
    upper = torch.arange(16)[:, None].expand(16, 16) < 8
    completed = generator.complete(indices, upper, seed=1)
    assert completed.shape == images.shape
    everything = generator.complete(indices, torch.ones_like(upper))
    torch.testing.assert_close(everything, generator.tokenizer.decode(indices))


@pytest.mark.slow
def test_the_contract_runs_on_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "my_fsq.py").write_text(files()["my_fsq.py"])
    (command,) = re.findall(r"^python (-m pytest .*)$", PAGE, re.MULTILINE)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    arguments = [sys.executable, *shlex.split(command), "-vv", "-p", "no:cacheprovider"]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for test, _ in contract_tests("quantizer"):
        assert re.search(rf"{test.__name__}\[(\S+-)?my_fsq\S*\] PASSED", done.stdout), done.stdout
