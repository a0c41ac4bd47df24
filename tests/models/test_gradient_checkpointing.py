"""Gradient checkpointing: bit-identical results, dropout included, with less memory."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.support.layouts import raster
from vqf.registry import build, components
from vqf.tokens.prefix import PrefixSpec

CONV = {"channels": 16, "multipliers": [1, 1], "blocks": 2, "attention": [16], "dropout": 0.2}
MAGVIT = {"channels": 16, "multipliers": [1, 1], "blocks": 5, "dropout": 0.2}
VIT = {"patch_size": 2, "layers": 6, "heads": 2, "width": 32, "dropout": 0.2}
PRIOR = {"layers": 6, "heads": 2, "dim": 32, "dropout": 0.2}
WIRED = {
    "encoder": {"in_channels": 3, "image_size": 32},
    "decoder": {"dim": 8, "out_channels": 3, "image_size": 32},
    "prior": {"layout": raster((8, 8), 8), "prefix": PrefixSpec(4, 1)},
}
OPTIONS = {
    ("encoder", "conv"): {**CONV, "dim": 8},
    ("decoder", "conv"): CONV,
    ("encoder", "magvit"): {**MAGVIT, "dim": 8},
    ("decoder", "magvit"): MAGVIT,
    ("encoder", "titok"): {**VIT, "dim": 8, "num_latents": 5},
    ("decoder", "titok"): VIT,
    ("encoder", "vit"): {**VIT, "dim": 8},
    ("decoder", "vit"): VIT,
    ("prior", "gpt"): PRIOR,
    ("prior", "llama"): {**PRIOR, "multiple_of": 8},
}


def test_every_component_that_offers_it_is_tried() -> None:
    offered = {(kind, each.name) for kind in WIRED for each in components(kind)}
    offered = {(kind, name) for kind, name in offered if "gradient_checkpointing" in options(kind, name)}
    assert offered == OPTIONS.keys()


def options(kind: str, name: str) -> set[str]:
    return next(set(each.options) for each in components(kind) if each.name == name)


def loss_of(kind: str, module: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "prior":
        tokens = torch.randint(8, (16, 64), generator=generator)
        return module.loss(tokens, tokens[:, :1] % 4)
    shape = (4, 3, 32, 32) if kind == "encoder" else (4, 8, 16, 16)
    return module(torch.randn(shape, generator=generator, dtype=torch.float64)).square().mean()


def built(kind: str, name: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    module = build(kind, {"name": name, **OPTIONS[kind, name], **more}, **WIRED[kind])
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.double()


def peak(work: Callable[[], object]) -> int:
    """Peak bytes that a function allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())))


@pytest.mark.parametrize(("kind", "name"), OPTIONS, ids=lambda word: word)
def test_the_same_gradients_from_less_memory(kind: str, name: str) -> None:
    plain, again = (built(kind, name, gradient_checkpointing=on) for on in (False, True))
    again.load_state_dict(plain.state_dict())
    peaks, losses = [], []
    for module in (plain, again):
        torch.manual_seed(2)

        def step(module: nn.Module = module) -> None:
            losses.append(loss_of(kind, module))
            losses[-1].backward()

        peaks.append(peak(step))
    assert torch.equal(*losses)
    for (key, parameter), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, other.grad), key
    assert peaks[1] < 0.6 * peaks[0], peaks


@pytest.mark.parametrize(("kind", "name"), OPTIONS, ids=lambda word: word)
def test_nothing_changes_where_no_gradient_is_wanted(kind: str, name: str) -> None:
    plain, again = (built(kind, name, gradient_checkpointing=on).eval() for on in (False, True))
    with torch.no_grad():
        assert torch.equal(loss_of(kind, plain), loss_of(kind, again))
