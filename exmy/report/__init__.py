"""The report: a study, or two side by side, as one HTML page that needs nothing else, and its figures for papers."""

from exmy.report.command import run_report
from exmy.report.page import render, write_report

__all__ = ["render", "run_report", "write_report"]
