import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probes import SMALL
from purejaxppo import Hyperparams, batched, concatenate, grid, linear, make_ppo, runs


@pytest.fixture(scope="module")
def ppo():
    return make_ppo("CartPole-v1", SMALL)


def test_runs_cross_settings_with_seeds_and_pair_their_draws(key):
    keys, hyperparams = runs(key, grid(learning_rate=[1e-3, 1e-4]), num_seeds=3)
    np.testing.assert_allclose(hyperparams.learning_rate, np.repeat([1e-3, 1e-4], 3))
    assert hyperparams.discount.shape == (6,)
    data = jax.random.key_data(keys)
    np.testing.assert_array_equal(data[:3], data[3:])
    assert len(np.unique(data, axis=0)) == 3
    np.testing.assert_array_equal(jax.random.key_data(runs(key, num_seeds=2)[0]), data[:2])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda key: runs(key, grid(learning_rat=[1e-3])), "learning_rat is not a hyperparameter"),
        (lambda key: runs(key, grid(discount=[0.9, 1.5])), "discount=1.5"),
        (lambda key: runs(key, num_seeds=0), "num_seeds=0"),
        (lambda key: grid(learning_rate=[linear(1e-3, 0.0)]), "must be a number"),
        (lambda key: runs(key, grid(num_envs=[4])), "num_envs is not a hyperparameter.*Sweep"),
        (lambda key: batched(make_ppo("CartPole-v1", SMALL)).init(key), "one key per run"),
        (
            lambda key: batched(make_ppo("CartPole-v1", SMALL)).init(runs(jax.random.key(0, impl="rbg"))[0]),
            "'rbg' draw numbers that depend on the size of the batch",
        ),
        (lambda key: runs(key, {"discount": [0.9], "clip": [0.1, 0.2]}), "equally long"),
    ],
)
def test_what_cannot_be_swept_is_named(call, words, key):
    with pytest.raises(ValueError, match=words):
        call(key)


