import dataclasses
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from probes import SMALL, copy_cue
from purejaxppo import (
    Box,
    Categorical,
    Config,
    Discrete,
    Env,
    MultiCategorical,
    MultiDiscrete,
    Network,
    Step,
    TanhNormal,
    batched,
    from_nnx,
    make_env,
    make_ppo,
)
from purejaxppo.envs.base import flatten_observation
from purejaxppo.networks.actor_critic import ActorCritic, make_network
from purejaxppo.networks.layers import MLP, Dense, Logits, to_columns, to_rows
from purejaxppo.networks.memories import GRU
from purejaxppo.networks.orthogonal import orthogonal, orthogonalize


def test_weights_become_orthogonal_matrices_times_their_scale_and_all_else_stays(key):
    shapes = [(64, 64), (4, 64), (64, 2), (1, 1), (3, 3, 4, 16), (2, 3)]
    others = [jnp.arange(5.0), jnp.ones((2, 2))]
    drawn = orthogonalize(key, {"weights": [orthogonal(3.0)(key, shape) for shape in shapes], "others": others})
    jax.tree.map(np.testing.assert_array_equal, drawn["others"], others)
    for shape, weight in zip(shapes, drawn["weights"]):
        assert weight.shape == shape
        matrix = np.asarray(weight).reshape(-1, shape[-1])
        gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
        np.testing.assert_allclose(gram, 9 * np.eye(len(gram)), atol=2e-5)


def test_orthogonal_matrices_are_uniform_also_beside_larger_ones():
    """The first entry of a uniform 3 x 3 rotation or reflection is uniform on [-1, 1] (Archimedes), in every place."""
    params = [orthogonal()(None, shape) for shape in ((3, 3), (5, 8))]
    drawn = jax.vmap(lambda key: orthogonalize(key, params)[0])(jax.random.split(jax.random.key(0), 20_000))
    ordered = np.sort(np.asarray(drawn).reshape(-1, 9), axis=0)
    uniform = np.linspace(-1, 1, len(ordered))[:, None]
    assert np.abs(ordered - uniform).max() < 2 * 1.95 / np.sqrt(len(ordered))  # Kolmogorov-Smirnov at 0.1 %


def test_every_layer_of_a_network_has_a_matrix_of_its_own(key):
    network = make_network(Config(), Box(shape=(64,)), Discrete(2))
    params = network.init(key, (), jnp.zeros((1, 1, 64)), jnp.ones((1, 1)))
    weights = [np.asarray(x) for x in jax.tree.leaves(params) if x.shape == (64, 64)]
    assert len(weights) == 4
    for i, weight in enumerate(weights):
        assert all(np.abs(weight - other).max() > 0.1 for other in weights[:i])


@pytest.mark.parametrize(
    "details",
    [{}, {"encoder": "cnn"}, {"memory": "gru", "memory_width": 8, "segment_length": 4}, {"share_encoder": True}],
)
def test_every_weight_of_our_networks_is_an_orthogonal_matrix(details, key):
    network = make_network(Config(widths=(16, 16), **details), Box(shape=(5, 5, 2)), Discrete(3))
    params = network.init(key, network.initial_memory(1), jnp.zeros((1, 1, 5, 5, 2)), jnp.ones((1, 1), bool))
    for weight in (np.asarray(x) for x in jax.tree.leaves(params) if x.ndim > 1):
        matrix = weight.reshape(-1, weight.shape[-1])
        gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
        assert gram[0, 0] > 0
        np.testing.assert_allclose(gram / gram[0, 0], np.eye(len(gram)), atol=1e-5)


LAPACKS = """
import flax.linen as nn, jax.numpy as jnp
def init(key, memory, obs, first):
    return [nn.initializers.orthogonal()(k, shape) for k, shape in zip(jax.random.split(key), [(4, 64), (64, 64)])]
def apply(params, memory, obs, first):
    features = jnp.tanh(jnp.tanh(obs @ params[0]) @ params[1])
    return memory, pjp.Categorical(features[..., :2]), features[..., 2]
network = pjp.Network(lambda batch: (), init, apply)
"""


