"""What is worked out of a study or a part of it once, since tables, figures and sentences all ask for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

Of = TypeVar("Of")
Found = TypeVar("Found")
More = ParamSpec("More")


def once(function: Callable[Concatenate[Of, More], Found]) -> Callable[Concatenate[Of, More], Found]:
    """The function, its result for an object and further arguments kept as long as the object is; nobody changes it."""
    kept: WeakKeyDictionary[Of, dict[Hashable, Found]] = WeakKeyDictionary()

    @wraps(function)
    def known(of: Of, /, *args: More.args, **options: More.kwargs) -> Found:
        found = kept.setdefault(of, {})
        key = (args, tuple(options.items()))
        if key not in found:
            found[key] = function(of, *args, **options)
        return found[key]

    return known
