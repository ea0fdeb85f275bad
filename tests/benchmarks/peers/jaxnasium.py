"""jaxnasium, on its own environments."""

from functools import partial

import jax
import jaxnasium
from jaxnasium.algorithms import PPO
from jaxnasium.algorithms.architectures import MLP

from program import Program, compiled
from works import Work

BODY = {"body": partial(MLP, hidden_sizes=(64, 64), activation=jax.nn.tanh)}


def prepare(work: Work) -> Program:
    if "MinAtar" in work.env or work.encoder == "cnn" or work.recurrent:
        raise SystemExit("this peer does not offer this work")
    env = jaxnasium.make(work.env)  # pyright: ignore[reportAttributeAccessIssue]: it takes this file for the peer
    algorithm = PPO(
        num_envs=work.num_envs,
        num_steps=work.num_steps,
        num_epochs=work.num_epochs,
        num_minibatches=work.num_minibatches,
        total_timesteps=work.num_updates * work.steps_per_update,
        learning_rate_start=work.learning_rate,
        ent_coef_start=work.entropy_coefficient,
        ent_coef_end=None,
        gamma=work.discount,
        gae_lambda=work.gae_lambda,
        clip_coef=work.clip,
        clip_coef_vf=work.clip,
        vf_coef=work.value_coefficient / 2,
        max_grad_norm=work.max_grad_norm,
        normalize_observations=work.normalize,
        normalize_rewards=work.normalize,
        warmup_steps=1,
        log_function=None,
        actor_kwargs=BODY,
        critic_kwargs=BODY,
    )

    def train(key):
        return algorithm.train(key, env)[0].actor

    def arguments(seed):
        key = jax.random.PRNGKey(seed)
        return (jax.random.split(key, work.num_seeds) if work.num_seeds > 1 else key,)

    return compiled(jax.vmap(train) if work.num_seeds > 1 else train, arguments, work.steps)
