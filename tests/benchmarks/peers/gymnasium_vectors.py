"""What stable-baselines3 and sbx share: environments in Python, one process."""

import time

from program import Program
from works import Work


def prepare(algorithm, work: Work, **network) -> Program:
    """A program of a PPO class with stable-baselines3's interface; it has nothing to compile ahead."""
    from stable_baselines3.common.env_util import make_vec_env

    if work.num_seeds > 1 or work.encoder == "cnn" or work.recurrent or work.normalize or "MinAtar" in work.env:
        raise SystemExit("this peer does not offer this work")
    env = make_vec_env(work.env, n_envs=work.num_envs)
    # A few rollouts show the rate: a whole run would take minutes.
    steps = min(work.steps, max(1, 10_000 // work.steps_per_update) * work.steps_per_update)

    def run(seed):
        model = algorithm(
            "MlpPolicy",
            env,
            seed=seed,
            learning_rate=work.learning_rate,
            n_steps=work.num_steps,
            batch_size=work.steps_per_update // work.num_minibatches,
            n_epochs=work.num_epochs,
            gamma=work.discount,
            gae_lambda=work.gae_lambda,
            clip_range=work.clip,
            ent_coef=work.entropy_coefficient,
            vf_coef=work.value_coefficient,
            max_grad_norm=work.max_grad_norm,
            device="cpu",
            **network,
        )
        model.learn(work.steps_per_update)  # compiles, allocates
        start = time.perf_counter()
        model.learn(steps, reset_num_timesteps=False)
        return time.perf_counter() - start

    return Program(run, steps, None)
