"""The contracts of a run, and the probes whose values are known."""

import dataclasses
from types import SimpleNamespace
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from probes import SMALL, constant_reward, copy_cue, counter, delayed_reward, endless_reward, recall_cue
from purejaxppo import Batch, Categorical, Config, Hyperparams, Rollout, linear, make_ppo
from purejaxppo.collectives import gather_shards
from purejaxppo.experiment.files import from_arrays, to_arrays
from purejaxppo.experiment.program import compile_training
from purejaxppo.loss import ppo_loss
from purejaxppo.networks.memories import MEMORIES
from purejaxppo.summary import measure_rollout, summarize


def same_leaves(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


DETAILS = [
    {},
    {"normalize_observation": True, "scale_reward": True, "normalize_advantage": "batch", "bound_action": "tanh"},
    {"memory": "gru", "memory_width": 4, "segment_length": 4, "normalize_observation": True},
    pytest.param(
        {"memory": "lstm", "memory_width": 4, "segment_length": 8, "share_encoder": True, "clip_value_loss": False},
        marks=pytest.mark.full,
    ),
]


@pytest.mark.parametrize("details", DETAILS)
def test_a_step_keeps_the_form_of_the_state_and_compiles_once(details):
    ppo = make_ppo("CartPole-v1", dataclasses.replace(SMALL, **details))
    state = ppo.init(jax.random.key(0))
    step = jax.jit(ppo.step)
    before = jax.tree.map(lambda x: (x.shape, x.dtype, x.aval.weak_type), state)
    for learning_rate in (1e-3, 1e-4):
        state = ppo.init(jax.random.key(1), Hyperparams(learning_rate=learning_rate, discount=0.9))
        for _ in range(3):
            state, metrics = step(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.aval.weak_type), state) == before
    assert getattr(step, "_cache_size")() == 1
    assert state.num_updates == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.policy))
    assert all(np.shape(x) == () for x in metrics.values())


def test_every_metric_that_is_promised_is_there():
    ppo = make_ppo("CartPole-v1", SMALL)
    _, metrics = jax.jit(ppo.step)(ppo.init(jax.random.key(0)))
    promised = (
        "episode_return episode_length num_episodes policy_loss value_loss loss entropy approx_kl clip_fraction "
        "explained_variance grad_norm learning_rate value_mean num_lost_episodes num_reused_starts"
    )
    assert set(metrics) == set(promised.split())


@pytest.mark.parametrize("details", DETAILS)
def test_the_ratio_is_one_on_the_first_minibatch(details):
    """After a few updates, so that normalisers have moved and memories are not empty."""

    def ratio_only(params, minibatch, hyperparams, *, network, config):
        loss, _ = ppo_loss(params, minibatch, hyperparams, network=network, config=config)
        _, distribution, _ = network.apply(params, minibatch.memory, minibatch.obs, minibatch.first)
        log_ratio = distribution.log_prob(minibatch.action) - minibatch.log_prob
        return loss, {"approx_kl": jnp.abs(log_ratio).max()}

    config = dataclasses.replace(SMALL, num_epochs=1, num_minibatches=1, **details)
    ppo = make_ppo(recall_cue(), config, loss=ratio_only)
    state = ppo.init(jax.random.key(0), Hyperparams(learning_rate=0.01, learning_rate_annealing=0.0))
    step = jax.jit(ppo.step)
    for _ in range(4):
        state, metrics = step(state)
        assert metrics["approx_kl"] < 2e-6


def test_nothing_is_reported_of_episodes_that_have_not_ended():
    ppo = make_ppo("Pendulum-v1", SMALL)
    _, metrics = jax.jit(ppo.step)(ppo.init(jax.random.key(0)))
    assert metrics["num_episodes"] == 0
    assert np.isnan(metrics["episode_return"]) and np.isnan(metrics["episode_length"])
    assert np.isfinite([v for name, v in metrics.items() if not name.startswith("episode_")]).all()


