"""Recipes: what a researcher changes from outside, each complete with what it imports above.

A recipe is all that stands in its test before `# In use`, and needs nothing but this file.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import purejaxppo as pjp
from probes import SMALL
from purejaxppo.advantages import estimate

pytestmark = pytest.mark.full

CONFIG = pjp.Config(num_envs=4, num_steps=16, num_updates=4, num_epochs=2, num_minibatches=2, widths=(8,))
FAST = pjp.Hyperparams(learning_rate=1e-2)


def train(ppo, hyperparams=FAST):
    return jax.jit(ppo.train)(ppo.init(jax.random.key(0), hyperparams))


def test_another_surrogate():
    """Simple policy optimization (Xie et al., 2024): a quadratic penalty of the ratio in place of the clip."""

    def spo(log_ratio, advantage, clip):
        ratio = jnp.exp(log_ratio)
        return -(ratio * advantage - jnp.abs(advantage) / (2 * clip) * (ratio - 1) ** 2).mean()

    ppo = pjp.make_ppo("CartPole-v1", CONFIG, loss=partial(pjp.ppo_loss, surrogate=spo))

    # In use
    np.testing.assert_allclose(spo(jnp.log(jnp.array([1.3])), jnp.array([2.0]), 0.2), -(2.6 - 5 * 0.09), rtol=1e-5)
    assert np.isfinite(train(ppo)[1]["policy_loss"]).all()


def test_an_exact_kl_penalty_with_a_swept_coefficient():
    def penalized(params, minibatch, hyperparams, *, network, config):
        loss, report = pjp.ppo_loss(params, minibatch, hyperparams, network=network, config=config)
        _, new, _ = network.apply(params, minibatch.memory, minibatch.obs, minibatch.first)
        kl = minibatch.distribution.kl(new).mean()
        total = loss + hyperparams.extra["beta"] * kl
        return total, report | {"loss": total, "kl": kl}

    # In use
    ppo = pjp.batched(pjp.make_ppo("CartPole-v1", replace(CONFIG, num_epochs=8), loss=penalized))
    keys, hyperparams = pjp.runs(jax.random.key(0), pjp.grid(**{"extra.beta": [0.0, 100.0]}), 2, FAST)
    _, metrics = jax.jit(ppo.train)(ppo.init(keys, hyperparams))
    kl = metrics["kl"].mean(1).reshape(2, 2)
    assert (kl[1] < 0.5 * kl[0]).all() and (kl > 0).all()


def test_an_auxiliary_loss_with_its_own_head():
    """The network predicts the next observation; another attribute of it is read by the loss alone."""

    class Predicting(nn.Module):
        @nn.compact
        def __call__(self, obs):
            x = nn.tanh(nn.Dense(32)(obs))
            return pjp.Categorical(nn.Dense(2)(x)), nn.Dense(1)(x)[..., 0], nn.Dense(4)(x)

    full = pjp.from_linen(Predicting())
    first_three = lambda *args: full.apply(*args)[:3]
    network = SimpleNamespace(**full._asdict() | {"apply": first_three, "predict": full.apply})

    def loss(params, minibatch, hyperparams, *, network, config):
        loss, report = pjp.ppo_loss(params, minibatch, hyperparams, network=network, config=config)
        *_, prediction = network.predict(params, minibatch.memory, minibatch.obs, minibatch.first)
        error = ((prediction - minibatch.next_obs) ** 2).mean()
        return loss + error, report | {"loss": loss + error, "prediction_error": error}

    # In use
    _, metrics = train(pjp.make_ppo("CartPole-v1", replace(CONFIG, num_updates=12), network=network, loss=loss))
    assert metrics["prediction_error"][-1] < 0.3 * metrics["prediction_error"][0]


class RNDState(pjp.TrainState):
    rnd: Any  # parameters of the predictor, state of its optimizer, parameters of the target


def make_rnd(config):
    """Random network distillation (Burda et al., 2019): what the predictor does not know yet is worth a bonus."""
    network: Any = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(16)])
    optimizer = optax.adam(1e-3)

    def init(ppo, key, *args):
        state = ppo.init(key, *args)
        keys = jax.random.split(jax.random.fold_in(key, 1))
        predictor, target = (network.init(key, state.actors.obs) for key in keys)
        return RNDState(**vars(state), rnd=(predictor, optimizer.init(predictor), target))

    def curiosity(rnd, obs):
        predictor, opt_state, target = rnd

        def error(predictor):
            errors = ((network.apply(predictor, obs) - network.apply(target, obs)) ** 2).mean(-1)
            return errors.mean(), errors

        grads, bonus = jax.grad(error, has_aux=True)(predictor)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(predictor, updates), opt_state, target), bonus

    def step(ppo, state):
        state, rollout = ppo.collect(state)
        rnd, bonus = curiosity(state.rnd, rollout.next_obs)
        reward = rollout.reward + state.hyperparams.extra["curiosity"] * bonus
        rollout = rollout.replace(reward=reward, metrics=rollout.metrics | {"bonus": bonus})
        return ppo.learn(state.replace(rnd=rnd), rollout)

    return pjp.with_step(pjp.make_ppo("CartPole-v1", config), step, init)


def test_random_network_distillation():
    # In use
    config = replace(CONFIG, scale_reward=True, num_updates=30)
    state, metrics = train(make_rnd(config), replace(FAST, extra={"curiosity": 1.0}))
    assert metrics["bonus"][-1] < 0.5 * metrics["bonus"][0]
    known = ~np.isnan(metrics["episode_return"])
    np.testing.assert_array_equal(metrics["episode_return"][known], metrics["episode_length"][known])


def test_percentile_scaling():
    """Advantages over the range of returns from the 5th to the 95th percentile (DreamerV3, Hafner et al., 2023)."""

    def loss(params, minibatch, hyperparams, *, network, config):
        scaled = minibatch.advantage / jnp.maximum(1.0, hyperparams.extra["range"])
        low, high = jnp.percentile(minibatch.target, jnp.array([5.0, 95.0]))
        minibatch = minibatch.replace(advantage=scaled)
        loss, report = pjp.ppo_loss(params, minibatch, hyperparams, network=network, config=config)
        return loss, report | {"range": high - low}

    def step(ppo, state):
        state, metrics = ppo.step(state)
        mean = 0.99 * state.hyperparams.extra["range"] + 0.01 * metrics["range"]
        return state.replace(hyperparams=state.hyperparams.set({"extra.range": mean})), metrics

    config = replace(CONFIG, normalize_advantage="off")
    ppo = pjp.with_step(pjp.make_ppo("CartPole-v1", config, loss=loss), step)

    # In use
    state, metrics = train(ppo, replace(FAST, extra={"range": 0.0}))
    weights = 0.01 * 0.99 ** np.arange(3, -1, -1)
    np.testing.assert_allclose(state.hyperparams.extra["range"], (weights * metrics["range"]).sum(), rtol=1e-5)


def test_a_curriculum_over_environment_parameters():
    def step(ppo, state):
        length = 0.2 + 0.3 * state.num_updates / ppo.config.num_updates
        return ppo.step(state.replace(env_params=state.env_params.replace(length=length)))

    ppo = pjp.with_step(pjp.make_ppo("CartPole-v1", CONFIG), step)

    # In use
    state, _ = train(ppo)
    np.testing.assert_allclose(state.env_params.length, 0.2 + 0.3 * 3 / 4)


def test_a_lagrange_multiplier_of_a_constraint():
    """A pole that leans costs; the multiplier rises while the mean cost is above its limit."""
    base = pjp.make_env("CartPole-v1")

    def leaning(key, state, action, params):
        result = base.step(key, state, action, params)
        return result._replace(metrics={"cost": jnp.abs(result.obs[2])})

    def step(ppo, state):
        state, rollout = ppo.collect(state)
        multiplier, cost = state.hyperparams.extra["multiplier"], rollout.metrics["cost"]
        state, metrics = ppo.learn(state, rollout.replace(reward=rollout.reward - multiplier * cost))
        multiplier = jnp.maximum(0.0, multiplier + 10 * (metrics["cost"] - 0.01))
        return state.replace(hyperparams=state.hyperparams.set({"extra.multiplier": multiplier})), metrics

    ppo = pjp.with_step(pjp.make_ppo(base._replace(step=leaning), CONFIG), step)

    # In use
    state, metrics = train(ppo, replace(FAST, extra={"multiplier": 0.0}))
    assert (metrics["cost"] > 0.01).all()
    np.testing.assert_allclose(state.hyperparams.extra["multiplier"], 10 * (metrics["cost"] - 0.01).sum(), rtol=1e-5)


class PPGState(pjp.TrainState):
    aux_opt_state: Any
    obs: Any  # [K, T, N, ...] of the policy phase
    target: jax.Array  # [K, T, N] of the value


def test_phasic_policy_gradient():
    """PPG (Cobbe et al., 2021): every K cycles the policy's network learns values too, held to its policy by a KL."""
    num_policy_cycles, num_auxiliary_epochs, optimizer = 2, 6, optax.adam(1e-3)

    class Heads(nn.Module):
        @nn.compact
        def __call__(self, obs):
            policy, value = (nn.tanh(nn.Dense(32)(nn.tanh(nn.Dense(32)(obs)))) for _ in range(2))
            return pjp.Categorical(nn.Dense(2)(policy)), nn.Dense(1)(value)[..., 0], nn.Dense(1)(policy)[..., 0]

    full = pjp.from_linen(Heads())
    without_auxiliary = lambda *args: full.apply(*args)[:3]
    network = SimpleNamespace(**full._asdict() | {"apply": without_auxiliary, "heads": full.apply})

    def init(ppo, key, *args):
        state, shape = ppo.init(key, *args), (num_policy_cycles, ppo.config.num_steps)
        obs = jnp.zeros((*shape, *state.actors.obs.shape))
        opt_state = optimizer.init(state.policy.params)
        return PPGState(**vars(state), aux_opt_state=opt_state, obs=obs, target=obs[..., 0])

    def targets(ppo, state, rollout):
        apply = partial(ppo.network.apply, state.policy.params, ())
        value, next_value = (apply(obs, rollout.first)[2] for obs in (rollout.obs, rollout.next_obs))
        discount, gae_lambda = state.hyperparams.discount, state.hyperparams.gae_lambda
        ends = rollout.terminated, rollout.done
        return value + pjp.gae(rollout.reward, value, next_value, *ends, discount, gae_lambda)

    def auxiliary_phase(ppo, state):
        obs, target = (x.reshape(-1, *x.shape[2:]) for x in (state.obs, state.target))
        heads = lambda params: ppo.network.heads(params, (), obs, jnp.zeros(target.shape, bool))[1:]
        old_distribution, *_ = heads(state.policy.params)

        def joint_loss(params):
            distribution, value, auxiliary_value = heads(params)
            errors = (value - target) ** 2 + (auxiliary_value - target) ** 2
            return 0.5 * errors.mean() + old_distribution.kl(distribution).mean()

        def epoch(carry, _):
            params, opt_state = carry
            loss, grads = jax.value_and_grad(joint_loss)(params)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), loss

        carry = state.policy.params, state.aux_opt_state
        (params, opt_state), losses = jax.lax.scan(epoch, carry, length=num_auxiliary_epochs)
        return state.replace(policy=state.policy.replace(params=params), aux_opt_state=opt_state), losses.mean()

    def step(ppo, state):
        state, rollout = ppo.collect(state)
        cycle = state.num_updates % num_policy_cycles
        target = state.target.at[cycle].set(targets(ppo, state, rollout))
        state = state.replace(obs=state.obs.at[cycle].set(rollout.obs), target=target)
        state, metrics = ppo.learn(state, rollout)
        due = cycle == num_policy_cycles - 1
        skip = lambda state: (state, jnp.nan)
        state, loss = jax.lax.cond(due, partial(auxiliary_phase, ppo), skip, state)
        return state, metrics | {"auxiliary_loss": loss}

    ppo = pjp.with_step(pjp.make_ppo("CartPole-v1", CONFIG, network=network), step, init)

    # In use
    state, metrics = train(ppo)
    np.testing.assert_array_equal(np.isnan(metrics["auxiliary_loss"]), [True, False, True, False])
    assert state.aux_opt_state[0].count == 12 and (state.target != 0).all()


