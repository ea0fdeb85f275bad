"""Population-based training of the settings of a sweep: all are members of one population (see `evolving`).

A folder of it is that of a run, with the members as its agents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.batched import batched, reported_failures, seed_keys
from purejaxppo.checks import check_whole
from purejaxppo.config import spec_of
from purejaxppo.evolving import Population, evolving, num_replaced
from purejaxppo.experiment.distributed import process_count, to_host
from purejaxppo.experiment.evaluations import EVALUATION_RETURN
from purejaxppo.experiment.files import differing_fields, kind_of, refuse_other
from purejaxppo.experiment.loop import Interrupted, check_on_interrupt
from purejaxppo.experiment.memory import bytes_of, memory_of, show_memory
from purejaxppo.experiment.program import Program, compile_training, first_state
from purejaxppo.experiment.provenance import as_json
from purejaxppo.experiment.report.lineage import Lineage, line_of
from purejaxppo.experiment.report.statistics import NO_SCORE, describe_scores, scores_of
from purejaxppo.experiment.runs.fit import Fit, fit
from purejaxppo.experiment.runs.settings import SEARCH, read_settings
from purejaxppo.experiment.sweeps.columns import run_arguments
from purejaxppo.experiment.sweeps.sweep import ENV_PREFIX, Sweep, check_sweep, make_group
from purejaxppo.ppo import PPO, make_ppo
from purejaxppo.text import align, count, quote, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PopulationPlan:
    """Population-based training with its program, compiled; printing it shows what it will do."""

    sweep: Sweep
    explore: dict[str, tuple[float, float]]
    """The lowest and the highest value of every hyperparameter that changes."""
    every: int
    """Updates between two evolutions."""
    fraction: float
    ppo: PPO
    """Of the whole population, see `evolving`."""
    program: Program
    memory: dict[str, int]
    """Bytes of one member, see `memory_of`."""
    rule: dict[str, Any]
    """How members evolve, as JSON data, which the folder keeps."""

    def start(self) -> Population:
        """The population at the start. Its members have keys of their own: a copy goes on with its own."""
        return _start(self.sweep, self.ppo, first_state)

    def __repr__(self) -> str:
        sweep, config = self.sweep, self.ppo.config
        members, evolutions = sweep.num_runs, config.num_updates // self.every
        rows = [
            {"explored": name, "lowest": show(float(low)), "highest": show(float(high))}
            for name, (low, high) in self.explore.items()
        ]
        return "\n".join(
            [
                f"{sweep.env}: a population of {count(members, 'member')} x {config.total_steps:,} steps = "
                f"{members * config.total_steps:,} steps, compiled in {self.program.compile_seconds:.1f} s",
                f"{count(evolutions, 'evolution')}, one after every {count(self.every, 'update')}, each of which "
                f"replaces at most {count(num_replaced(self.fraction, members), 'member')}",
                align(rows),
                "memory of a member, in MiB:",
                show_memory([self.memory]),
            ]
        )


@dataclass(frozen=True)
class PopulationSearch:
    """The result of population-based training."""

    sweep: Sweep
    fields: tuple[str, ...]
    """The hyperparameters that were explored."""
    fit: Fit
    """State, a `Population`, and metrics of all members; `parent` of the metrics says who was copied."""

    def __repr__(self) -> str:
        done, total = self.parents.shape[1], self.fit.ppo.config.num_updates
        return (
            f"PopulationSearch of {count(len(self.parents), 'member')} on {self.sweep.env} over "
            f"{', '.join(self.fields)}, {done} of {total} updates"
        )

    @property
    def parents(self) -> np.ndarray:
        """The member from which each continued after each update, [R, U]."""
        return self.fit.metrics["parent"].values.astype(int)

    @property
    def criterion(self) -> str:
        """What the scores are, in words."""
        if self.sweep.evaluate_every:
            return describe_scores(evaluated=True)
        return "the mean return of the training episodes since the last evolution"

    @cached_property
    def scores(self) -> np.ndarray:
        """The fitness of every member, [R], or the mean return of its newest evaluation if the sweep has such; nan
        without one, and for members that were replaced since (without evaluations: by the last update)."""
        replaced = self.parents != np.arange(len(self.parents))[:, None]
        if not self.sweep.evaluate_every:
            fitness, replaced = np.asarray(self.fit.state.fitness, np.float64), replaced[:, -1]
        else:
            fitness = scores_of(self.fit.metrics.rename(run="seed")).values.astype(np.float64)
            known = np.isfinite(self.fit.metrics[EVALUATION_RETURN].values)
            since = known[:, ::-1].cumsum(1)[:, ::-1] == 0  # [R, U], after the newest evaluation
            replaced = (replaced & since).any(1)
        return np.where(np.isfinite(fitness) & ~replaced, fitness, np.nan)

    def ranked(self) -> list[dict[str, Any]]:
        """The members as rows: `member`, `founder` (the member that its line began as), the explored fields now, and
        `score`; best first, those without a score last.
        """
        founders = [int(line_of(self.parents, member)[0]) for member in range(len(self.scores))]
        hyperparams = self.fit.state.runs.hyperparams
        values = {name: np.asarray(hyperparams.get(name)) for name in self.fields}
        rows = [
            {"member": i, "founder": founder, **{name: as_json(x[i]) for name, x in values.items()}, "score": score}
            for i, (founder, score) in enumerate(zip(founders, self.scores.tolist()))
        ]
        return sorted(rows, key=lambda row: -np.inf if np.isnan(row["score"]) else row["score"], reverse=True)

    def winner(self) -> int:
        """The member with the highest score. Raises ValueError if none has one."""
        if np.isnan(self.scores).all():
            raise ValueError(NO_SCORE)
        return int(np.nanargmax(self.scores))

    def best(self) -> dict[str, Any]:
        """The setting of the winner at the end, field -> value; `schedule` has those that led there.

        Raises ValueError if no member has a score.
        """
        first = self.ranked()[0]
        rest = {name: values[0] for name, values in self.sweep.table.columns().items() if name not in self.fields}
        self.winner()
        return {name: first[name] for name in self.fields} | rest

    def plots(self, title: str = "") -> "dict[str, Figure]":
        """The lineage and the winner's schedule as plots by name; none if no member has a score."""
        return {} if np.isnan(self.scores).all() else self.lineage().plots(title)

    def lineage(self) -> Lineage:
        """Who was copied, and the line of the winner. Raises ValueError if no member has a score."""
        return Lineage(self.fit.metrics, self.fields, self.winner())

    def schedule(self) -> list[dict[str, Any]]:
        """The explored fields that the winner's line went through: `from_update`, counted from 1, and their values.

        Empty if no member has a score.
        """
        return [] if np.isnan(self.scores).all() else self.lineage().schedule()


