import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxppo.advantages import gae

REWARD = jnp.array([1.0, 2, 3, 4, 5])
VALUE = jnp.array([0.5, 1, 1.5, 2, 2.5])
# Step 1 was truncated at a state worth 10, step 3 terminated, and the state after the last step is worth 3.
NEXT_VALUE = jnp.array([1.0, 10, 2, 77, 3])
TERMINATED = jnp.array([False, False, False, True, False])
DONE = jnp.array([False, True, False, True, False])


def test_gae_matches_the_case_computed_by_hand():
    advantage = gae(REWARD, VALUE, NEXT_VALUE, TERMINATED, DONE, 0.9, 0.8)
    np.testing.assert_allclose(advantage, [8.6, 10, 4.74, 2, 5.2], rtol=1e-6)
    np.testing.assert_allclose(advantage + VALUE, [9.1, 11, 6.24, 4, 7.7], rtol=1e-6)


def test_gae_takes_axes_behind_time():
    def columns(x):
        return jnp.stack([x, x[::-1]], axis=1)[..., None]

    both = gae(*map(columns, (REWARD, VALUE, NEXT_VALUE, TERMINATED, DONE)), discount=0.9, gae_lambda=0.8)
    turned = gae(*(x[::-1] for x in (REWARD, VALUE, NEXT_VALUE, TERMINATED, DONE)), discount=0.9, gae_lambda=0.8)
    np.testing.assert_allclose(both[:, 0, 0], [8.6, 10, 4.74, 2, 5.2], rtol=1e-6)
    np.testing.assert_allclose(both[:, 1, 0], turned, rtol=1e-6)


def test_termination_wins_over_truncation():
    ends = jnp.array([True])
    advantage = gae(jnp.ones(1), jnp.zeros(1), jnp.full(1, 100.0), ends, ends, 0.9, 0.8)
    np.testing.assert_allclose(advantage, [1.0])


def test_a_nan_after_a_termination_does_not_leak():
    next_value = jnp.where(TERMINATED, jnp.nan, NEXT_VALUE)
    advantage = gae(REWARD, VALUE, next_value, TERMINATED, DONE, 0.9, 0.8)
    np.testing.assert_allclose(advantage, [8.6, 10, 4.74, 2, 5.2], rtol=1e-6)


@pytest.mark.parametrize("discount, gae_lambda", [(0.99, 1.0), (0.99, 0.0), (1.0, 0.95), (0.0, 0.5)])
def test_gae_is_the_mixture_of_n_step_estimates(discount, gae_lambda):
    """Eq. 16 term by term, by a double loop in float64, on episodes with both kinds of end."""
    rng = np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, 40))
    terminated, truncated = rng.random((2, 40)) < 0.1
    done = terminated | truncated
    delta = reward + discount * next_value * ~terminated - value
    expected = np.zeros(40)
    for t in range(40):
        weight = 1.0
        for k in range(t, 40):
            expected[t] += weight * delta[k]
            weight *= discount * gae_lambda
            if done[k]:
                break
    advantage = gae(reward, value, next_value, terminated, done, discount, gae_lambda)
    np.testing.assert_allclose(advantage, expected, rtol=2e-5, atol=2e-5)


def test_gae_may_be_mapped_over_discounts():
    many = jax.vmap(lambda discount: gae(REWARD, VALUE, NEXT_VALUE, TERMINATED, DONE, discount, 0.8))
    one = gae(REWARD, VALUE, NEXT_VALUE, TERMINATED, DONE, 0.5, 0.8)
    np.testing.assert_allclose(many(jnp.array([0.9, 0.5]))[1], one, rtol=1e-6)