@pytest.mark.full
@pytest.mark.parametrize("network", ["network = None", LAPACKS], ids=["ours", "LAPACK's"])
def test_initialisation_under_vmap_does_not_deadlock(network):
    """In a process of its own with a time limit: LAPACK's QR under `vmap` hangs two threads with jax 0.10.2."""
    program = f"""
import jax, purejaxppo as pjp
{network}
init = jax.jit(pjp.batched(pjp.make_ppo("CartPole-v1", network=network)).init)
for i in range(30):
    jax.block_until_ready(init(jax.random.split(jax.random.key(i), 8)))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


class Shared(nn.Module):
    """A user's network, initialised by LAPACK's QR on purpose."""

    @nn.compact
    def __call__(self, obs):
        x = nn.relu(nn.Dense(32, kernel_init=nn.initializers.orthogonal())(obs))
        x = nn.relu(nn.Dense(32, kernel_init=nn.initializers.orthogonal())(x))
        return Categorical(nn.Dense(2)(x)), nn.Dense(1)(x)[..., 0]


@pytest.mark.full
def test_a_linen_module_of_a_user_trains_alone_and_in_a_batch():
    many = batched(make_ppo("CartPole-v1", SMALL, network=Shared()))
    state = jax.jit(many.init)(jax.random.split(jax.random.key(0), 8))
    after, metrics = jax.jit(many.step)(state)
    assert np.isfinite(metrics["loss"]).all()
    assert after.policy.params["params"]["Dense_0"]["kernel"].shape == (8, 4, 32)


class Mixed(nn.Module):
    """A user's network out of our layers and flax's."""

    @nn.compact
    def __call__(self, obs):
        features = MLP((16, 16))(Box(shape=(4,)), obs)
        hidden = nn.tanh(Dense(8, 2.0, name="ours")(features))
        return Logits(2, Categorical)(features), nn.Dense(1, name="theirs")(hidden)[:, 0]


class Rows(nn.Module):
    """A user's encoder, memory or head: it reads and gives rows of features, whose number is their last axis."""

    kind: str

    @nn.compact
    def __call__(self, *inputs):
        if self.kind == "encoder":
            space, obs = inputs
            assert obs.ndim == 3
            return nn.Dense(12)(obs)
        if self.kind == "memory":
            memory, features, first = inputs
            assert features.shape == (*first.shape, 12)
            return memory, features + nn.Dense(12)(features)
        (features,) = inputs
        assert features.ndim == 3 and features.shape[-1] == 12
        return Categorical(nn.Dense(2)(features))


@pytest.mark.parametrize("own", ["encoder", "memory", "head"])
def test_what_is_plugged_into_the_actor_critic_sees_rows(own, key):
    ours: Any = {"encoder": lambda: MLP((12,)), "memory": lambda: GRU(12), "head": lambda: Logits(2, Categorical)}
    module = ActorCritic(Box(shape=(4,)), **ours | {own: lambda: Rows(own)})
    memory, obs, first = (jnp.zeros((3, 12)),) * 2, jax.random.normal(key, (5, 3, 4)), jnp.zeros((5, 3), bool)
    params = orthogonalize(key, module.init(key, memory, obs, first))
    outputs: Any = module.apply(params, memory, obs, first)
    _, distribution, value = outputs
    assert distribution.logits.shape == (5, 3, 2) and value.shape == (5, 3)


