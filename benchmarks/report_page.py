"""How large the report's page is, how long it takes to write, and how soon a reader sees it: python -m benchmarks.report_page.

Studies made up by the tests, with sharpness and signals, whose runs train, collapse, explode and turn NaN; each page is opened in
headless Chromium, a fresh context each time, and the median of the loads is kept:

    first_paint_s   until the browser has painted something: the heading and the verdicts
    ready_s         until filters answer, and what is in view is drawn
    filter_s        from a click on a recipe until what is in view is drawn again
    draw_all_s      until every figure of the page is drawn, as before printing

Writes benchmarks/results/report-page.json.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from exmy.report import render
from tests.report_page import STUDY, full_tree
from train.provenance import device_name

RESULT = Path("benchmarks/results/report-page.json")
STUDIES: dict[str, dict[str, int]] = {
    "48 runs, 300 steps": {"recipes": 4, "rates": 4, "seeds": 3, "steps": 300},
    "480 runs, 1000 steps": {"recipes": 8, "rates": 6, "seeds": 10, "steps": 1000},
    "5040 runs, 1000 steps": {"recipes": 8, "rates": 21, "seeds": 30, "steps": 1000},
}
LOADS = 5
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
READY = "performance.getEntriesByName('exmy-ready')[0].startTime / 1000"
TIMED = "(() => {{ const from = performance.now(); {what} return (performance.now() - from) / 1000; }})()"
FILTER = TIMED.format(what="document.querySelectorAll('.chip')[1].click();")
DRAW = TIMED.format(what="for (const frame of frames.values()) show(frame);")


def timed(browser: Any, path: Path) -> dict[str, float]:
    """One load of the page, in seconds."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    page.wait_for_function("[...frames.values()].every(frame => !frame.near || !frame.stale)")
    asked = {"first_paint_s": PAINTED, "ready_s": READY, "filter_s": FILTER, "draw_all_s": DRAW}
    found = {name: float(page.evaluate(script)) for name, script in asked.items()}
    context.close()
    return found


def main() -> None:
    """Measure each study, and write the file."""
    import torch
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "no Chromium on the PATH"
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        for name, size in STUDIES.items():
            tree = full_tree(**size)
            began = time.perf_counter()
            page = render([(STUDY, tree)])
            seconds = time.perf_counter() - began
            path = Path(folder) / "index.html"
            path.write_text(page, encoding="utf-8")
            loads = [timed(browser, path) for _ in range(LOADS)]
            medians = {key: round(statistics.median(load[key] for load in loads), 3) for key in loads[0]}
            rows[name] = {"bytes": path.stat().st_size, "render_s": round(seconds, 3)} | medians
        version = browser.version
        browser.close()
    result = {
        "command": "python -m benchmarks.report_page", "cpu": device_name(torch.device("cpu")), "cores": os.cpu_count(),
        "python": platform.python_version(), "chromium": version, "loads": LOADS, "load_average": list(os.getloadavg()),
        "studies": rows,
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
