"""Residual quantization: the paper's formula, other implementations, random depths, several ranks, wrong options."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.parity.peers import need
from tests.support.processes import compare_with_alone, run_processes
from vqf.distributed import comm
from vqf.quantizers.layered.residual import ResidualQuantizer
from vqf.registry import RegistryError, build

V, D = 7, 3
VQ: dict[str, Any] = {"name": "vq", "dim": D, "codebook_size": V, "beta": 0.3}
EMA: dict[str, Any] = {"name": "ema", "dim": D, "codebook_size": V, "revive": 0.0}
BASES: list[dict[str, Any]] = [
    VQ,
    EMA,
    {"name": "rotation", "dim": D, "codebook_size": V},
    {"name": "cosine", "dim": D, "codebook_size": V},
    {"name": "gumbel", "dim": D, "codebook_size": V},
    {"name": "simvq", "dim": D, "codebook_size": V},
    {"name": "ibq", "dim": D, "codebook_size": V},
    {"name": "bsq", "dim": D},
    {"name": "lfq", "dim": D, "factors": [1, 2]},
    {"name": "fsq", "levels": [5, 4, 3]},
    {"name": "fsq", "levels": [5, 4, 3], "factors": [1, 2]},
    {"name": "product", "base": {"name": "vq", "dim": 2, "codebook_size": V}, "groups": 2},
    {"name": "residual", "base": {"name": "vq", "dim": 2, "codebook_size": V}, "depth": 2, "shared": False},
]


def latents(seed: int, batch: int = 4, dim: int = D, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, dim, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def levels_of(quantizer: ResidualQuantizer) -> list[Any]:
    return list(quantizer.levels)


def with_codes(codes: list[Tensor], **options: Any) -> ResidualQuantizer:
    """A quantizer of `vq` levels, with given codebooks."""
    quantizer = ResidualQuantizer(base=VQ, **options).to(codes[0].dtype)
    for level, book in zip(levels_of(quantizer), codes, strict=True):
        level.codebook.weight.data.copy_(book)
    return quantizer


def codebooks(count: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(V, D).double() / (k + 1) for k in range(count)]


@pytest.mark.parametrize("shared", [True, False])
def test_follows_the_formula(shared: bool) -> None:
    """The commitment term is β mean over depths of |z - sg[sum of the codes so far]|², as in the paper."""
    depth, codes = 3, codebooks(1 if shared else 3)
    quantizer = with_codes(codes, depth=depth, shared=shared)
    z = latents(0).requires_grad_()
    q = quantizer(z)
    loss, total = 0.0, torch.zeros_like(z)
    pull = torch.zeros_like(z)
    for b, i, j in torch.cartesian_prod(torch.arange(4), torch.arange(5), torch.arange(3)).tolist():
        vector, so_far = z.detach()[b, :, i, j], torch.zeros(D).double()
        for d in range(depth):
            book = codes[0 if shared else d]
            k = min(range(V), key=lambda k: float((vector - so_far - book[k]).square().sum()))
            assert int(q.indices[b, i, j, d]) == k
            so_far = so_far + book[k]
            loss += (1 + VQ["beta"]) * float((vector - so_far).square().sum()) / depth / z.numel()
            pull[b, :, i, j] += VQ["beta"] * 2 * (vector - so_far) / depth / z.numel()
        total[b, :, i, j] = so_far
    torch.testing.assert_close(q.latents.detach(), total, rtol=0, atol=1e-12)
    assert float(q.loss.detach()) == pytest.approx(loss, rel=1e-12)
    onward = latents(9)
    (gradient,) = torch.autograd.grad((q.latents * onward).sum() + q.loss, z)
    torch.testing.assert_close(gradient, onward + pull, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_equals_vector_quantize_pytorch(shared: bool) -> None:
    """Indices, latents, losses and their gradient, codebooks; its gradient of the latents is D times the identity.

    Of a shared codebook it moves the averages D times a batch, vqf once by all levels: only the first batch is equal.
    """
    depth = 3
    options = {"decay": 0.8, "commitment_weight": 0.25, "rotation_trick": False, "shared_codebook": shared}
    theirs = need("vector_quantize_pytorch").ResidualVQ(dim=D, num_quantizers=depth, codebook_size=V, **options)
    ours = ResidualQuantizer(base=EMA | {"decay": 0.8}, depth=depth, shared=shared)
    for level, book in zip(levels_of(ours), codebooks(3), strict=False):
        for name in ("codebook", "m"):
            getattr(level, name).copy_(book)
        level.initialized.fill_(True)
    for layer, book in zip(theirs.layers, codebooks(3), strict=True):
        book = (codebooks(1)[0] if shared else book).float()[None]
        layer._codebook.embed.data.copy_(book)
        layer._codebook.embed_avg.data.copy_(book)
    for step in range(1 if shared else 3):
        z1, z2 = (latents(step, dtype=torch.float32).requires_grad_() for _ in range(2))
        expected, indices, losses = theirs(z1.flatten(2).transpose(1, 2))
        q = ours(z2)
        assert torch.equal(q.indices.flatten(1, 2), indices)
        torch.testing.assert_close(q.latents.flatten(2).transpose(1, 2), expected)
        torch.testing.assert_close(q.loss, losses.mean())
        (at_z1,), (at_z2,) = torch.autograd.grad(losses.mean(), z1), torch.autograd.grad(q.loss, z2)
        torch.testing.assert_close(at_z2, at_z1)
        ours.update()
    if not shared:
        books = [layer._codebook.embed[0] for layer in theirs.layers]
        torch.testing.assert_close([level.codebook for level in levels_of(ours)], books)


@pytest.mark.parametrize("count", [3, 5, 9])
def test_equals_vector_quantize_pytorchs_residual_fsq(count: int) -> None:
    """`scale` is 1/L there."""
    peer = need("vector_quantize_pytorch").ResidualFSQ
    theirs = peer(levels=[count] * D, num_quantizers=3, bound_hard_clamp=False)
    base = {"name": "fsq", "levels": [count] * D, "bound": "symmetric"}
    ours = ResidualQuantizer(base=base, depth=3, scale=1 / count)
    z = latents(0, dtype=torch.float32)
    expected, indices = theirs(z.flatten(2).transpose(1, 2))
    q = ours(z)
    assert torch.equal(q.indices.flatten(1, 2), indices.long())
    torch.testing.assert_close(q.latents.flatten(2).transpose(1, 2), expected)


@given(
    base=st.sampled_from(BASES),
    depth=st.integers(1, 4),
    shared=st.booleans(),
    scale=st.sampled_from([1.0, 0.5, 1 / 3]),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=60)
def test_lookup_gives_the_latents_of_all_and_of_the_first_codebooks(
    base: dict[str, Any], depth: int, shared: bool, scale: float, grid: tuple[int, int, int], dtype: torch.dtype
) -> None:
    quantizer = ResidualQuantizer(base=base, depth=depth, shared=shared, scale=scale).to(dtype).eval()
    batch, height, width = grid
    q = quantizer(torch.randn(batch, quantizer.dim, height, width, dtype=dtype))
    layout = quantizer.layout((height, width), 8)
    assert q.latents.dtype == dtype and torch.equal(quantizer.lookup(q.indices), q.latents)
    tokens = layout.flatten(q.indices)
    assert torch.equal(layout.unflatten(tokens), q.indices)
    assert (layout.by_codebook(tokens) < torch.tensor(layout.vocab_sizes)).all()
    if layout.codebooks > 1:
        shallow = ResidualQuantizer(base=base, depth=1, scale=scale).to(dtype).eval()
        shallow.levels[0].load_state_dict(quantizer.levels[0].state_dict())
        first = q.indices[..., : layout.codebooks // depth]
        expected = shallow.lookup(first[..., 0] if layout.codebooks == depth else first)
        assert torch.equal(quantizer.lookup(first), expected)


def test_each_level_brings_the_code_nearer() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(base=EMA | {"decay": 0.8}, depth=4, shared=False).double()
    for step in range(20):
        quantizer(latents(step, batch=20))
        quantizer.update()
    z = latents(99, batch=20)
    indices = quantizer.eval()(z).indices
    errors = [float((quantizer.lookup(indices[..., :k]) - z).square().mean()) for k in range(1, 5)]
    assert all(after < 0.9 * before for before, after in pairwise(errors))


def test_dropout_leaves_out_whole_tails_and_trains_nothing_of_them() -> None:
    quantizer = with_codes(codebooks(4), depth=4, shared=False, dropout=1.0)
    z, depths = latents(0), set()
    full = copy.deepcopy(quantizer).eval()(z).indices
    for seed in range(40):
        torch.manual_seed(seed)
        quantizer.zero_grad()
        q = quantizer(z.requires_grad_())
        assert torch.equal(q.indices, full)
        (depth,) = (k for k in range(1, 5) if torch.equal(q.latents, quantizer.lookup(full[..., :k])))
        alone = with_codes(codebooks(depth), depth=depth, shared=False)(z)
        torch.testing.assert_close(q.loss, alone.loss)
        q.loss.backward()
        gradients = [level.codebook.weight.grad for level in levels_of(quantizer)]
        assert all(each is not None for each in gradients), "DDP would wait for it"
        assert [bool(each.any()) for each in gradients] == [d < depth for d in range(4)]
        depths.add(depth)
    assert depths == {1, 2, 3, 4}


def test_dropout_is_a_probability_and_for_training_alone() -> None:
    quantizer, z = with_codes(codebooks(4), depth=4, shared=False, dropout=0.5), latents(0)
    whole = quantizer.lookup(quantizer(z).indices)
    torch.manual_seed(0)
    share = sum(torch.equal(quantizer(z).latents, whole) for _ in range(400)) / 400
    assert share == pytest.approx(0.5 + 0.5 / 4, abs=0.1)
    with torch.no_grad():
        assert all(torch.equal(quantizer(z).latents, whole) for _ in range(20))
    assert all(torch.equal(quantizer.eval()(z).latents, whole) for _ in range(20))


def test_dropped_levels_keep_their_averages() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(base=EMA, depth=3, shared=False, dropout=1.0).double()
    moved = set()
    for step in range(30):
        before = [level.N.clone() for level in levels_of(quantizer)]
        quantizer(latents(step))
        quantizer.update()
        pairs = zip(levels_of(quantizer), before, strict=True)
        moved.add(tuple(not torch.equal(level.N, N) for level, N in pairs))
    assert moved == {(True, False, False), (True, True, False), (True, True, True)}


@pytest.mark.parametrize("shared", [True, False])
def test_updates_reach_the_levels(shared: bool) -> None:
    """Dead codes of every level are revived, and the log has their number."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(base=EMA | {"revive": 0.5, "decay": 0.5}, depth=2, shared=shared).double()
    for level in levels_of(quantizer):
        level.initialized.fill_(True)
        level.codebook[1:] = 1000.0
        level.N[1:] = 0.0
    quantizer(latents(0))
    log = quantizer.update()
    assert int(log["revived"]) == (6 if shared else 12)
    assert shared or int(log["revived/0"]) == int(log["revived/1"]) == 6
    assert all(level.codebook.max() < 100 for level in levels_of(quantizer))


