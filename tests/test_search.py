import datetime
import shlex
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import xarray

import purejaxppo as pjp
from probes import SMALL, copy_cue
from purejaxppo.batched import reported_failures
from purejaxppo.cli.options import parse
from purejaxppo.cli.train import TrainOptions
from purejaxppo.experiment.lock import claim, claim_folder
from purejaxppo.experiment.runs import fit as fit_module
from purejaxppo.experiment.sweeps import halving_runs, run, studies
from purejaxppo.experiment.sweeps import optuna_search as optuna_search_module
from purejaxppo.experiment.sweeps.best import train_command
from purejaxppo.experiment.sweeps.halving import Ladder, plan_halving, sizes_of_rungs, successive_halving
from purejaxppo.experiment.sweeps.halving_runs import Trainer, compile_trainer, train_runs
from purejaxppo.experiment.sweeps.optuna_search import best_setting, optuna_search, plan_trials, rank_trials
from purejaxppo.experiment.sweeps.population import PopulationSearch, plan_population, population_search
from purejaxppo.experiment.sweeps.slices import Slice, open_slices
from purejaxppo.experiment.sweeps.studies import tell
from purejaxppo.experiment.sweeps.sweep import name_run

pytestmark = pytest.mark.full


def make_probe(env, config):
    return pjp.make_ppo(copy_cue(), config)


def make_sweep(rates, num_updates=45, num_seeds=2, **values):
    config = SMALL.with_total_steps(32 * num_updates)
    table = pjp.grid(learning_rate=rates, **values)
    return pjp.Sweep("probe", table, num_seeds, config=config, hyperparams=pjp.Hyperparams())


def never(env, config):
    raise AssertionError("nothing should be made")


WRONG: Any = {"clip": 0.1}
PART: Any = 1.5
WORD: Any = "2"
RATES = [1e-8, 1e-7, 1e-6, 1e-5, 3e-2, 1e-4, 1e-6 * 2, 1e30, 2e-5]


@pytest.fixture(scope="module")
def plan():
    return plan_halving(make_sweep(RATES), num_rungs=3, num_places=3, make=make_probe)


@pytest.fixture(scope="module")
def halving(plan):
    return successive_halving(plan, progress=False)


def test_halving_finds_the_setting_that_learns_with_a_share_of_the_updates(halving):
    assert halving.rungs == (5, 15, 45) and halving.best() == {"learning_rate": 3e-2}
    assert halving.num_updates < 0.6 * 2 * 9 * 45
    assert [row["updates"] for row in halving.ranked()][:2] == [45, 15]


def test_every_setting_begins_and_a_third_of_a_rung_goes_on(halving):
    reached = (~np.isnan(halving.scores)).sum(0)
    assert reached[0] == 9 and 3 <= reached[1] < 9 and 1 <= reached[2] <= reached[1]


def test_a_setting_that_turns_nan_does_not_go_on(halving):
    assert np.isneginf(halving.scores[RATES.index(1e30), 0]) and np.isnan(halving.scores[RATES.index(1e30), 1:]).all()


def test_a_run_that_turns_nan_is_named_and_goes_last_whatever_the_loss_reports():
    def unnamed(*args, **kwargs):
        loss, report = pjp.ppo_loss(*args, **kwargs)
        return loss, {"approx_kl": report["approx_kl"]}

    def make(env, config):
        return pjp.make_ppo(copy_cue(), config, loss=unnamed)

    sweep = make_sweep([1e30, 3e-2], num_updates=2)
    with pytest.warns(UserWarning, match=r"^learning_rate=1e\+30 seed=0 turned nan in update 1, where .* seed=1"):
        halving = successive_halving(sweep, num_rungs=2, eta=2, progress=False, make=make)
    assert halving.best() == {"learning_rate": 3e-2} and np.isnan(halving.ranked()[-1]["score"])
    assert [sentence[:33] for sentence in halving.failed()] == [f"learning_rate=1e+30 seed={i} turned" for i in (0, 1)]


