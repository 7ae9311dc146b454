"""The search for the largest stable learning rate, against made-up thresholds that are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.bisect import Edge, between, edge, filled, limits, nearest, next_rates, rate_at


def search(
    verdict: Callable[[int], bool], rates: list[int], points: int = 3, per_octave: int = 4, octaves: int = 8
) -> tuple[Edge, list[list[int]]]:
    """Round by round to the end: where the edge is found, and what each round tried."""
    within = limits(rates, per_octave, octaves)
    stable: dict[int, bool] = {}
    rounds = [filled(rates, points)]
    while rounds[-1]:
        assert not stable.keys() & set(rounds[-1]), "a rate is tried twice"
        assert all(within.lowest <= k <= within.highest for k in rounds[-1])
        stable |= {k: verdict(k) for k in rounds[-1]}
        rounds.append(next_rates(stable, points, within))
    return edge(stable), rounds[:-1]


@given(
    threshold=st.floats(-80, 20), low=st.integers(-60, -20), width=st.integers(0, 24), points=st.integers(1, 16),
    per_octave=st.sampled_from([1, 4, 8]),
)  # fmt: skip
@settings(max_examples=300)
def test_the_threshold_is_found_within_one_step_in_a_bounded_number_of_rounds(
    threshold: float, low: int, width: int, points: int, per_octave: int
) -> None:
    """A quarter octave where there are four steps to one; or it is said to lie beyond the limits."""
    rates = [low, low + width]
    found, rounds = search(lambda k: k <= threshold, rates, points, per_octave)
    within = limits(rates, per_octave, 8)
    assert found.monotone
    if threshold < within.lowest:
        assert (found.largest, found.beyond) == (None, "below")
    elif math.floor(threshold) >= within.highest:
        assert (found.largest, found.unstable, found.beyond) == (within.highest, None, "above")
    else:
        assert found.largest is not None
        assert found.largest <= threshold < found.largest + 1 == found.unstable
    # Doubling, from two octaves or the width; then (points + 1)-section of the whole of it.
    whole = 2 * 8 * per_octave + width
    expansions = math.ceil(math.log2(max(1, whole / (2 * per_octave)))) + 2
    sections = math.ceil(math.log(whole + 1) / math.log(points + 1)) + 1
    # Where none is stable: gaps of more than two octaves, half of the points at a time.
    gaps = math.ceil(whole / (2 * per_octave) / math.ceil(points / 2)) * 2 if found.largest is None else 0
    assert len(rounds) <= 1 + expansions + sections + gaps


@given(verdicts=st.lists(st.booleans(), min_size=130, max_size=130), points=st.integers(1, 16))
@settings(max_examples=300)
def test_any_verdicts_whatever_end_and_nothing_is_hidden(verdicts: list[bool], points: int) -> None:
    tried: dict[int, bool] = {}

    def verdict(k: int) -> bool:
        return tried.setdefault(k, verdicts[k + 65])

    found, rounds = search(verdict, [-24, -8], points)
    assert len(rounds) <= 20
    good = [k for k, stable in tried.items() if stable]
    assert found.highest == max(good, default=None)
    assert set(found.exceptions) == {k for k, stable in tried.items() if not stable and k < max(good, default=-99)}
    if found.largest is not None:
        assert all(tried[k] for k in tried if min(good) <= k <= found.largest)
        assert found.unstable is None or (found.unstable == found.largest + 1 and not tried[found.unstable])
        assert found.highest is None or found.beyond == "above" or tried[found.highest + 1] is False


def test_an_unstable_rate_among_stable_ones_is_an_exception_and_both_edges_are_found() -> None:
    """One seed in a hundred that fails at -20, of a threshold at -10."""
    found, _ = search(lambda k: k <= -10 and k != -20, [-32, -8], points=5)
    assert (found.largest, found.unstable, found.highest, found.exceptions) == (-21, -20, -10, (-20,))
    assert not found.monotone


def test_rates_too_low_to_train_are_exceptions_below() -> None:
    """Learning begins at -28: the search does not take those below for the edge."""
    found, _ = search(lambda k: -28 <= k <= -10, [-40, -4], points=5)
    assert (found.largest, found.unstable, found.highest) == (-10, -9, -10)
    assert found.exceptions == (-40,) or max(found.exceptions) < -28


def test_stable_rates_between_too_low_and_too_high_are_found() -> None:
    """Neither of the rates that the search begins with trains."""
    for points in (1, 2, 5, 8):
        found, _ = search(lambda k: -30 <= k <= -18, [-40, -8], points)
        assert (found.largest, found.unstable) == (-18, -17)
        assert -40 in found.exceptions


def test_more_points_take_fewer_rounds() -> None:
    counts = {points: len(search(lambda k: k <= -13, [-40, -8], points)[1]) for points in (1, 3, 7, 31)}
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    assert counts[1] > counts[3] > counts[31] == 1


def test_a_rate_is_the_nearest_double_to_a_power_of_two() -> None:
    with mpmath.workprec(200):
        for n in (1, 3, 4, 12, 64):
            for k in range(-90, 30):
                assert rate_at(k, n) == float(mpmath.mpf(2) ** (mpmath.mpf(k) / n))
    assert rate_at(-40, 4) == 2**-10
    assert [nearest(rate_at(k, 4), 4) for k in range(-80, 26)] == list(range(-80, 26))
    assert nearest(1e-3, 4) == -40
    assert rate_at(nearest(100.0, 4), 4) <= 100


@pytest.mark.parametrize(
    ("rates", "points", "expected"),
    [
        ([0, 16], 5, [0, 4, 8, 12, 16]),
        ([0, 16], 2, [0, 16]),
        ([0, 4, 16], 5, [0, 4, 8, 12, 16]),
        ([0, 2], 9, [0, 1, 2]),
        ([7], 9, [7]),
    ],
)
def test_a_round_is_filled_evenly(rates: list[int], points: int, expected: list[int]) -> None:
    assert filled(rates, points) == expected


def test_points_inside_are_inside_and_different() -> None:
    for width in range(1, 40):
        for points in range(1, 12):
            inside = between(0, width, points)
            assert len(inside) == len(set(inside)) == min(points, width - 1)
            assert all(0 < k < width for k in inside)
