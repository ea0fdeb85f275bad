"""What accelerators compute in another way than a CPU: the same numbers, to rounding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as pjp
from purejaxppo import platforms

SMALL: dict[str, Any] = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "num_epochs": 2, "num_updates": 2}


def grid():
    """A bar of light that moves over a grid of 4 x 4; the action that follows it is rewarded."""

    def look(time):
        return (jnp.arange(4)[:, None, None] == time % 4) * jnp.ones((4, 4, 2))

    def step(key, time, action, params):
        time = time + 1
        return pjp.Step(time, look(time), (action == time % 4).astype(jnp.float32), time >= 7, jnp.bool_(False))

    return pjp.Env(lambda key, params: (jnp.int32(0), look(0)), step, (), pjp.Discrete(4))


WORKS = {
    "mlp": ("CartPole-v1", pjp.Config(**SMALL)),
    "normalised, continuous": ("Pendulum-v1", pjp.Config(**SMALL, normalize_observation=True, scale_reward=True)),
    "gru": ("CartPole-v1", pjp.Config(**SMALL, memory="gru", memory_width=8, segment_length=4)),
    "cnn": (grid(), pjp.Config(**SMALL, encoder="cnn", widths=(16,))),
}


@pytest.fixture
def accelerated(monkeypatch):
    """Traces on the CPU what accelerators are given; returns how to switch it on."""

    def choose(*args, cpu, default, tpu=None):
        # The gradient of a convolution would take a CPU minutes.
        return (cpu if getattr(cpu, "__name__", "") == "product" else default)(*args)

    return lambda: monkeypatch.setattr(jax.lax, "platform_dependent", choose)


def train(name, num_runs=1):
    env, config = WORKS[name]
    ppo, key = pjp.make_ppo(env, config), jax.random.key(1)
    if num_runs > 1:
        ppo, key = pjp.batched(ppo), jax.random.split(key, num_runs)
    return jax.jit(ppo.train)(ppo.init(key))


@pytest.mark.parametrize(
    "name, num_runs",
    [
        ("mlp", 2),
        ("cnn", 1),
        pytest.param("normalised, continuous", 1, marks=pytest.mark.slow),
        pytest.param("gru", 2, marks=pytest.mark.slow),
    ],
)
def test_accelerators_train_to_the_same_numbers(name, num_runs, accelerated):
    state, metrics = train(name, num_runs)
    accelerated()
    same_state, same_metrics = train(name, num_runs)
    # Every minibatch adds some rounding, and Adam divides small gradients by their own size.
    for ours, theirs in zip(jax.tree.leaves(state.policy.params), jax.tree.leaves(same_state.policy.params)):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    for name in ("loss", "policy_loss", "value_loss", "entropy", "approx_kl", "grad_norm", "episode_return"):
        np.testing.assert_allclose(metrics[name], same_metrics[name], rtol=2e-3, atol=1e-4, err_msg=name)
    assert jax.tree.structure(state) == jax.tree.structure(same_state)


@pytest.mark.slow
def test_gradients_flow_through_what_accelerators_compute(accelerated):
    def returned(rate):
        ppo = pjp.make_ppo("Pendulum-v1", WORKS["normalised, continuous"][1])
        state = ppo.init(jax.random.key(0), pjp.Hyperparams(learning_rate=rate))
        return ppo.train(state)[1]["value_loss"][-1]

    slope = jax.jit(jax.grad(returned))(1e-3)
    accelerated()
    np.testing.assert_allclose(jax.jit(jax.grad(lambda rate: returned(rate)))(1e-3), slope, rtol=1e-2)


@pytest.mark.parametrize("reverse", [False, True])
def test_an_unrolled_scan_is_a_scan(reverse, accelerated):
    def step(carry, x):
        return 0.5 * carry + x, carry

    xs = jnp.arange(11.0)
    expected = jax.lax.scan(step, jnp.float32(1), xs, reverse=reverse)
    accelerated()
    for ours, theirs in zip(platforms.scan(step, jnp.float32(1), xs, unroll=4, reverse=reverse), expected):
        np.testing.assert_array_equal(ours, theirs)


def test_map_each_maps_and_has_the_gradient_of_a_map(accelerated):
    each = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}]
    shared = jnp.array([5.0, 6.0])

    def total(each, shared):
        first, second = platforms.map_each(lambda x, shared: (x["w"] * shared).sum() ** 2, each, shared)
        return first + 2 * second

    for _ in range(2):  # on a CPU, then as on an accelerator
        value, slopes = jax.value_and_grad(total, argnums=(0, 1))(each, shared)
        assert value == 17**2 + 2 * 39**2
        np.testing.assert_array_equal(slopes[0][0]["w"], 2 * 17 * shared)
        np.testing.assert_array_equal(slopes[0][1]["w"], 4 * 39 * shared)
        np.testing.assert_array_equal(slopes[1], 2 * 17 * each[0]["w"] + 4 * 39 * each[1]["w"])
        accelerated()


def test_means_are_means_and_a_number_is_its_own(accelerated):
    terms = {"a": jnp.array([[1.0, 2.0], [3.0, 6.0]]), "b": jnp.float32(7)}
    for _ in range(2):
        means = platforms.means(terms, (2, 2))
        assert (means["a"], means["b"]) == (3, 7)
        slopes = jax.grad(lambda terms: platforms.means(terms, (2, 2))["a"])(terms)
        np.testing.assert_array_equal(slopes["a"], np.full((2, 2), 0.25))
        assert slopes["b"] == 0
        accelerated()
