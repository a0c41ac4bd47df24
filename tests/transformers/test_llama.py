"""The Llama-style prior: its formulas, its cache against full passes, and training on small data."""

import itertools
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from tests.support.layouts import raster
from vqf.protocols import Causal
from vqf.registry import RegistryError, build
from vqf.tokens.prefix import PrefixSpec
from vqf.transformers.layers.kv_cache import FullAttention
from vqf.transformers.llama import Llama, SwiGLU, apply_rotary, rotary_angles
from vqf.transformers.samplers.autoregressive import AutoregressiveSampler

V, GRID, P, M = 11, (3, 4), 5, 2
N = GRID[0] * GRID[1]
LAYOUT, PREFIX = raster(GRID, V), PrefixSpec(P, M)


def tiny(**options: object) -> Llama:
    """A prior in float64 and eval mode whose weights are large enough that every input matters."""
    torch.manual_seed(0)
    options = {"layers": 2, "heads": 2, "dim": 16, "multiple_of": 8, **options}
    llama = Llama(LAYOUT, PREFIX, **options).double().eval()  # type: ignore[arg-type]
    for parameter in llama.parameters():
        nn.init.normal_(parameter, std=0.5)
    return llama


def sequences(batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (batch, N), generator=generator), torch.randint(P, (batch, M), generator=generator)


def rotations(grid: tuple[int, int], dim: int) -> Tensor:
    turned = rotary_angles(list(itertools.product(range(grid[0]), range(grid[1]))), dim, 10000.0)
    return torch.stack((turned.cos(), turned.sin())).reshape(2, *grid, dim // 2)


def test_attention_sees_only_how_far_apart_two_tokens_are() -> None:
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).double()
    rotation = rotations((6, 7), 16)

    def score(i: int, j: int, down: int, right: int) -> float:
        return float(apply_rotary(q, rotation[:, i + down, j + right]) @ apply_rotary(k, rotation[:, i, j]))

    for down, right in ((0, 0), (1, 0), (0, 1), (2, 3), (3, 1)):
        scores = [score(i, j, down, right) for i in range(6 - down) for j in range(7 - right)]
        assert scores == pytest.approx([scores[0]] * len(scores), rel=1e-10)
    assert score(0, 0, 0, 0) == pytest.approx(float(q @ k))
    apart = [score(0, 0, down, right) for down in range(4) for right in range(4)]
    assert len({round(each, 6) for each in apart}) == 16


def test_half_of_a_head_turns_with_the_row_and_half_with_the_column() -> None:
    x = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    row, column = 2, 3
    turned = apply_rotary(x, rotations((4, 5), 8)[:, row, column])
    frequencies = [1.0, 10000.0 ** (-2 / 4)]
    pairs = torch.view_as_complex(x.reshape(4, 2))
    angle = torch.tensor([coordinate * f for coordinate in (row, column) for f in frequencies], dtype=torch.float64)
    by_hand = torch.view_as_real(pairs * torch.polar(torch.ones(4).double(), angle)).flatten()
    torch.testing.assert_close(turned, by_hand, rtol=1e-12, atol=1e-12)


def test_a_condition_is_turned_as_the_code_at_its_place_and_no_other() -> None:
    positions = [None, (1.0, 2.0), (0.5, 1.5), None]
    rotation = Llama(LAYOUT, PrefixSpec(P, 4, positions), layers=1, heads=2, dim=16).rotation
    cells = rotation[:, 4:].unflatten(1, GRID)
    for m in (0, 3):
        assert (rotation[0, m] == 1).all() and not rotation[1, m].any()
    assert torch.equal(rotation[:, 1], cells[:, 1, 2])
    between = sum(cells[0, i, j] + 1j * cells[1, i, j] for i in (0, 1) for j in (1, 2))  # the mean of its four angles
    assert torch.allclose(between / between.abs(), rotation[0, 2] + 1j * rotation[1, 2])


