"""The face of exmy: the command line, its tables and figures."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exmy.version import __version__

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    """Look the version up when it is asked for: nothing is imported before `python -m exmy` can catch a Ctrl-C."""
    if name == "__version__":
        from exmy.version import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
