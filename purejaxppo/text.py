"""Numbers and settings as short text."""

from typing import Any

import numpy as np


def align(rows: list[dict], most: int = 16) -> str:
    """Rows of equal fields as text with aligned columns; of more than `most` the first, and how many more."""
    shown = [list(rows[0])] + [[show(value) for value in row.values()] for row in rows[:most]]
    widths = [max(map(len, column)) for column in zip(*shown)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)) for line in shown]
    return "\n".join(lines + ([f"... and {len(rows) - most} more"] if len(rows) > most else []))


def show(value) -> str:
    """A value as short text."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_setting(setting: dict) -> str:
    """A setting as short text."""
    return " ".join(f"{name}={show(value)}" for name, value in setting.items())


def to_coordinate(value):
    """A value of a field as labelled arrays and storages hold it: a tuple as text."""
    return show(value) if isinstance(value, tuple) else value


def in_words(name: str) -> str:
    """A field's name for readers."""
    return name.removeprefix("env.").replace("_", " ")


def show_value(value) -> str:
    """A field's value in short."""
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def interval(mean: float, low: float, high: float, over: str = "agents") -> str:
    """A mean with its 95 % interval over agents, or whatever else, as text."""
    if mean != mean:
        return "no episode ended"
    return f"{mean:.2f}" + (
        f"  [{low:.2f}, {high:.2f}] 95 % over {over}" if low == low else "  (one agent: no interval)"
    )


def shorten(value: Any, most: int = 40) -> str:
    """A value as text of at most `most` characters."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