def train(part: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """State and log after training steps of this rank on its part of each batch."""
    results = {}
    for shared in (True, False):
        torch.manual_seed(0)
        base = EMA | {"revive": 1.5, "decay": 0.9}
        quantizer = ResidualQuantizer(base=base, depth=3, shared=shared, dropout=0.5).double()
        torch.manual_seed(1 if comm.world_size() == 1 else 1 + comm.rank())  # each rank has its own random state
        for step in range(5):
            q = quantizer(part(latents(step)))
            log = quantizer.update()
        state = {**quantizer.state_dict(), **q.stats, **log}
        results |= {f"{shared} {key}": value for key, value in state.items() if not key.startswith("commitment")}
    return results


def of_two() -> dict[str, Tensor]:
    return train(lambda batch: batch.chunk(2)[comm.rank()])


def test_two_processes_have_the_codebooks_of_one_with_the_whole_batch() -> None:
    compare_with_alone(of_two, train(lambda batch: batch))


def of_ddp() -> tuple[set[int], list[Tensor]]:
    """Depths drawn, and codebooks after training steps by gradient under DDP."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(base=VQ, depth=3, shared=False, dropout=1.0)
    parallel = DistributedDataParallel(quantizer)
    torch.manual_seed(1 + comm.rank())
    optimizer, depths = torch.optim.SGD(quantizer.parameters(), lr=1.0), set()
    for step in range(8):
        z = latents(step, dtype=torch.float32).chunk(2)[comm.rank()]
        optimizer.zero_grad()
        parallel(z).loss.backward()
        optimizer.step()
        depths.add(sum(bool(level.codebook.weight.grad.any()) for level in levels_of(quantizer)))
    return depths, [level.codebook.weight.detach() for level in levels_of(quantizer)]


def test_ddp_trains_levels_that_are_left_out_at_some_steps() -> None:
    (depths, first), (others, second) = run_processes(2, of_ddp)
    assert depths == others and len(depths) > 1
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"quantizer\.base: .* needs a value; give quantizer\.base="),
        ({"base": {}}, r"^model\.quantizer\.base: no quantizer is chosen; .*'model\.quantizer\.base=\{name:vq\}'"),
        ({"base": {"name": "vk"}}, r"^model\.quantizer\.base: unknown quantizer 'vk'. Known: .* vq"),
        ({"base": {"name": "vq", "dimm": 3}}, r"^model\.quantizer\.base\.dimm: unknown option.*Did you mean 'dim'"),
        ({"base": {"name": "vq", "dim": 0}}, r"^model\.quantizer\.base\.dim=0: must be an integer from 1"),
        (
            {"base": {"name": "residual", "base": {"name": "vq", "dimm": 3}}},
            r"^model\.quantizer\.base\.base\.dimm: unknown option",
        ),
        ({"base": {"name": "multiscale"}}, r"^model\.quantizer\.base\.name=multiscale: its tokens have several scales"),
        ({"base": VQ, "depth": 0}, r"depth=0: must be an integer from 1"),
        ({"base": VQ, "dropout": 1.5}, r"dropout=1\.5: must be a number from 0 to 1"),
        ({"base": VQ, "scale": 0}, r"scale=0: must be"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        build("quantizer", {"name": "residual", **options})
