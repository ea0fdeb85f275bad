"""The seams of a cycle: `collect`, `learn`, `with_step`, states with more fields, metrics of environment and loss."""

import inspect
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as pjp
from probes import SMALL, constant_reward, copy_cue, counter
from purejaxppo.evaluate import evaluate
from purejaxppo.experiment.runs.saved import SavedRun
from purejaxppo.update import update

FAST = pjp.Hyperparams(learning_rate=1e-2)
NORMALIZED = replace(SMALL, normalize_observation=True, scale_reward=True)
RECURRENT = replace(NORMALIZED, memory="gru", memory_width=4, segment_length=4, normalize_advantage="batch")


def collected(ppo, key, hyperparams=FAST):
    """A state after its first rollout, and the rollout."""
    return jax.jit(lambda key: ppo.collect(ppo.init(key, hyperparams)))(key)


def assert_same(a, b):
    """Equal leaves, to the bit; keys by their data."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


class Counting(pjp.TrainState):
    """A state with a field of its own: the rewards that were learned from, and how often."""

    total: jax.Array
    calls: jax.Array


def counting(ppo, bonus=1.0):
    """Pays a bonus in every step, and counts."""

    def init(ppo, key, *args):
        return Counting(**vars(ppo.init(key, *args)), total=jnp.float32(0), calls=jnp.int32(0))

    def step(ppo, state):
        state, rollout = ppo.collect(state)
        rollout = rollout.replace(reward=rollout.reward + bonus)
        return ppo.learn(state.replace(total=state.total + rollout.reward.sum(), calls=state.calls + 1), rollout)

    return pjp.with_step(ppo, step, init)


@pytest.mark.parametrize("config", [SMALL, pytest.param(RECURRENT, marks=pytest.mark.full)])
def test_a_step_is_learning_from_what_was_collected_to_the_bit(config, key):
    ppo = pjp.make_ppo("CartPole-v1", config)
    state = jax.jit(ppo.init)(key)
    halves = jax.jit(lambda state: ppo.learn(*ppo.collect(state)))
    assert_same(halves(state), jax.jit(ppo.step)(state))


@pytest.mark.full
def test_the_halves_of_a_step_are_programs_of_their_own(key):
    """Compiled apart, for a population, and so for the batch of runs in it: to rounding."""
    ppo = pjp.evolving(pjp.make_ppo(copy_cue(), NORMALIZED), every=1)
    state = jax.jit(ppo.init)(jax.random.split(key, 4), FAST)
    whole, metrics = jax.jit(ppo.step)(state)
    collect = jax.jit(ppo.collect)
    after, rollout = collect(state)
    halves, others = jax.jit(ppo.learn)(after, rollout)
    chex.assert_trees_all_close(whole.policy, halves.policy, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(metrics["parent"], others["parent"])
    assert metrics.keys() == others.keys()
    _, second = collect(after)  # without learning in between it draws other numbers
    assert (rollout.key != second.key).all() and (rollout.action != second.action).any()


def test_what_is_learned_follows_the_reward_that_is_given_and_what_is_reported_does_not(key):
    """Reward 1 per episode of one step, tripled: returns of 3 to learn from, 1 to report."""
    ppo = pjp.make_ppo(constant_reward(), replace(SMALL, scale_reward=True, num_minibatches=1, num_epochs=1))
    state, rollout = collected(ppo, key)
    odd = jnp.arange(rollout.reward.size).reshape(rollout.reward.shape) % 2
    learn = jax.jit(ppo.learn)
    _, plain = learn(state, rollout)
    after, metrics = learn(state, rollout.replace(reward=1 + 2.0 * odd))
    np.testing.assert_allclose(after.policy.reward.variance, 1, rtol=1e-5)  # of returns that are 1 and 3
    assert metrics["episode_return"] == plain["episode_return"] == 1
    assert metrics["num_episodes"] == plain["num_episodes"] == 32
    assert metrics["value_loss"] != plain["value_loss"]


def test_flags_that_are_changed_change_what_is_learned_and_not_the_episodes_that_are_reported(key):
    """A task without ends, made of one with ends of three steps: the discounted return runs through."""
    ppo = pjp.make_ppo(counter(3, truncate=False), replace(SMALL, scale_reward=True))
    state, rollout = collected(ppo, key, pjp.Hyperparams(discount=1.0))
    endless = rollout.replace(terminated=jnp.zeros_like(rollout.terminated), reward=jnp.ones_like(rollout.reward))
    after, metrics = jax.jit(ppo.learn)(state, endless)
    np.testing.assert_array_equal(after.actors.discounted_return, 8)
    assert metrics["num_episodes"] == 8 and metrics["episode_return"] == 6 and metrics["episode_length"] == 3


def test_a_changed_observation_is_what_the_loss_sees(key):
    def spy(params, minibatch, hyperparams, *, network, config):
        loss, report = pjp.ppo_loss(params, minibatch, hyperparams, network=network, config=config)
        seen = {"obs": minibatch.obs, "next_obs": minibatch.next_obs, "reward": minibatch.reward}
        flags = {"terminated": minibatch.terminated * 1.0, "truncated": minibatch.truncated * 1.0}
        return loss, report | {f"mean_{name}": x.mean() for name, x in (seen | flags).items()}

    ppo = pjp.make_ppo(counter(4), SMALL, loss=spy)
    state, rollout = collected(ppo, key)
    _, metrics = jax.jit(ppo.learn)(state, rollout.replace(obs=rollout.obs * 0 + 7, next_obs=rollout.next_obs * 0 + 9))
    np.testing.assert_allclose([metrics["mean_obs"], metrics["mean_next_obs"]], [7, 9])
    np.testing.assert_allclose(metrics["mean_reward"], 2.5)  # 1 2 3 4
    np.testing.assert_allclose([metrics["mean_terminated"], metrics["mean_truncated"]], [0, 0.25])


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_old_distribution_of_a_minibatch_gave_its_log_probabilities(env, key):
    def loss(params, minibatch, hyperparams, *, network, config):
        total, report = pjp.ppo_loss(params, minibatch, hyperparams, network=network, config=config)
        gap = minibatch.distribution.log_prob(minibatch.action) - minibatch.log_prob
        return total, report | {"gap": jnp.abs(gap).max()}

    config = replace(SMALL, bound_action="tanh" if env == "Pendulum-v1" else "clip")
    ppo = pjp.make_ppo(env, config, loss=loss)
    _, metrics = jax.jit(lambda key: ppo.step(ppo.init(key)))(key)
    assert metrics["gap"] < 1e-5


def test_a_loss_that_asks_for_a_key_has_another_for_every_minibatch(key):
    def noisy(params, minibatch, hyperparams, *, network, config, key):
        loss, report = pjp.ppo_loss(params, minibatch, hyperparams, network=network, config=config)
        drawn = jax.random.uniform(key)
        return loss, report | {"drawn": drawn, "square": drawn**2}

    config = replace(SMALL, num_epochs=16)
    ppo = pjp.make_ppo("CartPole-v1", config, loss=noisy)
    start, step = jax.jit(ppo.init)(key), jax.jit(ppo.step)
    state, metrics = step(start)
    assert abs(metrics["square"] - metrics["drawn"] ** 2 - 1 / 12) < 0.04  # the variance of 32 uniform numbers
    assert step(state)[1]["drawn"] != metrics["drawn"]
    assert_same(jax.jit(pjp.make_ppo("CartPole-v1", config).step)(start)[0], state)


@pytest.mark.full
def test_a_custom_step_is_trained_as_any_other(key):
    """Also around another custom step, and in a batch of runs."""
    ppo = counting(pjp.make_ppo(constant_reward(), SMALL))
    again = pjp.with_step(ppo, lambda ppo, state: ppo.step(state.replace(total=state.total + 1000)))
    state, metrics = jax.jit(lambda key: again.train(again.init(key)))(key)
    assert (state.calls, state.total) == (3, 3 * (1000 + 64)) and metrics["loss"].shape == (3,)
    many = pjp.batched(ppo)
    state, metrics = jax.jit(lambda keys: many.train(many.init(keys)))(jax.random.split(key, 2))
    np.testing.assert_array_equal(state.total, [192] * 2)
    assert metrics["loss"].shape == (2, 3) and type(state[0]) is Counting


@pytest.mark.full
@pytest.mark.parametrize(
    "step, words",
    [
        (
            lambda ppo, state: ppo.step(state)[0],
            r"step must return \(state, metrics\), as ppo.step does, not TrainState",
        ),
        (lambda ppo, state: (state, {"loss": 0.0}), "metrics of a step must hold episode_return"),
        (lambda ppo, state: ppo.step(state)[::-1], "step must return .* not tuple"),
        (
            lambda ppo, state: (state.policy, {}),
            "step must return a TrainState with the structure .* not another Policy",
        ),
        (lambda ppo, state: (state, ppo.step(state)[1] | {"updates": 0.0}), "metric 'updates' of shape"),
        (lambda ppo, state: (state.replace(num_updates=0.5), {}), "step changed state.num_updates from int32"),
        (lambda ppo, state: (state, ppo.step(state)[1] | {"a/b": 0.0}), "metric 'a/b' of shape"),
        (lambda ppo, state: (state, ppo.step(state)[1] | {"m": np.ones((2, 2))}), "metric 'm' of shape"),
    ],
)
def test_a_step_that_returns_something_else_is_refused_in_a_sentence(step, words, key):
    ppo = pjp.with_step(pjp.make_ppo(copy_cue(), SMALL), step)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(ppo.step, jax.eval_shape(ppo.init, key))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: {"reward": r.reward[..., None]}, r"rollout.reward has shape \(8, 4, 1\), but must be \[T, N\]"),
        (lambda r: {"reward": r.reward[0]}, r"rollout.reward has shape \(4,\), but must be \[T, N\]"),
        (lambda r: {"metrics": {"a": r.obs}}, r"rollout.metrics\['a'\] has shape"),
        (lambda r: {"obs": r.obs[:4]}, r"rollout.obs has shape \(4, 4, 2\), but must be \[T, N, ...\]"),
    ],
)
def test_a_rollout_of_another_shape_is_refused_in_a_sentence(change, words, key):
    ppo = pjp.make_ppo(copy_cue(), SMALL)
    state, rollout = jax.eval_shape(lambda key: ppo.collect(ppo.init(key)), key)

    def learn(state, rollout):
        return ppo.learn(state, rollout.replace(**change(rollout)))

    with pytest.raises(ValueError, match=words):
        jax.eval_shape(learn, state, rollout)
    with pytest.raises(ValueError, match="learn takes .state, rollout., both from collect, not a TrainState"):
        jax.eval_shape(ppo.learn, rollout, state)


def test_a_scheduled_coefficient_is_a_number_in_a_step(key):
    def step(ppo, state):
        beta = state.hyperparams.at(state.num_updates, ppo.config).extra["beta"]
        state, metrics = ppo.step(state)
        return state, metrics | {"beta": beta}

    ppo, hyperparams = (
        pjp.with_step(pjp.make_ppo(copy_cue(), SMALL), step),
        replace(FAST, extra={"beta": pjp.linear(3, 0)}),
    )
    _, metrics = jax.jit(lambda key: ppo.train(ppo.init(key, hyperparams)))(key)
    np.testing.assert_allclose(metrics["beta"], [3, 2, 1], rtol=1e-5)


def test_only_whole_steps_freeze_a_run_a_custom_one_included(key):
    """Of two runs one learns from rewards that are infinite."""

    def poison(ppo, state):
        state, rollout = ppo.collect(state)
        infinite = jnp.where(state.hyperparams.extra["poison"] > 0, jnp.inf, 0).reshape(-1, 1, 1)
        reward = rollout.reward + infinite if rollout.reward.ndim == 3 else rollout.reward + infinite[0]
        return ppo.learn(state, rollout.replace(reward=reward))

    ppo = pjp.make_ppo("CartPole-v1", SMALL)
    keys, hyperparams = jax.random.split(key, 2), replace(FAST, extra={"poison": jnp.array([0.0, 1.0])})
    start = jax.jit(pjp.batched(ppo).init)(keys, hyperparams)
    for many in (pjp.batched(pjp.with_step(ppo, poison)), pjp.with_step(pjp.batched(ppo), poison)):
        state, metrics = jax.jit(many.train)(start)
        assert state.num_updates.tolist() == [3, 0] and np.isnan(metrics["loss"]).all(1).tolist() == [False, True]
        assert_same(state[1], start[1])
        failed = pjp.fit(many, start, num_updates=2, progress=False).failed()
        assert [text[:57] for text in failed] == ["run 1 turned nan in update 1, where loss was not finite, "]
    state, _ = jax.jit(partial(poison, pjp.batched(ppo)))(start)
    assert state.num_updates.tolist() == [1, 1]


@pytest.mark.full
def test_a_copy_in_a_population_takes_over_the_fields_of_a_subclass(key):
    ppo = counting(pjp.make_ppo(copy_cue(), SMALL))
    many = pjp.evolving(ppo, every=1, fraction=0.5)
    state = jax.jit(many.init)(jax.random.split(key, 4), FAST)
    marks = jnp.array([1000.0, 2000, 3000, 4000])
    after, metrics = jax.jit(many.step)(state.replace(runs=state.runs.replace(total=marks)))
    assert (metrics["parent"] != jnp.arange(4)).any()
    np.testing.assert_array_equal(after.runs.total // 1000, 1 + metrics["parent"])


@pytest.mark.full
def test_a_step_for_a_whole_population_evolves_and_freezes_it(key):
    population = pjp.evolving(pjp.make_ppo(copy_cue(), SMALL), every=1, fraction=0.5)

    def step(ppo, state):
        state, rollout = ppo.collect(state)
        return ppo.learn(state, rollout.replace(reward=rollout.reward.at[0].set(jnp.nan)))

    own = pjp.with_step(population, step)
    state, one = jax.jit(own.init)(jax.random.split(key, 4), FAST), jax.jit(own.step)
    for i in range(3):
        before = state.num_updates[0]
        state, metrics = one(state)
        parent = np.asarray(metrics["parent"])
        assert (parent[1:] != 0).all() and np.isnan(metrics["loss"][0])  # nobody goes on from the run that failed
        assert (state.num_updates[1:] == i + 1).all() and np.isfinite(metrics["loss"][1:]).all()
        assert state.num_updates[0] == (i + 1 if parent[0] else before)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.policy))


SHARDED = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
import sys
sys.path[:0] = {paths}
import numpy as np
import purejaxppo as pjp
from dataclasses import replace
from test_cycle import NORMALIZED, assert_same, counting
from test_extension import FAST, make_rnd

def check_copies(tree):
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, x.addressable_shards[0].data)

# A custom step that is the plain one gives the numbers of the plain one, to the bit.
plain = pjp.sharded(pjp.make_ppo("CartPole-v1", NORMALIZED))
own = pjp.with_step(plain, lambda ppo, state: ppo.learn(*ppo.collect(state)))
start = jax.jit(plain.init)(jax.random.key(0))
assert_same(jax.jit(own.step)(start), jax.jit(plain.step)(start))

# Both orders, with what is learned besides: the same everywhere, and from the whole rollout.
rnd = make_rnd(replace(NORMALIZED, num_updates=3))
base, step, init = rnd.custom
hyperparams = replace(FAST, extra={{"curiosity": 1.0}})
one, other = pjp.sharded(rnd), pjp.with_step(pjp.sharded(base), step, init)
ends = [jax.jit(ppo.train)(jax.jit(ppo.init)(jax.random.key(1), hyperparams)) for ppo in (one, other)]
assert_same(*ends)
state, metrics = ends[0]
check_copies((state.policy, state.opt_state, state.rnd))
assert state.actors.obs.sharding.spec[0] == "envs" and np.isfinite(metrics["loss"]).all()
start = jax.jit(one.init)(jax.random.key(1), hyperparams)
after, _ = jax.jit(one.step)(start)
alone, rollout = jax.device_get(jax.jit(one.collect)(start))
given = rnd.custom[0]._replace(collect=lambda state: (alone, rollout), learn=lambda state, rollout: (state, {{}}))
expected, _ = step(given, alone)
for x, y in zip(jax.tree.leaves(after.rnd), jax.tree.leaves(expected.rnd), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)

# Batches of such runs, and the host loop.
many = pjp.batched(one)
keys, hyperparams = pjp.runs(jax.random.key(1), num_seeds=2, hyperparams=hyperparams)
fit = pjp.fit(many, jax.jit(many.init)(keys, hyperparams), progress=False)
assert np.isfinite(fit.metrics.loss).all() and fit.metrics.bonus.shape == (2, 3)
print("done")
"""


