"""`purejaxppo search`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from purejaxppo.cli.space import SpaceOptions, make_table, read_distributions, read_space
from purejaxppo.experiment.distributed import is_first
from purejaxppo.table import Table
from purejaxppo.text import align

# Flag -> the methods that it belongs to.
OWN = {
    "num_rungs": ("halving",), "eta": ("halving",), "num_places": ("halving",), "every": ("pbt",),
    "fraction": ("pbt",), "num_devices": ("halving", "pbt"), "batch_size": ("optuna",), "storage": ("optuna",),
    "pruner": ("optuna",),
}  # fmt: skip
# What a folder may not hold already.
OTHERS = {"halving": ("run", "study"), "pbt": ("sweep", "study"), "optuna": ("run", "sweep")}
DEFAULT_SEEDS = {"halving": 8, "pbt": 1, "optuna": 8}


@dataclass(frozen=True)
class SearchOptions(SpaceOptions):
    """Search for the best setting, and print the command that trains it. Flags that are not given come from the preset
    of the environment."""

    method: Literal["halving", "pbt", "optuna"] = "halving"
    """halving: settings that score badly early stop (successive halving). pbt: poor agents continue from copies of good
    ones, with changed hyperparameters (population-based training). optuna: an Optuna study draws settings."""
    num_samples: int = 0
    """Settings to draw from the distributions in `sample`; with --method optuna the trials of the study."""
    num_seeds: int | None = None
    """Agents per setting; by default 8, with --method pbt 1. In pbt all are members of one population."""
    save_every: float = 60.0
    """Seconds between two saves of what is training; what is complete is saved at once."""
    num_rungs: int | None = None
    """halving: how often a setting is compared at most; 4 by default, or fewer if there are too few settings."""
    eta: int | None = None
    """halving: one setting in so many is promoted; 3 by default."""
    num_places: int | None = None
    """halving: settings that train side by side; all by default."""
    every: int | None = None
    """pbt: updates between two evolutions; a twentieth of the run by default."""
    fraction: float | None = None
    """pbt: of the agents, at most replaced by one evolution; 0.25 by default."""
    num_devices: int | None = None
    """halving, pbt: devices, or CPU cores, that share the agents evenly; halving uses all by default, pbt one, or all
    with --distributed. Those of halving are of each process."""
    batch_size: int | None = None
    """optuna: settings that train together; 8 by default."""
    storage: str | None = None
    """optuna: URL of the study that machines share, as postgresql+psycopg://USER:PASSWORD@HOST/DATABASE; study.db in
    the folder by default. Every machine starts the same line with an --out of its own."""

    pruner: Literal["median", "hyperband", "halving"] | None = None
    """optuna: stops settings that score badly early; every setting trains by itself then."""


class Method(NamedTuple):
    """A search that is planned."""

    plan: Any
    run: Callable[[Path], Any]  # folder -> result
    report: Callable[[Any], "Report"]  # of the result


class Report(NamedTuple):
    """The result of a search, ready to print and to draw."""

    ranked: list[dict]  # rows, best first; nan is no score
    best: Callable[[], dict]  # the best setting
    plots: Callable[[str], Mapping[str, Any]]  # title -> figures by name
    unsaved: str = ""
    more: Mapping[str, Any] = {}  # for best.json
    criterion: str = ""  # what the score is, in words


def search(arguments: list[str]) -> int:
    """Prints the plan, searches, prints a ranking and the best setting as a command, and leaves data and plots."""
    prepare_jax(arguments)
    join_others(arguments)
    options = parse(SearchOptions, "search", arguments)
    counts = "evaluate_every", "num_seeds", "num_rungs", "num_places", "every", "num_devices", "batch_size"
    check_counts(options, *counts)
    check_counts(options, "seed", "num_samples", at_least=0)
    if not options.save_every >= 0:
        raise ValueError(f"save_every={options.save_every} must be a number of seconds, at least 0")
    for name, methods in OWN.items():
        if getattr(options, name) is not None and options.method not in methods:
            raise ValueError(
                f"{name}={getattr(options, name)} belongs to --method {' and '.join(methods)}, not to {options.method}"
            )
    if options.distributed is not None and options.method == "optuna":
        raise ValueError(
            "method=optuna takes no --distributed (leave it out, and give the same --storage to several processes)"
        )
    if not options.dry_run:
        check_folder(options)
    options = complete(options, arguments)

    from purejaxppo.experiment.files import check_writable, refuse_other
    from purejaxppo.experiment.loop import Interrupted

    keep_programs(options.compile_cache)
    if options.out is not None:
        refuse_other(options.out, *OTHERS[options.method])
    if options.out is not None and not options.dry_run:
        check_writable(options.out)
    method = METHODS[options.method](options)
    say(*str(method.plan).split("\n"))
    if options.dry_run:
        return 0
    out = make_folder(f"search-{options.env}") if options.out is None else options.out
    interrupted = False
    try:
        result = method.run(out)
    except Interrupted as error:
        result, interrupted = error.result, True
    return _finish(options, method.report(result), out, interrupted)


def _finish(options: SearchOptions, report: Report, out: Path, interrupted: bool) -> int:
    """Prints the ranking and the command, writes best.json and plots; returns the exit status."""
    scored = [row for row in report.ranked if row["score"] == row["score"]]
    if is_first():
        _show(options, report, out, interrupted, scored)
    if report.unsaved:
        return NOT_SAVED
    return 130 if interrupted else 0 if scored else ALL_FAILED


def _show(options: SearchOptions, report: Report, out: Path, interrupted: bool, scored: list[dict]):
    draw_without_screen()
    from purejaxppo.experiment.sweeps.best import BEST, save_best, train_command

    rows = scored + [row | {"score": "none"} for row in report.ranked[len(scored) :]]
    say(*[f"score: {report.criterion}"] * bool(rows and report.criterion))
    say(*(align(rows, 20).split("\n") if rows else ["no setting is trained yet"]))
    if scored:
        sweep, setting = _sweep(options), report.best()
        more = {"method": options.method, "score_of": report.criterion, **report.more}
        save_best(out, sweep, setting, scored[0]["score"], **more)
        say("the best setting trains with", f"  {train_command(sweep, setting)}")
    saved = [*[BEST] * bool(scored), *save_figures(report.plots(options.env), out)]
    say(f"  {'not all ' * bool(report.unsaved)}saved in {out}: {', '.join(saved) or 'what is trained'}")
    if interrupted:
        say(f"interrupted: the same command with --out {out} continues")


def _sweep(options: SearchOptions, table: Table | None = None) -> Any:
    """What all settings share, with the settings of a table."""
    from purejaxppo.experiment.sweeps.sweep import Sweep

    env = to_named("env", options.env) if ":" in options.env else options.env
    given = options.num_seeds or DEFAULT_SEEDS[options.method], options.config, options.hyperparams, options.seed
    return Sweep(env, Table() if table is None else table, *given, options.evaluate_every)


def _own(options: SearchOptions, *names: str) -> dict[str, Any]:
    """The flags of a method that are given."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _halving(options: SearchOptions) -> Method:
    import jax

    from purejaxppo.experiment.sweeps.halving import plan_halving, successive_halving
    from purejaxppo.experiment.sweeps.rungs import describe_criterion

    check_num_devices(options.num_devices, jax.local_device_count())  # each process has its own slices
    own = _own(options, "num_rungs", "eta", "num_places")
    sweep = _sweep(options, make_table(options))
    plan = plan_halving(sweep, options.out, devices=options.num_devices, **own, allow_changed=options.allow_changed)
    return Method(
        plan,
        run=lambda out: successive_halving(plan, out, save_every=options.save_every),
        report=lambda found: Report(
            found.ranked(), found.best, found.plots, found.unsaved, criterion=describe_criterion(sweep, plan.rungs)
        ),
    )


