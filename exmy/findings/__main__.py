"""`python -m exmy.findings`."""

from __future__ import annotations

from exmy.findings.make import main

main()