@pytest.mark.slow
def test_a_custom_step_over_two_devices_is_that_step_in_either_order():
    program = SHARDED.format(paths=[p for p in sys.path if p])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.full
def test_a_state_with_more_fields_is_kept_and_resumed_to_the_bit(tmp_path, key):
    ppo = counting(pjp.make_ppo("CartPole-v1", replace(SMALL, num_updates=6)))
    state = jax.jit(ppo.init)(key, replace(FAST, extra={"beta": 0.5}))
    whole = pjp.fit(ppo, state, updates_per_chunk=6, progress=False)
    part = pjp.fit(ppo, state, num_updates=2, progress=False, folder=tmp_path)
    assert part.state.calls == 2
    resumed = pjp.fit(ppo, state, updates_per_chunk=6, progress=False, folder=tmp_path)
    assert_same(resumed.state, whole.state)
    assert resumed.state.calls == 6 and type(resumed.state) is Counting
    saved = pjp.load(tmp_path, ppo)
    assert isinstance(saved, SavedRun) and saved.hyperparams.extra == {"beta": 0.5}


def reporting(names, episode_names=()):
    """CartPole that reports its time, under some names."""
    base = pjp.make_env("CartPole-v1")

    def step(key, state, action, params):
        result = base.step(key, state, action, params)
        time = result.state.time
        return result._replace(
            metrics=dict.fromkeys(names, time), episode_metrics=dict.fromkeys(episode_names, time * 2)
        )

    return base._replace(step=step)