def test_a_recurrent_network_of_a_user():
    class LSTM(nn.Module):
        @nn.compact
        def __call__(self, memory, obs, first):
            def step(cell, memory, inputs):
                obs, first = inputs
                return cell(jax.tree.map(lambda m: jnp.where(first[:, None], 0, m), memory), obs)

            scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
            memory, x = scan(nn.OptimizedLSTMCell(64), memory, (obs, first))
            return memory, pjp.Categorical(nn.Dense(2)(x)), nn.Dense(1)(x)[..., 0]

    module = LSTM()
    network = pjp.Network(lambda batch: (jnp.zeros((batch, 64)),) * 2, module.init, module.apply)
    ppo = pjp.make_ppo("CartPole-v1", replace(CONFIG, segment_length=8), network=network)

    # In use
    state, metrics = train(ppo)
    assert np.isfinite(metrics["loss"]).all() and (state.actors.memory[0] != 0).any()
    with pytest.raises(ValueError, match="segment_length=1"):
        pjp.make_ppo("CartPole-v1", CONFIG, network=network)


def test_a_meta_gradient_through_training():
    ppo = pjp.make_ppo("CartPole-v1", replace(CONFIG, num_updates=2))

    def last_value_loss(rate, state):
        state = state.replace(hyperparams=state.hyperparams.set({"learning_rate": rate}))
        return ppo.train(state)[1]["value_loss"][-1]

    meta_gradient = jax.jit(jax.grad(last_value_loss))

    # In use
    state = ppo.init(jax.random.key(0), replace(FAST, learning_rate_annealing=0.0))
    slope, rate, width = meta_gradient(jnp.float32(1e-3), state), jnp.float32(1e-3), jnp.float32(1e-4)
    after, before = (jax.jit(last_value_loss)(x, state) for x in (rate + width, rate - width))
    difference = after - before
    np.testing.assert_allclose(slope, difference / (2 * width), rtol=0.05)


