"""One worker of an Optuna search in a process of its own: STORAGE NUM_TRIALS NUM_UPDATES [FOLDER]."""

import sys

from probes import SMALL

if __name__ == "__main__":
    import optuna

    import purejaxppo as pjp
    from purejaxppo.experiment.sweeps import studies

    storage, num_trials, num_updates, *folder = sys.argv[1:]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    studies.HEARTBEAT, studies.GRACE = 1, 5
    pjp.optuna_search(
        "CartPole-v1", {"learning_rate": pjp.log_uniform(1e-4, 1e-1), "clip": pjp.choice(0.1, 0.2)},
        num_trials=int(num_trials), batch_size=3, storage=storage, folder=folder[0] if folder else None,
        config=SMALL.with_total_steps(int(num_updates) * SMALL.steps_per_update), hyperparams=pjp.Hyperparams(),
        pruner=optuna.pruners.MedianPruner(n_warmup_steps=int(num_updates) // 2), progress=False,
    )  # fmt: skip
