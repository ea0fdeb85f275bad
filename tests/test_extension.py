"""What a researcher changes from outside, a few lines each: the loss, the network, the environment, the optimizer."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import purejaxppo as pjp
from probes import SMALL, copy_cue
from purejaxppo.experiment.presets import a2c
from purejaxppo.loss import ppo_loss
from purejaxppo.ppo import estimate
from purejaxppo.rollout import collect


def train(ppo, hyperparams=pjp.Hyperparams(learning_rate=1e-2)):
    return jax.jit(ppo.train)(ppo.init(jax.random.key(0), hyperparams))


def test_another_loss():
    def penalized_loss(params, minibatch, hyperparams, *, network, config):
        loss, report = ppo_loss(params, minibatch, hyperparams, network=network, config=config)
        weight = sum((x**2).sum() for x in jax.tree.leaves(params))
        return loss + 0.5 * weight, report | {"weight": weight}

    _, metrics = train(pjp.make_ppo(copy_cue(), SMALL, loss=penalized_loss))
    assert metrics["weight"].shape == (3,) and (jnp.diff(metrics["weight"]) < 0).all()


def test_another_network():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, obs):
            x = nn.gelu(nn.Dense(128)(obs))
            return pjp.Categorical(nn.Dense(2)(x)), nn.Dense(1)(x)[..., 0]

    state, _ = train(pjp.make_ppo(copy_cue(), SMALL, network=Wide()))
    assert state.policy.params["params"]["Dense_0"]["kernel"].shape == (2, 128)


def test_another_optimizer():
    def sgd(hyperparams):
        return optax.sgd(hyperparams.learning_rate, momentum=0.9)

    state, _ = train(pjp.make_ppo(copy_cue(), SMALL, optimizer=sgd))
    assert "TraceState" in str(jax.tree.structure(state.opt_state))


def test_another_environment():
    def reset(key, params):
        position = jax.random.uniform(key, minval=-1.0)
        return position, position[None]

    def step(key, position, action, params):
        position = position + params["stride"] * action[0]
        reward = -jnp.abs(position)
        return pjp.Step(position, position[None], reward, jnp.abs(position) > 3, jnp.bool_(False))

    walk = pjp.Env(reset, step, params={"stride": 0.1}, action_space=pjp.Box(-1.0, 1.0, (1,)))
    assert pjp.check_env(pjp.time_limit(walk, 50)) == []
    config = dataclasses.replace(SMALL, num_envs=16, num_steps=50, num_updates=60, num_minibatches=8)
    _, metrics = train(pjp.make_ppo(pjp.time_limit(walk, 50), config), pjp.Hyperparams(learning_rate=3e-3))
    assert metrics["episode_return"][-5:].mean() > metrics["episode_return"][:5].mean() / 2


def test_the_gradient_of_a2c_is_the_plain_one():
    """log-likelihood times advantage, half the square error, and the entropy, written out."""
    config, hyperparams = a2c(num_envs=4, num_updates=2)
    ppo = pjp.make_ppo("CartPole-v1", config)
    state = ppo.init(jax.random.key(0), hyperparams)
    parts = {"network": ppo.network, "config": config}
    actors, transitions = collect(
        jax.random.key(1), state.actors, state.policy, state.env_params, 0.99, env=ppo.env, **parts
    )
    batch = estimate(state.policy, transitions, transitions.reward, actors.memory, hyperparams, **parts)

    def plain_loss(params):
        _, distribution, value = ppo.network.apply(params, (), batch.obs, batch.first)
        log_prob = jax.nn.log_softmax(distribution.logits)
        chosen = jnp.where(batch.action == 0, log_prob[..., 0], log_prob[..., 1])
        entropy = -(jnp.exp(log_prob) * log_prob).sum(-1)
        return (-chosen * batch.advantage + 0.5 * 0.5 * (value - batch.target) ** 2 - 0.01 * entropy).mean()

    ours = jax.grad(lambda params: ppo_loss(params, batch, hyperparams, **parts)[0])(state.policy.params)
    plain = jax.grad(plain_loss)(state.policy.params)
    chex.assert_trees_all_close(ours, plain, rtol=1e-4, atol=1e-6)
    assert max(jnp.abs(x).max() for x in jax.tree.leaves(plain)) > 0.01


def test_a2c_takes_one_gradient_step_per_rollout():
    config, hyperparams = a2c()
    assert config.num_epochs * config.num_minibatches == 1 and hyperparams.clip == float("inf")
