"""Roles of observations: no action that is masked is ever taken, and only the critic reads what is privileged."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from variants import cartpole_with_privileged_velocities

import purejaxppo as pjp
from probes import SMALL
from purejaxppo.envs.base import flatten_observation
from purejaxppo.envs.roles import random_action

CONFIG = replace(SMALL, num_epochs=1, num_minibatches=1)


def masked(action_space: Any = pjp.Discrete(3), shape=(3,), lost=False):
    """Random masks; an action that is masked ends the episode with reward -100, an allowed one is rewarded by 1."""

    always = [0, 2] if shape == (5,) else [0]  # so that each entry of an action has a choice

    def observe(key):
        allowed = jax.random.bernoulli(key, 0.5, shape).at[jnp.array(always)].set(True)
        return {"mask": allowed & (not lost), "x": jnp.ones(2)}

    def reset(key, params):
        obs = observe(key)
        return (jnp.int32(0), obs["mask"]), obs

    def step(key, state, action, params):
        time, mask = state
        obs, forbidden = observe(key), ~is_allowed(mask | lost, action, action_space)
        return pjp.Step(
            (time + 1, obs["mask"]), obs, jnp.where(forbidden, -100.0, 1.0), forbidden, ~forbidden & (time == 7)
        )

    spaces = {"mask": pjp.ActionMask(shape), "x": pjp.Box(shape=(2,))}
    return pjp.Env(reset, step, (), action_space, spaces, "masked")


def is_allowed(mask, action, space):
    if mask.ndim > 1:
        return mask[tuple(action)]
    if isinstance(space, pjp.Discrete):
        return mask[action]
    starts = jnp.array([0, *itertools.accumulate(space.sizes)][:-1])
    return mask[starts + action].all()


SPACES = [
    (pjp.Discrete(3), (3,)),
    (pjp.MultiDiscrete([2, 3]), (5,)),
    (pjp.MultiDiscrete([2, 3]), (2, 3)),
]
WIDE = pjp.MultiDiscrete([10, 10]), (10, 10)  # whose distributions a rollout does not keep


@pytest.fixture(params=SPACES, ids=["one choice", "independent choices", "combinations"])
def env(request):
    return masked(*request.param)


@pytest.mark.parametrize("space, shape", [*SPACES, WIDE])
def test_a_masked_action_is_never_taken(space, shape, key):
    """In rollouts, in evaluation (sampled and greedy), and by random play."""
    env = masked(space, shape)
    ppo = pjp.make_ppo(env, CONFIG)
    state, _ = jax.jit(ppo.train)(ppo.init(key))
    _, rollout = jax.jit(ppo.collect)(state)
    assert (np.asarray(rollout.reward) == 1).all() and not np.asarray(rollout.terminated).any()
    for greedy in (False, True):
        played = jax.jit(partial(ppo.evaluate, num_episodes=16, greedy=greedy))(key, state.policy)
        assert (np.asarray(played.episode_return) == 8).all()
    _, obs = jax.vmap(env.reset, (0, None))(jax.random.split(key, 200), ())
    actions = jax.vmap(lambda key, mask: random_action(key, env.action_space, mask))(
        jax.random.split(key, 200), obs["mask"]
    )
    assert jax.vmap(lambda mask, action: is_allowed(mask, action, env.action_space))(obs["mask"], actions).all()


def test_an_environment_with_a_mask_passes_its_check_and_is_played_by_the_mask():
    """A masked action would be rewarded by nan, in a step that does not end: a fault."""
    env = masked(*SPACES[2])

    def step(key, state, action, params):
        forbidden = ~is_allowed(state[1], action, env.action_space)
        return env.step(key, state, action, params)._replace(
            reward=jnp.where(forbidden, jnp.nan, 1.0), terminated=jnp.bool_(False)
        )

    assert not pjp.check_env(env._replace(step=step), num_steps=50)
    unaware = env.observation_space | {"mask": pjp.Box(0, 1, env.observation_space["mask"].shape, bool)}
    assert any(
        "nan" in fault for fault in pjp.check_env(env._replace(step=step, observation_space=unaware), num_steps=50)
    )


def test_a_random_action_has_equal_probability_among_the_allowed():
    """2,000 draws of 4 allowed combinations: 500 of each, within four deviations."""
    allowed = jnp.array([[True, False, True], [True, True, False]])
    draw = lambda key: random_action(key, pjp.MultiDiscrete([2, 3]), allowed)
    actions = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 2000)))
    counts = np.zeros((2, 3))
    np.add.at(counts, tuple(actions.T), 1)
    assert (counts[~np.asarray(allowed)] == 0).all() and (abs(counts[np.asarray(allowed)] - 500) < 80).all()


def test_the_first_ratio_is_one_under_masks(env, key):
    ppo = pjp.make_ppo(env, CONFIG)
    _, metrics = jax.jit(ppo.step)(ppo.init(key, pjp.Hyperparams(learning_rate=0.0)))
    assert float(metrics["approx_kl"]) < 1e-12 and float(metrics["clip_fraction"]) == 0


@pytest.mark.parametrize("space, shape", SPACES)
def test_a_lost_board_allows_everything_and_gradients_stay_finite(space, shape, key):
    ppo = pjp.make_ppo(masked(space, shape, lost=True), CONFIG)
    state, metrics = jax.jit(ppo.train)(ppo.init(key))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.policy.params, metrics["loss"])))
    _, rollout = jax.jit(ppo.collect)(state)
    assert len(np.unique(np.asarray(rollout.action))) > 1


def test_a_joint_mask_renormalises_the_distribution_over_combinations():
    """Against the enumeration of all combinations."""
    logits, sizes = jnp.array([0.3, -1.0, 2.0, 0.5, 0.1, -0.4]), (2, 3)
    allowed = np.array([[True, False, True], [False, True, True]])
    joint = pjp.JointCategorical(logits, sizes).masked(jnp.asarray(allowed))
    weights = np.where(allowed.reshape(-1), np.exp(logits), 0)
    probs = weights / weights.sum()
    for i, combination in enumerate(itertools.product(range(2), range(3))):
        found = float(jnp.exp(joint.log_prob(jnp.array(combination))))
        assert found == pytest.approx(probs[i], abs=1e-6)
    entropy = -sum(p * np.log(p) for p in probs if p)
    assert float(joint.entropy()) == pytest.approx(entropy, rel=1e-5)
    assert joint.mode().tolist() == [0, 2]
    other = pjp.JointCategorical(jnp.zeros(6), sizes).masked(jnp.asarray(allowed))
    expected = sum(p * np.log(p * 4) for p in probs if p)
    assert float(joint.kl(other)) == pytest.approx(expected, rel=1e-5)
    grads = jax.grad(lambda x: pjp.JointCategorical(x, sizes).masked(jnp.asarray(allowed)).entropy())(logits)
    assert np.isfinite(grads).all() and (grads[~allowed.reshape(-1)] == 0).all()


def test_masks_and_discrete_parts_are_never_normalised(env, key):
    config = replace(CONFIG, normalize_observation=True)
    state, _ = jax.jit(pjp.make_ppo(env, config).step)(pjp.make_ppo(env, config).init(key))
    assert state.policy.observation["mask"] is None and state.policy.observation["x"] is not None


def test_an_exported_policy_respects_the_mask(env, key, tmp_path):
    ppo = pjp.make_ppo(env, CONFIG)
    pjp.export(ppo, ppo.init(key).policy, tmp_path / "policy.stablehlo", platforms=["cpu"])
    policy = jax.export.deserialize(bytearray((tmp_path / "policy.stablehlo").read_bytes()))
    _, obs = jax.vmap(env.reset, (0, None))(jax.random.split(key, 50), ())
    actions = policy.call(obs)
    assert jax.vmap(lambda mask, action: is_allowed(mask, action, env.action_space))(obs["mask"], actions).all()


def test_a_policy_in_numpy_respects_the_mask(key, tmp_path):
    env = masked()
    ppo = pjp.make_ppo(env, replace(CONFIG, normalize_observation=True))
    state, _ = jax.jit(ppo.step)(ppo.init(key))
    code = pjp.export(ppo, state.policy, tmp_path / "policy.npz")
    exec(code, names := {})
    _, obs = jax.vmap(env.reset, (0, None))(jax.random.split(key, 50), ())
    expected = jax.vmap(lambda x: ppo.act(state.policy, x)[0])(obs)
    assert (names["act"](obs) == expected).all()


class Plain(nn.Module):
    """A network of a user's that knows of no mask."""

    head: Callable  # logits -> distribution
    num_logits: int

    @nn.compact
    def __call__(self, obs):
        return self.head(nn.Dense(self.num_logits)(obs["x"])), nn.Dense(1)(obs["x"])[..., 0]


