"""`purejaxppo evaluate`, `render`, `export` and `show`: commands for trained agents."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from purejaxppo.cli.options import ALL_FAILED, check_counts, keep_programs, say
from purejaxppo.cli.plugged import Acting, Plugged, check_given, make_plugged, to_named
from purejaxppo.text import count, interval

if TYPE_CHECKING:
    from purejaxppo.experiment.agents.load import Agents
    from purejaxppo.experiment.provenance import Machine
    from purejaxppo.experiment.runs.settings import RunSettings


@dataclass(frozen=True)
class EvaluateOptions:
    """Play whole episodes with the agents of a run, or of the best setting of a sweep."""

    folder: tyro.conf.Positional[Path]
    """The folder that `train`, `sweep` or `search` wrote."""
    where: Annotated[Literal["jax", "gymnasium"], tyro.conf.arg(name="in")] = "jax"
    """The implementation of the environment: the one of the training, or Gymnasium's of the same name."""
    episodes: int = 128
    """Episodes per agent."""
    greedy: bool = False
    """Take the most probable action instead of a sample."""
    seed: int = 0
    """Random seed."""
    best: bool = False
    """Take the policies of the best evaluations, which `train --keep-best` kept."""
    acting: tyro.conf.OmitArgPrefixes[Acting] = field(default_factory=Acting)


@dataclass(frozen=True)
class RenderOptions:
    """Draw an episode of an agent as a GIF."""

    folder: tyro.conf.Positional[Path]
    """The folder that `train`, `sweep` or `search` wrote."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write; episode.gif in the folder by default."""
    agent: int | None = None
    """The agent, by its number; by default the first one, or the winner of a population."""
    greedy: bool = False
    """Take the most probable action instead of a sample."""
    max_steps: int = 500
    """Steps to draw at most."""
    seed: int = 0
    """Random seed."""
    best: bool = False
    """Take the policies of the best evaluations, which `train --keep-best` kept."""
    acting: tyro.conf.OmitArgPrefixes[Acting] = field(default_factory=Acting)


