"""Trained agents out of a folder: those of a run, or of the best setting of a sweep."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purejaxppo.batched import batched
from purejaxppo.experiment.runs.saved import load, read_settings, remake
from purejaxppo.experiment.sweeps.result import load_sweep
from purejaxppo.ppo import PPO
from purejaxppo.rollout import Policy
from purejaxppo.text import show_setting


class Agents(NamedTuple):
    """Agents that differ in their seeds; a run of one agent has R = 1."""

    ppo: PPO  # of one agent
    policies: Policy  # [R, ...]
    env_params: Any  # [R, ...]
    title: str

    @property
    def num(self) -> int:
        """R"""
        return len(jax.tree.leaves(self.policies)[0])

    def policy(self, agent: int) -> Policy:
        """The policy of one agent, by its seed. Raises ValueError where there is none of that number."""
        if not 0 <= agent < self.num:
            raise ValueError(f"agent={agent} must be from 0 to {self.num - 1}")
        return jax.tree.map(lambda x: x[agent], self.policies)


def load_agents(folder, ppo: PPO | None = None) -> Agents:
    """The agents that a folder holds, of a sweep those of its best setting.

    `ppo` is that of one agent, where it is not `make_ppo` of a name and a config. Raises ValueError where the folder
    holds neither a run nor a sweep, or agents that are not trained yet.
    """
    folder = Path(folder)
    if (folder / "sweep.json").exists():
        result = load_sweep(folder) if ppo is None else load_sweep(folder, make=lambda *_: ppo)
        best = result.best()
        states = [result.state(seed, **best) for seed in range(result.sweep.num_seeds)]
        policies, env_params = jax.tree.map(lambda *xs: jnp.stack(xs), *((s.policy, s.env_params) for s in states))
        setting = show_setting(best)
        title = f"{result.sweep.env_of(best)}, {setting}" if setting else result.sweep.env
        return Agents(result.ppo(**best), policies, env_params, title)
    num_runs = read_settings(folder)["num_runs"]
    saved = load(folder, batched(ppo) if ppo is not None and num_runs else ppo)
    agents = saved.policy, saved.env_params
    policies, env_params = agents if num_runs else jax.tree.map(lambda x: x[None], agents)
    one = remake(saved.settings | {"num_runs": None}) if ppo is None else ppo
    return Agents(one, policies, env_params, saved.settings["env"])
