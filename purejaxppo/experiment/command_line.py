"""`purejaxppo train ENV`, `bench ENV`, `envs`: flags are made from `Config` and `Hyperparams`."""

import datetime
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from purejaxppo.config import Config, Hyperparams

USAGE = """usage: purejaxppo COMMAND ...

  purejaxppo train ENV [flags]   train one agent or many, by the preset of the environment
  purejaxppo bench ENV [flags]   measure compile time, steps per second, memory, and where the time goes
  purejaxppo envs                list what can be trained, with its preset
  purejaxppo COMMAND --help      all flags of a command
"""


@dataclass(frozen=True)
class Settings:
    """What every command that trains takes. Flags that are not given come from the preset of the environment."""

    env: tyro.conf.Positional[str]
    """A name that `purejaxppo envs` lists."""
    compile_cache: Path | None = None
    """Folder that keeps compiled programs for the next time."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)
    hyperparams: tyro.conf.OmitArgPrefixes[Hyperparams] = field(default_factory=Hyperparams)


@dataclass(frozen=True)
class Train(Settings):
    """Train PPO on an environment. Flags that are not given come from its preset."""

    num_seeds: int = 1
    """Agents, trained side by side in one program."""
    num_devices: int = 1
    """Devices, of a CPU its cores, among which the environments of every agent are shared out; it pays from about 512
    transitions per minibatch."""
    seed: int = 0
    """Where the random keys of all agents come from."""
    total_steps: int | None = None
    """Environment steps of each agent; sets num_updates to as many whole updates as fit."""
    out: Path | None = None
    """Folder for the results; runs/ENV-TIME if none is given."""


@dataclass(frozen=True)
class Bench(Settings):
    """Measure training on this machine. Flags that are not given come from the preset of the environment."""

    num_seeds: tuple[int, ...] = (1, 8, 32)
    """Numbers of agents to be measured, each in one program."""
    rounds: int = 5
    """Repetitions; medians are printed, with the least and the most."""
    seconds: float = 2.0
    """Length of a repetition, about."""
    out: Path | None = None
    """File for the figures as JSON; none is written if none is given."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 2 with one sentence on standard error for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if command not in COMMANDS:
        return _refuse(f"unknown command {command!r} (known: {', '.join(COMMANDS)})")
    try:
        return COMMANDS[command](rest)
    except ValueError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return _refuse("interrupted", status=130)


def train(arguments: list[str]) -> int:
    """Trains, prints a table, and leaves a folder."""
    import jax

    if any(argument.startswith(("--num-devices", "--num_devices")) for argument in arguments):
        from purejaxppo.experiment.program import cores_as_devices

        cores_as_devices()  # before all else: even to look the environment up has JAX begin
    options = _parse_train(arguments)

    from purejaxppo.experiment import folder
    from purejaxppo.experiment.fit import fit
    from purejaxppo.sharding import sharded
    from purejaxppo.sweep import batched, runs

    config = options.config
    ppo = _make(options)
    if options.num_devices > jax.device_count():
        raise ValueError(
            f"num_devices={options.num_devices} must be at most {jax.device_count()}, the devices (of a CPU the cores) "
            "that there are"
        )
    ppo = batched(sharded(ppo, options.num_devices) if options.num_devices > 1 else ppo)
    keys, hyperparams = runs(jax.random.key(options.seed), num_seeds=options.num_seeds, hyperparams=options.hyperparams)
    folder.prepare(options.out)
    more = {"seed": options.seed, "num_seeds": options.num_seeds, "num_devices": options.num_devices}
    settings = folder.describe(options.env, config, options.hyperparams, **more)
    print(
        f"{options.env}: {_count(options.num_seeds, 'agent')} x {config.total_steps:,} steps "
        f"({config.num_updates} updates of {config.num_envs} environments x {config.num_steps} steps) "
        f"on {f'{options.num_devices} x ' if options.num_devices > 1 else ''}{jax.devices()[0].device_kind}",
        flush=True,
    )
    result = fit(ppo, jax.jit(ppo.init)(keys, hyperparams))
    metrics = result.metrics.rename(run="seed")
    settings |= {
        "num_updates_done": metrics.sizes["update"],
        "compile_seconds": result.compile_seconds,
        "run_seconds": result.run_seconds,
        "steps_per_second": result.steps_per_second,
    }
    folder.save(options.out, settings, metrics, result.state.policy)
    _draw(options, metrics)
    final = jax.device_get((result.state.policy, result.state.env_params))  # to be played on one device
    evaluation = jax.jit(ppo.evaluate)(keys, *final)
    print(_table(options, result, metrics, evaluation))
    return 0


