"""Fixtures of the comparisons with other packages, and the one through which every comparison is measured."""

from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.comparisons import RESULTS, TOLERANCE, Tensors, difference
from tests.parity.peers import LONG, trunk


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compares(*comparisons): what a test compares with another package")
    config.stash[RESULTS] = {}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The random VGG16 of `peers.trunk`, in a file as vqf reads it."""
    return _save(tmp_path_factory, 1.0)


@pytest.fixture(scope="session")
def long_vgg_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with features a hundred times as long."""
    return _save(tmp_path_factory, LONG)


def _save(factory: pytest.TempPathFactory, gain: float) -> str:
    path = factory.mktemp("vgg") / "vgg16.safetensors"
    save_file({f"features.{name}": each for name, each in trunk(gain).features.state_dict().items()}, path)
    return str(path)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Callable[[str, Tensors, Tensors], None]]:
    """Call `record(what, ours, theirs)`: fails above the tolerance of the dtype, 1e-9 in float64, 1e-5 in float32."""
    expected = {each.what: each for mark in request.node.iter_markers("compares") for each in mark.args}
    dtype = request.getfixturevalue("dtype") if "dtype" in request.fixturenames else torch.float64
    results, seen = request.config.stash[RESULTS], set()

    def compare(what: str, ours: Tensors, theirs: Tensors) -> None:
        seen.add(what)
        if expected[what].exact and dtype != torch.float64:
            return
        gap, key = difference(ours, theirs), (expected[what], dtype)
        results[key] = max(results.get(key, 0.0), gap)
        assert gap <= TOLERANCE[dtype], f"{expected[what]}: {gap:.1e}"

    yield compare
    if not hasattr(request.node, "failed"):
        assert seen == set(expected), f"declared but not recorded: {sorted(set(expected) - seen)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call" and not report.passed:
        item.failed = True  # type: ignore[attr-defined]
    return report