def test_a_survivor_is_the_run_that_training_without_halving_gives(halving):
    alone = pjp.run_sweep(make_sweep([3e-2]), progress=False, make=make_probe)
    for seed in range(2):
        mine, other = halving.state(seed, learning_rate=3e-2), alone.state(seed)
        assert mine.num_updates == other.num_updates == 45
        for x, y in zip(jax.tree.leaves(mine.policy), jax.tree.leaves(other.policy)):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_the_plan_says_how_many_settings_reach_each_rung(plan):
    plan = replace(plan, num_places=9)
    assert plan.expected().tolist() == [9, 3, 1]
    steps = (9 * 5 + 3 * 10 + 1 * 30) * 2 * 32  # updates of settings, seeds, steps of an update
    assert f"about {steps:,} steps (26 % of those of all settings to the end)" in str(plan)
    with pytest.raises(ValueError, match="eta cannot be changed after planning"):
        successive_halving(plan, eta=2)


def test_fewer_settings_train_in_smaller_slices_where_there_are_such(plan, halving, monkeypatch):
    ppo, trained = make_probe("probe", plan.sweep.config), []

    def counted(trainer, states, runs, *rest):
        trained.append((len(runs), trainer.program.slice_size))
        return train_runs(trainer, states, runs, *rest)

    monkeypatch.setattr(halving_runs, "train_runs", counted)
    sizes = 6, 4, 2
    trainers = tuple(compile_trainer(plan.sweep, ppo, size, 5, jax.local_devices()) for size in sizes)
    found = successive_halving(replace(plan, trainers=trainers), progress=False)
    assert all(used == min(size for size in sizes if size >= runs) for runs, used in trained)
    assert {used for _, used in trained} >= {6, 2}
    np.testing.assert_allclose(found.scores, halving.scores, rtol=1e-3)


@pytest.mark.parametrize(
    "size, eta, num_rungs, expected", [(216, 3, 4, [216, 72, 24, 8]), (4, 3, 3, [4, 2]), (1, 3, 3, [1]), (2, 2, 2, [2])]
)
def test_an_accelerator_has_slices_for_every_rung_that_fit_where_the_largest_does(size, eta, num_rungs, expected):
    assert sizes_of_rungs(size, eta, num_rungs) == expected


def test_halving_resumes_and_comes_to_the_result_of_an_uninterrupted_call(plan, halving, tmp_path, monkeypatch):
    options = {"progress": False, "save_every": 0}
    trained = []

    def counted(program, states, runs, length, *rest):
        trained.append(len(runs) * length)
        if len(trained) == 4:
            signal.raise_signal(signal.SIGINT)
        return train_runs(program, states, runs, length, *rest)

    monkeypatch.setattr(halving_runs, "train_runs", counted)
    with pytest.raises(pjp.Interrupted, match="resumes from") as error:
        successive_halving(plan, tmp_path, **options)
    assert len(trained) == 4 and error.value.result.num_updates < halving.num_updates
    lost = sorted((tmp_path / "slices").glob("*.npz"))[0]
    lost.unlink()  # as if the call had been killed while it stored a round
    resumed = successive_halving(plan, tmp_path, **options)
    np.testing.assert_array_equal(resumed.scores, halving.scores)
    for x, y in zip(jax.tree.leaves(resumed.states.policy), jax.tree.leaves(halving.states.policy)):
        np.testing.assert_array_equal(x, y)
    whole = halving.num_updates + 2 * 5  # the runs that turned nan tried as well
    assert sum(trained) <= whole + 2 * 15  # the seeds of the setting that was lost
    done = len(trained)
    assert successive_halving(plan, tmp_path, **options).ranked() == halving.ranked()
    assert len(trained) == done  # nothing is left to train
    loaded = pjp.load(tmp_path, make=make_probe)
    assert isinstance(loaded, pjp.SweepResult) and loaded.num_unfinished == 2 * 7  # one is complete, one turned nan
    np.testing.assert_array_equal(loaded.metrics["episode_return"], halving.metrics["episode_return"])
    ranked, rows = loaded.ranked(), halving.ranked()
    assert loaded.best() == halving.best() and ranked["rung"].values.tolist() == [row["updates"] for row in rows]
    np.testing.assert_allclose(ranked["learning_rate"], [row["learning_rate"] for row in rows])
    np.testing.assert_array_equal(ranked["rung_score"], [row["score"] for row in rows])