def test_layers_give_the_same_in_rows_and_in_columns(key):
    rows = jax.random.normal(key, (5, 3, 4))
    first, memory = jnp.zeros((5, 3), bool).at[2, 1].set(True), jnp.ones((3, 6))
    for layer, arguments in ((Dense(6, 1.0), lambda x: (x,)), (GRU(6), lambda x: (memory, x, first))):
        params = orthogonalize(key, layer.init(key, *arguments(rows)))
        by_rows, by_columns = (layer.apply(params, *arguments(x)) for x in (rows, to_columns(rows)))
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(by_rows)[-1], to_rows(_last(by_columns)))


def _last(output) -> Any:
    return output[-1] if isinstance(output, tuple) else output


def test_our_layers_begin_orthogonal_in_a_module_of_a_user_and_those_of_flax_as_flax_draws_them():
    many = batched(make_ppo("CartPole-v1", SMALL, network=Mixed()))
    params = jax.jit(many.init)(jax.random.split(jax.random.key(0), 2)).policy.params["params"]
    for weight, scale in ((params["MLP_0"]["Dense_1"]["weight"], 2**0.5), (params["ours"]["weight"], 2.0)):
        for w in np.asarray(weight):
            np.testing.assert_allclose(w @ w.T, scale**2 * np.eye(len(w)), atol=1e-5)
        assert np.abs(weight[0] - weight[1]).max() > 0.1
    kernel = np.asarray(params["theirs"]["kernel"])  # [2, 8, 1]: lecun_normal, so not of length 1
    assert kernel.std() > 0.1 and np.abs((kernel**2).sum(1) - 1).min() > 1e-3


def test_orthogonal_weights_that_flax_stacks_are_refused():
    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, obs):
            two = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "axis_size": 2, "in_axes": None}
            x = nn.vmap(nn.Dense, **two)(16, kernel_init=orthogonal())(obs).sum(0)
            return Categorical(nn.Dense(2)(x)), nn.Dense(1)(x)[..., 0]

    with pytest.raises(ValueError, match="orthogonal.* cannot be stacked by nn.vmap"):
        make_ppo("CartPole-v1", SMALL, network=Stacked())


def test_a_misfit_that_one_step_does_not_show_is_found_before_anything_compiles():
    class Transposed(nn.Module):
        """Takes features for environments; with one step of as many environments as features it would pass."""

        @nn.compact
        def __call__(self, obs):
            x = MLP((SMALL.num_envs,))(Box(shape=(4,)), obs).T
            return Categorical(nn.Dense(2)(x)), nn.Dense(1)(x)[..., 0]

    def longer(params, memory, obs, first):
        return memory + 1.0, Categorical(obs @ params), obs[..., 0]

    network = Network(
        initial_memory=lambda batch: jnp.zeros(batch, jnp.int32), init=lambda *_: jnp.zeros((4, 2)), apply=longer
    )
    memory = network, "must return a memory with the shapes and dtypes"
    for wrong, words in ((Transposed(), "cannot be applied"), memory):
        with pytest.raises(ValueError, match=f"network {words}"):
            make_ppo("CartPole-v1", SMALL, network=wrong)


@pytest.mark.parametrize("sizes, num_logits", [((9, 9), 18), ((2, 3), 7), ((3, 2), 5)])
def test_choices_that_are_not_those_of_the_environment_are_refused(sizes, num_logits):
    class Choices(nn.Module):
        @nn.compact
        def __call__(self, obs):
            return MultiCategorical(nn.Dense(num_logits)(obs), sizes), nn.Dense(1)(obs)[..., 0]

    env = copy_cue()._replace(action_space=MultiDiscrete((2, 3)))
    env = env._replace(step=lambda key, state, action, params, step=env.step: step(key, state, action[0], params))
    with pytest.raises(ValueError, match=r"network must return 5 logits for choices among \(2, 3\)"):
        make_ppo(env, SMALL, network=Choices())


