"""The version of the installed distribution."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("exmy")
except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
