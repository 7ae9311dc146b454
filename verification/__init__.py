"""Proves a quantiser, ours or anyone's, against the exact grid."""

from verification.harness import Report, verify

__all__ = ["Report", "verify"]
