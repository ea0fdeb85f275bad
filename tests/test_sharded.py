import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as pjp
from probes import SMALL
from purejaxppo.collectives import gather_shards
from purejaxppo.loss import ppo_loss
from purejaxppo.normalize import measure, measure_observations, merge_observations, observation_moments, pool
from purejaxppo.summary import measure_rollout, summarize
from purejaxppo.update import adam, update

pytestmark = pytest.mark.full

over_shards = partial(jax.vmap, axis_name="envs")


def cut(tree, num_shards):
    """Leaves [T, N, ...] as [shards, T, N / shards, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], num_shards, -1, *x.shape[2:]), 1, 0), tree)


def assert_close(found, expected, **tolerance):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.fixture(scope="module")
def rollout():
    """PPO, state, rollout and the batch of one rollout of four environments."""
    from purejaxppo.advantages import estimate

    config = replace(SMALL, num_envs=4, num_steps=16, num_minibatches=1, num_epochs=1)
    ppo = pjp.make_ppo("CartPole-v1", config)
    state = jax.jit(ppo.init)(jax.random.key(0))
    state, rollout = ppo.collect(state)
    batch = estimate(
        state.policy, rollout, rollout.reward, state.actors.memory, state.hyperparams,
        network=ppo.network, config=config,
    )  # fmt: skip
    return ppo, state, rollout, batch


def test_a_minibatch_in_shards_makes_the_step_of_the_whole(rollout):
    ppo, state, _, batch = rollout

    def learn(key, batch, config, axis_name=()):
        loss = partial(ppo_loss, network=ppo.network, config=config)
        return update(
            key, state.policy.params, state.opt_state, batch, state.hyperparams,
            loss=loss, optimizer=adam, config=config, observation=state.policy.observation, axis_name=axis_name,
        )  # fmt: skip

    # One minibatch has all transitions in it, however they are shuffled.
    whole = learn(jax.random.key(2), batch, ppo.config)
    shards = over_shards(partial(learn, config=replace(ppo.config, num_envs=1), axis_name="envs"))
    found = shards(jax.random.split(jax.random.key(3), 4), cut(batch, 4))
    for shard in range(4):
        assert_close(jax.tree.map(lambda x: x[shard], found), whole, rtol=1e-4, atol=1e-6)


def test_a_summary_of_shards_is_that_of_the_whole(rollout):
    _, _, rollout, batch = rollout
    assert rollout.done.any()
    depth = jnp.arange(rollout.reward.size, dtype=jnp.float32).reshape(rollout.reward.shape)
    rollout = rollout.replace(key=None, metrics={"depth": depth}, episode_metrics={"last_depth": depth})

    def summary(*part, axis_name=()):
        return summarize(gather_shards(measure_rollout(*part), axis_name), part[0])

    found = over_shards(partial(summary, axis_name="envs"))(cut(rollout, 2), cut(batch, 2))
    expected = summary(rollout, batch)
    np.testing.assert_allclose(expected["depth"], depth.mean())
    np.testing.assert_allclose(expected["last_depth"], depth[rollout.done].mean())
    assert_close(jax.tree.map(lambda x: x[1], found), expected, rtol=1e-4)


def test_moments_of_shards_are_those_of_the_whole(key):
    values = 100 + 3 * jax.random.normal(key, (4, 32, 5))
    found = over_shards(lambda x: pool(gather_shards(measure(x, (0,)), "envs")))(values)
    assert found.count[2] == 128
    np.testing.assert_allclose(found.mean[2], np.mean(values, (0, 1)), rtol=1e-6)
    np.testing.assert_allclose(found.variance[2], np.var(values, (0, 1)), rtol=1e-4)


def test_observations_that_shards_saw_count_as_if_one_had_seen_them_all(key):
    place = [5 + 2 * x for x in jax.random.normal(key, (2, 4, 6, 2, 3))]  # two rollouts of 4 shards, [T, N, 3]
    kind = jnp.zeros((4, 6, 2), jnp.int32)
    moments = observation_moments({"place": place[0][0, 0, 0], "kind": kind[0, 0, 0], "flag": jnp.bool_(True)})

    def count_in(moments, obs):
        return merge_observations(moments, gather_shards(measure_observations(moments, obs), "envs"))

    for x in place:
        obs = {"place": x, "kind": kind, "flag": x[..., 0] > 5}
        moments = jax.tree.map(lambda x: x[3], over_shards(partial(count_in, moments))(obs))
    assert moments["kind"] is moments["flag"] is None and moments["place"].count == 2 * 4 * 6 * 2
    np.testing.assert_allclose(moments["place"].mean, np.mean(place, (0, 1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(moments["place"].variance, np.var(place, (0, 1, 2, 3)), rtol=1e-4)


def test_shards_wait_for_each_other_once_a_minibatch_and_three_times_a_cycle():
    """For what rewards, advantages, and last observations with the metrics are; a message costs more than a kernel."""
    config = replace(SMALL, normalize_observation=True, scale_reward=True)
    ppo = pjp.sharded(pjp.make_ppo("CartPole-v1", config), devices=1)
    program = jax.jit(ppo.step).lower(jax.eval_shape(ppo.init, jax.random.key(0), pjp.Hyperparams())).as_text()
    assert program.count("stablehlo.all_gather") == 3 and program.count("stablehlo.all_reduce") == 1


FOUR_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
import purejaxppo as pjp
from functools import partial
from dataclasses import replace
from purejaxppo.ppo import bind_ppo

config = pjp.Config(num_envs=8, num_steps=16, num_updates=3, num_minibatches=4, widths=(8,), normalize_observation=True,
                    scale_reward=True, bound_action="tanh")
plain = pjp.make_ppo("Pendulum-v1", config)
ppo = pjp.sharded(plain)
start = jax.jit(ppo.init)(jax.random.key(0))
assert start.actors.obs.sharding.spec == jax.sharding.PartitionSpec("envs")
state, metrics = jax.jit(ppo.train)(start)
assert metrics["loss"].shape == (3,) and state.actors.obs.shape == (8, 3) and state.num_updates == 3

# Every device holds the same policy, to the bit.
for x in jax.tree.leaves((state.policy, state.opt_state)):
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(shard.data, x.addressable_shards[0].data)

# The shards as lanes of one device.
alone = plain.init(jax.random.key(0))
actors = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), alone.actors)
lanes = jax.tree.map(lambda _: None, alone).replace(actors=jax.tree.map(lambda _: 0, actors))
shard = bind_ppo(plain.env, plain.network, replace(config, num_envs=2), plain.loss, plain.optimizer, "envs")
expected, _ = jax.jit(jax.vmap(shard.train, in_axes=(lanes,), axis_name="envs"))(alone.replace(actors=actors))
for x, y in zip(jax.tree.leaves(state.policy), jax.tree.leaves(expected.policy), strict=True):
    np.testing.assert_allclose(x, y[0], rtol=1e-3, atol=1e-5)

# Chunks of a batch of such runs, and playing the result.
many = pjp.batched(ppo)
for num_seeds in (1, 2):
    keys, hyperparams = pjp.runs(jax.random.key(1), num_seeds=num_seeds)
    fit = pjp.fit(many, jax.jit(many.init)(keys, hyperparams), updates_per_chunk=1, progress=False)
    assert np.isfinite(fit.metrics.loss).all() and fit.metrics.sizes == {"run": num_seeds, "updates": 3}
    assert fit.state.actors.obs.sharding.spec == jax.sharding.PartitionSpec(None, "envs")
played = jax.jit(partial(plain.evaluate, num_episodes=2))(jax.random.key(2), jax.device_get(state.policy))
assert np.isfinite(played.episode_return).all()
print("done")
"""


