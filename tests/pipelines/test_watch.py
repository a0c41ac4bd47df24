"""Alarms: raised when a condition holds, once, and again only after it has gone."""

import pytest

from vqf.pipelines.watch import ALARMS, PATIENCE, Watch

BAD = {"discriminator": 0.0, "gan_weight": 1e4, "validation/usage": 0.05, "perplexity": 1.2}
GOOD = {"discriminator": 0.9, "gan_weight": 1.0, "validation/usage": 0.95, "perplexity": 300.0}


@pytest.mark.parametrize("key", BAD)
def test_each_alarm_names_an_option(key: str) -> None:
    watch = Watch()
    said = [watch.look(step, {key: BAD[key]}) for step in range(PATIENCE + 3)]
    assert [len(lines) for lines in said] == [0] * (PATIENCE - 1) + [1] + [0] * 3
    assert "model" in said[PATIENCE - 1][0] or "optimizer" in said[PATIENCE - 1][0]


def test_every_alarm_is_tried() -> None:
    assert {alarm.key for alarm in ALARMS} == set(BAD)


def test_good_numbers_are_quiet() -> None:
    watch = Watch()
    assert not any(watch.look(step, GOOD) for step in range(50))


def test_one_good_look_starts_the_count_again() -> None:
    watch = Watch()
    for step in range(20):
        values = GOOD if step % (PATIENCE - 1) == 0 else BAD
        assert not watch.look(step, {"perplexity": values["perplexity"]})


def test_an_alarm_comes_back_after_it_has_gone() -> None:
    watch = Watch()
    raised = [len(watch.look(0, {"perplexity": value})) for value in [1.0] * 6 + [100.0] * PATIENCE + [1.0] * 6]
    assert sum(raised) == 2