@dataclass(frozen=True)
class ExportOptions:
    """Write an agent as one file that acts without purejaxppo, and print the code that uses it."""

    folder: tyro.conf.Positional[Path]
    """The folder that `train`, `sweep` or `search` wrote."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("policy.stablehlo")
    """File to write: NAME.stablehlo for JAX, NAME.npz for NumPy."""
    agent: int | None = None
    """The agent, by its number; by default the first one, or the winner of a population."""
    best: bool = False
    """Take the policies of the best evaluations, which `train --keep-best` kept."""
    acting: tyro.conf.OmitArgPrefixes[Acting] = field(default_factory=Acting)


@dataclass(frozen=True)
class ShowOptions:
    """Print what a run or a sweep is, its progress, and the code, packages, device and command that made it."""

    folder: tyro.conf.Positional[Path]
    """The folder that `train`, `sweep` or `search` wrote."""


def evaluate(arguments: list[str]) -> int:
    """Evaluates, and prints returns with intervals."""
    options = tyro.cli(EvaluateOptions, args=arguments, prog="purejaxppo evaluate")
    check_counts(options, "episodes")
    check_counts(options, "seed", at_least=0)

    from purejaxppo.experiment.agents.evaluation import evaluate_agents, evaluate_in_gymnasium, mean_return

    agents = _load_agents(options.folder, options.acting, options.best)
    play = evaluate_in_gymnasium if options.where == "gymnasium" else evaluate_agents
    played = play(agents, num_episodes=options.episodes, greedy=options.greedy, seed=options.seed)
    where = " in Gymnasium" if options.where == "gymnasium" else ""
    how = "the most probable actions" if options.greedy else "sampled actions"
    say(f"{agents.title}{where}: {options.episodes} episodes of {count(agents.num, 'agent')}, {how}")
    failed = np.array([bool(sentence) for sentence in agents.failed])
    for seed, returns in enumerate(played["episode_return"].values):
        if failed[seed]:
            say(f"  agent {seed:<4} {'failed':>10}  {agents.failed[seed]}")
        else:
            say(f"  agent {seed:<4} {returns.mean():10.2f}  from {returns.min():.2f} to {returns.max():.2f}")
    played = played.isel(seed=~failed)
    over = "agents" if played.sizes["seed"] > 1 else "episodes"
    say(f"  mean       {interval(*mean_return(played), over=over, nothing='failed'):>10}")
    winner = _read_winner(options.folder)
    if winner is not None:
        say(f"  agent {winner} won the population, by the score that best.json has")
    cut = int((~played["finished"]).sum())
    if cut:
        say(f"  {count(cut, 'episode')} had not ended and counted as they were")
    return ALL_FAILED if failed.all() else 0


def render(arguments: list[str]) -> int:
    """Draws one episode."""
    options = tyro.cli(RenderOptions, args=arguments, prog="purejaxppo render")
    check_counts(options, "max_steps")
    check_counts(options, "seed", "agent", at_least=0)

    import jax

    from purejaxppo.experiment.agents.render import check_drawable, record_episode
    from purejaxppo.experiment.agents.render import render as render_episode
    from purejaxppo.experiment.files import check_file

    agents, out = (
        _load_agents(options.folder, options.acting, options.best),
        options.out or options.folder / "episode.gif",
    )
    agent = _choose_agent(options)
    policy = agents.policy(agent)
    check_drawable(agents.ppo.env.name, out)
    check_file(out)
    env_params = jax.tree.map(lambda x: x[agent], agents.env_params)
    episode = record_episode(
        agents.ppo, policy, jax.random.key(options.seed), env_params,
        greedy=options.greedy, max_steps=options.max_steps,
    )  # fmt: skip
    render_episode(agents.ppo.env.name, episode, out, env_params)
    say(f"{out}: agent {agent}, {count(len(episode.rewards), 'step')}, return {episode.rewards.sum():.2f}")
    return 0


def export(arguments: list[str]) -> int:
    """Writes one file."""
    options = tyro.cli(ExportOptions, args=arguments, prog="purejaxppo export")
    check_counts(options, "agent", at_least=0)

    import jax

    from purejaxppo.experiment.agents.export import export as export_policy

    agents = _load_agents(options.folder, options.acting, options.best)
    agent = _choose_agent(options)
    policy = agents.policy(agent)
    lines = export_policy(agents.ppo, policy, options.out, jax.tree.map(lambda x: x[agent], agents.env_params))
    say(f"# {options.out} holds agent {agent} of {agents.title}, which takes the most probable actions")
    if agents.num > 1 and options.agent is None:
        say(f"# (--agent takes another of the {agents.num}; `evaluate --greedy` shows what they score so)")
    say("# use it like this:", "", *lines.split("\n"))
    return 0


def show(arguments: list[str]) -> int:
    """Prints provenance."""
    options = tyro.cli(ShowOptions, args=arguments, prog="purejaxppo show")

    from purejaxppo.experiment.files import kind_of
    from purejaxppo.experiment.runs.settings import read_settings
    from purejaxppo.experiment.sweeps.slices import read_sessions, read_sweep

    if kind_of(options.folder) == "sweep":
        say(*str(read_sweep(options.folder)).split("\n"))
        all_failed = _show_progress(options.folder)
        sessions = read_sessions(options.folder)
    else:
        settings = read_settings(options.folder)
        sessions = settings.sessions
        all_failed = _show_run(options.folder, settings)
    for session in sessions:
        _show_session(session)
    return ALL_FAILED if all_failed else 0


def _show_progress(folder: Path) -> bool:
    """Prints the runs of a sweep that are done, and those that failed; returns whether all have failed."""
    from purejaxppo.experiment.report.failures import MOST
    from purejaxppo.experiment.sweeps.result import load_sweep

    try:
        result = load_sweep(folder)
    except ValueError as error:  # nothing is trained yet
        say(f"  {error}")
        return False
    failed = result.failed()
    done = result.sweep.num_runs - result.num_unfinished
    say(f"  {done} of {count(result.sweep.num_runs, 'run')} complete, {len(failed)} of them failed")
    for sentence in [*failed[:MOST], *["..."] * (len(failed) > MOST)]:
        say(f"  {sentence}")
    return len(failed) == result.sweep.num_runs


def _choose_agent(options: RenderOptions | ExportOptions) -> int:
    """The agent that a command names, or else the winner of a population, or the first one."""
    return options.agent if options.agent is not None else _read_winner(options.folder) or 0


def _read_winner(folder: Path) -> int | None:
    """The winner of the population in a folder; None if it holds something else."""
    from purejaxppo.experiment.files import kind_of
    from purejaxppo.experiment.runs.settings import read_settings
    from purejaxppo.experiment.sweeps.best import read_winner

    return read_winner(folder, read_settings(folder).num_updates_done) if kind_of(folder) == "run" else None


def _load_agents(folder: Path, acting: Acting, best: bool) -> "Agents":
    """The agents of a folder, with the custom environment and network that the command names."""
    from purejaxppo.experiment.agents.load import load_agents
    from purejaxppo.experiment.files import kind_of
    from purejaxppo.experiment.runs.launch import read_launch
    from purejaxppo.experiment.runs.settings import read_settings

    keep_programs()
    given = {name: x for name, x in asdict(acting).items() if x}
    if kind_of(folder) == "sweep":
        values = {name: {x: to_named(name, x).value} for name, x in given.items()}
        return load_agents(folder, values=values, best=best)
    settings = read_settings(folder)
    plugged = read_launch(settings, folder).plugged if "launch" in settings.notes else {}
    check_given(given, plugged, folder, ("env", "network"))
    if not given:
        return load_agents(folder, best=best)
    ppo = make_plugged(acting.env or settings.env, settings.config, Plugged(acting.network))
    return load_agents(folder, ppo, best=best)


def _show_run(folder: Path, settings: "RunSettings") -> bool:
    """Prints what a run is, how far it is and who failed; returns whether all agents have failed."""
    from purejaxppo.experiment.runs import saved
    from purejaxppo.experiment.runs.checkpoints import Checkpoints
    from purejaxppo.experiment.runs.launch import read_launch

    config = settings.config
    done = max([settings.num_updates_done or 0, *(int(path.name) for path in Checkpoints(folder).paths())])
    seed = read_launch(settings, folder).seed if "launch" in settings.notes else "unknown"
    say(f"{settings.env}: {count(settings.num_runs or 1, 'agent')}, seed {seed}")
    say(f"  {done} of {config.num_updates} updates, {done * config.steps_per_update:,} steps per agent")
    failed = saved.read_failures(folder)
    for sentence in failed.values():
        say(f"  {sentence}")
    for kind, values in (("config", asdict(config)), ("hyperparams", settings.hyperparams)):
        say(f"  {kind:<12} {', '.join(f'{name}={value}' for name, value in values.items())}")
    say(f"  {'precision':<12} {config.matmul_precision}")
    return len(failed) == (settings.num_runs or 1)


def _show_session(session: "Machine"):
    versions = ", ".join(f"{name} {version}" for name, version in session["versions"].items())
    device = session["device"]
    say(f"  {session['started']}  {' '.join(session['command'])}")
    say(f"    {'code':<10} {session.get('code') or 'not a checkout'}")
    say(f"    {'packages':<10} {versions}")
    say(f"    {'device':<10} {device['count']} x {device['kind']}, {session['cpu_cores']} CPU cores")
