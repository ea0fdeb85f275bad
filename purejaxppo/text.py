"""Numbers and settings as short text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def align(rows: Sequence[Mapping[str, Any]], most: int = 16) -> str:
    """Rows with the same fields as text in aligned columns: the first `most` rows, and how many more there are."""
    shown = [list(rows[0])] + [[show(value) for value in row.values()] for row in rows[:most]]
    widths = [max(map(len, column)) for column in zip(*shown)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)) for line in shown]
    return "\n".join(lines + ([f"... and {len(rows) - most} more"] if len(rows) > most else []))


def show(value: Any) -> str:
    """A value as short text."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_setting(setting: Mapping[str, Any]) -> str:
    """A setting as short text: `name=value` for every field."""
    return " ".join(f"{name}={show(value)}" for name, value in setting.items())


def to_coordinate(value: Any) -> Any:
    """The value of a field as xarray coordinates and Optuna storages hold it: a tuple as text, others unchanged."""
    return show(value) if isinstance(value, tuple) else value


def in_words(name: str) -> str:
    """The name of a field for plots and reports, without `env.` and underscores."""
    return name.removeprefix("env.").replace("_", " ")


def show_value(value: Any) -> str:
    """The value of a field as short text, with at most four digits; "none" for an empty text, such as `memory=""`."""
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value) or "none"


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless the number is 1."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def either(words: Sequence[str]) -> str:
    """Words as alternatives: "A, B or C"."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def interval(mean: float, low: float, high: float, over: str = "agents", nothing: str = "no episode ended") -> str:
    """A mean with its 95 % confidence interval, as text.

    Args:
        mean: nan if there is none.
        low: lower bound of the interval, nan for a single agent.
        high: upper bound of the interval.
        over: the things that it is an interval over, in the plural.
        nothing: the text for a mean of nan.
    """
    if mean != mean:
        return nothing
    return f"{mean:.2f}" + (
        f"  [{low:.2f}, {high:.2f}] 95 % over {over}" if low == low else "  (one agent: no interval)"
    )


def printable(text: str) -> str:
    """Text with an escape such as `\\x1b` in place of every character that is not printable, line breaks too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quote(value: Any) -> str:
    """A value that a user gave, as Python would show it, on one short line for a message."""
    return shorten(repr(value), 80)


def shorten(value: Any, most: int = 40) -> str:
    """A value as one line of text of at most `most` characters, cut off with `...`."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


class Word(str):
    """Text that prints without quotes."""

    __repr__ = str.__str__
