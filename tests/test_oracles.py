"""Our mathematics against independent libraries, by the numbers that oracles/make_numbers.py kept of them."""

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from purejaxppo import (
    Categorical,
    Config,
    Discrete,
    Env,
    Hyperparams,
    MultiCategorical,
    Network,
    Normal,
    Step,
    TanhNormal,
)
from purejaxppo.advantages import gae, scale_rewards
from purejaxppo.collectives import gather_shards
from purejaxppo.loss import approximate_kl, policy_loss, ppo_loss, value_loss
from purejaxppo.normalize import measure, merge, no_moments, standardize
from purejaxppo.rollout import Policy, act_and_step, discounted_returns, draw_ahead, start
from purejaxppo.update import Batch, adam

NUMBERS = json.loads((Path(__file__).parent / "oracles" / "numbers.json").read_text())
UNUSED: Any = None  # for fields that the functions under test do not read


def cases(topic):
    return pytest.mark.parametrize("case", NUMBERS[topic])


def arrays(case, *names):
    """Numbers as float32, whole ones as int32."""
    found = [np.asarray(case[name]) for name in names]
    return [jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else jnp.float32) for x in found]


def assert_agrees(function, case, expected, *names):
    """Values of a function of the inputs named, and the gradients of their sum in each."""

    def summed(inputs):
        value = function(*inputs)
        return value.sum(), value

    gradients, value = jax.jit(jax.grad(summed, has_aux=True))(arrays(case, *names))
    np.testing.assert_allclose(value, expected["value"], rtol=2e-5, atol=2e-6)
    assert set(names) == set(expected["gradients"])
    for name, gradient in zip(names, gradients):
        np.testing.assert_allclose(gradient, expected["gradients"][name], rtol=2e-5, atol=2e-6, err_msg=name)


@cases("gae")
def test_advantages_with_terminations_and_truncations_are_those_of_torchrl(case):
    inputs = arrays(case, "reward", "value", "next_value", "terminated", "done")
    advantage = gae(*inputs, discount=case["discount"], gae_lambda=case["gae_lambda"])
    np.testing.assert_allclose(advantage, case["advantage"], rtol=1e-5, atol=1e-5)


