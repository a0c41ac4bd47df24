"""The settings of torch that the engine makes, and the EMA."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support.composing import compose
from vqf.distributed.engine import make_engine
from vqf.training.ema import EMA


@pytest.fixture
def own_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def own_precision() -> Iterator[None]:
    yield
    make_engine(compose("device=cpu"))


@pytest.mark.usefixtures("own_choices")
def test_deterministic_reaches_torch() -> None:
    torch.backends.cudnn.benchmark = True
    make_engine(compose("device=cpu"))
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    make_engine(compose("device=cpu", "deterministic=true"))
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.backends.cudnn.benchmark
    make_engine(compose("device=cpu"))  # the next job of a sweep
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.filterwarnings("error::DeprecationWarning", "error::FutureWarning", "error::UserWarning")
@pytest.mark.usefixtures("own_precision")
@pytest.mark.parametrize(
    ("word", "words", "old"), [("fp32", "ieee", False), ("tf32", "tf32", True), ("bf16", "tf32", True)]
)
def test_float32_is_ieee_only_with_precision_fp32(word: str, words: str, old: bool) -> None:
    """Torch's own default rounds convolutions on a GPU to TF32. `torch.compile` reads the matmul precision."""
    engine = make_engine(compose("device=cpu", f"precision={word}"))
    assert engine.dtype == (torch.bfloat16 if word == "bf16" else torch.float32)
    assert torch.get_float32_matmul_precision() == ("highest" if word == "fp32" else "high")
    assert torch.backends.cuda.matmul.allow_tf32 == old
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == (words, words)
    else:
        assert cudnn.allow_tf32 == old
    assert torch.compile(nn.Linear(2, 2), backend="aot_eager")(torch.ones(1, 2)).shape == (1, 2)


def test_torch_before_2_9_has_its_flag_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda word: None)
    old = SimpleNamespace(allow_tf32=True, benchmark=False)
    monkeypatch.setattr(torch.backends, "cudnn", old)
    for word, allowed in (("fp32", False), ("tf32", True)):
        make_engine(compose("device=cpu", f"precision={word}"))
        assert old.allow_tf32 == allowed


def test_the_ema_is_that_of_the_formula() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    module[1].bias = module[0].bias  # one tensor under two names
    average, expected = EMA(module, 0.9), {name: each.clone() for name, each in module.named_parameters()}
    for step in range(30):
        with torch.no_grad():
            for each in module.parameters():
                each.add_(torch.randn_like(each))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, each in module.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * each.detach()
    for name, each in expected.items():
        torch.testing.assert_close(average.shadow_params[name], each, rtol=1e-12, atol=1e-12)
    assert torch.equal(average.state_dict()["1.bias"], average.state_dict()["0.bias"])
