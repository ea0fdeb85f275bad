"""Evaluation of trained agents, in their own environment or in Gymnasium's of the same name."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray

from purejaxppo.batched import batched, seed_keys
from purejaxppo.checks import check_whole
from purejaxppo.envs.base import ActionMask, Box, action_space, observation_space
from purejaxppo.envs.memory_inputs import hide_previous, show_nothing, show_previous
from purejaxppo.envs.roles import without_privileged
from purejaxppo.experiment.agents.load import Agents
from purejaxppo.experiment.report.metrics import mean_interval
from purejaxppo.validate import check_type


def evaluate_agents(
    agents: Agents, *, num_episodes: int = 128, greedy: bool = False, seed: int = 0, max_steps: int = 10_000
) -> xarray.Dataset:
    """Plays whole episodes with each agent in its own environment, in one program.

    Args:
        agents: from `load_agents`.
        num_episodes: episodes per agent.
        greedy: whether to take the most probable action instead of a sample.
        seed: random seed.
        max_steps: steps after which running episodes stop; they are not `finished`.

    Returns:
        `episode_return`, `episode_length` and `finished`, with the dimensions `seed` (of the agent) and `episode`; the
        returns of an agent that turned nan in training are nan.
    """
    check_type("agents", agents, Agents, "from load_agents(folder)")
    check_whole("seed", seed, at_least=0)
    many = batched(agents.ppo)
    options = {"num_episodes": num_episodes, "greedy": greedy, "max_steps": max_steps}
    keys = seed_keys(jax.random.key(seed), jnp.arange(agents.num))
    played = jax.jit(lambda *args: many.evaluate(*args, **options))(keys, agents.policies, agents.env_params)
    return _label(agents, played.episode_return, played.episode_length, played.finished)


def evaluate_in_gymnasium(
    agents: Agents,
    env_id: str | None = None,
    *,
    num_episodes: int = 128,
    greedy: bool = False,
    seed: int = 0,
    max_steps: int = 10_000,
) -> xarray.Dataset:
    """Plays as `evaluate_agents` does, in an environment of Gymnasium, with its time limit.

    Args:
        agents: from `load_agents`.
        env_id: the name in Gymnasium, by default the agents' own.
        num_episodes: episodes per agent.
        greedy: whether to take the most probable action instead of a sample.
        seed: random seed; every episode of every agent begins with its own.
        max_steps: steps after which running episodes stop; they are not `finished`.

    Returns:
        The same variables as `evaluate_agents`.

    Raises:
        ValueError: if Gymnasium has no such environment, or one with other observations or actions.
    """
    import gymnasium

    check_type("agents", agents, Agents, "from load_agents(folder)")
    for name, number in {"num_episodes": num_episodes, "max_steps": max_steps}.items():
        check_whole(name, number)
    check_whole("seed", seed, at_least=0)
    env_id = agents.ppo.env.name if env_id is None else env_id
    try:
        envs = gymnasium.make_vec(env_id, num_envs=num_episodes, vectorization_mode="sync")
    except (gymnasium.error.NameNotFound, gymnasium.error.NamespaceNotFound):
        raise ValueError(
            f"Gymnasium has no environment {env_id!r} (leave out --in gymnasium, or name one of its own in Python: "
            "evaluate_in_gymnasium(agents, env_id=...))"
        ) from None
    except gymnasium.error.Error as error:
        raise ValueError(f"Gymnasium cannot make {env_id!r}: {error}") from None
    _check_spaces(agents, envs, env_id)
    act = jax.jit(jax.vmap(agents.ppo.act, in_axes=(None, 0, None if greedy else 0, 0)))
    begin = jax.jit(jax.vmap(agents.ppo.act, in_axes=(None, 0, None if greedy else 0)))
    show = _showing(agents, envs.single_observation_space)
    played = [_play(envs, act, begin, show, agents.policy(i), i, greedy, seed, max_steps) for i in range(agents.num)]
    envs.close()
    return _label(agents, *map(np.stack, zip(*played)))


def mean_return(played: xarray.Dataset) -> tuple[float, float, float]:
    """The mean return with its Student t interval over agents, or over episodes for a single agent."""
    returns = played["episode_return"]
    return mean_interval(returns.mean("episode") if returns.sizes["seed"] > 1 else returns)


def _play(envs, act, begin, show, policy, agent: int, greedy: bool, seed: int, max_steps: int):
    """Return, length and `finished` of the first episode of every environment, [E] each."""
    num = envs.num_envs
    key = jax.random.fold_in(jax.random.key(seed), agent)
    obs, _ = envs.reset(seed=seed + agent * num)  # Gymnasium adds the number of the environment
    total, length, running = np.zeros(num), np.zeros(num, int), np.ones(num, bool)
    memory, action, reward, step = None, None, None, 0
    while running.any() and step < max_steps:
        keys = None if greedy else jax.random.split(jax.random.fold_in(key, step), num)
        seen = show(obs, action, reward)
        action, memory = begin(policy, seen, keys) if step == 0 else act(policy, seen, keys, memory)
        obs, reward, terminated, truncated, _ = envs.step(np.asarray(action) + _start(envs.single_action_space))
        ended = terminated | truncated
        reward = np.where(ended & np.isnan(reward), 0, reward)  # see `Step`
        total += np.where(running, reward, 0)
        length += running
        running &= ~ended
        step += 1
    return total, length, ~running


def _showing(agents: Agents, theirs: Any) -> Callable:
    """Shows the agents observations [E, ...] of a space of Gymnasium.

    With `memory_inputs` also the previous actions and rewards, which are None before the first step.
    """
    space, actions = observation_space(agents.ppo.env), action_space(agents.ppo.env, agents.ppo.env.params)
    if not agents.ppo.config.memory_inputs:
        return lambda obs, *_: _as_ours(space, theirs, obs)
    previous, nothing = (jax.vmap(partial(f, space=actions)) for f in (show_previous, show_nothing))

    def show(obs, action, reward):
        obs = _as_ours(hide_previous(space, isinstance(theirs, Mapping)), theirs, obs)
        return nothing(obs) if action is None else previous(obs, action, reward)

    return show


def _start(space: Any) -> Any:
    """The first integer of a discrete space of Gymnasium; ours begin at 0."""
    return getattr(space, "start", 0)


def _as_ours(space: Any, theirs: Any, obs: Any) -> Any:
    """What acting needs of an observation of Gymnasium: every discrete part counted from 0, and masks as bools."""
    if isinstance(space, Mapping):
        needed = without_privileged(space, space)
        return {name: _as_ours(part, theirs[name], obs[name]) for name, part in needed.items()}
    if isinstance(space, ActionMask):
        return obs != 0
    return obs - _start(theirs) if hasattr(theirs, "start") else obs


def _check_spaces(agents: Agents, envs, env_id: str):
    obs, action = envs.single_observation_space, envs.single_action_space
    ours = observation_space(agents.ppo.env), action_space(agents.ppo.env, agents.ppo.env.params)
    if agents.ppo.config.memory_inputs:
        ours = hide_previous(ours[0], isinstance(obs, Mapping)), ours[1]
    if not _is_shown(ours[0], obs):
        raise ValueError(f"{env_id} has the observations {obs} in Gymnasium, but the agents take {ours[0]!r}")
    same = not isinstance(ours[1], Box) and (ours[1].shape, _choices(ours[1])) == (action.shape, _choices(action))
    if isinstance(ours[1], Box) and hasattr(action, "low"):
        bounds = [np.broadcast_to(np.asarray(x, np.float32), ours[1].shape) for x in (ours[1].low, ours[1].high)]
        same = ours[1].shape == action.shape and np.allclose(bounds, [action.low, action.high])
    if not same:
        raise ValueError(f"{env_id} has the actions {action} in Gymnasium, but the agents act in {ours[1]!r}")


def _is_shown(space: Any, theirs: Any) -> bool:
    """Whether Gymnasium shows all that acting needs of an observation."""
    if isinstance(space, Mapping):
        needed, parts = without_privileged(space, space), getattr(theirs, "spaces", {})
        return needed.keys() <= parts.keys() and all(_is_shown(part, parts[name]) for name, part in needed.items())
    same = isinstance(space, ActionMask) or _choices(space) == _choices(theirs)
    return getattr(space, "shape", None) == theirs.shape and same


def _choices(space: Any) -> list[int]:
    """The number of choices in each entry of a discrete space, of ours or of Gymnasium; [] for other spaces."""
    sizes = [getattr(space, name) for name in ("n", "nvec", "sizes") if hasattr(space, name)]
    return np.asarray(sizes, int).reshape(-1).tolist()


def _label(agents: Agents, episode_return, episode_length, finished) -> xarray.Dataset:
    failed = np.array([bool(sentence) for sentence in agents.failed or [""] * agents.num])
    episode_return = np.where(failed[:, None], np.nan, episode_return)
    arrays = {"episode_return": episode_return, "episode_length": episode_length, "finished": finished}
    return xarray.Dataset({name: (("seed", "episode"), np.asarray(x)) for name, x in arrays.items()})
