"""Proves a quantiser, ours or anyone's, against the exact grid."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verification.certificates import compare, matrix, read_certificates, write_certificates
    from verification.harness import verify
    from verification.laws import LAWS, Failure, Law, Verdict
    from verification.report import Report, VerificationError

__all__ = [
    "LAWS",
    "Failure",
    "Law",
    "Report",
    "Verdict",
    "VerificationError",
    "compare",
    "matrix",
    "read_certificates",
    "verify",
    "write_certificates",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: pytest loads the plugin in here for every suite, and must not wait for torch."""
    from importlib import import_module

    later = {
        "certificates": ("compare", "matrix", "read_certificates", "write_certificates"),
        "harness": ("verify",),
        "laws": ("LAWS", "Failure", "Law", "Verdict"),
        "report": ("Report", "VerificationError"),
    }
    for module, names in later.items():
        if name in names:
            return getattr(import_module(f"verification.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
