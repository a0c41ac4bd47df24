"""The codebook of moving averages: formula, peers, start, revival, state, several processes."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from tests.parity.peers import need
from tests.processes import together
from vqf import ranks
from vqf.quantizers.codebook import nearest
from vqf.quantizers.ema import KMEANS_ROUNDS, EMAQuantizer

V, D = 7, 3
BUFFERS = ("codebook", "N", "m")


def latents(seed: int, batch: int = 4, dim: int = D) -> Tensor:
    return torch.randn(batch, dim, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(z: Tensor) -> Tensor:
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def image(vectors: Tensor) -> Tensor:
    """Vectors (N, D) as latents (1, D, N, 1)."""
    return vectors.T[None, :, :, None]


def running(codebook: Tensor, **options: Any) -> EMAQuantizer:
    """A quantizer that has started, with these codes."""
    quantizer = EMAQuantizer(dim=codebook.shape[1], codebook_size=len(codebook), **options).to(codebook.dtype)
    quantizer.codebook.copy_(codebook)
    quantizer.m.copy_(codebook)
    quantizer.started.fill_(True)
    return quantizer


def test_follows_the_formula() -> None:
    torch.manual_seed(0)
    decay, epsilon, beta = 0.9, 0.1, 0.4
    e = torch.randn(V, D).double()
    quantizer = running(e, decay=decay, epsilon=epsilon, beta=beta, revive=0)
    N, m = [1.0] * V, [row.clone() for row in e]
    for step in range(5):
        z = latents(step)
        vectors = flat(z)
        chosen = [min(range(V), key=lambda k: float((v - e[k]).square().sum())) for v in vectors]
        squares = [float((v - e[k]).square().sum()) for v, k in zip(vectors, chosen, strict=True)]
        for k in range(V):
            mine = [v for v, c in zip(vectors, chosen, strict=True) if c == k]
            N[k] = decay * N[k] + (1 - decay) * len(mine)
            m[k] = decay * m[k] + (1 - decay) * sum(mine, torch.zeros(D).double())
        q = quantizer(z)
        assert q.indices.flatten().tolist() == chosen
        torch.testing.assert_close(flat(q.latents), e[chosen], rtol=0, atol=1e-12)
        assert float(q.loss) == pytest.approx(beta * sum(squares) / z.numel(), rel=1e-12)
        smoothed = [(n + epsilon) / (sum(N) + V * epsilon) * sum(N) for n in N]
        e = torch.stack([m[k] / smoothed[k] for k in range(V)])
        torch.testing.assert_close(quantizer.codebook, e, rtol=1e-12, atol=1e-12)


def test_equals_vector_quantize_pytorch() -> None:
    torch.manual_seed(0)
    e = torch.randn(V, D)
    ours = running(e, decay=0.8, beta=0.4, revive=0)
    options = {"decay": 0.8, "commitment_weight": 0.4, "rotation_trick": False, "accept_image_fmap": True}
    theirs = need("vector_quantize_pytorch").VectorQuantize(D, V, **options)
    theirs.codebook = e
    theirs._codebook.embed_avg.copy_(e[None])
    for step in range(6):
        z1, z2 = (latents(step).float().requires_grad_() for _ in range(2))
        expected, indices, loss = theirs(z1)
        q = ours(z2)
        assert torch.equal(q.indices, indices)
        torch.testing.assert_close(q.latents, expected)
        torch.testing.assert_close(q.loss, loss.squeeze())
        onward = latents(99).float()
        gradients = [
            torch.autograd.grad((out * onward).sum() + term.sum(), z)[0]
            for out, term, z in ((q.latents, q.loss, z2), (expected, loss, z1))
        ]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(ours.codebook, theirs.codebook)
        torch.testing.assert_close(ours.N, theirs._codebook.cluster_size[0])


def test_differs_from_sonnet_by_a_start_that_is_forgotten() -> None:
    """Sonnet's averages begin at 0 and are divided by 1 - γ^t; those of ours that begin at 1 lose it as γ^t."""
    torch.manual_seed(0)
    centres = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0]]).double()
    quantizer = running(centres + 1, decay=0.9, revive=0)
    n, hidden_N, hidden_m = torch.full((3,), 4.0).double(), torch.zeros(3).double(), torch.zeros(3, 2).double()
    gaps = []
    for step in range(1, 101):
        z = centres.repeat(4, 1) + 0.1 * torch.randn(12, 2).double()
        quantizer(image(z))
        hidden_N = 0.9 * hidden_N + 0.1 * n
        hidden_m = 0.9 * hidden_m + 0.1 * z.view(4, 3, 2).sum(0)
        N, m = hidden_N / (1 - 0.9**step), hidden_m / (1 - 0.9**step)
        smoothed = (N + 1e-5) / (N.sum() + 3e-5) * N.sum()
        gaps.append(float((quantizer.codebook - m / smoothed[:, None]).abs().max()))
    assert gaps[0] > 0.5
    assert gaps[-1] < 1e-4


