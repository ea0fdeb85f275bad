"""`purejaxppo train` and `purejaxppo resume`."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from purejaxppo.cli.distributed import Distributed, check_folder, first_speaks, join_others
from purejaxppo.cli.options import (
    ALL_FAILED,
    NOT_SAVED,
    TrainingOptions,
    check_counts,
    check_num_devices,
    complete,
    draw_without_screen,
    keep_programs,
    make,
    make_folder,
    parse,
    prepare_jax,
    save_figures,
    say,
)
from purejaxppo.cli.plugged import Plugged, check_given, make_plugged
from purejaxppo.config import Config
from purejaxppo.text import count, interval

if TYPE_CHECKING:
    import jax
    import xarray

    from purejaxppo.experiment.runs.fit import Fit
    from purejaxppo.experiment.runs.launch import Launch


@dataclass(frozen=True)
class TrainOptions(TrainingOptions):
    """Train PPO on an environment. Flags that are not given come from its preset."""

    num_seeds: int = 1
    """Agents that train side by side in one program."""
    num_devices: int | None = None
    """Devices, or CPU cores, that share the environments of every agent, 1 by default; worthwhile above about 512
    transitions per minibatch. With --distributed all devices of all processes."""
    one_thread: bool = False
    """Limit XLA to one CPU thread: faster for one agent with fewer transitions per minibatch than that, slower for
    everything else."""
    seed: int = 0
    """Random seed."""
    total_steps: int | None = None
    """Environment steps of each agent; sets num_updates to as many whole updates as fit."""
    out: Path | None = None
    """Folder for the results; runs/ENV-TIME by default."""
    distributed: Distributed = None
    """Train as one of several processes, on the devices of all: the same command in each, with a folder that all see.
    SLURM, Open MPI and Kubernetes tell the rest; elsewhere 0/2 HOST:PORT is the first of two, at whose address they
    meet."""
    save_every: float = 60.0
    """Seconds between two checkpoints; one is written at the end too."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    evaluate_every: int | None = None
    """Updates between two evaluations, in which every agent plays whole episodes in fresh environments; there is one
    more at the end. By default there are none."""
    keep_best: bool = False
    """Keep the policy of the best evaluation of every agent too, for `evaluate`, `render` and `export --best`."""
    log: tuple[Literal["console", "csv", "json", "tensorboard", "wandb"], ...] = ()
    """Where to log metrics during training besides the progress bar: console, log.csv, log.jsonl, TensorBoard, W&B."""


@dataclass(frozen=True)
class ResumeOptions:
    """Continue a training run that was interrupted or killed, or extend one."""

    folder: tyro.conf.Positional[Path]
    """The folder that `train` wrote."""
    total_steps: int | None = None
    """Environment steps of each agent over the whole run, to extend it; its schedules then end there."""
    one_thread: bool = False
    """Limit XLA to one CPU thread (see `train`)."""
    deterministic: bool = False
    """Have a GPU compute the same bits in every run (see `train`)."""
    compile_cache: str | None = None
    """Folder that keeps compiled programs, or off (see `train`)."""
    distributed: Distributed = None
    """Resume in several processes (see `train`), as many as now."""
    env: str | None = None
    """The environment again, if it was given as module:name."""
    allow_changed: tuple[str, ...] = ()
    """What may differ from what the run was trained with, such as loss or optimizer."""
    plugged: tyro.conf.OmitArgPrefixes[Plugged] = field(default_factory=Plugged)


def train(arguments: list[str]) -> int:
    """Trains, prints a table, and leaves a folder."""
    prepare_jax(arguments)
    join_others(arguments)
    options = parse(TrainOptions, "train", arguments)
    check_counts(options, "num_seeds", "num_devices", "keep", "evaluate_every")
    check_counts(options, "seed", at_least=0)
    if not options.save_every >= 0:
        raise ValueError(f"save_every={options.save_every} must be a number of seconds, at least 0")
    check_folder(options)
    options = complete(options, arguments)

    from purejaxppo.batched import batched
    from purejaxppo.experiment.distributed import ALL
    from purejaxppo.experiment.runs.launch import Launch, launch_run
    from purejaxppo.experiment.runs.sinks import check_package
    from purejaxppo.sharded import sharded

    ppo = make(options)
    options = replace(options, num_devices=_choose_devices(options.num_devices))
    assert options.num_devices
    ppo = batched(sharded(ppo, options.num_devices) if options.num_devices > 1 else ppo)
    for name in options.log:
        check_package(name)
    names = "num_seeds", "seed", "num_devices", "save_every", "keep", "evaluate_every", "keep_best", "log"
    custom = options.plugged.given() | ({"env": options.env} if ":" in options.env else {})
    launch = Launch(**{name: getattr(options, name) for name in names}, plugged=custom)
    folder = make_folder(options.env) if options.out is None else options.out
    # The command of several processes also resumes: a scheduler starts them all again.
    with ALL.claim_folder(folder, new=options.distributed is None) as lock:
        _print_header(options.env, options.config, launch)
        return _report(partial(launch_run, ppo, options.hyperparams, launch, lock or folder), launch, folder)


def _choose_devices(wanted: int | None) -> int:
    """The number of devices that share a run: as wanted, or one, or all of several processes."""
    import jax

    from purejaxppo.experiment.distributed import process_count

    if process_count() == 1:
        check_num_devices(wanted)
        return wanted or 1
    if wanted not in (None, jax.device_count()):
        raise ValueError(
            f"num_devices={wanted} must be {jax.device_count()}, all devices of the {process_count()} processes (leave "
            "it out)"
        )
    return jax.device_count()


