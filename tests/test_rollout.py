from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probes import counter, recall_cue
from purejaxppo import (
    Box,
    Categorical,
    Config,
    Discrete,
    Env,
    Hyperparams,
    MultiDiscrete,
    Network,
    Step,
    make_ppo,
    time_limit,
)
from purejaxppo.advantages import state_values
from purejaxppo.envs.base import bound_action
from purejaxppo.rollout import Policy, Rollout, discounted_returns, first_limits, unroll
from purejaxppo.starts import Queue, refill


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
    np.testing.assert_array_equal(rollout.memory[:, 0], [0])


@pytest.mark.parametrize("length", [2, 4, 8])
def test_a_memory_kept_where_segments_begin_gives_the_values_of_one_kept_at_every_step(length, key):
    """Episodes of 3 and 5 steps under truncation; the value depends on all that was seen in the episode."""

    def apply(params, memory, obs, first):
        def step(memory, seen):
            obs, first = seen
            memory = 0.5 * jnp.where(first, 0, memory) + obs.sum(-1)
            return memory, memory

        memory, values = jax.lax.scan(step, memory, (obs, first))
        return memory, Categorical(jnp.zeros((*first.shape, 2)) + params), values

    network = Network(lambda batch: jnp.zeros(batch), lambda *_: jnp.zeros(()), apply)
    for limit in (1, 3, 5):
        parts = {"network": network, "num_envs": 2, "num_steps": 8, "segment_length": length}
        _, rollout, value, next_value = roll(counter(limit), key, **parts)
        assert rollout.memory.shape == (8 // length, 2)
        expected, reached, memory = [], [], 0.0
        for obs, first, next_obs in zip(rollout.obs[:, 0, 0], rollout.first[:, 0], rollout.next_obs[:, 0, 0]):
            memory = 0.5 * (0.0 if first else memory) + float(obs)
            expected.append(memory)
            reached.append(0.5 * memory + float(next_obs))
        np.testing.assert_allclose(value[:, 0], expected, rtol=1e-6)
        np.testing.assert_allclose(next_value[:, 0], reached, rtol=1e-6)


def random_start():
    """The state is the number drawn at reset; every step ends the episode."""

    def reset(key, params):
        start = jax.random.uniform(key)
        return start, start[None]

    def step(key, state, action, params):
        return Step(state, state[None], jnp.float32(0), jnp.bool_(True), jnp.bool_(False))

    return Env(reset=reset, step=step, params=(), action_space=Discrete(2))


def test_environments_that_end_in_one_step_begin_from_as_many_states(key):
    """Twelve environments end together every 5 steps; one start is drawn per step, so 5 of 12 are fresh each time."""

    def reset(key, params):
        start = jax.random.uniform(key)
        return (start, jnp.int32(0)), start[None]

    def step(key, state, action, params):
        start, time = state
        return Step((start, time + 1), start[None], jnp.float32(0), jnp.bool_(False), time + 1 == 5)

    env = Env(reset=reset, step=step, params=(), action_space=Discrete(2))
    actors, rollout, *_ = roll(env, key, num_envs=12, num_steps=20, resets_per_step=1)
    begun = np.asarray(rollout.obs[::5, :, 0])
    assert all(len(np.unique(row)) == 12 for row in begun)
    for before, after in zip(begun[1:], begun[2:]):
        assert len(np.intersect1d(before, after)) == 12 - 5
    assert np.asarray(rollout.reused).sum(1)[4::5].tolist() == [0, 7, 7, 7]
    # A start that waits is never one of an episode that runs, unless it was used.
    waiting, running = np.asarray(actors.pool.start[1][:, 0]), np.asarray(actors.obs[:, 0])
    assert (np.isin(waiting, running) == (np.asarray(actors.pool.age) > 0)).all()


def test_start_states_used_longest_ago_are_replaced_first():
    queue = Queue(row=jnp.arange(4), age=jnp.array([-2, 3, -5, 1]))
    after, reused = refill(queue, jnp.array([True, True, False, False]), jnp.array([7, 8]))
    np.testing.assert_array_equal(after.row, [0, 7, 2, 8])
    np.testing.assert_array_equal(after.age, [1, 0, -6, 0])
    np.testing.assert_array_equal(reused, [False, True, False, False])


def test_start_states_that_nobody_uses_are_replaced_in_turn():
    """So that none was drawn more than N / K steps ago."""
    queue, none = Queue(row=jnp.arange(6), age=jnp.zeros(6, jnp.int32)), jnp.zeros(6, bool)
    for step in range(3):
        queue, _ = refill(queue, none, jnp.array([10 + step, 20 + step]))
    assert sorted(queue.row.tolist()) == [10, 11, 12, 20, 21, 22]


@pytest.mark.parametrize("plain", [False, True])
def test_a_start_state_that_is_used_twice_goes_on_with_another_key(plain, key):
    """The state draws from the key that it carries."""

    def reset(key, params):
        return {"rng": jax.random.key_data(key) if plain else key, "time": jnp.int32(0)}, jnp.zeros(1)

    def step(key, state, action, params):
        own = jax.random.wrap_key_data(state["rng"]) if plain else state["rng"]
        state = {"rng": state["rng"], "time": state["time"] + 1}
        return Step(state, jax.random.uniform(own, (1,)), jnp.float32(0), jnp.bool_(False), state["time"] == 1)

    env = Env(reset=reset, step=step, params=(), action_space=Discrete(2))
    _, rollout, *_ = roll(env, key, num_envs=4, num_steps=12, resets_per_step=1)
    assert rollout.reused.any() and len(np.unique(rollout.next_obs)) == 4 * 12


def test_a_start_state_that_is_used_once_is_as_it_was_drawn(key):
    """The observation shows the key of the state, which holds numbers that look like one, too."""

    def reset(key, params):
        state = {"level_key": jax.random.key_data(key), "monkey": jnp.uint32([3, 4]), "time": jnp.int32(0)}
        return state, state["level_key"].astype(jnp.float32)

    def step(key, state, action, params):
        state = state | {"time": state["time"] + 1}
        return Step(state, state["level_key"] * 1.0, jnp.float32(0), jnp.bool_(False), state["time"] == 4)

    env = Env(reset=reset, step=step, params=(), action_space=Discrete(2))
    actors, rollout, *_ = roll(env, key, num_envs=4, num_steps=16, resets_per_step=1)
    assert not rollout.reused.any()
    np.testing.assert_array_equal(rollout.obs, rollout.next_obs)
    np.testing.assert_array_equal(actors.env_state["monkey"], [[3, 4]] * 4)


def test_as_many_resets_as_environments_need_no_pool(key):
    assert roll(random_start(), key, num_envs=8, resets_per_step=8)[0].pool == ()
    assert roll(random_start(), key, num_envs=8)[0].pool == ()  # a small state
    large = random_start()._replace(reset=lambda key, params: (jnp.zeros(()), jnp.zeros(1000)))
    large = large._replace(step=lambda *_: Step(jnp.zeros(()), jnp.zeros(1000), jnp.float32(0), *[jnp.bool_(True)] * 2))
    assert roll(large, key, num_envs=8)[0].pool.age.shape == (8,)


@pytest.mark.parametrize("num_resets", [1, 3, 6])
def test_the_next_observation_is_exact_whatever_ends(num_resets, key):
    """Episodes of one to four steps: an observation names its episode and its step."""

    def reset(key, params):
        name, length = jax.random.uniform(key), jax.random.randint(jax.random.fold_in(key, 1), (), 1, 5)
        return (name, length, jnp.int32(0)), jnp.stack([name, 0.0])

    def step(key, state, action, params):
        name, length, time = state
        obs = jnp.stack([name, 1.0 + time])
        return Step((name, length, time + 1), obs, jnp.float32(0), jnp.bool_(False), time + 1 >= length)

    env = Env(reset=reset, step=step, params=(), action_space=Discrete(2))
    actors, rollout, *_ = roll(env, key, num_envs=6, num_steps=30, resets_per_step=num_resets)
    np.testing.assert_array_equal(rollout.next_obs[..., 0], rollout.obs[..., 0])  # of the episode that ran
    np.testing.assert_array_equal(rollout.next_obs[..., 1], rollout.obs[..., 1] + 1)
    shown = np.concatenate([rollout.obs[1:], actors.obs[None]])
    running = ~np.asarray(rollout.done)
    np.testing.assert_array_equal(shown[running], np.asarray(rollout.next_obs)[running])
    assert (shown[~running][:, 1] == 0).all() and rollout.done.sum() > 60


def test_first_episodes_end_at_different_times_if_staggered(key):
    env = time_limit(counter(10**6), 12)
    actors, rollout, *_ = roll(env, key, num_envs=4, num_steps=36, stagger=12)
    assert [np.flatnonzero(column).tolist() for column in np.asarray(rollout.truncated).T] == [
        [0, 12, 24], [3, 15, 27], [6, 18, 30], [9, 21, 33]
    ]  # fmt: skip
    np.testing.assert_array_equal(rollout.ended.sum(0), [2, 2, 2, 2])  # the first ones do not count
    assert set(np.asarray(rollout.episode_length)[np.asarray(rollout.ended)]) == {12}
    assert (actors.first_limit == 0).all()


def test_a_distribution_of_many_actions_is_not_kept_and_is_there_if_it_is_read(key):
    env = random_start()._replace(action_space=Discrete(200))
    ppo = make_ppo(env, Config(num_envs=3, num_steps=4, num_minibatches=1))
    state = ppo.init(key)
    _, rollout = jax.jit(ppo.collect)(state)
    assert rollout.distribution.logits.shape == (4, 3, 200)
    np.testing.assert_allclose(rollout.distribution.log_prob(rollout.action), rollout.log_prob, atol=1e-5)
    assert len(np.unique(rollout.action)) > 6


def test_a_nan_with_the_last_step_is_counted(key):
    env = counter(2)

    def step(key, state, action, params):
        result = env.step(key, state, action, params)
        return result._replace(reward=jnp.where(result.truncated, jnp.nan, result.reward))

    _, rollout, *_ = roll(env._replace(step=step), key, num_envs=3, num_steps=6)
    np.testing.assert_array_equal(rollout.lost, rollout.done)
    assert rollout.lost.sum() == 9 and (rollout.reward[rollout.lost] == 0).all()


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


def test_values_in_pieces_are_those_of_one_pass(key, monkeypatch):
    """With a memory, which is carried from piece to piece."""
    from purejaxppo import advantages

    config = Config(num_envs=3, num_steps=12, num_minibatches=1, segment_length=4, memory="gru", memory_width=8)
    ppo = make_ppo(counter(5), config)
    state, rollout = ppo.collect(ppo.init(key))
    parts = {"network": ppo.network, "config": config}
    whole = advantages.values_acted_on(state.policy, rollout, **parts)
    for piece in (1, 100):
        monkeypatch.setattr(advantages, "PIECE", piece)
        np.testing.assert_allclose(advantages.values_acted_on(state.policy, rollout, **parts), whole, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"stagger": 2**31 - 1}, {"stagger": 5, "bootstrap_on_truncation": False}])
def test_limits_of_first_episodes_are_positive_or_refused(settings):
    if len(settings) > 1:
        with pytest.raises(ValueError, match="stagger=5 truncates episodes"):
            Config(**settings)
    else:
        limits = np.asarray(first_limits(Config(num_envs=2**15, num_minibatches=1, **settings)))
        assert limits[0] == 1 and (np.diff(limits) >= 0).all() and limits[-1] <= 2**31 - 1
