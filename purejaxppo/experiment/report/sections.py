"""The sections of a report: what the metrics of a sweep or of a run say, its failures, settings and sessions."""

import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import xarray

from purejaxppo.experiment.provenance import Machine
from purejaxppo.experiment.report.failures import failures_of
from purejaxppo.experiment.report.interactive import (
    DASHES,
    MAX_AGENTS,
    draw_curves,
    draw_field,
    draw_members,
    draw_metric,
    draw_pair,
    draw_rungs,
    draw_runs,
    line_style,
)
from purejaxppo.experiment.report.lineage import Lineage
from purejaxppo.experiment.report.metrics import mean_interval, split_vectors
from purejaxppo.experiment.report.page import element, facts, folded, line_choice, plot, section, sentences, table
from purejaxppo.experiment.report.plot_fields import fields_of_grid, is_number, varied_fields
from purejaxppo.experiment.report.ranking import importance, rank
from purejaxppo.experiment.report.statistics import NO_SCORE, count_scored, describe_scores, final_scores, scores_of
from purejaxppo.text import count, in_words, interval, shorten, show, show_setting, show_value

MAX_ROWS = 200  # of a table
MAX_LINES, LINES_SHOWN = 40, 5  # learning curves
MAX_BOXES = 12  # values of a field of numbers that are chosen one by one
MAX_SETTINGS = 1000  # in a plot of scores
MAX_PAIRS = 10  # heat maps
MAX_METRICS = 60


def sections_of_sweep(metrics: xarray.Dataset, ranked: xarray.Dataset | None = None) -> list[Element]:
    """The ranking, the learning curves, the scores and the importance of fields, for every environment by itself.

    Args:
        metrics: with the dimensions of the sweep's table, `seed` and `updates`.
        ranked: of one environment, if it is not in the order of `rank`; with the variables `rung` and `rung_score`
            after successive halving.
    """
    names = np.unique(metrics["env"]).tolist() if "env" in metrics.coords else []
    if len(names) < 2:
        return _sections_of_env(metrics, "", ranked)
    dim = metrics["env"].dims[0]
    parts = [_sections_of_env(metrics.isel({dim: metrics["env"].values == name}), f": {name}") for name in names]
    return list(itertools.chain(*parts))


def _sections_of_env(metrics: xarray.Dataset, of: str, ranked: xarray.Dataset | None = None) -> list[Element]:
    scores = scores_of(metrics)
    ranked = rank(scores) if ranked is None else ranked
    labels = [show_setting(row) or "the only setting" for row in _rows_of(ranked)]
    ranking = section(f"Ranking{of}", *_ranking(ranked, scores))
    num_scored = int((ranked["num_runs"] > 0).sum())
    if not num_scored:
        return [ranking]
    curves = section(f"Learning curves{of}", *_curves(metrics, scores, ranked, labels[:num_scored]))
    fields = _fields(scores, ranked.isel(setting=slice(num_scored)), labels)
    return [ranking, curves, *([section(f"Scores by field{of}", *fields)] if fields else [])]


def rungs_section(scores: np.ndarray, steps: Sequence[int], ranked: xarray.Dataset) -> list[Element]:
    """The rungs of successive halving: the score of every setting where it was compared; nothing before the first.

    Args:
        scores: [settings, rungs], nan where a setting did not get to the rung, -inf where it failed.
        steps: environment steps of a run at each rung.
        ranked: the settings, best first; their coordinate `setting` is the row of `scores`.
    """
    shown = ranked.isel(setting=slice(MAX_SETTINGS))
    reached, failed = (~np.isnan(scores)).sum(0), int(np.isneginf(scores).any(1).sum())
    rows = [
        {"steps of a run": f"{step:,}", "settings": int(number), "best score": show(float(best))}
        for step, number, best in zip(steps, reached, np.nanmax(scores, 0, initial=-np.inf))
        if number
    ]
    if not rows:
        return []
    figure = draw_rungs(scores[shown["setting"].values], steps, [show_setting(row) for row in _rows_of(shown)])
    note = f"{count(failed, 'setting')} failed and {'has' if failed == 1 else 'have'} no point." if failed else ""
    return [section("Rungs", table(rows), plot(figure, f"A line ends where its setting was stopped. {note}"))]