HEADS = {
    (3,): (pjp.Categorical, 3),
    (5,): (lambda logits: pjp.MultiCategorical(logits, (2, 3)), 5),
    (2, 3): (lambda logits: pjp.JointCategorical(logits, (2, 3)), 6),
}


@pytest.mark.parametrize("space, shape", SPACES)
def test_a_mask_is_applied_to_a_network_that_knows_of_none(space, shape, key):
    ppo = pjp.make_ppo(masked(space, shape), CONFIG, network=Plain(*HEADS[shape]))
    state, _ = jax.jit(ppo.train)(ppo.init(key))
    _, rollout = jax.jit(ppo.collect)(state)
    assert (np.asarray(rollout.reward) == 1).all()


def test_a_mask_keeps_what_else_a_network_has(key):
    """An auxiliary head, which the loss reads as without a mask."""
    plain = pjp.from_linen(Plain(*HEADS[(3,)]))
    network = SimpleNamespace(**plain._asdict(), scale=lambda params: 2.0)

    def loss(params, minibatch, hyperparams, *, network, config):
        loss, report = pjp.ppo_loss(params, minibatch, hyperparams, network=network, config=config)
        return loss, report | {"scale": network.scale(params)}

    ppo = pjp.make_ppo(masked(*SPACES[0]), CONFIG, network=network, loss=loss)
    _, metrics = jax.jit(ppo.step)(ppo.init(key))
    assert metrics["scale"] == 2
    given: Any = ppo.network
    with pytest.raises(AttributeError, match="nothing"):
        given.nothing