def _pbt(options: SearchOptions) -> Method:
    from purejaxppo.experiment.sweeps.best import MEMBER, UPDATES
    from purejaxppo.experiment.sweeps.population import plan_population, population_search

    check_num_devices(options.num_devices)
    own = _own(options, "every", "fraction")
    found = read_distributions(options)
    words = {name: value for name, x in found.items() for value in x.values if not isinstance(value, (int, float))}
    if words:
        name, value = next(iter(words.items()))
        raise ValueError(f"{name}={value!r} must be a number, since pbt multiplies it (try --method halving or optuna)")
    ranges = {name: (min(x.values), max(x.values)) for name, x in found.items()}
    sweep = _sweep(options, make_table(options))
    plan = plan_population(
        sweep, options.out, explore=ranges, devices=options.num_devices, **own, allow_changed=options.allow_changed
    )
    return Method(
        plan,
        run=lambda out: population_search(
            plan, out, save_every=options.save_every, allow_changed=options.allow_changed
        ),
        report=lambda found: Report(
            found.ranked(),
            found.best,
            found.plots,
            found.fit.unsaved,
            more={
                MEMBER: found.ranked()[0]["member"],
                UPDATES: found.parents.shape[1],
                "schedule": found.schedule(),
            },
            criterion=found.criterion,
        ),
    )


def _optuna(options: SearchOptions) -> Method:
    try:
        import optuna
    except ImportError:
        raise ValueError("method=optuna needs the package optuna (pip install optuna)") from None

    from purejaxppo.experiment.report.search_plots import plot_trials
    from purejaxppo.experiment.report.statistics import describe_scores
    from purejaxppo.experiment.sweeps.optuna_search import best_setting, optuna_search, plan_trials, rank_trials

    if options.sobol:
        raise ValueError(
            "--sobol belongs to halving and pbt, since Optuna's sampler draws its own settings (leave it out)"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = read_space(options)
    sweep, size = _sweep(options), min(options.batch_size or 8, options.num_samples)
    search = {"num_trials": options.num_samples, "batch_size": size, "num_seeds": sweep.num_seeds, "seed": sweep.seed}
    search |= {"config": sweep.config, "hyperparams": sweep.hyperparams, "evaluate_every": sweep.evaluate_every}
    plan = plan_trials(sweep.env, space, prunes=options.pruner is not None, **search)
    num_updates = sweep.config.num_updates
    pruners: dict[str, Callable] = {
        "median": lambda: optuna.pruners.MedianPruner(n_warmup_steps=num_updates // 10),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(-(-num_updates // 50), num_updates),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(-(-num_updates // 50)),
    }
    pruner = pruners[options.pruner]() if options.pruner else None
    return Method(
        plan,
        run=lambda out: optuna_search(
            sweep.env,
            space,
            folder=out,
            storage=options.storage,
            plan=plan,
            save_every=options.save_every,
            pruner=pruner,
            allow_changed=options.allow_changed,
            **search,
        ),  # fmt: skip
        report=lambda study: Report(
            rank_trials(study),
            lambda: best_setting(study, space),
            lambda title: plot_trials(study, title),
            unsaved=study.unsaved,
            criterion=describe_scores(evaluated=options.evaluate_every is not None),
        ),
    )


METHODS: dict[str, Callable[[SearchOptions], Method]] = {"halving": _halving, "pbt": _pbt, "optuna": _optuna}
