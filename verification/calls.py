"""Calling somebody else's quantiser: whatever it does, there is an answer for every input, and a word on what went wrong.

An implementation may raise, for some inputs or all; hang; give another shape, dtype or device; or write into its input. None of
that ends a verification: what can be judged is judged, and the rest is said.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats import ElementFormat
from formats.bits import view_as_codes
from verification import oracle
from verification.points import INTEGERS

Quantizer = Callable[[Any], Any]
TAKES = ("tensor", "array", "codes")
GIVES = ("values", "codes")
TRIES = 64
THREAD = "exmy-call"  # of a call: one that hangs outlives what asked for it


class HungError(RuntimeError):
    """A call went on past its limit."""


class Caller:
    """One implementation, called with tensors of one dtype; `complaints` are the sentences on what it did wrong.

    takes: "tensor" or "array", what it is given; "codes" is a tensor of codes. gives: "values", or "codes", whose values are
    looked up in mpmath's list. seconds: for one call, and for all that find out which inputs it raises for; a call that
    hangs is left alone, and after the second one nothing is called any more. device: where its tensors lie. Answers come back to
    where the input was, in its dtype, or in `dtype`.
    """

    def __init__(
        self,
        call: Quantizer,
        f: ElementFormat,
        takes: str = "tensor",
        gives: str = "values",
        seconds: float = 60.0,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.call, self.f, self.takes, self.gives, self.seconds = call, f, takes, gives, seconds
        self.device, self.dtype = device, dtype
        self.complaints: list[str] = []
        self.raised: list[float] = []
        self.unanswered = torch.zeros(0, dtype=torch.bool)
        self._hung, self._searching = 0, 0.0

    def __call__(self, x: Tensor, layout: str = "plain") -> Tensor:
        """The values that it makes of x, of its shape; NaN where there is none, and `unanswered`, [len(x)], says so.

        layout: how x lies in memory: "plain", "strided" (every other element of a buffer) or "offset" (one element into it).
        """
        self.unanswered = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        try:
            return self._read(x, self._limited(x, layout))
        except HungError as error:
            self._complain(str(error))
            self.unanswered[:] = True
            return self._nothing(x)
        except Exception as error:  # anything may come out of somebody else's code
            return self._piece_by_piece(x, error)

    def _limited(self, x: Tensor, layout: str = "plain") -> Any:
        if self._hung > 1:
            raise HungError(f"hung for {self.seconds:g} s twice, and was not called again")
        given = _laid_out(x.to(self.device), layout)
        handed: Any = given.numpy() if self.takes == "array" else given
        answer: list[Any] = []
        error: list[BaseException] = []

        def work() -> None:
            try:
                with np.errstate(all="ignore"):  # what a cast says of overflow is no news here
                    answer.append(self.call(handed))
                if given.is_cuda:
                    torch.cuda.synchronize()  # what goes wrong on a device is told late
            except BaseException as caught:  # it belongs to the caller's thread
                error.append(caught)

        thread = threading.Thread(target=work, name=THREAD, daemon=True)
        thread.start()
        thread.join(self.seconds)
        if thread.is_alive():
            self._hung += 1
            raise HungError(f"hangs: {len(x):,} inputs took more than {self.seconds:g} s")
        if error:
            raise error[0]
        if not torch.equal(_bits(given), _bits(x.to(self.device))):
            self._complain("writes into its input")
        return answer[0]

    def _read(self, x: Tensor, answer: Any) -> Tensor:
        """The values of an answer, of x's shape; TypeError for what is neither tensor nor array."""
        answer = self._tensor(answer)
        if self.gives == "values" and not answer.dtype.is_floating_point:
            self._complain(f"gives {_name(answer.dtype)}, which are no values; for codes say gives='codes'")
        elif self._checks_dtype and self.gives == "values" and answer.dtype != x.dtype:
            self._complain(f"gives {_name(answer.dtype)} for {_name(x.dtype)}")
        answer = answer.to(x.device)
        if answer.shape != x.shape:
            self._complain(f"gives shape {tuple(answer.shape)} for {tuple(x.shape)}")
            if answer.numel() != x.numel():
                self.unanswered[:] = True
                return self._nothing(x)
            answer = answer.reshape(x.shape)
        if self.gives == "codes":
            answer = self._values_of(answer, self.f)
        values: Tensor = answer.to(self.dtype or x.dtype)
        if answer.dtype.itemsize > values.dtype.itemsize:
            # Twice as precise, and not on the grid: the cast must not hide that.
            hidden = (values.double() != answer.double()) & values.isfinite()
            values = (values.view(INTEGERS[values.dtype]) + hidden).view(values.dtype)
        return values

    def _tensor(self, answer: Any) -> Tensor:
        self._checks_dtype = isinstance(answer, Tensor) and self.takes != "codes"
        if isinstance(answer, np.ndarray):
            array = np.ascontiguousarray(answer)
            if array.dtype.kind not in "fiub":  # ml_dtypes' own
                array = view_as_codes(array) if self.gives == "codes" else array.astype(np.float64)
            return torch.from_numpy(array)
        if isinstance(answer, Tensor):
            return answer.detach()
        raise TypeError(f"gives a {type(answer).__name__}, no tensor or array")

    _checks_dtype = False

    def _values_of(self, codes: Tensor, f: ElementFormat) -> Tensor:
        """FP64 values of integer codes, or of a tensor of float8, whose bits they are."""
        if codes.dtype.is_floating_point:
            codes = view_as_codes(codes)
        place = codes.to(torch.int64)
        count = 1 << f.bits
        if bool(((place < 0) | (place >= count)).any()):
            self._complain(f"gives codes beyond the {f.bits} bits of {f.name}")
        return decoded(f).to(codes.device)[place.clamp(0, count - 1)]

    def _nothing(self, x: Tensor) -> Tensor:
        return torch.full(x.shape, torch.nan, dtype=self.dtype or x.dtype, device=x.device)

    def _piece_by_piece(self, x: Tensor, error: Exception) -> Tensor:
        """Halves of a batch that raised, so that the inputs to blame are found, as long as there are few."""
        result = self._nothing(x)
        unanswered = torch.ones(len(x), dtype=torch.bool, device=x.device)
        pieces, tries = [(0, len(x))], 0
        while pieces and tries < TRIES and self._searching < self.seconds:
            start, stop = pieces.pop()
            tries += 1
            began = time.monotonic()
            try:
                self.unanswered = torch.zeros(stop - start, dtype=torch.bool, device=x.device)
                result[start:stop] = self._read(x[start:stop], self._limited(x[start:stop]))
                unanswered[start:stop] = self.unanswered
            except HungError as hung:
                self._complain(str(hung))
                break
            except Exception as caught:
                if stop - start > 1:
                    middle = (start + stop) // 2
                    pieces += [(middle, stop), (start, middle)]
                else:
                    self.raised.append(float(x[start].flatten()[0]))
                    error = caught
            finally:
                self._searching += time.monotonic() - began
        self.unanswered = unanswered
        where = f" for {self.raised[0]!r}" if self.raised else ""
        self._complain(f"raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{where}")
        return result

    def _complain(self, sentence: str) -> None:
        if sentence not in self.complaints:
            self.complaints.append(sentence)


