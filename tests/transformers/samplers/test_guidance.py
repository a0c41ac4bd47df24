"""Guidance: notations of other projects, schedules, and samplers with guidance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.layouts import raster
from vqf.errors import UserError
from vqf.registry import RegistryError, build
from vqf.tokens.prefix import PrefixSpec
from vqf.transformers.gpt import GPT
from vqf.transformers.samplers.filtering import sample_from_logits, sample_noise
from vqf.transformers.samplers.guidance import guide, scale_at, scale_from_notation

LAYOUT = raster((3, 4), 13)
scales = st.floats(0, 20)


def pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 9, generator=generator).double(), torch.randn(6, 9, generator=generator).double()


@settings(deadline=None)
@given(scales)
def test_each_notation_gives_the_same_logits(value: float) -> None:
    c, u = pairs()
    written = {
        "llamagen": u + (c - u) * value,
        "var": (1 + value) * c - value * u,
        "maskgit": c + value * (c - u),
        "rar": u + (c - u) * value,
    }
    for notation, expected in written.items():
        torch.testing.assert_close(guide(c, u, scale_from_notation(value, notation)), expected, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]


def test_scale_one_is_the_condition_and_zero_is_none() -> None:
    c, u = pairs()
    torch.testing.assert_close(guide(c, u, 1.0), c, rtol=1e-14, atol=1e-14)
    assert torch.equal(guide(c, u, 0.0), u)


def test_what_neither_ever_draws_stays_impossible() -> None:
    c, u = pairs()
    c[:, 2], u[:, 2], u[:, 3] = -torch.inf, -torch.inf, 0
    assert (guide(c, u, 3.0)[:, 2] == -torch.inf).all()


@settings(deadline=None)
@given(scales, st.floats(0, 1, exclude_max=True), st.floats(0.1, 5))
def test_schedules_are_their_formulas(scale: float, t: float, power: float) -> None:
    assert scale_at(t, scale, "constant") == scale
    assert scale_at(t, scale, "linear") == pytest.approx((1 - t) + t * scale)
    cosine = 0.5 - 0.5 * math.cos(math.pi * t**power)
    assert scale_at(t, scale, "power_cosine", power=power) == pytest.approx((1 - cosine) + cosine * scale)
    inside = 0.25 <= t < 0.75
    assert scale_at(t, scale, "interval", interval=(0.25, 0.75)) == (scale if inside else 1)


def test_var_grows_linearly_in_its_own_notation() -> None:
    # VAR: (1 + t) c - t u, where t is cfg times the progress.
    assert scale_at(0.3, scale_from_notation(1.5, "var"), "linear") == pytest.approx(1 + 1.5 * 0.3)


def gpt() -> GPT:
    torch.manual_seed(0)
    model = GPT(LAYOUT, PrefixSpec(4, 2), layers=2, heads=2, dim=16).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    torch.nn.init.normal_(model.prefix_embedding.weight, std=4.0)  # a condition that affects every token
    return model


GUIDED = {"name": "autoregressive", "guidance": 3.0}
SCHEDULES = [
    {"guidance_schedule": "constant"},
    {"guidance_schedule": "interval", "guidance_interval": [0.2, 0.6]},
    {"guidance_schedule": "linear"},
    {"guidance_schedule": "power_cosine", "guidance_power": 2.0},
]


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize("cache", [True, False])
def test_a_guided_sample_is_drawn_from_the_guided_logits(options: dict, cache: bool) -> None:
    model, prefix, null = gpt(), torch.tensor([[0, 1], [2, 2], [1, 0]]), torch.full((3, 2), 3)
    sampler = build("sampler", {**GUIDED, **options, "cache": cache})
    tokens = sampler(model, prefix, LAYOUT, seed=5, null_prefix=null)
    c, u = model(tokens, prefix), model(tokens, null)
    interval = options.get("guidance_interval", (0, 1))
    for n in range(12):
        schedule, power = options["guidance_schedule"], options.get("guidance_power", 1.0)
        s = scale_at(n / 12, 3.0, schedule, interval=interval, power=power)
        numbers = torch.stack([sample_noise(5, i, 12)[n] for i in range(3)])
        assert torch.equal(sample_from_logits(u[:, n] + s * (c[:, n] - u[:, n]), numbers), tokens[:, n])
    assert not torch.equal(tokens, build("sampler", {"name": "autoregressive"})(model, prefix, LAYOUT, seed=5))


def test_without_guidance_nothing_is_asked_twice() -> None:
    model, prefix = gpt(), torch.tensor([[0, 1], [2, 2]])
    sizes: list[int] = []
    model.norm.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    sampler = build("sampler", {"name": "autoregressive"})
    plain = sampler(model, prefix, LAYOUT, seed=5)
    assert torch.equal(sampler(model, prefix, LAYOUT, seed=5, null_prefix=torch.full((2, 2), 3)), plain)
    assert set(sizes) == {2}


def test_guidance_without_a_null_prefix_says_what_to_train() -> None:
    with pytest.raises(UserError, match=r"sampler\.guidance=3: .* model\.conditioner\.label\.dropout=0\.1") as caught:
        build("sampler", GUIDED)(gpt(), torch.tensor([[0, 1]]), LAYOUT, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_schedule": "cosine"}, "Did you mean 'power_cosine'"),
        ({"guidance_interval": [0.7, 0.2]}, r"guidance_interval=\[0.7,0.2\]: give the start first"),
    ],
)
def test_wrong_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(RegistryError, match=words) as caught:
        build("sampler", {"name": "autoregressive", **options})
    assert "\n" not in str(caught.value)
