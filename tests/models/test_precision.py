"""Models that were moved to another precision, as by `half()`."""

import copy

import pytest
import torch

from tests.pipelines.test_token_layouts import Shape, options
from tests.support.composing import compose
from tests.support.tiny_models import LAYOUTS, generator_of, make_images, tokenizer_of
from vqf.models.tokenizer import build_tokenizer

PRECISIONS = (torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_of_any_precision_work(layout: str, dtype: torch.dtype) -> None:
    generator, images = copy.deepcopy(generator_of(layout)).to(dtype), make_images()
    exact, moved = tokenizer_of(layout), generator.tokenizer
    indices = exact.encode(images)
    assert (moved.encode(images) == indices).float().mean() > 0.9
    assert torch.equal(moved.encode_tokens(images.to(dtype)), moved.layout.flatten(moved.encode(images)))
    decoded = moved.decode(indices)
    assert decoded.dtype == dtype
    # Images are of the order of 1, and a rounding enters at each of the layers.
    tolerance = 1e-5 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(decoded.float(), exact.decode(indices), atol=tolerance, rtol=0)
    torch.testing.assert_close(moved(images.to(dtype)).reconstructions.clamp(-1, 1), moved.decode(moved.encode(images)))
    drawn = generator.sample(2, seed=1)
    assert drawn.dtype == dtype and drawn.isfinite().all()
    if LAYOUTS[layout].completes:
        completed = generator.complete(images, torch.ones(16, 16))
        torch.testing.assert_close(completed, moved.decode(moved.encode(images)))


@pytest.mark.parametrize("quantizer", ["vq", "ema", "cosine", "gumbel", "rotation", "fsq"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_codes_of_a_half_model_are_the_nearest_ones(quantizer: str, dtype: torch.dtype) -> None:
    """To its own latents and codes they are; to those in float32, but for the rounding of both."""
    sizes = ("model.quantizer.dim=4", "model.quantizer.codebook_size=512") if quantizer != "fsq" else ()
    shape = Shape((f"model/quantizer={quantizer}", *sizes), 4, completes=True)
    torch.manual_seed(0)
    exact = build_tokenizer(compose(*options(shape)).model, 16).eval().requires_grad_(False)
    images = make_images(32).float()
    half, indices = copy.deepcopy(exact).to(dtype), exact.encode(images)
    found, latents = half.encode(images), half.quant_conv(half.encoder(images.to(dtype)))
    upcast = copy.deepcopy(half.quantizer).float()  # type: ignore[attr-defined]
    assert torch.equal(found, upcast(latents.float()).indices)
    if quantizer in ("vq", "ema", "rotation"):
        all_codes = torch.arange(512).view(1, 1, -1)
        codes, rounded = (each.lookup(all_codes)[0, :, 0].T.double() for each in (exact.quantizer, half.quantizer))
        exact_latents = exact.quant_conv(exact.encoder(images)).movedim(1, -1).double()
        distances = torch.cdist(exact_latents.flatten(0, 2), codes)
        rounding = (exact_latents - latents.movedim(1, -1)).norm(dim=-1).flatten() + (codes - rounded).norm(dim=1).max()
        chosen, best = (distances.gather(1, each.view(-1, 1))[:, 0] for each in (found, indices))
        assert ((chosen - best) <= 2 * rounding).all()
