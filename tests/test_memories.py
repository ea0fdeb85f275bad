"""Memories: their cells against flax's and a plain loop, what resets them, and what they learn."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as pjp
from probes import SMALL, counter, recall_cue
from purejaxppo.envs.memory_inputs import with_memory_inputs
from purejaxppo.experiment.identity import identify_ppo
from purejaxppo.networks.memories import MEMORIES, in_parallel, in_sequence, linear_recurrence
from purejaxppo.networks.orthogonal import orthogonalize

FIRST = jnp.zeros((7, 2), bool).at[0, 0].set(True).at[3, 1].set(True).at[4, 1].set(True)


def sequence(kind, key):
    """A memory module of width 5, its parameters, a full memory, and features [7, 2, 4]."""
    module, features = MEMORIES[kind](5), jax.random.normal(key, (7, 2, 4))
    memory = jax.tree.map(lambda x: x + 0.5, module.empty(2))
    return module, orthogonalize(key, module.init(key, memory, features, FIRST)), memory, features


FLAX = {
    "gru": (nn.GRUCell(5), {"reset": "r", "update": "z", "candidate": "n"}),
    "lstm": (nn.LSTMCell(5), {"write": "i", "forget": "f", "candidate": "g", "read": "o"}),
}


@pytest.mark.parametrize("kind, biased", [("gru", "i"), ("lstm", "h")])
def test_a_cell_is_that_of_flax(kind, biased, key):
    module, params, memory, features = sequence(kind, key)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.arange(x.size).reshape(x.shape) / x.size, params)
    ours, (cell, gates) = params["params"], FLAX[kind]
    theirs = {f"i{gate}": {"kernel": ours[f"given_{name}"]} for name, gate in gates.items()}
    theirs |= {f"h{gate}": {"kernel": ours[f"recalled_{name}"]} for name, gate in gates.items()}
    for gate, bias in zip(gates.values(), jnp.split(ours["bias"], len(gates))):
        theirs[biased + gate]["bias"] = bias
    if kind == "gru":
        theirs["hn"]["bias"] = ours["recalled_candidate_bias"]
    after, outputs = module.apply(params, memory, features, FIRST)
    for x, first, output in zip(features, FIRST, outputs):
        memory = jax.tree.map(lambda x: jnp.where(first[:, None], 0, x), memory)
        memory, expected = cell.apply({"params": theirs}, memory, x)
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), after, memory)


def test_a_mingru_is_its_formula(key):
    module, params, memory, features = sequence("mingru", key)
    weight, bias = (np.asarray(params["params"]["gate_and_candidate"][name]) for name in ("weight", "bias"))
    after, outputs = module.apply(params, memory, features, FIRST)
    hidden = np.array(memory)
    for x, first, output in zip(np.asarray(features), np.asarray(FIRST), outputs):
        gate, candidate = np.split(x @ weight.T + bias, 2, axis=-1)
        gate = 1 / (1 + np.exp(-gate))
        hidden[first] = 0
        hidden = (1 - gate) * hidden + gate * candidate
        np.testing.assert_allclose(output, hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after, hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_step_that_begins_an_episode_starts_afresh_even_from_nan(kind, key):
    module, params, memory, features = sequence(kind, key)

    def episode(params, memory, features, first):
        _, outputs = module.apply(params, memory, features, first)
        return (outputs[3:, 1] ** 2).sum(), outputs

    gradient = jax.jit(jax.value_and_grad(episode, argnums=(0, 2), has_aux=True))
    lost = jax.tree.map(lambda x: x.at[1].set(jnp.nan), memory)
    lost_features = features.at[:3, 1].set(jnp.nan)
    (_, outputs), (of_params, of_features) = gradient(params, lost, features, FIRST.at[0].set(True))
    (_, expected), _ = gradient(params, module.empty(2), features, FIRST.at[0].set(True))
    np.testing.assert_array_equal(outputs, expected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(of_params))
    np.testing.assert_array_equal(of_features[:3, 1], 0)
    _, outputs = episode(params, lost, lost_features, FIRST)
    _, alone = module.apply(params, module.empty(2), features[4:], FIRST[4:])
    np.testing.assert_allclose(outputs[4:, 1], alone[:, 1], rtol=1e-6, atol=1e-6)


def test_parallel_equals_sequential_with_its_gradients_of_every_order(key):
    start, decay, added = (
        jax.random.normal(k, shape) for k, shape in zip(jax.random.split(key, 3), [(3, 2), (3, 7, 2), (3, 7, 2)])
    )

    def loss(recurrence):
        return lambda *args: (recurrence(*args, FIRST) ** 3).sum()

    def with_gradients(recurrence):
        slope = jax.value_and_grad(loss(recurrence), argnums=(0, 1, 2))
        second = jax.grad(lambda *args: slope(*args)[1][1].sum(), argnums=(0, 1, 2))
        return jax.jit(lambda *args: (slope(*args), second(*args)))(start, decay, added)

    one, *others = map(with_gradients, (in_sequence, in_parallel, linear_recurrence))
    for other in others:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), other, one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lstm", "mingru"])  # `gru` is in test_ppo.py
def test_probe_a_cue_is_recalled_with_an_lstm_and_a_mingru(kind):
    config = pjp.Config(
        num_envs=16, num_steps=16, segment_length=16, num_updates=100, widths=(16,), memory=kind, memory_width=16
    )
    ppo = pjp.batched(pjp.make_ppo(recall_cue(), config))
    state = ppo.init(jax.random.split(jax.random.key(0), 3), pjp.Hyperparams(learning_rate=1e-2))
    assert (jax.jit(ppo.train)(state)[1]["episode_return"][:, -10:].mean(1) > 0.95).all()


def test_the_memory_of_the_network_is_that_of_its_kind():
    shapes = {"gru": [(3, 5)] * 2, "lstm": [(3, 5)] * 4, "mingru": [(3, 5)] * 2, "": []}
    for kind, expected in shapes.items():
        ppo = pjp.make_ppo("CartPole-v1", replace(SMALL, memory=kind, memory_width=5, segment_length=4))
        assert [x.shape for x in jax.tree.leaves(ppo.network.initial_memory(3))] == expected


def test_previous_actions_and_rewards_are_shown_as_they_were():
    """One-hot for Discrete and 0 where an episode begins."""
    config = replace(SMALL, memory_inputs=True, normalize_observation=True)
    ppo = pjp.make_ppo(counter(), config)
    state, rollout = jax.jit(lambda key: ppo.collect(ppo.init(key)))(jax.random.key(0))
    seen, reached, begins = rollout.obs, rollout.next_obs, np.asarray(rollout.first)
    np.testing.assert_array_equal(reached["previous_action"], np.eye(2)[rollout.action])
    np.testing.assert_array_equal(reached["previous_reward"], rollout.reward)
    assert begins.sum() == 4 * 3 and seen["previous_action"].dtype == jnp.uint8
    for name in ("previous_action", "previous_reward"):
        before = np.concatenate([np.zeros_like(reached[name][:1]), reached[name][:-1]])
        before[begins] = 0
        np.testing.assert_array_equal(seen[name], before)
    np.testing.assert_array_equal(seen["observation"][begins], 10)
    assert set(state.policy.observation) == {"observation", "previous_action", "previous_reward"}


def test_a_previous_action_of_a_box_is_the_one_that_the_environment_received():
    ppo = pjp.make_ppo("Pendulum-v1", replace(SMALL, memory_inputs=True, initial_std=3.0))
    _, rollout = jax.jit(lambda key: ppo.collect(ppo.init(key)))(jax.random.key(0))
    assert (jnp.abs(rollout.action) > 2).any()
    np.testing.assert_array_equal(rollout.next_obs["previous_action"], jnp.clip(rollout.action, -2, 2))


def test_parts_of_a_dictionary_stay_beside_the_memory_inputs_and_names_that_are_taken_are_refused():
    def reset(key, params):
        return jnp.int32(0), {"place": jnp.zeros(2), "map": jnp.zeros((2, 3))}

    def step(key, state, action, params):
        nan_at_the_end = jnp.where(state == 3, jnp.nan, 1.0)
        return pjp.Step(state + 1, reset(key, params)[1], nan_at_the_end, jnp.bool_(False), state == 3)

    env = with_memory_inputs(pjp.Env(reset, step, (), pjp.MultiDiscrete([2, 3])))
    assert with_memory_inputs(env) is env and pjp.check_env(env) == []
    _, obs = env.reset(jax.random.key(0), ())
    assert obs.keys() == {"place", "map", "previous_action", "previous_reward"}
    result = env.step(jax.random.key(0), jnp.int32(3), jnp.array([1, 2]), ())
    assert result.obs["previous_action"].tolist() == [0, 1, 0, 0, 1] and result.obs["previous_reward"] == 0
    taken = pjp.Env(lambda key, params: (0, {"previous_action": 0.0}), step, (), pjp.Discrete(2))
    with pytest.raises(ValueError, match="memory_inputs=True adds 'previous_action', which 'environment' has already"):
        with_memory_inputs(taken)


@pytest.mark.full
@pytest.mark.slow
def test_memory_inputs_go_through_batches_shards_evaluation_and_export(tmp_path, key):
    config = replace(SMALL, memory="mingru", memory_width=4, segment_length=4, memory_inputs=True)
    ppo = pjp.make_ppo("CartPole-v1", config)
    state = jax.jit(ppo.init)(key)
    assert jax.jit(ppo.evaluate)(key, state.policy).finished.all()
    pjp.export(ppo, state.policy, tmp_path / "policy.stablehlo")
    exported = jax.export.deserialize(bytearray((tmp_path / "policy.stablehlo").read_bytes()))
    _, obs = ppo.env.reset(key, ppo.env.params)
    memory, first = ppo.network.initial_memory(1), jnp.ones(1, bool)
    actions, _ = exported.call(jax.tree.map(lambda x: x[None], obs), memory, first)
    assert actions[0] == ppo.act(state.policy, obs)[0]
    keys = jax.random.split(key, 2)
    many = pjp.batched(ppo)
    batch, _ = jax.jit(many.step)(many.init(keys))
    alone, _ = jax.jit(ppo.step)(ppo.init(keys[1]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1], y, atol=1e-5), batch.policy, alone.policy)
    shards = pjp.sharded(ppo, 1)
    after, metrics = jax.jit(shards.step)(shards.init(keys[1]))  # draws with keys of its shards
    assert np.isfinite(metrics["loss"]) and after.actors.obs.keys() == alone.actors.obs.keys()
    assert identify_ppo(ppo)["env"] == "CartPole-v1" and identify_ppo(ppo)["network"] == "purejaxppo.make_network"


def test_a_parallel_recurrence_drops_nan_before_a_reset():
    """Nan in step 2 and a reset in step 3, which meet in one half of the prefix sum."""
    decay, added = jnp.full((1, 8, 1), 0.5).at[:, 2].set(jnp.nan), jnp.ones((1, 8, 1)).at[:, 2].set(jnp.nan)
    first = jnp.zeros((8, 1), bool).at[3].set(True)
    one, other = (f(jnp.zeros((1, 1)), decay, added, first)[0, :, 0] for f in (in_sequence, in_parallel))
    np.testing.assert_allclose(other[3:], one[3:], rtol=1e-6)
    assert np.isfinite(other[3:]).all()
