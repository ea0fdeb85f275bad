"""This package, as its README says: one run with large minibatches is shared out over the cores (`sharded`), one with
small ones keeps to a thread."""

import time
from typing import Any

import flax.linen as nn
import jax

import purejaxppo as pjp
from program import Program
from purejaxppo.envs.base import action_space
from purejaxppo.experiment.jax_setup import cores_as_devices
from purejaxppo.networks.memories import GRU
from works import Work

LARGE_MINIBATCH = 512  # transitions
WIDTH = 128


def prepare(work: Work) -> Program:
    large = work.num_seeds == 1 and work.steps_per_update // work.num_minibatches >= LARGE_MINIBATCH
    if large:
        cores_as_devices()
    elif work.num_seeds == 1:
        pjp.use_one_thread()
    config = pjp.Config(
        num_envs=work.num_envs,
        num_steps=work.num_steps,
        num_updates=work.num_updates,
        num_epochs=work.num_epochs,
        num_minibatches=work.num_minibatches,
        segment_length=work.num_steps if work.recurrent else 1,
        encoder=work.encoder,
        normalize_observation=work.normalize,
        scale_reward=work.normalize,
    )
    ppo = pjp.make_ppo(work.env, config, network=recurrent(work) if work.recurrent else None)
    hyperparams = pjp.Hyperparams(
        learning_rate=work.learning_rate,
        learning_rate_annealing=0.0,
        discount=work.discount,
        gae_lambda=work.gae_lambda,
        clip=work.clip,
        entropy_coefficient=work.entropy_coefficient,
        value_coefficient=work.value_coefficient,
        max_grad_norm=work.max_grad_norm,
    )
    if work.num_seeds > 1:
        ppo = pjp.batched(ppo)
    elif large and jax.device_count() > 1:
        ppo = pjp.sharded(ppo)
    _, batch = pjp.runs(jax.random.key(0), num_seeds=work.num_seeds, hyperparams=hyperparams)

    def start(seed):
        keys = jax.random.split(jax.random.key(seed), work.num_seeds)
        arguments = (keys, batch) if work.num_seeds > 1 else (keys[0], hyperparams)
        return jax.block_until_ready(pjp.first_state(ppo, *arguments))

    begin = time.perf_counter()
    program = pjp.compile_training(ppo, start(0))
    compile_seconds = time.perf_counter() - begin  # with that of the first state, as the peers have it

    def run(seed):
        begin = time.perf_counter()
        jax.block_until_ready(program(start(seed), donate=True)[0])  # the peers start within their programs, too
        return time.perf_counter() - begin

    return Program(run, work.steps, compile_seconds)


def recurrent(work: Work) -> pjp.Network:
    """The recurrent network, which this package's own are not: they share no memory."""
    env = pjp.make_env(work.env)
    actions: Any = action_space(env, env.params)
    module = Recurrent(actions.n)
    return pjp.Network(GRU(WIDTH).empty, module.init, module.apply)


class Recurrent(nn.Module):
    """One encoder and one GRU, from which heads with a layer of their own read."""

    num_actions: int

    @nn.compact
    def __call__(self, memory, obs, first):
        features = nn.relu(pjp.layers.Dense(WIDTH, 2**0.5)(obs))
        memory, features = GRU(WIDTH)(memory, features, first)
        acting, judging = (nn.relu(pjp.layers.Dense(WIDTH, 2.0)(features)) for _ in range(2))
        value = pjp.layers.Dense(1, 1.0)(judging)[..., 0]
        return memory, pjp.Categorical(pjp.layers.Dense(self.num_actions, 0.01)(acting)), value
