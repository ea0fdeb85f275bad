"""brax's PPO on gymnax's Pendulum behind brax's interface; it acts in boxes only."""

import time
from functools import partial

import gymnax
import jax
import jax.numpy as jnp
from brax.envs.base import Env, State
from brax.training.agents.ppo import networks
from brax.training.agents.ppo import train as ppo

from program import Program
from works import Work


class GymnaxEnv(Env):
    """A gymnax environment, whose own end is left to brax's time limit."""

    def __init__(self, name: str):
        self.env, self.params = gymnax.make(name)
        self.space = self.env.action_space(self.params)

    def reset(self, rng):
        obs, state = self.env.reset_env(rng, self.params)
        zero = jnp.float32(0)
        return State(pipeline_state=state, obs=obs, reward=zero, done=zero, metrics={})

    def step(self, state, action):
        action = self.space.low + (self.space.high - self.space.low) * (action + 1) / 2
        obs, reached, reward, *_ = self.env.step_env(jax.random.PRNGKey(0), state.pipeline_state, action, self.params)
        return state.replace(pipeline_state=reached, obs=obs, reward=jnp.float32(reward))

    @property
    def observation_size(self):
        return self.env.observation_space(self.params).shape[0]

    @property
    def action_size(self):
        return self.space.shape[0]

    @property
    def backend(self):
        return "gymnax"


def prepare(work: Work) -> Program:
    if work.env != "Pendulum-v1" or work.num_seeds > 1:
        raise SystemExit("this peer does not offer this work")
    steps = work.num_updates * work.steps_per_update

    def run(seed):
        times = []
        ppo.train(
            GymnaxEnv(work.env),
            num_timesteps=2 * steps,
            num_evals=3,  # the first half compiles, the second is timed
            run_evals=False,
            progress_fn=lambda *_: times.append(time.perf_counter()),
            episode_length=200,
            num_envs=work.num_envs,
            unroll_length=work.num_steps,
            batch_size=work.num_envs // work.num_minibatches,
            num_minibatches=work.num_minibatches,
            num_updates_per_batch=work.num_epochs,
            learning_rate=work.learning_rate,
            discounting=work.discount,
            gae_lambda=work.gae_lambda,
            clipping_epsilon=work.clip,
            entropy_cost=work.entropy_coefficient,
            max_grad_norm=work.max_grad_norm,
            normalize_observations=True,
            network_factory=partial(
                networks.make_ppo_networks,
                policy_hidden_layer_sizes=(64, 64),
                value_hidden_layer_sizes=(64, 64),
                activation=jnp.tanh,
            ),
            seed=seed,
        )
        return times[-1] - times[-2]

    return Program(run, steps, None)