@pytest.mark.slow
def test_a_run_on_four_devices_is_the_run_of_its_shards():
    done = subprocess.run([sys.executable, "-c", FOUR_DEVICES], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_what_cannot_be_shared_out_is_refused_in_a_sentence():
    program = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
import purejaxppo as pjp

def refusal(devices, **config):
    try:
        pjp.sharded(pjp.make_ppo("CartPole-v1", pjp.Config(**config)), devices)
    except ValueError as error:
        print(error)

refusal(2, num_envs=3)
refusal(2, num_envs=4, num_steps=2, num_minibatches=8, normalize_advantage="off")
for devices in (0, 3, [], "ab", jax.devices()[:1] * 2):
    refusal(devices)
plain = pjp.make_ppo("CartPole-v1")
ppo = pjp.sharded(plain)
keys = jax.random.split(jax.random.key(0))
for call in (
    lambda: pjp.sharded(ppo),
    lambda: pjp.sharded(pjp.batched(plain)).init(keys),
    lambda: pjp.compile_training(ppo, plain.init(keys[0])),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    expected = (
        "num_envs=3 must be a multiple of the 2 devices that share them (try 4)",
        "on each of 2 devices: num_minibatches=8 must divide the 4 transitions",
        "devices=0 must be from 1 to the 2",
        "devices=3 must be from 1 to the 2",
        *["must be a number, or a list of different devices"] * 3,
        "this PPO is sharded already, over 2 devices",
        "sharded takes the PPO of one run",
        "the state must lie on the 2 devices that share the run, not on 1",
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), done.stderr
    for line, words in zip(lines, expected):
        assert words in line
    if jax.device_count() == 1:
        with pytest.raises(ValueError, match="there is one device"):
            pjp.sharded(pjp.make_ppo("CartPole-v1"))


def test_a_state_without_the_axis_of_runs_is_refused_by_a_batch(key):
    ppo = pjp.make_ppo("CartPole-v1", SMALL)
    with pytest.raises(ValueError, match="needs states with a leading axis R"):
        jax.eval_shape(pjp.batched(ppo).step, jax.eval_shape(ppo.init, key))


@pytest.mark.parametrize("settings", [{"num_envs": 2}, {"num_envs": 4, "resets_per_step": 3}])
def test_a_run_whose_start_states_wait_is_sharded(settings):
    """Also where every shard draws as many as it has environments."""
    ppo = pjp.make_ppo("Breakout-MinAtar", replace(SMALL, stagger=6, **settings))
    over = pjp.sharded(ppo, devices=1)
    state = over.init(jax.random.key(0))
    assert state.actors.pool != ()
    after, metrics = jax.jit(over.step)(state)
    assert np.isfinite(metrics["loss"])
    assert jax.tree.map(jnp.shape, after.actors.pool) == jax.tree.map(jnp.shape, state.actors.pool)
