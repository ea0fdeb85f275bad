"""Fresh episodes while runs train: in `fit`, sweeps and searches, and the rankings and checkpoints that they decide."""

import signal
import warnings
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

import purejaxppo as pjp
from probes import SMALL
from purejaxppo.experiment import loop
from purejaxppo.experiment.evaluations import METRIC, Evaluations, ends_of_chunks
from purejaxppo.experiment.report.statistics import describe_scores, final_scores, scores_of
from purejaxppo.experiment.sweeps.division import Share
from purejaxppo.experiment.sweeps.halving import train_runs
from purejaxppo.experiment.sweeps.slices import read_rungs

pytestmark = pytest.mark.full

RATES = [1e-4, 1e30, 1e-2]  # the second turns nan at once
CONFIG = replace(SMALL, num_updates=5)


def make_sweep(evaluate_every: Any = 2, rates=RATES, **changes):
    table = pjp.grid(learning_rate=rates)
    return pjp.Sweep(
        "CartPole-v1", table, 2, config=replace(CONFIG, **changes), hyperparams=pjp.Hyperparams(),
        evaluate_every=evaluate_every,
    )  # fmt: skip


def run(sweep, folder=None, **options):
    with pytest.warns(UserWarning, match="turned nan"):
        return pjp.run_sweep(sweep, folder, progress=False, **options)


def same(result, other):
    assert set(result.metrics) == set(other.metrics)
    for name, x in result.metrics.items():
        np.testing.assert_array_equal(x, other.metrics[name], err_msg=str(name))


@pytest.fixture(scope="module")
def plan():
    return pjp.plan_sweep(make_sweep(), slice_size=2, updates_per_chunk=3)


@pytest.fixture(scope="module")
def result(plan):
    return run(plan)


def test_chunks_end_at_evaluations_and_at_the_end_of_the_run():
    every_four = Evaluations(play=print, every=4, last=10)
    assert ends_of_chunks(0, 10, 3, every_four) == [3, 4, 7, 8, 10]
    assert ends_of_chunks(5, 15, 9, every_four) == [8, 10, 12, 15]  # trained past its end
    assert ends_of_chunks(5, 15, 9, None) == [14, 15]
    assert [done for done in range(1, 16) if every_four.is_due(done)] == [4, 8, 10, 12]


def test_a_sweep_with_evaluations_trains_as_without(result):
    without = run(make_sweep(None), slice_size=2)
    for name, x in without.metrics.items():
        np.testing.assert_array_equal(result.metrics[name], x, err_msg=str(name))
    assert set(result.metrics) - set(without.metrics) == {METRIC}


def test_an_evaluation_is_what_the_policy_plays_with_the_key_of_its_run(result):
    returns = result.metrics[METRIC]
    there = np.isfinite(returns.sel(learning_rate=[1e-4, 1e-2])).values
    np.testing.assert_array_equal(there, np.broadcast_to([False, True, False, True, True], there.shape))
    assert returns.sel(learning_rate=1e30).isnull().all()
    ppo = pjp.batched(result.ppo(learning_rate=1e-2))
    states = [result.state(seed, learning_rate=1e-2) for seed in range(2)]
    state = jax.tree.map(lambda *xs: jax.numpy.stack(xs), *states)
    played = jax.jit(ppo.evaluate)(state.key, state.policy, state.env_params).episode_return
    np.testing.assert_array_equal(returns.sel(learning_rate=1e-2)[:, -1], np.asarray(played).mean(1))


def test_fit_and_a_sweep_evaluate_alike(result):
    keys, hyperparams = pjp.runs(jax.random.key(0), pjp.grid(learning_rate=[1e-4]), 2)
    ppo = pjp.batched(pjp.make_ppo("CartPole-v1", CONFIG))
    found = pjp.fit(ppo, pjp.first_state(ppo, keys, hyperparams), evaluate_every=2, progress=False)
    np.testing.assert_array_equal(found.metrics[METRIC], result.metrics[METRIC].sel(learning_rate=1e-4))


