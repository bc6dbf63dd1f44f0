"""What a request gets that none of a generator's tasks answers: the choices, the warning and the error; light, for the command line."""

from __future__ import annotations

import math
from typing import Literal, get_args

OnUnknown = Literal["warn", "shrink", "base", "raise"]
ON_UNKNOWN: tuple[str, ...] = get_args(OnUnknown)


class UnknownTaskWarning(UserWarning):
    """A request was less familiar than the generator's threshold, and got the adapter of the task that it resembles most."""


class UnknownTaskError(ValueError):
    """A request was less familiar than the generator's threshold, and `on_unknown` is `"raise"`."""


def check_request(on_unknown: str, strength: float) -> None:
    """Refuse what `generate_adapter` does not take.

    Args:
        on_unknown (`str`): One of `ON_UNKNOWN`.
        strength (`float`): A finite number >= 0.

    Raises:
        `ValueError`: If it is none.
    """
    if on_unknown not in ON_UNKNOWN:
        raise ValueError(f"on_unknown={on_unknown!r} is unknown: choose one of {', '.join(ON_UNKNOWN)}.")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength) or strength < 0:
        raise ValueError(f"strength={strength!r} must be a finite number >= 0: 1 is the adapter as it is, 0 the base.")