def test_numbers_of_the_environment_are_means_over_steps_and_over_episodes_that_ended(key):
    ppo = pjp.make_ppo(reporting(["time"], ["twice"]), replace(SMALL, num_steps=64))
    state, rollout = collected(ppo, key)
    _, metrics = jax.jit(ppo.learn)(state, rollout)
    np.testing.assert_allclose(metrics["time"], np.mean(rollout.metrics["time"]), rtol=1e-6)
    np.testing.assert_allclose(metrics["twice"], 2 * metrics["episode_length"], rtol=1e-6)
    assert rollout.metrics["time"].shape == (64, 4)


def test_numbers_that_gymnax_reports_join_the_metrics(key):
    import gymnax

    class Telling(type(gymnax.make("CartPole-v1")[0])):
        def step_env(self, key, state, action, params):
            obs, state, reward, done, info = super().step_env(key, state, action, params)
            return obs, state, reward, done, info | {"lean": jnp.abs(obs[2]), "vector": obs, "key": key}

    ppo = pjp.make_ppo(Telling(), SMALL)
    _, rollout = collected(ppo, key)
    np.testing.assert_allclose(rollout.metrics["info_lean"], jnp.abs(rollout.next_obs[..., 2]))
    assert rollout.metrics.keys() == {"info_lean"}