def test_an_evolution_strategy_over_hyperparameters():
    many = pjp.batched(pjp.make_ppo("CartPole-v1", replace(CONFIG, num_updates=20)))

    @jax.jit
    def generation(key, mean):
        """The mean log learning rate after eight runs around it: towards those with longer episodes."""
        noise_key, run_key = jax.random.split(key)
        noise = 0.5 * jax.random.normal(noise_key, (8,))
        state = many.init(jax.random.split(run_key, 8), pjp.Hyperparams(learning_rate=jnp.exp(mean + noise)))
        fitness = jnp.nanmean(many.train(state)[1]["episode_return"][:, -5:], axis=1)
        return mean + (jax.nn.softmax(fitness - fitness.max()) * noise).sum(), fitness

    # In use
    mean, fitness = generation(jax.random.key(0), jnp.log(1e-3))
    assert fitness.shape == (8,) and (fitness > 10).all() and abs(mean - np.log(1e-3)) > 1e-3


def test_early_stopping_in_the_program():
    ppo = pjp.make_ppo("CartPole-v1", replace(CONFIG, num_updates=1000))

    @jax.jit
    def train_until(state, goal):
        first = ppo.step(state)
        unsolved = lambda carry: ~(carry[1]["episode_return"] > goal) & (carry[0].num_updates < 1000)
        return jax.lax.while_loop(unsolved, lambda carry: ppo.step(carry[0]), first)

    # In use
    state, metrics = train_until(ppo.init(jax.random.key(0), FAST), 40.0)
    assert metrics["episode_return"] > 40 and state.num_updates < 1000