def test_returns_are_of_raw_rewards_whatever_is_scaled():
    ppo = make_ppo(constant_reward(), dataclasses.replace(SMALL, scale_reward=True))
    state = ppo.init(jax.random.key(0))
    for _ in range(3):
        state, metrics = jax.jit(ppo.step)(state)
    assert metrics["episode_return"] == 1 and metrics["episode_length"] == 1 and metrics["num_episodes"] == 32


def test_rewards_are_scaled_by_the_deviation_of_the_discounted_return():
    config = dataclasses.replace(SMALL, scale_reward=True)
    ppo = make_ppo(delayed_reward(), config)
    state, _ = jax.jit(ppo.step)(ppo.init(jax.random.key(0), Hyperparams(discount=0.5)))
    # Of four environments over eight steps, the return is 1 at every third step: 2 in 8, a variance of 3 / 16.
    np.testing.assert_allclose(state.policy.reward.variance, 3 / 16, rtol=1e-5)


def test_train_is_the_same_as_single_steps_to_the_bit():
    ppo = make_ppo("CartPole-v1", SMALL)
    state = ppo.init(jax.random.key(0))
    whole, metrics = jax.jit(ppo.train)(state)
    step = jax.jit(ppo.step)
    for i in range(3):
        state, one = step(state)
        same_leaves(one, jax.tree.map(lambda x: x[i], metrics))
    same_leaves(state, whole)


@pytest.mark.full
def test_the_same_key_gives_the_same_run_and_another_key_another():
    ppo = make_ppo("CartPole-v1", SMALL)
    train = jax.jit(ppo.train)
    first, again, other = (train(ppo.init(jax.random.key(i)))[0] for i in (0, 0, 1))
    same_leaves(first, again)
    assert (first.actors.obs != other.actors.obs).any()


def test_no_random_key_is_used_twice():
    with jax.debug_key_reuse(True):
        ppo = make_ppo(copy_cue(), SMALL)
        state, _ = jax.jit(ppo.step)(jax.jit(ppo.init)(jax.random.key(0)))
        jax.jit(lambda key, policy: ppo.evaluate(key, policy, num_episodes=4))(jax.random.key(1), state.policy)


@pytest.mark.full
def test_memory_does_not_grow_with_the_number_of_steps():
    def temporary_bytes(num_updates):
        ppo = make_ppo("CartPole-v1", dataclasses.replace(SMALL, num_updates=num_updates))
        compiled = jax.jit(ppo.train).lower(ppo.init(jax.random.key(0))).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    # What may grow is what is returned: a number per metric and update, and XLA's working copy of it.
    assert temporary_bytes(2000) - temporary_bytes(20) < 1980 * 13 * 4 * 2


@pytest.mark.full
def test_training_can_be_differentiated_through():
    config = dataclasses.replace(SMALL, num_updates=2, normalize_observation=True, scale_reward=True)
    ppo = make_ppo(copy_cue(), config)

    def final_value_loss(learning_rate):
        state = ppo.init(jax.random.key(0), Hyperparams(learning_rate=0.01, learning_rate_annealing=0.0))
        rate = dataclasses.replace(state.hyperparams, learning_rate=learning_rate)
        return ppo.train(state.replace(hyperparams=rate))[1]["value_loss"][-1]

    rate, step = jnp.float32(0.01), jnp.float32(1e-4)  # so small that no sampled action changes
    slope = jax.jit(jax.grad(final_value_loss))(rate)
    after, before = map(jax.jit(final_value_loss), (rate + step, rate - step))
    np.testing.assert_allclose(slope, (after - before) / (2 * step), rtol=0.01)


