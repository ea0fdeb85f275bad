"""`purejaxppo train` and `purejaxppo resume`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from purejaxppo.cli.options import Settings, check_whole, complete, make, parse, prepare_cpu
from purejaxppo.text import count


@dataclass(frozen=True)
class Train(Settings):
    """Train PPO on an environment. Flags that are not given come from its preset."""

    num_seeds: int = 1
    """Agents, trained side by side in one program."""
    num_devices: int = 1
    """Devices, of a CPU its cores, among which the environments of every agent are shared out; it pays from about 512
    transitions per minibatch."""
    one_thread: bool = False
    """Keep XLA to one thread of a CPU: faster for one agent with fewer transitions per minibatch than that, slower for
    all else."""
    seed: int = 0
    """Where the random keys of all agents come from."""
    total_steps: int | None = None
    """Environment steps of each agent; sets num_updates to as many whole updates as fit."""
    out: Path | None = None
    """Folder for the results; runs/ENV-TIME if none is given."""
    save_every: float = 60.0
    """Seconds between two checkpoints; one is written at the end too."""
    keep: int = 2
    """Checkpoints that are kept, the newest."""
    evaluate_every: int | None = None
    """Updates after which every agent plays whole episodes in environments of its own; never if not given."""
    log: tuple[Literal["console", "csv", "json", "tensorboard", "wandb"], ...] = ()
    """Where metrics go while it trains, besides the progress bar: lines, log.csv, log.jsonl, TensorBoard, W&B."""


@dataclass(frozen=True)
class Resume:
    """Go on with a training run that was interrupted or killed, or extend one."""

    folder: tyro.conf.Positional[Path]
    """What `train` left."""
    total_steps: int | None = None
    """Environment steps of each agent over the whole run, more than it was begun with; schedules then end there."""
    one_thread: bool = False
    """Keep XLA to one thread of a CPU (see `train`)."""


def train(arguments: list[str]) -> int:
    """Trains, prints a table, and leaves a folder."""
    prepare_cpu(arguments)
    options = parse(Train, "train", arguments)
    check_whole(
        num_seeds=(options.num_seeds, 1),
        seed=(options.seed, 0),
        num_devices=(options.num_devices, 1),
        keep=(options.keep, 1),
        evaluate_every=(1 if options.evaluate_every is None else options.evaluate_every, 1),
    )
    if not options.save_every >= 0:
        raise ValueError(f"save_every={options.save_every} must be a number of seconds, at least 0")
    options = complete(options, options.env)

    import jax

    from purejaxppo.batched import batched
    from purejaxppo.experiment.files import prepare
    from purejaxppo.experiment.provenance import describe
    from purejaxppo.experiment.runs.sinks import make_sink
    from purejaxppo.sharded import sharded

    ppo = make(options)
    if options.num_devices > jax.device_count():
        raise ValueError(
            f"num_devices={options.num_devices} must be at most {jax.device_count()}, the devices (of a CPU the cores) "
            "that there are"
        )
    ppo = batched(sharded(ppo, options.num_devices) if options.num_devices > 1 else ppo)
    prepare(options.out)
    for name in options.log:
        make_sink(name, options.out)
    names = "seed", "num_devices", "save_every", "keep", "evaluate_every"
    how = {name: getattr(options, name) for name in names} | {"log": list(options.log)}
    settings = describe(options.env, options.config, options.hyperparams, num_runs=options.num_seeds, **how)
    return _train(ppo, settings, options.out)


def resume(arguments: list[str]) -> int:
    """Goes on with a run, prints a table, and leaves its folder complete."""
    prepare_cpu(arguments)
    options = tyro.cli(Resume, args=arguments, prog="purejaxppo resume")

    from purejaxppo.config import Config
    from purejaxppo.experiment.program import cores_as_devices
    from purejaxppo.experiment.runs.described import begun_settings
    from purejaxppo.experiment.runs.saved import remake

    settings = begun_settings(options.folder)
    if settings["num_devices"] > 1:
        cores_as_devices()
    if options.total_steps is not None:
        config = Config(**settings["config"])
        longer = config.with_total_steps(options.total_steps)
        if longer.num_updates < config.num_updates:
            raise ValueError(f"total_steps={options.total_steps} must be at least the {config.total_steps} of the run")
        settings["config"]["num_updates"] = longer.num_updates
    return _train(remake(settings, settings["num_devices"]), settings, options.folder)


def _train(ppo, settings: dict, out: Path) -> int:
    """Trains as settings say, from wherever the run in a folder is."""
    import jax

    from purejaxppo.batched import seed_keys
    from purejaxppo.experiment.runs.described import train_as_described

    config, devices = ppo.config, settings["num_devices"]
    print(
        f"{settings['env']}: {count(settings['num_runs'], 'agent')} x {config.total_steps:,} steps "
        f"({config.num_updates} updates of {config.num_envs} environments x {config.num_steps} steps) "
        f"on {f'{devices} x ' if devices > 1 else ''}{jax.devices()[0].device_kind}",
        flush=True,
    )
    result = train_as_described(ppo, settings, out)
    metrics = result.metrics.rename(run="seed")
    draw(metrics, out, settings["env"])
    if result.interrupted:
        done = metrics.sizes["update"]
        print(f"interrupted after {done} of {config.num_updates} updates: purejaxppo resume {out} goes on")
        return 130
    policy, env_params = jax.device_get((result.state.policy, result.state.env_params))  # to be played on one device
    keys = seed_keys(jax.random.key(settings["seed"]), np.arange(settings["num_runs"]))
    evaluation = jax.jit(ppo.evaluate)(keys, policy, env_params)
    print(_table(result, metrics, evaluation, out))
    return 0


def _table(result, metrics, evaluation, out: Path) -> str:
    from purejaxppo.experiment.report.metrics import last_episodes, mean_interval

    num_agents, played = evaluation.episode_return.shape
    steps = metrics.sizes["update"] * result.ppo.config.steps_per_update
    rows = [
        ("return, last 100 episodes", interval(*mean_interval(last_episodes(metrics)))),
        (f"return, {played} fresh episodes", interval(*mean_interval(evaluation.episode_return.mean(1)))),
        ("steps", f"{steps:,} x {count(num_agents, 'agent')}"),
    ]
    if result.num_updates:
        rows += [
            ("steps per second", f"{result.steps_per_second:,.0f}"),
            ("compile", f"{result.compile_seconds:.1f} s"),
            ("run", f"{result.run_seconds:.1f} s"),
        ]
    return "\n".join(f"  {name:<28}{value}" for name, value in [*rows, ("saved in", str(out))])


def interval(mean: float, low: float, high: float, over: str = "agents") -> str:
    """A mean with its interval over agents, or what else, as text."""
    if mean != mean:
        return "no episode ended"
    return f"{mean:.2f}" + (
        f"  [{low:.2f}, {high:.2f}] 95 % over {over}" if low == low else "  (one agent: no interval)"
    )


def draw(metrics, out: Path, title: str) -> str:
    """Draws the learning curve of a run in its folder."""
    import matplotlib

    matplotlib.use("Agg")
    from purejaxppo.experiment.report.curve import plot_learning_curve

    ax = plot_learning_curve(metrics, title=title)
    ax.figure.savefig(out / "learning_curve.png", dpi=150)
    return "learning_curve.png"
