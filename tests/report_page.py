"""A report as a test reads it, and made-up studies that have everything a report shows."""

from __future__ import annotations

import base64
import gzip
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import xarray as xr

from tests.test_figure import RECIPES, make_tree
from train import Study

STUDY = Study.model_validate({"name": "first-look", "axes": {"recipe": ["e8m7", "e4m3"], "learning_rate": [1e-3]}})
TENSORS = ("h.0.attn.qkv", "h.0.mlp.fc", "lm_head")
ROLES = ("activation", "weight", "gradient")
RINGS = 60  # the step at which the one run that diverges among healthy ones gives a sign
LONELY = {"recipe": "e8m1", "learning_rate": 4e-3, "seed": 0}  # that run


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.blocks: dict[str, str] = {}
        self.code, self.style, self.words = "", "", ""
        self._block: str | None = None
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in {"meta", "br", "input", "line", "link", "img"}:
            self.open.append(tag)
        self._block = given.get("id") if tag == "script" and "type" in given else None

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"line"}:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._block and self.open[-1] == "script":
            self.blocks[self._block] = self.blocks.get(self._block, "") + data
        elif self.open and self.open[-1] == "script":
            self.code += data
        elif self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.words += data

    @property
    def content(self) -> Any:
        """What the figures are drawn from."""
        text = gzip.decompress(base64.b64decode(self.blocks["content"])).decode()
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def numbers(held: dict[str, Any]) -> Any:
    """What the page reads: base64 of little-endian FP32, in its shape."""
    return np.frombuffer(base64.b64decode(held["f4"]), "<f4").reshape(held["shape"])


def loudest(tree: xr.DataTree) -> xr.DataTree:
    """The tree as the digest of a study of alarms has it: of all layers the largest signal alone."""
    signals = tree["signals"].to_dataset()
    tree["signals"] = xr.DataTree(signals.max([dim for dim in signals.dims if dim not in ("run", "signal_step")]))
    tree.attrs |= {"digest_every": 10}
    return tree


def stretched(tree: xr.DataTree, times: int) -> xr.DataTree:
    """The same study, each of its steps so many times as late."""
    for name, steps in (("history", "step"), ("sharpness", "probe_step"), ("signals", "signal_step")):
        data = tree[name].to_dataset()
        tree[name] = xr.DataTree(data.assign_coords({steps: times * data[steps].values}))
    tree["history"]["last_step"] = times * tree["history"]["last_step"]
    tree["summary"]["diverged_step"] = times * tree["summary"]["diverged_step"]
    return tree


def with_coordinates(tree: xr.DataTree) -> xr.DataTree:
    """The made-up study with what `open_study` gives besides."""
    tree.attrs |= {"runs_planned": tree["summary"].sizes["run"], "device": "none"}
    return tree


def full_tree(seeds: int = 12, **how: Any) -> xr.DataTree:
    """A study with sharpness and signals. e8m1's only diverged run has an attention logit of 99 from step `RINGS` on; others 1.

    The quantisation error of a recipe's tensor and role is (recipe + 1) (seed + 1) 2^-(tensor + 1) 4^-role / 100, at each step.
    """
    tree = with_coordinates(make_tree(**({"recipes": 4, "rates": 4, "seeds": seeds} | how)))
    summary = tree["summary"].to_dataset()
    coordinates = {str(name): of for name, of in summary.coords.items()}
    count, probes, ticks = summary.sizes["run"], np.arange(0, 301, 50), np.arange(0, 300, 10)
    sharpness = np.linspace(0.1, 0.2, count)[:, None, None] * np.ones((count, probes.size, 2))
    tree["sharpness"] = xr.DataTree(
        xr.Dataset(
            {"logit_sharpness": (("run", "probe_step", "epsilon"), sharpness)},
            coordinates | {"probe_step": probes, "epsilon": [5e-4, 1e-3]},
        )
    )
    logit = np.ones((count, ticks.size, 2))
    lonely = np.logical_and.reduce([summary[name].values == value for name, value in LONELY.items()])
    logit[np.outer(lonely, ticks >= RINGS), 1] = 99.0
    place = np.array([RECIPES.index(name) for name in summary["recipe"].values.tolist()])
    of_run = (place + 1.0) * (summary["seed"].values + 1.0) / 100
    error = of_run[:, None, None, None] * np.ones((ticks.size, 1, 1))
    error = error * 0.5 ** (np.arange(len(TENSORS))[:, None] + 1) * 0.25 ** np.arange(len(ROLES))
    where = ("run", "signal_step", "tensor", "role")
    tree["signals"] = xr.DataTree(
        xr.Dataset(
            {"attention_logit": (("run", "signal_step", "block"), logit), "quantization_error": (where, error)}
            | {"clipped": (where, error / 10)},
            coordinates | {"signal_step": ticks, "block": [0, 1], "tensor": list(TENSORS), "role": list(ROLES)},
        )
    )  # fmt: skip
    return tree