def test_continuing_with_another_learning_rate():
    """Schedules end at the last update of a config, so the longer run has a config with more."""
    ppo = pjp.make_ppo("CartPole-v1", CONFIG)
    first = pjp.fit(ppo, ppo.init(jax.random.key(0), FAST), progress=False)
    more = pjp.make_ppo("CartPole-v1", replace(CONFIG, num_updates=6))
    state = pjp.with_hyperparams(first.state, learning_rate=1e-4, learning_rate_annealing=0.0)
    second = pjp.fit(more, state, progress=False)

    # In use
    np.testing.assert_array_equal(second.metrics["updates"], [5, 6])
    np.testing.assert_allclose(second.metrics["learning_rate"], 1e-4, rtol=1e-6)


def test_fine_tuning_from_a_policy():
    """A new optimizer and new environments; the normalisers come with the policy."""
    ppo = pjp.make_ppo("CartPole-v1", CONFIG)
    policy = train(ppo)[0].policy
    state = ppo.init(jax.random.key(1), pjp.Hyperparams(learning_rate=0.0)).replace(policy=policy)

    # In use
    chex.assert_trees_all_equal(jax.jit(ppo.step)(state)[0].policy, policy)


def test_reading_the_policies_of_a_training():
    ppo = pjp.make_ppo("CartPole-v1", CONFIG)

    def step(state, _):
        state, metrics = ppo.step(state)
        return state, (state.policy, metrics)

    # In use
    state, (policies, _) = jax.jit(partial(jax.lax.scan, step, length=4))(ppo.init(jax.random.key(0), FAST))
    played = jax.vmap(partial(ppo.evaluate, num_episodes=2), in_axes=(None, 0))(jax.random.key(1), policies)
    assert played.episode_return.shape == (4, 2)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[-1], policies), state.policy)


