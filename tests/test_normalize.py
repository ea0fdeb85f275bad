import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.collectives import gather_shards
from purejaxppo.normalize import (
    Moments,
    measure,
    measure_observations,
    merge,
    merge_observations,
    no_moments,
    observation_moments,
    scale,
    standardize,
    standardize_observations,
)


def count_in(moments, values):
    return merge(moments, gather_shards(measure(jnp.asarray(values), (0,))))


def test_merged_moments_are_those_of_all_values_together():
    values = np.random.default_rng(0).normal(3, 5, size=(60, 4)).astype(np.float32)
    moments = no_moments((4,))
    for part in (values[:7], values[7:10], values[10:]):
        moments = count_in(moments, part)
    np.testing.assert_allclose(moments.count, 60)
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.variance, values.var(0), rtol=1e-5)


def test_the_count_still_grows_beyond_two_to_the_24():
    moments = Moments(count=jnp.float32(2**24), mean=jnp.float32(0), variance=jnp.float32(1))
    for _ in range(3):
        moments = count_in(moments, np.ones(512, np.float32))
    assert moments.count == 2**24 + 3 * 512
    np.testing.assert_allclose(moments.mean, 3 * 512 / (2**24 + 3 * 512), rtol=1e-5)


def test_moments_of_values_far_from_zero_are_accurate():
    values = 1e4 + np.random.default_rng(0).normal(size=(10, 100)).astype(np.float32)
    moments = no_moments()
    for part in values:
        moments = count_in(moments, part)
    np.testing.assert_allclose(moments.variance, values.astype(np.float64).var(), rtol=1e-2)


def test_nothing_seen_leaves_values_as_they_are_up_to_the_clip():
    np.testing.assert_allclose(standardize(no_moments((2,)), jnp.array([[3.0, -50.0]]), 10.0), [[3, -10]])


def test_rewards_are_scaled_but_not_shifted():
    moments = Moments(count=jnp.float32(9), mean=jnp.float32(100), variance=jnp.float32(4))
    np.testing.assert_allclose(scale(moments, jnp.array([1.0, -100.0]), 10.0), [0.5, -10])


def test_only_floating_point_parts_of_an_observation_are_normalised():
    obs = {
        "grid": jnp.full((5, 2, 2), 4.0),
        "kind": jnp.arange(5) % 3,
        "flag": jnp.array([True, False, True, True, True]),
        "image": jnp.full((5, 3, 3), 200, jnp.uint8),
    }
    moments = observation_moments(jax.tree.map(lambda x: x[0], obs))
    moments = merge_observations(moments, gather_shards(measure_observations(moments, obs)))
    assert {name for name, part in moments.items() if part is not None} == {"grid"}
    normal = standardize_observations(moments, obs, 10.0)
    for name in ("kind", "flag", "image"):
        assert normal[name].dtype == obs[name].dtype
        np.testing.assert_array_equal(normal[name], obs[name])
    np.testing.assert_allclose(normal["grid"], 0, atol=1e-3)
    one = standardize_observations(moments, jax.tree.map(lambda x: x[1], obs), 10.0)
    np.testing.assert_allclose(one["grid"], normal["grid"][1])
