"""The optimiser's factors by hand; that whole runs are torch.optim.AdamW's is `test_pack`'s."""

from __future__ import annotations

import math

import pytest
import torch

from train.optim import AdamW, Rule, factors, squares, update
from train.state import Kept


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (10.0, (1.0, 10 / 13.000001)),  # norms of 5 and 13
        (5.0, (5 / 5.000001, 5 / 13.000001)),
        (math.inf, (1.0, 1.0)),
    ],
)
def test_each_run_is_clipped_by_its_own_norm_over_all_its_gradients(clip: float, expected: tuple[float, float]) -> None:
    """Run 0 has (3, 4), run 1 (5, 12): one number in each of two groups, the second in two parts."""
    first = squares([(torch.tensor([[3.0], [5.0]], dtype=torch.float64),)])
    second = squares([(torch.tensor([[1.0], [20.0]]).double(), torch.tensor([[3.0], [-8.0]]).double())])
    rates = torch.tensor([[9.0, 9.0], [2.0, 3.0]], dtype=torch.float64)
    norms, f = factors([first, second], rates, torch.tensor([1]), AdamW(0.9, 0.95, 1e-8, 0.1, clip))
    assert norms.tolist() == [5.0, 13.0]
    assert f.clip.tolist() == pytest.approx(expected, rel=1e-12)
    assert f.decay.tolist() == pytest.approx([0.2, 0.3], rel=1e-12)
    assert f.rate.tolist() == pytest.approx([2 / 0.19, 3 / 0.19], rel=1e-12)  # 1 - 0.9^2
    assert f.correction.tolist() == pytest.approx([math.sqrt(0.0975)], rel=1e-12)  # 1 - 0.95^2


def test_bias_corrections_keep_their_digits_in_fp32() -> None:
    """1 - 0.9999^1 has four digits of FP32's seven left, taken in FP32."""
    squares_R = torch.ones(1)
    for done, exact in ((0, 1e-4), (1, 1 - 0.9999**2)):
        f = factors([squares_R], torch.ones(2, 1), torch.tensor([done]), AdamW(beta2=0.9999))[1]
        assert float(f.correction) == pytest.approx(math.sqrt(exact), rel=2**-24)


def test_decay_shrinks_what_decays_and_leaves_the_rest_alone() -> None:
    """Without a gradient nothing else moves; a rate of twice the run's decays twice as fast."""
    weights = [torch.full((2, 1, 1), 8.0), torch.full((2, 1), 8.0), torch.full((2, 1, 1), 8.0)]
    zeros = [torch.zeros_like(p) for p in weights]
    config = AdamW(weight_decay=0.25)
    f = factors([torch.zeros(2)], torch.tensor([[0.5, 1.0]]), torch.tensor([0]), config)[1]
    kept = [Kept(z.clone(), z.clone()) for z in zeros]
    update(weights, [(z,) for z in zeros], kept, f, config, [Rule(), Rule(decays=False), Rule(factor=2.0)])
    assert [p.flatten().tolist() for p in weights] == [[7.0, 6.0], [8.0, 8.0], [6.0, 4.0]]
