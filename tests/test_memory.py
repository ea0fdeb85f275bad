"""What a rollout keeps: bytes of compiled programs, and where they go."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import purejaxppo as pjp
from probes import SMALL, counter
from purejaxppo.batched import reported_failures
from purejaxppo.experiment.memory import bytes_of, memory_of
from purejaxppo.experiment.sweeps.plan import runs_that_fit

pytestmark = pytest.mark.full


def temporaries(ppo):
    """Bytes of the temporaries of one step."""
    state = jax.eval_shape(ppo.init, jax.random.key(0))
    analysis = jax.jit(ppo.step, donate_argnums=0).lower(state).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_4672_actions_are_not_kept_for_every_step():
    """One array of them for 64 x 128 steps takes 146 MiB."""
    env = pjp.time_limit(counter(100)._replace(action_space=pjp.Discrete(4672)), 50)
    config = pjp.Config(num_envs=128, num_steps=64, num_minibatches=8)
    assert temporaries(pjp.make_ppo(env, config)) < 200 * 2**20


def test_an_image_is_kept_as_it_is_shown_and_its_activations_are_not():
    """64 x 32 images of 28 KB take 55 MiB; as floats they would take 220, and so would each layer of a network."""

    def reset(key, params):
        return jnp.int32(0), jnp.zeros((84, 84, 4), jnp.uint8)

    def step(key, time, action, params):
        obs = jnp.full((84, 84, 4), time.astype(jnp.uint8))
        return pjp.Step(time + 1, obs, jnp.float32(1), jnp.bool_(False), time >= 20)

    env = pjp.Env(reset, step, (), pjp.Discrete(2))
    config = pjp.Config(num_envs=64, num_steps=32, num_minibatches=64, num_epochs=1, widths=(8,))
    assert temporaries(pjp.make_ppo(env, config)) < 3.5 * 64 * 32 * 84 * 84 * 4


def test_a_memory_is_kept_once_for_a_segment():
    sizes = {}
    for length in (2, 64):
        config = pjp.Config(
            num_envs=32, num_steps=64, segment_length=length, memory="gru", memory_width=64, num_minibatches=32
        )
        ppo = pjp.make_ppo(counter(100), config)
        rollout = jax.eval_shape(ppo.collect, jax.eval_shape(ppo.init, jax.random.key(0)))[1]
        sizes[length] = sum(x.size for x in jax.tree.leaves(rollout.memory))
    assert sizes == {2: 32 * 32 * 64 * 2, 64: 32 * 64 * 2}


def test_the_parts_of_the_memory_of_a_run_add_up():
    ppo = pjp.make_ppo("Breakout-MinAtar", replace(SMALL, num_envs=8))
    for one, keys in ((ppo, jax.random.key(0)), (pjp.batched(ppo), jax.random.split(jax.random.key(0), 3))):
        parts = memory_of(one, jax.eval_shape(one.init, keys), total=10**7)
        assert sum(parts.values()) == 10**7
        assert parts["rollout"] >= 2 * 8 * 8 * 1600 and parts["rollout"] < 2.2 * 8 * 8 * 1600
        assert parts["start states"] == 8 * (2030 + 4) + 8 * 2030 and parts["environments"] >= 8 * 2030


@pytest.mark.parametrize("env", ["CartPole-v1", pytest.param("Breakout-MinAtar", marks=pytest.mark.slow)])
def test_how_many_runs_fit_follows_from_two_small_programs(env):
    sweep = pjp.Sweep(env, pjp.grid(learning_rate=[1e-3]), num_seeds=64, config=SMALL)
    (group,) = sweep.groups()
    ppo = pjp.make_ppo(env, group.config)
    many = pjp.batched(ppo)
    state = jax.eval_shape(many.init, jax.random.split(jax.random.key(0), 64))
    with reported_failures():
        memory = bytes_of(pjp.compile_training(many, state, 2, slice_size=64))
    assert abs(runs_that_fit(sweep, group, ppo, 2, memory) - 64) <= 3
    assert runs_that_fit(sweep, group, ppo, 2, 1) == 1
