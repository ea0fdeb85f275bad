"""Fresh episodes while runs train: in `fit`, sweeps and searches, and the rankings and checkpoints that they decide."""

import functools
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

import purejaxppo as pjp
from probes import SMALL
from purejaxppo.cli.main import main
from purejaxppo.experiment import loop
from purejaxppo.experiment.evaluations import EVALUATION_RETURN, Evaluations, ends_of_chunks
from purejaxppo.experiment.memory import bytes_of
from purejaxppo.experiment.report.statistics import describe_scores, final_scores, scores_of
from purejaxppo.experiment.runs.best import better_of
from purejaxppo.experiment.runs.saved import SavedRun
from purejaxppo.experiment.sweeps.division import Share
from purejaxppo.experiment.sweeps.halving_runs import train_runs
from purejaxppo.experiment.sweeps.slices import open_slices, read_rungs

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
    assert set(result.metrics) - set(without.metrics) == {EVALUATION_RETURN}


def test_an_evaluation_is_what_the_policy_plays_with_the_key_of_its_run(result):
    returns = result.metrics[EVALUATION_RETURN]
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
    expected = result.metrics[EVALUATION_RETURN].sel(learning_rate=1e-4)
    np.testing.assert_array_equal(found.metrics[EVALUATION_RETURN], expected)


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
    metrics[EVALUATION_RETURN][:] = np.nan
    metrics[EVALUATION_RETURN].loc[{"updates": 2}] = [[50, 50], [9, 9], [40, 40]]
    metrics[EVALUATION_RETURN].loc[{"updates": 4, "learning_rate": 1e-4}] = 30
    scores = scores_of(metrics)
    assert scores.dims == ("learning_rate", "seed") and "updates" not in scores.coords
    np.testing.assert_array_equal(scores, [[30, 30], [np.nan, np.nan], [40, 40]])
    assert replace(result, metrics=metrics).best() == {"learning_rate": 1e-2}
    assert "128 fresh episodes" in describe_scores(scores)
    metrics[EVALUATION_RETURN][:] = np.nan  # none has been evaluated yet
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
    returns = halving.metrics[EVALUATION_RETURN]
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

    monkeypatch.setattr("purejaxppo.experiment.sweeps.halving_runs.train_runs", interrupted)
    with pytest.raises(pjp.Interrupted):
        pjp.successive_halving(halving_plan, tmp_path, progress=False)
    with pytest.warns(UserWarning, match="turned nan"):
        resumed = pjp.successive_halving(halving_plan, tmp_path, progress=False)
    np.testing.assert_array_equal(resumed.scores, halving.scores)
    np.testing.assert_array_equal(resumed.metrics[EVALUATION_RETURN], halving.metrics[EVALUATION_RETURN])
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
    expected = pjp.load(batch).metrics[EVALUATION_RETURN].isel(updates=-1, seed=0).values
    np.testing.assert_allclose([trial.value for trial in study.trials], expected)
    with pytest.raises(ValueError, match="belongs to another search, with evaluate_every=2 instead of None"):
        pjp.optuna_search("CartPole-v1", space, **call)


def test_members_of_a_population_evolve_and_are_ranked_by_evaluations():
    sweep = make_sweep(2, rates=[1e-4, 1e-3, 3e-3, 1e-2])
    search = pjp.population_search(sweep, every=4, progress=False)
    returns = search.fit.metrics[EVALUATION_RETURN].values
    last = returns[:, -1]
    assert np.isfinite(last).all() and search.winner() == last.argmax()
    np.testing.assert_allclose(search.scores, last)
    stayed = search.parents[:, 3] == np.arange(8)  # after the evolution a copy plays as its parent, with its own key
    np.testing.assert_allclose(np.asarray(search.fit.state.fitness)[stayed], returns[stayed, 3], rtol=1e-5)
    assert stayed.sum() == 6
    assert "fresh episodes" in search.criterion


@functools.cache
def begin():
    """A batch of three, of which the last turns nan in its first update."""
    keys, hyperparams = pjp.runs(jax.random.key(1), {"learning_rate": [1e-2, 3e-2, 1e30]})
    ppo = pjp.batched(pjp.make_ppo("CartPole-v1", replace(CONFIG, normalize_observation=True)))
    return ppo, pjp.first_state(ppo, keys, hyperparams)


@pytest.fixture(scope="module")
def states():
    """The policies after every update, and what training with evaluations and without keeping any comes to."""
    ppo, state = begin()
    policies, step = {}, jax.jit(ppo.step)
    for update in range(1, 6):
        state, _ = step(state)
        policies[update] = state.policy
    return policies


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best") / "run"
    with pytest.warns(UserWarning, match="turned nan"):
        return pjp.fit(*begin(), folder=folder, evaluate_every=1, keep_best=True, progress=False), folder


def leaf(policy, run):
    return [np.asarray(x[run]) for x in jax.tree.leaves(policy)]


