"""Schedules against their values by hand."""

from __future__ import annotations

import math

import pytest

from train.schedules import learning_rates
from train.settings import TrainingSettings

# From step 4, the peak, to step 8: halfway between 1 and 0.2 at step 6; 0.5 (1 + cos(pi / 4)) of the way at step 5.
QUARTER = 0.2 + 0.8 * (0.5 + math.sqrt(0.125))


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("cosine", (1.0, QUARTER, 0.6, 1.2 - QUARTER, 0.2)),
        ("linear", (1.0, 0.8, 0.6, 0.4, 0.2)),
        ("constant", (1.0, 1.0, 1.0, 1.0, 1.0)),
        ("wsd", (1.0, 1.0, 1.0, 0.6, 0.2)),  # the last 2 of 9 steps are below the peak
    ],
)
def test_a_warm_up_climbs_evenly_and_what_falls_ends_at_its_final_fraction(
    schedule: str, after: tuple[float, ...]
) -> None:
    [*rates] = zip(*learning_rates([1.0, 4.0], 9, 4, schedule, 0.2, 0.25), strict=True)
    assert rates[0] == pytest.approx((0.25, 0.5, 0.75, 1.0, *after), rel=1e-12)
    assert rates[1] == pytest.approx([4 * rate for rate in rates[0]], rel=1e-12)
    assert rates[0][-1] == after[-1]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_one_step_after_the_warm_up_is_the_last_and_has_the_final_fraction(schedule: str) -> None:
    """The peak is the warm-up's last step's already."""
    assert learning_rates([1.0], 5, 4, schedule, 0.1, 0.2)[:, 0].tolist() == [0.25, 0.5, 0.75, 1.0, 0.1]


@pytest.mark.parametrize(("schedule", "only"), [("cosine", 1.0), ("linear", 1.0), ("constant", 1.0), ("wsd", 0.1)])
def test_of_a_single_step_cosine_and_linear_have_the_peak(schedule: str, only: float) -> None:
    assert learning_rates([1.0], 1, 0, schedule, 0.1).tolist() == [[only]]


def test_a_constant_schedule_stays_at_the_peak() -> None:
    assert learning_rates([2.0], 5, 2, "constant", 0.1).tolist() == [[1.0], [2.0], [2.0], [2.0], [2.0]]


def test_a_decay_over_all_steps_is_the_linear_schedule_one_step_on() -> None:
    """wsd's first step of decay is below the peak already; linear starts at the peak."""
    wsd = learning_rates([1.0], 8, 0, "wsd", 0.0, 1.0)
    linear = learning_rates([1.0], 9, 0, "linear", 0.0)
    assert [rate for (rate,) in wsd] == pytest.approx([rate for (rate,) in linear[1:]], rel=1e-12)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule must be cosine, linear, constant or wsd, got 'sine'"):
        learning_rates([1.0], 5, 2, "sine", 0.1)


def test_a_decay_that_reaches_into_the_warm_up_is_refused_with_the_most_there_is_room_for() -> None:
    assert TrainingSettings(steps=300, warmup=50, schedule="wsd", decay_fraction=0.833).decay_fraction == 0.833
    with pytest.raises(
        ValueError, match=r"decay_fraction must leave the warm-up its 50 of 300 steps, got 0.9; at most 0.833"
    ):
        TrainingSettings(steps=300, warmup=50, schedule="wsd", decay_fraction=0.9)
    assert TrainingSettings(steps=300, warmup=50, decay_fraction=0.9).schedule == "cosine"  # which has no such decay
