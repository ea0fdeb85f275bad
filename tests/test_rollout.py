from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probes import counter, recall_cue
from purejaxppo import Box, Categorical, Config, Discrete, Env, Hyperparams, MultiDiscrete, Network, Step, make_ppo
from purejaxppo.advantages import state_values
from purejaxppo.envs.base import bound_action
from purejaxppo.rollout import Policy, Rollout, begin_where, discounted_returns, draw_ahead, unroll


def sum_network():
    """Values an observation at the sum of its entries, so that a value tells which state was looked at."""

    def apply(params, memory, obs, first):
        return memory, Categorical(jnp.zeros((*obs.shape[:2], 2)) + params), obs.sum(-1)

    return Network(initial_memory=lambda batch: (), init=lambda *_: jnp.zeros(()), apply=apply)


def roll(env, key, num_envs=3, num_steps=7, network=None, **config):
    ppo = make_ppo(env, Config(num_envs=num_envs, num_steps=num_steps, num_minibatches=1, **config), network=network)
    state = ppo.init(key)
    parts = {"network": ppo.network, "config": ppo.config}
    actors, rollout = unroll(
        jax.random.fold_in(key, 1), state.actors, state.policy, state.env_params, env=ppo.env, **parts
    )
    value, next_value = state_values(state.policy, rollout, rollout.terminated, actors.memory, **parts)
    return actors, rollout, value, next_value