@pytest.mark.full
def test_a_batch_equals_a_loop_over_its_runs(ppo, key):
    """After the first update, to rounding; learning amplifies rounding beyond that."""
    keys, hyperparams = runs(key, grid(learning_rate=[1e-3, 1e-4], discount=[0.9, 0.99]), num_seeds=2)
    many = batched(ppo)
    states, metrics = jax.jit(many.step)(jax.jit(many.init)(keys, hyperparams))
    step, init = jax.jit(ppo.step), jax.jit(ppo.init)
    for i in range(8):
        state, one = step(init(keys[i], jax.tree.map(lambda x: x[i], hyperparams)))
        mine = jax.tree.map(lambda x: x[i], (states.policy.params, metrics))
        chex.assert_trees_all_close(mine, (state.policy.params, one), rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_a_batch_of_one_run_equals_that_run(ppo, key):
    many = batched(ppo)
    states, metrics = jax.jit(many.train)(many.init(key[None]))
    state, one = jax.jit(ppo.train)(ppo.init(key))
    chex.assert_trees_all_close(
        (states.policy.params, metrics), jax.tree.map(lambda x: x[None], (state.policy.params, one)), rtol=1e-5
    )
    assert jax.tree.map(jnp.shape, states) == jax.tree.map(jnp.shape, many.init(key[None]))


@pytest.mark.full
def test_identical_lanes_are_identical_to_the_bit_whatever_else_is_in_the_batch(ppo, key):
    many = batched(ppo)
    keys = jnp.stack([key, jax.random.key(7), key, jax.random.key(8)])
    rates = Hyperparams(learning_rate=jnp.array([1e-3, 1e30, 1e-3, 1e-2]))
    states, _ = jax.jit(many.train)(jax.jit(many.init)(keys, rates))
    for x in jax.tree.leaves(states.policy.params):
        np.testing.assert_array_equal(x[0], x[2])


@pytest.mark.full
@pytest.mark.parametrize("num_runs", [1, 2])
def test_a_run_that_turns_nan_is_frozen_as_it_was_and_reports_nothing_from_there_on(ppo, key, num_runs):
    """The rate is finite in the first update and beyond float32 in the second."""
    many = batched(ppo)
    schedule = jax.tree_util.Partial(lambda high, progress: jnp.where(progress > 0.3, high, 1e-3), jnp.inf)
    step = jax.jit(many.step)
    first, metrics = step(jax.jit(many.init)(jax.random.split(key, num_runs), Hyperparams(learning_rate=schedule)))
    assert np.isfinite(metrics["loss"]).all()
    second, metrics = step(first)
    chex.assert_trees_all_equal(first, second)
    assert first.num_updates.tolist() == [1] * num_runs
    assert np.isnan(metrics["loss"]).all() and np.isnan(metrics["episode_return"]).all()
    assert metrics["num_episodes"].tolist() == [0] * num_runs
    trained, _ = jax.jit(many.train)(first)
    chex.assert_trees_all_equal(first, trained)


@pytest.mark.full
def test_a_poisoned_lane_changes_no_other(ppo, key):
    many = batched(ppo)
    keys = jnp.stack([key, jax.random.key(7)])

    def first_lane(other_rate):
        rates = Hyperparams(learning_rate=jnp.array([1e-3, other_rate]))
        states, _ = jax.jit(many.train)(jax.jit(many.init)(keys, rates))
        return states[0].policy

    chex.assert_trees_all_equal(first_lane(1e-3), first_lane(1e30))


def test_runs_may_differ_in_their_environment(key):
    ppo = make_ppo("Pendulum-v1", dataclasses.replace(SMALL, num_steps=200))
    params = dataclasses.replace(ppo.env.params, g=jnp.array([10.0, 0.0]))
    many = batched(ppo)
    states = jax.jit(many.init)(jnp.stack([key, key]), Hyperparams(), params)
    states, metrics = jax.jit(many.step)(states)
    assert states.env_params.g.tolist() == [10, 0] and states.env_params.m.tolist() == [1, 1]
    assert metrics["episode_return"][0] != metrics["episode_return"][1]


@pytest.mark.full
def test_a_sweep_over_any_hyperparameter_does_not_compile_again(ppo, key):
    many = batched(ppo)
    init, step = jax.jit(many.init), jax.jit(many.step)
    base = Hyperparams(extra={"beta": 0.1})
    for name in base.names:
        keys, hyperparams = runs(key, grid(**{name: [0.5, 0.6]}), hyperparams=base)
        step(init(keys, hyperparams))
    assert getattr(init, "_cache_size")() == getattr(step, "_cache_size")() == 1


def test_a_coefficient_of_a_custom_loss_is_swept_as_any_hyperparameter(key):
    _, hyperparams = runs(key, grid(**{"extra.beta": [0.1, 0.2], "clip": [0.1, 0.3]}), 2)
    np.testing.assert_allclose(hyperparams.extra["beta"], np.repeat([0.1, 0.2], 4))
    with pytest.raises(ValueError, match="extra.bta is not a hyperparameter .*extra.beta"):
        runs(key, grid(**{"extra.bta": [0.1]}), hyperparams=Hyperparams(extra={"beta": 1.0}))


@pytest.mark.full
def test_a_batch_evaluates_and_acts_run_by_run(ppo, key):
    many = batched(ppo)
    states = jax.jit(many.init)(jax.random.split(key, 3))
    evaluation = many.evaluate(jax.random.split(key, 3), states.policy, num_episodes=4)
    assert evaluation.episode_return.shape == (3, 4)
    action, _ = many.act(states.policy, jnp.zeros((3, 4)))
    assert action.shape == (3,)


@pytest.mark.full
def test_members_are_taken_out_and_put_together(ppo, key):
    states = jax.jit(batched(ppo).init)(jax.random.split(key, 4))
    one = ppo.init(jax.random.split(key, 4)[2])
    chex.assert_trees_all_close(states[2].policy, one.policy, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(states[[0, 3]], states[np.array([True, False, False, True])])
    chex.assert_trees_all_equal(concatenate(states[:1], states[1:]), states)


@pytest.mark.full
def test_some_runs_go_on_without_the_others(ppo, key):
    many = batched(ppo)
    step = jax.jit(many.step)
    states, _ = step(jax.jit(many.init)(jax.random.split(key, 4)))
    chosen = np.array([False, True, True, False])
    alone, _ = step(states[chosen])
    together, _ = step(states)
    chex.assert_trees_all_close(alone.policy.params, together[chosen].policy.params, rtol=1e-5, atol=1e-6)