def test_swiglu_is_its_formula() -> None:
    torch.manual_seed(0)
    mlp, x = SwiGLU(4, 6, 0.0).double(), torch.randn(3, 4).double()
    a, b = x @ mlp.gate.weight.T, x @ mlp.up.weight.T
    torch.testing.assert_close(mlp(x), (a / (1 + (-a).exp()) * b) @ mlp.proj.weight.T)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_normalised_queries_and_keys_do_not_grow_with_the_stream(qk_norm: bool) -> None:
    attention = tiny(qk_norm=qk_norm).blocks[0].attention
    attention.proj.weight.data = torch.eye(16).double()
    x = torch.randn(1, N + M, 16, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        before = attention(x, FullAttention(), tiny().rotation)
        attention.qkv.weight[:32] *= 50  # queries and keys, not values
        after = attention(x, FullAttention(), tiny().rotation)
    assert torch.allclose(before, after, atol=1e-3) == qk_norm


def test_a_token_never_changes_the_logits_up_to_it_and_the_prefix_changes_all() -> None:
    llama = tiny(qk_norm=True)
    tokens, prefix = sequences()
    logits = llama(tokens, prefix)
    assert logits.shape == (4, N, V)
    for n in range(N):
        other = tokens.clone()
        other[:, n] = (other[:, n] + 1) % V
        changed = (llama(other, prefix) != logits).any(-1)
        assert not changed[:, : n + 1].any()
        assert changed[:, n + 1 :].all()
    for m in range(M):
        other = prefix.clone()
        other[:, m] = (other[:, m] + 1) % P
        assert (llama(tokens, other) != logits).any(-1).all()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cached_logits_equal_uncached_at_every_position(qk_norm: bool) -> None:
    llama = tiny(qk_norm=qk_norm)
    tokens, prefix = sequences()
    logits, cache = llama.prefill(prefix)
    cached = [logits, *(llama.decode(tokens[:, n : n + 1], cache) for n in range(N - 1))]
    torch.testing.assert_close(torch.cat(cached, dim=1), llama(tokens, prefix), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="full: the prior models 12 tokens"):
        llama.decode(tokens[:, -1:], cache)


def test_what_it_has_no_position_for_is_refused() -> None:
    llama, (tokens, prefix) = tiny(), sequences()
    assert isinstance(llama, Causal)
    with pytest.raises(ValueError, match="N from 1 to 12"):
        llama(torch.cat((tokens, tokens), dim=1), prefix)
    with pytest.raises(ValueError, match=r"prefix must be \(4, 2\)"):
        llama(tokens, prefix[:, :1])


# LlamaGen's table of models: class-conditional, 16384 codes, a grid of 16 x 16, 1000 classes and the null class.
@pytest.mark.parametrize(
    ("layers", "heads", "dim", "millions"),
    [(12, 12, 768, 111), (24, 16, 1024, 343), (36, 20, 1280, 775), (48, 24, 1536, 1411)],
)
def test_published_sizes(layers: int, heads: int, dim: int, millions: int) -> None:
    with torch.device("meta"):
        llama = Llama(raster((16, 16), 16384), PrefixSpec(1001, 1, [None]), layers=layers, heads=heads, dim=dim)
    hidden = -(-(8 * dim // 3) // 256) * 256
    block = 4 * dim**2 + 3 * dim * hidden + 2 * dim
    count = sum(each.numel() for each in llama.parameters())
    assert count == layers * block + (2 * 16384 + 1001 + 1) * dim
    assert round(count / 1e6) == millions


def test_a_fresh_one_knows_nothing_exactly() -> None:
    torch.manual_seed(0)
    llama = Llama(LAYOUT, PREFIX, layers=2, heads=2, dim=64)
    assert not llama(*sequences()).any()
    assert all(not name.endswith("bias") for name, _ in llama.named_parameters())
    assert llama.blocks[0].mlp.gate.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert "rotation" not in llama.state_dict()


def test_it_learns_eight_sequences_by_heart() -> None:
    torch.manual_seed(0)
    tokens, prefix = torch.randint(V, (8, N)), torch.arange(8)[:, None]
    llama = Llama(LAYOUT, PrefixSpec(8, 1), layers=2, heads=2, dim=32, multiple_of=8, dropout=0.0)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=5e-3, betas=(0.9, 0.95))
    for _ in range(200):
        optimizer.zero_grad()
        loss = llama.loss(tokens, prefix)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    sampler = AutoregressiveSampler(top_k=1)
    assert torch.equal(sampler(llama.eval(), prefix, LAYOUT, seed=0), tokens)


def test_rotations_keep_their_precision_in_bfloat16() -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotation = rotations((8, 8), 16).reshape(2, 64, 8)
    turned = apply_rotary(x, rotation.float())
    assert turned.dtype == torch.bfloat16
    exact = apply_rotary(x.double(), rotation)
    assert ((turned.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()  # rounded once


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 20, "heads": 4}, r"dim=20 must be a multiple of 4 \* heads = 16; the nearest that fits is 16"),
    ],
)
def test_wrong_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(RegistryError, match=words) as caught:
        build("prior", {"name": "llama", **options}, layout=LAYOUT, prefix=PREFIX)
    assert "\n" not in str(caught.value)


def test_the_small_preset() -> None:
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base=None):
        small = compose(overrides=["+model/prior=llama_small", "model.prior.heads=4"]).model.prior
    llama = build("prior", small, layout=raster((16, 16), 1024), prefix=PrefixSpec(1, 1, [None]))
    assert (len(llama.blocks), llama.blocks[0].attention.heads, llama.norm.weight.numel()) == (6, 4, 256)
    assert sum(each.numel() for each in llama.parameters()) == pytest.approx(5e6, rel=0.2)
