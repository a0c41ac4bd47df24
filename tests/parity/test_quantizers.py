"""Quantizers, with the codebooks of the reference's and of vector-quantize-pytorch's."""

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from tests.parity.comparisons import compares, gradients
from tests.parity.peers import need, taming
from vqf.quantizers.cosine import CosineQuantizer
from vqf.quantizers.ema import EMAQuantizer
from vqf.quantizers.gumbel import GumbelQuantizer
from vqf.quantizers.rotation import RotationQuantizer
from vqf.quantizers.vq import VectorQuantizer

CODES, DIM = 40, 6
BETA_ON = {True: "codebook", False: "commitment"}  # by the reference's `legacy`

# What it computes in float32 whatever it is given.
float32_only = pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])


def latents(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, DIM, 5, 7, dtype=dtype).requires_grad_()


def row(indices: Tensor) -> Tensor:
    return rearrange(indices, "(b h w) -> b h w", b=3, h=5)


def pair(dtype: torch.dtype, legacy: bool, kind: str = "VectorQuantizer2") -> tuple[Any, VectorQuantizer]:
    options = {"legacy": legacy} if kind == "VectorQuantizer2" else {}
    theirs = getattr(taming("modules.vqvae.quantize"), kind)(CODES, DIM, beta=0.25, **options).to(dtype)
    theirs.embedding.weight.data.normal_()
    ours = VectorQuantizer(dim=DIM, codebook_size=CODES, beta=0.25, beta_placement=BETA_ON[legacy]).to(dtype)
    ours.load_state_dict({"codebook.weight": theirs.embedding.weight})
    return theirs, ours


@compares(
    "quantizer `vq`",
    "taming `VectorQuantizer2`",
    "indices",
    "latents",
    "loss",
    "gradient of the latents",
    "gradient of the codebook",
)
@pytest.mark.parametrize("legacy", [True, False])
def test_vq(dtype: torch.dtype, legacy: bool, record: Any) -> None:
    """`beta_placement=codebook` is `legacy=True`, the reference's mistake with which every published VQGAN was trained;
    `beta_placement=commitment` is `legacy=False`, the equation."""
    theirs, ours = pair(dtype, legacy)
    z, pull = latents(dtype), torch.randn(3, DIM, 5, 7, dtype=dtype)
    expected, loss, (_, _, indices) = theirs(z)
    at_z, at_codes = torch.autograd.grad((expected * pull).sum() + loss, [z, theirs.embedding.weight])
    out = ours(z)
    found = torch.autograd.grad((out.latents * pull).sum() + out.loss, [z, ours.codebook.weight])
    record("indices", out.indices, row(indices))
    record("latents", out.latents, expected)
    record("loss", out.loss, loss)
    record("gradient of the latents", found[0], at_z)
    record("gradient of the codebook", found[1], at_codes)


@pytest.mark.parametrize("legacy", [True, False])
def test_the_two_placements_of_beta_pull_differently(legacy: bool) -> None:
    _, ours = pair(torch.float64, legacy)
    z = latents(torch.float64)
    out = ours(z)
    at_z, at_codes = torch.autograd.grad(out.loss, [z, ours.codebook.weight])
    pull_on_latents = 2 * (z - ours.lookup(out.indices)) / z.numel()
    torch.testing.assert_close(at_z, pull_on_latents * (1 if legacy else 0.25))
    pull_on_codes = torch.zeros_like(at_codes).index_add_(
        0, out.indices.flatten(), -rearrange(pull_on_latents, "b d h w -> (b h w) d")
    )
    torch.testing.assert_close(at_codes, pull_on_codes * (0.25 if legacy else 1))


@compares("quantizer `vq`", "taming `VectorQuantizer`", "loss of the older class", "perplexity")
@float32_only
def test_older_class(dtype: torch.dtype, record: Any) -> None:
    """The one-hot class before `VectorQuantizer2`, the only one that says how many codes a batch uses."""
    theirs, ours = pair(dtype, legacy=True, kind="VectorQuantizer")
    z = latents(dtype)
    _, loss, (perplexity, _, _) = theirs(z)
    out = ours(z)
    record("loss of the older class", out.loss, loss)
    record("perplexity", out.stats["perplexity"], perplexity)


@compares("quantizer `vq`", "taming `get_codebook_entry`", "latents of indices")
def test_lookup(dtype: torch.dtype, record: Any) -> None:
    """Indices back to latents; the reference wants them flat and the shape beside them."""
    theirs, ours = pair(dtype, legacy=True)
    indices = torch.randint(CODES, (3, 5, 7))
    record("latents of indices", ours.lookup(indices), theirs.get_codebook_entry(indices.flatten(), (3, 5, 7, DIM)))


