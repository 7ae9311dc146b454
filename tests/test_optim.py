"""The optimiser's factors by hand; that whole runs are torch.optim.AdamW's is `test_pack`'s."""

from __future__ import annotations

import math

import pytest
import torch

from tests.small import SHAPE
from train.optim import AdamW, Muon, Rule, factors, parameter_rules, squares, update
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
    """Without a gradient nothing else moves; a rate of twice the run's decays no faster."""
    weights = [torch.full((2, 1, 1), 8.0), torch.full((2, 1), 8.0), torch.full((2, 1, 1), 8.0)]
    zeros = [torch.zeros_like(p) for p in weights]
    config = AdamW(weight_decay=0.25)
    f = factors([torch.zeros(2)], torch.tensor([[0.5, 1.0]]), torch.tensor([0]), config)[1]
    kept = [Kept(z.clone(), z.clone()) for z in zeros]
    update(weights, [(z,) for z in zeros], kept, f, config, [Rule(), Rule(decays=False), Rule(factor=2.0)])
    assert [p.flatten().tolist() for p in weights] == [[7.0, 6.0], [8.0, 8.0], [7.0, 6.0]]


@pytest.mark.parametrize(
    ("words", "left_alone"),
    [
        ((), set()),
        (("gains",), {"h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f"}),
        (("embeddings",), {"wte", "wpe"}),
        (("head",), {"wte"}),
        (("embeddings", "head"), {"wte", "wpe"}),
    ],
)
def test_decay_leaves_alone_what_is_named_and_the_tied_head_is_an_embedding(
    words: tuple[str, ...], left_alone: set[str]
) -> None:
    for config in (AdamW(no_decay=words), Muon(no_decay=words)):
        rules = parameter_rules(SHAPE, config)
        assert rules.keys() == SHAPE.parameters().keys()
        assert {name for name, rule in rules.items() if not rule.decays} == left_alone


def test_muon_is_for_the_blocks_matrices_and_takes_queries_keys_and_values_apart() -> None:
    parts = {name: rule.parts for name, rule in parameter_rules(SHAPE, Muon()).items() if rule.parts}
    block = {"attn.qkv": (16, 16, 16), "attn.proj": (16,), "mlp.fc": (64,), "mlp.proj": (16,)}
    assert parts == {f"h.{i}.{name}": sizes for i in range(2) for name, sizes in block.items()}
    assert not any(rule.parts for rule in parameter_rules(SHAPE, AdamW()).values())


def test_a_parameters_factor_multiplies_its_rate_of_either_optimiser() -> None:
    """A step at twice the factor is one at twice the learning rate, but for its decay."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(1, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    for config, parts in ((AdamW(weight_decay=0.0), ()), (Muon(weight_decay=0.0), (4,))):
        results = []
        for rate, factor in ((0.02, 1.0), (0.01, 2.0)):
            w, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
            total = squares([(gradient,)])
            _, f = factors([total], torch.full((1, 1), rate).double(), torch.tensor([0]), config)
            kept = Kept(first, None if parts else second)
            update([w], [(gradient,)], [kept], f, config, [Rule(True, factor, parts)])
            results.append(w)
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)
        assert not torch.equal(results[0], start)
