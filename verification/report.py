"""What a verification says: a report to read, and the certificate that it leaves, as JSON and as xarray."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from verification.laws import LAWS, Failure, Verdict

PROVES = {
    "quick": "right at some decision points and wherever Hypothesis looked; a search, no proof",
    "conditional": (
        "right at every decision point and at its neighbours in the input's dtype; "
        "a proof for all inputs only if the quantiser is monotone, which no list of points shows"
    ),
    "exhaustive": "right for every input of the dtype; a proof",
}
PROVES_OF_BLOCKS = {
    "quick": "right for some blocks and wherever Hypothesis looked; a search, no proof",
    "conditional": (
        "scales right on both sides of every step of their rule in every binade, elements at every decision point under these "
        "scales and at its neighbours; a proof only if scales and elements are monotone in their input"
    ),
}
PROVES_OF_CHANCE = {
    "quick": "no result but a neighbour, and no bias that 2^14 results at each of some points show; statistics, no proof",
    "conditional": "no result but a neighbour, and no bias that 2^18 results at each of some points show; statistics, no proof",
}
PROVES_OF_DECODERS = dict.fromkeys(PROVES, "right for every code; a proof")


@dataclass(frozen=True)
class Report:
    """What was checked and what failed, by law; `failures` lists the smallest inputs first, at most 100 of `failure_count`.

    checked and failure_count are of single inputs, of a scaled format its elements; the laws that compare results with each
    other have counts of their own. claimed: the rounding that the implementation says it has. asked: what it was judged by,
    "rounding", "overflow", "zero", "subnormals", and for scaled formats "rule". conventions: what the implementation was
    found to do where standards leave a choice. environment: versions and the state of the processor. question: what the
    caller asked for, "found" included, with takes, gives, bias and seconds; empty in certificates of before it was kept.
    """

    implementation: str
    version: str
    format: str
    claimed: str
    rounding: str
    overflow: str
    input_dtype: str
    device: str
    level: str
    proves: str
    checked: int
    failure_count: int
    failures: tuple[Failure, ...]
    laws: tuple[Verdict, ...]
    asked: Mapping[str, str]
    conventions: Mapping[str, str]
    environment: Mapping[str, str]
    question: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every law that applies was kept."""
        return not any(verdict.verdict == "fail" for verdict in self.laws)

    @property
    def broken(self) -> list[Verdict]:
        """The laws that were not."""
        return [verdict for verdict in self.laws if verdict.verdict == "fail"]

    def raise_for_failures(self) -> None:
        """VerificationError, with the first failures, unless it passed."""
        if not self.passed:
            raise VerificationError(str(self))

    def law(self, name: str) -> Verdict:
        """The verdict on the law of that name. KeyError, with those there are, for another."""
        for verdict in self.laws:
            if verdict.law == name:
                return verdict
        raise KeyError(f"no law {name!r}: there are {', '.join(LAWS)}")

    def to_dict(self) -> dict[str, Any]:
        """Everything in the report, numbers that JSON lacks as words; failures with the input as an exact rational."""
        content = asdict(self)
        for row, failure in zip(content["failures"], self.failures, strict=True):
            row["exact"] = str(failure.exact)
        for row, verdict in zip(content["laws"], self.laws, strict=True):
            row["sentence"], row["clause"] = LAWS[verdict.law].sentence, LAWS[verdict.law].clause
            if verdict.smallest:
                row["smallest"]["exact"] = str(verdict.smallest.exact)
        plain: dict[str, Any] = _plain(content)
        return plain

    def to_json(self) -> str:
        """A certificate: `to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Report:
        """The report of a certificate. KeyError or TypeError for what is none."""
        given = {f.name: content[f.name] for f in fields(Report) if f.name in content or f.name != "question"}
        given["failures"] = tuple(_failure(row) for row in given["failures"])
        given["laws"] = tuple(
            Verdict(row["law"], row["verdict"], row["checked"], row["failed"],
                    _failure(row["smallest"]) if row["smallest"] else None, row["note"])
            for row in given["laws"]
        )  # fmt: skip
        return Report(**given)

    def to_dataset(self) -> xr.Dataset:
        """verdict, checked, failed and counterexample on the dimension `law`; what was asked, found and where as attributes.

        Several reports in one dataset: `verification.matrix`.
        """
        return xr.Dataset(
            {
                "verdict": ("law", [v.verdict for v in self.laws]),
                "checked": ("law", [v.checked for v in self.laws], {"long_name": "inputs asked", "units": "1"}),
                "failed": ("law", [v.failed for v in self.laws], {"long_name": "inputs that break the law", "units": "1"}),
                "counterexample": ("law", [str(v.smallest or v.note) for v in self.laws]),
                "sentence": ("law", [LAWS[v.law].sentence for v in self.laws]),
                "clause": ("law", [LAWS[v.law].clause for v in self.laws]),
            },
            {"law": [v.law for v in self.laws]},
            {
                **{name: getattr(self, name) for name in (
                    "implementation", "version", "format", "claimed", "rounding",
                    "overflow", "input_dtype", "device", "level", "proves"
                )},
                **{f"asked_{name}": value for name, value in self.asked.items()},
                **{f"convention_{name}": value for name, value in self.conventions.items()},
                **self.environment,
            },
        )  # fmt: skip

    def __str__(self) -> str:
        what = f"{self.implementation}: {self.format} {self.rounding} {self.overflow} from {self.input_dtype}"
        if self.passed:
            return f"{what}: {self.checked} inputs right ({self.level}: {self.proves})"
        heading = f"{what}: {self.failure_count} of {self.checked} inputs wrong, the smallest first"
        return "\n  ".join([heading, *map(str, self.failures[:10]), *(f"breaks {verdict}" for verdict in self.broken)])


class VerificationError(AssertionError):
    """A quantiser is not what it says it is."""


def environment(device: str = "cpu") -> dict[str, str]:
    """Versions, processor, its instruction sets, and whether it flushes subnormals: what two certificates must share."""
    tiny = torch.tensor([2.0**-130], device=device)
    found = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_flags": _cpu_flags(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "flush_to_zero": str(bool((tiny * 0.5 == 0).item())),
        "denormals_are_zero": str(bool((tiny * 2.0**20 == 0).item())),
        "device": "cpu",
    }
    if device != "cpu":
        found |= {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    return found


@cache
def _processor() -> str:
    """The processor's model, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


@cache
def _cpu_flags() -> str:
    """The instruction sets that NumPy found."""
    extensions = np.show_config("dicts").get("SIMD Extensions", {})
    return " ".join([*extensions.get("baseline", []), *extensions.get("found", [])])


def _failure(row: Mapping[str, Any]) -> Failure:
    numbers = {name: float(row[name]) for name in ("input", "got", "expected")}
    block = tuple(float(x) for x in row["block"])
    return Failure(**numbers, input_bits=row["input_bits"], law=row["law"], note=row["note"],
                   decision_point=row["decision_point"], block=block)  # fmt: skip


def _plain(content: Any) -> Any:
    """With words for the numbers that JSON lacks."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, float) and not np.isfinite(content):
        return str(content)
    return content
