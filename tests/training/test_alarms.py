"""Alarms: raised once while a condition holds, again after it has cleared; their messages name options that exist."""

from typing import Any

import pytest

from tests.support.composing import compose
from vqf.config.settings import check_config
from vqf.training.alarms import GAN_PATIENCE, PATIENCE, AlarmMonitor, build_alarms

BAD = {
    "discriminator wins": {"d_loss": 0.0},
    "discriminator knows nothing": {"logits_real": 0.003, "logits_fake": -0.002, "d_loss": 0.9975},
    "adaptive weight": {"gan_weight": 1e4},
    "codes die": {"usage_vs_chance": 0.05, "usage": 0.05},
    "collapse": {"perplexity": 1.2},
}
GOOD = {
    "d_loss": 0.9,
    "gan_weight": 1.0,
    "logits_real": 0.3,
    "logits_fake": -0.2,
    "usage_vs_chance": 0.95,
    "usage": 0.1,
    "perplexity": 300.0,
}


def make_monitor(*words: str) -> AlarmMonitor:
    return AlarmMonitor(build_alarms(compose("model=vqgan", *words).model))


def raised(values: dict[str, float], *words: str) -> list[str]:
    monitor = make_monitor(*words)
    return [line for step in range(PATIENCE) for line in monitor.check(step, values)]


@pytest.mark.parametrize("name", BAD)
def test_each_alarm_is_raised_once_and_names_an_option(name: str) -> None:
    monitor = make_monitor()
    patience = GAN_PATIENCE if name == "discriminator knows nothing" else PATIENCE
    messages = [monitor.check(step, BAD[name]) for step in range(patience + 3)]
    assert [len(lines) for lines in messages] == [0] * (patience - 1) + [1] + [0] * 3
    assert "model." in messages[patience - 1][0] or "optimizer." in messages[patience - 1][0]


def test_every_alarm_is_tested() -> None:
    assert {alarm.name for alarm in make_monitor().alarms} == set(BAD)


def test_good_values_raise_nothing() -> None:
    monitor = make_monitor()
    assert not any(monitor.check(step, GOOD) for step in range(50))


def test_a_run_without_a_discriminator_has_no_gan_alarms() -> None:
    values = {key: value for each in BAD.values() for key, value in each.items()}
    assert len(raised(values, "model.discriminator=null", "model.adversary=null")) == 2


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["model/quantizer=lfq"], "raise model.quantizer.diversity or model.quantizer.entropy"),
        (["model/quantizer=lfq"], "or fewer codes with model.quantizer.dim"),
        (["model/quantizer=residual_rqvae"], "model.quantizer.base.revive=0.09"),
        (["model/quantizer=residual_rqvae"], "or fewer codes with model.quantizer.base.codebook_size"),
        (["model/quantizer=vq"], "model.quantizer.revive=0.03 model.quantizer.init=kmeans"),
        (["model/quantizer=ema"], "model.quantizer.revive=0.09 model.quantizer.init=kmeans"),
        (["model/quantizer=ema", "model.quantizer.init=kmeans"], "model.quantizer.revive=0.09, or"),
        (["model/quantizer=gumbel"], "raise model.quantizer.kl_weight"),
    ],
)
def test_the_hint_for_dead_codes_names_an_option_of_the_quantizer(words: list[str], hint: str) -> None:
    (line,) = raised(BAD["codes die"], *words)
    assert hint in line
    assert "model/quantizer=ema" not in line
    options = [word.rstrip(",") for word in line.split() if word.startswith("model.quantizer.") and "=" in word]
    check_config(compose("model=vqgan", *words, *options))  # they exist


@pytest.mark.parametrize(
    ("words", "weight", "message"),
    [
        (["model.adversary.max_weight=10"], 8.0, "at its limit, model.adversary.max_weight=10:"),
        (["model.adversary.max_weight=10"], 7.9, None),
        ([], 999.0, None),
        ([], 1001.0, "above 1,000: the discriminator gives almost no gradient. Train it longer before its loss counts"),
        (["model.adversary.adaptive=false", "model.adversary.weight=2000"], 2000.0, None),
    ],
)
def test_the_adaptive_weight_at_its_limit(words: list[str], weight: float, message: str | None) -> None:
    lines: list[Any] = raised({"gan_weight": weight}, "model.adversary.weight=0.8", *words)
    assert [message in line for line in lines] == ([True] if message else [])


def test_one_good_observation_resets_the_count() -> None:
    monitor = make_monitor()
    for step in range(20):
        values = GOOD if step % (PATIENCE - 1) == 0 else BAD["collapse"]
        assert not monitor.check(step, {"perplexity": values["perplexity"]})


def test_an_alarm_is_raised_again_after_its_condition_has_cleared() -> None:
    monitor = make_monitor()
    messages = [len(monitor.check(0, {"perplexity": value})) for value in [1.0] * 6 + [100.0] * PATIENCE + [1.0] * 6]
    assert sum(messages) == 2
