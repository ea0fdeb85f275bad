"""Evaluation: whole episodes with a policy that does not learn."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from purejaxppo.checks import check_whole
from purejaxppo.config import Config
from purejaxppo.envs.base import Env, count_lost_as_zero
from purejaxppo.networks.network import Network
from purejaxppo.rollout import Policy, add_time, apply_policy, start, step_envs
from purejaxppo.text import shorten
from purejaxppo.validate import as_key

EVALUATION = 2**31
EPISODES = 128  # of an evaluation, by default


class Evaluation(struct.PyTreeNode):
    """The first episode of each of E environments."""

    episode_return: jax.Array  # [E], raw rewards
    episode_length: jax.Array  # [E] int32, steps
    finished: jax.Array  # [E] bool, whether the episode ended within `max_steps`


def evaluate(
    key: jax.Array,
    policy: Policy,
    env_params: Any = None,
    *,
    env: Env,
    network: Network,
    config: Config,
    num_episodes: int = EPISODES,
    greedy: bool = False,
    max_steps: int = 10_000,
) -> Evaluation:
    """Plays E episodes side by side and counts the first one of each environment.

    Counting whatever ends first would favour short episodes.

    Args:
        key: of the evaluation.
        policy: for example `state.policy`.
        env_params: by default those of the environment.
        env: where to play.
        network: applies the policy.
        config: says how actions are bounded.
        num_episodes: E.
        greedy: whether to take the mode instead of a sample.
        max_steps: steps after which running episodes stop; they are not `finished`.

    Raises:
        ValueError: for arguments of another kind, or of more than one run.
    """
    check_whole("num_episodes", num_episodes)
    check_whole("max_steps", max_steps)
    if not isinstance(greedy, (bool, np.bool_)):
        raise ValueError(f"greedy={shorten(repr(greedy))} must be True or False")
    env_params = env.params if env_params is None else env_params
    # A separate branch: the given key may be that of the run, whose other branches are used already.
    start_key, play_key = jax.random.split(jax.random.fold_in(as_key(key), EVALUATION))

    def running(carry):
        time, _, evaluation = carry
        return (time < max_steps) & ~evaluation.finished.all()

    def step(carry):
        time, (env_state, obs, first, memory), seen = carry
        act_key, env_key = jax.random.split(jax.random.fold_in(play_key, time))
        memory, distribution, _ = apply_policy(
            policy, memory, add_time(obs), first[None], network=network, config=config
        )
        action = (distribution.mode() if greedy else distribution.sample(act_key))[0]
        env_keys = jax.random.split(env_key, num_episodes)
        result = step_envs(env_keys, env_state, action, env_params, env=env, config=config)
        ended = result.terminated | result.truncated
        reward = count_lost_as_zero(ended, result.reward)
        seen = Evaluation(
            episode_return=seen.episode_return + jnp.where(seen.finished, 0, reward),
            episode_length=seen.episode_length + ~seen.finished,
            finished=seen.finished | ended,
        )
        return time + 1, (result.state, result.obs, jnp.zeros_like(first), memory), seen

    actors = start(start_key, env_params, env=env, network=network, num_envs=num_episodes)
    nothing = Evaluation(
        episode_return=actors.episode_return,
        episode_length=actors.episode_length,
        finished=jnp.zeros_like(actors.first),
    )
    carry = jnp.int32(0), (actors.env_state, actors.obs, actors.first, actors.memory), nothing
    return jax.lax.while_loop(running, step, carry)[2]
