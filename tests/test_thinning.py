"""Thinned curves keep what a picture is for: every extreme, at most a bucket beside its step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from exmy.thinning import thinned

NAN = float("nan")


def test_by_hand() -> None:
    steps = np.arange(8.0)
    curve = np.array([[1.0, 5.0, 2.0, 3.0, 9.0, 0.0, 4.0, 4.0], [3.0, 1.0, NAN, 2.0, NAN, NAN, NAN, np.inf]])
    x, y = thinned(steps, curve, 4)
    np.testing.assert_array_equal(x, [0, 2, 4, 6])
    np.testing.assert_array_equal(y, [[1, 5, 9, 0], [3, 1, NAN, NAN]])


def test_a_short_curve_is_left_as_it_is() -> None:
    steps, curve = np.arange(5.0), np.array([[1.0, NAN, 3.0, np.inf, 2.0]])
    x, y = thinned(steps, curve, 5)
    np.testing.assert_array_equal(x, steps)
    np.testing.assert_array_equal(y, curve)


@pytest.mark.parametrize("at", [0, 1, 499, 731, 999])
def test_a_spike_of_one_step_is_seen_where_it_is(at: int) -> None:
    curve = np.full((1, 1000), 2.0)
    curve[0, at] = 7.0
    x, y = thinned(np.arange(1000.0), curve, 100)
    assert y.max() == 7
    assert abs(x[y[0].argmax()] - at) < 20  # a bucket is 20 steps


@settings(max_examples=60)
@given(
    curve=st.integers(1, 300).flatmap(
        lambda n: arrays(np.float64, (2, n), elements=st.floats(-1e3, 1e3) | st.just(NAN))
    ),
    points=st.integers(2, 80),
)
def test_extremes_stay_and_points_are_few(curve: np.ndarray, points: int) -> None:
    x, y = thinned(np.arange(curve.shape[1], dtype=np.float64), curve, points)
    assert y.shape == (2, x.size)
    assert x.size <= max(points, 2)
    assert np.all(np.diff(x) > 0)
    for before, after in zip(curve, y, strict=True):
        assert np.isnan(after).all() == np.isnan(before).all()
        if not np.isnan(before).all():
            assert np.nanmin(after) == np.nanmin(before)
            assert np.nanmax(after) == np.nanmax(before)