@pytest.mark.parametrize(
    "env, report, words",
    [
        (reporting(["loss"]), {}, "reports of the loss hold 'loss', a name that is taken"),
        (reporting(["episode_return"]), {}, "metrics of the environment hold 'episode_return'"),
        (reporting(["a"], ["a"]), {}, "episode_metrics of the environment hold 'a'"),
        (reporting([]), {"learning_rate": 0.0}, "reports of the loss hold 'learning_rate'"),
        (reporting([]), {"updates": 0.0}, "reports of the loss hold 'updates'"),
        (reporting(["learning_rate"]), {}, "metrics of the environment hold 'learning_rate'"),
        (reporting([]), {"a/b": 0.0}, "reports of the loss hold 'a/b'"),
        (
            reporting([]),
            {"matrix": np.zeros((2, 2))},
            r"reports matrix of shape \(2, 2\); it must be a scalar or a vec",
        ),
    ],
)
def test_a_name_that_is_taken_and_a_shape_that_cannot_be_are_refused_at_tracing(env, report, words, key):
    def loss(*args, **kwargs):
        total, own = pjp.ppo_loss(*args, **kwargs)
        return total, own | report

    ppo = pjp.make_ppo(env, SMALL, loss=loss)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(ppo.step, jax.eval_shape(ppo.init, key))


