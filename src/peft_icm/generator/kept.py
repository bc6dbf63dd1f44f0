"""What is computed of parameters once, and again when they are others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Kept:
    """A value that is made of tensors, made anew where one of them was written to, moved or replaced since.

    It does not see what is written through a tensor's `.data`.
    """

    def __init__(self) -> None:
        self._kept: tuple[Any, ...] = (None,)

    def __call__(self, make: Callable[[], T], *made_of: Tensor) -> T:
        """The value of `make()`, which reads these tensors and no others."""
        if any(tensor.is_inference() for tensor in made_of):
            return make()  # they do not count what is written to them
        state, kept = [(tensor.data_ptr(), tensor._version) for tensor in made_of], self._kept
        if kept[0] != state:
            memory = [tensor.detach() for tensor in made_of]  # held, so that no other tensor takes its address
            self._kept = kept = (state, memory, make())
        return kept[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is read from a pickle, begins anew."""
        return Kept, ()