def _rows_of(ranked: xarray.Dataset) -> list[dict[str, Any]]:
    """The fields of every setting of a ranking that vary, or else all."""
    names = [str(name) for name in ranked.coords if name != "setting"]
    varied = [name for name in names if len({str(x) for x in ranked[name].values.tolist()}) > 1] or names
    return [dict(zip(varied, row)) for row in zip(*(ranked[name].values.tolist() for name in varied))] or [{}]


def _ranking(ranked: xarray.Dataset, scores: xarray.DataArray) -> list[Element | None]:
    fields, on_rungs = [str(name) for name in ranked.coords if name != "setting"], "rung" in ranked
    missing, has_intervals = bool(ranked["num_missing"].any()), bool(ranked["low"].notnull().any())
    rows = []
    for place in range(min(len(ranked["setting"]), MAX_ROWS)):
        row = ranked.isel(setting=place)
        number = {name: row[name].item() for name in ranked.data_vars}
        failed = not number["num_runs"]
        ends = "" if math.isnan(number["low"]) else f"{show(number['low'])} to {show(number['high'])}"
        rows.append(
            {"rank": place + 1}
            | ({"updates": number["rung"], "score there": show(number["rung_score"])} if on_rungs else {})
            | {"IQM": "failed" if failed else show(number["iqm"])}
            | ({"95 % interval": ends} if has_intervals else {})
            | {name: show(row[name].item()) for name in fields}
            | {name: "" if failed else show(number[name]) for name in ("mean", "median")}
            | {"runs": number["num_runs"]}
            | ({"missing": number["num_missing"]} if missing else {})
        )
    total, num_seeds = len(ranked["setting"]), scores.sizes["seed"]
    return [
        sentences(
            "Successive halving stopped settings early. They are ranked by the updates of the last comparison that they"
            " reached, then by their score there."
            if on_rungs
            else "",
            f"{count(total, 'setting')} {'with' if on_rungs else 'by'} the interquartile mean (IQM), over "
            f"{count(num_seeds, 'seed')}, of {describe_scores(scores)}"
            + (", with 95 % bootstrap intervals." if num_seeds > 1 else "; one seed has no interval."),
            "Missing runs turned nan, ended no episode or were not evaluated yet; they count as the lowest score."
            if missing
            else "",
            "A setting has failed if all its runs are missing." if (ranked["num_runs"] == 0).any() else "",
            f"The table has the best {MAX_ROWS}; result.ranked() in Python has all." if total > MAX_ROWS else "",
        ),
        table(rows),
        sentences("" if (ranked["num_runs"] > 0).any() else f"There are no plots, since {NO_SCORE}."),
    ]


def _curves(
    metrics: xarray.Dataset, scores: xarray.DataArray, ranked: xarray.Dataset, labels: Sequence[str]
) -> list[Element | None]:
    """The learning curves of the best settings, of which the reader chooses those that are shown."""
    dims = [dim for dim in scores.dims if dim != "seed"]
    places = ranked["setting"].values[: min(len(labels), MAX_LINES)]
    shape = [scores.sizes[dim] for dim in dims]
    indices = [dict(zip(dims, map(int, np.unravel_index(place, shape)))) if dims else {} for place in places]
    labels = labels[: len(places)]
    figure = draw_curves([metrics.isel(index) for index in indices], labels, scores.min().item())
    shown = ranked.isel(setting=slice(len(places)))
    fields, values = {}, []
    for name in varied_fields(scores):
        column = shown[name].values
        found, index = np.unique(column, return_inverse=True)
        as_range = is_number(column) and len(found) > MAX_BOXES
        if len(found) > 1:
            fields[in_words(name)] = None if as_range else [show_value(x) for x in found.tolist()]
            values.append((column if as_range else index).tolist())
    styles = [(color, DASHES[dashes]) for color, dashes in map(line_style, range(len(labels)))]
    choice = line_choice(labels, styles, fields, list(zip(*values)) or [()] * len(labels), LINES_SHOWN)
    total = scores.size // scores.sizes["seed"]
    several = scores.sizes["seed"] > 1
    statistic = "interquartile mean over seeds, with its 95 % interval, of the " if several else ""
    caption = (
        f"A line is the {statistic}return of the episodes that ended, in at most 100 spans of updates."
        + (f" The page has the best {len(labels)} of {total} settings." if len(labels) < total else "")
        + " Drag to zoom, double-click to zoom out."
    )
    return [plot(figure, caption, choice if len(labels) > 1 else None)]


