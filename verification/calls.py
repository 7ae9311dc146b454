"""Calling somebody else's quantiser: whatever it does, there is an answer for every input, and a word on what went wrong.

An implementation may raise, for some inputs or all; hang; give another shape, dtype or device; or write into its input. None of
that ends a verification: what can be judged is judged, and the rest is said.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats import ElementFormat
from formats.bits import decode

Quantizer = Callable[[Any], Any]
TRIES = 64


class HungError(RuntimeError):
    """A call went on past its limit."""


class Caller:
    """One implementation, called with 1-D tensors of one dtype; `complaints` are the sentences on what it did wrong.

    takes: "tensor" or "array", what it is given. gives: "values", or "codes", which are decoded. seconds: for one call; a call
    that hangs is left alone, and after the second one nothing is called any more.
    """

    def __init__(
        self, call: Quantizer, f: ElementFormat, takes: str = "tensor", gives: str = "values", seconds: float = 60.0
    ) -> None:
        self.call, self.f, self.takes, self.gives, self.seconds = call, f, takes, gives, seconds
        self.complaints: list[str] = []
        self.raised: list[float] = []
        self.unanswered = torch.zeros(0, dtype=torch.bool)
        self._hung = 0

    def __call__(self, x: Tensor, layout: str = "plain") -> Tensor:
        """The values that it makes of x, in x's dtype and shape; NaN where there is none, and `unanswered` says so.

        layout: how x lies in memory: "plain", "strided" (every other element of a buffer) or "offset" (one element into it).
        """
        self.unanswered = torch.zeros(len(x), dtype=torch.bool)
        try:
            return self._judged(x, self._limited(x, layout))
        except HungError as error:
            self._complain(str(error))
            self.unanswered[:] = True
            return torch.full_like(x, torch.nan)
        except Exception as error:  # anything may come out of somebody else's code
            return self._piece_by_piece(x, error)

    def _limited(self, x: Tensor, layout: str = "plain") -> Any:
        if self._hung > 1:
            raise HungError(f"hung for {self.seconds:g} s twice, and was not called again")
        given = _laid_out(x, layout)
        handed: Any = given.numpy() if self.takes == "array" else given
        answer: list[Any] = []
        error: list[BaseException] = []

        def work() -> None:
            try:
                answer.append(self.call(handed))
            except BaseException as caught:  # it belongs to the caller's thread
                error.append(caught)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self.seconds)
        if thread.is_alive():
            self._hung += 1
            raise HungError(f"hangs: {len(x):,} inputs took more than {self.seconds:g} s")
        if error:
            raise error[0]
        same = given.contiguous().view(torch.uint8) == x.contiguous().view(torch.uint8)
        if not bool(same.all()):
            self._complain("writes into its input")
        return answer[0]

    def _judged(self, x: Tensor, answer: Any) -> Tensor:
        if isinstance(answer, np.ndarray):
            answer = torch.from_numpy(
                np.ascontiguousarray(answer if self.gives == "codes" else answer.astype(np.float64))
            )
            exact_dtype = True
        elif isinstance(answer, Tensor):
            answer = answer.detach().cpu()
            exact_dtype = self.gives == "codes" or answer.dtype == x.dtype
        else:
            raise TypeError(f"gives a {type(answer).__name__}, no tensor or array")
        if not exact_dtype:
            self._complain(f"gives {_name(answer.dtype)} for {_name(x.dtype)}")
        if answer.shape != x.shape:
            self._complain(f"gives shape {tuple(answer.shape)} for {tuple(x.shape)}")
            if answer.numel() != x.numel():
                self.unanswered[:] = True
                return torch.full_like(x, torch.nan)
            answer = answer.reshape(x.shape)
        if self.gives == "codes":
            answer = decode(answer, self.f, torch.float64)
        values: Tensor = answer.to(x.dtype)
        return values

    def _piece_by_piece(self, x: Tensor, error: Exception) -> Tensor:
        """Halves of a batch that raised, so that the inputs to blame are found, as long as there are few."""
        result = torch.full_like(x, torch.nan)
        self.unanswered[:] = True
        pieces, tries = [(0, len(x))], 0
        while pieces and tries < TRIES:
            start, stop = pieces.pop()
            tries += 1
            try:
                result[start:stop] = self._judged(x[start:stop], self._limited(x[start:stop]))
                self.unanswered[start:stop] = False
            except HungError as hung:
                self._complain(str(hung))
                break
            except Exception as caught:
                if stop - start > 1:
                    middle = (start + stop) // 2
                    pieces += [(middle, stop), (start, middle)]
                else:
                    self.raised.append(float(x[start]))
                    error = caught
        where = f" for {self.raised[0]!r}" if self.raised else ""
        self._complain(f"raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{where}")
        return result

    def _complain(self, sentence: str) -> None:
        if sentence not in self.complaints:
            self.complaints.append(sentence)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy of x that lies so in memory."""
    if layout == "plain":
        return x.clone()
    if layout == "offset":
        buffer = torch.full((len(x) + 1,), torch.nan, dtype=x.dtype)
        buffer[1:] = x
        return buffer[1:]
    buffer = torch.full((2 * len(x),), torch.nan, dtype=x.dtype)
    buffer[::2] = x
    return buffer[::2]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
