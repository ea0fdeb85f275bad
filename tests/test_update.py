from dataclasses import replace
from functools import partial
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from probes import SMALL, copy_cue
from purejaxppo import Config, Hyperparams, linear, make_ppo
from purejaxppo.loss import ppo_loss
from purejaxppo.update import Batch, adam, minibatches, rows_of, shuffle, take, update


def make_batch(num_steps=4, num_envs=3):
    index = jnp.arange(num_steps * num_envs, dtype=jnp.float32).reshape(num_steps, num_envs)
    same = {name: index for name in ("first", "action", "log_prob", "value", "advantage", "target")}
    return Batch(obs=index[..., None], memory=index[::2, :, None], **same)  # for segments of two steps


def test_every_epoch_is_a_permutation_of_its_own(key):
    config = Config(num_envs=4, num_steps=16, num_epochs=3, num_minibatches=4)
    drawn = minibatches(key, config)
    assert drawn.shape == (12, 16)
    epochs = drawn.reshape(3, 64)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(64), (3, 1)))
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
    assert (minibatches(jax.random.key(1), config) != drawn).any()


def test_permutations_are_uniform():
    config = Config(num_envs=1, num_steps=4, num_epochs=1, num_minibatches=1)
    drawn = jax.vmap(lambda key: minibatches(key, config))(jax.random.split(jax.random.key(0), 24_000))
    _, counts = np.unique(np.asarray(drawn).reshape(-1, 4), axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 49.7  # chi-square of 23 degrees of freedom at 0.1 %


def test_segments_are_consecutive_steps_of_one_environment():
    rows = rows_of(jnp.arange(6), num_envs=3, length=2)
    np.testing.assert_array_equal(rows.T, [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]])
    np.testing.assert_array_equal(rows_of(jnp.arange(12), num_envs=3, length=1), [np.arange(12)])
    minibatch = take(make_batch(), jnp.array([4, 0]), 2)
    np.testing.assert_array_equal(minibatch.action, [[7, 0], [10, 3]])
    np.testing.assert_array_equal(minibatch.memory[:, 0], [7, 0])
    assert minibatch.obs.shape == (2, 2, 1)


def test_gradients_are_clipped_by_their_global_norm():
    gradient = jnp.array([3.0, 4.0])
    clipped, _ = optax.clip_by_global_norm(0.5).update(gradient, optax.EmptyState())
    np.testing.assert_allclose(cast(jax.Array, clipped), [0.3, 0.4], rtol=1e-6)
    hyperparams = Hyperparams(learning_rate=1.0, max_grad_norm=0.5, adam_eps=1.0)
    transformation = adam(hyperparams)
    step, _ = transformation.update(gradient, transformation.init(gradient))
    np.testing.assert_allclose(cast(jax.Array, step), [-0.3 / 1.3, -0.4 / 1.4], rtol=1e-5)


def learn(config, hyperparams=Hyperparams(learning_rate=0.05), loss=ppo_loss) -> tuple[Any, ...]:
    """One update of a small run, with what its minibatches reported, unreduced by an update of ours."""
    ppo = make_ppo(copy_cue(), config, loss=loss)
    state = ppo.init(jax.random.key(0), hyperparams)
    return ppo, state, *jax.jit(ppo.step)(state)


