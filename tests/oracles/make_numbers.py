"""Writes numbers.json: what independent libraries make of fixed random inputs.

Needs the extra `oracles`: python tests/oracles/make_numbers.py. Inputs are rounded before the libraries see them, so
that the file holds exactly what they saw. torch works in double precision, rlax and stable-baselines3 as they do.
"""

import json
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import rlax
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import MultiCategoricalDistribution
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch.distributions import (
    AffineTransform,
    Categorical,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
)
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.functional import generalized_advantage_estimate

NUMBERS = Path(__file__).with_name("numbers.json")
LIBRARIES = ("torch", "torchrl", "tensordict", "rlax", "stable-baselines3")


def all_numbers():
    """Every topic's cases, as json holds them; each has a generator of its own, so that none moves another."""
    numbers = {
        "gae": [gae(0, 0.99, 0.95), gae(1, 0.9, 0.8), gae(2, 0.997, 1), gae(3, 0.5, 0), gae(4, 1, 0.9)],
        "gae_of_terminations": [gae_of_terminations(0, 0.99, 0.95), gae_of_terminations(1, 0.8, 1)],
        "policy_loss": [policy_loss(0, 0.1), policy_loss(1, 0.2), policy_loss(2, 0.3)],
        "value_loss": [value_loss(0, 0.1), value_loss(1, 0.2), value_loss(2, 1.0)],
        "approximate_kl": [approximate_kl(0, 0.05), approximate_kl(1, 0.3), approximate_kl(2, 1.0)],
        "ppo_loss": [ppo_loss(0, 0.2, 0.2, 0.5, 0.01), ppo_loss(1, 0.1, 0.5, 1.0, 0.3)],
        "categorical": categorical(0),
        "multi_categorical": multi_categorical(0),
        "normal": normal(0),
        "tanh_normal": tanh_normal(0, 0.1, 0.8),
        "wide_tanh_normal": tanh_normal(1, 1.0, 3.0),
        "moments": moments(0),
        "reward_scaling": [reward_scaling(0, 0.9), reward_scaling(1, 0.99)],
        "adam": [adam(0, 0.5), adam(1, 2.0)],
    }
    return plain(numbers)


def gae(seed, discount, gae_lambda, num_steps=24, num_envs=3):
    """torchrl reads time from the second last axis, so [T, N] is what it wants."""
    rng = np.random.default_rng(seed)
    reward, value, next_value = gaussian(rng, 3, num_steps, num_envs)
    terminated, truncated = rng.random((2, num_steps, num_envs)) < 0.15
    inputs = {"reward": reward, "value": value, "next_value": next_value, "terminated": terminated}
    inputs["done"] = terminated | truncated
    torchs_names = {"value": "state_value", "next_value": "next_state_value"}
    tensors = {torchs_names.get(name, name): torch.tensor(x) for name, x in inputs.items()}
    advantage, _ = generalized_advantage_estimate(discount, gae_lambda, **tensors)
    return inputs | {"discount": discount, "gae_lambda": gae_lambda, "advantage": advantage}


def gae_of_terminations(seed, discount, gae_lambda, num_steps=24, num_envs=3):
    """Two libraries that know no truncation: the next value is the value one row below, whatever state that is."""
    rng = np.random.default_rng(seed)
    reward, value = gaussian(rng, 2, num_steps, num_envs)
    last_value = gaussian(rng, num_envs)
    terminated = rng.random((num_steps, num_envs)) < 0.15

    space = gymnasium.spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(num_steps, space, space, "cpu", gae_lambda, discount, num_envs)
    buffer.rewards, buffer.values = reward.astype(np.float32), value.astype(np.float32)
    buffer.episode_starts[1:] = terminated[:-1]
    buffer.compute_returns_and_advantage(torch.tensor(last_value), terminated[-1])

    columns = (reward, discount * (1.0 - terminated), np.concatenate([value, last_value[None]]))
    columns = [x.astype(np.float32).T for x in columns]
    of_column = rlax.truncated_generalized_advantage_estimation
    by_rlax = np.stack([of_column(r, d, gae_lambda, v) for r, d, v in zip(*columns)], axis=1)
    return {
        "reward": reward,
        "value": value,
        "last_value": last_value,
        "terminated": terminated,
        "discount": discount,
        "gae_lambda": gae_lambda,
        "stable_baselines3": {"advantage": buffer.advantages, "target": buffer.returns},
        "rlax": {"advantage": by_rlax},
    }