class Unmasked(pjp.Normal):
    """A distribution that cannot be masked."""


@pytest.mark.parametrize(
    "shape, head, num_logits, sentence",
    [
        ((2, 3), lambda logits: pjp.MultiCategorical(logits, (2, 3)), 5, "allows combinations, which MultiCategorical"),
        ((2, 3), lambda logits: pjp.JointCategorical(logits, (3, 2)), 6, r"6 logits for choices among \(2, 3\)"),
        ((2, 3), lambda logits: Unmasked(logits, jnp.exp(logits)), 2, r"Unmasked has no masked\(allowed\)"),
    ],
)
def test_a_network_that_cannot_be_masked_is_refused(shape, head, num_logits, sentence):
    with pytest.raises(ValueError, match=sentence):
        pjp.make_ppo(masked(pjp.MultiDiscrete([2, 3]), shape), CONFIG, network=Plain(head, num_logits))


def test_actions_of_two_axes_are_refused():
    with pytest.raises(ValueError, match="the sizes of a MultiDiscrete action must be a vector"):
        pjp.make_ppo(masked(pjp.MultiDiscrete(np.full((2, 2), 3)), (3,)), CONFIG)


@pytest.mark.parametrize("normalize", [False, True])
def test_only_the_critic_reads_what_is_privileged(normalize, key):
    ppo = pjp.make_ppo(cartpole_with_privileged_velocities(), replace(CONFIG, normalize_observation=normalize))
    state, _ = jax.jit(ppo.step)(ppo.init(key))
    obs = {"position": jnp.ones((1, 1, 2)), "velocity": jnp.ones((1, 1, 2))}
    other = obs | {"velocity": jnp.full((1, 1, 2), -3.0)}
    first = jnp.ones((1, 1), bool)
    _, logits, value = ppo.network.apply(state.policy.params, (), obs, first)
    _, same_logits, other_value = ppo.network.apply(state.policy.params, (), other, first)
    assert (logits.logits == same_logits.logits).all() and value != other_value


def test_acting_and_export_do_without_what_is_privileged(key, tmp_path):
    ppo = pjp.make_ppo(cartpole_with_privileged_velocities(), CONFIG)
    policy = ppo.init(key).policy
    _, obs = ppo.env.reset(key, ppo.env.params)
    seen = {"position": obs["position"]}
    assert jax.jit(ppo.act)(policy, obs)[0] == jax.jit(ppo.act)(policy, seen)[0]
    pjp.export(ppo, policy, tmp_path / "policy.stablehlo", platforms=["cpu"])
    exported = jax.export.deserialize(bytearray((tmp_path / "policy.stablehlo").read_bytes()))
    many = jax.random.normal(key, (64, 2))
    expected = jax.vmap(lambda x: ppo.act(policy, {"position": x})[0])(many)
    assert (exported.call({"position": many}) == expected).all()
    exec(pjp.export(ppo, policy, tmp_path / "policy.npz"), names := {})
    assert (names["act"]({"position": many}) == expected).all()
    with pytest.raises(ValueError, match=r"obs\['position'\] is missing"):
        ppo.act(policy, {"velocity": obs["velocity"]})