def resume(arguments: list[str]) -> int:
    """Resumes a run, prints a table, and completes its folder."""
    prepare_jax(arguments)
    join_others(arguments)
    with first_speaks():
        options = tyro.cli(ResumeOptions, args=arguments, prog="purejaxppo resume")

    from purejaxppo.experiment.distributed import ALL
    from purejaxppo.experiment.jax_setup import cores_as_devices
    from purejaxppo.experiment.runs.launch import read_launch, read_newest_settings
    from purejaxppo.experiment.runs.launch import resume as resume_run

    settings = read_newest_settings(options.folder)
    launch, config, num_updates = read_launch(settings, options.folder), settings.config, None
    if launch.num_devices > 1:
        cores_as_devices()
    if options.total_steps is not None:
        config = config.with_total_steps(options.total_steps)
        num_updates = config.num_updates
        if num_updates < settings.config.num_updates:
            raise ValueError(
                f"total_steps={options.total_steps} must be at least the {settings.config.total_steps} of the run"
            )
    keep_programs(options.compile_cache)
    given = options.plugged.given() | ({"env": options.env} if options.env else {})
    check_given(given, launch.plugged, options.folder)

    def make_one(env: str, config: Config):
        return make_plugged(options.env or env, config, options.plugged)

    with ALL.claim_folder(options.folder) as lock:
        _print_header(settings.env, config, launch)
        resumed = partial(
            resume_run,
            lock or options.folder,
            num_updates=num_updates,
            make=make_one,
            allow_changed=options.allow_changed,
        )
        return _report(resumed, launch, options.folder)


def _print_header(env: str, config: Config, launch: "Launch"):
    import jax

    devices = min(launch.num_devices, jax.device_count())
    say(
        f"{env}: {count(launch.num_seeds, 'agent')} x {config.total_steps:,} steps "
        f"({config.num_updates} updates of {config.num_envs} environments x {config.num_steps} steps) "
        f"on {f'{devices} x ' if devices > 1 else ''}{jax.devices()[0].device_kind}",
    )


def _report(fit: "Callable[[], Fit]", launch: "Launch", folder: Path) -> int:
    """Trains, draws the learning curve, evaluates the agents, prints a table; returns the exit status."""
    import jax

    from purejaxppo.batched import seed_keys
    from purejaxppo.experiment.distributed import is_first, process_count
    from purejaxppo.experiment.loop import Interrupted
    from purejaxppo.experiment.program import SELDOM

    try:
        result = fit()
    except Interrupted as error:
        result = error.result
    ppo, saved = result.ppo, not result.unsaved
    metrics = result.metrics.rename(run="seed")
    if saved and is_first():
        draw(metrics, folder, ppo.env.name)
    if result.interrupted:
        done = metrics.sizes["updates"]
        again = "the same command" if process_count() > 1 else f"purejaxppo resume {folder}"
        say(f"interrupted after {done} of {ppo.config.num_updates} updates: {again} continues")
        return 130 if saved else NOT_SAVED
    policy, env_params = jax.device_get((result.state.policy, result.state.env_params))  # to evaluate on one device
    keys = seed_keys(jax.random.key(launch.seed), jax.numpy.arange(launch.num_seeds))
    play = jax.jit(ppo.evaluate, compiler_options=SELDOM)
    played = play(keys, policy, env_params).episode_return
    best = play(keys, result.best.policy, env_params).episode_return if result.best else None
    say(*_table(result, metrics, played, best, folder).split("\n"))
    if not saved:
        return NOT_SAVED
    return ALL_FAILED if len(result.failed()) == launch.num_seeds else 0


def _table(
    result: "Fit", metrics: "xarray.Dataset", fresh: "jax.Array", of_best: "jax.Array | None", folder: Path
) -> str:
    """The results as lines: `fresh` [R, E] are returns of fresh episodes, `of_best` those of the best policies."""
    from purejaxppo.experiment.report.metrics import mean_interval
    from purejaxppo.experiment.report.statistics import count_scored, final_scores

    num_agents, played = fresh.shape
    steps = metrics.sizes["updates"] * result.ppo.config.steps_per_update
    failed = metrics["failed_update"].values > 0
    nothing = "failed" if failed.all() else "no episode ended"
    last = final_scores(metrics)
    rows = [
        (f"return, last {count_scored(metrics)}", interval(*mean_interval(last), nothing=nothing)),
        (
            f"return, {played} fresh episodes",
            interval(*mean_interval(np.where(failed, np.nan, fresh.mean(1))), nothing=nothing),
        ),
        ("steps", f"{steps:,} x {count(num_agents, 'agent')}"),
    ]
    if failed.any():
        rows.insert(2, ("failed", f"{failed.sum()} of {count(num_agents, 'agent')}, left out above"))
    if result.best and of_best is not None:
        evaluated = np.where(result.best.update > 0, of_best.mean(1), np.nan)
        rows.insert(2, ("the same, best policies", interval(*mean_interval(evaluated), nothing="not evaluated")))
    if result.num_updates:
        rows += [
            ("steps per second", f"{result.steps_per_second:,.0f}"),
            ("compile", f"{result.compile_seconds:.1f} s"),
            ("run", f"{result.run_seconds:.1f} s"),
        ]
    else:
        rows.append(("run", "complete before, nothing was left to train"))
    where = "not all saved in" if result.unsaved else "saved in"
    rows.append((where, str(folder)))
    width = max(26, *(len(name) for name, _ in rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def draw(metrics: "xarray.Dataset", folder: Path, title: str) -> list[str]:
    """Draws the learning curve of a run into a folder; returns the names of the files."""
    draw_without_screen()
    from purejaxppo.experiment.report.curve import plot_learning_curve

    return save_figures({"learning_curve": plot_learning_curve(metrics, title=title)}, folder)
