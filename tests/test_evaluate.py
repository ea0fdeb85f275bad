import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probes import SMALL, counter, recall_cue
from purejaxppo import Discrete, Env, Step, make_ppo


def random_length():
    """Episodes of 1 or 10 steps, by a coin at reset; reward 1 a step."""

    def reset(key, params):
        length = jnp.where(jax.random.bernoulli(key), 1, 10)
        return (jnp.int32(0), length), jnp.zeros(1)

    def step(key, state, action, params):
        time, length = state
        return Step((time + 1, length), jnp.zeros(1), jnp.float32(1), time + 1 >= length, jnp.bool_(False))

    return Env(reset, step, (), Discrete(2))


def test_the_first_episode_of_each_environment_counts_and_no_other(key):
    """Counting whatever ends first would find far more short episodes than long ones."""
    ppo = make_ppo(random_length(), SMALL)
    evaluation = ppo.evaluate(key, ppo.init(key).policy, num_episodes=400)
    assert evaluation.finished.all()
    assert set(np.unique(evaluation.episode_return)) == {1, 10}
    assert abs((evaluation.episode_length == 1).mean() - 0.5) < 0.1


def test_returns_are_undiscounted_sums_of_rewards(key):
    ppo = make_ppo(counter(3), SMALL)
    evaluation = ppo.evaluate(key, ppo.init(key).policy, num_episodes=2)
    np.testing.assert_array_equal(evaluation.episode_return, [6, 6])
    np.testing.assert_array_equal(evaluation.episode_length, [3, 3])


def test_what_does_not_end_is_cut_off_and_marked(key):
    ppo = make_ppo(counter(30), SMALL)
    evaluation = ppo.evaluate(key, ppo.init(key).policy, num_episodes=2, max_steps=5)
    np.testing.assert_array_equal(evaluation.episode_length, [5, 5])
    assert not evaluation.finished.any()


def test_greedy_play_takes_the_mode_and_repeats_itself(key):
    ppo = make_ppo("CartPole-v1", SMALL)
    policy = ppo.init(key).policy
    play = jax.jit(lambda key, greedy: ppo.evaluate(key, policy, num_episodes=8, greedy=greedy), static_argnums=1)
    np.testing.assert_array_equal(play(key, True).episode_return, play(key, True).episode_return)
    assert (play(key, True).episode_return != play(key, False).episode_return).any()


@pytest.mark.full
@pytest.mark.parametrize("memory", ["", "gru", "lstm", "mingru"])
def test_acting_step_by_step_is_greedy_evaluation(memory, key):
    """The host plays an episode with `act`; evaluation plays the same one in a program."""
    config = type(SMALL)(
        **vars(SMALL)
        | {"memory": memory, "segment_length": 8 if memory else 1, "normalize_observation": True}
        | {"memory_inputs": memory == "lstm"}
    )
    ppo = make_ppo(recall_cue(), config)
    policy = jax.jit(ppo.train)(ppo.init(key))[0].policy
    act, step = jax.jit(ppo.act), jax.jit(ppo.env.step)
    returns = {}
    for seed in range(8):
        (state, obs), remembered, total, done = ppo.env.reset(jax.random.key(seed), ()), None, 0.0, False
        cue = int(state[1])
        while not done:
            action, remembered = act(policy, obs, memory=remembered)
            result = step(key, state, action, ())
            state, obs, total, done = result.state, result.obs, total + float(result.reward), bool(result.terminated)
        returns[cue] = total
    evaluation = ppo.evaluate(key, policy, num_episodes=64, greedy=True)
    np.testing.assert_allclose(evaluation.episode_return.mean(), np.mean(list(returns.values())), atol=0.25)
    assert set(np.unique(evaluation.episode_return)) == set(returns.values())


@pytest.mark.full
def test_acting_returns_an_action_that_the_environment_takes(key):
    for name in ("CartPole-v1", "Pendulum-v1", "FrozenLake-misc"):
        ppo = make_ppo(name, SMALL)
        state = ppo.init(key)
        env_state, obs = ppo.env.reset(key, ppo.env.params)
        for action_key in (None, key):
            action, memory = ppo.act(state.policy, obs, action_key)
            result = ppo.env.step(key, env_state, action, ppo.env.params)
            assert np.isfinite(result.reward) and memory == ()
