"""The prior, with the weights of the reference's GPT, alone and inside its `Net2NetTransformer`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.comparisons import compares, gradients
from tests.parity.mapping import from_gpt
from tests.parity.peers import taming
from tests.support.layouts import raster
from vqf.tokens.prefix import PrefixSpec
from vqf.transformers.gpt import GPT
from vqf.transformers.samplers.autoregressive import AutoregressiveSampler

V, N, M = 23, 12, 4  # codes, tokens of an image, of a prefix
LAYOUT = raster((3, 4), V)
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 32}


def pair(dtype: torch.dtype, prefix: int = M, unmasked: int = 0, **options: Any) -> tuple[Any, GPT]:
    """Build both sides. The reference has one table for codes and conditions, so ours shares it too."""
    theirs = taming("modules.transformer.mingpt").GPT(V, prefix + N - 1, **SIZES, n_unmasked=unmasked)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    options |= {"unmasked_prefix": unmasked, "shared_vocabulary": True}
    ours = GPT(LAYOUT, PrefixSpec(V, prefix), layers=3, heads=4, dim=32, **options).to(dtype)
    ours.load_state_dict(from_gpt(theirs.to(dtype).state_dict()))
    return theirs.eval(), ours.eval()


def sequences() -> tuple[Tensor, Tensor]:
    return torch.randint(V, (5, N)), torch.randint(V, (5, M))


@compares("prior `gpt`", "taming `GPT`", "logits", "loss")
@compares("prior `gpt`", "taming `GPT`", "gradients of all weights", exact=True)
@pytest.mark.parametrize("unmasked", [0, 2, M])
def test_logits(dtype: torch.dtype, unmasked: int, record: Any) -> None:
    """Tokens behind a prefix: causal, and with two or all four tokens of the prefix seeing each other."""
    theirs, ours = pair(dtype, unmasked=unmasked)
    tokens, prefix = sequences()
    expected = theirs(torch.cat((prefix, tokens), dim=1)[:, :-1])[0][:, M - 1 :]
    loss = nn.functional.cross_entropy(expected.reshape(-1, V), tokens.reshape(-1))
    loss.backward()
    found = ours.loss(tokens, prefix)
    found.backward()
    record("logits", ours(tokens, prefix), expected)
    record("loss", found, loss)
    record("gradients of all weights", gradients(ours), from_gpt(gradients(theirs)))


@compares("prior `gpt` with its cache", "taming `forward_with_past`", "logits of every token")
@pytest.mark.parametrize("unmasked", [0, M])
def test_cache(dtype: torch.dtype, unmasked: int, record: Any) -> None:
    """One token at a time: keys and values in one buffer, against the reference's growing list of them."""
    theirs, ours = pair(dtype, unmasked=unmasked)
    tokens, prefix = sequences()
    expected, _, present = theirs.forward_with_past(prefix)
    logits, cache = ours.prefill(prefix)
    record("logits of every token", logits, expected[:, -1:])
    past = [present]
    for n in range(N - 1):
        expected, _, present = theirs.forward_with_past(tokens[:, n, None], past=past, past_length=M + n)
        past.append(present)
        record("logits of every token", ours.decode(tokens[:, n : n + 1], cache), expected[:, -1:])


@compares("sampler `autoregressive`", "taming `sample_with_past`", "the likeliest tokens")
@pytest.mark.parametrize("cache", [True, False])
def test_greedy(dtype: torch.dtype, cache: bool, record: Any) -> None:
    """`top_k=1` against the reference's sampling of the best token, with and without our cache."""
    theirs, ours = pair(dtype)
    _, prefix = sequences()
    peer = taming("modules.transformer.mingpt")
    expected = peer.sample_with_past(prefix, theirs, steps=N, sample_logits=False)
    record("the likeliest tokens", AutoregressiveSampler(top_k=1, cache=cache)(ours, prefix, LAYOUT, seed=0), expected)


@compares("prior `gpt` with pkeep", "taming `Net2NetTransformer`", "loss of corrupted tokens")
@compares("prior `gpt` with pkeep", "taming `Net2NetTransformer`", "gradients of all weights", exact=True)
def test_pkeep(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, record: Any) -> None:
    """Half of the tokens kept, the others replaced, by one draw for both; targets stay clean, prefixes whole."""
    theirs, ours = pair(dtype, pkeep=0.5)
    model = net2net(theirs)
    model.pkeep = 0.5
    tokens, prefix = sequences()
    draw, replacements = torch.rand(tokens.shape), torch.randint(V, tokens.shape)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: draw)
    monkeypatch.setattr(torch, "bernoulli", lambda p: (draw < p).to(p))
    monkeypatch.setattr(torch, "randint_like", lambda *_, **__: replacements)
    logits, target = model.train()(tokens, prefix)
    assert torch.equal(target, tokens)
    loss = nn.functional.cross_entropy(logits.reshape(-1, V), target.reshape(-1))
    loss.backward()
    found = ours.train().loss(tokens, prefix)
    found.backward()
    monkeypatch.undo()
    assert not torch.isclose(found, ours.eval().loss(tokens, prefix), rtol=1e-3)
    record("loss of corrupted tokens", found, loss)
    record("gradients of all weights", gradients(ours), from_gpt(gradients(theirs)))


def net2net(transformer: Any) -> Any:
    """Build a Net2NetTransformer around a GPT, on tokens: its own way of encoding is compared in test_stage2."""
    model = taming("models.cond_transformer").Net2NetTransformer.__new__(
        taming("models.cond_transformer").Net2NetTransformer
    )
    taming("models.cond_transformer").pl.LightningModule.__init__(model)
    model.transformer = transformer
    model.encode_to_z = model.encode_to_c = lambda tokens: (None, tokens)
    return model


def test_initial_weights_have_the_same_spread() -> None:
    theirs = taming("modules.transformer.mingpt").GPT(512, 16, n_layer=2, n_head=4, n_embd=128)
    ours = GPT(raster((1, 13), 512), PrefixSpec(512, 4), layers=2, heads=4, dim=128, shared_vocabulary=True)
    expected = from_gpt(theirs.state_dict())
    for name, parameter in ours.named_parameters():
        assert parameter.shape == expected[name].shape
        assert parameter.std().item() == pytest.approx(expected[name].std().item(), rel=0.05), name
