"""The judge as a fixture, for other people's test suites; pytest finds it wherever exmy is installed.

    @pytest.mark.quantizer("e4m3fn", "e5m2", overflow="saturate")
    def test_my_kernel(verify_quantizer):
        verify_quantizer(my_kernel)

The marker names formats, one test each, and whatever else `verification.verify` takes; the fixture judges, fails the test
with the smallest counterexamples, and gives the report. What the call says goes before what the marker says. A function that
needs to know the format finds it in `verify_quantizer.format`. Without a marker the call names the format.

    pytest --quantizer-level exhaustive            another level for all of them: the nightly run
    pytest --quantizer-certificates DIR            a certificate for each judgement

Scaled formats, FP64 and stochastic rounding have no exhaustive level; in such a run they are judged at the conditional one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from verification.report import Report

MARKER = "quantizer"
LEVELS = ("quick", "conditional", "exhaustive")


class QuantizerJudge:
    """What the fixture is: call it with a quantiser. format: the marker's, None without one."""

    def __init__(self, question: dict[str, Any], test: str, level: str | None, folder: Path | None) -> None:
        self.format: str | None = question.pop("format", None)
        self._question, self._test, self._level, self._folder = question, test, level, folder
        self.reports: list[Report] = []

    def __call__(self, quantizer: Callable[[Any], Any], format: str | None = None, **question: Any) -> Report:  # noqa: A002 RUF100
        """The report; VerificationError, which is an AssertionError, unless every law was kept. Arguments as in `verify`."""
        from verification.harness import strongest_level, verify

        asked = {**self._question, **question}
        name = format or self.format
        if name is None:
            raise ValueError("verify_quantizer needs a format: mark the test with quantizer('e4m3fn'), or give it here")
        if self._level:
            given = {word: asked[word] for word in ("input_dtype", "rounding") if word in asked}
            asked["level"] = strongest_level(name, self._level, **given)
        report = verify(quantizer, name, **asked)
        self.reports.append(report)
        if self._folder:
            self._keep(report)
        report.raise_for_failures()
        return report

    def _keep(self, report: Report) -> None:
        from verification.certificates import write_certificates

        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        words = [self._test, report.format, report.input_dtype, str(len(self.reports))]
        write_certificates([report], self._folder / (re.sub(r"[^\w.-]+", "-", "-".join(words)) + ".json"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the whole run."""
    group = parser.getgroup("exmy", "quantisers against the exact grid")
    group.addoption("--quantizer-level", choices=LEVELS, help="judge every quantiser at this level")
    group.addoption("--quantizer-certificates", metavar="DIR", type=Path, help="keep a certificate of every judgement")


def pytest_configure(config: pytest.Config) -> None:
    """The marker, for --strict-markers."""
    config.addinivalue_line("markers", f"{MARKER}(*formats, **question): judge a quantiser to these formats (exmy)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a format."""
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker and marker.args and "verify_quantizer" in metafunc.fixturenames:
        metafunc.parametrize("verify_quantizer", marker.args, indirect=True, ids=[str(name) for name in marker.args])


@pytest.fixture
def verify_quantizer(request: pytest.FixtureRequest) -> QuantizerJudge:
    """Judges a quantiser law by law; see `verification.pytest_plugin`."""
    marker = request.node.get_closest_marker(MARKER)
    question = dict(marker.kwargs) if marker else {}
    if getattr(request, "param", None) is not None:
        question["format"] = request.param
    options = request.config.option
    return QuantizerJudge(question, request.node.nodeid, options.quantizer_level, options.quantizer_certificates)
