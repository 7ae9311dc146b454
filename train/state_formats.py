"""In which formats an optimiser's state is stored: the words alone, what is done by them is `state`'s and needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from formats import get_format
from formats.spec import ElementFormat

if TYPE_CHECKING:
    import torch

StateRounding = Literal["nearest_even", "toward_zero", "stochastic"]
StateOf = Literal["all", "linears"]


@dataclass(frozen=True)
class StateFormats:
    """The formats of what an optimiser stores, by any name that `get_format` takes; None is FP32, and rounds nothing.

    rounding: of what is kept from step to step, where its errors add up: master weights, moments and Kahan's buffer. The
    gradient, and the weights that a run starts from, are rounded to nearest even. kahan: whether master weights have a buffer.
    of: "all" parameters, or the weights of "linears" alone, the LM head among them; the others stay in FP32.
    """

    master: str | None = None
    first: str | None = None
    second: str | None = None
    gradient: str | None = None
    rounding: StateRounding = "nearest_even"
    kahan: bool = False
    of: StateOf = "all"

    def __post_init__(self) -> None:
        for name in self.names:
            get_format(name)
        if self.rounding not in get_args(StateRounding):
            raise ValueError(
                f"rounding of the state must be {', '.join(get_args(StateRounding))}, got {self.rounding!r}"
            )

    @property
    def names(self) -> list[str]:
        """The formats that are named, in the order of the fields."""
        return [name for name in (self.master, self.first, self.second, self.gradient) if name is not None]

    @property
    def word(self) -> str:
        """What differs from FP32, in words."""
        named = [
            f"{what} in {name}" for what in ("master", "first", "second", "gradient") if (name := getattr(self, what))
        ]
        named += [f"rounded by {self.rounding}"] if self.rounding != "nearest_even" else []
        named += ["of linears alone"] if self.of != "all" else []
        return ", ".join([*named, *(["Kahan's compensation"] if self.kahan else [])])

    @property
    def draws(self) -> bool:
        """Whether a step needs random bits."""
        return self.rounding == "stochastic" and any((self.master, self.first, self.second))

    def check_dtype(self, dtype: torch.dtype) -> None:
        """ValueError where a run whose state is of that dtype can't hold a format: scaled ones are for FP32."""
        import torch

        from formats.quantizer import check_carrier

        for name in self.names:
            f = get_format(name)
            if isinstance(f, ElementFormat):
                check_carrier(f, dtype)
            elif dtype != torch.float32:
                raise ValueError(
                    f"state in {name} needs FP32 runs, and native-fp64's are FP64: name a format without a scale, or none"
                )