def _fields(scores: xarray.DataArray, ranked: xarray.Dataset, labels: list[str]) -> list[Element | None]:
    """Scores against each field, heat maps of pairs, and how much each field explains; `ranked` has scores."""
    varied = varied_fields(scores)
    if not varied:
        return []
    total = len(ranked["setting"])
    some = np.unique(np.linspace(0, total - 1, min(total, MAX_SETTINGS)).round().astype(int))
    chosen, names = ranked.isel(setting=some), [labels[i] for i in some]
    about = "The interquartile mean of each setting, with its 95 % interval; the best setting is orange."
    note = f"These are {len(some)} of {total} settings, evenly spaced in the ranking." if len(some) < total else ""
    drawn = [plot(draw_field(chosen, name, names)) for name in varied]
    pairs = list(itertools.combinations(fields_of_grid(scores), 2))
    maps = [plot(draw_pair(scores, x, y), _other_fields(scores, ranked, x, y)) for x, y in pairs[:MAX_PAIRS]]
    return [
        sentences(about if scores.sizes["seed"] > 1 else "The score of each setting; the best is orange.", note),
        element("div", *drawn, class_="grid"),
        element("h3", "Heat maps") if maps else None,
        sentences(f"The first {MAX_PAIRS} of {len(pairs)} pairs of fields." if len(pairs) > MAX_PAIRS else ""),
        element("div", *maps, class_="grid") if maps else None,
        *(_importance(scores) if len(varied) > 1 else []),
    ]


def _other_fields(scores: xarray.DataArray, ranked: xarray.Dataset, x: str, y: str) -> str:
    """The caption of a heat map: where the fields are that it does not show."""
    others = [name for name in varied_fields(scores) if name not in (x, y)]
    best = {name: ranked[name].values[0].item() for name in others}
    return f"The interquartile mean over seeds{', at the best ' if best else ''}{show_setting(best)}."


def _importance(scores: xarray.DataArray) -> list[Element | None]:
    shares = importance(scores).to_series().to_dict()
    last = {"seeds": shares.pop("seeds"), "interactions and rest": shares.pop("rest")}
    ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))
    rows = []
    for name, share in (ordered | last).items():
        meter = element("meter", min="0", max="1", value=f"{share:.3f}")
        rows.append({"field": in_words(str(name)), "share": f"{100 * share:.0f} %", "": meter})
    return [
        element("h3", "Importance of fields"),
        sentences("The share of the variance of all runs' scores that each field explains by itself."),
        table(rows),
    ]


def sections_of_run(metrics: xarray.Dataset) -> list[Element]:
    """The scores of the agents, their learning curve and all metrics; `metrics` has dimensions (`seed`,) `updates`."""
    failed, scores = failures_of(metrics), np.atleast_1d(final_scores(metrics).values).tolist()
    rows = [
        {"agent": agent, "return": "" if math.isnan(score) else f"{score:.2f}", "failure": failed.get(agent, "")}
        for agent, score in enumerate(scores[:MAX_ROWS])
    ]
    rows = rows if failed else [{name: x for name, x in row.items() if name != "failure"} for row in rows]
    nothing = "all agents failed" if len(failed) == len(scores) else "no episode ended"
    mean = facts([("mean over agents", interval(*mean_interval(scores), nothing=nothing))])
    result = section(
        "Result",
        sentences(f"The return of the last {count_scored(metrics)} in training of each agent that did not fail."),
        mean,
        table(rows) if len(rows) > 1 else None,
        sentences(f"The table has the first {MAX_ROWS} of {len(scores)} agents." if len(scores) > MAX_ROWS else ""),
    )
    which = f"the first {MAX_AGENTS} agents as thin lines" if len(scores) > MAX_AGENTS else "each agent as a thin line"
    caption = f"The mean over agents with its 95 % interval, and {which}." if len(scores) > 1 else ""
    curve = section("Learning curve", plot(draw_runs(metrics), f"{caption} Drag to zoom, double-click to zoom out."))
    numbers = {name: x for name, x in split_vectors(metrics).items() if "updates" in x.dims and x.dtype.kind in "iuf"}
    drawn = [plot(draw_metric(x, name)) for name, x in list(numbers.items())[:MAX_METRICS]]
    note = f"The first {MAX_METRICS} of {len(numbers)} metrics." if len(numbers) > MAX_METRICS else ""
    about = "The mean over agents and their range, in spans of updates where there are many."
    return [result, curve, section("Metrics", sentences(about, note), element("div", *drawn, class_="grid"))]


