"""Bootstrapped intervals of means."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from vqf.metrics.running_mean import RunningMean, bootstrap_interval


def test_the_interval_is_that_of_scipys_bootstrap() -> None:
    values = np.random.default_rng(4).exponential(size=80)
    interval = bootstrap_interval(values)
    reference = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    width = reference.confidence_interval.high - reference.confidence_interval.low
    assert interval == pytest.approx(tuple(reference.confidence_interval), abs=width / 20)
    assert bootstrap_interval(values) == interval


def test_it_holds_the_mean_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,000 samples of a known mean, all but about 5 % have it in their interval: percentiles are a bit narrow."""
    monkeypatch.setattr("vqf.metrics.running_mean.RESAMPLES", 400)
    random = np.random.default_rng(0)
    covered = [low < 3 < high for low, high in (bootstrap_interval(random.normal(3, 2, size=60)) for _ in range(1000))]
    assert 0.91 < np.mean(covered) < 0.97


def test_a_means_interval_does_not_depend_on_the_batches() -> None:
    full, batched, values = RunningMean("cpu"), RunningMean("cpu"), torch.rand(50)
    full.update(values)
    for batch in values.split(7):
        batched.update(batch)
    assert full.interval() == batched.interval() == bootstrap_interval(values.double().numpy())
    assert all(map(math.isnan, RunningMean("cpu").interval()))
