"""Exported policies act as ours, in a process that cannot import this package."""

import dataclasses
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probes import SMALL
from purejaxppo import Box, Categorical, Network, make_ppo
from purejaxppo.experiment.agents.export import export
from purejaxppo.experiment.files import to_arrays
from purejaxppo.networks.actor_critic import ActorCritic
from purejaxppo.networks.layers import MLP, Logits
from purejaxppo.networks.orthogonal import orthogonalize
from purejaxppo.normalize import Moments


def trained(env, **config):
    """A PPO, and a policy whose outputs are large and whose normaliser has seen something."""
    ppo = make_ppo(env, dataclasses.replace(SMALL, **config))
    policy = ppo.init(jax.random.key(0)).policy
    policy = policy.replace(params=jax.tree.map(lambda x: 2 * x + 0.01, policy.params))
    if config.get("normalize_observation"):
        mean, variance = jnp.array([0.1, -0.2, 0.5]), jnp.array([0.5, 2.0, 9.0])
        policy = policy.replace(observation=Moments(count=jnp.float32(9), mean=mean, variance=variance))
    return ppo, policy


def actions_of(ppo, policy, obs):
    return np.asarray(jax.vmap(lambda x: ppo.act(policy, x)[0])(obs))


GRU = {"memory": "gru", "memory_width": 8, "segment_length": SMALL.num_steps}
PENDULUM = [{"bound_action": how, "normalize_observation": True} for how in ("clip", "tanh")]


@pytest.mark.full
@pytest.mark.parametrize(
    "env, config", [("CartPole-v1", {"activation": "relu"}), *(("Pendulum-v1", config) for config in PENDULUM)]
)
def test_a_file_acts_where_this_package_cannot_be_imported(env, config, tmp_path):
    ppo, policy = trained(env, **config)
    obs = 3 * np.random.default_rng(0).normal(size=(50, *ppo.env.observation_space.shape)).astype(np.float32)
    expected = actions_of(ppo, policy, obs)
    assert len(np.unique(expected.round(3))) > 1
    np.savez(tmp_path / "expected.npz", obs=obs, actions=expected)
    with_jax = export(ppo, policy, tmp_path / "policy.stablehlo")
    with_numpy = export(ppo, policy, tmp_path / "policy.npz")
    assert len(with_numpy.splitlines()) < 20
    program = f"""
import sys
sys.modules["purejaxppo"] = None
import numpy as np
expected = dict(np.load({str(tmp_path / "expected.npz")!r}))
obs = expected["obs"]
{with_jax}
np.testing.assert_allclose(actions, expected["actions"], atol=1e-6)
assert len(policy.call(obs[:7])) == 7 and set(policy.platforms) == {{"cpu", "cuda"}}
{with_numpy}
np.testing.assert_allclose(act(obs), expected["actions"], atol=1e-5)
try:
    import purejaxppo
except ImportError:
    print("alone")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "alone\n", done.stderr


def exported_call(folder, *args):
    exported = jax.export.deserialize(bytearray((folder / "policy.stablehlo").read_bytes()))
    return exported.call(*args)


@pytest.mark.full
def test_the_code_of_a_policy_with_memory_inputs_runs_as_it_stands(tmp_path):
    ppo, policy = trained("CartPole-v1", **GRU, memory_inputs=True)
    lines = export(ppo, policy, tmp_path / "policy.stablehlo")
    obs = {
        "observation": np.zeros((1, 4), np.float32),
        "previous_action": np.zeros((1, 2), np.uint8),
        "previous_reward": np.zeros(1, np.float32),
    }
    names: dict = {"obs": obs}
    exec(lines, names)
    assert names["actions"].shape == (1,) and "obs['previous_action'] uint8[batch, 2]" in lines
    assert "obs['previous_action'] is the action before, one-hot if it is discrete" in lines


@pytest.mark.full
def test_a_recurrent_policy_takes_its_memory_and_where_episodes_begin(tmp_path):
    ppo, policy = trained("Pendulum-v1", **GRU)
    lines = export(ppo, policy, tmp_path / "policy.stablehlo")
    names: dict = {"obs": np.zeros((1, 3), np.float32)}
    exec(lines, names)
    zeros = jax.tree.map(np.zeros_like, ppo.network.initial_memory(1))
    expected, _ = exported_call(tmp_path, names["obs"], zeros, np.ones(1, bool))
    np.testing.assert_array_equal(names["actions"], expected)
    assert "# obs float32[batch, 3] -> actions [batch, 1]" in lines
    obs = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    memory = jax.tree.map(lambda x: jnp.full_like(x, 7.0), ppo.network.initial_memory(2))
    ours = None
    for t in range(4):
        first = np.full(2, t == 0)
        actions, memory = exported_call(tmp_path, obs[t], memory, first)
        expected, ours = ppo.act(policy, obs[t, 0], None, ours)
        np.testing.assert_allclose(actions[0], expected, atol=1e-6)


def test_a_grid_goes_through_a_convolution_of_any_batch(tmp_path):
    ppo, policy = trained("Breakout-MinAtar", encoder="cnn")
    export(ppo, policy, tmp_path / "policy.stablehlo", platforms=["cpu"])
    exported = jax.export.deserialize(bytearray((tmp_path / "policy.stablehlo").read_bytes()))
    obs = np.random.default_rng(0).integers(0, 2, (9, *ppo.env.observation_space.shape)).astype(np.float32)
    obs = obs.astype(ppo.env.observation_space.dtype)
    np.testing.assert_array_equal(exported.call(obs), actions_of(ppo, policy, obs))


@pytest.mark.parametrize(
    "env, config, name, words",
    [
        ("CartPole-v1", {}, "policy.onnx", "must end in .stablehlo or .npz"),
        ("CartPole-v1", GRU, "policy.npz", "only an mlp without memory over one Box"),
        ("Breakout-MinAtar", {"encoder": "cnn"}, "policy.npz", "only an mlp without memory over one Box"),
    ],
)
def test_what_cannot_be_written_is_refused(env, config, name, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export(*trained(env, **config), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_parameters_of_16_bits_are_exported_as_numbers(tmp_path):
    ppo = make_ppo("CartPole-v1", SMALL)
    policy = ppo.init(jax.random.key(0)).policy
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy)
    export(ppo, narrow, tmp_path / "policy.npz")
    with np.load(tmp_path / "policy.npz") as arrays:
        np.testing.assert_allclose(
            arrays["weight_0"], to_arrays(policy)["params/params/actor/MLP_0/Dense_0/weight"], rtol=1e-2
        )
        assert arrays["weight_0"].dtype == np.float32


def test_a_network_of_a_user_with_weights_of_our_names_is_no_file_for_numpy(tmp_path):
    module = ActorCritic(Box(shape=(4,)), lambda: Logits(2, Categorical), lambda: MLP(SMALL.widths, nn.gelu))
    network = Network(
        initial_memory=lambda batch: (),
        init=lambda key, *args: orthogonalize(key, module.init(key, *args)),
        apply=module.apply,
    )
    ppo = make_ppo("CartPole-v1", SMALL, network=network)
    with pytest.raises(ValueError, match="can hold only an mlp"):
        export(ppo, ppo.init(jax.random.key(0)).policy, tmp_path / "policy.npz")
