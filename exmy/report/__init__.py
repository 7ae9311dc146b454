"""The report: a study, or two side by side, as one HTML page that needs nothing else, and its figures for papers."""

from exmy.report.page import render, write_report

__all__ = ["render", "write_report"]
