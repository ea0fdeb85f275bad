"""purejaxrl from a checkout, whose folder is on the path: its `ppo.py` for discrete actions."""

import jax
from purejaxrl.ppo import make_train

from program import Program, compiled
from works import Work


def prepare(work: Work) -> Program:
    if work.encoder == "cnn" or work.normalize:
        raise SystemExit("this peer does not offer this work")
    config = {
        "LR": work.learning_rate,
        "ANNEAL_LR": False,
        "NUM_ENVS": work.num_envs,
        "NUM_STEPS": work.num_steps,
        "TOTAL_TIMESTEPS": work.num_updates * work.steps_per_update,
        "UPDATE_EPOCHS": work.num_epochs,
        "NUM_MINIBATCHES": work.num_minibatches,
        "GAMMA": work.discount,
        "GAE_LAMBDA": work.gae_lambda,
        "CLIP_EPS": work.clip,
        "ENT_COEF": work.entropy_coefficient,
        "VF_COEF": work.value_coefficient,
        "MAX_GRAD_NORM": work.max_grad_norm,
        "ACTIVATION": "tanh",
        "ENV_NAME": work.env,
        "DEBUG": False,
    }
    train = make_train(config)

    def arguments(seed):
        key = jax.random.PRNGKey(seed)
        return (jax.random.split(key, work.num_seeds) if work.num_seeds > 1 else key,)

    return compiled(jax.vmap(train) if work.num_seeds > 1 else train, arguments, work.steps)
