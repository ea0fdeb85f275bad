"""What is scored beside presets: CleanRL's settings, A2C, and environments of which an agent sees less."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

import purejaxppo as pjp

RECURRENT: dict[str, Any] = {
    "normalize_observation": True,
    "scale_reward": True,
    "memory": "gru",
    "segment_length": 32,
    "num_epochs": 10,
    "clip_value_loss": False,
}


def with_observation(env: Any, observe: Callable[[Any], Any], space: Any, name: str) -> pjp.Env:
    """The environment with `observe(obs)`, an element of `space`, in place of its observations."""
    env = pjp.make_env(env)

    def reset(key, params):
        state, obs = env.reset(key, params)
        return state, observe(obs)

    def step(key, state, action, params):
        result = env.step(key, state, action, params)
        return result._replace(obs=observe(result.obs))

    return env._replace(reset=reset, step=step, observation_space=space, name=name)


def cartpole_without_velocities() -> pjp.Env:
    """Cart and pole, whose velocities have to be remembered from their positions."""
    return with_observation(
        "CartPole-v1", lambda obs: obs[jnp.array([0, 2])], pjp.Box(shape=(2,)), "CartPole-v1 without velocities"
    )


def cartpole_with_privileged_velocities() -> pjp.Env:
    """Cart and pole, whose velocities only the critic sees."""
    return with_observation(
        "CartPole-v1",
        lambda obs: {"position": obs[jnp.array([0, 2])], "velocity": obs[jnp.array([1, 3])]},
        {"position": pjp.Box(shape=(2,)), "velocity": pjp.privileged(pjp.Box(shape=(2,)))},
        "CartPole-v1 with privileged velocities",
    )


def pendulum_without_velocities() -> pjp.Env:
    """A pendulum, whose velocity has to be remembered from its angle."""
    return with_observation(
        "Pendulum-v1", lambda obs: obs[:2], pjp.Box(-1.0, 1.0, (2,)), "Pendulum-v1 without velocities"
    )


def without_mask(name: str) -> pjp.Env:
    """An environment that does not say which actions are allowed."""
    env = pjp.make_env(name)
    assert isinstance(env.observation_space, Mapping)
    space = {part: x for part, x in env.observation_space.items() if part != "action_mask"}
    return with_observation(env, lambda obs: {part: obs[part] for part in space}, space, f"{name} without its mask")


class Variant(NamedTuple):
    """What is trained."""

    env: pjp.Env
    config: pjp.Config
    hyperparams: pjp.Hyperparams


def recurrent(env: Callable[[], pjp.Env], hyperparams: pjp.Hyperparams, **config: Any) -> Variant:
    """The environment with settings for 100,000 steps and a GRU."""
    return Variant(env(), pjp.Config(**(RECURRENT | config)).with_total_steps(100_000), hyperparams)


def unmasked(name: str) -> Variant:
    """The environment without its action mask, with its preset."""
    config, hyperparams = pjp.preset(name)
    return Variant(without_mask(name), config, hyperparams)


def cleanrl(name: str) -> Variant:
    """The environment with the settings of CleanRL's ppo.py, which are the defaults, for as many steps as there."""
    return Variant(pjp.make_env(name), pjp.Config().with_total_steps(500_000), pjp.Hyperparams())


def actor_critic(name: str) -> Variant:
    """The environment with A2C, a special case of PPO, for as many steps as CleanRL's settings."""
    config, hyperparams = pjp.a2c()
    return Variant(pjp.make_env(name), config.with_total_steps(500_000), hyperparams)


def memory_of_xland(**config: Any) -> Variant:
    """A corridor of XLand-MiniGrid whose right end is shown where it begins, seen as in MiniGrid: 7 x 7 cells."""
    _, hyperparams = pjp.preset("xland/MiniGrid-MemoryS8")
    hyperparams = replace(hyperparams, entropy_coefficient=0.05)  # with 0.01 two of five seeds settle for either end
    rollout = {"num_envs": 64, "num_steps": 64, "num_minibatches": 8}
    env = pjp.make_env("xland/MiniGrid-MemoryS8", view_size=7)
    return Variant(env, pjp.Config(**rollout, **config).with_total_steps(2_000_000), hyperparams)


CARTPOLE = pjp.Hyperparams(learning_rate=1e-3, clip=pjp.linear(0.2, 0.0), entropy_coefficient=0.0)
PENDULUM = pjp.Hyperparams(learning_rate=1e-3, discount=0.95, entropy_coefficient=0.0)
CLASSIC = "CartPole-v1", "Acrobot-v1", "MountainCar-v0"
VARIANTS: dict[str, Callable[[], Variant]] = {
    **{f"{name} with CleanRL's settings": partial(cleanrl, name) for name in CLASSIC},
    **{f"{name} with A2C": partial(actor_critic, name) for name in CLASSIC},
    "CartPole-v1 without velocities": partial(recurrent, cartpole_without_velocities, CARTPOLE, num_envs=8),
    "CartPole-v1 with privileged velocities": partial(
        recurrent, cartpole_with_privileged_velocities, CARTPOLE, num_envs=8
    ),
    # With the rollout and the minibatches of Stable-Baselines3's RecurrentPPO.
    "Pendulum-v1 without velocities": partial(
        recurrent, pendulum_without_velocities, PENDULUM, num_envs=4, num_steps=1024, num_minibatches=32
    ),
    "xland/MiniGrid-MemoryS8 with a view of 7": partial(
        memory_of_xland, memory="gru", segment_length=64, memory_inputs=True
    ),
    "xland/MiniGrid-MemoryS8 with a view of 7, without a memory": memory_of_xland,
    "jumanji/Snake-v1 without its mask": partial(unmasked, "jumanji/Snake-v1"),
}
