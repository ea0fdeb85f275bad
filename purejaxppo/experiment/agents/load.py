"""Loads what a folder holds: a run, a sweep, or the agents of either."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.batched import batched
from purejaxppo.experiment.files import kind_of
from purejaxppo.experiment.identity import TRAINING
from purejaxppo.experiment.report.failures import failures_of
from purejaxppo.experiment.runs.saved import SavedRun, load_run, remake
from purejaxppo.experiment.runs.settings import read_settings
from purejaxppo.experiment.sweeps.result import SweepResult, load_sweep
from purejaxppo.ppo import PPO, make_ppo
from purejaxppo.rollout import Policy
from purejaxppo.text import count, shorten, show_setting
from purejaxppo.validate import check_type


class Agents(NamedTuple):
    """R agents that differ in their seeds."""

    ppo: PPO  # of one agent
    policies: Policy  # [R, ...]
    env_params: Any  # [R, ...]
    title: str
    failed: tuple[str, ...] = ()  # [R], a sentence on each agent that turned nan, "" on the others

    def __repr__(self) -> str:
        return f"{count(self.num, 'agent')} of {self.title}\n  ppo  {shorten(repr(self.ppo), 100)}"

    @property
    def num(self) -> int:
        """The number of agents, R."""
        return len(jax.tree.leaves(self.policies)[0])

    def policy(self, agent: int) -> Policy:
        """The policy of one agent, by its position along R; warns if it turned nan in training.

        Raises ValueError for a position out of range.
        """
        if not 0 <= agent < self.num:
            raise ValueError(f"agent={agent} must be from 0 to {self.num - 1}")
        if self.failed and self.failed[agent]:
            warnings.warn(self.failed[agent])
        return jax.tree.map(lambda x: x[agent], self.policies)


def load(
    folder: str | Path,
    ppo: PPO | None = None,
    *,
    make: Callable = make_ppo,
    values: Mapping[str, Mapping[str, Any]] | None = None,
    allow_changed: Sequence[str] = (),
    best: bool = False,
) -> SavedRun | SweepResult:
    """Reads back what a folder holds: a run (see `SavedRun`) or a sweep (see `SweepResult`); nothing is unpickled.

        >>> saved = pjp.load(folder)
        >>> action, _ = saved.ppo.act(saved.policy, obs)

    Args:
        folder: what `fit`, `run_sweep` or the command line wrote.
        ppo: the PPO of the training, unless that was `make_ppo(name, config)`; in a sweep that of every run.
        make: `make(env, config)` makes the PPOs of a sweep.
        values: what swept names stand for, as {"loss": {"spo": spo_loss}}.
        allow_changed: what may differ from the training, such as "network".
        best: whether to read the policies that `fit(..., keep_best=True)` kept, for every agent that of its best
            evaluation, in place of the last ones. That evaluation was lucky too, so its return is too high on average:
            play fresh episodes to report one.

    Raises:
        ValueError: if the folder holds neither, an unfinished run, or damaged files.
    """
    _check_arguments(folder, ppo)
    if kind_of(folder) == "sweep":
        _refuse_best(folder, best)
        make = make if ppo is None else lambda *_, **__: ppo
        return load_sweep(folder, make, values=values, allow_changed=allow_changed)
    if make is not make_ppo or values:
        raise ValueError(f"make and values are for sweeps, and {folder} holds none (give the PPO of a run as ppo=)")
    return load_run(folder, ppo, best=best, allow_changed=allow_changed)


def load_agents(
    folder: str | Path,
    ppo: PPO | None = None,
    *,
    values: Mapping[str, Mapping[str, Any]] | None = None,
    best: bool = False,
) -> Agents:
    """The agents of a run, or of the best setting of a sweep.

    Args:
        folder: what `fit`, `run_sweep` or the command line wrote.
        ppo: the PPO of one agent; it must be given unless it was `make_ppo(name, config)`.
        values: what names of a sweep stand for, as {"network": {"mine": network}}.
        best: whether to take the policies of the best evaluations of a run, see `load`.

    Raises:
        ValueError: if the folder holds neither a run nor a sweep, or if the agents are not trained yet.
    """
    _check_arguments(folder, ppo)
    if kind_of(folder) == "sweep":
        _refuse_best(folder, best)
        make = make_ppo if ppo is None else lambda *_, **__: ppo
        return _best_agents(load_sweep(folder, make, values=values, allow_changed=TRAINING))
    settings = read_settings(folder)
    ppo_of_run = batched(ppo) if ppo is not None and settings.num_runs else ppo
    saved = load_run(folder, ppo_of_run, best=best, allow_changed=TRAINING)
    agents = saved.policy, saved.env_params
    policies, env_params = agents if settings.num_runs else jax.tree.map(lambda x: x[None], agents)
    one = remake(replace(settings, num_runs=None)) if ppo is None else ppo
    failed = failures_of(saved.metrics)
    kept = np.atleast_1d(saved.best.update) > 0 if saved.best else np.zeros(settings.num_runs or 1, bool)  # before that
    sentences = tuple("" if kept[run] else failed.get(run, "") for run in range(settings.num_runs or 1))
    done, total = settings.num_updates_done or 0, settings.config.num_updates
    title = settings.env if done >= total else f"{settings.env} after {done} of {total} updates"
    if saved.best:
        title += f", with the policies of the best evaluations (updates {_in_order(saved.best.update)})"
    return Agents(one, policies, env_params, title, sentences)


def check_agent(ppo: Any, policy: Any) -> None:
    """Raises ValueError unless `policy` is one of `ppo`, the PPO of one agent; compiles nothing."""
    check_type("ppo", ppo, PPO, "agents.ppo, or as make_ppo returns it")
    check_type("policy", policy, Policy, "such as agents.policy(0)")
    if ppo.many:
        raise ValueError("ppo is batched, but one agent is asked for (give agents.ppo, or the PPO that was batched)")
    _, obs = jax.eval_shape(ppo.env.reset, jax.random.key(0), ppo.env.params)
    jax.eval_shape(ppo.act, policy, obs)


def _check_arguments(folder: Any, ppo: Any):
    if not isinstance(folder, (str, Path)):
        raise ValueError(f"folder={shorten(repr(folder))} must be a path (the PPO comes after it)")
    if ppo is not None:
        check_type("ppo", ppo, PPO, "as make_ppo returns it")


def _refuse_best(folder: Any, best: bool):
    if best:
        raise ValueError(
            f"best=True reads what a run kept with keep_best, but {folder} holds a sweep, whose runs keep their last "
            "policies (leave it out)"
        )


def _in_order(updates: Any) -> str:
    return shorten(", ".join(map(str, np.atleast_1d(updates).tolist())), 60)


def _best_agents(result: SweepResult) -> Agents:
    best = result.best()
    states = [result.state(seed, **best) for seed in range(result.sweep.num_seeds)]
    policies, env_params = jax.tree.map(lambda *xs: jnp.stack(xs), *((s.policy, s.env_params) for s in states))
    setting = show_setting(best)
    title = f"{result.sweep.env_of(best)}, {setting}" if setting else result.sweep.env
    failed = result.failures(**best)
    sentences = tuple(failed.get(seed, "") for seed in range(result.sweep.num_seeds))
    return Agents(result.ppo(**best), policies, env_params, title, sentences)
