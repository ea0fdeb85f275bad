"""The report on a folder: one page with what a run or a sweep is, what came of it, and what made it."""

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xarray

from purejaxppo.config import Config, Hyperparams
from purejaxppo.experiment.files import check_file, kind_of, refuse_study, replace_file
from purejaxppo.experiment.provenance import as_json
from purejaxppo.experiment.report.failures import failures_of, mark_failures
from purejaxppo.experiment.runs.checkpoints import Checkpoints
from purejaxppo.experiment.runs.launch import read_newest_settings
from purejaxppo.experiment.runs.saved import is_complete, read_metrics
from purejaxppo.experiment.runs.settings import SEARCH, RunSettings
from purejaxppo.experiment.sweeps.best import find_lineage
from purejaxppo.experiment.sweeps.result import load_sweep
from purejaxppo.experiment.sweeps.slices import SweepSession, read_sessions, read_sweep
from purejaxppo.experiment.sweeps.sweep import Sweep
from purejaxppo.text import count


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes a page of HTML on the run or the sweep in a folder, finished or not, and returns its path.

    The page is one file, which browsers open without a network: ranking, learning curves, scores, failures, settings
    and provenance, with interactive plots. Needs `pip install plotly`.

    Args:
        folder: what `fit`, `run_sweep` or the command line wrote.
        out: the file to write; report.html in the folder by default.

    Raises:
        ValueError: if the folder holds neither a run nor a sweep, if its files are damaged, if `out` cannot be written,
            or if plotly is not installed.
    """
    folder = Path(folder)
    out = folder / "report.html" if out is None else Path(out)
    refuse_study(folder)
    kind = kind_of(folder)
    if kind is None:
        raise ValueError(f"folder={folder} holds neither a run nor a sweep (name one that was trained into)")
    if importlib.util.find_spec("plotly") is None:
        raise ValueError("a report needs plotly (pip install plotly)")
    check_file(out)
    text = _page_of_sweep(folder) if kind == "sweep" else _page_of_run(folder)
    replace_file(out, lambda half: half.write_text(text, encoding="utf-8"))
    return out


def _page_of_sweep(folder: Path) -> str:
    from purejaxppo.experiment.report import page, sections

    sweep, sessions = read_sweep(folder), read_sessions(folder)
    settings = f"{count(len(sweep.table), 'setting')} x {count(sweep.num_seeds, 'seed')}"
    try:
        result = load_sweep(folder)
    except ValueError as error:  # nothing is trained yet
        status, parts = f"There are no results: {error}.", []
    else:
        failed = result.failed()
        done = sweep.num_runs - result.num_unfinished
        status = f"{done} of {count(sweep.num_runs, 'run')} are complete, {len(failed)} of them failed."
        if result.num_unfinished:
            status += " Unfinished runs are ranked by what they have done."
        ranked = result.ranked() if result.rungs else None
        rungs = [] if ranked is None else sections.rungs_section(result.rung_scores, result.rung_steps, ranked)
        parts = [
            *sections.sections_of_sweep(result.metrics, ranked),
            *rungs,
            *sections.failure_section(failed, sweep.num_runs),
            *sections.ignored_section(result.slices.ignored),
        ]
    values = asdict(sweep.config) | {name: as_json(sweep.hyperparams.get(name)) for name in sweep.hyperparams.names}
    values |= {"num_seeds": sweep.num_seeds, "seed": sweep.seed}
    parts += [
        sections.settings_section(values, _defaults(), _swept(sweep)),
        sections.sessions_section(sessions, _speed_of_sweep(sessions)),
    ]
    return page.make_page(f"{sweep.env}: a sweep of {settings}", status, parts)


def _page_of_run(folder: Path) -> str:
    from purejaxppo.experiment.report import page, sections

    settings = read_newest_settings(folder)
    metrics, note = _read_progress(folder)
    config, num_runs = settings.config, settings.num_runs or 1
    done = int(metrics["updates"][-1]) if metrics is not None else 0
    status = f"{done} of {config.num_updates} updates, {done * config.steps_per_update:,} steps per agent. {note}"
    parts = []
    if metrics is not None:
        failed = list(failures_of(metrics).values())
        lineage = find_lineage(folder, settings, metrics)
        population = [sections.population_section(lineage)] if lineage else []
        parts = [*population, *sections.sections_of_run(metrics), *sections.failure_section(failed, num_runs)]
    values = asdict(config) | settings.hyperparams
    values |= {f"env.{name}": x for name, x in settings.env_params.items()}
    notes = settings.notes.get("launch") or settings.notes.get(SEARCH) or settings.notes
    values |= {str(name): x for name, x in notes.items()} if isinstance(notes, Mapping) else {}
    parts += [
        sections.settings_section(values, _defaults()),
        sections.sessions_section(settings.sessions, _speed_of_run(settings)),
    ]
    return page.make_page(f"{settings.env}: a run of {count(num_runs, 'agent')}", status, parts)


def _read_progress(folder: Path) -> tuple[xarray.Dataset | None, str]:
    """The metrics of a run as far as they are saved, None if they are not, and a sentence on that."""
    if is_complete(folder):
        try:
            return read_metrics(folder), ""
        except ValueError as error:
            damaged = f"{error}; the newest checkpoint is shown."
    else:
        damaged = ""
    checkpoint = Checkpoints(folder).newest()
    if checkpoint is None:
        return None, damaged or "Nothing is saved yet."
    metrics = mark_failures(checkpoint.metrics, checkpoint.arrays)
    metrics = metrics.rename(run="seed") if "run" in metrics.dims else metrics
    return metrics, damaged or "The run is not finished; this is its newest checkpoint."


def _swept(sweep: Sweep) -> dict[str, list[Any]]:
    """The different values of every swept field, in their order."""
    return {name: list(dict.fromkeys(axis[name])) for axis in sweep.table.axes for name in axis}


def _defaults() -> dict[str, Any]:
    hyperparams = Hyperparams()
    return asdict(Config()) | {name: as_json(hyperparams.get(name)) for name in hyperparams.names}


def _speed_of_run(settings: RunSettings) -> list[tuple[str, str]]:
    """Times of the last session that ended."""
    seconds = {"compile": settings.compile_seconds, "run": settings.run_seconds}
    speed = [(name, f"{value:.1f} s") for name, value in seconds.items() if value is not None]
    rate = settings.steps_per_second
    return speed + ([("steps per second", f"{rate:,.0f}, of all agents")] if rate is not None else [])


def _speed_of_sweep(sessions: list[SweepSession]) -> list[tuple[str, str]]:
    """Steps and time of all sessions that ended."""
    work = [
        (session["steps"], session["run_seconds"])
        for session in sessions
        if "steps" in session and "run_seconds" in session
    ]
    steps, seconds = (sum(column) for column in zip(*work)) if work else (0, 0.0)
    if not steps:
        return []
    speed = [("steps", f"{steps:,}, of all runs"), ("run", f"{seconds:.1f} s")]
    return speed + [("steps per second", f"{steps / max(seconds, 1e-9):,.0f}, of all runs")]
