"""VAR's multi-scale quantization: algorithm 1 in loops, round trips, the prior's inputs, wrong options."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqf.quantizers.layered.multiscale import MultiscaleQuantizer, _spread
from vqf.registry import RegistryError, build

V, D = 11, 3
TINY: dict[str, Any] = {"dim": D, "codebook_size": V}
PUBLISHED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def quantizer_of(sizes: Any, **options: Any) -> MultiscaleQuantizer:
    torch.manual_seed(0)
    quantizer = MultiscaleQuantizer(**TINY, sizes=sizes, **options).double().eval()
    quantizer.codebook.weight.data.normal_()
    return quantizer


def latents(height: int, width: int, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, D, height, width, generator=generator, dtype=torch.float64)


def area(image: Tensor, height: int, width: int) -> Tensor:
    """Mean of the cells that each smaller cell touches, (D, H, W) -> (D, height, width)."""
    _, H, W = image.shape
    small = image.new_zeros(len(image), height, width)
    for i in range(height):
        for j in range(width):
            rows = slice(i * H // height, math.ceil((i + 1) * H / height))
            columns = slice(j * W // width, math.ceil((j + 1) * W / width))
            small[:, i, j] = image[:, rows, columns].mean((1, 2))
    return small


def cubic_weights(small: int, large: int) -> Tensor:
    """(large, small), the convolution kernel of Keys with a = -0.75, of half-pixel centers and repeated borders."""
    a, weights = -0.75, torch.zeros(large, small, dtype=torch.float64)
    for i in range(large):
        center = (i + 0.5) * small / large - 0.5
        for tap in range(math.floor(center) - 1, math.floor(center) + 3):
            x = abs(center - tap)
            weight = (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(tap, 0), small - 1)] += weight
    return weights


def phi(image: Tensor, kernel: Tensor, bias: Tensor, ratio: float) -> Tensor:
    _, H, W = image.shape
    padded = F.pad(image, (1, 1, 1, 1))
    result = (1 - ratio) * image + ratio * bias[:, None, None]
    for y in range(3):
        for x in range(3):
            result = result + ratio * torch.einsum("oi,ihw->ohw", kernel[:, :, y, x], padded[:, y : y + H, x : x + W])
    return result


def algorithm_1(f: Tensor, quantizer: MultiscaleQuantizer, ticks: list[int]) -> tuple[list[int], list[Tensor]]:
    """Tokens, and f̂ after each scale, of one image (D, H, W)."""
    codes, f_hat, tokens, sums = quantizer.codebook.weight.detach(), torch.zeros_like(f), [], []
    phis: list[Any] = list(quantizer.phis)
    for (height, width), tick in zip(quantizer.sizes, ticks, strict=True):
        rest = area(f - f_hat, height, width)
        grid = torch.zeros_like(rest)
        for i in range(height):
            for j in range(width):
                k = min(range(V), key=lambda k: float((rest[:, i, j] - codes[k]).square().sum()))
                tokens.append(k)
                grid[:, i, j] = codes[k]
        if (height, width) != f.shape[1:]:
            grid = cubic_weights(height, f.shape[1]) @ grid @ cubic_weights(width, f.shape[2]).T
        f_hat = f_hat + phi(grid, phis[tick].weight.detach(), phis[tick].bias.detach(), quantizer.phi_ratio)
        sums.append(f_hat)
    return tokens, sums


@pytest.mark.parametrize(
    ("sizes", "phis", "ticks"),
    [
        ((1, 2, 3, 4, 6, 8), 4, [0, 0, 1, 2, 3, 3]),
        ((1, (2, 3), (5, 4), (5, 7)), 2, [0, 0, 1, 1]),
        ((1, 4), 4, [0, 1]),  # the two φ in the middle have no scale
        ((3, 3), 4, [0, 1]),
    ],
)
def test_follows_algorithm_1(sizes: Any, phis: int, ticks: list[int]) -> None:
    quantizer = quantizer_of(sizes, phis=phis, phi_ratio=0.3, beta=0.4)
    f = latents(*quantizer.sizes[-1])
    q = quantizer(f)
    loss = 0.0
    for b in range(len(f)):
        tokens, sums = algorithm_1(f[b], quantizer, ticks)
        assert q.indices[b].tolist() == tokens
        torch.testing.assert_close(q.latents[b].detach(), sums[-1], rtol=1e-9, atol=1e-9)
        loss += sum(1.4 * float((f_hat - f[b]).square().mean()) for f_hat in sums) / len(sums) / len(f)
        for end, f_hat in zip(quantizer.ends, sums, strict=True):
            prefix = quantizer.lookup(q.indices[b : b + 1, :end])
            torch.testing.assert_close(prefix[0].detach(), f_hat, rtol=1e-9, atol=1e-9)
    assert float(q.loss.detach()) == pytest.approx(loss, rel=1e-9)


def test_the_published_sizes_share_four_phis() -> None:
    """Ticks at 1/12, 13/36, 23/36, 11/12 of the scales, counted 0, 1/9, ..., 1.

    2/9 and 7/9 lie midway between two ticks: published weights follow the rounding of NumPy's float64.
    """
    ticks = np.linspace(1 / 3 / 4, 1 - 1 / 3 / 4, 4)
    expected = [int(np.argmin(np.abs(ticks - k / 9))) for k in range(10)]
    assert _spread(len(PUBLISHED), 4) == expected == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    quantizer = MultiscaleQuantizer()
    assert quantizer.layout((16, 16), 16).length == 680 and len(quantizer.phis) == 4
    assert MultiscaleQuantizer(phi_ratio=0).phis._modules == {}


def test_gradients() -> None:
    """Straight through to the latents, by the loss to codes and φ, all of which DDP waits for."""
    quantizer, onward = quantizer_of((1, 2, 4), beta=0.4), latents(4, 4, seed=1)
    f = latents(4, 4).requires_grad_()
    q = quantizer(f)
    (gradient,) = torch.autograd.grad((q.latents * onward).sum(), f, retain_graph=True)
    torch.testing.assert_close(gradient, onward, rtol=0, atol=0)
    sums = [quantizer.lookup(q.indices[:, :end]) for end in (1, 5, 21)]
    (gradient,) = torch.autograd.grad(q.loss, f, retain_graph=True)
    expected = sum(0.4 * 2 * (f - f_hat) / f.numel() for f_hat in sums) / 3
    torch.testing.assert_close(gradient, expected)
    weights = list(quantizer.parameters())
    pull = sum(F.mse_loss(f_hat, f.detach()) for f_hat in sums) / 3
    found, wanted = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in (q.loss, pull))
    torch.testing.assert_close(found, wanted)
    assert all(each.any() for each in found)


sides = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=4)


@given(
    sides=sides,
    batch=st.integers(1, 3),
    phis=st.integers(1, 5),
    ratio=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=60)
def test_lookup_gives_the_latents(
    sides: list[tuple[int, int]], batch: int, phis: int, ratio: float, dtype: torch.dtype
) -> None:
    sizes = [(h, w) for (h, _), (_, w) in zip(sorted(sides), sorted(sides, key=lambda each: each[1]), strict=True)]
    quantizer = quantizer_of(sizes, phis=phis, phi_ratio=ratio).to(dtype)
    q = quantizer(latents(*sizes[-1], batch).to(dtype))
    assert q.latents.dtype == dtype and torch.equal(quantizer.lookup(q.indices), q.latents)
    layout = quantizer.layout(sizes[-1], 8)
    assert layout.scales == tuple(sizes) and q.indices.shape == (batch, layout.length)
    assert torch.equal(layout.unflatten(layout.flatten(q.indices)), q.indices)
    assert 0 <= q.indices.min() and q.indices.max() < V


def test_the_prior_sees_the_coarser_scales_in_the_size_of_its_own() -> None:
    quantizer = quantizer_of((1, 2, (3, 4), (6, 6)))
    indices = quantizer(latents(6, 6)).indices
    inputs = quantizer.next_scale_inputs(indices)
    assert inputs.shape == (2, 4 + 12 + 36, D)
    expected = []
    for end, (height, width) in ((1, (2, 2)), (5, (3, 4)), (17, (6, 6))):
        f_hat = quantizer.lookup(indices[:, :end])
        expected.append(torch.stack([area(each, height, width).flatten(1).T for each in f_hat.detach()]))
        torch.testing.assert_close(quantizer.next_scale_inputs(indices[:, :end])[:, -height * width :], expected[-1])
    torch.testing.assert_close(inputs.detach(), torch.cat(expected, 1))
    assert torch.equal(quantizer.next_scale_inputs(indices[:, :5]), inputs[:, :16])
    changed = indices.clone()
    changed[:, 17:] = (changed[:, 17:] + 1) % V
    assert torch.equal(quantizer.next_scale_inputs(changed), inputs), "no input has the tokens that it predicts"


def test_dead_codes_are_revived_by_residuals_of_all_scales() -> None:
    quantizer = quantizer_of((1, 2, 4), revive=0.01, phi_ratio=0.0).train()
    assert quantizer.revival is not None
    quantizer.codebook.weight.data[1:] = 1000.0
    quantizer.revival.N[1:] = 0.0
    quantizer(latents(4, 4))
    assert quantizer.revival.step_stats.latents is not None
    assert len(quantizer.revival.step_stats.latents) == 2 * (1 + 4 + 16)
    assert int(quantizer.update()["revived"]) == V - 1
    assert quantizer.codebook.weight.max() < 100


@pytest.mark.parametrize("count", [0, 2, 4, 20, 22])
def test_tokens_that_are_no_whole_scales_are_refused(count: int) -> None:
    quantizer = quantizer_of((1, 2, 4))
    for call in (quantizer.lookup, quantizer.next_scale_inputs):
        with pytest.raises(ValueError, match=rf"^{count} tokens are no whole scales; these end after \[1, 5, 21\]"):
            call(torch.zeros(1, count, dtype=torch.long))


def test_latents_of_another_size_are_refused() -> None:
    quantizer, cure = quantizer_of((1, 2, (3, 4), 8)), r"as in model\.quantizer\.sizes=\[1,2,\[3,4\],\[5,6\]\]"
    for call in (lambda: quantizer.layout((5, 6), 8), lambda: quantizer(latents(5, 6))):
        with pytest.raises(ValueError, match=rf"the last scale is 8, the latents are \[5,6\].*{cure}"):
            call()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([4, 2], r"must go from coarse to fine, and 2 comes after 4; model\.quantizer\.sizes=\[2,4\] would"),
        ([[1, 3], [2, 2], 3], r"2 comes after \[1,3\]; model\.quantizer\.sizes=\[\[1,3\],3\] would"),
        ([16], r"sizes=\[16\]: must be a list of at least 2"),
        ([0], r"sizes=\[0\]: must be a list"),
        ([[1, 2, 3]], r"sizes=\[\[1,2,3\]\]: must be a list"),
    ],
)
def test_wrong_sizes_are_one_line(sizes: Any, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        build("quantizer", {"name": "multiscale", "sizes": sizes})