def test_every_agent_keeps_the_policy_of_its_best_evaluation(kept, states):
    result, folder = kept
    returns = result.metrics[EVALUATION_RETURN].values
    best, saved = result.best, pjp.load(folder, begin()[0], best=True)
    np.testing.assert_array_equal(best.update, [*(np.nanargmax(returns[:2], 1) + 1), 0])
    np.testing.assert_array_equal(best.evaluation_return, [*returns[:2].max(1), np.nan])
    for run in range(2):
        for x, y, z in zip(*(leaf(p, run) for p in (best.policy, states[best.update[run]], saved.policy))):
            np.testing.assert_array_equal(x, y)
            np.testing.assert_array_equal(x, z)
    assert not any(np.isnan(x).any() for x in leaf(best.policy, 2))
    assert isinstance(saved, SavedRun) and saved.best is not None
    np.testing.assert_array_equal(saved.best.update, best.update)
    newest = pjp.load(folder, begin()[0])
    assert isinstance(newest, SavedRun) and newest.best is None
    jax.tree.map(np.testing.assert_array_equal, newest.policy, result.state.policy)


def test_a_run_that_is_interrupted_keeps_the_best_of_one_that_is_not(kept, tmp_path):
    options: Any = {"evaluate_every": 1, "keep_best": True, "progress": False, "folder": tmp_path}
    with pytest.warns(UserWarning, match="turned nan"):
        pjp.fit(*begin(), num_updates=3, **options)
        resumed = pjp.fit(*begin(), **options)
    jax.tree.map(np.testing.assert_array_equal, resumed.best, kept[0].best)
    with pytest.warns(UserWarning, match="turned nan"):
        complete = pjp.fit(*begin(), **options)
    jax.tree.map(np.testing.assert_array_equal, complete.best, kept[0].best)


def test_a_tie_keeps_the_earlier_policy_and_one_run_needs_no_axis():
    best = better_of(None, {"w": np.zeros(3)}, np.float32(np.nan), 1)
    assert best is None
    for update, value in enumerate([5.0, 7.0, 7.0, np.nan, 6.0], 2):
        best = better_of(best, {"w": np.full(3, update)}, np.float32(value), update)
    assert best is not None and best.update == 3 and best.evaluation_return == 7
    np.testing.assert_array_equal(best.policy["w"], [3, 3, 3])


def test_the_commands_read_the_best_policies(tmp_path, capsys):
    folder, tiny = str(tmp_path / "run"), "--num-envs 4 --num-steps 16 --num-minibatches 2 --widths 8 --num-updates 4"
    train = ["train", "CartPole-v1", *tiny.split(), "--out", folder, "--compile-cache", "off"]
    assert main([*train, "--keep-best"]) == 2
    assert "--keep-best=True needs evaluations to compare" in capsys.readouterr().err
    assert main([*train, "--keep-best", "--evaluate-every", "2"]) == 0
    assert "the same, best policies" in capsys.readouterr().out
    assert main(["evaluate", folder, "--best"]) == 0
    assert "with the policies of the best evaluations (updates " in capsys.readouterr().out
    assert main(["export", folder, "--best", "--out", str(tmp_path / "policy.npz")]) == 0
    assert main(["render", folder, "--best", "--out", str(tmp_path / "best.gif")]) == 0
    assert (tmp_path / "best.gif").stat().st_size > 1000
    (tmp_path / "run" / "best_policy.npz").unlink()
    assert main(["evaluate", folder, "--best"]) == 2
    assert "keeps no best policies" in capsys.readouterr().err


def test_only_runs_keep_best_policies(kept, halving_plan, tmp_path):
    with pytest.raises(ValueError, match="keep_best=True needs evaluations to compare"):
        pjp.fit(*begin(), keep_best=True)
    open_slices(tmp_path, halving_plan.sweep)
    with pytest.raises(ValueError, match="best=True reads what a run kept with keep_best, but .* holds a sweep"):
        pjp.load(tmp_path, best=True)


def test_the_plan_counts_the_memory_that_evaluations_take(plan):
    (compiled,) = plan.groups
    playing = compiled.evaluations.play.memory_analysis().temp_size_in_bytes
    assert compiled.device_bytes == (bytes_of(compiled.program) + playing) // 2 and playing > 128 * 4 * 4


ON_DEVICES = """
import sys, jax, numpy
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
import purejaxppo as pjp
from probes import SMALL
sweep = pjp.Sweep("CartPole-v1", pjp.grid(learning_rate=[1e-3, 1e-2]), 3, config=SMALL, evaluate_every=2)
found = pjp.run_sweep(sweep, progress=False, slice_size=2, devices=int(sys.argv[1]))
print(found.metrics["evaluation_return"].values.tobytes().hex())
"""


@pytest.mark.slow
def test_two_devices_evaluate_as_one_does_to_the_bit():
    one, two = (
        subprocess.run([sys.executable, "-c", ON_DEVICES, number], capture_output=True, text=True, check=True).stdout
        for number in "12"
    )
    assert one == two and len(one) > 2 * 3 * 3 * 8


@pytest.mark.parametrize("every", [0, 1.5, "2"])
def test_bad_intervals_are_refused(every):
    with pytest.raises(ValueError, match="evaluate_every="):
        make_sweep(every)
