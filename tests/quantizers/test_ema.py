"""The EMA codebook: formula, other implementations, initialization, revival, state, several ranks."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from tests.parity.peers import need
from tests.support.processes import compare_with_alone
from vqf.distributed import comm
from vqf.protocols import Quantized
from vqf.quantizers import ema
from vqf.quantizers.code_revival import KMEANS_ITERATIONS, kmeans
from vqf.quantizers.codebook import nearest
from vqf.quantizers.ema import EMAQuantizer

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
    """An initialized quantizer with given codes."""
    quantizer = EMAQuantizer(dim=codebook.shape[1], codebook_size=len(codebook), **options).to(codebook.dtype)
    quantizer.codebook.copy_(codebook)
    quantizer.m.copy_(codebook)
    quantizer.initialized.fill_(True)
    return quantizer


def step_on(quantizer: EMAQuantizer, z: Tensor) -> Quantized:
    """A training step on one batch: its output, with the stats of `forward` and `update`."""
    q = quantizer(z)
    q.stats |= quantizer.update()
    return q


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
        q = step_on(quantizer, z)
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
        q = step_on(ours, z2)
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


def sonnet(vectors: Tensor, e: Tensor, decay: float, epsilon: float, state: dict[str, Tensor]) -> Tensor:
    """One update of Sonnet's VectorQuantizerEMA, by its own formula; `state` starts at zero."""
    chosen = torch.cdist(vectors, e).argmin(1)
    one_hot = F.one_hot(chosen, len(e)).to(e.dtype)
    state["t"] = state["t"] + 1
    averages = []
    for name, value in (("N", one_hot.sum(0)), ("m", one_hot.T @ vectors)):
        state[name] = state[name] - (state[name] - value) * (1 - decay)
        averages.append(state[name] / (1 - decay ** state["t"]))
    N, m = averages
    n = N.sum()
    return m / ((N + epsilon) / (n + len(e) * epsilon) * n)[:, None]


def test_debias_is_sonnets_convention_and_the_default_forgets_the_difference() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0]]).double()
    options = {"decay": 0.9, "epsilon": 0.01, "revive": 0}
    default, debiased, expected = (
        running(centres + 1, **options),
        running(centres + 1, **options, debias=True),
        centres + 1,
    )
    state = {"t": torch.tensor(0.0).double(), "N": torch.zeros(3).double(), "m": torch.zeros(3, 2).double()}
    gaps = []
    for _ in range(100):
        z = centres.repeat(4, 1)[torch.randperm(12)[:9]] + 0.1 * torch.randn(9, 2).double()
        expected = sonnet(z, expected, 0.9, 0.01, state)
        step_on(default, image(z))
        step_on(debiased, image(z))
        torch.testing.assert_close(debiased.codebook, expected, rtol=1e-12, atol=1e-12)
        gaps.append(float((default.codebook - expected).abs().max()))
    assert gaps[0] > 0.5
    assert gaps[-1] < 1e-3


def test_starts_at_latents_of_the_first_batch() -> None:
    torch.manual_seed(0)
    quantizer = EMAQuantizer(dim=D, codebook_size=V).double()
    vectors = flat(latents(0))
    quantizer._init_codebook(vectors)
    where = [(vectors == code).all(1).nonzero().flatten().tolist() for code in quantizer.codebook]
    assert all(where) and len({i for each in where for i in each}) == V
    assert torch.equal(quantizer.m, quantizer.codebook)


def test_starts_near_latents_where_there_are_fewer_than_codes() -> None:
    torch.manual_seed(0)
    quantizer = EMAQuantizer(dim=D, codebook_size=40).double()
    vectors = flat(latents(0))[:5]
    quantizer._init_codebook(vectors)
    assert torch.cdist(quantizer.codebook, vectors).min(1).values.max() < 0.06 * vectors.std()
    assert torch.pdist(quantizer.codebook).min() > 0


def test_kmeans_equals_scipys() -> None:
    torch.manual_seed(0)
    vectors = flat(latents(0, batch=20))
    codes = torch.cat([vectors[: V - 1], torch.full((1, D), 100.0).double()])  # no latent is near the last one
    centers = kmeans(vectors, codes)
    with pytest.warns(UserWarning, match="clusters is empty"):
        expected, _ = kmeans2(vectors.numpy(), codes.numpy(), iter=KMEANS_ITERATIONS, minit="matrix")
    torch.testing.assert_close(centers, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)