@pytest.mark.parametrize("truncate", [True, False])
def test_the_state_reached_is_seen_before_any_reset(truncate, key):
    actors, rollout, value, next_value = roll(counter(3, truncate), key, network=sum_network())
    column = np.array([10, 11, 12, 10, 11, 12, 10])
    np.testing.assert_array_equal(rollout.obs[..., 0], np.tile(column[:, None], 3))
    np.testing.assert_array_equal(rollout.next_obs[..., 0], np.tile(column[:, None] + 1, 3))
    np.testing.assert_array_equal(value[:, 0], column)
    ends = np.array([0, 0, 1, 0, 0, 1, 0], bool)
    np.testing.assert_array_equal(next_value[:, 0], np.where(ends & (not truncate), 0, column + 1))
    np.testing.assert_array_equal(rollout.truncated[:, 0], ends & truncate)
    np.testing.assert_array_equal(rollout.terminated[:, 0], ends & (not truncate))
    np.testing.assert_array_equal(rollout.first[:, 0], [1, 0, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(actors.obs[:, 0], [11, 11, 11])


def test_environments_that_are_cut_off_at_times_of_their_own_are_each_valued_where_they_were():
    """Random episode ends of both kinds, several to an environment: against one forward pass on every state reached."""
    num_steps, num_envs = 9, 5
    rng = np.random.default_rng(0)
    end = rng.uniform(size=(num_steps, num_envs))
    terminated, truncated = end < 0.2, (end > 0.5) | (end < 0.1)
    obs, next_obs = rng.normal(size=(2, num_steps, num_envs, 3)).astype(np.float32)
    running = ~(terminated | truncated)[:-1]
    obs[1:][running] = next_obs[:-1][running]
    fields: dict[str, Any] = dict.fromkeys(("distribution", "action", "reward", "metrics", "episode_metrics"))
    fields |= {"obs": obs, "first": np.zeros((num_steps, num_envs), bool), "memory": (), "next_obs": next_obs}
    fields |= {"terminated": terminated, "truncated": truncated, "ended": terminated | truncated}
    rollout = Rollout(**fields)
    policy = Policy(params=jnp.zeros(()), observation=(), reward=())
    value, next_value = jax.jit(partial(state_values, network=sum_network(), config=Config(num_steps=num_steps)))(
        policy, jax.tree.map(jnp.asarray, rollout), jnp.asarray(terminated), ()
    )
    np.testing.assert_allclose(value, obs.sum(-1), rtol=1e-6)
    np.testing.assert_allclose(next_value, np.where(terminated, 0, next_obs.sum(-1)), rtol=1e-6)


def test_a_rollout_that_ends_with_a_truncation_bootstraps_from_the_state_reached(key):
    actors, rollout, _, next_value = roll(counter(3), key, num_steps=6, network=sum_network())
    assert rollout.truncated[-1].all() and actors.first.all()
    np.testing.assert_array_equal(next_value[-1], [13, 13, 13])
    np.testing.assert_array_equal(actors.obs[:, 0], [10, 10, 10])


def test_episode_returns_and_lengths_run_over_rollouts_and_start_again_after_an_end(key):
    actors, rollout, *_ = roll(counter(3), key)
    np.testing.assert_array_equal(rollout.episode_return[:, 0], [1, 3, 6, 1, 3, 6, 1])
    np.testing.assert_array_equal(rollout.episode_length[:, 0], [1, 2, 3, 1, 2, 3, 1])
    np.testing.assert_array_equal(actors.episode_return, [1, 1, 1])


def test_the_discounted_return_is_reset_after_the_reward_of_the_last_step(key):
    """Rewards 1 2 3 at discount 0.5: 1, 2.5, 4.25, and a new episode begins at 1."""
    _, rollout, *_ = roll(counter(3), key)
    last, returns = discounted_returns(jnp.zeros(3), rollout.reward, rollout.done, 0.5)
    np.testing.assert_allclose(returns[:, 0], [1, 2.5, 4.25, 1, 2.5, 4.25, 1])
    np.testing.assert_allclose(last, [1, 1, 1])


def test_the_discounted_return_matches_the_case_of_three_rewards_of_one():
    """Discount 0.5, reward 1, an end at step 2 of 3: 1, 1.5, 1."""
    _, returns = discounted_returns(jnp.zeros(1), jnp.ones((3, 1)), jnp.array([[0], [1], [0]], bool), 0.5)
    np.testing.assert_allclose(returns[:, 0], [1, 1.5, 1])


def test_integer_rewards_become_floats(key):
    env = counter(2)
    whole = env._replace(step=lambda *args: env.step(*args)._replace(reward=jnp.int32(1)))
    _, rollout, *_ = roll(whole, key)
    assert rollout.reward.dtype == jnp.float32


def test_a_memory_is_emptied_by_the_flag_before_the_step_and_valued_after_it(key):
    """A memory that counts its steps within an episode, and a value that is that count."""

    def apply(params, memory, obs, first):
        def step(memory, first):
            memory = jnp.where(first, 0, memory) + 1
            return memory, memory

        memory, counts = jax.lax.scan(step, memory, first)
        return memory, Categorical(jnp.zeros((*first.shape, 2)) + params), counts

    network = Network(lambda batch: jnp.zeros(batch), lambda *_: jnp.zeros(()), apply)
    _, rollout, value, next_value = roll(counter(3), key, network=network, segment_length=7)
    np.testing.assert_array_equal(value[:, 0], [1, 2, 3, 1, 2, 3, 1])
    np.testing.assert_array_equal(next_value[:, 0], [2, 3, 4, 2, 3, 4, 2])
    np.testing.assert_array_equal(rollout.memory[:, 0], [0, 1, 2, 3, 1, 2, 3])


def random_start():
    """The state is the number drawn at reset; every step ends the episode."""

    def reset(key, params):
        start = jax.random.uniform(key)
        return start, start[None]

    def step(key, state, action, params):
        return Step(state, state[None], jnp.float32(0), jnp.bool_(True), jnp.bool_(False))

    return Env(reset=reset, step=step, params=(), action_space=Discrete(2))


@pytest.mark.parametrize("num_resets, distinct", [(0, 6), (2, 2), (6, 6)])
def test_start_states_are_fresh_and_shared_out_as_asked(num_resets, distinct, key):
    config = Config(num_envs=6, num_steps=2, num_minibatches=1, resets_per_step=num_resets)
    start = jax.tree.map(
        lambda x: x[0], draw_ahead(key, Categorical(jnp.zeros((2, 6, 2))), (), env=random_start(), config=config).start
    )
    reached = jnp.zeros(6), jnp.zeros((6, 1))
    state, obs = begin_where(jnp.ones(6, bool), start, reached)
    assert len(np.unique(state)) == distinct
    np.testing.assert_array_equal(obs[:, 0], state)
    kept, _ = begin_where(jnp.arange(6) < 2, start, reached)
    assert (kept[2:] == 0).all() and len(np.unique(kept[:2])) == 2


def test_no_start_state_is_ever_drawn_twice(key):
    _, rollout, *_ = roll(random_start(), key, num_envs=8, num_steps=50)
    assert len(np.unique(rollout.obs)) == 8 * 50


@pytest.mark.parametrize("how", ["clip", "tanh"])
def test_actions_stay_within_the_bounds_of_each_dimension(how):
    space = Box(np.array([-1.0, 0.0]), np.array([1.0, 5.0]), (2,))
    low = bound_action(jnp.array([-99.0, -99.0]), space, how)
    high = bound_action(jnp.array([99.0, 99.0]), space, how)
    np.testing.assert_allclose(low, [-1, 0])
    np.testing.assert_allclose(high, [1, 5])
    middle = bound_action(jnp.zeros(2), space, how)
    np.testing.assert_allclose(middle, [0, 0] if how == "clip" else [0, 2.5])


def test_the_action_as_drawn_is_stored_and_the_bounded_one_is_played(key):
    """The observation shows the action that the environment received."""

    def step(key, state, action, params):
        return Step(state, action, jnp.float32(0), jnp.bool_(False), jnp.bool_(False))

    env = Env(lambda key, params: (jnp.zeros(()), jnp.zeros((2, 1))), step, (), Box(-0.1, 0.1, (2, 1)))
    _, rollout, *_ = roll(env, key, num_steps=20)
    assert rollout.action.shape == (20, 3, 2) and (jnp.abs(rollout.action) > 0.1).any()
    played = jnp.clip(rollout.action, -0.1, 0.1)
    np.testing.assert_allclose(rollout.next_obs[..., 0], played)


def test_an_unbounded_box_takes_any_action():
    np.testing.assert_array_equal(bound_action(jnp.array([1e6]), Box(shape=(1,)), "clip"), [1e6])


@pytest.mark.full
def test_many_discrete_choices_reach_the_environment_as_one_vector(key):
    def step(key, state, action, params):
        return Step(state, action.astype(jnp.float32), jnp.float32(0), jnp.bool_(False), jnp.bool_(False))

    env = Env(lambda key, params: (jnp.zeros(()), jnp.zeros(2)), step, (), MultiDiscrete([3, 2]))
    _, rollout, *_ = roll(env, key, num_steps=50)
    np.testing.assert_array_equal(rollout.next_obs, rollout.action)
    assert {tuple(a) for a in np.asarray(rollout.action).reshape(-1, 2)} == {(i, j) for i in range(3) for j in range(2)}


def test_the_log_probability_is_that_of_the_action_drawn(key):
    ppo = make_ppo(recall_cue(), Config(num_steps=8, normalize_observation=True))
    state = ppo.init(key, Hyperparams())
    _, rollout = ppo.collect(state)
    _, distribution, _ = ppo.network.apply(state.policy.params, (), rollout.obs, rollout.first)
    np.testing.assert_allclose(rollout.log_prob, distribution.log_prob(rollout.action), rtol=1e-5)