@pytest.mark.full
def test_schedules_may_be_batched_like_numbers():
    ppo = make_ppo(copy_cue(), SMALL)
    hyperparams = Hyperparams(learning_rate=linear(jnp.array([0.1, 0.2]), jnp.zeros(2)))
    init = jax.vmap(lambda key, rate: ppo.init(key, dataclasses.replace(Hyperparams(), learning_rate=rate)))
    states = init(jax.random.split(jax.random.key(0)), hyperparams.learning_rate)
    _, metrics = jax.jit(jax.vmap(ppo.train))(states)
    np.testing.assert_allclose(metrics["learning_rate"][:, 0], [0.1, 0.2], rtol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("memory", ["", *MEMORIES])
def test_double_precision_mode_trains_too(memory):
    segments = {"memory": memory, "segment_length": 8 if memory else 1}
    config = dataclasses.replace(SMALL, normalize_observation=True, scale_reward=True, **segments)
    with jax.enable_x64(True):
        ppo = make_ppo("Pendulum-v1", config)
        state, metrics = jax.jit(ppo.step)(ppo.init(jax.random.key(0)))
        assert np.isfinite(metrics["loss"])
        kept = state.policy, state.actors.memory
        assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype(jnp.float32)}


VALUES = Config(num_envs=16, num_steps=16, num_updates=300, widths=(32,), num_minibatches=4, clip_value_loss=False)
FAST = Hyperparams(learning_rate=3e-3, discount=0.98, gae_lambda=0.9, max_grad_norm=10.0)


def learned_values(env, observations, hyperparams=FAST, **config):
    """Values of observations [K, ...] after training on `env`, over three seeds: [3, K]."""
    ppo = make_ppo(env, dataclasses.replace(VALUES, **config))

    def values(key):
        state, _ = ppo.train(ppo.init(key, hyperparams))
        first = jnp.zeros((1, len(observations)), bool)
        return ppo.network.apply(state.policy.params, (), observations[None], first)[2][0]

    return jax.jit(jax.vmap(values))(jax.random.split(jax.random.key(0), 3))


def test_probe_a_constant_reward_is_worth_itself():
    np.testing.assert_allclose(learned_values(constant_reward(), jnp.zeros((1, 1))), 1, atol=0.02)


def test_probe_a_delayed_reward_is_worth_its_discount():
    values = learned_values(delayed_reward(3), jnp.eye(4)[:3], dataclasses.replace(FAST, discount=0.5))
    np.testing.assert_allclose(values, np.tile([0.25, 0.5, 1.0], (3, 1)), atol=0.03)


@pytest.mark.full
def test_probe_a_reward_truncated_for_ever_is_worth_the_whole_future():
    """Reward 1, truncated every 8 steps, discount 0.98: 50."""
    np.testing.assert_allclose(learned_values(endless_reward(8), jnp.eye(9)[:1]), 50, rtol=0.03)


@pytest.mark.full
def test_probe_a_horizon_that_is_the_task_is_worth_what_is_left_of_it():
    """Reward 1, eight steps, discount 0.98: 7.46 at the start, 1 at the last step."""
    values = learned_values(endless_reward(8, shows_time=True), jnp.eye(9)[:8], bootstrap_on_truncation=False)
    expected = (1 - 0.98 ** np.arange(8, 0, -1)) / 0.02
    np.testing.assert_allclose(expected[0], 7.46, atol=0.01)
    np.testing.assert_allclose(values, np.tile(expected, (3, 1)), rtol=0.05)


@pytest.mark.full
def test_probe_the_action_that_the_observation_names_is_found():
    ppo = make_ppo(copy_cue(), dataclasses.replace(VALUES, num_updates=60))
    _, metrics = jax.jit(jax.vmap(ppo.train))(
        jax.vmap(lambda k: ppo.init(k, FAST))(jax.random.split(jax.random.key(0), 3))
    )
    assert (metrics["episode_return"][:, -10:].mean(1) > 0.97).all()


@pytest.mark.full
def test_probe_a_cue_is_recalled_with_a_memory_and_only_with_one():
    def last_return(**config):
        ppo = make_ppo(recall_cue(), dataclasses.replace(VALUES, num_updates=100, **config))
        train = jax.jit(jax.vmap(lambda key: ppo.train(ppo.init(key, FAST))[1]["episode_return"][-10:].mean()))
        return train(jax.random.split(jax.random.key(0), 3))

    assert (last_return(memory="gru", memory_width=16, segment_length=16) > 0.95).all()
    np.testing.assert_allclose(last_return(), 0.5, atol=0.1)