def test_kmeans_recovers_separated_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    centres = 10 * torch.eye(5).double()
    vectors = (centres[:, None] + 0.5 * torch.randn(5, 30, 5).double()).flatten(0, 1)
    quantizer = EMAQuantizer(dim=5, codebook_size=5, init="kmeans", decay=0.9).double()
    monkeypatch.setattr(ema, "sample_latents", lambda *_: vectors[[149, 0, 60, 30, 90]])  # one of each cluster
    quantizer._init_codebook(vectors)
    means = vectors.view(5, 30, 5).mean(1)
    torch.testing.assert_close(quantizer.codebook, means[[4, 0, 2, 1, 3]], rtol=1e-9, atol=1e-12)
    assert torch.equal(quantizer.m, quantizer.codebook)


def test_kmeans_begins_nearer_to_the_latents() -> None:
    vectors = flat(latents(0, batch=40))
    distances = {}
    for start in ("latents", "kmeans"):
        torch.manual_seed(0)
        quantizer = EMAQuantizer(dim=D, codebook_size=V, init=start).double()  # type: ignore[arg-type]
        quantizer._init_codebook(vectors)
        chosen = nearest(vectors, quantizer.codebook)
        distances[start] = float((vectors - quantizer.codebook[chosen]).square().mean())
    assert distances["kmeans"] < 0.8 * distances["latents"]


def lonely(**options: Any) -> tuple[EMAQuantizer, Tensor]:
    """A quantizer whose last code is far from all latents and nearly dead, and latents around the others."""
    torch.manual_seed(0)
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [500.0, 500.0]]).double()
    quantizer = running(codes, decay=0.9, **options)
    quantizer.N[2], quantizer.m[2] = 1e-3, 1e-3 * codes[2]
    return quantizer, codes[:2].repeat(40, 1) + 0.1 * torch.randn(80, 2).double()


def test_a_forgotten_code_is_revived_at_a_latent_and_stays_there() -> None:
    """A code moved without its averages falls back at the next update (espnet/espnet#6284)."""
    quantizer, vectors = lonely(revive=0.03)
    q = step_on(quantizer, image(vectors))
    assert int(q.stats["revived"]) == 1
    revived = quantizer.codebook[2].clone()
    assert (vectors - revived).norm(dim=1).min() < 1e-3
    assert float(quantizer.N[2]) == pytest.approx(0.1)
    elsewhere = quantizer.codebook[:1].repeat(30, 1)  # a batch without latents near the code
    for _ in range(3):
        q = step_on(quantizer, image(elsewhere))
        assert not (q.indices == 2).any() and int(q.stats["revived"]) == 0
        torch.testing.assert_close(quantizer.codebook[2], revived, rtol=1e-3, atol=0)


def test_a_revived_code_is_chosen() -> None:
    quantizer, vectors = lonely(revive=0.03)
    assert not (step_on(quantizer, image(vectors)).indices == 2).any()
    assert (quantizer(image(vectors)).indices == 2).any()


def test_every_code_is_used_once_revival_has_worked() -> None:
    torch.manual_seed(0)
    share = {}
    for revive in (0.0, 0.03):
        far = torch.cat([torch.randn(2, D), 50 + torch.randn(30, D)]).double()
        quantizer = running(far, decay=0.8, revive=revive)
        for step in range(40):
            step_on(quantizer, latents(step, batch=20))
        share[revive] = float(quantizer(latents(99, batch=20)).stats["batch_usage"])
    assert share[0.0] < 0.1 and share[0.03] > 0.9


def test_revive_0_never_revives() -> None:
    quantizer, vectors = lonely(revive=0)
    for _ in range(5):
        assert int(step_on(quantizer, image(vectors)).stats["revived"]) == 0
    assert quantizer.codebook[2].min() > 100


def test_starts_once_without_asking_the_device_again() -> None:
    torch.manual_seed(0)
    quantizer = EMAQuantizer(dim=D, codebook_size=V).double()
    step_on(quantizer, latents(0))
    assert bool(quantizer.initialized)
    quantizer.initialized.fill_(False)  # the host does not ask any more
    before = quantizer.codebook.clone()
    step_on(quantizer, latents(1))
    assert (quantizer.codebook - before).abs().max() < 0.5 * before.std()


