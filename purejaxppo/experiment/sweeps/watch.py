"""What an Optuna search does while a batch trains: it shows progress, and prunes settings by their returns so far."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from purejaxppo.experiment.report.metrics import mean_returns
from purejaxppo.experiment.report.statistics import STATISTICS
from purejaxppo.experiment.sweeps.sweep import Sweep

PRUNED = "pruned"  # attribute of a trial


class Watch:
    """Is told of every chunk of a batch, see `run_sweep`; its answer stops runs whose settings are all pruned."""

    def __init__(self, study: Any, trials: Sequence[Any], sweep: Sweep, bar: tqdm, prunes: bool):
        self.study, self.sweep, self.bar, self.prunes = study, sweep, bar, prunes
        self.trials = [_with_reports(study, trial) for trial in trials] if prunes else list(trials)
        self.pruned = {i for i, trial in enumerate(trials) if PRUNED in trial.user_attrs}
        """Settings of the batch that were pruned, also by a call before this one."""
        self._runs = sweep.runs()
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()  # waves train side by side
        self._num_updates = sum(config.num_updates for config in sweep.configs) * sweep.num_seeds

    def __call__(self, runs: Sequence[str], num_updates: int, metrics: Mapping[str, np.ndarray]) -> bool:
        """Reports the mean return, in a chunk, of the settings that have all their seeds among some runs.

        Args:
            runs: names of the runs.
            num_updates: that they have made.
            metrics: of the chunk [runs, updates].
        """
        with self._lock:
            self._done |= dict.fromkeys(runs, num_updates)
            self.bar.set_description_str(f"batch {sum(self._done.values()) / self._num_updates:.0%}")
            rows: dict[int, dict[str, int]] = {}
            for row, name in enumerate(runs):
                rows.setdefault(self._runs[name][0], {})[name] = row
            returns = mean_returns(metrics) if self.prunes else None
            for setting, of_seed in rows.items():
                if returns is not None and setting not in self.pruned and len(of_seed) == self.sweep.num_seeds:
                    self._report(setting, num_updates, returns[list(of_seed.values())])
            return rows.keys() <= self.pruned

    def _report(self, setting: int, num_updates: int, returns: np.ndarray):
        """Tells Optuna the interquartile mean over seeds, unless no episode ended, and asks whether to go on."""
        if np.isfinite(returns).any():
            trial = self.trials[setting]
            worst = returns[np.isfinite(returns)].min()
            value = float(STATISTICS["iqm"](np.where(np.isfinite(returns), returns, worst), axis=0))
            trial.report(value, num_updates)
            if trial.should_prune():
                self.pruned.add(setting)
                trial.set_user_attr(PRUNED, True)


def _with_reports(study: Any, trial: Any) -> Any:
    """The trial as one that Optuna takes reports of; one that was read from the study is frozen."""
    from optuna.trial import Trial

    return trial if isinstance(trial, Trial) else Trial(study, trial._trial_id)