def test_starts_at_latents_of_the_first_batch() -> None:
    torch.manual_seed(0)
    quantizer = EMAQuantizer(dim=D, codebook_size=V).double()
    vectors = flat(latents(0))
    quantizer._start(vectors)
    where = [(vectors == code).all(1).nonzero().flatten().tolist() for code in quantizer.codebook]
    assert all(where) and len({i for each in where for i in each}) == V
    assert torch.equal(quantizer.m, quantizer.codebook)


def test_starts_near_latents_where_there_are_fewer_than_codes() -> None:
    torch.manual_seed(0)
    quantizer = EMAQuantizer(dim=D, codebook_size=40).double()
    vectors = flat(latents(0))[:5]
    quantizer._start(vectors)
    assert torch.cdist(quantizer.codebook, vectors).min(1).values.max() < 0.06 * vectors.std()
    assert torch.pdist(quantizer.codebook).min() > 0


def test_kmeans_equals_scipys() -> None:
    torch.manual_seed(0)
    vectors = flat(latents(0, batch=20))
    codes = torch.cat([vectors[: V - 1], torch.full((1, D), 100.0).double()])  # nobody chooses the last one
    found = EMAQuantizer(dim=D, codebook_size=V, start="kmeans").double()._kmeans(vectors, codes)
    with pytest.warns(UserWarning, match="clusters is empty"):
        expected, _ = kmeans2(vectors.numpy(), codes.numpy(), iter=KMEANS_ROUNDS, minit="matrix")
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)


def test_kmeans_recovers_separated_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    centres = 10 * torch.eye(5).double()
    vectors = (centres[:, None] + 0.5 * torch.randn(5, 30, 5).double()).flatten(0, 1)
    quantizer = EMAQuantizer(dim=5, codebook_size=5, start="kmeans", decay=0.9).double()
    monkeypatch.setattr(quantizer, "_draw", lambda flat: vectors[[149, 0, 60, 30, 90]])  # one of each cluster
    quantizer._start(vectors)
    means = vectors.view(5, 30, 5).mean(1)
    torch.testing.assert_close(quantizer.codebook, means[[4, 0, 2, 1, 3]], rtol=1e-9, atol=1e-12)
    assert torch.equal(quantizer.m, quantizer.codebook)


def test_kmeans_begins_nearer_to_the_latents() -> None:
    vectors = flat(latents(0, batch=40))
    distances = {}
    for start in ("latents", "kmeans"):
        torch.manual_seed(0)
        quantizer = EMAQuantizer(dim=D, codebook_size=V, start=start).double()  # type: ignore[arg-type]
        quantizer._start(vectors)
        chosen = nearest(vectors, quantizer.codebook)
        distances[start] = float((vectors - quantizer.codebook[chosen]).square().mean())
    assert distances["kmeans"] < 0.8 * distances["latents"]


def lonely(**options: Any) -> tuple[EMAQuantizer, Tensor]:
    """A quantizer whose last code is far from all latents and nearly forgotten, and latents around the others."""
    torch.manual_seed(0)
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [500.0, 500.0]]).double()
    quantizer = running(codes, decay=0.9, **options)
    quantizer.N[2], quantizer.m[2] = 1e-3, 1e-3 * codes[2]
    return quantizer, codes[:2].repeat(40, 1) + 0.1 * torch.randn(80, 2).double()


def test_a_forgotten_code_is_revived_at_a_latent_and_stays_there() -> None:
    """A code moved without its averages falls back at the next update (espnet/espnet#6284)."""
    quantizer, vectors = lonely(revive=0.03)
    q = quantizer(image(vectors))
    assert int(q.stats["revived"]) == 1
    revived = quantizer.codebook[2].clone()
    assert (vectors - revived).norm(dim=1).min() < 1e-3
    assert float(quantizer.N[2]) == pytest.approx(0.1)
    elsewhere = quantizer.codebook[:1].repeat(30, 1)  # a batch that leaves it alone
    for _ in range(3):
        q = quantizer(image(elsewhere))
        assert not (q.indices == 2).any() and int(q.stats["revived"]) == 0
        torch.testing.assert_close(quantizer.codebook[2], revived, rtol=1e-3, atol=0)


def test_a_revived_code_is_chosen() -> None:
    quantizer, vectors = lonely(revive=0.03)
    assert not (quantizer(image(vectors)).indices == 2).any()
    assert (quantizer(image(vectors)).indices == 2).any()