@cases("gae_of_terminations")
def test_advantages_with_terminations_are_those_of_stable_baselines3_and_rlax(case):
    reward, value, last_value, ends = arrays(case, "reward", "value", "last_value", "terminated")
    next_value = jnp.concatenate([value[1:], last_value[None]])
    advantage = gae(reward, value, next_value, ends, ends, case["discount"], case["gae_lambda"])
    for oracle in ("stable_baselines3", "rlax"):
        np.testing.assert_allclose(advantage, case[oracle]["advantage"], rtol=1e-5, atol=1e-5, err_msg=oracle)
    np.testing.assert_allclose(advantage + value, case["stable_baselines3"]["target"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("oracle", ["torch", "rlax"])
@cases("policy_loss")
def test_the_policy_loss_and_its_gradient_are_those_of_torch_and_rlax(case, oracle):
    (advantage,) = arrays(case, "advantage")
    assert_agrees(lambda log_ratio: policy_loss(log_ratio, advantage, case["clip"]), case, case[oracle], "log_ratio")


@cases("value_loss")
def test_the_value_loss_and_its_gradient_are_those_of_torch(case):
    old_value, target = arrays(case, "old_value", "target")
    assert_agrees(lambda value: value_loss(value, old_value, target, case["clip"]), case, case["torch"], "value")


@cases("approximate_kl")
def test_the_approximate_kl_is_that_of_torch(case):
    assert_agrees(approximate_kl, case, case["torch"], "log_ratio")


@cases("ppo_loss")
def test_the_whole_loss_its_report_and_its_gradient_are_those_of_torchrl(case):
    def apply(weights, memory, obs, first):
        return memory, Categorical(obs @ weights["actor"]), (obs @ weights["critic"])[..., 0]

    names = ("obs", "action", "log_prob", "value", "advantage", "target")
    batch = Batch(first=UNUSED, memory=(), **dict(zip(names, (x[None] for x in arrays(case["batch"], *names)))))
    weights = dict(zip(("actor", "critic"), arrays(case["weights"], "actor", "critic")))
    loss = partial(ppo_loss, network=Network(UNUSED, UNUSED, apply), config=Config(normalize_advantage="off"))
    (_, report), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        weights, batch, Hyperparams(**case["hyperparams"])
    )
    for name, expected in case["report"].items():
        np.testing.assert_allclose(report[name], expected, rtol=1e-5, err_msg=name)
    for name, expected in case["gradients"].items():
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", ["log_prob", "entropy"])
def test_categorical_masked_or_not_is_that_of_torch(method):
    case = NUMBERS["categorical"]

    def values(logits):
        masked = Categorical(jnp.where(jnp.array(case["allowed"], bool), logits, -jnp.inf))
        return ask(masked, method, case)

    assert_agrees(values, case, case[method], "logits")


@pytest.mark.parametrize("method", ["log_prob", "entropy"])
def test_multi_categorical_is_that_of_stable_baselines3(method):
    case = NUMBERS["multi_categorical"]
    sizes = tuple(case["sizes"])
    assert_agrees(lambda logits: ask(MultiCategorical(logits, sizes), method, case), case, case[method], "logits")


@pytest.mark.parametrize("method", ["log_prob", "entropy"])
def test_normal_is_that_of_torch(method):
    case = NUMBERS["normal"]
    assert_agrees(lambda loc, scale: ask(Normal(loc, scale), method, case), case, case[method], "loc", "scale")


@pytest.mark.parametrize(
    "topic, method",
    [
        ("tanh_normal", "log_prob"),
        ("tanh_normal", "entropy"),
        ("wide_tanh_normal", "log_prob"),
        ("wide_tanh_normal", "entropy"),
    ],
)
def test_tanh_normal_between_bounds_is_that_of_torch_and_its_entropy_the_integral(topic, method):
    case = NUMBERS[topic]
    low, high = (jnp.broadcast_to(x, np.shape(case["loc"])) for x in arrays(case, "low", "high"))

    def values(loc, scale):
        return ask(TanhNormal(loc, scale, low, high), method, case)

    assert_agrees(values, case, case[method], "loc", "scale")


def ask(distribution, method, case):
    return distribution.log_prob(*arrays(case, "action")) if method == "log_prob" else distribution.entropy()


def test_running_moments_and_what_they_standardise_are_those_of_stable_baselines3():
    case = NUMBERS["moments"]
    moments = no_moments((3,))
    for batch, after in zip(case["batches"], case["after"], strict=True):
        moments = merge(moments, gather_shards(measure(jnp.array(batch, jnp.float32), axes=0)))
        for name, expected in after.items():
            np.testing.assert_allclose(getattr(moments, name), expected, rtol=1e-5, err_msg=name)
    standardized = standardize(moments, jnp.array(case["batches"][-1], jnp.float32), case["clip"])
    np.testing.assert_allclose(standardized, case["standardized"], rtol=1e-4, atol=1e-5)


@cases("reward_scaling")
def test_discounted_returns_and_scaled_rewards_are_those_of_stable_baselines3(case):
    num_steps, num_envs = np.shape(case["reward"])
    config = Config(num_envs=num_envs, num_steps=num_steps, scale_reward=True, reward_clip=case["clip"])
    policy = Policy(params=(), observation=(), reward=no_moments())
    actors, rollout = play_script(case, policy, config)
    _, returns = discounted_returns(actors.discounted_return, rollout.reward, rollout.done, case["discount"])
    return_after_reset = jnp.where(rollout.done, 0, returns)
    np.testing.assert_allclose(return_after_reset, case["return_after_reset"], rtol=1e-5, atol=1e-6)
    policy, actors, scaled = scale_rewards(policy, actors, rollout, case["discount"], config)
    for name, expected in case["moments"].items():
        np.testing.assert_allclose(getattr(policy.reward, name), expected, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(scaled, case["scaled"], rtol=1e-5)
    np.testing.assert_allclose(actors.discounted_return, return_after_reset[-1])


def play_script(case, policy, config):
    """Our rollout of an environment whose state, given before every step, says what the step will give."""
    reward, terminated, truncated = arrays(case, "reward", "terminated", "truncated")
    script = {"reward": reward, "terminated": terminated == 1, "truncated": truncated == 1}
    nothing = jax.tree.map(lambda x: jnp.zeros_like(x[0, 0]), script)
    env = Env(
        reset=lambda key, params: (nothing, jnp.zeros(1)),
        step=lambda key, state, action, params: Step(state=state, obs=jnp.zeros(1), **state),
        params=(),
        action_space=Discrete(2),
    )

    def apply(params, memory, obs, first):
        return memory, Categorical(jnp.zeros((*first.shape, 2))), jnp.zeros(first.shape)

    network = Network(initial_memory=lambda batch: (), init=UNUSED, apply=apply)
    key = jax.random.key(0)
    draws = jax.tree.map(
        lambda x: x[0],
        draw_ahead(key, Categorical(jnp.zeros((config.num_steps, config.num_envs, 2))), (), env=env, config=config),
    )

    def step(actors, row):
        return act_and_step(draws, actors.replace(env_state=row), policy, (), env=env, network=network, config=config)

    actors = start(key, (), env=env, network=network, num_envs=config.num_envs)
    return jax.lax.scan(step, actors, script)


@cases("adam")
def test_five_bounded_steps_of_adam_are_those_of_torch(case):
    transformation = adam(Hyperparams(**case["hyperparams"]))
    gradients = {name: jnp.array(x) for name, x in case["gradients"].items()}
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), gradients)
    opt_state = transformation.init(params)
    update = jax.jit(transformation.update)
    for step in range(5):
        updates, opt_state = update(jax.tree.map(lambda x: x[step], gradients), opt_state, params)
        params = optax.apply_updates(params, updates)
        for name, after in case["after"].items():
            np.testing.assert_allclose(
                cast(dict, params)[name], after[step], rtol=2e-5, atol=1e-6, err_msg=f"{name}, step {step}"
            )


def test_the_kept_numbers_are_those_of_the_libraries():
    for library in ("torch", "torchrl", "tensordict", "rlax", "stable_baselines3"):
        pytest.importorskip(library)
    from oracles import make_numbers

    kept = {topic: numbers for topic, numbers in NUMBERS.items() if topic != "versions"}
    fresh = make_numbers.all_numbers()
    assert jax.tree.structure(kept) == jax.tree.structure(fresh)
    np.testing.assert_allclose(jax.tree.leaves(kept), jax.tree.leaves(fresh), rtol=1e-5, atol=1e-6)