@cache
def decoded(f: ElementFormat) -> Tensor:
    """FP64 values of all codes, by mpmath; codes that stand for nothing are NaN."""
    exact = [_float(f, code) for code in range(1 << f.bits)]
    return torch.tensor(exact, dtype=torch.float64)


def _float(f: ElementFormat, code: int) -> float:
    """A code's value, -0 included where the format has it."""
    try:
        value = float(oracle.value(f, code))
    except ValueError:  # a list may leave codes out
        return float("nan")
    sign_bit = 1 << (f.bits - 1)
    return -0.0 if value == 0 and f.has_negative_zero and code >= sign_bit else value


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(INTEGERS[x.dtype]) if x.dtype.is_floating_point else x


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy of x that lies so in memory, along its last axis."""
    if layout == "plain":
        return x.clone()
    filler = torch.nan if x.dtype.is_floating_point else 0
    if layout == "offset":
        buffer = torch.full((x.numel() + 1,), filler, dtype=x.dtype, device=x.device)
        buffer[1:] = x.reshape(-1)
        return buffer[1:].view(x.shape)
    buffer = torch.full((*x.shape[:-1], 2 * x.shape[-1]), filler, dtype=x.dtype, device=x.device)
    buffer[..., ::2] = x
    return buffer[..., ::2]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
