"""Proves a quantiser, ours or anyone's, against the exact grid."""

from verification.conventions import Conventions
from verification.harness import Report, VerificationError, verify
from verification.laws import LAWS, Failure, Law, Verdict

__all__ = ["LAWS", "Conventions", "Failure", "Law", "Report", "Verdict", "VerificationError", "verify"]