class Peeking(nn.Module):
    """An actor that reads what it should, or also what only its critic should."""

    peeks: bool

    @nn.compact
    def __call__(self, obs):
        everything = jnp.concatenate([obs["position"], obs["velocity"]], -1)
        value = nn.Dense(1)(jnp.tanh(nn.Dense(8)(everything)))[..., 0]
        return pjp.Categorical(nn.Dense(2)(everything if self.peeks else obs["position"])), value


def test_an_actor_that_reads_what_is_privileged_is_refused():
    pjp.make_ppo(cartpole_with_privileged_velocities(), CONFIG, network=Peeking(False))
    with pytest.raises(ValueError, match=r"distribution of actions from \['velocity'\], which is privileged"):
        pjp.make_ppo(cartpole_with_privileged_velocities(), CONFIG, network=Peeking(True))


def test_an_encoder_that_is_shared_refuses_privileged_parts():
    with pytest.raises(ValueError, match="share_encoder=True .* privileged parts"):
        pjp.make_ppo(cartpole_with_privileged_velocities(), pjp.Config(share_encoder=True))


@pytest.mark.parametrize(
    "spaces, actions, fault",
    [
        ({"a": pjp.ActionMask((3,)), "x": pjp.Box(shape=(2,))}, pjp.Discrete(2), r"its shape must be \(2,\)"),
        ({"a": pjp.ActionMask((2,)), "b": pjp.ActionMask((2,))}, pjp.Discrete(2), "it may hold one"),
        ({"a": pjp.ActionMask((2,))}, pjp.Discrete(2), "leaves nothing for the actor"),
        ({"a": pjp.ActionMask((2,)), "x": pjp.Box(shape=(2,))}, pjp.Box(-1, 1, (2,)), "only discrete actions"),
    ],
)
def test_roles_that_do_not_fit_are_refused(spaces, actions, fault):
    def observe():
        return {
            name: jnp.zeros(space.shape, bool if isinstance(space, pjp.ActionMask) else jnp.float32)
            for name, space in spaces.items()
        }

    step = lambda key, state, action, params: pjp.Step(0, observe(), jnp.float32(1), jnp.bool_(True), jnp.bool_(False))
    env = pjp.Env(lambda key, params: (0, observe()), step, (), actions, spaces)
    with pytest.raises(ValueError, match=fault):
        pjp.make_ppo(env, CONFIG)


def test_categories_of_a_grid_are_one_hot_in_their_order():
    space = pjp.MultiDiscrete(np.full((3, 3, 2), [2, 3]))
    grid = np.zeros((1, 3, 3, 2), np.uint8)
    grid[0, 2, 1] = [1, 2]
    flat = np.asarray(flatten_observation(space, jnp.asarray(grid))).reshape(3, 3, 5)
    expected = np.tile([1, 0, 1, 0, 0], (3, 3, 1))
    expected[2, 1] = [0, 1, 0, 0, 1]
    assert (flat == expected).all()


def test_the_cnn_reads_the_grids_of_a_dictionary_and_joins_the_rest(key):
    def observe(key):
        return {"board": jax.random.randint(key, (4, 4), 0, 3).astype(jnp.uint8), "speed": jnp.ones(2)}

    step = lambda key, state, action, params: pjp.Step(
        0, observe(key), jnp.float32(1), jnp.bool_(True), jnp.bool_(False)
    )
    spaces = {"board": pjp.MultiDiscrete(np.full((4, 4), 3)), "speed": pjp.Box(shape=(2,))}
    env = pjp.Env(lambda key, params: (0, observe(key)), step, (), pjp.Discrete(2), spaces)
    ppo = pjp.make_ppo(env, replace(CONFIG, encoder="cnn"))
    state, metrics = jax.jit(ppo.train)(ppo.init(key))
    kernels = {name: x.shape for name, x in state.policy.params["params"]["actor"]["CNN_0"].items() if "ker" in name}
    assert kernels == {"kernel": (3, 3, 3, 16)} and np.isfinite(metrics["loss"]).all()
    weight = state.policy.params["params"]["actor"]["CNN_0"]["Dense_0"]["weight"]
    assert weight.shape == (8, 2 * 2 * 16 + 2)