def policy_loss(seed, clip):
    rng = np.random.default_rng(seed)
    log_ratio, advantage = gaussian(rng, 48, scale=0.3), gaussian(rng, 48)
    log_ratio[:4] = 0  # as at the first minibatch

    def by_torch(log_ratio):
        ratio, a = log_ratio.exp(), torch.tensor(advantage)
        return -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a).mean()

    def by_rlax(log_ratio):
        return rlax.clipped_surrogate_pg_loss(jax.numpy.exp(log_ratio), advantage.astype(np.float32), clip)

    loss, slope = jax.value_and_grad(by_rlax)(log_ratio.astype(np.float32))
    return {
        "log_ratio": log_ratio,
        "advantage": advantage,
        "clip": clip,
        "torch": values_and_gradients(by_torch, log_ratio=log_ratio),
        "rlax": {"value": loss, "gradients": {"log_ratio": slope}},
    }


def value_loss(seed, clip):
    rng = np.random.default_rng(seed)
    value, old_value, target = gaussian(rng, 3, 48, scale=0.5)
    value[:4] = old_value[:4]

    def by_torch(value):
        old, goal = torch.tensor(old_value), torch.tensor(target)
        errors = torch.stack([value - goal, old + (value - old).clamp(-clip, clip) - goal])
        return errors.square().amax(0).mean() / 2

    inputs = {"value": value, "old_value": old_value, "target": target, "clip": clip}
    return inputs | {"torch": values_and_gradients(by_torch, value=value)}


def approximate_kl(seed, scale):
    """As stable-baselines3 and CleanRL write it in torch."""
    log_ratio = gaussian(np.random.default_rng(seed), 48, scale=scale)
    expected = values_and_gradients(lambda log_ratio: ((log_ratio.exp() - 1) - log_ratio).mean(), log_ratio=log_ratio)
    return {"log_ratio": log_ratio, "torch": expected}


