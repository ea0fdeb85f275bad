"""A page of HTML that needs nothing but itself: its elements, its plots, its style and its scripts in one file."""

import base64
import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from purejaxppo.text import printable

HERE = Path(__file__).parent


def make_page(title: str, subtitle: str, sections: Sequence[Element]) -> str:
    """A whole page, which makes no request: its policy forbids them, and any script but the two that are in it.

    Args:
        title: of the page.
        subtitle: one sentence below it.
        sections: see `section`; a list of links to them stands before the first.
    """
    scripts = [get_plotlyjs(), (HERE / "page.js").read_text()]
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()}'" for x in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {allowed}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        _raw("style", (HERE / "page.css").read_text()),
    )
    links = []
    for number, part in enumerate(sections, 1):
        part.set("id", f"section-{number}")
        links.append(element("li", element("a", part.findtext("h2", ""), href=f"#section-{number}")))
    body = element(
        "body",
        element("header", element("h1", title), element("p", subtitle)),
        element("nav", element("ul", *links), aria_label="sections"),
        element("main", *sections),
        element("noscript", element("p", "The plots need JavaScript; the tables do not.")),
        *[_raw("script", script) for script in scripts],
    )
    return "<!DOCTYPE html>\n" + ET.tostring(element("html", head, body, lang="en"), encoding="unicode", method="html")


def element(tag: str, *children: Element | str | None, **attributes: str) -> Element:
    """An element of HTML, whose text is escaped when it is written; characters that do not print become escapes.

    Args:
        tag: such as "p".
        *children: elements and text, in order; None is left out.
        **attributes: their names have `-` for `_`, and `class_` is the class.
    """
    made = Element(tag, {name.rstrip("_").replace("_", "-"): printable(x) for name, x in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif child is not None and len(made):
            made[-1].tail = (made[-1].tail or "") + printable(child)
        elif child is not None:
            made.text = (made.text or "") + printable(child)
    return made


def _raw(tag: str, content: str, **attributes: str) -> Element:
    """A style or a script, whose content is not escaped."""
    made = Element(tag, attributes)
    made.text = content
    return made


def section(title: str, *children: Element | str | None) -> Element:
    """A part of the page under a heading, which the list of links names."""
    return element("section", element("h2", title), *children)


def sentences(*texts: str) -> Element | None:
    """A paragraph of those of the texts that are not empty."""
    kept = [text for text in texts if text]
    return element("p", " ".join(kept)) if kept else None


def table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> Element:
    """A table of rows with the same fields; values are text, numbers, or elements. Only long text has several lines."""

    def cell(value: Any) -> Element:
        if isinstance(value, Element):
            return element("td", value)
        return element("td", str(value), class_="long" if len(str(value)) > 30 else "short")

    header = element("tr", *[element("th", name, scope="col") for name in rows[0]])
    body = [element("tr", *map(cell, row.values())) for row in rows]
    head = [element("caption", caption)] if caption else []
    made = element("table", *head, element("thead", header), element("tbody", *body))
    return element("div", made, class_="wide", tabindex="0")


def facts(pairs: Iterable[tuple[str, str]]) -> Element:
    """A list of names, each with its value."""
    return element("dl", *[x for name, value in pairs for x in (element("dt", name), element("dd", value))])


def folded(summary: str, *children: Element | None) -> Element:
    """Elements that the reader unfolds."""
    return element("details", element("summary", summary), *children)


def plot(figure: go.Figure, caption: str = "", *controls: Element | None) -> Element:
    """An interactive figure above its caption, and what chooses its lines (see `line_choice`)."""
    data = _raw("script", str(figure.to_json(engine="json")), type="application/json")  # "<" is escaped in it
    drawn = element("div", class_="plot", style=f"min-height: {figure.layout.height}px")
    return element("figure", drawn, data, *controls, element("figcaption", caption) if caption else None)


def line_choice(
    labels: Sequence[str],
    styles: Sequence[tuple[str, str]],
    fields: Mapping[str, Sequence[str] | None],
    values: Sequence[Sequence[float]],
    num_shown: int,
) -> Element:
    """The legend of a plot of lines, in which the reader chooses those that are shown: one by one, by field, by rank.

    Line i of the plot has i as the `meta` of its traces.

    Args:
        labels: of the lines, the most important first.
        styles: colour and pattern of dashes (of SVG) of every line.
        fields: the values of every field as text, each of which is chosen; None for numbers, of which a range is.
        values: for every line its value of every field: the index of the text, or the number.
        num_shown: lines that are shown at first.
    """
    most = element("input", type="number", min="1", max=str(len(labels)), value=str(num_shown), class_="most")
    bands = element("label", element("input", type="checkbox", checked="", class_="intervals"), "intervals")
    head = element("p", element("label", "Show the best ", most, f" of {len(labels)}"), bands)
    choices = [_field_choice(index, name, texts) for index, (name, texts) in enumerate(fields.items())]
    lines = []
    for place, (label, style, row) in enumerate(zip(labels, styles, values), 1):
        box = element("input", type="checkbox", checked="")
        line = element("label", box, _swatch(*style), f"{place}. {label}")
        lines.append(element("li", line, data_values=" ".join(map(str, row))))
    return element("form", head, *choices, element("ul", *lines), class_="choice")


def _field_choice(index: int, name: str, texts: Sequence[str] | None) -> Element:
    """What chooses values of a field: a box for each text, or the ends of a range."""
    if texts is None:
        kinds = {"from ": "low", "to ": "high"}
        common = {"type": "number", "step": "any", "data_field": str(index)}
        boxes = [element("label", word, element("input", **common, class_=kind)) for word, kind in kinds.items()]
    else:
        inputs = [element("input", type="checkbox", checked="", data_field=f"{index} {i}") for i in range(len(texts))]
        boxes = [element("label", box, text) for box, text in zip(inputs, texts)]
    return element("fieldset", element("legend", name), *boxes)


def _swatch(color: str, dashes: str) -> Element:
    line = element("line", x1="1", x2="27", y1="4", y2="4", stroke=color, stroke_width="3", stroke_dasharray=dashes)
    return element("svg", line, width="28", height="8", aria_hidden="true")
