"""Playing whole episodes with a policy that does not learn."""

import jax
import jax.numpy as jnp
from flax import struct

from purejaxppo.rollout import Policy, add_time, apply_policy, start, step_envs

EVALUATION = 2**31


class Evaluation(struct.PyTreeNode):
    """The first episode of each of E environments."""

    episode_return: jax.Array  # [E], raw rewards
    episode_length: jax.Array  # [E] int32, steps
    finished: jax.Array  # [E] bool, whether the episode ended within the bound on steps


def evaluate(
    key, policy: Policy, env_params=None, *, env, network, config, num_episodes=128, greedy=False, max_steps=10_000
):
    """Plays E = `num_episodes` episodes side by side, each to its end, and counts the first of each environment.

    Counting whatever ends first would favour short episodes. `greedy` takes the mode instead of a sample. Episodes
    still running after `max_steps` steps are cut off there and marked as not `finished`.
    """
    env_params = env.params if env_params is None else env_params
    # A key of its own branch: the one given may be that of the run, whose other branches are used up.
    start_key, play_key = jax.random.split(jax.random.fold_in(key, EVALUATION))

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
        seen = Evaluation(
            episode_return=seen.episode_return + jnp.where(seen.finished, 0, result.reward),
            episode_length=seen.episode_length + ~seen.finished,
            finished=seen.finished | result.terminated | result.truncated,
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