@pytest.mark.parametrize("name, value", [("vector", jnp.zeros(2)), ("a/b", jnp.zeros(()))])
def test_metrics_of_an_environment_that_cannot_be_are_named(name, value):
    base = pjp.make_env("CartPole-v1")
    env = base._replace(step=lambda *args: base.step(*args)._replace(metrics={name: value}))
    assert f"metric {name!r}" in pjp.check_env(env)[0]
    with pytest.raises(ValueError, match=f"metric {name!r}"):
        pjp.make_ppo(env, SMALL)


def with_vector(*args, **kwargs):
    loss, report = pjp.ppo_loss(*args, **kwargs)
    return loss, report | {"parts": jnp.stack([report["policy_loss"], report["value_loss"], report["entropy"]])}


@pytest.mark.full
def test_a_vector_of_a_loss_has_a_dimension_of_its_own(tmp_path, key):
    ppo = pjp.make_ppo("CartPole-v1", SMALL, loss=with_vector)
    start = jax.jit(ppo.init)(key)
    state, metrics = jax.jit(ppo.train)(start)
    assert metrics["parts"].shape == (3, 3)
    np.testing.assert_allclose(metrics["parts"][:, 1], metrics["value_loss"], rtol=1e-6)
    fit = pjp.fit(ppo, start, updates_per_chunk=2, progress=False, folder=tmp_path)
    assert fit.metrics["parts"].dims == ("updates", "parts_index")
    np.testing.assert_array_equal(fit.metrics["parts"], metrics["parts"])
    many = pjp.batched(ppo)
    start = jax.jit(many.init)(jax.random.split(key, 5))
    fit = pjp.fit(many, start, slice_size=2, updates_per_chunk=2, progress=False)
    assert fit.metrics["parts"].dims == ("run", "updates", "parts_index") and fit.metrics["parts"].shape == (5, 3, 3)
    np.testing.assert_allclose(fit.metrics["parts"][..., 2], fit.metrics["entropy"], rtol=1e-6)