def test_halving_refuses_the_folder_of_a_sweep_with_other_slices(tmp_path):
    sweep = make_sweep(RATES)
    zeros = np.zeros((4, 1), np.float32)
    slices = open_slices(tmp_path, sweep)
    slices.write(Slice(tuple(sweep.runs([0, 1])), {"loss": zeros}, {"num_updates": zeros[:, 0]}))
    with pytest.raises(ValueError, match="slices of 4 runs, but halving keeps the 2 seeds of every setting in one"):
        successive_halving(sweep, tmp_path, num_rungs=2, eta=2, make=make_probe, progress=False)


def test_halving_and_a_sweep_do_not_write_one_folder_at_the_same_time(plan, tmp_path):
    with claim_folder(tmp_path, note="successive halving"):
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"is being written by this process since .* \(wait for its end, or name"):
            pjp.run_sweep(plan.sweep, tmp_path, make=make_probe, progress=False)
        assert time.monotonic() - started < 100  # which it would wait for another sweep
    (tmp_path / "slices").mkdir()
    with claim(tmp_path / "slices" / "0123.lock", note="learning_rate=0.1 seed=0"):
        with pytest.raises(ValueError, match="is being written by this process since .*, which trains a sweep there"):
            successive_halving(plan, tmp_path, progress=False)
    assert not list((tmp_path / "slices").iterdir())


def test_the_ladder_promotes_from_the_highest_rung_and_fills_free_places_with_new_settings():
    ladder = Ladder((1, 2), 2, 5)
    assert ladder.next_settings(2) == [0, 1]
    ladder.climb([0, 1], [5.0, 7.0])
    assert ladder.next_settings(2) == [1, 2]  # the best of two goes on
    ladder.climb([1, 2], [8.0, 9.0])
    assert ladder.finished() == [1]
    assert ladder.next_settings(2) == [2, 3]  # 2 is the best of three on the first rung
    ladder.climb([2, 3], [1.0, 6.0])
    assert ladder.next_settings(2) == [4]
    ladder.climb([4], [-np.inf])
    assert ladder.next_settings(2) == [] and ladder.finished() == [1, 2]
    failed = Ladder((1, 2), 2, 2)
    failed.climb(failed.next_settings(2), [-np.inf, -np.inf])
    assert failed.next_settings(2) == []  # the best of those that failed has failed too


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: successive_halving(make_sweep(RATES, num_envs=[2, 4])), "need 2 programs"),
        (lambda: successive_halving(make_sweep(RATES), num_rungs=4), "needs .* 27 settings.*there are 9"),
        (lambda: successive_halving(make_sweep(RATES, 4), num_rungs=3), "needs 9 updates, but num_updates=4"),
        (lambda: successive_halving(make_sweep(RATES), num_rungs=2, eta=1), "eta=1"),
        (lambda: successive_halving(make_sweep(RATES), num_rungs=2, num_places=10), "num_places=10 must be at most 9"),
        (lambda: successive_halving(make_sweep(RATES), num_rungs=2, num_places=PART), "num_places=1.5 must be a whole"),
        (lambda: successive_halving(make_sweep(RATES), num_rungs=2, num_places=WORD), "num_places='2' must be a whole"),
        (lambda: optuna_search("CartPole-v1", WRONG, num_trials=1, batch_size=1), "clip=0.1 must be a distri"),
        (lambda: optuna_search("CartPole-v1", {}, num_trials=0, batch_size=1), "num_trials=0"),
    ],
)
def test_a_search_that_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


MAIN = threading.get_ident()


def interrupted(chunks):
    """The loop over chunks with one Ctrl-C, which the main thread has handled before a chunk is done."""
    usual, sent = signal.getsignal(signal.SIGINT), []

    def loop(*args, **kwargs):
        for result in chunks(*args, **kwargs):
            if not sent:
                sent.append(signal.SIGINT)
                signal.pthread_kill(MAIN, signal.SIGINT)  # another thread would not wake it
            while signal.getsignal(signal.SIGINT) is not usual:
                time.sleep(0.01)
            yield result

    return loop