def population_section(lineage: Lineage) -> Element:
    """The winner of a population, the hyperparameters that its line went through, and those of all members."""
    steps, line, schedule = lineage.metrics["step"].values, lineage.line, lineage.schedule()
    rows = [{name.replace("_", " "): show(x) for name, x in row.items()} for row in schedule]
    drawn = [plot(draw_members(x, steps, line, name)) for name, x in lineage.values.items()]
    copies = int((lineage.parents != np.arange(len(lineage.parents))[:, None]).sum())
    moves = int((np.diff(line) != 0).sum())
    return section(
        "Population",
        sentences(
            f"Member {lineage.winner} won. Its line began as member {line[0]} and moved to another member "
            f"{count(moves, 'time')}. In all evolutions together members were replaced {count(copies, 'time')}.",
            f"The plots have the first {MAX_AGENTS} members." if len(lineage.parents) > MAX_AGENTS else "",
        ),
        table(rows[:MAX_ROWS], "The schedule of the line"),
        element("div", *drawn, class_="grid"),
    )


def failure_section(failures: Sequence[str], num_runs: int) -> list[Element]:
    """The failed runs with their reasons, one sentence each; no section without any."""
    if not failures:
        return []
    items = [element("li", sentence) for sentence in failures[:MAX_ROWS]]
    more = f"{len(failures) - MAX_ROWS} more are not listed." if len(failures) > MAX_ROWS else ""
    head = sentences(f"{len(failures)} of {count(num_runs, 'run')} turned nan.", more)
    return [section("Failed runs", head, element("ul", *items))]


def ignored_section(ignored: Sequence[str]) -> list[Element]:
    """The files that were ignored, one sentence each; no section without any."""
    return [section("Ignored files", element("ul", *[element("li", x) for x in ignored[:MAX_ROWS]]))] if ignored else []


def settings_section(
    settings: Mapping[str, Any], defaults: Mapping[str, Any], swept: Mapping[str, Sequence[Any]] | None = None
) -> Element:
    """The settings: those that are swept, those that differ from the defaults, and all, folded.

    Args:
        settings: name -> value.
        defaults: name -> value; settings without a default are only in the folded table.
        swept: the values of every swept field.
    """
    swept = swept or {}
    rows = [
        {
            "setting": name,
            "value": "swept" if name in swept else shorten(show(value), 120),
            "default": show(defaults[name]) if name in defaults else "",
        }
        for name, value in settings.items()
    ]
    compared = [row for row in rows if row["setting"] in defaults and row["setting"] not in swept]
    changed = [row for row in compared if row["value"] != row["default"]]
    fields = [
        {"field": name, "values": count(len(values), "value"), "": shorten(", ".join(map(show, values)), 300)}
        for name, values in swept.items()
    ]
    return section(
        "Settings",
        table(fields, "Swept fields") if fields else None,
        table(changed, "Different from the defaults")
        if changed
        else sentences("All other settings are the defaults." if fields else "All settings are the defaults."),
        folded(f"All {len(rows)} settings", table(rows)),
    )


def sessions_section(sessions: Sequence[Machine], speed: Sequence[tuple[str, str]]) -> Element:
    """What made the results: time and speed, and for every process its command, code, packages and device.

    Args:
        sessions: in their order.
        speed: names and values.
    """
    newest = facts(_describe_session(sessions[-1]))
    older = [facts(_describe_session(session)) for session in sessions[-2 : -MAX_ROWS - 2 : -1]]
    return section(
        "Speed and provenance",
        facts(speed) if speed else None,
        element("h3", "Newest session" if older else "Session"),
        newest,
        folded(count(len(sessions) - 1, "earlier session"), *older) if older else None,
    )


def _describe_session(session: Mapping[str, Any]) -> list[tuple[str, str]]:
    device, identity = session["device"], session.get("identity") or {}
    plugged = {**identity, **{k: v for x in session.get("identities", {}).values() for k, v in x.items()}}
    described = [
        ("started", session["started"]),
        ("command", shlex.join(session["command"])),
        ("code", session.get("code") or "not a checkout"),
        ("packages", ", ".join(f"{name} {version}" for name, version in session["versions"].items())),
        ("device", f"{device['count']} x {device['kind']}, {session['cpu_cores']} CPU cores"),
        ("XLA flags", session.get("xla_flags", "")),
        ("parts", ", ".join(f"{name} = {shorten(x, 80)}" for name, x in plugged.items())),
        ("work", f"{session['steps']:,} steps in {session['run_seconds']:.1f} s" if "steps" in session else ""),
    ]
    return [(name, value) for name, value in described if value]