def ppo_loss(seed, clip, value_clip, value_coefficient, entropy_coefficient, size=48):
    """torchrl's whole loss, of a linear actor-critic with three actions; its l2 lacks our factor of a half."""
    rng = np.random.default_rng(seed)
    weights = {"actor": gaussian(rng, 4, 3), "critic": gaussian(rng, 4, 1, scale=0.3)}
    batch = {"obs": gaussian(rng, size, 4), "action": rng.integers(0, 3, size)}
    batch |= dict(zip(("advantage", "value", "target"), gaussian(rng, 3, size)))
    with torch.no_grad():
        acting = Categorical(logits=torch.tensor(batch["obs"] @ weights["actor"] + gaussian(rng, size, 3, scale=0.3)))
        batch["log_prob"] = np.round(acting.log_prob(torch.tensor(batch["action"])).numpy(), 4)

    actor, critic = (torch.nn.Linear(*x.shape, bias=False, dtype=torch.float64) for x in weights.values())
    actor.weight.data, critic.weight.data = (torch.tensor(x.T) for x in weights.values())
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(actor, in_keys=["obs"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(in_keys=["logits"], distribution_class=Categorical, return_log_prob=True),
    )
    loss = ClipPPOLoss(
        policy,
        TensorDictModule(critic, in_keys=["obs"], out_keys=["state_value"]),
        clip_epsilon=clip,
        clip_value=value_clip,
        critic_coeff=value_coefficient / 2,
        entropy_coeff=entropy_coefficient,
        loss_critic_type="l2",
        functional=False,
    )
    loss.set_keys(action="action", sample_log_prob="log_prob", value="state_value", value_target="target")
    tensors = {name: torch.tensor(x) for name, x in batch.items()}
    tensors |= {name: tensors[name][:, None] for name in ("advantage", "target")}
    tensors["state_value"] = tensors.pop("value")[:, None]
    report = loss(TensorDict(tensors, [size]))
    total = report["loss_objective"] + report["loss_critic"] + report["loss_entropy"]
    total.backward()
    return {
        "weights": weights,
        "batch": batch,
        "hyperparams": {
            "clip": clip,
            "value_clip": value_clip,
            "value_coefficient": value_coefficient,
            "entropy_coefficient": entropy_coefficient,
        },
        "report": {
            "loss": total,
            "policy_loss": report["loss_objective"],
            "value_loss": report["loss_critic"] / value_coefficient,
            "entropy": report["entropy"],
            "clip_fraction": report["clip_fraction"],
        },
        "gradients": {"actor": actor.weight.grad.T, "critic": critic.weight.grad.T},
    }


def categorical(seed):
    """Rows with all choices, and rows with masked ones."""
    rng = np.random.default_rng(seed)
    logits, action = gaussian(rng, 8, 4, scale=2), rng.integers(0, 4, 8)
    allowed = rng.random((8, 4)) < 0.6
    allowed[:4], allowed[range(8), action] = True, True

    def distribution(logits):
        return Categorical(logits=torch.where(torch.tensor(allowed), logits, -torch.inf))

    return {
        "logits": logits,
        "action": action,
        "allowed": allowed,
        "log_prob": values_and_gradients(lambda x: distribution(x).log_prob(torch.tensor(action)), logits=logits),
        "entropy": values_and_gradients(lambda x: distribution(x).entropy(), logits=logits),
    }


def multi_categorical(seed, sizes=(3, 2, 4)):
    rng = np.random.default_rng(seed)
    logits, action = gaussian(rng, 5, sum(sizes), scale=2), rng.integers(0, sizes, (5, len(sizes)))

    def distribution(logits):
        return MultiCategoricalDistribution(list(sizes)).proba_distribution(logits)

    return {
        "logits": logits,
        "action": action,
        "sizes": sizes,
        "log_prob": values_and_gradients(lambda x: distribution(x).log_prob(torch.tensor(action)), logits=logits),
        "entropy": values_and_gradients(lambda x: distribution(x).entropy(), logits=logits),
    }


def normal(seed):
    rng = np.random.default_rng(seed)
    loc, scale, action = gaussian(rng, 6, 3), np.round(rng.uniform(0.05, 3, (6, 3)), 4), gaussian(rng, 6, 3, scale=2)

    def log_prob(loc, scale):
        return Independent(Normal(loc, scale), 1).log_prob(torch.tensor(action))

    def entropy(loc, scale):
        # torch's entropy does not know loc, and autograd asks that every input be used.
        return Independent(Normal(loc, scale), 1).entropy() + 0 * loc.sum(-1)

    return {
        "loc": loc,
        "scale": scale,
        "action": action,
        "log_prob": values_and_gradients(log_prob, loc=loc, scale=scale),
        "entropy": values_and_gradients(entropy, loc=loc, scale=scale),
    }


def tanh_normal(seed, narrowest, widest):
    """Densities by torch's transforms; the entropy, which torch lacks, by integrating them on a fine grid."""
    rng = np.random.default_rng(seed)
    loc, scale = gaussian(rng, 6, 3), np.round(rng.uniform(narrowest, widest, (6, 3)), 4)
    action = np.round(loc + scale * gaussian(rng, 6, 3), 4)
    action[0] = [9, -12, 15]  # where tanh in float32 is 1, or nearly
    low, high = np.array([-1, -2, 0.5]), np.array([1, 3, 4.5])

    def log_density(loc, scale, action):
        half, centre = torch.tensor((high - low) / 2), torch.tensor((high + low) / 2)
        # The caches spare the inverse, which would lose the largest actions even in double precision.
        transforms = [TanhTransform(cache_size=1), AffineTransform(centre, half, cache_size=1)]
        distribution = TransformedDistribution(Normal(loc, scale), transforms)
        for transform in transforms:
            action = transform(action)
        return distribution.log_prob(action)

    def log_prob(loc, scale):
        return log_density(loc, scale, torch.tensor(action)).sum(-1)

    def entropy(loc, scale):
        grid = torch.linspace(-12, 12, 6001, dtype=torch.float64)[:, None, None]
        actions = loc.detach() + scale.detach() * grid
        surprise = -log_density(loc, scale, actions) * Normal(loc, scale).log_prob(actions).exp()
        return torch.trapezoid(surprise, actions, dim=0).sum(-1)

    return {
        "loc": loc,
        "scale": scale,
        "action": action,
        "low": low,
        "high": high,
        "log_prob": values_and_gradients(log_prob, loc=loc, scale=scale),
        "entropy": values_and_gradients(entropy, loc=loc, scale=scale),
    }


def moments(seed, clip=1.5):
    """stable-baselines3 starts with 1e-4 of a value of mean 0 and variance 1; we start with nothing, and so here."""
    rng = np.random.default_rng(seed)
    batches = [np.round(gaussian(rng, size, 3) * [0.1, 3, 40] + [5, -2, 300], 4) for size in (5, 1, 16, 8)]
    running, after = RunningMeanStd(epsilon=0, shape=(3,)), []
    for batch in batches:
        running.update(batch)
        after.append(moments_of(running))
    normalizer = VecNormalize(scripted(*np.zeros((3, 1, 1))), clip_obs=clip)
    normalizer.obs_rms = running
    return {"batches": batches, "after": after, "clip": clip, "standardized": normalizer.normalize_obs(batches[-1])}


def moments_of(running):
    return {"count": running.count, "mean": running.mean, "variance": running.var}


def reward_scaling(seed, discount, num_steps=16, num_envs=3, clip=2.0):
    """VecNormalize on environments that play a script of rewards and ends, and all rewards by its last moments."""
    rng = np.random.default_rng(seed)
    reward = gaussian(rng, num_steps, num_envs, scale=2)
    terminated, truncated = rng.random((2, num_steps, num_envs)) < 0.15
    normalizer = VecNormalize(scripted(reward, terminated, truncated), gamma=discount, clip_reward=clip)
    normalizer.ret_rms = RunningMeanStd(epsilon=0)
    normalizer.reset()
    returns = []
    for _ in range(num_steps):
        normalizer.step(np.zeros(num_envs, int))
        returns.append(normalizer.returns.copy())
    return {
        "reward": reward,
        "terminated": terminated,
        "truncated": truncated,
        "discount": discount,
        "clip": clip,
        "return_after_reset": returns,
        "moments": moments_of(normalizer.ret_rms),
        "scaled": normalizer.normalize_reward(reward),
    }


class Scripted(gymnasium.Env):
    """Plays rows of (reward, terminated, truncated), whatever is done."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, rows):
        self.rows = iter(rows)

    def reset(self, **_):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), *next(self.rows), {}


def scripted(reward, terminated, truncated):
    """One environment for each column of the script [T, N]."""
    columns = zip(reward.T.tolist(), terminated.T.tolist(), truncated.T.tolist())
    return DummyVecEnv([partial(Scripted, zip(*column)) for column in columns])


def adam(seed, max_grad_norm, learning_rate=0.1, eps=1e-5):
    """Five steps from zero; gradients on both sides of the bound, some so small that `eps` counts."""
    rng = np.random.default_rng(seed)
    size = np.array([0.1, 1, 10, 1, 0.1])
    gradients = {
        "kernel": np.round(gaussian(rng, 5, 2, 3) * size[:, None, None], 4),
        "bias": gaussian(rng, 5, 4) * 1e-4,
    }
    params = {name: torch.zeros(x.shape[1:], dtype=torch.float64, requires_grad=True) for name, x in gradients.items()}
    optimizer = torch.optim.Adam(params.values(), lr=learning_rate, eps=eps)
    after = {name: [] for name in params}
    for step in range(5):
        for name, param in params.items():
            param.grad = torch.tensor(gradients[name][step])
        torch.nn.utils.clip_grad_norm_(params.values(), max_grad_norm)
        optimizer.step()
        for name, param in params.items():
            after[name].append(param.detach().numpy().copy())
    hyperparams = {"learning_rate": learning_rate, "max_grad_norm": max_grad_norm, "adam_eps": eps}
    return {"gradients": gradients, "hyperparams": hyperparams, "after": after}


def gaussian(rng, *shape, scale=1.0):
    return np.round(rng.normal(0, scale, shape), 4)


def values_and_gradients(function, **inputs):
    """What torch makes of a function: its values, and the gradients of their sum in each input."""
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in inputs.items()}
    value = function(*leaves.values())
    gradients = torch.autograd.grad(value.sum(), list(leaves.values()))
    return {"value": value, "gradients": dict(zip(leaves, gradients))}


def plain(tree) -> Any:
    """The same tree of json's own kinds, numbers with seven significant digits, flags as 0 and 1."""
    if isinstance(tree, dict):
        return {name: plain(x) for name, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(x) for x in tree]
    if isinstance(tree, torch.Tensor):
        tree = tree.detach().numpy()
    array = np.asarray(tree)
    if array.ndim:
        return [plain(x) for x in array]
    return float(f"{float(array):.7g}") if array.dtype.kind == "f" else int(array)


def main():
    lines = {"versions": {name: version(name) for name in LIBRARIES}} | all_numbers()
    text = ",\n".join(f"{json.dumps(name)}:{json.dumps(x, separators=(',', ':'))}" for name, x in lines.items())
    NUMBERS.write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