def test_every_function_of_a_ppo_says_what_it_is():
    ppo = pjp.make_ppo("CartPole-v1", SMALL)
    rnd = counting(ppo)
    for one in (ppo, rnd, pjp.batched(ppo), pjp.sharded(ppo, 1), pjp.evolving(ppo, every=1), pjp.batched(rnd)):
        for name in ("init", "collect", "learn", "step", "train", "evaluate", "act"):
            function = getattr(one, name)
            assert function.__name__ == name and len(function.__doc__) > 40
            names = list(inspect.signature(function).parameters)
            assert not {"env", "network", "config", "axis_name", "args", "kwargs"} & set(names)
        assert list(inspect.signature(one.evaluate).parameters)[-1] == "max_steps"
        assert list(inspect.signature(one.learn).parameters) == ["state", "rollout"]
    assert inspect.signature(ppo.evaluate).parameters["num_episodes"].default == 128
    assert ppo.evaluate.__doc__ == evaluate.__doc__


def test_a_ppo_prints_in_five_lines():
    lines = repr(counting(pjp.make_ppo("CartPole-v1", SMALL))).splitlines()
    assert len(lines) == 5 and "CartPole-v1" in lines[0] and "loss ppo_loss, optimizer adam, step step" in lines[2]


@pytest.mark.full
def test_what_no_loss_reads_is_not_in_the_compiled_program(key):
    """A minibatch with what only custom losses read compiles to the program of one without it."""
    ppo = pjp.make_ppo("CartPole-v1", SMALL)
    state, rollout = collected(ppo, key)
    sizes = []
    for names in ((), ("distribution", "reward", "next_obs", "terminated", "truncated")):
        batch = _batch_of(ppo, state, rollout)
        kept = {n: x for n, x in vars(batch).items() if n not in UNREAD or n in names}
        learn = partial(
            update,
            loss=partial(pjp.ppo_loss, network=ppo.network, config=SMALL),
            optimizer=pjp.adam,
            config=SMALL,
            observation=(),
        )
        compiled = jax.jit(learn).lower(key, state.policy.params, state.opt_state, pjp.Batch(**kept), state.hyperparams)
        text = compiled.compile().as_text()
        assert text is not None
        sizes.append(sum(" = " in line and "parameter(" not in line for line in text.splitlines()))
    assert sizes[0] == sizes[1]


UNREAD = ("distribution", "reward", "next_obs", "terminated", "truncated")


def _batch_of(ppo: Any, state, rollout) -> pjp.Batch:
    from purejaxppo.advantages import estimate

    parts = {"network": ppo.network, "config": ppo.config}
    return estimate(state.policy, rollout, rollout.reward, state.actors.memory, state.hyperparams, **parts)
