import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxppo.loss import approximate_kl, policy_loss, value_loss
from purejaxppo.normalize import standardize_advantage


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [(1.5, 1, -1.2, 0), (1.5, -1, 1.5, 1.5), (0.5, 1, -0.5, -0.5), (0.5, -1, 0.8, 0), (1.0, 2, -2.0, -2.0)],
)
def test_policy_loss_matches_the_cases_computed_by_hand(ratio, advantage, loss, gradient):
    log_ratio = jnp.log(jnp.float32(ratio))
    value, slope = jax.value_and_grad(policy_loss)(log_ratio, jnp.float32(advantage), 0.2)
    np.testing.assert_allclose([value, slope], [loss, gradient], rtol=1e-6)


def test_value_loss_matches_the_case_computed_by_hand():
    loss, gradient = jax.value_and_grad(value_loss)(*jnp.array([1.0, 0.0, 0.9]), 0.2)
    np.testing.assert_allclose([loss, gradient], [0.245, 0], rtol=1e-6)


def test_value_loss_without_a_clip_is_half_the_mean_square():
    value, target = jnp.array([1.0, 2, 3]), jnp.array([0.0, 4, 3])
    loss, gradient = jax.value_and_grad(value_loss)(value, jnp.full(3, -50.0), target, jnp.inf)
    np.testing.assert_allclose(loss, (1 + 4 + 0) / 6, rtol=1e-6)
    np.testing.assert_allclose(gradient, (value - target) / 3, rtol=1e-5, atol=1e-6)


def test_losses_are_means_over_any_shape():
    rng = np.random.default_rng(0)
    log_ratio, advantage = rng.normal(size=(2, 12)).astype(np.float32)
    flat = policy_loss(log_ratio, advantage, 0.2)
    np.testing.assert_allclose(policy_loss(log_ratio.reshape(3, 4), advantage.reshape(3, 4), 0.2), flat, rtol=1e-6)


def test_advantages_are_standardised_by_their_population_deviation():
    standardized = standardize_advantage(jnp.array([1.0, 2, 3, 4]))
    np.testing.assert_allclose(standardized, (np.arange(4) - 1.5) / 1.1180340, rtol=1e-6)


def test_equal_advantages_become_zero_and_keep_a_finite_gradient():
    standardized, gradient = jax.vjp(standardize_advantage, jnp.full(5, 7.0))
    np.testing.assert_array_equal(standardized, np.zeros(5))
    assert jnp.isfinite(gradient(jnp.ones(5))[0]).all()


def test_approximate_kl_estimates_the_kl_of_two_normals():
    # KL of N(0, 1) from N(0.1, 1) is 0.005.
    sample = jax.random.normal(jax.random.key(0), (200_000,))
    log_ratio = -0.5 * (sample - 0.1) ** 2 + 0.5 * sample**2
    np.testing.assert_allclose(approximate_kl(log_ratio), 0.005, rtol=0.02)
