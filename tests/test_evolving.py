import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as pjp
from probes import SMALL, copy_cue, counter, make
from purejaxppo import Hyperparams, batched, make_ppo
from purejaxppo.evolving import Population, choose_parents, count_episodes, evolve, evolving

pytestmark = pytest.mark.full

ONE_MINIBATCH = {"num_epochs": 1, "num_minibatches": 1, "segment_length": 8}
RECURRENT = replace(
    SMALL,
    memory="gru",
    memory_width=4,
    share_encoder=True,
    normalize_observation=True,
    scale_reward=True,
    **ONE_MINIBATCH,
)
RATES = jnp.array([1e-4, 3e-4, 1e-3, 3e-3])


def five_steps(time, cue, action):
    """What is seen and paid depends on what is done."""
    return jnp.ones(1) * cue + action, 1.0 + action, time == 5, False


def plain(tree):
    """Leaves as numpy, keys as their data, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return {jax.tree_util.keystr(path): np.asarray(jax.random.key_data(x) if is_key(x) else x) for path, x in leaves}


@pytest.fixture(scope="module")
def ppo():
    return make_ppo(copy_cue(), SMALL)


@pytest.fixture(scope="module")
def four():
    """A recurrent PPO with all normalisers, and four different runs of it after two updates."""
    many = batched(make_ppo(make(lambda cue: jnp.ones(1) * cue, five_steps), RECURRENT))
    keys = jax.random.split(jax.random.key(3), 4)
    state = jax.jit(many.init)(keys, Hyperparams(learning_rate=RATES, discount=jnp.array([0.9, 0.99, 0.999, 1.0])))
    step = jax.jit(many.step)
    return step, step(step(state)[0])[0]


@pytest.fixture(scope="module")
def evolved(four):
    """The four with run 2 the fittest and run 1 the least fit, before and after an evolution."""
    fitness = jnp.array([2.0, 1.0, 4.0, 3.0])
    round = jax.jit(partial(evolve, explore=("learning_rate", "discount")))
    return four[1], *round(jax.random.key(0), four[1], fitness)


def test_the_least_fit_run_goes_on_from_the_fittest(evolved):
    _, _, parent = evolved
    assert parent.tolist() == [0, 2, 2, 3] and parent.dtype == jnp.int32


def test_a_copy_takes_over_all_that_was_learned(evolved):
    before, after, _ = evolved
    learned = lambda state: plain({"policy": state.policy, "opt": state.opt_state, "updates": state.num_updates})
    before, after = learned(before), learned(after)
    for name, x in before.items():
        np.testing.assert_array_equal(after[name][1], x[2], err_msg=name)
    differing = " ".join(name for name, x in before.items() if (x[1] != x[2]).any())
    assert all(part in differing for part in (".params", ".observation", ".reward", "['opt']"))


def test_a_copy_keeps_its_key_and_its_environments_but_no_memory_of_another_network(evolved):
    before, after, _ = evolved
    kept = lambda state: plain((state.key, state.env_params, state.actors.replace(first=(), discounted_return=())))
    chex.assert_trees_all_equal(kept(before), kept(after))
    assert after.actors.first[1].all() and not before.actors.first[1].all()
    assert not after.actors.discounted_return[1].any() and before.actors.discounted_return[1].any()


def test_every_other_run_stays_as_it_was_to_the_bit(evolved):
    before, after, _ = evolved
    before, after = plain(before), plain(after)
    for name, x in before.items():
        assert x.dtype == after[name].dtype
        np.testing.assert_array_equal(x[[0, 2, 3]], after[name][[0, 2, 3]], err_msg=name)


def test_what_is_explored_moves_by_a_factor_and_a_discount_in_its_distance_from_one(evolved):
    before, after, _ = evolved
    rate, distance = after.hyperparams.learning_rate[1], 1 - after.hyperparams.discount[1]
    assert np.isclose(rate, [1e-3 * 0.8, 1e-3 * 1.25], rtol=1e-5).any()
    assert np.isclose(distance, [0.001 * 0.8, 0.001 * 1.25], rtol=1e-3).any()
    for name in set(before.hyperparams.names) - {"learning_rate", "discount"}:
        assert after.hyperparams.get(name)[1] == before.hyperparams.get(name)[2]


def test_a_coefficient_of_a_custom_loss_is_explored(four):
    hyperparams = replace(four[1].hyperparams, extra={"beta": jnp.full(4, 2.0)})
    explore = {"extra.beta": (0.0, 2.1)}
    state, parent = evolve(
        jax.random.key(0), four[1].replace(hyperparams=hyperparams), jnp.arange(4.0), explore=explore
    )
    assert parent.tolist() == [3, 1, 2, 3]
    assert np.isclose(state.hyperparams.extra["beta"][0], [1.6, 2.1]).any()
    np.testing.assert_array_equal(state.hyperparams.extra["beta"][1:], 2)
    with pytest.raises(ValueError, match="explore names 'extra.gamma', which the hyperparameters lack"):
        evolve(jax.random.key(0), four[1], jnp.arange(4.0), explore=["extra.gamma"])


def test_both_factors_are_drawn_for_every_field_and_run_by_itself(four):
    fitness = jnp.array([1.0, 2.0, 4.0, 4.0])
    evolve_two = lambda key: evolve(key, four[1], fitness, explore=("clip", "gae_lambda"), fraction=0.5)
    states, parent = jax.jit(jax.vmap(evolve_two))(jax.random.split(jax.random.key(1), 200))
    up = np.concatenate([states.hyperparams.clip[:, :2] > 0.2, states.hyperparams.gae_lambda[:, :2] < 0.95], axis=1)
    np.testing.assert_allclose(up.mean(0), 0.5, atol=0.15)
    np.testing.assert_allclose(np.corrcoef(up.T), np.eye(4), atol=0.3)
    np.testing.assert_allclose([(parent[:, i] == 2).mean() for i in (0, 1)], 0.5, atol=0.15)
    assert set(np.unique(parent[:, :2])) == {2, 3}


@pytest.mark.parametrize(
    "field, value, factor, low, high, expected",
    [
        ("learning_rate", 1e-2, 10, 1e-5, 2e-2, 2e-2),
        ("learning_rate", 1e-4, 0.01, 1e-5, 2e-2, 1e-5),
        ("learning_rate_annealing", 0.9, 2, 0, 1, 1.0),
        ("gae_lambda", 0.2, 2, 0, 1, 0.0),  # a distance of 0.8 would become 1.6
        ("discount", 1.0, 2, 0, 1, 1.0),
        ("discount", 0.99, 0.5, 0.9, 0.992, 0.992),
        ("adam_b1", 0.9, 1e-9, 0, 1, 1 - 2**-24),  # 1 is not allowed
        ("entropy_coefficient", 0.0, 2, 0, np.inf, 0.0),
    ],
)
def test_what_is_explored_stays_in_its_range(four, field, value, factor, low, high, expected):
    hyperparams = replace(four[1].hyperparams, **{field: jnp.full(4, value)})
    options = {"explore": {field: (low, high)}, "factors": (factor,)}
    state, parent = evolve(jax.random.key(0), four[1].replace(hyperparams=hyperparams), jnp.arange(4.0), **options)
    assert parent.tolist() == [3, 1, 2, 3]
    assert getattr(state.hyperparams, field)[0] == np.float32(expected)
    Hyperparams().set({field: float(getattr(state.hyperparams, field)[0])})


@pytest.mark.parametrize(
    "fitness, fraction, possible",
    [
        ([1, 2, 3, 4], 0.5, [{2, 3}, {2, 3}, {2}, {3}]),
        ([1, np.nan, 3, -9], 0.25, [{0}, {2}, {2}, {3}]),  # nan is the lowest
        ([np.nan, np.nan, 3, np.nan], 0.5, [{0, 2}, {1, 2}, {2}, {3, 2}]),  # none is copied that has no fitness
        ([np.nan] * 4, 0.5, [{0}, {1}, {2}, {3}]),
        ([7, 7, 7, 7], 0.5, [{0}, {1}, {2}, {3}]),
        ([-np.inf, 1, 2, 3], 0.25, [{3}, {1}, {2}, {3}]),
        ([5, 1, 1, 5, 9, 9, 2, 3], 0.25, [{0}, {4, 5}, {4, 5}, {3}, {4}, {5}, {6}, {7}]),
        ([5, 1, 4, 3, 2], 0.25, [{0}, {0}, {2}, {3}, {4}]),  # a fourth of five is one
    ],
)
def test_the_lowest_draw_among_the_highest(fitness, fraction, possible):
    keys = jax.random.split(jax.random.key(0), 64)
    num_copies = int(fraction * len(fitness))
    parents = jax.vmap(lambda key: choose_parents(key, jnp.array(fitness, jnp.float32), num_copies))(keys)
    drawn = [set(column) for column in parents.T.tolist()]
    if np.isnan(fitness).sum() == 3:  # two of the three without fitness are replaced
        assert parents[0].tolist().count(2) == 3 and all(d <= p for d, p in zip(drawn, possible))
    else:
        assert drawn == possible


def test_the_ratio_begins_at_one_after_an_evolution(four, evolved):
    _, metrics = four[0](evolved[1])
    np.testing.assert_allclose(metrics["approx_kl"], 0, atol=1e-6)
    np.testing.assert_array_equal(metrics["clip_fraction"], 0)


def test_a_step_keeps_structure_shape_dtype_and_weak_type(ppo, key):
    many = evolving(ppo, every=1)
    state = jax.eval_shape(many.init, jax.random.split(key, 4))
    after, metrics = jax.eval_shape(many.step, state)
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert describe(after) == describe(state)
    assert isinstance(after, Population)
    assert {x.shape for x in metrics.values()} == {(4,)}
    assert {"parent", "learning_rate", "current_learning_rate", "entropy_coefficient"} <= set(metrics)


@pytest.fixture(scope="module")
def weeded():
    """A population of which half can hardly learn: PPO, first state, last state, metrics."""
    ppo = make_ppo(copy_cue(), replace(SMALL, num_steps=64, num_updates=24, num_minibatches=4, share_encoder=True))
    many = evolving(ppo, every=4)
    rates = Hyperparams(learning_rate=jnp.repeat(jnp.array([1e-6, 1e-2]), 4), learning_rate_annealing=0.0)
    state = jax.jit(many.init)(jax.random.split(jax.random.key(0), 8), rates)
    return ppo, state, *jax.jit(many.train)(state)


@pytest.fixture(scope="module")
def unweeded(weeded):
    """What becomes of the same runs as a plain batch."""
    ppo, state, *_ = weeded
    return jax.jit(batched(ppo).train)(state.runs)


def test_learning_rates_that_are_too_small_are_weeded_out(weeded, unweeded):
    last = unweeded[1]["episode_return"][:, -1]
    assert (last[:4] < 0.8).all() and (last[4:] > 0.9).all()
    _, _, state, metrics = weeded
    assert (metrics["episode_return"][:, -1] > 0.9).all()
    assert (state.runs.hyperparams.learning_rate > 1e-3).all()


def test_evolution_compares_the_episodes_since_the_last_one(weeded):
    """From the metrics of every update, counted anew on the host; every update has as many episodes."""
    metrics = {name: np.asarray(x, np.float64) for name, x in weeded[3].items()}
    for u in range(24):
        parent = metrics["parent"][:, u].astype(int)
        copied = parent != np.arange(8)
        fitness = metrics["episode_return"][:, max(u - 3, 0) : u + 1].mean(1)
        ascending = np.sort(fitness)
        if u % 4 < 3:
            assert not copied.any()
        else:
            lowest, highest = fitness < ascending[2] - 1e-5, fitness > ascending[-3] - 1e-5
            assert copied[lowest & (fitness < ascending[-2] - 1e-5)].all()
            assert (fitness[copied] < ascending[1] + 1e-5).all() and highest[parent[copied]].all()
            assert (fitness[parent] > fitness)[copied].all()
        if u + 1 < 24:
            moved = metrics["learning_rate"][:, u + 1] / metrics["learning_rate"][parent, u]
            np.testing.assert_allclose(moved[~copied], 1)
            assert np.isclose(moved[copied][:, None], [0.8, 1.25]).any(1).all()
    assert (metrics["parent"] != np.arange(8)[:, None]).sum() >= 6
    np.testing.assert_allclose(weeded[2].fitness, fitness[parent], rtol=1e-5)


def test_evolution_compares_fresh_episodes_if_asked(weeded):
    """They are what the runs would play as a batch; the fitness stays until the next evolution."""
    ppo, first, *_ = weeded
    many, plain_batch = evolving(ppo, every=2, evaluate=True), batched(ppo)
    step, plain_step = jax.jit(many.step), jax.jit(plain_batch.step)
    state, runs = first, first.runs
    assert (state.fitness == -jnp.inf).all()
    state, metrics = step(state)
    assert (metrics["num_episodes"] > 0).all() and (state.fitness == -jnp.inf).all()
    state, metrics = step(state)
    for _ in range(2):
        runs, _ = plain_step(runs)
    played = jax.jit(plain_batch.evaluate)(runs.key, runs.policy, runs.env_params).episode_return.mean(1)
    parent = np.asarray(metrics["parent"])
    assert (parent != np.arange(8)).any()
    np.testing.assert_allclose(state.fitness, played[parent], rtol=1e-6)
    after, _ = step(state)
    np.testing.assert_array_equal(after.fitness, state.fitness)


def test_chunked_equals_unchunked_to_the_bit(weeded):
    ppo, state, whole, metrics = weeded
    fitted = pjp.fit(evolving(ppo, every=4), state, updates_per_chunk=7, slice_size=8, progress=False)
    chex.assert_trees_all_equal(plain(fitted.state), plain(whole))
    assert fitted.metrics.sizes == {"run": 8, "updates": 24}
    for name, x in metrics.items():
        np.testing.assert_array_equal(fitted.metrics[name], x, err_msg=name)


def test_a_population_that_never_evolves_equals_its_batch_to_the_bit(weeded, unweeded):
    ppo, state, *_ = weeded
    state, metrics = jax.jit(evolving(ppo, every=25).train)(state)
    chex.assert_trees_all_equal(plain(state.runs), plain(unweeded[0]))
    np.testing.assert_array_equal(metrics["current_learning_rate"], unweeded[1]["learning_rate"])
    for name, x in unweeded[1].items():
        np.testing.assert_array_equal(metrics[name], x, err_msg=name)
    np.testing.assert_array_equal(metrics["parent"], np.repeat(np.arange(8)[:, None], 24, axis=1))


def test_fitness_is_a_mean_over_episodes_and_lasts_until_others_end():
    nan, unused = np.nan, cast(Any, None)
    state = Population(
        runs=unused, key=unused, fitness=jnp.array([nan, nan, 5.0, 5.0, 5.0]), num_episodes=jnp.array([0, 0, 0, 0, 3])
    )
    metrics = {
        "episode_return": jnp.array([nan, 7.0, nan, 7.0, 9.0]),
        "num_episodes": jnp.array([0, 2, 0, 2, 1]),
    }
    fitness, num_episodes = count_episodes(state, metrics)
    assert num_episodes.tolist() == [0, 2, 0, 2, 4]
    np.testing.assert_array_equal(fitness, [nan, 7, 5, 7, (3 * 5 + 9) / 4])


def test_a_frozen_run_goes_on_from_another(weeded):
    ppo, state, *_ = weeded
    policy = state.policy.replace(params=jax.tree.map(lambda x: x.at[5].set(jnp.nan), state.policy.params))
    state = state.replace(runs=state.runs.replace(policy=policy), fitness=state.fitness.at[:].set(0.0).at[5].set(99.0))
    step = jax.jit(evolving(ppo, every=2).step)
    state, metrics = step(state)
    assert state.num_updates.tolist() == [1, 1, 1, 1, 1, 0, 1, 1] and metrics["parent"].tolist() == list(range(8))
    state, metrics = step(state)
    assert metrics["parent"][5] != 5 and state.num_updates.tolist() == [2] * 8
    state, metrics = step(state)
    assert state.num_updates.tolist() == [3] * 8 and np.isfinite(metrics["loss"]).all()
    assert getattr(step, "_cache_size")() == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"every": 0}, "every=0 must be at least 1"),
        ({"every": 2.0}, "every=2.0 must be a whole number"),
        ({"explore": ("learning_rat",)}, "'learning_rat', which is not a hyperparameter .did you mean learning_rate"),
        ({"explore": "entropy"}, "'entropy'.*did you mean entropy_coefficient"),
        ({"fraction": 0.0}, r"fraction=0.0 must be a number in \(0, 0.5\]"),
        ({"fraction": 0.6}, r"fraction=0.6 must be a number in \(0, 0.5\]"),
        ({"explore": {"learning_rate": (1e-2, 1e-5)}}, r"'learning_rate': \(0.01, 1e-05\)} must ascend"),
        ({"explore": {"discount": (0.9, 1.1)}}, r"must ascend within \[0, 1\]"),
        ({"factors": (0.8, -1.25)}, "must be numbers above 0"),
        ({"factors": ()}, r"factors=\(\) must be numbers above 0"),
        ({"factors": "ab"}, r"factors='ab' must be numbers above 0, such as \(0.8, 1.25\)"),
        ({"factors": 1.25}, "factors=1.25 must be numbers above 0"),
        ({"fraction": "0.25"}, r"fraction='0.25' must be a number in \(0, 0.5\]"),
        ({"explore": 3}, r"explore=3 must be names of hyperparameters, such as \('learning_rate', 'clip'\)"),
        ({"explore": {"clip": ("0.1", "0.3")}}, r"explore={'clip': \('0.1', '0.3'\)} must be a pair of numbers"),
        ({"explore": "target_kl"}, "explore names 'target_kl', which has no effect while stop_on_kl=False"),
        ({"explore": {"clip": 0.1}}, r"explore={'clip': 0.1} must be a pair of numbers, \(lowest, highest\)"),
    ],
)
def test_what_no_population_can_do_is_refused_in_a_sentence(ppo, options, words):
    with pytest.raises(ValueError, match=words):
        evolving(ppo, **{"every": 1} | options)


def test_a_population_that_is_too_small_is_refused_with_what_would_do(ppo, key):
    many = evolving(ppo, every=1)
    with pytest.raises(ValueError, match="fraction=0.25 of 3 runs rounds down to 0.*try 4 runs, or fraction=0.34"):
        many.init(jax.random.split(key, 3))
    with pytest.raises(ValueError, match="of 1 runs rounds down to 0 runs to replace .try 2 runs."):
        evolving(ppo, every=1, fraction=0.5).init(key[None])
    assert jax.eval_shape(evolving(ppo, every=1, fraction=0.34).init, jax.random.split(key, 3)).fitness.shape == (3,)


def test_a_run_without_fitness_is_no_nan_under_debug_nans(key):
    """No episode has ended when the first evolution is due."""
    many = evolving(make_ppo(counter(30), replace(SMALL, num_updates=2)), every=1)
    with jax.debug_nans(True):
        state, metrics = jax.jit(many.step)(jax.jit(many.init)(jax.random.split(key, 4)))
        evolve(key, state.runs, state.fitness)  # not compiled, where the mode looks at every operation
    assert np.isneginf(state.fitness).all() and metrics["parent"].tolist() == [0, 1, 2, 3]


def test_a_schedule_is_not_explored(ppo, key):
    with pytest.raises(ValueError, match="learning_rate is a schedule"):
        evolving(ppo, every=1).init(jax.random.split(key, 4), Hyperparams(learning_rate=pjp.linear(1e-3, 0.0)))


@pytest.mark.slow
def test_a_population_on_two_devices_evolves_as_on_one():
    program = """if True:
        import jax, numpy as np
        import purejaxppo as pjp
        config = pjp.Config(num_envs=4, num_steps=32, num_updates=8, num_minibatches=2, widths=(8,))
        ppo = pjp.make_ppo("CartPole-v1", config)
        hyperparams = pjp.Hyperparams(learning_rate=np.array([1e-5, 1e-4, 1e-3, 1e-2], np.float32))
        found = []
        for devices in (None, 2):
            many = pjp.evolving(ppo, every=2, devices=devices)
            state = jax.jit(many.init)(jax.random.split(jax.random.key(0), 4), hyperparams)
            fitted = pjp.fit(many, state, updates_per_chunk=3, num_updates=5, progress=False)
            fitted = pjp.fit(many, fitted.state, updates_per_chunk=3, progress=False)
            found.append((fitted.metrics, fitted.state))
            print(len(fitted.state.num_updates.devices()))
        (one, _), (two, _) = found
        np.testing.assert_array_equal(one["parent"], two["parent"])
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-3)
        assert (one["parent"] != np.arange(4)[:, None]).sum() > 1
        try:
            jax.jit(many.init)(jax.random.split(jax.random.key(0), 5))
        except ValueError as error:
            print(error)
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "1", "2", "5 runs must be a multiple of the 2 devices that share them (try 6)",
    ]  # fmt: skip
