"""Learning, over several seeds in one program. The seeds are not those on which the presets were tuned.

Thresholds leave room for the spread between seeds, never for a defect: what is published stands beside them.
"""

from functools import partial

import jax
import numpy as np
import pytest
from scipy.stats import trim_mean
from variants import VARIANTS

from purejaxppo import Config, Hyperparams, batched, fit, make_ppo, preset, runs
from purejaxppo.experiment.report.metrics import last_episodes

pytestmark = pytest.mark.full


def train(name, num_seeds, config=None, hyperparams=Hyperparams()):
    """Returns of the last 100 training episodes of each seed, and of 128 fresh ones: [num_seeds] each."""
    if config is None:
        config, hyperparams = preset(name)
    ppo = batched(make_ppo(name, config))
    keys, hyperparams = runs(jax.random.key(2026), num_seeds=num_seeds, hyperparams=hyperparams)
    result = fit(ppo, jax.jit(ppo.init)(keys, hyperparams), progress=False)
    played = jax.jit(ppo.evaluate)(keys, result.state.policy)
    assert played.finished.all()
    last, fresh = last_episodes(result.metrics).values, np.asarray(played.episode_return.mean(1))
    print(f"\n{name}: last 100 {last.mean():.2f} [{last.min():.2f}], fresh {fresh.mean():.2f} [{fresh.min():.2f}]")
    return last, fresh


def test_catch_is_solved():
    """1.0 is perfect; gymnax-blines: 1.0."""
    last, fresh = train("Catch-bsuite", 4)
    assert last.mean() > 0.95 and fresh.mean() > 0.95


@pytest.mark.slow
def test_cartpole_is_solved():
    """500 is perfect; SLM-Lab 498.9 within 200,000 steps, gymnax-blines 500 within 150,000."""
    last, fresh = train("CartPole-v1", 8)
    # Interquartile means: one seed of 32 or so is in a dip when the run ends, which one differs between machines.
    assert trim_mean(last, 0.25) > 475 and trim_mean(fresh, 0.25) > 475


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, least",
    [
        ("CartPole-v1 without velocities", 490),  # Stable-Baselines3's LSTM 500, of one seed
        ("Pendulum-v1 without velocities", -250),  # -218, of one seed
    ],
)
def test_a_memory_learns_velocities_that_are_not_seen(name, least):
    """100,000 steps, 5 seeds; the greedy policy, as what is published."""
    env, config, hyperparams = VARIANTS[name]()
    ppo = batched(make_ppo(env, config))
    keys, hyperparams = runs(jax.random.key(2026), num_seeds=5, hyperparams=hyperparams)
    state, _ = jax.jit(ppo.train)(jax.jit(ppo.init)(keys, hyperparams))
    played = jax.jit(partial(ppo.evaluate, greedy=True))(keys, state.policy)
    returns = np.asarray(played.episode_return.mean(1))
    print(f"\n{name}: {returns.mean():.1f} {np.sort(returns).astype(int).tolist()}")
    assert returns.mean() >= least


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, low, high",
    [
        ("CartPole-v1", 490, 500),  # CleanRL 490.0, baselines 497.5
        ("Acrobot-v1", -87, -60),  # CleanRL -86.4, baselines -81.8
        ("MountainCar-v0", -200, -195),  # CleanRL -200: without exploration nothing is found
    ],
)
def test_the_settings_of_cleanrl_reach_its_scores(name, low, high):
    """500,000 steps, 32 seeds in one program, the mean over the last 100 episodes of each."""
    last, _ = train(name, 32, Config().with_total_steps(500_000), Hyperparams())
    assert low <= last.mean() <= high


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, threshold",
    [
        ("CartPole-v1", 490),
        ("Acrobot-v1", -87),
        ("Pendulum-v1", -175),  # SLM-Lab -174.9 at as many steps
        ("MountainCar-v0", -125),  # gymnax-blines -125
        ("MountainCarContinuous-v0", 90),  # gymnax-blines 0, stuck; 90 counts as solved
        ("Catch-bsuite", 0.98),
        ("DiscountingChain-bsuite", 1.07),  # 1.1 is perfect, the second best chain 1.0
        ("MemoryChain-bsuite", 0.95),  # with a memory; 0 without
        ("UmbrellaChain-bsuite", 0.5),  # 1.0 on average, with a deviation of 3 per episode
        ("FourRooms-misc", 0.95),
        ("FrozenLake-misc", 0.68),
    ],
)
def test_presets_reach_what_is_published(name, threshold):
    last, fresh = train(name, 8)
    # Without the best and the worst seed: one of 30 or so, which one differs between versions, gets stuck on Pendulum.
    assert trim_mean(fresh, 1 / 8) > threshold


@pytest.mark.slow
def test_without_a_memory_the_memory_chain_is_chance():
    config = Config(num_envs=16, num_steps=32).with_total_steps(150_000)
    last, _ = train("MemoryChain-bsuite", 8, config, Hyperparams(learning_rate=1e-3))
    np.testing.assert_allclose(last.mean(), 0, atol=0.15)
