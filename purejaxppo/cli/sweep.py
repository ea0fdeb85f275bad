"""`purejaxppo sweep` and `purejaxppo plot`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from purejaxppo.cli.distributed import check_folder, join_others
from purejaxppo.cli.options import (
    ALL_FAILED,
    NOT_SAVED,
    check_counts,
    check_num_devices,
    complete,
    draw_without_screen,
    keep_programs,
    make_folder,
    parse,
    prepare_jax,
    save_figures,
    say,
)
from purejaxppo.cli.plugged import to_named
from purejaxppo.cli.space import SpaceOptions, make_table
from purejaxppo.table import PLUGGED
from purejaxppo.text import count

if TYPE_CHECKING:
    from purejaxppo.experiment.sweeps.result import SweepResult
    from purejaxppo.experiment.sweeps.sweep import Sweep

FEW = 8  # agents, below which bootstrapped intervals are clearly too narrow (notebook 6 measures it)


@dataclass(frozen=True)
class SweepOptions(SpaceOptions):
    """Train many settings with several seeds each, rank and plot them. Flags that are not given come from the preset
    of the environment."""

    num_seeds: int = 8
    """Agents per setting."""
    slice_size: int | None = None
    """Agents that train together in one program; chosen for this machine by default, and kept in the folder."""
    num_devices: int | None = None
    """Devices that the agents are distributed across; by default all GPUs or TPUs, or all cores of the CPU as one. With
    this flag the cores of a CPU are devices."""
    updates_per_chunk: int | None = None
    """Updates between two saves, or reactions to Ctrl-C; a fiftieth of the run by default."""
    share: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[I/N]")] = None
    """Train every N-th slice of the sweep from the I-th on, I from 0, as one of N processes that share --out and need
    not know each other; --share alone reads I/N from the variables of a SLURM job array. The same command without
    --share trains what is missing then, ranks and plots."""


@dataclass(frozen=True)
class PlotOptions:
    """Redraw the plots of a sweep or of a run from its folder."""

    folder: tyro.conf.Positional[Path]
    """The folder that `train`, `sweep` or `search` wrote."""
    line: str | None = None
    """Field with a line for each of its values."""
    panel: str | None = None
    """Field with a panel for each of its values."""
    statistic: Literal["iqm", "mean", "median"] = "iqm"
    """The statistic over seeds: interquartile mean, mean or median."""
    out: Path | None = None
    """Folder for the plots; that of the results by default."""


def sweep(arguments: list[str]) -> int:
    """Prints the plan, trains, prints a ranking, and leaves data and plots."""
    prepare_jax(arguments)
    join_others(arguments)
    options, table = _parse_sweep(arguments)

    import jax

    from purejaxppo.experiment.distributed import is_first
    from purejaxppo.experiment.files import check_writable
    from purejaxppo.experiment.loop import Interrupted
    from purejaxppo.experiment.sweeps.plan import plan_sweep
    from purejaxppo.experiment.sweeps.run import run_sweep
    from purejaxppo.experiment.sweeps.sweep import Sweep

    check_num_devices(options.num_devices, jax.local_device_count())  # each process has its own slices
    if not options.dry_run:
        check_folder(options)
    share = _read_share(options)
    env = to_named("env", options.env) if ":" in options.env else options.env
    shared = options.config, options.hyperparams, options.seed, options.evaluate_every
    wanted = Sweep(env, table, options.num_seeds, *shared)
    keep_programs(options.compile_cache)
    say(*str(wanted).split("\n"))
    if options.out is not None and not options.dry_run:
        check_writable(options.out)
    plan = plan_sweep(
        wanted, options.out, slice_size=options.slice_size, updates_per_chunk=options.updates_per_chunk,
        devices=options.num_devices, allow_changed=options.allow_changed, share=share,
    )  # fmt: skip
    say(*str(plan).split("\n"))
    if options.dry_run:
        return 0
    out = make_folder(f"sweep-{options.env}") if options.out is None else options.out
    if plan.share and not plan.groups:
        _say_missing(wanted, out)
        return 0
    try:
        result = run_sweep(plan, out)
    except Interrupted as error:
        result = error.result
    if plan.share:
        _say_speed(f"share {plan.share}: ", result)
        _say_missing(wanted, out)
    elif is_first():
        _report(result, out, options.env)
    if result.interrupted:
        ranked = "" if plan.share else " and ranked by what they have done"
        say(
            f"interrupted: {result.num_unfinished} of {count(wanted.num_runs, 'run')} are unfinished{ranked}; "
            f"the same command with --out {out} continues"
        )
        return NOT_SAVED if result.unsaved else 130
    if result.unsaved:
        return NOT_SAVED
    return ALL_FAILED if len(result.failed()) == wanted.num_runs else 0


def _report(result: "SweepResult", out: Path, title: str):
    """Prints a ranking, and draws plots beside the data."""
    from purejaxppo.experiment.report.ranking import as_table
    from purejaxppo.experiment.report.statistics import describe_scores, improvements

    narrow = " (too narrow for so few agents)" if result.sweep.num_seeds < FEW else ""
    say(f"ranked by the interquartile mean over agents of {describe_scores(result.scores)}; 95 % intervals{narrow}")
    say(*as_table(result.ranked()).split("\n"))
    for field in (field for field in PLUGGED if field in result.scores.dims):
        for versus, found in improvements(result.scores, field).items():
            low, value, high = (float(found[name]) for name in ("low", "value", "high"))
            say(f"  P({versus}) = {value:.2f}  [{low:.2f}, {high:.2f}] 95 %")
    saved = [] if result.unsaved else ["results.nc", *_draw_sweep(result, out, title)]
    if result.steps:
        _say_speed("", result)
    say(f"  {'not all ' * bool(result.unsaved)}saved in {out}: {', '.join(saved) or 'what fitted'}")


def _say_speed(whose: str, result: "SweepResult"):
    """Prints what a call trained."""
    rate = result.steps / max(result.run_seconds, 1e-9)
    say(f"  {whose}{result.steps:,} steps in {result.run_seconds:.1f} s, {rate:,.0f} per second")


def _say_missing(wanted: "Sweep", out: Path):
    """Prints what is missing of a sweep whose shares are trained, and what comes then."""
    from purejaxppo.experiment.sweeps.division import describe_missing
    from purejaxppo.experiment.sweeps.slices import find_slices

    say(f"  missing of the whole sweep: {describe_missing(wanted, find_slices(out, wanted).read(warn=False))}")
    say(f"  the same command without --share, with --out {out}, trains what is missing then, ranks and plots")


def _read_share(options: SweepOptions) -> str | None:
    """The share as the library reads it."""
    if options.share is None:
        return None
    share = " ".join(options.share) or "slurm"
    if options.out is None:
        raise ValueError(
            f"share={share} needs --out FOLDER, one that all shares see (default folders differ between machines)"
        )
    return share


def plot(arguments: list[str]) -> int:
    """Redraws the plots of a folder."""
    options = tyro.cli(PlotOptions, args=arguments, prog="purejaxppo plot")

    from purejaxppo.cli.train import draw
    from purejaxppo.experiment.files import kind_of, make_writable
    from purejaxppo.experiment.runs.saved import read_metrics
    from purejaxppo.experiment.runs.settings import read_settings
    from purejaxppo.experiment.sweeps.best import find_lineage
    from purejaxppo.experiment.sweeps.result import load_sweep

    out = options.out or options.folder
    make_writable(out)
    if kind_of(options.folder) == "sweep":
        loaded = load_sweep(options.folder)
        chosen = {"line": options.line, "panel": options.panel, "statistic": options.statistic}
        plots = _draw_sweep(loaded, out, loaded.sweep.env, **chosen)
    else:
        metrics, settings = read_metrics(options.folder), read_settings(options.folder)
        lineage = find_lineage(options.folder, settings, metrics)
        plots = draw(metrics, out, settings.env)
        plots += save_figures(lineage.plots(settings.env), out) if lineage else []
    say(f"drawn in {out}: {', '.join(plots)}")
    return 0


def _parse_sweep(arguments: list[str]):
    """The options of `sweep`, and the table of settings that they describe."""
    options = parse(SweepOptions, "sweep", arguments)
    check_counts(options, "num_seeds", "num_devices", "slice_size", "updates_per_chunk", "evaluate_every")
    check_counts(options, "seed", at_least=0)
    table = make_table(options)
    return complete(options, arguments), table


def _draw_sweep(result: "SweepResult", out: Path, title: str, **chosen) -> list[str]:
    """Draws every plot that the swept fields allow; returns the names of the files."""
    draw_without_screen()
    try:
        figures = result.plots(title, **chosen)
    except ValueError as error:
        if any(chosen.get(name) for name in ("line", "panel")):
            raise
        say(f"  no plots: {error}")
        return []
    return save_figures(figures, out)
