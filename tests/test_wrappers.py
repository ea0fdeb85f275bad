"""Wrappers of any environment, against what can be written down or played by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as pjp
from purejaxppo import Box, Discrete, Env, MultiDiscrete, Step

api: Any = pjp  # without its types, which refuse wrong arguments


def counter(length, terminate=True):
    """Shows its time as a Box and a Discrete; the reward is time times action; ends after `length` steps."""

    def show(time):
        return {"clock": jnp.array([1.0, -1.0]) * time, "code": jnp.minimum(time, 9)}

    def step(key, time, action, params):
        time, end = time + 1, time + 1 >= length
        flags = (end, jnp.bool_(False)) if terminate else (jnp.bool_(False), end)
        reward = (time * action).astype(jnp.float32)
        return Step(time, show(time), reward, *flags, {"time": time * 1.0}, {"last": time * 1.0})

    spaces = {"clock": Box(-9, np.array([9.0, 0.0]), (2,)), "code": Discrete(10)}
    return Env(lambda key, params: (jnp.int32(0), show(0)), step, (), Discrete(3), spaces, "counter")


def play(env, actions, key=jax.random.key(0)):
    """The results of steps with these actions from a start, and its observation."""
    state, obs = env.reset(key, env.params)
    results, step = [], jax.jit(env.step)
    for i, action in enumerate(actions):
        results.append(step(jax.random.fold_in(key, i), state, jnp.asarray(action), env.params))
        state = results[-1].state
    return obs, results


def test_stacked_frames_are_the_last_ones_with_the_newest_last():
    env = pjp.frame_stack(counter(9), 3)
    obs, results = play(env, [0, 0, 0, 0])
    assert obs["clock"].tolist() == [0, 0, 0, 0, 0, 0] and obs["code"].tolist() == [0, 0, 0]
    assert results[1].obs["clock"].tolist() == [0, 0, 1, -1, 2, -2]
    assert results[3].obs["code"].tolist() == [2, 3, 4]
    assert pjp.check_shapes(env) == []


def test_stacked_frames_have_the_bounds_of_each():
    clock, code = pjp.frame_stack(counter(9), 2).observation_space.values()
    assert (clock.shape, clock.low.tolist(), clock.high.tolist()) == ((4,), [-9] * 4, [9, 0, 9, 0])
    assert isinstance(code, MultiDiscrete) and np.array_equal(code.sizes, [10, 10])


def test_the_frames_of_a_grid_become_its_channels():
    """An image [2, 3] that counts, and the categories of its cells."""

    def show(time):
        return {"image": jnp.full((2, 3), time, jnp.float32), "cells": jnp.full((2, 3), time, jnp.int32)}

    def step(key, time, action, params):
        return Step(time + 1, show(time + 1), jnp.float32(1), time >= 9, jnp.bool_(False))

    spaces = {"image": Box(shape=(2, 3)), "cells": MultiDiscrete(np.full((2, 3), 11))}
    env = Env(lambda key, params: (jnp.int32(0), show(0)), step, (), Discrete(2), spaces)
    stacked = pjp.frame_stack(env, 4)
    _, results = play(stacked, [0] * 5)
    assert results[-1].obs["image"].shape == results[-1].obs["cells"].shape == (2, 3, 4)
    assert results[-1].obs["image"][1, 2].tolist() == results[-1].obs["cells"][0, 0].tolist() == [2, 3, 4, 5]
    assert pjp.check_shapes(stacked) == [] and stacked.observation_space["cells"].sizes == (11,) * 24


def board():
    """Shows a grid of categories that counts, a mask, and a part for the critic alone."""

    def show(time):
        grid = jnp.zeros((2, 2, 3), jnp.uint8) + time.astype(jnp.uint8)
        return {"grid": grid, "mask": jnp.arange(3) <= time, "hidden": time * jnp.ones(1)}

    def step(key, time, action, params):
        return Step(time + 1, show(time + 1), jnp.float32(1), time >= 1, jnp.bool_(False))

    sizes = np.broadcast_to([4, 5, 6], (2, 2, 3))
    spaces = {"grid": MultiDiscrete(sizes), "mask": pjp.ActionMask((3,)), "hidden": pjp.privileged(Box(shape=(1,)))}
    reset = lambda key, params: (jnp.int32(0), show(jnp.int32(0)))
    return Env(reset, step, (), Discrete(3), spaces, "board")


def test_grids_and_privileged_parts_are_stacked_and_masks_are_not():
    env = pjp.frame_stack(board(), 2)
    _, results = play(env, [0, 0])
    assert results[1].obs["grid"][0, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert results[1].obs["mask"].tolist() == [True, True, True] and results[1].obs["hidden"].tolist() == [1, 2]
    grid, mask, hidden = (env.observation_space[name] for name in ("grid", "mask", "hidden"))
    assert grid.shape == (2, 2, 6) and grid.sizes[:6] == (4, 5, 6, 4, 5, 6) and mask.shape == (3,)
    assert hidden.privileged and hidden.shape == (2,) and not grid.privileged


@pytest.mark.parametrize("terminate", [True, False])
def test_a_repeated_action_sums_rewards_until_the_episode_ends(terminate):
    env = pjp.action_repeat(counter(5, terminate), 3)
    _, (first, last) = play(env, [2, 1])
    assert (first.state, first.reward, first.metrics["time"]) == (3, 2 + 4 + 6, 2)
    assert (last.state, last.reward, last.metrics["time"]) == (5, 4 + 5, 4.5)
    assert last.episode_metrics["last"] == 5 and last.obs["code"] == 5
    assert (last.terminated, last.truncated) == (terminate, not terminate)
    assert pjp.check_shapes(env) == []


def test_a_repeated_action_takes_the_steps_of_the_environment_itself():
    env, key = pjp.make_env("Breakout-MinAtar"), jax.random.key(1)
    _, (result,) = play(pjp.action_repeat(env, 2), [1], key)
    state, _ = env.reset(key, env.params)
    keys = jax.random.split(jax.random.fold_in(key, 0), 2)
    first = env.step(keys[0], state, jnp.int32(1), env.params)
    second = env.step(keys[1], first.state, jnp.int32(1), env.params)
    assert result.reward == first.reward + second.reward
    jax.tree.map(np.testing.assert_array_equal, (result.state, result.obs), (second.state, second.obs))


def test_sticky_actions_repeat_the_last_one_with_their_probability():
    actions = np.arange(300) % 3

    def taken(probability):
        _, results = play(pjp.sticky_actions(counter(10**6), probability), actions)
        return np.array([r.reward / (i + 1) for i, r in enumerate(results)])

    np.testing.assert_array_equal(taken(0.0), actions)
    np.testing.assert_array_equal(taken(1.0), 0)  # the first of all
    fourth = taken(0.25)
    stuck = fourth[1:] != actions[1:]
    # Where it sticks, the action is the last one taken, whichever that was.
    assert (fourth[1:][stuck] == fourth[:-1][stuck]).all()
    # It is that of k steps before with probability 0.75 * 0.25**k, and equals the given one at every third k.
    assert abs(stuck.mean() - (1 - 0.75 / (1 - 0.25**3))) < 4 * np.sqrt(0.25 * 0.75 / 300)


def test_sticky_actions_of_a_box_stick_within_its_bounds():
    env = pjp.sticky_actions(pjp.make_env("Pendulum-v1"), 1.0)
    _, results = play(env, [[1.5], [-1.0]])
    assert results[1].state.action.tolist() == [1.5]
    assert pjp.check_shapes(pjp.sticky_actions(pjp.make_env("Pendulum-v1"), 0.5)) == []


def draw_length(key, params):
    return params.replace(length=params.length * jax.random.uniform(key, minval=0.5, maxval=1.5))


def test_randomized_parameters_are_drawn_for_each_episode_and_stay_within_it(key):
    env = pjp.randomize(pjp.make_env("CartPole-v1"), draw_length)
    states, _ = jax.vmap(env.reset, (0, None))(jax.random.split(key, 100), env.params)
    lengths = np.asarray(states.params.length)
    assert len(np.unique(lengths)) == 100 and 0.25 <= lengths.min() and lengths.max() <= 0.75
    assert abs(lengths.mean() - 0.5) < 0.06 and states.params.gravity.tolist() == [np.float32(9.8)] * 100
    _, results = play(env, [0, 1, 0], key)
    assert len({float(r.state.params.length) for r in results}) == 1
    assert pjp.check_shapes(env) == []


def test_a_randomized_environment_steps_with_the_parameters_of_its_episode(key):
    env, plain = pjp.randomize(pjp.make_env("CartPole-v1"), draw_length), pjp.make_env("CartPole-v1")
    state, _ = env.reset(key, env.params)
    ours = env.step(key, state, jnp.int32(1), env.params)
    theirs = plain.step(key, state.state, jnp.int32(1), state.params)
    np.testing.assert_array_equal(ours.obs, theirs.obs)
    assert not np.array_equal(ours.obs, plain.step(key, state.state, jnp.int32(1), plain.params).obs)


@pytest.mark.full
def test_episodes_of_one_run_have_different_parameters():
    env = pjp.randomize(pjp.make_env("CartPole-v1"), draw_length)
    ppo = pjp.make_ppo(env, pjp.Config(num_envs=16, num_steps=64, num_updates=1))
    state, metrics = jax.jit(ppo.step)(jax.jit(ppo.init)(jax.random.key(0)))
    assert metrics["num_episodes"] > 16 and len(np.unique(state.actors.env_state.params.length)) == 16


@pytest.mark.parametrize(
    "wrap, sentence",
    [
        (lambda: api.frame_stack(counter(3), 0), "num_frames=0 must be at least 1"),
        (lambda: api.frame_stack("CartPole-v1", 4), "env='CartPole-v1' must be an Env"),
        (lambda: api.action_repeat(counter(3), 1.5), "num_repeats=1.5 must be a whole number"),
        (lambda: api.action_repeat(board(), 2), "env='board' masks actions, so action_repeat might take one that"),
        (lambda: api.sticky_actions(board(), 0.5), "env='board' masks actions, so sticky_actions might take one that"),
        (lambda: api.sticky_actions(counter(3), 1.5), r"probability=1.5 must be a number in \[0, 1\]"),
        (
            lambda: api.randomize(counter(3), lambda key, params: 1.0),
            r"env='counter' has no parameters .* traced=\.\.\.",
        ),
        (lambda: api.randomize(pjp.make_env("CartPole-v1"), lambda key, params: 1.0), "sample_params=.* must return"),
        (lambda: api.randomize(pjp.make_env("CartPole-v1"), lambda key: 1.0), "sample_params=.* cannot be called as"),
        (lambda: api.privileged(3), "space=3 must be a Discrete, a MultiDiscrete, a Box"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_in_one_sentence(wrap, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrap()


def test_repeated_steps_keep_the_rewards_before_a_last_nan_and_average_flags():
    """Rewards 1, 1, nan at the end; a flag that is true in two of three steps."""

    def step(key, time, action, params):
        ended = time == 2
        reward = jnp.where(ended, jnp.nan, 1.0)
        return pjp.Step(time + 1, jnp.zeros(1), reward, ended, jnp.bool_(False), {"early": time < 2})

    env = pjp.Env(lambda key, params: (jnp.int32(0), jnp.zeros(1)), step, (), pjp.Discrete(2))
    result = pjp.action_repeat(env, 4).step(jax.random.key(0), jnp.int32(0), jnp.int32(0), ())
    assert result.reward == 2 and result.terminated
    np.testing.assert_allclose(result.metrics["early"], 2 / 3, rtol=1e-6)


def test_an_environment_that_is_wrapped_is_another_one_by_name_too():
    for wrap in (pjp.time_limit, pjp.frame_stack, pjp.action_repeat, pjp.sticky_actions):
        assert wrap(counter(5), 1).name == f"{wrap.__name__}(counter, 1)"
    assert pjp.randomize(pjp.make_env("CartPole-v1"), lambda key, params: params).name == "randomize(CartPole-v1)"
