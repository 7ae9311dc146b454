"""What `landscape` raises."""

from __future__ import annotations


class LandscapeError(ValueError):
    """A question about a landscape that has no answer as put: one line with the value, the limit and the mend."""