def bench(arguments: list[str]) -> int:
    """Measures, prints tables, and leaves a file if one is named."""
    options = _parse(Bench, "bench", arguments)
    if not options.num_seeds:
        raise ValueError("num_seeds must be one number or more")
    for number in options.num_seeds:
        _check_whole(num_seeds=(number, 1))
    _check_whole(rounds=(options.rounds, 1))
    if not 0 < options.seconds < float("inf"):
        raise ValueError(f"seconds={options.seconds} must be a positive number")

    from purejaxppo.experiment import bench, folder

    ppo = _make(options)
    try:
        if options.out:
            options.out.open("a").close()  # what may stand there stays until there are new figures
    except OSError as error:
        raise ValueError(f"out={options.out} cannot be written: {error.strerror} (name another file)") from None
    settings = folder.describe(options.env, options.config, options.hyperparams)
    device, cores = settings["device"], settings["cpu_cores"]
    print(
        f"{options.env}, {options.config.num_envs} environments x {options.config.num_steps} steps, on "
        f"{device['kind']} ({cores} CPU cores), jax {settings['versions']['jax']}; medians of {options.rounds}",
        flush=True,
    )
    results = bench.bench(
        ppo, options.hyperparams, options.num_seeds, rounds=options.rounds, seconds=options.seconds,
        report=lambda line: print(line, flush=True),
    )  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(settings | results, indent=2) + "\n")
    return 0


def envs(arguments: list[str]) -> int:
    """Lists every environment with its preset."""
    tyro.cli(_print_envs, args=arguments, prog="purejaxppo envs")
    return 0


COMMANDS = {"train": train, "bench": bench, "envs": envs}


def _print_envs():
    """List what can be trained: budget in steps, and the settings in which its preset differs from the defaults."""
    from purejaxppo.envs import env_names
    from purejaxppo.experiment.presets import changed_settings, preset

    width = max(map(len, env_names()))
    print(f"{'environment':{width}}  {'steps':>10}  preset, where it differs from the defaults")
    for name in env_names():
        config, hyperparams = preset(name)
        changed = ", ".join(f"{key}={value}" for key, value in changed_settings(config, hyperparams).items())
        print(f"{name:{width}}  {config.total_steps:>10,}  {changed}")


def _parse_train(arguments: list[str]) -> Train:
    options = _parse(Train, "train", arguments)
    _check_whole(num_seeds=(options.num_seeds, 1), seed=(options.seed, 0), num_devices=(options.num_devices, 1))
    if options.total_steps is not None:
        options = replace(options, config=options.config.with_total_steps(options.total_steps))
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return options if options.out else replace(options, out=Path("runs") / f"{options.env}-{time}")


def _parse(kind, command: str, arguments: list[str]):
    """The flags of a command on top of the preset of the environment, which comes first."""
    from purejaxppo.envs import env_names, make_env
    from purejaxppo.experiment.presets import preset

    env, asks_help = arguments[0] if arguments else "-", {"--help", "-h"} & set(arguments)
    if env.startswith("-"):
        if not asks_help:
            raise ValueError(
                f"name an environment first: purejaxppo {command} ENV [flags] (`purejaxppo envs` lists them)"
            )
        env = "CartPole-v1"
    elif env not in env_names():
        make_env(env)
    return tyro.cli(kind, args=arguments, default=kind(env, **preset(env)._asdict()), prog=f"purejaxppo {command}")


def _check_whole(**least):
    """Refuses a number below its least, or too large for a key; each is given as (number, least)."""
    for name, (number, low) in least.items():
        if not low <= number < 2**31:
            raise ValueError(f"{name}={number} must be from {low} to 2**31 - 1")


def _make(options):
    """The PPO of the options, refused now if anything in them does not fit."""
    import jax

    from purejaxppo.experiment.program import cache_compilation
    from purejaxppo.ppo import make_ppo

    if options.compile_cache is not None:
        cache_compilation(options.compile_cache)
    ppo = make_ppo(options.env, options.config)
    jax.eval_shape(lambda key: ppo.init(key, options.hyperparams), jax.random.key(0))
    return ppo


def _table(options: Train, result, metrics, evaluation) -> str:
    from purejaxppo.experiment.results import last_episodes, mean_interval

    played = evaluation.episode_return.shape[1]
    rows = [
        ("return, last 100 episodes", _interval(*mean_interval(last_episodes(metrics)))),
        (f"return, {played} fresh episodes", _interval(*mean_interval(evaluation.episode_return.mean(1)))),
        (
            "steps",
            f"{metrics.sizes['update'] * options.config.steps_per_update:,} x {_count(options.num_seeds, 'agent')}",
        ),
        ("steps per second", f"{result.steps_per_second:,.0f}"),
        ("compile", f"{result.compile_seconds:.1f} s"),
        ("run", f"{result.run_seconds:.1f} s"),
        ("saved in", str(options.out)),
    ]
    return "\n".join(f"  {name:<28}{value}" for name, value in rows)


def _interval(mean: float, low: float, high: float) -> str:
    if mean != mean:
        return "no episode ended"
    return f"{mean:.2f}" + (
        f"  [{low:.2f}, {high:.2f}] 95 % over agents" if low == low else "  (one agent: no interval)"
    )


def _draw(options: Train, metrics):
    import matplotlib

    matplotlib.use("Agg")
    from purejaxppo.experiment.plots import plot_learning_curve

    ax = plot_learning_curve(metrics, title=options.env)
    ax.figure.savefig(options.out / "learning_curve.png", dpi=150)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _refuse(sentence: str, status: int = 2) -> int:
    print(f"purejaxppo: {sentence}", file=sys.stderr)
    return status
