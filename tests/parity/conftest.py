"""Fixtures of the comparisons with other packages, and the one through which every comparison is measured."""

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.parity.comparisons import RESULTS, TOLERANCE, Gap, Tensors, difference, distance
from tests.parity.peers import trunk

Named = Mapping[str, Tensor]


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
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file({f"features.{name}": each for name, each in trunk().features.state_dict().items()}, path)
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
        results[key] = Gap(max(results[key].ours if key in results else 0.0, gap))
        assert gap <= TOLERANCE[dtype], f"{expected[what]}: {gap:.1e}"

    yield compare
    if not hasattr(request.node, "failed"):
        assert seen == set(expected), f"declared but not recorded: {sorted(set(expected) - seen)}"


@pytest.fixture
def record_rounding(request: pytest.FixtureRequest) -> Callable[[Named, Named, Named], None]:
    """Call `record_rounding(ours, theirs, truth)`: fails where ours is twice as far from the truth as theirs."""
    (mark,) = request.node.iter_markers("compares")
    (comparison,) = mark.args
    results = request.config.stash[RESULTS]

    def compare(ours: Named, theirs: Named, truth: Named) -> None:
        gap = Gap(distance(ours, truth), distance(theirs, truth))
        results[comparison, torch.float32] = gap
        assert gap.peer, "theirs has no rounding: is it in float32?"
        assert gap.ours <= 2 * gap.peer, f"{comparison}: {gap}"

    return compare


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call" and not report.passed:
        item.failed = True  # type: ignore[attr-defined]
    return report
