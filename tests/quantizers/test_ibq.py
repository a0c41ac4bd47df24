"""IBQ against its formula with all latents by all codes, whatever the chunk; and its memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.processes import run_processes
from vqf.distributed import comm
from vqf.quantizers.ibq import IndexBackpropagationQuantizer

V, D = 40, 6


def latents(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, D, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(**options: float) -> IndexBackpropagationQuantizer:
    torch.manual_seed(0)
    chosen = {"entropy_temperature": 0.5, **options}
    return IndexBackpropagationQuantizer(dim=D, codebook_size=V, **chosen).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [1, 3 * V, 2**24])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_follows_the_formula_with_gradients_to_all_codes(chunk: int, epsilon: float) -> None:
    ours = make(beta=0.4, entropy=0.3, entropy_epsilon=epsilon)
    ours.chunk = chunk
    z, onward = latents().requires_grad_(), latents(1)
    q = ours(z)
    found = torch.autograd.grad((q.latents * onward).sum() + q.loss, [z, ours.codebook.weight])

    E = ours.codebook.weight
    logits = torch.einsum("bdhw,nd->bhwn", z, E)
    p, hard = logits.softmax(-1), F.one_hot(logits.argmax(-1), V).double()
    expected, e = ((each @ E).movedim(-1, 1) for each in (hard - p.detach() + p, hard))
    log_p = (logits / 0.5).log_softmax(-1).reshape(-1, V)
    mean = log_p.exp().mean(0)
    entropy = -(log_p.exp() * log_p).sum(1).mean() + (mean * (mean + epsilon).log()).sum()
    terms = (expected - z).square().mean() + (e.detach() - z).square().mean() + 0.4 * (e - z.detach()).square().mean()
    loss = terms + 0.3 * entropy
    assert torch.equal(q.indices, logits.argmax(-1))
    torch.testing.assert_close(q.latents, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(q.loss, loss, rtol=1e-9, atol=1e-12)
    for mine, other in zip(found, torch.autograd.grad((expected * onward).sum() + loss, [z, E]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    assert (found[1].abs().sum(1) > 0).all(), "codes that were not chosen have a gradient, too"


@pytest.mark.parametrize("training", [True, False])
def test_never_holds_all_latents_by_all_codes(training: bool) -> None:
    quantizer = make()
    quantizer.chunk = 4 * V
    largest = [0]

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim == 2 and V in out.shape and D not in out.shape:
                largest[0] = max(largest[0], out.numel())
            return out

    with Record(), torch.set_grad_enabled(training):
        q = quantizer.train(training)(latents().requires_grad_())
        if training:
            q.loss.backward()
    assert largest[0] == 4 * V


def test_without_gradients_codes_are_the_same() -> None:
    quantizer = make()
    with_gradients = quantizer(latents())
    with torch.no_grad():
        q = quantizer(latents())
    assert torch.equal(q.indices, with_gradients.indices) and torch.equal(q.latents, with_gradients.latents)


def outcome(part: slice) -> dict[str, Tensor]:
    quantizer = make(entropy=0.3)
    z = latents(batch=4)[part]
    q = quantizer(z)
    (gradient,) = torch.autograd.grad(q.loss, quantizer.codebook.weight)
    return {
        "gradient": comm.all_reduce_mean(gradient),
        "loss": comm.all_reduce_mean(q.loss.detach()),
        "perplexity": q.stats["perplexity"],
    }


def of_two() -> dict[str, Tensor]:
    return outcome(slice(2 * comm.rank(), 2 * comm.rank() + 2))


def test_two_processes_have_the_statistics_of_one_with_the_whole_batch() -> None:
    alone = outcome(slice(None))
    for found in run_processes(2, of_two):
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=key)
