"""The face of exmy: the command line, its tables and figures."""

from exmy.version import __version__

__all__ = ["__version__"]