def test_orthogonal_weights_that_a_network_leaves_to_be_drawn_are_drawn(key):
    def apply(params, memory, obs, first):
        flat = Mixed().apply(params, obs.reshape(-1, 4))
        return memory, *jax.tree.map(lambda x: x.reshape(*first.shape, *x.shape[1:]), flat)

    init = lambda key, memory, obs, first: Mixed().init(key, obs[0])
    ppo = make_ppo("CartPole-v1", SMALL, network=Network(lambda batch: (), init, apply))
    weight = np.asarray(ppo.init(key).policy.params["params"]["ours"]["weight"])
    np.testing.assert_allclose(weight @ weight.T, 4 * np.eye(8), atol=1e-5)  # a scale of 2
    assert (ppo.init(jax.random.key(1)).policy.params["params"]["ours"]["weight"] != weight).any()


def test_a_network_with_a_memory_is_refused_with_segments_of_one_step():
    network = Network(
        initial_memory=lambda batch: jnp.zeros(batch),
        init=lambda *_: jnp.zeros(()),
        apply=lambda params, memory, obs, first: (
            memory, Categorical(jnp.zeros((*first.shape, 2)) + params), jnp.zeros(first.shape),
        ),
    )  # fmt: skip
    with pytest.raises(ValueError, match="segment_length=1 cuts gradients.*segment_length=8"):
        make_ppo(copy_cue(), SMALL, network=network)
    make_ppo(copy_cue(), dataclasses.replace(SMALL, segment_length=4), network=network)


def test_a_distribution_whose_arrays_are_not_over_the_batch_is_refused():
    def apply(params, memory, obs, first):
        loc = jnp.zeros((*first.shape, 1)) + params
        return memory, TanhNormal(loc, jnp.ones_like(loc), low=-jnp.ones(1)), jnp.zeros(first.shape)

    network = Network(lambda batch: (), lambda *_: jnp.zeros(()), apply)
    with pytest.raises(ValueError, match=r"TanhNormal.*an array of shape \(1,\).*broadcast it"):
        make_ppo("Pendulum-v1", SMALL, network=network)


def test_a_linen_module_may_give_a_distribution_with_scalars():
    class Bounded(nn.Module):
        @nn.compact
        def __call__(self, obs):
            loc = nn.Dense(1)(obs)
            return TanhNormal(loc, jnp.ones_like(loc), -2.0, 2.0), nn.Dense(1)(obs)[..., 0]

    ppo = make_ppo("Pendulum-v1", dataclasses.replace(SMALL, bound_action="tanh"), network=Bounded())
    _, metrics = jax.jit(ppo.step)(ppo.init(jax.random.key(0)))
    np.testing.assert_allclose(metrics["approx_kl"], 0, atol=1e-3)