def test_a_sweep_that_is_interrupted_goes_on_to_the_result_of_one_that_is_not(plan, result, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        monkeypatch.setattr("purejaxppo.experiment.sweeps.run.chunks", loop.chunks)
        for number, pair in enumerate(loop.chunks(*args, **kwargs)):
            if number == 1:
                signal.raise_signal(signal.SIGINT)
            yield pair

    monkeypatch.setattr("purejaxppo.experiment.sweeps.run.chunks", interrupted)
    with pytest.raises(pjp.Interrupted), pytest.warns(UserWarning):
        pjp.run_sweep(plan, tmp_path, progress=False, save_every=0)
    same(run(plan, tmp_path), result)
    same(pjp.load(tmp_path), result)
    with pytest.raises(ValueError, match="holds another sweep, with evaluate_every=2 instead of 3"):
        pjp.plan_sweep(make_sweep(3), tmp_path)


def test_shares_give_the_result_of_the_whole(plan, result, tmp_path):
    for share in (Share(0, 2), Share(1, 2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of runs that turned nan
            pjp.run_sweep(replace(plan, share=share), tmp_path, progress=False)
    same(pjp.load(tmp_path), result)


def test_the_ranking_follows_the_newest_evaluation(result):
    metrics = result.metrics.copy(deep=True)
    metrics[METRIC][:] = np.nan
    metrics[METRIC].loc[{"updates": 2}] = [[50, 50], [9, 9], [40, 40]]
    metrics[METRIC].loc[{"updates": 4, "learning_rate": 1e-4}] = 30
    scores = scores_of(metrics)
    assert scores.dims == ("learning_rate", "seed") and "updates" not in scores.coords
    np.testing.assert_array_equal(scores, [[30, 30], [np.nan, np.nan], [40, 40]])
    assert replace(result, metrics=metrics).best() == {"learning_rate": 1e-2}
    assert "128 fresh episodes" in describe_scores(scores)
    metrics[METRIC][:] = np.nan  # none has been evaluated yet
    np.testing.assert_array_equal(scores_of(metrics), final_scores(metrics))
    assert "last 100 training episodes" in describe_scores(scores_of(metrics))


@pytest.fixture(scope="module")
def halving_plan():
    options: Any = {"num_rungs": 2, "eta": 2, "num_places": 2}
    return pjp.plan_halving(make_sweep(rates=[1e-4, 1e-3, 1e-2, 1e30], num_updates=8), **options)


@pytest.fixture(scope="module")
def halving(halving_plan):
    with pytest.warns(UserWarning, match="turned nan"):
        return pjp.successive_halving(halving_plan, progress=False)


def test_halving_compares_settings_by_their_newest_evaluation(halving_plan, halving):
    assert "compared by the mean return of 128 fresh episodes" in str(halving_plan)
    returns = halving.metrics[METRIC]
    assert halving.rungs == (4, 8)
    for rung, updates in enumerate(halving.rungs):
        expected = returns.sel(updates=updates).mean("seed").values  # of two seeds also the interquartile mean
        np.testing.assert_allclose(halving.scores[:3, rung], expected[:3], rtol=1e-6)
    assert np.isneginf(halving.scores[3, 0])
    assert halving.best()["learning_rate"] == [1e-4, 1e-3, 1e-2][np.nanargmax(halving.scores[:3, 1])]


def test_halving_with_evaluations_resumes_and_its_folder_ranks_as_it_does(halving_plan, halving, tmp_path, monkeypatch):
    def interrupted(*args):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return train_runs(*args)

    monkeypatch.setattr("purejaxppo.experiment.sweeps.halving.train_runs", interrupted)
    with pytest.raises(pjp.Interrupted):
        pjp.successive_halving(halving_plan, tmp_path, progress=False)
    with pytest.warns(UserWarning, match="turned nan"):
        resumed = pjp.successive_halving(halving_plan, tmp_path, progress=False)
    np.testing.assert_array_equal(resumed.scores, halving.scores)
    np.testing.assert_array_equal(resumed.metrics[METRIC], halving.metrics[METRIC])
    loaded = pjp.load(tmp_path)
    assert isinstance(loaded, pjp.SweepResult) and read_rungs(tmp_path) == (4, 8)
    assert loaded.best() == halving.best()
    rows = [row["learning_rate"] for row in halving.ranked()]
    assert loaded.ranked()["learning_rate"].values.tolist() == rows
    assert f"learning_rate={rows[0]:g}" in pjp.load_agents(tmp_path).title


def test_halving_refuses_evaluations_that_come_after_its_first_comparison():
    with pytest.raises(ValueError, match="evaluate_every=5 must be at most 4, the updates after which settings are"):
        pjp.plan_halving(make_sweep(5, num_updates=8), num_rungs=2, eta=2)


def test_the_score_of_a_trial_is_its_newest_evaluation(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {"learning_rate": pjp.log_uniform(1e-4, 1e-2)}
    call: Any = {"num_trials": 2, "batch_size": 2, "config": CONFIG, "folder": tmp_path, "progress": False}
    study = pjp.optuna_search("CartPole-v1", space, evaluate_every=2, **call)
    (batch,) = (tmp_path / "batches").iterdir()
    expected = pjp.load(batch).metrics[METRIC].isel(updates=-1, seed=0).values
    np.testing.assert_allclose([trial.value for trial in study.trials], expected)
    with pytest.raises(ValueError, match="belongs to another search, with evaluate_every=2 instead of None"):
        pjp.optuna_search("CartPole-v1", space, **call)


def test_members_of_a_population_are_ranked_by_their_newest_evaluation():
    sweep = make_sweep(2, rates=[1e-4, 1e-3, 3e-3, 1e-2])
    search = pjp.population_search(sweep, every=4, progress=False)
    last = search.fit.metrics[METRIC].values[:, -1]
    assert np.isfinite(last).all() and search.winner() == last.argmax()
    np.testing.assert_allclose(search.scores, last)
    assert "fresh episodes" in search.criterion


@pytest.mark.parametrize("every", [0, 1.5, "2"])
def test_bad_intervals_are_refused(every):
    with pytest.raises(ValueError, match="evaluate_every="):
        make_sweep(every)
