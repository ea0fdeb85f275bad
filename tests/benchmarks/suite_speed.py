"""Times random steps of suites: of each suite's own step, and of our `Env` around it.

    python tests/benchmarks/suite_speed.py [--only brax/ant ...] [--num-envs 64] [--num-steps 200] [--rounds 7]
                                           [--out FILE]

Both play the same number of environments for the same number of steps, compiled as one loop. Actions are uniform,
masked ones too, and nothing is reset: a compiled step does the same work in every state, also after an episode's end.
They are called in turn, after a call that compiles. Prints steps per second and the median ratio of the speeds with
its range. --out saves the same as JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import purejaxppo as pjp
from purejaxppo.envs.base import action_space
from purejaxppo.envs.roles import random_action
from purejaxppo.experiment.provenance import describe_machine

# reset(key) -> state and step(key, state, action) -> state, (observation, reward), as the suite has them.
Bare = tuple[Callable, Callable]


def shows(state: Any) -> tuple[Any, Any]:
    """What a state or a time step holds of observation and reward."""
    return state.observation, state.reward


def brax(name: str) -> Bare:
    from brax import envs

    return simulator(envs.get_environment(name))


def playground(name: str) -> Bare:
    from mujoco_playground import registry

    return simulator(registry.load(name, config_overrides={"impl": "jax"}))


def simulator(env: Any) -> Bare:
    def step(key, state, action):
        state = env.step(state, action)
        return state, (state.obs, state.reward)

    return env.reset, step


def craftax(name: str) -> Bare:
    from craftax.craftax_env import make_craftax_env_from_name

    env: Any = make_craftax_env_from_name(name, auto_reset=False)
    params = env.default_params

    def step(key, state, action):
        obs, state, reward, _, _ = env.step_env(key, state, action, params)
        return state, (obs, reward)

    return lambda key: env.reset_env(key, params)[1], step


def navix(name: str) -> Bare:
    import navix

    env = navix.make(name, observation_fn=navix.observations.symbolic_first_person)

    def step(key, state, action):
        state = env._step(state, action)
        return state, shows(state)

    return env.reset, step


def xland(name: str) -> Bare:
    import xminigrid

    env, params = xminigrid.make(name)

    def step(key, state, action):
        state = env.step(params, state, action)
        return state, shows(state)

    return partial(env.reset, params), step


def jumanji(name: str) -> Bare:
    import jumanji

    env = jumanji.make(name)

    def step(key, state, action):
        state, timestep = env.step(state, action)
        return state, shows(timestep)

    return lambda key: env.reset(key)[0], step


def pgx(name: str) -> Bare:
    import pgx

    env = pgx.make(name)

    def step(key, state, action):
        state = env.step(state, action, key)
        return state, ((state.observation, state.legal_action_mask), state.rewards[0])

    return env.init, step


BARE = {f.__name__: f for f in (brax, craftax, jumanji, navix, pgx, playground, xland)}
ENVS = [
    "brax/inverted_pendulum", "playground/CartpoleBalance", "craftax/Craftax-Classic-Symbolic-v1",
    "navix/Navix-DoorKey-5x5-v0", "xland/MiniGrid-Empty-5x5", "jumanji/Snake-v1", "pgx/minatar-breakout",
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=ENVS)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {}
    for name in options.only:
        found[name] = compare(name, options.num_envs, options.num_steps, options.rounds)
        print(describe(name, found[name]), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"machine": describe_machine(), "speed": found}, indent=1) + "\n")


def compare(name: str, num_envs: int, num_steps: int, rounds: int) -> dict[str, list[float]]:
    """Steps per second in each round, of the suite's own step and of our `Env`."""
    suite, _, bare_name = name.partition("/")
    env = pjp.make_env(name)

    def step(key, state, action):
        result = env.step(key, state, action, env.params)
        return result.state, (result.obs, result.reward)

    ours: Bare = lambda key: env.reset(key, env.params)[0], step
    space = action_space(env, env.params)
    steps = {"bare": BARE[suite](bare_name), "ours": ours}
    players = {kind: player(step, space, num_envs, num_steps) for kind, step in steps.items()}
    speeds: dict[str, list[float]] = {kind: [] for kind in players}
    for i in range(rounds):
        for kind in list(players)[:: 1 if i % 2 else -1]:
            speeds[kind].append(num_envs * num_steps / players[kind]())
    return speeds


def player(bare: Bare, space: Any, num_envs: int, num_steps: int) -> Callable[[], float]:
    """A function that plays random steps and returns the seconds that they take; compiled when this one returns."""
    reset, step = bare

    def play(states, key):
        def one(carry, key):
            states, _ = carry
            action_keys, step_keys = jax.random.split(key, (2, num_envs))
            actions = jax.vmap(partial(random_action, space=space))(action_keys)
            new = jax.vmap(step)(step_keys, states, actions)
            return jax.tree.map(lambda x, old: x if x.dtype == old.dtype else x.astype(old.dtype), new, carry), ()

        keys = jax.random.split(key, num_steps)
        actions = jax.eval_shape(jax.vmap(partial(random_action, space=space)), jax.random.split(key, num_envs))
        shown = jax.eval_shape(jax.vmap(step), jax.random.split(key, num_envs), states, actions)[1]
        return jax.lax.scan(one, (states, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shown)), keys)[0]

    start = jax.jit(jax.vmap(reset))(jax.random.split(jax.random.key(0), num_envs))
    play = jax.jit(play)

    def timed() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(play(start, jax.random.key(1)))
        return time.perf_counter() - begin

    timed()
    return timed


def describe(name: str, speeds: dict[str, list[float]]) -> str:
    """A line on the speeds of an environment."""
    bare, ours = (np.array(speeds[kind]) for kind in ("bare", "ours"))
    ratio = ours / bare
    speed = f"{np.median(bare):>12,.0f} steps/s bare {np.median(ours):>12,.0f} ours"
    return f"{name:<40}{speed}   ratio {np.median(ratio):.2f} [{ratio.min():.2f}, {ratio.max():.2f}]"


if __name__ == "__main__":
    main()