def started_then_fresh() -> tuple[EMAQuantizer, EMAQuantizer]:
    torch.manual_seed(0)
    started, fresh = (EMAQuantizer(dim=D, codebook_size=V, revive=0).double() for _ in range(2))
    for step in range(3):
        step_on(started, latents(step))
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
        q, p, r = (step_on(each, latents(step)) for each in (started, fresh, copied))
        assert torch.equal(q.indices, p.indices) and torch.equal(q.indices, r.indices)
    for name in BUFFERS:
        assert torch.equal(getattr(started, name), getattr(fresh, name))
        assert torch.equal(getattr(started, name), getattr(copied, name))


def test_loading_a_state_from_before_the_start_starts_again() -> None:
    started, fresh = started_then_fresh()
    started.load_state_dict(fresh.state_dict())
    far = 1000 + latents(7)
    step_on(started, far)
    assert started.codebook.min() > 900


def test_eval_moves_nothing_even_before_the_start() -> None:
    quantizer = EMAQuantizer(dim=D, codebook_size=V).double().eval()
    before = copy.deepcopy(quantizer.state_dict())
    assert step_on(quantizer, latents(0)).stats.get("revived") is None
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


def test_micro_batches_move_the_averages_once_like_one_batch() -> None:
    torch.manual_seed(0)
    one_batch, micro_batches = running(codes := torch.randn(V, D).double(), revive=0), running(codes, revive=0)
    for step in range(3):
        step_on(one_batch, latents(step))
        for micro_batch in latents(step).chunk(4):
            micro_batches(micro_batch)
            assert torch.equal(micro_batches.codebook, codes)  # it does not change within the step
        micro_batches.update()
        codes = micro_batches.codebook.clone()
        for name in BUFFERS:
            torch.testing.assert_close(getattr(micro_batches, name), getattr(one_batch, name), rtol=1e-12, atol=1e-12)


def test_forwards_without_gradients_and_given_up_steps_do_not_count() -> None:
    quantizer, other = started_then_fresh()
    other.load_state_dict(state := copy.deepcopy(quantizer.state_dict()))
    with torch.no_grad():
        quantizer(latents(8))
    assert quantizer.update() == {}
    quantizer(latents(9))
    quantizer.load_state_dict(state)  # as after a skipped step
    for each in (quantizer, other):
        step_on(each, latents(3))
    assert all(torch.equal(getattr(quantizer, name), getattr(other, name)) for name in BUFFERS)


def test_an_index_that_does_not_exist_is_refused() -> None:
    quantizer = EMAQuantizer(dim=D, codebook_size=V)
    for index in (-1, V):
        with pytest.raises(IndexError):
            quantizer.lookup(torch.full((1, 2, 2), index))


def train(part: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Codebooks after a few training steps of this rank on its part of each batch."""
    torch.manual_seed(0)
    codes = torch.randn(V, D).double()
    update = running(codes, revive=0, decay=0.9)
    results = {"kmeans codes": kmeans(flat(part(latents(5))), codes)}
    quantizers = {"update": update}
    for start, count in itertools.product(("latents", "kmeans"), (V, 70)):  # 70 codes are more than latents
        quantizers[f"{start} {count}"] = EMAQuantizer(dim=D, codebook_size=count, init=start, revive=1.5)  # type: ignore[arg-type]
    torch.manual_seed(1 + comm.rank())  # each rank has its own random state
    for name, quantizer in quantizers.items():
        revived = 0
        for step in range(3):
            q = step_on(quantizer.double(), part(latents(step)))
            revived += int(q.stats["revived"])
        results |= {f"{name} {buffer}": getattr(quantizer, buffer) for buffer in BUFFERS}
        results |= {f"{name} revived": torch.tensor(revived), f"{name} perplexity": q.stats["perplexity"]}
    return results


def of_two() -> dict[str, Tensor]:
    return train(lambda batch: batch.chunk(2)[comm.rank()])


def test_two_processes_have_the_codebook_of_one_with_the_whole_batch() -> None:
    first = compare_with_alone(of_two, train(lambda batch: batch))
    for name in ("latents 7", "kmeans 7", "latents 70"):
        assert int(first[f"{name} revived"]) > 0, "the draw of a revival has not been tried"
