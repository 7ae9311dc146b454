"""The benchmark of tensor cores, with a made-up card in place of one: what it measures, finds nearest, writes and draws."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import tensor_cores
from benchmarks.tensor_core_page import BEGIN, END, draw, tables, write_page
from benchmarks.tensor_cores import ALONE, FAST, PROMOTED, TensorCores, distance, read_options, run, scaled_mm, swept
from formats import float_format, quantize
from train.accumulate import NAMED, accumulated_product, parse_accumulation

CPU = torch.device("cpu")
CORES = TensorCores(CPU, torch.float32, 64)
WORDS = [*NAMED, "k32p14:toward_zero", "k32p14:nearest_even", "k16p14a13:toward_zero", "k32p13a12:toward_zero"]


def made_up(x: Tensor, w: Tensor, names: tuple[str, str], fast: bool, cores: TensorCores) -> Tensor:
    """A card that sums in chunks of 16; where it has few tiles, it cuts K in two parts."""
    parts = 2 if cores.padded == 0 and x.shape[1] >= 64 else 1
    accumulation = parse_accumulation("k16p14a13:toward_zero" if fast else "k16p14a13f128:toward_zero")
    assert accumulation is not None
    emin = [torch.tensor(2.0 ** float_format(name).emin) for name in names]
    sums = [
        accumulated_product(a[None], b[None], accumulation, *emin)[0]
        for a, b in zip(x.chunk(parts, 1), w.chunk(parts, 0), strict=True)
    ]
    return torch.stack(sums).sum(0).to(cores.output).float()


def small(*more: str) -> Namespace:
    return read_options(
        ["--out", "x.json", "--device", "cpu", "--largest", "512", "--size", "16", "--seeds", "2", *more]
    )


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_cores, "scaled_mm", made_up)
        patch.setattr(tensor_cores, "swept", lambda: WORDS)
        measured = run(small(), CORES)
    read: dict[str, Any] = json.loads(json.dumps(measured))
    return read


def test_the_sums_that_the_card_makes_are_found_nearest_and_equal_to_the_bit(content: dict[str, Any]) -> None:
    for measured in content["operands"].values():
        assert measured["K"] == [32, 64, 128, 256, 512]
        best = measured["nearest"][FAST][0]
        assert (best["accumulate"], best["max_log2_ratio"]) == ("k16p14a13:toward_zero", 0)
        assert best["same_bits"] == [1.0] * 5
        found = measured["nearest"][PROMOTED][0]  # not among the words, until the probes find it
        assert (found["accumulate"], found["same_bits"]) == ("k16p14a13f128:toward_zero", [1.0] * 5)
        assert measured["nearest"][FAST][-1]["same_bits"][-1] < 0.9
        assert measured["alone_same_bits"][FAST][0] == 1
        assert measured["alone_same_bits"][FAST][-1] < 1, "parts of K show"
        assert not measured["failed"]


def test_curves_are_relative_errors_with_their_spread(content: dict[str, Any]) -> None:
    measured = content["operands"]["e4m3fn x e4m3fn"]
    for curve in measured["curves"].values():
        assert all(
            low <= middle <= high for low, middle, high in zip(curve["min"], curve["median"], curve["max"], strict=True)
        )
    assert {FAST, PROMOTED, FAST + ALONE, PROMOTED + ALONE, "fp32", *WORDS} <= measured["curves"].keys()
    assert max(measured["curves"]["fp32"]["max"]) < 1e-6 < 3e-5 < min(measured["curves"][FAST]["min"])


def test_errors_and_distances_are_what_they_say() -> None:
    exact = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]], dtype=torch.float64)
    assert tensor_cores.relative_errors(exact.float() + torch.tensor([0.0, 1.0]), exact) == [0.2, 0.5]
    assert tensor_cores.summary([[1.0, 4.0, 2.0]]) == {"median": [2.0], "min": [1.0], "max": [4.0]}
    assert distance([1.0, 8.0], [2.0, 1.0]) == 3


def test_prefixes_are_continued_only_where_sums_can_be_interrupted() -> None:
    x, w = tensor_cores.operands(("e4m3fn", "e4m3fn"), [0, 1], 4, 256, CPU)
    for word in (*NAMED, "k64p14:nearest_even", "k128p12:toward_zero"):
        accumulation = parse_accumulation(word)
        assert accumulation is not None
        for K, y in tensor_cores.simulated(x, w, ("e4m3fn", "e4m3fn"), word, [32, 64, 128, 256]):
            assert torch.equal(y, accumulated_product(x[..., :K], w[:, :K], accumulation)), (word, K)


def test_pytorchs_own_call_is_made_rightly() -> None:
    """A CPU's `_scaled_mm` sums in FP32, so a product of few small integers is exact; its corner is what was asked for."""
    x, w = (torch.randint(-8, 9, size).float() for size in ((16, 32), (32, 24)))
    for names in tensor_cores.OPERANDS.values():
        a, b = (quantize(t, name) for t, name in zip((x, w), names, strict=True))
        for cores in (CORES, CORES._replace(padded=0)):
            assert torch.equal(scaled_mm(a, b, names, True, cores), a @ b)


