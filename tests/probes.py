"""Environments so small that the values of their states can be written down."""

import jax
import jax.numpy as jnp

from purejaxppo import Config, Discrete, Env, Step

SMALL = Config(num_envs=4, num_steps=8, num_updates=3, num_epochs=2, num_minibatches=2, widths=(8,))


def make(reset_obs, step, name="probe", num_actions=2, **fields):
    """An Env whose state is (time, cue): `step(time, cue, action) -> obs, reward, terminated, truncated`."""

    def reset(key, params):
        cue = jax.random.randint(key, (), 0, 2)
        return (jnp.int32(0), cue), reset_obs(cue)

    def env_step(key, state, action, params):
        time, cue = state
        obs, reward, terminated, truncated = step(time + 1, cue, action)
        return Step((time + 1, cue), obs, jnp.float32(reward), jnp.bool_(terminated), jnp.bool_(truncated))

    return Env(reset=reset, step=env_step, params=(), action_space=Discrete(num_actions), name=name, **fields)


def one_hot(time, length):
    return jax.nn.one_hot(time, length, dtype=jnp.float32)


def constant_reward():
    """One step, reward 1: the value is 1."""
    return make(lambda cue: jnp.zeros(1), lambda time, cue, action: (jnp.zeros(1), 1.0, True, False))


def delayed_reward(length=3):
    """Reward 1 on the last of `length` steps: the value at step i is discount ** (length - 1 - i)."""
    return make(
        lambda cue: one_hot(0, length + 1),
        lambda time, cue, action: (one_hot(time, length + 1), time == length, time == length, False),
    )


def endless_reward(length=8, shows_time=False):
    """Reward 1 for ever, truncated every `length` steps: worth 1 / (1 - discount) where truncation bootstraps."""

    def observe(time):
        return one_hot(time if shows_time else 0, length + 1)

    return make(lambda cue: observe(0), lambda time, cue, action: (observe(time), 1.0, False, time == length))


def copy_cue():
    """Reward 1 for the action that the observation names."""
    return make(lambda cue: one_hot(cue, 2), lambda time, cue, action: (one_hot(cue, 2), action == cue, True, False))


def recall_cue(delay=3):
    """Reward 1 for the cue shown at the first step only, `delay` steps later: chance is 0.5 without a memory."""

    def observe(time, cue):
        shown = jnp.where(time == 0, one_hot(cue, 2), jnp.zeros(2))
        return jnp.concatenate([shown, one_hot(time, delay + 1)])

    return make(
        lambda cue: observe(0, cue),
        lambda time, cue, action: (observe(time, cue), (time == delay) & (action == cue), time == delay, False),
    )


def counter(length=3, truncate=True):
    """Observes its own time plus 10, and 10 at a reset; ends after `length` steps."""
    return make(
        lambda cue: jnp.full(1, 10.0),
        lambda time, cue, action: (
            jnp.full(1, 10.0) + time,
            time,
            (time == length) & (not truncate),
            (time == length) & truncate,
        ),
    )
