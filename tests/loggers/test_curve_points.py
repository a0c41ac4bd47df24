"""A curve of any length is few points: exact while it is short, then with every extreme and the right means."""

import tracemalloc
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqf.loggers.report import curve_points
from vqf.loggers.report.curve_points import MAX_BUCKETS, Curve

numbers = st.floats(-1e6, 1e6)


@given(st.lists(numbers, min_size=1, max_size=200), st.integers(1, 9))
def test_points_and_means_are_those_of_the_whole_curve(values: list[float], bins: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    with patch.object(curve_points, "MAX_BUCKETS", 8):
        curve = Curve(points)
        shown, means = curve.points, curve.means(bins)
    assert len(curve) == len(points) and curve.last == points[-1]
    assert set(shown) <= set(points) and shown == sorted(shown)
    assert shown[-1] == points[-1] and len(shown) <= 2 * 8 + 1
    assert {min(values), max(values)} <= {value for _, value in shown}
    assert len(means) <= bins and means == sorted(means, key=lambda point: point[0])
    assert sum(bucket.value_sum for bucket in curve.buckets) == pytest.approx(sum(values), abs=1e-6)
    if len(points) <= 8:
        assert shown == points
    if bins == 1:
        assert means[0] == pytest.approx(
            (sum(step for step, _ in points) / len(points), sum(values) / len(points)), abs=1e-6
        )


def test_a_spike_survives_a_million_points() -> None:
    curve = Curve((step, 100.0 if step == 123_457 else 1.0) for step in range(1_000_000))
    assert (123_457, 100.0) in curve.points
    assert len(curve) == 1_000_000 and len(curve.points) <= 2 * MAX_BUCKETS + 1


def test_memory_does_not_grow_with_the_length() -> None:
    peaks = []
    for count in (10_000, 80_000):
        tracemalloc.start()
        Curve((step, float(step)) for step in range(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