def test_parameters_back_into_a_module_of_nnx():
    class Module(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 8, rngs=rngs)
            self.logits, self.value = nnx.Linear(8, 2, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, obs):
            x = nnx.tanh(self.hidden(obs))
            return pjp.Categorical(self.logits(x)), self.value(x)[..., 0]

    ppo = pjp.make_ppo("CartPole-v1", CONFIG, network=pjp.from_nnx(lambda rngs: Module(rngs)))
    state, _ = train(ppo)
    module = Module(nnx.Rngs(0))
    nnx.update(module, nnx.State(state.policy.params))

    # In use
    obs = jnp.array([[0.1, 0.2, -0.1, 0.3]])
    _, ours, value = ppo.network.apply(state.policy.params, (), obs[None], jnp.zeros((1, 1), bool))
    chex.assert_trees_all_close((ours.logits[0], value[0]), (module(obs)[0].logits, module(obs)[1]), rtol=1e-6)


def test_another_loss():
    def penalized_loss(params, minibatch, hyperparams, *, network, config):
        loss, report = pjp.ppo_loss(params, minibatch, hyperparams, network=network, config=config)
        weight = sum((x**2).sum() for x in jax.tree.leaves(params))
        return loss + 0.5 * weight, report | {"weight": weight}

    # In use
    _, metrics = train(pjp.make_ppo("CartPole-v1", CONFIG, loss=penalized_loss))
    assert metrics["weight"].shape == (4,) and (jnp.diff(metrics["weight"]) < 0).all()


def test_another_network():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, obs):
            x = nn.gelu(nn.Dense(128)(obs))
            return pjp.Categorical(nn.Dense(2)(x)), nn.Dense(1)(x)[..., 0]

    # In use
    state, _ = train(pjp.make_ppo("CartPole-v1", CONFIG, network=Wide()))
    assert state.policy.params["params"]["Dense_0"]["kernel"].shape == (4, 128)


def test_another_optimizer():
    def sgd(hyperparams):
        return optax.sgd(hyperparams.learning_rate, momentum=0.9)

    # In use
    state, _ = train(pjp.make_ppo("CartPole-v1", CONFIG, optimizer=sgd))
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

    # In use
    assert pjp.check_env(pjp.time_limit(walk, 50)) == []
    config = replace(CONFIG, num_envs=16, num_steps=50, num_updates=60, num_minibatches=8)
    _, metrics = train(pjp.make_ppo(pjp.time_limit(walk, 50), config), pjp.Hyperparams(learning_rate=3e-3))
    assert metrics["episode_return"][-5:].mean() > metrics["episode_return"][:5].mean() / 2


def test_the_gradient_of_a2c_is_the_plain_one():
    """log-likelihood times advantage, half the square error, and the entropy, written out."""
    config, hyperparams = pjp.a2c(num_envs=4, num_updates=2)
    ppo = pjp.make_ppo("CartPole-v1", config)
    parts = {"network": ppo.network, "config": config}
    state, rollout = jax.jit(ppo.collect)(ppo.init(jax.random.key(0), hyperparams))
    batch = estimate(state.policy, rollout, rollout.reward, state.actors.memory, hyperparams, **parts)

    def plain_loss(params):
        _, distribution, value = ppo.network.apply(params, (), batch.obs, batch.first)
        log_prob = jax.nn.log_softmax(distribution.logits)
        chosen = jnp.where(batch.action == 0, log_prob[..., 0], log_prob[..., 1])
        entropy = -(jnp.exp(log_prob) * log_prob).sum(-1)
        return (-chosen * batch.advantage + 0.5 * 0.5 * (value - batch.target) ** 2 - 0.01 * entropy).mean()

    ours = jax.grad(lambda params: pjp.ppo_loss(params, batch, hyperparams, **parts)[0])(state.policy.params)
    plain = jax.grad(plain_loss)(state.policy.params)
    chex.assert_trees_all_close(ours, plain, rtol=1e-4, atol=1e-6)
    assert max(jnp.abs(x).max() for x in jax.tree.leaves(plain)) > 0.01


def test_a2c_takes_one_gradient_step_per_rollout():
    config, hyperparams = pjp.a2c()
    assert config.num_epochs * config.num_minibatches == 1 and hyperparams.clip == float("inf")


def test_metrics_of_16_bits_are_kept_as_float32(tmp_path, key):
    def step(ppo, state):
        state, metrics = ppo.step(state)
        return state, metrics | {"narrow": jnp.bfloat16(1.5)}

    ppo = pjp.with_step(pjp.make_ppo("CartPole-v1", SMALL), step)
    result = pjp.fit(ppo, pjp.first_state(ppo, key), folder=tmp_path, progress=False)
    assert not result.unsaved and pjp.load(tmp_path, ppo).metrics["narrow"].dtype == np.float32
