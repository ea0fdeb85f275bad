"""rejax 0.1.3, with the gymnax before 1.0 that it needs."""

from collections.abc import Callable

import gymnax
import jax
import jax.numpy as jnp
from rejax import PPO

from program import Program, compiled
from works import Work


def prepare(work: Work) -> Program:
    return compiled(*training(work), work.steps)


def training(work: Work) -> tuple[Callable, Callable]:
    """The training of a work, and its arguments for a seed."""
    if work.encoder == "cnn" or work.recurrent:
        raise SystemExit("this peer does not offer this work")
    env, env_params = gymnax.make(work.env)
    steps = work.num_updates * work.steps_per_update
    algorithm = PPO.create(  # pyright: ignore[reportAttributeAccessIssue]: it takes this file for the peer
        env=env,
        env_params=env_params,
        agent_kwargs={"hidden_layer_sizes": (64, 64), "activation": "tanh"},
        num_envs=work.num_envs,
        num_steps=work.num_steps,
        num_epochs=work.num_epochs,
        num_minibatches=work.num_minibatches,
        total_timesteps=steps,
        eval_freq=steps,
        skip_initial_evaluation=True,
        learning_rate=work.learning_rate,
        max_grad_norm=work.max_grad_norm,
        gamma=work.discount,
        gae_lambda=work.gae_lambda,
        clip_eps=work.clip,
        vf_coef=work.value_coefficient,
        ent_coef=work.entropy_coefficient,
        normalize_observations=work.normalize,
        normalize_rewards=work.normalize,
    )
    algorithm = algorithm.replace(eval_callback=lambda *_: jnp.zeros(1))  # no evaluation: nobody else has one
    train = jax.vmap(algorithm.train) if work.num_seeds > 1 else algorithm.train

    def arguments(seed):
        key = jax.random.PRNGKey(seed)
        return (jax.random.split(key, work.num_seeds) if work.num_seeds > 1 else key,)

    return train, arguments