@compares("quantizer `vq`", "taming `VectorQuantizer2`", "indices where codes are equal")
def test_ties(dtype: torch.dtype, record: Any) -> None:
    """Whole numbers, so that no rounding breaks the tie: both take the first."""
    theirs, ours = pair(dtype, legacy=True)
    codes = torch.randint(-3, 4, (CODES // 2, DIM)).to(dtype).repeat(2, 1)
    ours.codebook.weight.data.copy_(codes), theirs.embedding.weight.data.copy_(codes)
    z = torch.randint(-3, 4, (3, DIM, 5, 7)).to(dtype)
    found = ours(z).indices
    assert found.max() < CODES // 2
    record("indices where codes are equal", found, row(theirs(z)[2][2]))


def gumbel_pair(dtype: torch.dtype) -> tuple[Any, GumbelQuantizer]:
    theirs = taming("modules.vqvae.quantize").GumbelQuantize(DIM, DIM, CODES, kl_weight=0.1, temp_init=0.7).to(dtype)
    ours = GumbelQuantizer(dim=DIM, codebook_size=CODES, kl_weight=0.1, temperature_start=0.7).to(dtype)
    ours.load_state_dict({**named(theirs.state_dict()), "steps": torch.tensor(0)})
    return theirs, ours


def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("embed.", "codebook."): each for name, each in tensors.items()}


@compares(
    "quantizer `gumbel`",
    "taming `GumbelQuantize`",
    "indices drawn",
    "latents",
    "KL",
    "gradient of the latents",
    "gradients of the weights",
)
@pytest.mark.parametrize("hard", [True, False])
def test_gumbel(dtype: torch.dtype, hard: bool, record: Any) -> None:
    """Training with one seed, so with one noise: one code with straight-through gradient, and mixed codes."""
    theirs, ours = gumbel_pair(dtype)
    theirs.straight_through = ours.straight_through = hard
    z, pull = latents(dtype), torch.randn(3, DIM, 5, 7, dtype=dtype)
    torch.manual_seed(1)
    expected, loss, (_, _, indices) = theirs(z)
    torch.manual_seed(1)
    out = ours(z)
    (at_z,) = torch.autograd.grad((expected * pull).sum() + loss, z, retain_graph=True)
    (found,) = torch.autograd.grad((out.latents * pull).sum() + out.loss, z, retain_graph=True)
    ((expected * pull).sum() + loss).backward()
    ((out.latents * pull).sum() + out.loss).backward()
    record("indices drawn", out.indices, indices)
    record("latents", out.latents, expected)
    record("KL", out.loss, loss)
    record("gradient of the latents", found, at_z)
    record("gradients of the weights", gradients(ours), named(gradients(theirs)))


@compares("quantizer `gumbel`", "taming `GumbelQuantize`", "indices in eval mode")
def test_gumbel_evaluation(dtype: torch.dtype, record: Any) -> None:
    """The reference draws noise in eval mode too, so one image has many encodings; vqf takes the likeliest code,
    which is the reference's without its noise."""
    theirs, ours = gumbel_pair(dtype)
    theirs.eval(), ours.eval()
    z = latents(dtype)
    assert not torch.equal(theirs(z)[2][2], theirs(z)[2][2])
    assert torch.equal(ours(z).indices, ours(z).indices)
    record("indices in eval mode", ours(z).indices, theirs.proj(z).argmax(1))


def vector_quantize(dtype: torch.dtype, **options: Any) -> Any:
    peer = need("vector_quantize_pytorch").VectorQuantize(
        DIM, CODES, accept_image_fmap=True, commitment_weight=0.25, **options
    )
    peer._codebook.embed.data.normal_()
    return peer.to(dtype)


@compares(
    "quantizer `ema`",
    "vector-quantize-pytorch `VectorQuantize`",
    "indices",
    "commitment loss",
    "gradient of the latents",
    "codebook and averages after three batches",
)
@float32_only
def test_ema(dtype: torch.dtype, record: Any) -> None:
    """Moving averages with Laplace smoothing, decay 0.9, over three batches; its arithmetic is float32 throughout."""
    theirs = vector_quantize(dtype, decay=0.9, rotation_trick=False)
    book = theirs._codebook
    book.embed_avg.data.copy_(book.embed.data)
    ours = EMAQuantizer(dim=DIM, codebook_size=CODES, decay=0.9, revive=0)
    state = {"codebook": book.embed[0], "m": book.embed_avg[0], "N": book.cluster_size[0]}
    ours.load_state_dict({**state, "initialized": torch.tensor(True)})
    for _ in range(3):
        z, pull = latents(dtype), torch.randn(3, DIM, 5, 7)
        expected, indices, loss = theirs(z)
        (at_z,) = torch.autograd.grad((expected * pull).sum() + loss.sum(), z)
        out = ours(z)
        (found,) = torch.autograd.grad((out.latents * pull).sum() + out.loss, z)
        ours.update()
        record("indices", out.indices, indices)
        record("commitment loss", out.loss, loss.squeeze())
        record("gradient of the latents", found, at_z)
    after = {"codebook": book.embed[0], "m": book.embed_avg[0], "N": book.cluster_size[0]}
    record("codebook and averages after three batches", {name: getattr(ours, name) for name in after}, after)


@compares("quantizer `ema` with `debias`", "Sonnet `VectorQuantizerEMA`, by formula", "indices", "codes, four batches")
@pytest.mark.parametrize("dtype", [torch.float64], ids=["float64"])
def test_ema_of_sonnet(dtype: torch.dtype, record: Any) -> None:
    """Averages from 0, divided by 1 - γ^t, and Laplace smoothing: its update written out in the test; decay 0.9."""
    codes, decay, epsilon = torch.randn(CODES, DIM, dtype=torch.float64).to(dtype), 0.9, 1e-5
    ours = EMAQuantizer(dim=DIM, codebook_size=CODES, decay=decay, epsilon=epsilon, revive=0, debias=True).to(dtype)
    state = {"codebook": codes, "m": codes, "N": torch.ones(CODES), "updates": torch.tensor(0)}
    ours.load_state_dict({**state, "initialized": torch.tensor(True)})
    hidden_n, hidden_sum = torch.zeros(CODES, dtype=dtype), torch.zeros(CODES, DIM, dtype=dtype)
    for t in range(1, 5):
        z = torch.randn(30, DIM, 5, 7, dtype=dtype)  # enough that every code is chosen
        vectors = rearrange(z, "b d h w -> (b h w) d")
        chosen = torch.cdist(vectors, codes).argmin(1)
        out = ours(z)
        ours.update()
        record("indices", out.indices, rearrange(chosen, "(b h w) -> b h w", b=30, h=5))
        one_hot = torch.nn.functional.one_hot(chosen, CODES).to(dtype)
        hidden_n = hidden_n - (hidden_n - one_hot.sum(0)) * (1 - decay)
        hidden_sum = hidden_sum - (hidden_sum - one_hot.T @ vectors) * (1 - decay)
        size, total = hidden_n / (1 - decay**t), hidden_sum / (1 - decay**t)
        smoothed = (size + epsilon) / (size.sum() + CODES * epsilon) * size.sum()
        codes = total / smoothed[:, None]
        record("codes, four batches", ours.codebook, codes)


@compares("quantizer `rotation`", "vector-quantize-pytorch `rotation_trick`", "latents", "gradient of the latents")
@float32_only
def test_rotation(dtype: torch.dtype, record: Any) -> None:
    """A gradient codebook with the rotation trick."""
    theirs = vector_quantize(dtype, rotation_trick=True, learnable_codebook=True, ema_update=False)
    ours = RotationQuantizer(dim=DIM, codebook_size=CODES)
    ours.load_state_dict({"codebook.weight": theirs._codebook.embed[0]})
    z, pull = latents(dtype), torch.randn(3, DIM, 5, 7)
    expected, _, _ = theirs(z)
    out = ours(z)
    record("latents", out.latents, expected)
    (at_z,) = torch.autograd.grad((expected * pull).sum(), z)
    (found,) = torch.autograd.grad((out.latents * pull).sum(), z)
    record("gradient of the latents", found, at_z)


@compares(
    "quantizer `cosine`", "vector-quantize-pytorch `use_cosine_sim`", "indices", "latents", "gradient of the latents"
)
@float32_only
def test_cosine(dtype: torch.dtype, record: Any) -> None:
    """Codes and latents on the unit sphere, the smallest angle."""
    theirs = vector_quantize(dtype, use_cosine_sim=True, rotation_trick=False, ema_update=False)
    theirs._codebook.embed.data = torch.nn.functional.normalize(theirs._codebook.embed.data, dim=-1)
    ours = CosineQuantizer(dim=DIM, codebook_size=CODES)
    ours.load_state_dict({"codebook.weight": theirs._codebook.embed[0]})
    z, pull = latents(dtype), torch.randn(3, DIM, 5, 7)
    expected, indices, _ = theirs(z)
    out = ours(z)
    record("indices", out.indices, indices)
    record("latents", out.latents, expected)
    (at_z,) = torch.autograd.grad((expected * pull).sum(), z)
    (found,) = torch.autograd.grad((out.latents * pull).sum(), z)
    record("gradient of the latents", found, at_z)