def test_a_way_that_the_library_refuses_is_told_and_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(x: Tensor, w: Tensor, names: tuple[str, str], fast: bool, cores: TensorCores) -> Tensor:
        if not fast:
            raise RuntimeError("no such thing\nat all")
        return made_up(x, w, names, fast, cores)

    monkeypatch.setattr(tensor_cores, "scaled_mm", refusing)
    monkeypatch.setattr(tensor_cores, "swept", lambda: WORDS[:1])
    found = run(small("--largest", "64"), CORES)
    assert found["probes"][PROMOTED]["error"] == "RuntimeError: no such thing\nat all"
    measured = found["operands"]["e5m2 x e4m3fn"]
    assert measured["failed"] == dict.fromkeys((PROMOTED, PROMOTED + ALONE), "no such thing")
    assert measured["nearest"].keys() == {FAST, FAST + ALONE}
    tables(found)


def test_every_swept_word_is_one() -> None:
    parsed = [parse_accumulation(word) for word in swept()]
    assert None not in parsed
    assert len(set(parsed)) == len(parsed) > 50


def test_the_page_is_written_between_its_markers_from_the_json_alone(content: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_page(content, page)
    written = page.read_text()
    assert written.startswith(f"before\n{BEGIN}\n")
    assert written.endswith(f"{END}\nafter\n")
    assert "old" not in written
    curve = content["operands"]["e5m2 x e4m3fn"]["curves"][FAST]["median"]
    assert f"| 512 | {curve[-1]:.2e} | " in written
    assert "| fast accumulation | `k16p14a13:toward_zero` | 1.000 × | 100.00 % | 100.00 % |" in written
    assert "| fraction bits | 13 | 13 |" in written
    again = page.read_text()
    write_page(content, page)
    assert page.read_text() == again
    page.write_text("no markers")
    with pytest.raises(ValueError, match="tensor-cores: begin"):
        write_page(content, page)


def test_a_picture_is_drawn_with_or_without_a_card(content: dict[str, Any], tmp_path: Path) -> None:
    bare = json.loads(json.dumps(content))
    for measured in bare["operands"].values():
        for name in [name for name in measured["curves"] if "accumulation" in name]:
            del measured["curves"][name]
    for name, shown in (("card.png", content), ("bare.png", bare)):
        draw(shown, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_main_reads_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_cores, "swept", lambda: WORDS)
    out, page, plot = tmp_path / "r.json", tmp_path / "p.md", tmp_path / "p.png"
    page.write_text(f"{BEGIN}{END}")
    arguments = [
        "tensor_cores",
        "--out",
        str(out),
        "--device",
        "cpu",
        "--largest",
        "64",
        "--size",
        "16",
        "--seeds",
        "2",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    tensor_cores.main()
    measured = json.loads(out.read_text())
    assert measured["probes"] == {}
    assert measured["output"] is None
    assert measured["torch"] == torch.__version__
    monkeypatch.setattr("sys.argv", [*arguments, "--read", "--plot", str(plot), "--page", str(page)])
    monkeypatch.setattr(tensor_cores, "run", lambda *_: pytest.fail("measured again"))
    tensor_cores.main()
    assert plot.exists()
    assert "| 64 | " in page.read_text()


def test_a_k_below_32_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        small("--largest", "16")
    assert "--largest must be at least 32, got 16" in capsys.readouterr().err