def test_means_over_episodes_are_exact_where_a_rollout_is_no_power_of_two():
    """Nine episodes of 500 in 800 steps: a mean over steps divided by the share that ended gives 500.00003."""
    done = jnp.zeros((100, 8), bool).at[50].set(True).at[60, 0].set(True)
    full, zeros = jnp.full(done.shape, 500.0), jnp.zeros(done.shape)
    lengths = full.astype(jnp.int32)
    counted = {"ended": done, "lost": None, "reused": None}
    counted |= {"episode_return": full, "episode_length": lengths}
    rollout = cast(Rollout, SimpleNamespace(**counted, metrics={}, episode_metrics={}))
    batch = cast(Batch, SimpleNamespace(value=zeros, target=zeros))
    metrics = summarize(gather_shards(measure_rollout(rollout, batch)), rollout)
    assert (metrics["num_episodes"], metrics["episode_return"], metrics["episode_length"]) == (9, 500, 500)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_of_16_bits_are_learned_and_kept_in_files(dtype, key):
    """The optimizer works in float32; a file holds the same bits."""

    class Narrow(nn.Module):
        @nn.compact
        def __call__(self, obs):
            dense = lambda size: nn.Dense(size, dtype=dtype, param_dtype=dtype)
            return Categorical(dense(2)(obs)), dense(1)(obs)[..., 0]

    ppo = make_ppo(counter(3), dataclasses.replace(SMALL, num_updates=1), network=Narrow())
    state = ppo.init(key)
    after, metrics = jax.jit(ppo.step)(state)
    assert {x.dtype for x in jax.tree.leaves(after.policy)} == {jnp.dtype(dtype)} and np.isfinite(metrics["loss"])
    assert {x.dtype for x in jax.tree.leaves(after.opt_state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    found = from_arrays(to_arrays(after), state)
    jax.tree.map(np.testing.assert_array_equal, after.policy, found.policy)
    assert all(x.dtype.kind in "fiub" for x in to_arrays(after).values())


def test_parameters_of_several_dtypes_are_rounded_after_every_minibatch(key):
    """Steps of 0.001 from 1: each is lost to a bfloat16, and none to a float32."""

    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, obs):
            dense = lambda size, dtype: nn.Dense(size, param_dtype=dtype, bias_init=nn.initializers.ones)
            return Categorical(dense(2, jnp.bfloat16)(obs)), dense(1, jnp.float32)(obs)[..., 0]

    def climb(hyperparams):
        return optax.stateless(lambda grads, params: jax.tree.map(lambda x: jnp.full_like(x, 1e-3), grads))

    ppo = make_ppo(counter(3), dataclasses.replace(SMALL, num_epochs=20), network=Mixed(), optimizer=climb)
    params = jax.jit(ppo.step)(jax.jit(ppo.init)(key))[0].policy.params["params"]
    narrow, wide = params["Dense_0"]["bias"], params["Dense_1"]["bias"]
    assert narrow.dtype == jnp.bfloat16 and (narrow == 1).all()
    np.testing.assert_allclose(wide, 1 + 1e-3 * 20 * SMALL.num_minibatches, rtol=1e-5)


def test_no_episode_is_no_nan_under_debug_nans(key):
    """The mean return of no episode is nan, which that mode would stop at; it is 0 there."""
    ppo = make_ppo(counter(30), SMALL)
    with jax.debug_nans(True):
        _, metrics = jax.jit(ppo.step)(jax.jit(ppo.init)(key))
    assert metrics["episode_return"] == metrics["num_episodes"] == 0


def test_compiling_without_jit_is_refused(key):
    ppo = make_ppo(counter(3), SMALL)
    state = jax.eval_shape(ppo.init, key)
    with (
        jax.disable_jit(),
        pytest.raises(ValueError, match=r"jax.disable_jit\(\) forbids .leave it, or call ppo.train"),
    ):
        compile_training(ppo, state)


def test_files_of_double_precision_name_the_mode(key):
    with pytest.raises(ValueError, match="x should be float32 .., found float64 .. .set jax_enable_x64 as it was"):
        from_arrays({"x": np.ones((), np.float64)}, {"x": jnp.float32(1)})