def test_every_code_is_used_once_revival_has_worked() -> None:
    torch.manual_seed(0)
    share = {}
    for revive in (0.0, 0.03):
        far = torch.cat([torch.randn(2, D), 50 + torch.randn(30, D)]).double()
        quantizer = running(far, decay=0.8, revive=revive)
        for step in range(40):
            quantizer(latents(step, batch=20))
        share[revive] = float(quantizer(latents(99, batch=20)).stats["batch_usage"])
    assert share[0.0] < 0.1 and share[0.03] > 0.9


def test_revive_0_never_revives() -> None:
    quantizer, vectors = lonely(revive=0)
    for _ in range(5):
        assert int(quantizer(image(vectors)).stats["revived"]) == 0
    assert quantizer.codebook[2].min() > 100


def test_starts_once_without_asking_the_device_again() -> None:
    torch.manual_seed(0)
    quantizer = EMAQuantizer(dim=D, codebook_size=V).double()
    quantizer(latents(0))
    assert bool(quantizer.started)
    quantizer.started.fill_(False)  # nobody looks any more
    before = quantizer.codebook.clone()
    quantizer(latents(1))
    assert (quantizer.codebook - before).abs().max() < 0.5 * before.std()


def started_then_fresh() -> tuple[EMAQuantizer, EMAQuantizer]:
    torch.manual_seed(0)
    started, fresh = (EMAQuantizer(dim=D, codebook_size=V, revive=0).double() for _ in range(2))
    for step in range(3):
        started(latents(step))
    return started, fresh


@pytest.mark.parametrize("nested", [False, True])
def test_a_loaded_codebook_goes_on_where_it_was(nested: bool) -> None:
    started, fresh = started_then_fresh()
    if nested:
        nn.ModuleDict({"quantizer": fresh}).load_state_dict(nn.ModuleDict({"quantizer": started}).state_dict())
    else:
        fresh.load_state_dict(started.state_dict())
    copied = copy.deepcopy(started)
    for step in range(3, 6):
        q, p, r = (each(latents(step)) for each in (started, fresh, copied))
        assert torch.equal(q.indices, p.indices) and torch.equal(q.indices, r.indices)
    for name in BUFFERS:
        assert torch.equal(getattr(started, name), getattr(fresh, name))
        assert torch.equal(getattr(started, name), getattr(copied, name))


def test_loading_a_state_from_before_the_start_starts_again() -> None:
    started, fresh = started_then_fresh()
    started.load_state_dict(fresh.state_dict())
    far = 1000 + latents(7)
    started(far)
    assert started.codebook.min() > 900


def test_eval_moves_nothing_even_before_the_start() -> None:
    quantizer = EMAQuantizer(dim=D, codebook_size=V).double().eval()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(latents(0))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


def test_an_index_that_does_not_exist_is_refused() -> None:
    quantizer = EMAQuantizer(dim=D, codebook_size=V)
    for index in (-1, V):
        with pytest.raises(IndexError):
            quantizer.lookup(torch.full((1, 2, 2), index))


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_decay_is_a_share(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be in"):
        EMAQuantizer(dim=D, codebook_size=V, decay=decay)


def train(part: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What happens to codebooks in a few steps of training on a part of every batch."""
    torch.manual_seed(0)
    codes = torch.randn(V, D).double()
    update = running(codes, revive=0, decay=0.9)
    results = {"kmeans codes": update._kmeans(flat(part(latents(5))), codes)}
    quantizers = {"update": update}
    for start, count in itertools.product(("latents", "kmeans"), (V, 70)):  # 70 codes are more than latents
        quantizers[f"{start} {count}"] = EMAQuantizer(dim=D, codebook_size=count, start=start, revive=1.5)  # type: ignore[arg-type]
    torch.manual_seed(1 + ranks.rank())  # noise of its own
    for name, quantizer in quantizers.items():
        revived = 0
        for step in range(3):
            q = quantizer.double()(part(latents(step)))
            revived += int(q.stats["revived"])
        results |= {f"{name} {buffer}": getattr(quantizer, buffer) for buffer in BUFFERS}
        results |= {f"{name} revived": torch.tensor(revived), f"{name} perplexity": q.stats["perplexity"]}
    return results


def of_two() -> dict[str, Tensor]:
    return train(lambda batch: batch.chunk(2)[ranks.rank()])


def test_two_processes_have_the_codebook_of_one_with_the_whole_batch() -> None:
    first, second = together(2, of_two)
    alone = train(lambda batch: batch)
    assert first.keys() == second.keys() == alone.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        torch.testing.assert_close(value, alone[key], rtol=1e-12, atol=1e-12, msg=key)
    for name in ("latents 7", "kmeans 7", "latents 70"):
        assert int(first[f"{name} revived"]) > 0, "the draw of a revival has not been tried"