def plan_population(
    sweep: Sweep,
    folder: str | Path | None = None,
    *,
    every: int | None = None,
    explore: Mapping[str, tuple[float, float]] | None = None,
    fraction: float = 0.25,
    factors: Sequence[float] = (0.8, 1.25),
    devices: int | Sequence[Any] | None = None,
    make: Callable = make_ppo,
    allow_changed: Sequence[str] = (),
) -> PopulationPlan:
    """Compiles what `population_search` needs, and says what it will do; see there for the errors.

    Args:
        sweep: the settings, of hyperparameters alone, and the seeds.
        folder: results so far.
        every: updates between two evolutions, by default a twentieth of the run.
        explore: the lowest and highest value of hyperparameters to change, besides those that are swept.
        fraction: of the members, at most replaced by one evolution, in (0, 0.5].
        factors: positive numbers, one of which multiplies an explored hyperparameter.
        devices: devices, or their number, that share the members evenly; by default one.
        make: `make(env, config)` makes the PPO of one member.
        allow_changed: what may differ from what the folder was trained with, see `fit`; "step" stands for how members
            evolve.
    """
    check_sweep(sweep)
    group, *others = sweep.groups()
    for name, column in sweep.table.columns().items():
        if len(set(column)) > 1 and (others or name.startswith(ENV_PREFIX)) and spec_of(name) is None:
            raise ValueError(f"{name} differs between members, but a population explores hyperparameters only")
    columns = {name: column for name, column in sweep.table.columns().items() if spec_of(name)}
    explore = {name: (min(x), max(x)) for name, x in columns.items()} | dict(explore or {})
    if not explore:
        raise ValueError("explore={} must name one hyperparameter or more (sweep a hyperparameter)")
    num_updates = group.config.num_updates
    every = max(1, num_updates // 20) if every is None else every
    every = check_whole("every", every, at_most=num_updates, of="the updates of the run")
    num_replaced(fraction, sweep.num_runs)
    rule = {"every": every, "fraction": float(fraction), "factors": list(map(float, factors))}
    rule |= {"explore": {name: list(map(float, ends)) for name, ends in explore.items()}}
    _check_rule(folder, rule, allow_changed)
    one = make_group(group, make)
    if process_count() > 1:
        if devices not in (None, jax.device_count()):
            raise ValueError(
                f"devices={quote(devices)} must be {jax.device_count()}, all devices of the {process_count()} "
                "processes (leave it out)"
            )
        devices = jax.device_count()
    ppo = evolving(
        one,
        every=every,
        explore=explore,
        fraction=fraction,
        factors=factors,
        evaluate=sweep.evaluate_every is not None,
        devices=devices,
    )
    state = jax.eval_shape(lambda: _start(sweep, ppo))
    num_devices = 1 if ppo.mesh is None else ppo.mesh.size
    if num_devices > 1:  # whose shapes alone do not say where they lie
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _start(sweep, ppo, first_state)
        )
    with reported_failures():
        program = compile_training(ppo, state, -(-num_updates // 100))
    memory = memory_of(batched(one), state.runs, bytes_of(program) * num_devices // sweep.num_runs)
    return PopulationPlan(sweep, explore, every, fraction, ppo, program, memory, rule)


def _check_rule(folder: str | Path | None, rule: Mapping[str, Any], allow_changed: Sequence[str]):
    """Refuses a folder of something else, or of a population that evolves in another way."""
    if folder is None:
        return
    refuse_other(Path(folder), "sweep", "study")
    if kind_of(folder) != "run":
        return
    before = read_settings(folder).notes.get(SEARCH)
    if before is None:
        raise ValueError(f"folder={folder} already holds a run (name another folder)")
    differing = differing_fields(before, rule) if isinstance(before, dict) else []  # older folders do not say
    if differing and "step" not in allow_changed:
        name = differing[0]
        raise ValueError(
            f"{name}={rule[name]} differs from the {before[name]} of the population in folder={folder} (leave it as it "
            "was, name another folder, or allow it with allow_changed=['step'])"
        )


def _start(sweep: Sweep, ppo: PPO, start: Callable | None = None) -> Population:
    """The population of all runs of a sweep; `start` is called as `first_state`."""
    _, hyperparams, env_params = run_arguments(sweep, ppo, list(sweep.runs().values()))
    keys = seed_keys(jax.random.key(sweep.seed), jnp.arange(sweep.num_runs))
    return start(ppo, keys, hyperparams, env_params) if start else ppo.init(keys, hyperparams, env_params)


def population_search(
    sweep: Sweep | PopulationPlan,
    folder: str | Path | None = None,
    *,
    every: int | None = None,
    explore: Mapping[str, tuple[float, float]] | None = None,
    fraction: float | None = None,
    factors: Sequence[float] | None = None,
    devices: int | Sequence[Any] | None = None,
    progress: bool = True,
    save_every: float = 60.0,
    make: Callable | None = None,
    allow_changed: Sequence[str] = (),
    on_interrupt: Literal["raise", "return"] = "raise",
) -> PopulationSearch:
    """Trains all runs of a sweep as one population, whose poor members continue from good ones (see `evolving`).

    The settings are those that the members begin with. With `evaluate_every` of the sweep, fresh episodes decide which
    members are copied (see `evaluate` of `evolving`), and the newest evaluation ranks them. An interrupt (Ctrl-C,
    SIGTERM) ends the call after the current chunk, as in `fit`: `Interrupted` is raised with the `result` so far, or
    this result is returned.

    Args:
        sweep: the settings, of hyperparameters alone, and the seeds; a `PopulationPlan` of `plan_population` is
            compiled already.
        folder: keeps everything, as the folder of a run. The same call resumes there, see `fit`.
        every: updates between two evolutions, by default a twentieth of the run.
        explore: the lowest and highest value of hyperparameters to change. Those that are swept change as well, by
            default within their values.
        fraction: of the members, at most replaced by one evolution, in (0, 0.5]; by default 0.25.
        factors: positive numbers, one of which multiplies an explored hyperparameter; by default 0.8 and 1.25.
        devices: devices, or their number, that share the members evenly; by default one, or all of several processes.
        progress: whether to show a progress bar.
        save_every: seconds between two checkpoints.
        make: `make(env, config)` makes the PPO of one member.
        allow_changed: what may differ from what the folder was trained with, see `fit`.
        on_interrupt: what the call does after an interrupt: "raise" or "return".

    Raises:
        ValueError: before it compiles, if the members differ in anything but hyperparameters, or for a folder of
            something else.
    """
    check_on_interrupt(on_interrupt)
    options = {
        "every": every,
        "explore": explore,
        "fraction": fraction,
        "factors": factors,
        "devices": devices,
        "make": make,
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if isinstance(sweep, PopulationPlan) and given:
        raise ValueError(f"{min(given)} cannot be changed after planning (pass it to plan_population)")
    given["allow_changed"] = allow_changed
    plan = sweep if isinstance(sweep, PopulationPlan) else plan_population(sweep, folder, **given)
    _check_rule(folder, plan.rule, allow_changed)
    try:
        found = fit(
            plan.ppo,
            plan.start(),
            program=plan.program,
            folder=folder,
            progress=progress,
            save_every=save_every,
            evaluate_every=plan.sweep.evaluate_every,
            notes={SEARCH: plan.rule},
            allow_changed=allow_changed,
            on_interrupt=on_interrupt,
        )
    except Interrupted as error:
        raise Interrupted(str(error), _result(plan, error.result)) from None
    return _result(plan, found)


def _result(plan: PopulationPlan, found: Fit) -> PopulationSearch:
    """The result, whose state each of several processes has whole."""
    return PopulationSearch(plan.sweep, tuple(plan.explore), replace(found, state=to_host(found.state)))
