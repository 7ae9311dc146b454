"""What the compiler is told of functions, without waiting for it: importing it takes longer than all else of a small command."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def assume_constant_result(function: F) -> F:
    """`torch.compiler.assume_constant_result`, which imports torch._dynamo for the mark that it leaves."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
