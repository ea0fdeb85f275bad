"""Checks of the numbers and words that a user gives; each raises a ValueError of one sentence."""

import math
import operator
from dataclasses import Field
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from purejaxppo.text import quote

MAX_INT = 2**31 - 1  # the largest number that is counted on a device


def check_whole(name: str, value: Any, at_least: int = 1, at_most: int = MAX_INT, of: str = "") -> int:
    """A whole number in [`at_least`, `at_most`] as a Python integer.

    Args:
        name: of the argument, for the message.
        value: any object; True and False are not whole numbers, and neither is 8.0.
        at_least: the lowest number allowed.
        at_most: the highest number allowed.
        of: what there are `at_most` of, for the message.

    Raises:
        ValueError: for anything else.
    """
    try:
        if getattr(value, "dtype", type(value)) in (bool, np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        whole = isinstance(value, (float, np.floating)) and float(value).is_integer()
        raise ValueError(
            f"{name}={quote(value)} must be a whole number{f' (try {int(value)})' if whole else ''}"
        ) from None
    if number < at_least:
        raise ValueError(f"{name}={number} must be at least {at_least}")
    if number > at_most:
        raise ValueError(f"{name}={number} must be at most {at_most}{of and f', {of}'}")
    return number


def check_choice(field: Field, value: Any) -> None:
    """Raises ValueError for a value that the type of a dataclass's field, a Literal or a bool, does not allow."""
    choices = getattr(field.type, "__args__", ()) if getattr(field.type, "__origin__", None) is Literal else ()
    if choices and not (isinstance(value, str) and value in choices):
        raise ValueError(f"{field.name}={quote(value)} must be one of {', '.join(map(repr, choices))}")
    if field.type is bool and not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{field.name}={quote(value)} must be True or False")


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
    # Numbers as a program holds them: a float64 may become 0, inf or the end of an open interval.
    values, held = _as_floats(name, value), _as_floats(name, value, np.float32)
    good = [(x > low if open_low else x >= low) & (x < high if open_high else x <= high) for x in (values, held)]
    if not (good[0] & good[1]).all():
        bad = float(values[~(good[0] & good[1])].flat[0])
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        bad, where = (f"{bad:g}", "") if not good[0].all() else (f"{bad!r}", ", also when rounded to float32")
        raise ValueError(f"{name}={bad} must be a number in {interval}{where}")
    lost = (np.isinf(held) & np.isfinite(values)) | ((held == 0) & (values != 0))
    if lost.any():
        bad = values[lost].flat[0]
        raise ValueError(f"{name}={bad:g} is {'inf' if abs(bad) > 1 else '0'} in float32 (write that, if it is meant)")


def check_number(
    name: str, value: Any, low: float, high: float, open_low: bool = False, open_high: bool = False
) -> None:
    """Raises ValueError for anything but one number in an interval; see `check_range`, which takes arrays too."""
    if np.ndim(value):
        raise ValueError(f"{name}={quote(value)} must be one number")
    check_range(name, value, low, high, open_low, open_high)


def _as_floats(name: str, value: Any, dtype: Any = np.float64) -> np.ndarray:
    """A number or an array of numbers in a floating-point type."""
    try:
        numbers = np.asarray(float(value) if isinstance(value, int) and not isinstance(value, bool) else value)
        if not (jnp.issubdtype(numbers.dtype, jnp.floating) or jnp.issubdtype(numbers.dtype, jnp.integer)):
            raise TypeError
        with np.errstate(over="ignore", under="ignore"):
            return numbers.astype(dtype)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={quote(value)} must be a number") from None


def nearest_divisors(number: int, wanted: int) -> str:
    """The remedy of an error message: the divisors of a number just below and above the one wanted."""
    small = [d for d in range(1, min(math.isqrt(number), 10**5) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return "try " + " or ".join(map(str, below + above))
