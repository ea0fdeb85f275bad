import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxppo import Categorical, MultiCategorical, Normal, TanhNormal


def test_squashed_log_density_matches_the_case_computed_by_hand():
    one = jnp.ones(1)
    np.testing.assert_allclose(TanhNormal(0 * one, one).log_prob(one), -0.551377, atol=1e-6)
    np.testing.assert_allclose(TanhNormal(0 * one, one, -2.0, 2.0).log_prob(one), -1.244524, atol=1e-6)


@pytest.mark.parametrize(
    "loc, scale, entropy", [(0, 1, 0.66980), (0, 0.5, 0.49997), (1, 0.5, -0.25339), (2, 1, -1.36666)]
)
def test_squashed_entropy_matches_numerical_integration(loc, scale, entropy):
    distribution = TanhNormal(jnp.full(1, float(loc)), jnp.full(1, float(scale)))
    np.testing.assert_allclose(distribution.entropy(), entropy, atol=2e-5)


def test_squashed_log_density_is_finite_where_tanh_rounds_to_one():
    distribution = TanhNormal(jnp.zeros(2), jnp.ones(2))
    value, slope = jax.value_and_grad(lambda u: distribution.log_prob(u))(jnp.array([20.0, -20.0]))
    assert jnp.isfinite(value) and jnp.isfinite(slope).all()


def test_densities_integrate_to_one():
    u = jnp.linspace(-12, 12, 20_001)[:, None]
    density = jnp.exp(Normal(jnp.full_like(u, 0.3), jnp.full_like(u, 0.7)).log_prob(u))
    np.testing.assert_allclose(jnp.trapezoid(density, u[:, 0]), 1, rtol=1e-4)
    squashed = jnp.exp(TanhNormal(jnp.full_like(u, 0.3), jnp.full_like(u, 0.7), -2.0, 2.0).log_prob(u))
    slope = 2 * (1 - jnp.tanh(u[:, 0]) ** 2)
    np.testing.assert_allclose(jnp.trapezoid(squashed * slope, u[:, 0]), 1, rtol=1e-4)


@pytest.mark.parametrize(
    "distribution",
    [
        Categorical(jnp.array([0.5, -1.0, 2.0])),
        MultiCategorical(jnp.array([0.5, -1.0, 2.0, 0.0, 1.0]), (3, 2)),
        Normal(jnp.array([0.3, -1.0]), jnp.array([0.5, 2.0])),
        TanhNormal(jnp.array([0.3, -1.0]), jnp.array([0.5, 1.0])),
    ],
)
def test_entropy_is_the_mean_surprise_of_samples(distribution, key):
    samples = jax.vmap(distribution.sample)(jax.random.split(key, 100_000))
    surprise = -jax.vmap(distribution.log_prob)(samples)
    error = surprise.std() / np.sqrt(len(samples))
    assert abs(surprise.mean() - distribution.entropy()) < 5 * error + 1e-5


def test_a_masked_choice_is_never_drawn_and_keeps_gradients_finite(key):
    def entropy(logits):
        return Categorical(jnp.where(jnp.array([True, False, True]), logits, -jnp.inf)).entropy()

    distribution = Categorical(jnp.array([0.0, -jnp.inf, 0.0]))
    assert not (jax.vmap(distribution.sample)(jax.random.split(key, 1000)) == 1).any()
    np.testing.assert_allclose(distribution.entropy(), np.log(2), rtol=1e-6)
    assert jnp.isfinite(jax.grad(entropy)(jnp.array([0.1, 0.2, 0.3]))).all()


def test_the_mode_is_the_likeliest_action():
    assert Categorical(jnp.array([[0.0, 3.0, 1.0]])).mode() == jnp.array([1])
    np.testing.assert_array_equal(MultiCategorical(jnp.array([0.0, 3, 1, 9, 1]), (3, 2)).mode(), [1, 0])
    np.testing.assert_array_equal(Normal(jnp.array([2.0]), jnp.array([1.0])).mode(), [2.0])


def test_batch_axes_lead():
    logits = jnp.zeros((5, 3, 7))
    distribution = MultiCategorical(logits, (4, 3))
    action = distribution.sample(jax.random.key(0))
    assert action.shape == (5, 3, 2)
    assert distribution.log_prob(action).shape == distribution.entropy().shape == (5, 3)


def test_actions_that_do_not_fit_the_logits_are_refused():
    """Three actions for one row of three logits: broadcast, each would get the probability of another choice."""
    with pytest.raises(TypeError):
        Categorical(jnp.log(jnp.array([0.2, 0.3, 0.5]))).log_prob(jnp.array([0, 0, 0]))


@pytest.mark.parametrize(
    "one, other",
    [
        (Categorical(jnp.array([0.5, -1.0, 2.0])), Categorical(jnp.array([0.0, 1.0, -0.5]))),
        (Categorical(jnp.array([0.5, -jnp.inf, 2.0])), Categorical(jnp.array([0.0, -jnp.inf, -0.5]))),
        (
            MultiCategorical(jnp.array([0.5, -1.0, 2.0, 0.0, 1.0]), (3, 2)),
            MultiCategorical(jnp.array([0.0, 1.0, 0.5, 2.0, 1.0]), (3, 2)),
        ),
        (Normal(jnp.array([0.3, -1.0]), jnp.array([0.5, 2.0])), Normal(jnp.array([0.0, 0.0]), jnp.array([1.0, 1.5]))),
        (
            TanhNormal(jnp.array([0.3, -1.0]), jnp.array([0.5, 1.0])),
            TanhNormal(jnp.array([0.0, 0.0]), jnp.array([1.0, 1.5])),
        ),
    ],
)
def test_the_divergence_is_the_mean_log_ratio_of_samples(one, other, key):
    samples = jax.vmap(one.sample)(jax.random.split(key, 100_000))
    log_ratio = jax.vmap(one.log_prob)(samples) - jax.vmap(other.log_prob)(samples)
    error = log_ratio.std() / np.sqrt(len(samples))
    assert one.kl(other) > 0.1 and abs(log_ratio.mean() - one.kl(other)) < 5 * error
    np.testing.assert_allclose(one.kl(one), 0, atol=1e-6)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(jax.grad(lambda d: d.kl(d))(one)) if x.ndim)
