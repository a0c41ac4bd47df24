"""Stage 1: the surrogate loss has the gradient of the full loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tests.support.composing import compose
from vqf.batch import Batch
from vqf.distributed.engine import make_engine
from vqf.errors import UserError
from vqf.pipelines.stage1 import Stage1
from vqf.registry import build
from vqf.training.gan import GANModule, check_discriminator_input
from vqf.training.tokenizer_task import TokenizerTask, build_tokenizer_task

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


def stage(*overrides: str) -> TokenizerTask:
    config = compose(*TINY, *overrides)
    data = build("data", config.data, image_size=16, seed=0)
    built = build_tokenizer_task(config, data, make_engine(config))
    for module in built.modules.values():
        module.double()
    return built


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.double) * 2 - 1


def naive_gradients(built: TokenizerTask, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """Equations 5 to 7 in one graph, as the reference computes them."""
    out = built.model(x)
    x_hat = out.reconstructions
    reconstruction = (x_hat - x).abs().mean() + 0.5 * (x_hat - x).square().mean()
    fooling = -built.gan(x_hat).mean()
    last = built.model.last_layer.weight
    (a,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (b,) = torch.autograd.grad(fooling, last, retain_graph=True)
    weight = 0.4 * float((a.norm() / (b.norm() + 1e-4)).clamp(0, 1e4))
    (reconstruction + weight * fooling + out.quantized.loss).backward()
    gradients = {name: p.grad.clone() for name, p in built.model.named_parameters()}
    built.model.zero_grad()
    built.gan.zero_grad()
    return gradients, weight


def gradients_of_step(built: TokenizerTask, step: int, x: torch.Tensor, monkeypatch: Any) -> tuple[dict, dict, dict]:
    seen: dict[str, dict[str, torch.Tensor]] = {}
    for name, optimizer in built.optimizers.items():
        module = built.modules[name]

        def keep(*_: object, name: str = name, module: torch.nn.Module = module) -> None:
            seen[name] = {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}

        monkeypatch.setattr(optimizer, "step", keep)
    log = built.step(step, Batch(images=x))
    return seen.get("model", {}), seen.get("discriminator", {}), log


def test_the_surrogate_has_the_gradients_of_the_full_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    built, x = stage(), images()
    expected, weight = naive_gradients(built, x)
    got, _, log = gradients_of_step(built, 2, x, monkeypatch)
    assert float(log["gan_weight"]) == pytest.approx(weight, rel=1e-9)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_the_discriminator_learns_from_its_own_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    built, x = stage(), images()
    fake = built.model(x).reconstructions.detach()
    real_logits, fake_logits = built.gan(torch.cat([x, fake])).chunk(2)
    loss = 0.5 * ((1 - real_logits).clamp(min=0).mean() + (1 + fake_logits).clamp(min=0).mean())
    expected = torch.autograd.grad(loss, list(built.gan.parameters()))
    _, got, log = gradients_of_step(built, 2, x, monkeypatch)
    assert float(log["d_loss"]) == pytest.approx(float(loss.detach()), rel=1e-9)
    for gradient, mine in zip(expected, got.values(), strict=True):
        torch.testing.assert_close(mine, gradient, rtol=1e-9, atol=1e-12)


def test_nothing_of_the_discriminator_happens_before_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    built = stage()

    def never(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the discriminator was asked")

    monkeypatch.setattr(built.gan, "forward", never)
    log = built.step(1, Batch(images=images()))
    assert "gan_weight" not in log
    with pytest.raises(AssertionError, match="was asked"):
        built.step(2, Batch(images=images()))


def test_accumulation_of_a_plain_loss_equals_the_full_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    full, micro = stage("accumulate=1"), stage("accumulate=4")
    micro.model.load_state_dict(full.model.state_dict())
    expected, _, _ = gradients_of_step(full, 0, images(), monkeypatch)
    got, _, _ = gradients_of_step(micro, 0, images(), monkeypatch)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("quantizer", ["ema", "gumbel", "vq"])
@pytest.mark.parametrize("overrides", [["accumulate=4"], ["model.adversary.refresh_fakes=true"]], ids=str)
def test_a_quantizer_updates_its_own_state_once_a_step(quantizer: str, overrides: list[str]) -> None:
    """However many micro-batches there are, and forwards for the discriminator."""
    options = {"gumbel": ["model.quantizer.anneal_steps=10"], "vq": ["model.quantizer.revive=0.1"]}
    words = [f"model/quantizer={quantizer}", *options.get(quantizer, [])]
    plain, other = stage(*words), stage(*words, *overrides)
    if quantizer == "ema":  # which would start at the first of the micro-batches
        for each in (plain, other):
            each.model.quantizer.initialized.fill_(True)
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
    built = build_tokenizer_task(config, data, make_engine(config))
    log = built.step(5, Batch(images=images().float()))
    assert all(torch.isfinite(value) for value in log.values())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["image_size=16", "batch_size=4", "model.discriminator.layers=5"], "cannot process 4 images of 16 x 16 px"),
        (["image_size=16", "model.discriminator.layers=5"], "choose model.discriminator.layers below 5, or a larger"),
        (["batch_size=1", "model.discriminator.layers=4"], "choose model.discriminator.layers below 4, or a larger"),
        (["accumulate=4", "model.discriminator.layers=4"], "cannot process 1 images"),
    ],
)
def test_a_discriminator_that_does_not_fit_is_refused_before_the_first_step(overrides: list[str], words: str) -> None:
    config = compose("model=small", "model.adversary.start=10000", "image_size=16", "batch_size=4", *overrides)
    data = build("data", config.data, image_size=config.image_size, seed=0)
    with pytest.raises(UserError) as caught:
        build_tokenizer_task(config, data, make_engine(config))
    assert str(caught.value).startswith("model.discriminator: ") and words in str(caught.value)


def test_batch_norm_of_a_single_value_is_refused_too() -> None:
    config, built = compose(*TINY, "batch_size=1"), stage()
    one = GANModule(
        nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4)),  # type: ignore[arg-type]
        built.gan.adversary,
        {},
    )
    with pytest.raises(UserError, match=r"its batch norm needs several values; raise batch_size, or set model\.disc"):
        check_discriminator_input(one, config, 3)
    check_discriminator_input(one, compose(*TINY, "batch_size=2"), 3)


def test_the_check_on_blank_images_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    checked, noise = stage(), torch.rand(1)
    monkeypatch.setattr("vqf.training.tokenizer_task.check_discriminator_input", lambda *_: None)
    plain = stage()
    assert torch.equal(noise, torch.rand(1))
    for name, each in plain.gan.state_dict().items():
        assert torch.equal(each, checked.gan.state_dict()[name]), name


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.adversary.start=50"], "steps=4: the discriminator starts at step 51, so it is never trained"),
        (
            ["model.adversary.start=1", "model.adversary.warmup=3"],
            "steps=4: the discriminator is trained from step 2, but",
        ),
        (["model.adversary.start=1", "model.adversary.warmup=2"], None),
    ],
)
def test_a_discriminator_that_is_never_active_is_a_warning(
    overrides: list[str], words: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = ["logger=[]", "metric=[]", "evaluate.count=4"]
    Stage1(compose(*TINY, *quiet, "steps=4", *overrides), tmp_path).run()
    said = [each.getMessage() for each in caplog.records if each.getMessage().startswith("steps=4")]
    assert [line[: len(words or "")] for line in said] == ([words] if words else [])


def test_the_log_shows_the_last_penalty() -> None:
    """Most log lines fall on steps without one: a line every 50 steps, a penalty every 16."""
    built = stage("+model/regularizer=[r1]", "model.regularizer.r1.every=4", "model.adversary.start=0")
    shown = [float(built.step(step, Batch(images=images()))["r1"]) for step in range(10)]
    assert all(shown)
    assert shown[0] == shown[1] == shown[3] != shown[4] == shown[7] != shown[8]
    x, built = images().requires_grad_(), stage("+model/regularizer=[r1]", "model.adversary.start=0")
    (gradient,) = torch.autograd.grad(built.gan(x).sum(), x)
    expected = float(gradient.square().sum((1, 2, 3)).mean() / 2)
    assert shown[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["~model/adversary"], "model.discriminator and model.adversary go together: choose both, or null for both"),
        (["accumulate=3"], "accumulate=3 must divide batch_size=4"),
        (["model/loss=[]"], "model.loss: a tokenizer needs at least one loss, model/loss=[l1]"),
    ],
)
def test_configs_that_cannot_be_trained(overrides: list[str], words: str) -> None:
    config = compose("model=small", "image_size=16", "batch_size=4", *overrides)
    data = build("data", config.data, image_size=16, seed=0)
    with pytest.raises(UserError) as caught:
        build_tokenizer_task(config, data, make_engine(config))
    assert str(caught.value) == words


def test_unknown_engine_and_precision() -> None:
    config: DictConfig = compose(*TINY)
    for key, value, words in [
        ("engine", "ddpp", "engine=ddpp: unknown engine 'ddpp'. Did you mean 'ddp'? Known: auto, single, ddp, fsdp2."),
        ("engine", "ddp", "engine=ddp: start it with torchrun --nproc-per-node 2 -m vqf.run ..., or use engine=auto"),
        ("precision", "fp8", "precision=fp8: unknown precision 'fp8'. Known: fp32, tf32, bf16."),
    ]:
        changed = OmegaConf.merge(config, {key: value})
        with pytest.raises(UserError) as caught:
            make_engine(changed)
        assert str(caught.value) == words