@pytest.mark.slow
def test_optuna_is_asked_for_batches_and_a_study_goes_on_from_its_storage(tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {"learning_rate": pjp.log_uniform(1e-5, 1e-1), "discount": pjp.choice(0.9, 0.99)}
    storage = f"sqlite:///{tmp_path}/study.db"
    options = {"batch_size": 4, "storage": storage, "config": SMALL, "make": make_probe, "progress": False}
    study = optuna_search("probe", space, num_trials=4, **options)
    first = [trial.params for trial in study.trials]
    with pytest.raises(pjp.Interrupted) as error, monkeypatch.context() as patch:
        patch.setattr(run, "chunks", interrupted(run.chunks))
        optuna_search("probe", space, num_trials=8, **options)
    waiting = [trial.params for trial in study.trials if trial.state.name == "FAIL"]
    assert error.value.result.study_name == study.study_name and len(waiting) == 4
    study = optuna_search("probe", space, num_trials=8, **options)
    complete = [trial.params for trial in study.trials if trial.state.name == "COMPLETE"]
    assert len(complete) == 8 and complete == first + waiting  # what was interrupted trains first
    assert len({trial["learning_rate"] for trial in complete}) == 8  # no setting comes again
    assert {trial.params["discount"] for trial in study.trials} <= {0.9, 0.99}
    best = study.best_trial
    table = pjp.paired(**{name: [value] for name, value in best.params.items()})
    sweep = pjp.Sweep("probe", table, config=SMALL, hyperparams=pjp.Hyperparams())
    alone = pjp.run_sweep(sweep, progress=False, make=make_probe)
    np.testing.assert_allclose(best.value, alone.scores.item(), atol=0.1)


def test_a_search_with_a_folder_resumes_its_batch_and_comes_to_the_same_trials(tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {"learning_rate": pjp.log_uniform(1e-5, 1e-1), "clip": pjp.choice(0.1, 0.2)}
    call = {"num_trials": 4, "batch_size": 2, "config": SMALL, "make": make_probe, "progress": False}
    plan = plan_trials("probe", space, num_trials=4, batch_size=2, config=SMALL, make=make_probe)
    assert "4 trials in 2 batches of 2" in str(plan) and f"about {4 * 3 * 32} steps" in str(plan)
    whole = optuna_search("probe", space, folder=tmp_path / "whole", plan=plan, **call)
    with pytest.raises(pjp.Interrupted) as error, monkeypatch.context() as patch:
        patch.setattr(run, "chunks", interrupted(run.chunks))
        optuna_search("probe", space, folder=tmp_path / "cut", plan=plan, **call)
    assert [trial.state.name for trial in error.value.result.trials] == ["RUNNING"] * 2
    stored = [pjp.load(path).metrics for path in (tmp_path / "cut" / "batches").iterdir()]  # what was trained of it
    assert len(stored) == 1
    study = optuna_search("probe", space, folder=tmp_path / "cut", plan=plan, **call)
    assert [trial.params for trial in study.trials] == [trial.params for trial in whole.trials]
    assert [trial.value for trial in study.trials] == [trial.value for trial in whole.trials]
    assert sorted(path.name for path in (tmp_path / "cut" / "batches").iterdir()) == ["000000", "000002"]
    ranked = rank_trials(study)
    assert [row["score"] for row in ranked] == sorted((trial.value for trial in study.trials), reverse=True)
    assert best_setting(study, space) == study.best_trial.params
    with pytest.raises(ValueError, match="belongs to another search, with num_seeds=1 instead of 2"):
        optuna_search("probe", space, folder=tmp_path / "cut", num_seeds=2, **call)


def test_a_batch_that_dies_while_its_scores_are_told_or_is_refused_is_told_by_the_next_call(tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {"learning_rate": pjp.log_uniform(1e-5, 1e-1)}
    call: Any = {"num_trials": 2, "batch_size": 2, "config": SMALL, "make": make_probe, "progress": False}

    def die_after_one(study, trials, scores, *rest):
        tell(study, trials[:1], scores, *rest)
        raise SystemExit

    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        patch.setattr(optuna_search_module, "tell", die_after_one)
        optuna_search("probe", space, folder=tmp_path, **call)
    other = call | {"make": lambda env, config: make_probe(env, config)._replace(optimizer=lambda hyperparams: None)}
    with pytest.raises(ValueError, match="optimizer"):
        optuna_search("probe", space, folder=tmp_path, **other)
    study = optuna_search("probe", space, folder=tmp_path, **call)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    whole = optuna_search("probe", space, folder=tmp_path / "whole", **call)
    assert [trial.value for trial in study.trials] == [trial.value for trial in whole.trials]


@pytest.mark.slow
def test_a_pruner_stops_settings_by_their_returns_and_they_rank_after_the_others(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {"learning_rate": pjp.log_uniform(1e-8, 3e-2)}
    call = {
        "num_trials": 9, "batch_size": 3, "num_seeds": 2, "config": SMALL.with_total_steps(32 * 45),
        "make": make_probe, "progress": False, "pruner": optuna.pruners.MedianPruner(3, n_warmup_steps=9),
    }  # fmt: skip
    study = optuna_search("probe", space, folder=tmp_path, **call)
    states = {trial.number: trial.state.name for trial in study.trials}
    pruned = [number for number, state in states.items() if state == "PRUNED"]
    assert len(states) == 9 and pruned and set(states.values()) == {"COMPLETE", "PRUNED"}
    stored = {
        path.name: {x.runs[0]: x.num_updates for x in result.slices.read()}
        for path in (tmp_path / "batches").iterdir()
        if isinstance(result := pjp.load(path), pjp.SweepResult)
    }
    for trial in study.trials:
        batch = stored[trial.user_attrs["batch"]]
        (updates,) = (x for name, x in batch.items() if name == name_run(trial.params, 0))
        assert (updates == 45) == (trial.number not in pruned) and updates == trial.last_step
        assert list(trial.intermediate_values) == list(range(1, updates + 1))
        if trial.number in pruned:  # those that had come so far were better, by the median
            others = [x for x in study.trials if x.number != trial.number and updates in x.intermediate_values]
            assert trial.value < max(x.intermediate_values[updates] for x in others)
    ranked = rank_trials(study)
    assert [row["updates"] == "all" for row in ranked] == [True] * (9 - len(pruned)) + [False] * len(pruned)
    assert optuna_search("probe", space, folder=tmp_path, **call).trials == study.trials


def stored_trial(number, state, seconds=0.0, **attributes):
    """A trial that began so many seconds ago, as a study has it."""
    finished, began = state not in ("RUNNING", "WAITING"), datetime.datetime.now() - datetime.timedelta(seconds=seconds)
    said = SimpleNamespace(name=state, is_finished=lambda: finished)
    return SimpleNamespace(number=number, state=said, datetime_start=began, user_attrs=attributes)


def test_a_trial_counts_as_taken_before_its_worker_has_named_itself_but_not_for_ever(monkeypatch):
    trial = stored_trial
    trials = [trial(0, "COMPLETE"), trial(1, "RUNNING", 1e4, worker="a"), trial(2, "RUNNING"), trial(3, "RUNNING", 1e4)]
    monkeypatch.setattr(studies, "_is_shared", lambda study: study.shared)
    assert studies.num_taken(SimpleNamespace(trials=trials, shared=True)) == 3
    assert studies.num_taken(SimpleNamespace(trials=trials, shared=False)) == 1  # nobody else trains any
    trials[1].user_attrs[studies.INTERRUPTED] = True
    assert studies.num_taken(SimpleNamespace(trials=trials, shared=True)) == 2  # that one was withdrawn


def test_a_drawn_trial_is_surplus_if_enough_with_lower_numbers_are_finished_running_or_waiting(monkeypatch):
    monkeypatch.setattr(studies, "_is_shared", lambda study: study.shared)
    trial = stored_trial
    others = [
        trial(0, "FAIL"),
        trial(1, "COMPLETE"),
        trial(2, "FAIL", interrupted=True),
        trial(3, "RUNNING", worker="a"),
        trial(5, "WAITING", instead_of=0),
        trial(8, "WAITING"),
    ]
    drawn = [trial(number, "RUNNING", worker="b") for number in (4, 6, 7)]
    study = SimpleNamespace(trials=[*others, *drawn], shared=True)
    found = [[x.number for x in studies.surplus(study, drawn, num_trials)] for num_trials in (2, 3, 4, 5, 6)]
    assert found == [[4, 6, 7], [6, 7], [6, 7], [7], []]  # 1, 3, 4, 5, 6 and 7 count, in this order
    study.shared = False
    assert studies.surplus(study, drawn, 2) == []


@pytest.mark.parametrize("num_trials, batch_size, at_most", [(12, 3, 12), (10, 4, 12)])
@pytest.mark.parametrize("seed, num_until_stale", [(0, 0), (1, 6), (2, 9), (3, 12), (4, 12)])
def test_workers_that_draw_at_the_same_time_make_no_trial_too_many(
    num_trials, batch_size, at_most, seed, num_until_stale, monkeypatch
):
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(direction="maximize", sampler=studies.own_sampler(0))
    lock, draw = threading.Lock(), studies.draw
    rng = np.random.default_rng(seed)

    def slow_draw(study, distributions):
        time.sleep(rng.uniform(0.0, 0.005))
        with lock:
            trial = draw(study, distributions)
        time.sleep(rng.uniform(0.0, 0.005))
        return trial

    def fail_stale(study):
        """Trials of the worker that is gone fail after a while, and wait to be trained again."""
        with lock:
            for trial in study.trials if len(study.trials) >= num_until_stale else ():
                if trial.number in lost and trial.state.name == "RUNNING":
                    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                    study.enqueue_trial(trial.params, user_attrs={studies.INSTEAD_OF: trial.number})

    def work():
        while studies.num_finished(study) < num_trials:
            trials: list[Any] = []
            batches._next(trials)
            time.sleep(rng.uniform(0.0, 0.01))
            studies.tell(study, trials, [1.0] * len(trials))

    study._storage.record_heartbeat = lambda trial_id: None
    monkeypatch.setattr(studies, "_is_shared", lambda study: True)
    monkeypatch.setattr(optuna_search_module, "draw", slow_draw)
    monkeypatch.setattr(optuna_search_module, "take_again", fail_stale)
    space = {"learning_rate": pjp.log_uniform(1e-4, 1e-2)}
    batches = optuna_search_module._Batches(
        study, space, num_trials, batch_size, None, 60.0, make_probe, None, None, ()
    )
    gone: list[Any] = []
    batches._next(gone)
    lost = {trial.number for trial in gone}
    workers = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=30)
    counted = studies.finished_trials(study)
    assert num_trials <= len(counted) == len({trial.params["learning_rate"] for trial in counted}) <= at_most
    waiting = [trial for trial in study.trials if trial.state.name == "WAITING"]
    again = {trial.user_attrs.get(studies.INSTEAD_OF) for trial in [*counted, *waiting]}
    assert again - {None} == lost  # nothing that the worker left is forgotten
    assert all(trial.state.is_finished() or trial in waiting for trial in study.trials)


def test_settings_that_waited_wait_again_when_they_are_not_needed_and_a_batch_without_any_leaves_no_folder(
    tmp_path, monkeypatch
):
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(direction="maximize", sampler=studies.own_sampler(0))
    study._storage.record_heartbeat = lambda trial_id: None
    monkeypatch.setattr(studies, "_is_shared", lambda study: True)
    space = {"learning_rate": pjp.log_uniform(1e-4, 1e-2)}

    def draw(num_trials):
        batches = optuna_search_module._Batches(study, space, num_trials, 2, tmp_path, 60.0, make_probe, None, None, ())
        trials: list[Any] = []
        return batches._next(trials), trials

    path, first = draw(4)
    assert path and path.is_dir() and len(first) == 2
    assert draw(4)[0] == path and [x.number for x in draw(4)[1]] == [0, 1]  # not begun: the same batch
    studies.withdraw(study, draw(4)[1][1:], again=False)  # frozen trials
    assert [x.number for x in draw(4)[1]] == [0, 2]  # filled up, without the one that was withdrawn
    others = [studies.draw(study, {}) for _ in range(3)]  # of another worker, 3 to 5
    study.enqueue_trial({"learning_rate": 0.005})
    studies.tell(study, draw(4)[1], [1.0, 1.0])
    studies.tell(study, others[:1], [1.0])
    others[1].set_user_attr(studies.INTERRUPTED, True)
    num_taken = studies.num_taken
    monkeypatch.setattr(optuna_search_module, "num_taken", lambda study: 0)  # as before the others drew
    assert num_taken(study) == 4 and draw(4)[1] == []
    assert len(list((tmp_path / "batches").iterdir())) == 1
    (waiting,) = [trial for trial in study.trials if trial.state.name == "WAITING"]
    assert waiting.system_attrs["fixed_params"] == {"learning_rate": 0.005}


def test_training_some_runs_leaves_the_others_as_they_are(key):
    from concurrent.futures import ThreadPoolExecutor

    many = pjp.batched(pjp.make_ppo(copy_cue(), SMALL))
    states = many.init(jax.random.split(key, 5))
    with reported_failures():
        program = pjp.compile_training(many, states[:2], 2, slice_size=2)
    trainer = Trainer(program, None, states.num_updates.sharding, jax.devices()[0])
    with ThreadPoolExecutor(2) as pool:
        after, metrics = train_runs(trainer, states, np.array([4, 0, 2]), 2, pool)
    assert after.num_updates.tolist() == [2, 0, 2, 0, 2] and {x.shape for x in metrics.values()} == {(3, 2)}
    np.testing.assert_array_equal(jax.random.key_data(after[[1, 3]].key), jax.random.key_data(states[[1, 3]].key))


MEMBERS: Any = {"rates": [1e-6, 1e-2, 1e-6 * 2, 1e-5], "num_updates": 12}


@pytest.fixture(scope="module")
def population_plan():
    return plan_population(make_sweep(**MEMBERS), every=3, make=make_probe)


@pytest.fixture(scope="module")
def population(population_plan):
    return population_search(population_plan, progress=False)


def test_the_plan_of_a_population_says_its_evolutions_and_ranges(population_plan):
    text = str(population_plan)
    assert "8 members x 384 steps = 3,072 steps" in text
    assert "4 evolutions, one after every 3 updates, each of which replaces at most 2 members" in text
    assert population_plan.explore == {"learning_rate": (1e-6, 1e-2)}
    assert len({tuple(key) for key in jax.random.key_data(population_plan.start().runs.key).tolist()}) == 8


def test_the_winner_of_a_population_is_its_fittest_member_and_its_line_leads_back_to_its_founder(population):
    state, parents = population.fit.state, population.parents
    ranked, winner = population.ranked(), population.winner()
    assert ranked[0]["member"] == winner and ranked[0]["score"] == state.fitness[winner] == max(state.fitness)
    own = parents[:, -1] == np.arange(8)
    assert {row["member"] for row in ranked if np.isnan(row["score"])} == set(np.flatnonzero(~own).tolist())
    line = population.lineage().line
    for update in range(1, 12):  # forwards: who stands in the line continues from who stood in it before
        assert parents[line[update], update - 1] == line[update - 1]
    assert ranked[0]["founder"] == line[0]
    rates = population.fit.metrics["learning_rate"].values
    expected = [rates[line[update], update] for update in range(12)]
    schedule = population.schedule()
    followed = [[row for row in schedule if row["from_update"] <= update + 1][-1] for update in range(12)]
    np.testing.assert_allclose([row["learning_rate"] for row in followed], expected, rtol=1e-6)
    assert population.best() == {"learning_rate": ranked[0]["learning_rate"]}


def test_a_member_that_was_replaced_after_its_evaluation_has_no_score():
    """Evaluated after updates 2 and 4; member 0 is replaced in update 3, member 1 in update 4, which then plays."""
    nan = np.nan
    data = {
        "parent": [[0, 0, 2, 0, 0], [1, 1, 1, 2, 1], [2, 2, 2, 2, 2]],
        "evaluation_return": [[nan, 5, nan, nan, nan], [nan, 6, nan, 8, nan], [nan, 7, nan, 9, nan]],
        "learning_rate": np.ones((3, 5)), "loss": np.ones((3, 5)),
        "episode_return": np.zeros((3, 5)), "num_episodes": np.ones((3, 5)),
    }  # fmt: skip
    metrics = xarray.Dataset({name: (("run", "updates"), np.asarray(x, float)) for name, x in data.items()})
    zeros = np.zeros(3, int)
    metrics = metrics.assign(failed_update=("run", zeros), failed_metric=("run", zeros.astype(str)))
    metrics = metrics.assign_coords(updates=np.arange(1, 6), step=("updates", np.arange(1, 6)), run=np.arange(3))
    found: Any = SimpleNamespace(metrics=metrics)
    search = PopulationSearch(pjp.Sweep("CartPole-v1", pjp.Table(), 3, evaluate_every=2), ("learning_rate",), found)
    np.testing.assert_array_equal(search.scores, [nan, 8, 9])


def test_a_population_resumes_in_its_folder_to_the_bit(population_plan, population, tmp_path, monkeypatch):
    with pytest.raises(pjp.Interrupted) as error, monkeypatch.context() as patch:
        patch.setattr(fit_module, "chunks", interrupted(fit_module.chunks))
        population_search(population_plan, tmp_path, progress=False)
    assert 0 < error.value.result.parents.shape[1] < 12
    four: Any = np.int64(4)
    for fraction, every, words in (
        (0.4, 3, rf"fraction=0.4 differs from the 0.25 of the population in folder={tmp_path}"),
        (0.25, four, "every=4 differs from the 3 of the population"),
    ):
        with pytest.raises(ValueError, match=words):
            plan_population(make_sweep(**MEMBERS), tmp_path, make=never, every=every, fraction=fraction)
    resumed = population_search(population_plan, tmp_path, progress=False)
    np.testing.assert_array_equal(resumed.parents, population.parents)
    assert str(resumed.ranked()) == str(population.ranked())  # nan is not nan


@pytest.mark.parametrize(
    "sweep, options, words",
    [
        (lambda: make_sweep(RATES, num_envs=[2, 4]), {}, "num_envs differs between members"),
        (lambda: make_sweep(RATES), {"explore": {"num_envs": (2, 4)}}, "'num_envs', which is not a hyperparameter"),
        (lambda: make_sweep(RATES), {"every": 46}, "every=46 must be at most 45, the updates of the run"),
        (lambda: make_sweep([1e-3], num_seeds=2), {}, "of 2 runs rounds down to 0 runs to replace"),
        (lambda: pjp.Sweep("probe", config=SMALL, hyperparams=pjp.Hyperparams()), {}, "explore={} must name one"),
    ],
)
def test_a_population_that_cannot_be_is_refused(sweep, options, words):
    with pytest.raises(ValueError, match=words):
        population_search(sweep(), make=make_probe, **options)


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"learning_rate": 1e-3, "num_envs": 16, "widths": (32, 16)}, ["--widths 32 16", "--num-updates 292"]),
        (
            {"clip_value_loss": False, "normalize_observation": True, "target_kl": float("inf")},
            ["--no-clip-value-loss"],
        ),
        ({"extra.beta": 0.25, "discount": 0.5, "loss": "losses:mine"}, ["--extra beta 0.25", "--loss losses:mine"]),
    ],
)
def test_the_command_of_the_best_setting_trains_with_it(setting, words):
    sweep = pjp.Sweep("CartPole-v1")
    command = train_command(sweep, setting)
    program, subcommand, *arguments = shlex.split(command)
    assert (program, subcommand) == ("purejaxppo", "train") and all(word in command for word in words)
    options = parse(TrainOptions, "train", arguments)
    assert options.config == sweep.config_of(setting) and options.hyperparams == sweep.hyperparams_of(setting)
    assert "env.gravity=9" in train_command(sweep, {"env.gravity": 9}).split()


@pytest.mark.parametrize("number, rungs", [(1, (20,)), (3, (6, 18)), (8, (6, 18)), (9, (2, 6, 18))])
def test_few_settings_are_compared_less_often(number, rungs):
    sweep = make_sweep(np.geomspace(1e-4, 1e-2, number), 20)
    assert plan_halving(sweep, make=make_probe).rungs == rungs
