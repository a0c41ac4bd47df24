"""Stage 1: the weight cut at the reconstruction is the gradient of the whole expression."""

from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from tests.composing import compose
from vqf.errors import UserError
from vqf.pipelines.engine import make_engine
from vqf.pipelines.stage1 import TokenizerStage, make_stage
from vqf.protocols import Batch
from vqf.registry import build

TINY = [
    "model=small",
    "data=emoji",
    "image_size=16",
    "batch_size=4",
    "steps=10",
    "model.encoder.channels=8",
    "model.encoder.dim=8",
    "model.decoder.channels=8",
    "model/quantizer=vq",
    "model.quantizer.dim=4",
    "model.quantizer.codebook_size=16",
    "model/loss=[l1,l2]",
    "model.loss.l2.weight=0.5",
    "model.discriminator.channels=8",
    "model.adversary.start=2",
    "model.adversary.ramp_steps=0",
]


def stage(*overrides: str) -> TokenizerStage:
    config = compose(*TINY, *overrides)
    data = build("data", config.data, image_size=16, seed=0)
    built = make_stage(config, data, make_engine(config))
    for module in built.modules.values():
        module.double()
    return built


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.double) * 2 - 1


def naive_gradients(built: TokenizerStage, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """Equations 5 to 7 in one graph, as the reference computes them."""
    out = built.model(x)
    x_hat = out.reconstructions
    reconstruction = (x_hat - x).abs().mean() + 0.5 * (x_hat - x).square().mean()
    fooling = -built.critic(x_hat).mean()
    last = built.model.last_layer.weight
    (a,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (b,) = torch.autograd.grad(fooling, last, retain_graph=True)
    weight = 0.4 * float((a.norm() / (b.norm() + 1e-4)).clamp(0, 1e4))
    (reconstruction + weight * fooling + out.quantized.loss).backward()
    gradients = {name: p.grad.clone() for name, p in built.model.named_parameters()}
    built.model.zero_grad()
    built.critic.zero_grad()
    return gradients, weight


def gradients_of_step(built: TokenizerStage, step: int, x: torch.Tensor, monkeypatch: Any) -> tuple[dict, dict, dict]:
    seen: dict[str, dict[str, torch.Tensor]] = {}
    for name, optimizer in built.optimizers.items():
        module = built.modules[name]

        def keep(*_: object, name: str = name, module: torch.nn.Module = module) -> None:
            seen[name] = {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}

        monkeypatch.setattr(optimizer, "step", keep)
    log = built.step(step, Batch(images=x))
    return seen.get("model", {}), seen.get("discriminator", {}), log


def test_the_cut_gives_the_gradients_of_the_whole_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    built, x = stage(), images()
    expected, weight = naive_gradients(built, x)
    got, _, log = gradients_of_step(built, 2, x, monkeypatch)
    assert float(log["gan_weight"]) == pytest.approx(weight, rel=1e-9)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_the_discriminator_learns_from_its_own_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    built, x = stage(), images()
    fake = built.model(x).reconstructions.detach()
    real_logits, fake_logits = built.critic(torch.cat([x, fake])).chunk(2)
    loss = 0.5 * ((1 - real_logits).clamp(min=0).mean() + (1 + fake_logits).clamp(min=0).mean())
    expected = torch.autograd.grad(loss, list(built.critic.parameters()))
    _, got, log = gradients_of_step(built, 2, x, monkeypatch)
    assert float(log["discriminator"]) == pytest.approx(float(loss), rel=1e-9)
    for gradient, mine in zip(expected, got.values(), strict=True):
        torch.testing.assert_close(mine, gradient, rtol=1e-9, atol=1e-12)


def test_nothing_of_the_discriminator_happens_before_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    built = stage()

    def never(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the discriminator was asked")

    monkeypatch.setattr(built.critic, "forward", never)
    log = built.step(1, Batch(images=images()))
    assert "gan_weight" not in log
    with pytest.raises(AssertionError, match="was asked"):
        built.step(2, Batch(images=images()))


def test_accumulation_of_a_plain_loss_is_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = stage("accumulate=1"), stage("accumulate=4")
    pieces.model.load_state_dict(whole.model.state_dict())
    expected, _, _ = gradients_of_step(whole, 0, images(), monkeypatch)
    got, _, _ = gradients_of_step(pieces, 0, images(), monkeypatch)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("quantizer", ["ema", "gumbel", "vq"])
@pytest.mark.parametrize("overrides", [["accumulate=4"], ["model.adversary.second_forward=true"]], ids=str)
def test_what_a_quantizer_moves_by_itself_it_moves_once_a_step(quantizer: str, overrides: list[str]) -> None:
    """However many micro-batches there are, and forwards for the discriminator."""
    options = {"gumbel": ["model.quantizer.anneal_steps=10"], "vq": ["model.quantizer.revive=0.1"]}
    words = [f"model/quantizer={quantizer}", *options.get(quantizer, [])]
    plain, other = stage(*words), stage(*words, *overrides)
    if quantizer == "ema":  # which would start at the first of the micro-batches
        for each in (plain, other):
            each.model.quantizer.started.fill_(True)
    for step in (2, 3, 4):
        other.modules["model"].load_state_dict(plain.modules["model"].state_dict())
        for each in (plain, other):
            torch.manual_seed(step)
            each.step(step, Batch(images=images()))
        moved = dict(plain.model.quantizer.named_buffers())
        for name, buffer in other.model.quantizer.named_buffers():
            torch.testing.assert_close(buffer, moved[name], rtol=1e-9, atol=1e-12, msg=name)
    if quantizer == "gumbel":
        assert int(other.model.quantizer.steps) == 3


def test_bf16_runs_and_stays_close() -> None:
    config = compose(*TINY, "precision=bf16")
    data = build("data", config.data, image_size=16, seed=0)
    built = make_stage(config, data, make_engine(config))
    log = built.step(5, Batch(images=images().float()))
    assert all(torch.isfinite(value) for value in log.values())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["~model/adversary"], "model.discriminator and model.adversary go together: choose both, or null for both"),
        (["accumulate=3"], "accumulate=3 must divide batch_size=4"),
        (["model/loss=[]"], "model.loss: a tokenizer needs at least one loss, model/loss=[l1]"),
    ],
)
def test_what_cannot_be_trained(overrides: list[str], words: str) -> None:
    config = compose("model=small", "image_size=16", "batch_size=4", *overrides)
    data = build("data", config.data, image_size=16, seed=0)
    with pytest.raises(UserError) as caught:
        make_stage(config, data, make_engine(config))
    assert str(caught.value) == words


def test_engine_words() -> None:
    config: DictConfig = compose(*TINY)
    for key, value, words in [
        ("engine", "ddpp", "engine=ddpp: unknown engine 'ddpp'. Did you mean 'ddp'? Known: auto, single, ddp, fsdp2."),
        ("engine", "ddp", "engine=ddp: start it with torchrun --nproc-per-node 2 -m vqf.run ..., or use engine=auto"),
        ("precision", "fp8", "precision=fp8: unknown precision 'fp8'. Known: fp32, bf16."),
    ]:
        changed = OmegaConf.merge(config, {key: value})
        with pytest.raises(UserError) as caught:
            make_engine(changed)
        assert str(caught.value) == words