class Small(nnx.Module):
    """A user's nnx network."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(2, 16, rngs=rngs)
        self.logits = nnx.Linear(16, 2, rngs=rngs)
        self.value = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, obs):
        x = nnx.tanh(self.hidden(obs))
        return Categorical(self.logits(x)), self.value(x)[..., 0]


@pytest.mark.full
def test_an_nnx_module_of_a_user_trains_and_starts_differently_for_every_key():
    many = batched(make_ppo(copy_cue(), SMALL, network=from_nnx(Small)))
    state = jax.jit(many.init)(jax.random.split(jax.random.key(0), 2))
    kernels = state.policy.params["hidden"]["kernel"]
    assert (kernels[0] != kernels[1]).any()
    after, metrics = jax.jit(many.train)(state)
    assert (after.policy.params["hidden"]["kernel"] != kernels).any()
    assert np.isfinite(metrics["loss"]).all()


def test_a_network_may_be_three_plain_functions():
    def apply(params, memory, obs, first):
        return memory, Categorical(obs @ params["w"]), obs @ params["v"]

    network = Network(
        initial_memory=lambda batch: (),
        init=lambda key, memory, obs, first: {"w": jnp.zeros((2, 2)), "v": jnp.zeros(2)},
        apply=apply,
    )
    ppo = make_ppo(copy_cue(), SMALL, network=network)
    state, _ = jax.jit(ppo.train)(ppo.init(jax.random.key(0)))
    assert (state.policy.params["w"] != 0).all()


def test_a_network_that_does_not_fit_is_named_before_anything_compiles():
    class WrongValue(nn.Module):
        @nn.compact
        def __call__(self, obs):
            return Categorical(nn.Dense(2)(obs)), nn.Dense(1)(obs)

    class WrongActions(nn.Module):
        @nn.compact
        def __call__(self, obs):
            return Categorical(nn.Dense(2)(obs)[..., None, :]), obs.sum(-1)

    for network, words in ((WrongValue(), "values"), (WrongActions(), "actions"), (42, "must be a Network")):
        with pytest.raises(ValueError, match=words):
            make_ppo("CartPole-v1", SMALL, network=network)


def test_a_cnn_reads_grids_and_refuses_vectors(key):
    ppo = make_ppo("Breakout-MinAtar", dataclasses.replace(SMALL, encoder="cnn", activation="relu"))
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(ppo.init, key).policy.params["params"])
    assert shapes["actor"]["CNN_0"]["kernel"] == (3, 3, 4, 16)
    with pytest.raises(ValueError, match="cnn.*grids"):
        make_ppo("CartPole-v1", Config(encoder="cnn"))


def test_the_first_policy_is_nearly_uniform_and_the_first_value_is_not_degenerate(key):
    network = make_network(Config(), Box(shape=(4,)), Discrete(3))
    obs, first = jax.random.normal(key, (1, 500, 4)), jnp.zeros((1, 500), bool)
    _, distribution, value = network.apply(network.init(key, (), obs, first), (), obs, first)
    assert jnp.abs(jax.nn.softmax(distribution.logits) - 1 / 3).max() < 0.02
    assert 0.1 < value.std() < 3


def test_actor_and_critic_are_apart_unless_shared(key):
    obs, first = jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), bool)
    for shared, parts in ((False, {"actor", "critic", "value", "Logits_0"}), (True, {"actor", "value", "Logits_0"})):
        network = make_network(Config(share_encoder=shared), Box(shape=(4,)), Discrete(2))
        assert set(network.init(key, (), obs, first)["params"]) == parts


@pytest.mark.full
def test_a_memory_carries_over_pieces_of_a_sequence_as_over_the_whole(key):
    network = make_network(Config(memory="gru", memory_width=8, segment_length=8), Box(shape=(3,)), Discrete(2))
    obs = jax.random.normal(key, (6, 2, 3))
    first = jnp.zeros((6, 2), bool).at[0].set(True).at[3, 1].set(True)
    params = network.init(key, network.initial_memory(2), obs, first)
    _, _, whole = network.apply(params, network.initial_memory(2), obs, first)
    memory, _, start = network.apply(params, network.initial_memory(2), obs[:2], first[:2])
    _, _, end = network.apply(params, memory, obs[2:], first[2:])
    np.testing.assert_allclose(jnp.concatenate([start, end]), whole, rtol=1e-5, atol=1e-6)
    _, _, fresh = network.apply(params, network.initial_memory(2), obs[3:], jnp.zeros((3, 2), bool))
    np.testing.assert_allclose(fresh[:, 1], whole[3:, 1], rtol=1e-5, atol=1e-6)
    assert (jnp.abs(fresh[:, 0] - whole[3:, 0]) > 1e-4).any()


def test_observations_of_every_kind_become_one_vector():
    space = {
        "box": Box(shape=(2, 2)),
        "kind": Discrete(3),
        "many": MultiDiscrete([2, 2]),
        "on": Box(shape=(), dtype=bool),
    }
    obs = {
        "box": jnp.arange(4).reshape(1, 2, 2),
        "kind": jnp.array([2]),
        "many": jnp.array([[0, 1]]),
        "on": jnp.array([True]),
    }
    np.testing.assert_array_equal(flatten_observation(space, obs), [[0, 1, 2, 3, 0, 0, 1, 1, 0, 0, 1, 1]])


def test_the_deviation_may_depend_on_the_state_and_starts_where_it_is_told(key):
    obs, first = jax.random.normal(key, (1, 5, 4)), jnp.zeros((1, 5), bool)
    for depends in (False, True):
        config = Config(state_dependent_std=depends, initial_std=0.5)
        network = make_network(config, Box(shape=(4,)), Box(-1.0, 1.0, (2,)))
        params = network.init(key, (), obs, first)
        scale = network.apply(params, (), obs, first)[1].scale
        np.testing.assert_allclose(scale, 0.5, rtol=0.05)
        assert (jnp.ptp(scale, axis=1) > 0).any() == depends


def test_tanh_refuses_a_space_without_bounds():
    env = make_env("Pendulum-v1")._replace(action_space=Box(shape=(1,)))
    with pytest.raises(ValueError, match="finite bounds"):
        make_ppo(env, Config(bound_action="tanh"))


@pytest.mark.parametrize("high, largest", [(255, 1.0), (np.inf, 1.0), (1, 255.0)])
@pytest.mark.parametrize("encoder", ["mlp", "cnn"])
def test_images_of_uint8_stay_so_until_an_encoder_scales_them(encoder, high, largest, key):
    """As the same image of floats that was scaled before; a binary grid is declared by its bound."""

    def env_of(read, **space):
        def reset(key, params):
            image = jax.random.randint(key, (4, 5, 2), 0, 256).astype(jnp.uint8)
            return image, read(image)

        def step(key, image, action, params):
            image = image + jnp.uint8(1)
            return Step(image, read(image), jnp.float32(1), jnp.bool_(False), jnp.bool_(True))

        return Env(reset, step, (), Discrete(2), **space)

    config = Config(
        num_envs=2, num_steps=4, num_minibatches=2, encoder=encoder, widths=(8,), normalize_observation=True
    )
    whole = make_ppo(env_of(lambda x: x, observation_space=Box(0, high, (4, 5, 2), jnp.uint8)), config)
    state = whole.init(key)
    assert state.policy.observation is None and state.actors.obs.dtype == jnp.uint8
    _, rollout = whole.collect(state)
    assert rollout.obs.dtype == rollout.next_obs.dtype == jnp.uint8
    _, metrics = jax.jit(whole.step)(state)

    scaled = make_ppo(env_of(lambda x: x * (largest / 255)), dataclasses.replace(config, normalize_observation=False))
    other = scaled.init(key)
    other = other.replace(policy=other.policy.replace(params=state.policy.params))
    _, expected = jax.jit(scaled.step)(other)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-4)


def test_a_dictionary_of_all_kinds_is_learned_from_as_it_is(key):
    """Bool, int and uint8 parts keep their dtype and are not normalised; floats are."""

    def show(time):
        return {
            "image": jnp.full((2, 2), 200, jnp.uint8),
            "mask": jnp.array([True, False]),
            "count": time,
            "place": jnp.ones(3) * time,
        }

    def step(key, time, action, params):
        return Step(time + 1, show(time + 1), jnp.float32(1), jnp.bool_(False), time >= 3)

    env = Env(lambda key, params: (jnp.int32(0), show(jnp.int32(0))), step, (), Discrete(2))
    ppo = make_ppo(env, Config(num_envs=2, num_steps=4, num_minibatches=2, normalize_observation=True))
    state, metrics = jax.jit(ppo.step)(ppo.init(key))
    assert {name for name, x in state.policy.observation.items() if x is not None} == {"place"}
    assert {name: x.dtype.name for name, x in state.actors.obs.items()} == {
        "image": "uint8", "mask": "bool", "count": "int32", "place": "float32",
    }  # fmt: skip
    assert np.isfinite(metrics["loss"])
