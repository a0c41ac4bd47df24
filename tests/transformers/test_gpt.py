"""The GPT prior: its formulas, its cache against full passes, and training on small data."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from tests.support.layouts import raster
from vqf.protocols import Causal
from vqf.registry import RegistryError, build
from vqf.tokens.prefix import PrefixSpec
from vqf.transformers.gpt import GPT
from vqf.transformers.layers.kv_cache import FullAttention
from vqf.transformers.samplers.autoregressive import AutoregressiveSampler

V, N, P, M = 11, 9, 5, 3  # vocabulary and length of tokens and prefix
LAYOUT, PREFIX = raster((3, 3), V), PrefixSpec(P, M)


def tiny(**options: object) -> GPT:
    """A GPT in float64 and eval mode whose weights are large enough that every input matters."""
    torch.manual_seed(0)
    gpt = GPT(LAYOUT, PREFIX, **{"layers": 2, "heads": 2, "dim": 16, **options}).double().eval()
    for parameter in gpt.parameters():
        nn.init.normal_(parameter, std=0.5)
    return gpt


def sequences(batch: int = 4, length: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (batch, length), generator=generator), torch.randint(P, (batch, M), generator=generator)


def hidden(gpt: GPT, tokens: Tensor, prefix: Tensor) -> Tensor:
    """The output of the last block at every position, the prefix included."""
    outputs: list[Tensor] = []
    hook = gpt.blocks[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    gpt(tokens, prefix)
    hook.remove()
    return outputs[0]


def inputs_of(module: nn.Module, call: Callable[[], object]) -> list[Tensor]:
    """The inputs of a module while a function runs."""
    captured: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0].clone()))
    call()
    hook.remove()
    return captured


@pytest.mark.parametrize("unmasked_prefix", [False, True, 2])
def test_a_token_never_changes_the_logits_up_to_it(unmasked_prefix: bool | int) -> None:
    gpt = tiny(unmasked_prefix=unmasked_prefix)
    tokens, prefix = sequences()
    logits = gpt(tokens, prefix)
    assert logits.shape == (4, N, V)
    for n in range(N):
        other = tokens.clone()
        other[:, n] = (other[:, n] + 1) % V
        changed = (gpt(other, prefix) != logits).any(-1)
        assert not changed[:, : n + 1].any()
        assert changed[:, n + 1 :].all()


def test_the_prefix_changes_all_logits() -> None:
    gpt = tiny()
    tokens, prefix = sequences()
    for m in range(M):
        other = prefix.clone()
        other[:, m] = (other[:, m] + 1) % P
        assert (gpt(tokens, other) != gpt(tokens, prefix)).any(-1).all()


@pytest.mark.parametrize(("unmasked_prefix", "seen"), [(False, 1), (1, 1), (2, 2), (True, 3), (3, 3)])
def test_unmasked_prefix_positions_see_each_other(unmasked_prefix: bool | int, seen: int) -> None:
    gpt = tiny(unmasked_prefix=unmasked_prefix)
    tokens, prefix = sequences()
    before = hidden(gpt, tokens, prefix)
    for m in range(M):
        other = prefix.clone()
        other[:, m] = (other[:, m] + 1) % P
        changed = (hidden(gpt, tokens, other) != before).any(-1)
        assert changed[:, m:].all()
        assert changed[:, :m].all() if m < seen else not changed[:, :m].any()


@pytest.mark.parametrize("unmasked_prefix", [False, True, 2])
@pytest.mark.parametrize("shared_vocabulary", [False, True])
def test_cached_logits_equal_uncached_at_every_position(unmasked_prefix: bool | int, shared_vocabulary: bool) -> None:
    gpt = tiny(unmasked_prefix=unmasked_prefix, shared_vocabulary=shared_vocabulary)
    tokens, prefix = sequences()
    logits, cache = gpt.prefill(prefix)
    cached = [logits, *(gpt.decode(tokens[:, n : n + 1], cache) for n in range(N - 1))]
    torch.testing.assert_close(torch.cat(cached, dim=1), gpt(tokens, prefix), rtol=1e-12, atol=1e-12)


def test_fewer_tokens_give_the_same_logits() -> None:
    gpt = tiny()
    tokens, prefix = sequences()
    torch.testing.assert_close(gpt(tokens[:, :4], prefix), gpt(tokens, prefix)[:, :4], rtol=1e-12, atol=1e-12)
    unknown = torch.cat((tokens[:, :3], torch.full((4, 1), -1)), dim=1)
    assert torch.equal(gpt(unknown, prefix), gpt(tokens[:, :4], prefix))  # the last one is not read


def test_a_gpt_is_causal_and_refuses_what_it_has_no_position_for() -> None:
    gpt = tiny()
    assert isinstance(gpt, Causal)
    assert gpt.groups == (1,) * N and gpt.likelihood
    tokens, prefix = sequences(length=N + 1)
    _, cache = gpt.prefill(prefix)
    for n in range(N - 1):
        gpt.decode(tokens[:, n : n + 1], cache)
    with pytest.raises(ValueError, match="full: the prior models 9 tokens"):
        gpt.decode(tokens[:, N:], cache)
    with pytest.raises(ValueError, match="N from 1 to 9"):
        gpt(tokens, prefix)
    with pytest.raises(ValueError, match=r"prefix must be \(4, 3\)"):
        gpt(tokens[:, :N], prefix[:, :2])
    with pytest.raises(ValueError, match=r"prefix must be \(4, 3\)"):
        gpt.prefill(prefix[:, :2])


def test_the_loss_is_the_mean_nats_per_token() -> None:
    gpt = tiny()
    tokens, prefix = sequences()
    logits = gpt(tokens, prefix)
    pairs = zip(logits.reshape(-1, V), tokens.flatten(), strict=True)
    nats = [-(row[token] - row.exp().sum().log()) for row, token in pairs]
    torch.testing.assert_close(gpt.loss(tokens, prefix), torch.stack(nats).mean(), rtol=1e-12, atol=1e-12)


def test_a_fresh_gpt_knows_nothing_and_every_parameter_learns() -> None:
    torch.manual_seed(0)
    gpt = GPT(LAYOUT, PREFIX, layers=2, heads=2, dim=64)
    tokens, prefix = sequences(64)
    loss = gpt.loss(tokens, prefix)
    assert loss.item() == pytest.approx(torch.tensor(V).log().item(), abs=0.05)
    loss.backward()
    silent = [name for name, each in gpt.named_parameters() if each.grad is None or not each.grad.any()]
    assert all(name.endswith("key.bias") for name in silent)  # softmax undoes what it adds, up to rounding


def test_the_initial_weights_are_those_of_minGPT() -> None:  # noqa: N802
    torch.manual_seed(0)
    gpt = GPT(raster((3, 3), 512), PREFIX, layers=2, heads=2, dim=128)
    for module in gpt.modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            assert module.eps == 1e-5
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.numel() > 10_000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.03)  # five deviations at 16384 weights
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert (module.bias == 0).all()
    assert (gpt.position_embedding == 0).all()
    assert gpt.head.bias is None
    assert gpt.head.weight is not gpt.token_embedding.weight


def test_pkeep_replaces_inputs_by_uniform_codes_and_leaves_targets_and_prefix_alone() -> None:
    gpt = tiny(pkeep=0.6, shared_vocabulary=True).train()
    tokens, prefix = sequences(2000)
    losses: list[Tensor] = []
    seen_prefix, seen = inputs_of(gpt.token_embedding, lambda: losses.append(gpt.loss(tokens, prefix)))
    assert torch.equal(seen_prefix, prefix)

    count = seen.numel()
    same = (seen == tokens[:, :-1]).double().mean().item()
    expected = 0.6 + 0.4 / V
    assert same == pytest.approx(expected, abs=5 * (expected * (1 - expected) / count) ** 0.5)
    replaced = seen[seen != tokens[:, :-1]]
    shares = torch.bincount(replaced, minlength=V) / len(replaced)
    steps = (replaced - tokens[:, :-1][seen != tokens[:, :-1]]) % V  # from 1 to V - 1, each as likely
    step_shares = torch.bincount(steps, minlength=V)[1:] / len(steps)
    deviation = (0.1 * 0.9 / len(replaced)) ** 0.5
    assert (shares - 1 / V).abs().max() < 5 * deviation
    assert (step_shares - 1 / (V - 1)).abs().max() < 5 * deviation

    log_p = gpt.eval()(torch.cat((seen, tokens[:, -1:]), dim=1), prefix).log_softmax(-1)
    by_hand = -log_p.gather(-1, tokens[..., None]).mean()
    torch.testing.assert_close(losses[0], by_hand, rtol=1e-12, atol=1e-12)


def test_pkeep_is_for_training_only() -> None:
    gpt = tiny(pkeep=0.0)
    tokens, prefix = sequences()
    [seen] = inputs_of(gpt.token_embedding, lambda: gpt.loss(tokens, prefix))
    assert torch.equal(seen, tokens[:, :-1])


def test_dropout_acts_in_training_only() -> None:
    gpt = tiny(dropout=0.3)
    tokens, prefix = sequences()
    assert torch.equal(gpt(tokens, prefix), gpt(tokens, prefix))
    gpt.train()
    assert not torch.equal(gpt(tokens, prefix), gpt(tokens, prefix))


def test_attention_weights_are_dropped_too() -> None:
    attention = tiny(dropout=0.5).blocks[0].attention.train()
    attention.residual_dropout.eval()
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    assert not torch.equal(attention(x, FullAttention()), attention(x, FullAttention()))


def test_a_shared_vocabulary_embeds_condition_k_like_code_k() -> None:
    gpt = tiny(shared_vocabulary=True)
    tokens, prefix = sequences()
    before = gpt(tokens, prefix)
    assert "prefix_embedding.weight" not in gpt.state_dict()
    with torch.no_grad():
        gpt.token_embedding.weight[2] += 1
    conditioned = (prefix == 2).any(1)
    assert 0 < conditioned.sum() < len(prefix)
    changed = (gpt(tokens, prefix)[:, 0] != before[:, 0]).any(-1)
    assert torch.equal(changed, conditioned)


def test_it_learns_eight_sequences_by_heart() -> None:
    torch.manual_seed(0)
    tokens, prefix = torch.randint(V, (8, N)), torch.arange(8)[:, None]
    gpt = GPT(LAYOUT, PrefixSpec(8, 1), layers=2, heads=2, dim=32)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for _ in range(200):
        optimizer.zero_grad()
        loss = gpt.loss(tokens, prefix)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    sampler = AutoregressiveSampler(top_k=1)
    assert torch.equal(sampler(gpt.eval(), prefix, LAYOUT, seed=0), tokens)


def test_bf16_autocast_trains_and_samples() -> None:
    torch.manual_seed(0)
    gpt = GPT(LAYOUT, PREFIX, layers=2, heads=2, dim=32, unmasked_prefix=True)
    tokens, prefix = sequences()
    exact = gpt.loss(tokens, prefix)
    with torch.autocast("cpu", torch.bfloat16):
        loss = gpt.loss(tokens, prefix)
        loss.backward()
        gpt.eval()
        logits, cache = gpt.prefill(prefix)
        cached = torch.cat([logits, *(gpt.decode(tokens[:, n : n + 1], cache) for n in range(N - 1))], dim=1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    assert all(each.grad.isfinite().all() for each in gpt.parameters())
    assert cache.kv_caches[0].keys.dtype == torch.bfloat16
    torch.testing.assert_close(cached.float(), gpt(tokens, prefix), rtol=0, atol=0.02 * cached.abs().max().item())


def test_the_loss_of_a_bf16_model_is_summed_in_float32() -> None:
    gpt, (tokens, prefix) = tiny().bfloat16(), sequences()
    loss = gpt.loss(tokens, prefix)
    by_hand = -gpt(tokens, prefix).double().log_softmax(-1).gather(-1, tokens[..., None]).mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 3}, "heads=3 must divide dim=16; the nearest dim that fits is 15"),
        ({"unmasked_prefix": 4}, "unmasked_prefix must be from 0 to 3"),
        ({"unmasked_prefix": "all"}, "unmasked_prefix=all: must be true or false or an integer of at least 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], words: str) -> None:
    node = {"name": "gpt", "layers": 1, "heads": 2, "dim": 16, **options}
    with pytest.raises(RegistryError, match=words) as caught:
        build("prior", node, layout=LAYOUT, prefix=PREFIX)
    assert "\n" not in str(caught.value)


def test_a_shared_vocabulary_needs_room_for_the_prefix() -> None:
    with pytest.raises(ValueError, match="the prefix has 12 ids and the codebook only 11"):
        GPT(LAYOUT, PrefixSpec(12, M), layers=1, heads=2, dim=16, shared_vocabulary=True)


def test_a_prior_needs_something_to_start_from() -> None:
    with pytest.raises(ValueError, match="at least one prefix token"):
        GPT(LAYOUT, PrefixSpec(P, 0), layers=1, heads=2, dim=16)


# Published counts. taming-transformers shares the vocabulary. Three of its configs have one position more than is
# ever read, which vqf leaves out: a block of 512 for 256 + 256 tokens, of 348 for 92 + 256.
@pytest.mark.parametrize(
    ("preset", "wired", "unread", "count"),
    [
        ({"prior": "gpt", "layers": 24, "heads": 16, "dim": 1024}, (1024, 1024, 256), 1, 304_932_864),
        ({"prior": "gpt", "layers": 40, "heads": 16, "dim": 1408}, (8192, 8192, 92), 1, 975_876_352),
        ({"prior": "gpt", "layers": 36, "heads": 16, "dim": 1536}, (8192, 8192, 92), 1, 1_045_638_144),
        ({"prior": "gpt_ffhq"}, (1024, 1, 1), 0, 801_798_400),
        ({"prior": "gpt_cin"}, (16384, 1000, 1), 0, 1_410_640_896),
    ],
)
def test_published_sizes(preset: dict, wired: tuple[int, ...], unread: int, count: int) -> None:
    numbers = [f"model.prior.{key}={value}" for key, value in preset.items() if key != "prior"]
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base=None):
        prior = compose(overrides=[f"+model/prior={preset['prior']}", *numbers, "model.prior.shared_vocabulary=true"])
    codes, *prefix = wired
    with torch.device("meta"):
        gpt = build("prior", prior.model.prior, layout=raster((16, 16), codes), prefix=PrefixSpec(*prefix))
    parameters = list(gpt.parameters())
    assert sum(each.numel() for each in parameters) + unread * prior.model.prior.dim == count
    assert len(parameters) == 16 * prior.model.prior.layers + 5


def test_presets_say_what_they_reproduce_and_carry_their_own_numbers() -> None:
    folder = Path(__file__).parents[2] / "conf" / "model" / "prior"
    presets = sorted(folder.glob("*.yaml"))
    assert {"gpt_cin", "gpt_ffhq", "gpt_small"} <= {each.stem for each in presets}
    assert all(each.read_text().startswith("# ") for each in presets)
    with initialize_config_dir(str(folder.parents[1]), version_base=None):
        small = compose(overrides=["+model/prior=gpt_small", "model.prior.heads=4"]).model.prior
    gpt = build("prior", small, layout=raster((16, 16), 1024), prefix=PrefixSpec(1, 1))
    assert (len(gpt.blocks), gpt.blocks[0].attention.heads, gpt.norm.weight.numel()) == (6, 4, 256)