@pytest.mark.full
def test_the_kl_stop_freezes_parameters_and_optimizer_from_the_first_minibatch_beyond_it():
    plain = Config(num_envs=4, num_steps=8, num_updates=1, num_epochs=8, num_minibatches=1, widths=(8,))
    full_state = learn(plain)[2]
    one = learn(replace(plain, num_epochs=1))[2]
    stopping = replace(plain, stop_on_kl=True)
    # The first minibatch has a KL of 0 and is applied; the second is beyond a target of next to nothing.
    _, _, stopped, metrics = learn(stopping, Hyperparams(learning_rate=0.05, target_kl=1e-5))
    chex.assert_trees_all_close(stopped.opt_state, one.opt_state, rtol=1e-4, atol=1e-7)
    assert metrics["approx_kl"] < 1e-5
    never = learn(stopping, Hyperparams(learning_rate=0.05, target_kl=1e9))[2]
    chex.assert_trees_all_close(never.policy.params, full_state.policy.params, rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_the_kl_stop_acts_on_each_run_of_a_batch_alone():
    ppo = make_ppo(copy_cue(), Config(**vars(SMALL) | {"stop_on_kl": True, "num_epochs": 6}))
    base = Hyperparams(learning_rate=0.05)
    both = jax.tree.map(lambda x: jnp.full(2, x), base)
    both = Hyperparams(**vars(both) | {"target_kl": jnp.array([1e-4, 1e9])})
    keys = jnp.stack([jax.random.key(0)] * 2)
    together, _ = jax.jit(jax.vmap(ppo.step))(jax.vmap(ppo.init)(keys, both))
    for lane, target in enumerate((1e-4, 1e9)):
        alone, _ = jax.jit(ppo.step)(ppo.init(jax.random.key(0), Hyperparams(learning_rate=0.05, target_kl=target)))
        mine = jax.tree.map(lambda x: x[lane], together.policy.params)
        chex.assert_trees_all_close(mine, alone.policy.params, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "hyperparams, expected",
    [
        (Hyperparams(learning_rate=0.4), [0.4, 0.3, 0.2, 0.1]),
        (Hyperparams(learning_rate=0.4, learning_rate_annealing=0.0), [0.4] * 4),
        (Hyperparams(learning_rate=0.4, learning_rate_annealing=0.5), [0.4, 0.35, 0.3, 0.25]),
        (Hyperparams(learning_rate=linear(0.1, 0.5)), [0.1, 0.2, 0.3, 0.4]),
        (Hyperparams(learning_rate=jax.tree_util.Partial(lambda a, p: a * p**2, 16.0)), [0, 1, 4, 9]),
    ],
)
def test_the_learning_rate_follows_its_schedule(hyperparams, expected):
    config = Config(num_envs=2, num_steps=4, num_updates=4, num_epochs=1, num_minibatches=1, widths=(4,))
    ppo = make_ppo(copy_cue(), config)
    _, metrics = jax.jit(ppo.train)(ppo.init(jax.random.key(0), hyperparams))
    np.testing.assert_allclose(metrics["learning_rate"], expected, rtol=1e-5)


def test_clip_and_entropy_coefficient_may_be_schedules():
    seen = Hyperparams(clip=linear(0.2, 0.0), entropy_coefficient=linear(0.0, 1.0)).at(1, Config(num_updates=4))
    np.testing.assert_allclose([seen.clip, seen.entropy_coefficient], [0.15, 0.25])


def test_advantages_are_standardised_within_each_minibatch_of_segments(key):
    config = Config(num_envs=4, num_steps=8, num_epochs=2, num_minibatches=2, segment_length=2)
    advantage = np.random.default_rng(0).normal(3, 2, (8, 4)).astype(np.float32)
    batch = make_batch(8, 4).replace(advantage=jnp.asarray(advantage))

    def loss(params, minibatch, hyperparams):  # reports what pairs every advantage with the transition that it is of
        assert minibatch.advantage.shape == (2, 8)
        return 0.0 * params, {"product": (minibatch.advantage * minibatch.action**2).mean()}

    *_, report = update(
        key, jnp.float32(0), optax.identity().init(0), batch, Hyperparams(),
        loss=loss, optimizer=lambda _: optax.identity(), config=config, observation=(),
    )  # fmt: skip
    segments = [(slice(2 * i, 2 * i + 2), n) for i in range(4) for n in range(4)]
    action = np.arange(32.0).reshape(8, 4)
    expected = []
    for chosen in np.asarray(minibatches(key, config)):
        of = np.array([advantage[segments[i]] for i in chosen]).astype(np.float64)
        squares = np.array([action[segments[i]] ** 2 for i in chosen])
        expected.append(((of - of.mean()) / of.std() * squares).mean())
    np.testing.assert_allclose(report["product"], np.mean(expected), rtol=1e-4)


@pytest.mark.full
def test_adam_steps_follow_the_formula_on_a_whole_update(key):
    """One epoch of one minibatch by hand: gradient, global norm, Adam's first step."""
    config = Config(num_envs=4, num_steps=8, num_updates=1, num_epochs=1, num_minibatches=1, widths=(8,))
    ppo = make_ppo(copy_cue(), config)
    state = ppo.init(key)
    rng = np.random.default_rng(0)
    shape = (8, 4)
    normal = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name in ("log_prob", "value", "advantage", "target")
    }
    obs = jnp.asarray(rng.normal(size=(*shape, 2)), jnp.float32)
    batch = Batch(obs=obs, first=jnp.zeros(shape, bool), memory=(), action=jnp.zeros(shape, jnp.int32), **normal)
    hyperparams = Hyperparams(learning_rate=0.1, max_grad_norm=0.01, adam_eps=1e-3)
    loss = partial(ppo_loss, network=ppo.network, config=config)
    standardized = (batch.advantage - batch.advantage.mean()) / jnp.sqrt(batch.advantage.var() + 1e-8)
    minibatch = batch.replace(advantage=standardized)
    grads = jax.grad(lambda p: loss(p, minibatch, hyperparams)[0])(state.policy.params)
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    params, _, report = update(
        key, state.policy.params, state.opt_state, batch, hyperparams,
        loss=loss, optimizer=adam, config=config, observation=(),
    )  # fmt: skip
    np.testing.assert_allclose(report["grad_norm"], norm, rtol=1e-4)
    for new, old, g in zip(*map(jax.tree.leaves, (params, state.policy.params, grads))):
        g = np.asarray(g, np.float64) * 0.01 / norm
        np.testing.assert_allclose(new - old, -0.1 * g / (np.abs(g) + 1e-3), rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("size", [1, 2, 37, 512, 70_000])
def test_a_shuffle_holds_every_index_once_and_differs_between_epochs(size, key):
    shuffled = np.asarray(shuffle(key, size, 3))
    assert shuffled.shape == (3, size) and shuffled.dtype == np.int32
    np.testing.assert_array_equal(np.sort(shuffled, axis=1), np.tile(np.arange(size), (3, 1)))
    if size > 2:
        assert (shuffled[0] != shuffled[1]).any() and (shuffled[1] != shuffled[2]).any()


def test_every_order_of_a_shuffle_is_equally_likely(key):
    """24,000 shuffles of 4: chi-square over the 24 orders, 23 degrees of freedom, 49.7 at one in a thousand."""
    shuffled = np.asarray(shuffle(key, 4, 24_000))
    counts = np.unique(shuffled @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24 and ((counts - 1000) ** 2 / 1000).sum() < 49.7


def test_of_two_indices_each_comes_first_half_of_the_time_even_where_a_second_pass_is_needed(key):
    """70,000 indices share few random bits in one pass; pairs far apart and neighbours, 5 standard deviations."""
    place = np.argsort(np.asarray(shuffle(key, 70_000, 2)), axis=1)
    for distance in (1, 35_000):
        first = place[:, :-distance] < place[:, distance:]
        assert abs(first.mean() - 0.5) < 5 * 0.5 / np.sqrt(first.size)
