"""Checks of the numbers and words that a user gives; each raises a ValueError of one sentence."""

import math
from dataclasses import Field
from typing import Any, Literal

import numpy as np
from jax.core import Tracer


def check_whole(name: str, value: Any, at_least: int = 1, at_most: int | None = None, of: str = "") -> None:
    """Raises ValueError unless a value is a whole number in [`at_least`, `at_most`].

    Args:
        name: of the argument, for the message.
        value: any object; True and False are not whole numbers.
        at_least: the lowest number allowed.
        at_most: the highest number allowed, None for no bound.
        of: what there are `at_most` of, for the message.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value!r} must be a whole number")
    if value < at_least:
        raise ValueError(f"{name}={value} must be at least {at_least}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name}={value} must be at most {at_most}{of and f', {of}'}")


def check_choice(field: Field, value: Any) -> None:
    """Raises ValueError for a value that the type of a dataclass's field, a Literal or a bool, does not allow."""
    choices = getattr(field.type, "__args__", ()) if getattr(field.type, "__origin__", None) is Literal else ()
    if choices and value not in choices:
        raise ValueError(f"{field.name}={value!r} must be one of {', '.join(map(repr, choices))}")
    if field.type is bool and not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{field.name}={value!r} must be True or False")


def check_range(
    name: str, value: Any, low: float, high: float, open_low: bool = False, open_high: bool = False
) -> None:
    """Raises ValueError for numbers outside an interval; traced numbers pass.

    Args:
        name: of the argument, for the message.
        value: a number, or an array of numbers.
        low: the lower end of the interval.
        high: the upper end of the interval.
        open_low: whether `low` itself is excluded.
        open_high: whether `high` itself is excluded.
    """
    if isinstance(value, Tracer):
        return
    try:
        values = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} must be a number") from None
    good = (values > low if open_low else values >= low) & (values < high if open_high else values <= high)
    if not good.all():
        bad = values[~good].flat[0]
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name}={bad:g} must be a number in {interval}")


def nearest_divisors(number: int, wanted: int) -> str:
    """The remedy of an error message: the divisors of a number just below and above the one wanted."""
    small = [d for d in range(1, min(math.isqrt(number), 10**5) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return "try " + " or ".join(map(str, below + above))
