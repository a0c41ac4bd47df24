"""Initialization and revival of codes that are trained by gradient."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.processes import compare_with_alone
from vqf.distributed import comm
from vqf.quantizers.code_revival import USAGE_DECAY, kmeans
from vqf.quantizers.cosine import CosineQuantizer
from vqf.quantizers.rotation import RotationQuantizer
from vqf.quantizers.vq import VectorQuantizer

V, D = 7, 3
KINDS = [VectorQuantizer, RotationQuantizer, CosineQuantizer]
kinds = pytest.mark.parametrize("kind", KINDS)


def latents(seed: int, batch: int = 4) -> Tensor:
    return torch.randn(batch, D, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(quantizer: nn.Module, z: Tensor) -> Tensor:
    """The vectors (N, D) between which the quantizer measures distances."""
    z = F.normalize(z, dim=1) if isinstance(quantizer, CosineQuantizer) else z
    return z.movedim(1, -1).reshape(-1, D)


def make(kind: Any, count: int = V, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(dim=D, codebook_size=count, **options).double()


@kinds
def test_by_default_nothing_is_kept_and_nothing_moves(kind: Any) -> None:
    quantizer = make(kind)
    before = quantizer.codebook.weight.clone()
    quantizer(latents(0))
    assert quantizer.update() == {}
    assert list(quantizer.state_dict()) == ["codebook.weight"]
    assert torch.equal(quantizer.codebook.weight, before)


@kinds
def test_starts_at_latents_of_the_first_step_and_only_once(kind: Any) -> None:
    quantizer = make(kind, init="latents")
    z = latents(0)
    quantizer(z)
    quantizer.update()
    codes, vectors = quantizer.codebook.weight.detach().clone(), seen(quantizer, z)
    assert torch.cdist(codes, vectors).min(1).values.max() < 1e-7
    assert len(codes.unique(dim=0)) == V
    for step in range(3):
        quantizer(latents(1 + step))
        quantizer.update()
    assert torch.equal(quantizer.codebook.weight, codes)


@kinds
def test_starts_at_means(kind: Any) -> None:
    z = latents(0, batch=20)
    quantizer = make(kind, init="kmeans")
    torch.manual_seed(1)
    quantizer(z)
    quantizer.update()
    torch.manual_seed(1)
    vectors = seen(quantizer, z)
    begun = vectors[torch.randperm(len(vectors))[:V]]
    project = F.normalize if kind is CosineQuantizer else lambda codes: codes
    torch.testing.assert_close(quantizer.codebook.weight.detach(), kmeans(vectors, begun, project))
    if kind is CosineQuantizer:
        torch.testing.assert_close(quantizer.codebook.weight.norm(dim=1), torch.ones(V).double())


@kinds
def test_a_dead_code_comes_back_and_is_used(kind: Any) -> None:
    """Against the formula: N starts at 1, and follows the counts with decay 0.99."""
    quantizer = make(kind, revive=0.5)
    far = -100.0 * torch.ones(D).double()
    with torch.no_grad():
        quantizer.codebook.weight.copy_(torch.rand(V, D))
        quantizer.codebook.weight[4] = far
    N, z = torch.ones(V).double(), latents(0).abs()
    for step in range(1, 200):
        before = quantizer.codebook.weight.detach().clone()
        q = quantizer(z)
        N = USAGE_DECAY * N + (1 - USAGE_DECAY) * torch.bincount(q.indices.flatten(), minlength=V)
        dead = N < 0.5
        N = torch.where(dead, 0.5, N)
        assert int(quantizer.update()["revived"]) == int(dead.sum())
        torch.testing.assert_close(quantizer.revival.N, N)
        moved = (quantizer.codebook.weight != before).any(1)
        assert torch.equal(moved, dead), step
        if dead[4]:
            break
    assert 60 < step < 80  # 0.99^69 is below 0.5
    revived = quantizer.codebook.weight[4]
    assert torch.cdist(revived[None], seen(quantizer, z)).min() < 1e-7
    assert (quantizer(z).indices == 4).any()


@kinds
def test_the_gradient_is_that_without_revival(kind: Any) -> None:
    plain, living = make(kind), make(kind, revive=0.1, init="latents")
    grads = []
    for quantizer in (plain, living):
        z = latents(0).requires_grad_()
        q = quantizer(z)
        grads.append(torch.autograd.grad((q.latents * latents(1)).sum() + q.loss, [z, quantizer.codebook.weight]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@kinds
def test_a_loaded_codebook_goes_on_where_it_was(kind: Any) -> None:
    options = {"revive": 8.0, "init": "latents"}
    quantizer, other = make(kind, **options), make(kind, **options)
    for step in range(30):
        quantizer(latents(step))
        quantizer.update()
    other(latents(77))  # of an aborted step
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    revived = 0
    for step in range(30, 90):
        for each in (quantizer, other):
            torch.manual_seed(step)
            each(latents(step))
            revived += int(each.update()["revived"])
    assert revived
    assert all(
        torch.equal(a, b) for a, b in zip(quantizer.state_dict().values(), other.state_dict().values(), strict=True)
    )


def train(part: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    results = {}
    for kind in KINDS:
        for start in ("latents", "kmeans"):
            quantizer = make(kind, revive=4.0, init=start)
            revived = 0
            for step in range(50):
                torch.manual_seed(step + 1000 * comm.rank())  # each rank has its own random state
                quantizer(part(latents(step)))
                revived += int(quantizer.update()["revived"])
            name = f"{kind.__name__} {start}"
            results |= {f"{name} {key}": each.detach() for key, each in quantizer.state_dict().items()}
            results[f"{name} revived"] = torch.tensor(revived)
    return results


def of_two() -> dict[str, Tensor]:
    return train(lambda batch: batch.chunk(2)[comm.rank()])


def test_two_processes_have_the_codebook_of_one_with_the_whole_batch() -> None:
    first = compare_with_alone(of_two, train(lambda batch: batch))
    for key, value in first.items():
        assert not key.endswith("revived") or int(value) > 0
