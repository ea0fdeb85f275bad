import contextlib
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray
from tqdm.auto import tqdm

import purejaxppo as pjp
from probes import SMALL
from purejaxppo.experiment import datasets, files
from purejaxppo.experiment.files import from_arrays, to_arrays
from purejaxppo.experiment.lock import STALE_AFTER, claim, claim_folder
from purejaxppo.experiment.program import Program
from purejaxppo.experiment.sweeps import slices
from purejaxppo.experiment.sweeps.division import Share, pending_slices
from purejaxppo.experiment.sweeps.plan import plan_sweep
from purejaxppo.experiment.sweeps.slices import Slices, read_division, read_sessions, read_sweep

pytestmark = pytest.mark.full

PROGRAM = Path(__file__).parent / "sweep_program.py"
LEARNING_RATES, DISCOUNTS = [1e-3, 1e-2], [0.9, 0.99]


def make_sweep(num_seeds: Any = 2, **values):
    table = pjp.grid(**values or {"learning_rate": LEARNING_RATES, "discount": DISCOUNTS})
    return pjp.Sweep("CartPole-v1", table, num_seeds, config=SMALL, hyperparams=pjp.Hyperparams())


def run(sweep, folder=None, **options):
    return pjp.run_sweep(sweep, folder, progress=False, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep") / "one"


@pytest.fixture(scope="module")
def plan():
    return plan_sweep(make_sweep())


@pytest.fixture(scope="module")
def result(plan, folder):
    return run(plan, folder)


def test_every_field_is_a_dimension_beside_seeds_and_updates(result):
    episode_return = result.metrics["episode_return"]
    assert episode_return.sizes == {"learning_rate": 2, "discount": 2, "seed": 2, "updates": 3}
    assert episode_return["learning_rate"].values.tolist() == LEARNING_RATES
    assert result.metrics["step"].values.tolist() == [32, 64, 96]
    assert not result.metrics["failed_update"].any() and not result.failed()


def test_the_folder_keeps_the_steps_and_the_time_of_every_session(result, folder):
    session = read_sessions(folder)[0]
    assert session.get("steps") == result.steps == 4 * 2 * 96
    assert session.get("run_seconds") == pytest.approx(result.run_seconds)


def make_reporting(env, config):
    """A PPO whose loss has a coefficient of its own and reports a vector, whose environment reports its time."""
    base = pjp.make_env(env)

    def step(key, state, action, params):
        result = base.step(key, state, action, params)
        return result._replace(metrics={"time": result.state.time}) if env == "CartPole-v1" else result

    def loss(params, minibatch, hyperparams, *, network, config):
        total, report = pjp.ppo_loss(params, minibatch, hyperparams, network=network, config=config)
        penalty = hyperparams.extra["beta"] * report["entropy"]
        parts = [total, penalty, total][: 3 if env == "CartPole-v1" else 2]  # one more in one environment
        return total + penalty, report | {"parts": jnp.stack(parts)}

    return pjp.make_ppo(base._replace(step=step), config, loss=loss)


def test_coefficients_vectors_and_numbers_of_environments_are_swept_kept_and_read_back(tmp_path):
    table = pjp.grid(**{"extra.beta": [0.0, 0.5], "env": ["CartPole-v1", "Acrobot-v1"]})
    sweep = pjp.Sweep("CartPole-v1", table, 2, config=SMALL, hyperparams=pjp.Hyperparams())
    result = run(sweep, tmp_path / "sweep", make=make_reporting)
    parts = result.metrics["parts"]
    assert parts.dims == ("extra.beta", "env", "seed", "updates", "parts_index")
    np.testing.assert_allclose(parts[1, ..., 1], 0.5 * result.metrics["entropy"][1], rtol=1e-5)
    assert parts[..., 2].isnull().all(["extra.beta", "seed", "updates"]).values.tolist() == [False, True]
    assert (result.metrics["time"].sel(env="CartPole-v1") > 0).all()
    assert result.metrics["time"].sel(env="Acrobot-v1").isnull().all()
    again = pjp.load(tmp_path / "sweep", make=make_reporting)
    assert isinstance(again, pjp.SweepResult)
    xarray.testing.assert_equal(again.metrics, result.metrics)
    state = again.state(seed=1, **{"extra.beta": 0.5, "env": "CartPole-v1"})
    assert state.hyperparams.extra["beta"] == 0.5
    assert run(sweep, tmp_path / "sweep", make=make_reporting).steps == 0
    other = replace(sweep, table=pjp.grid(env=["CartPole-v1", "Acrobot-v1"]))
    with pytest.raises(ValueError, match="holds another sweep"):
        run(other, tmp_path / "sweep", make=make_reporting)


def test_a_run_of_the_sweep_equals_that_run_alone(result):
    """After the first update, to rounding; learning amplifies rounding beyond that."""
    key = jax.random.fold_in(jax.random.key(0), 1)
    ppo = pjp.make_ppo("CartPole-v1", SMALL)
    _, alone = jax.jit(ppo.step)(ppo.init(key, pjp.Hyperparams(learning_rate=1e-2, discount=0.9)))
    first = result.metrics.sel(learning_rate=1e-2, discount=0.9, seed=1).isel(updates=0)
    for name in ("loss", "value_loss", "approx_kl", "entropy", "grad_norm", "value_mean"):
        np.testing.assert_allclose(first[name], alone[name], rtol=1e-5, atol=1e-5)


def test_a_sweep_is_a_table_with_its_fields_as_columns(result):
    table = result.to_dataframe()
    assert len(table) == 2 * 2 * 2 * 3
    rows = table[(table["learning_rate"] == 1e-2) & (table["discount"] == 0.9) & (table["seed"] == 1)]
    expected = result.metrics["loss"].sel(learning_rate=1e-2, discount=0.9, seed=1)
    np.testing.assert_array_equal(rows["loss"], expected)


def test_a_policy_comes_out_of_the_batch_ready_to_act_and_to_be_trained_on(result):
    setting = {"learning_rate": 1e-2, "discount": 0.99}
    ppo, state = result.ppo(**setting), result.state(seed=1, **setting)
    assert float(state.hyperparams.learning_rate) == np.float32(1e-2) and int(state.num_updates) == 3
    action, _ = ppo.act(result.policy(seed=1, **setting), np.zeros(4))
    assert action in (0, 1)
    state, _ = jax.jit(ppo.step)(state)
    assert int(state.num_updates) == 4


def test_the_folder_gives_the_same_result_back_in_open_formats(result, folder):
    again = pjp.load(folder)
    xarray.testing.assert_equal(again.metrics, result.metrics)
    assert isinstance(again, pjp.SweepResult) and again.sweep == result.sweep and again.best() == result.best()
    on_disk = xarray.load_dataset(folder / "results.nc", engine="scipy")
    xarray.testing.assert_equal(on_disk, result.metrics)
    assert {"purejaxppo", "jax", "device", "matmul_precision", "sweep", "machine"} <= on_disk.attrs.keys()
    chex.assert_trees_all_equal(again.policy(**again.best()), result.policy(**result.best()))


def test_a_finished_sweep_is_not_trained_again(result, folder):
    assert plan_sweep(result.sweep, folder).groups == []
    again = run(result.sweep, folder)
    assert again.steps == 0
    xarray.testing.assert_equal(again.metrics, result.metrics)


def test_seeds_and_settings_are_added_to_a_finished_sweep(plan, result, tmp_path):
    run(plan, tmp_path / "more")
    more = make_sweep(3, learning_rate=[*LEARNING_RATES, 1e-1], discount=DISCOUNTS)
    added = run(more, tmp_path / "more")
    assert added.steps == (3 * 3 * 2 - 8) * SMALL.total_steps
    before = added.metrics.sel(learning_rate=LEARNING_RATES).isel(seed=slice(2))
    xarray.testing.assert_equal(before, result.metrics)
    assert np.isfinite(added.metrics["loss"]).all()


def test_static_fields_make_groups_of_their_own_with_as_many_steps(tmp_path):
    sizes = pjp.paired(widths=[(8,), (4, 4)], num_envs=[4, 2])
    plan = plan_sweep(replace(make_sweep(1), table=sizes * pjp.grid(learning_rate=LEARNING_RATES)), tmp_path / "none")
    assert len(plan.groups) == 2 and plan.total_steps == 4 * SMALL.total_steps
    assert not (tmp_path / "none").exists()
    for word in ("4,4", "4 runs", "slices", "memory per run", "memory of a run, in MiB", "working memory"):
        assert word in str(plan)
    result = run(plan)
    steps = result.metrics["step"]
    assert steps.dims == ("setting", "updates") and steps[1].values.tolist() == [16, 32, 48, 64, 80, 96]
    loss = result.metrics["loss"]
    assert np.isfinite(loss[1]).all() and np.isnan(loss[0].isel(updates=slice(3, None))).all()
    kernel = result.policy(widths=(4, 4), num_envs=2, learning_rate=1e-2).params["params"]["actor"]
    assert "4,4" in result.metrics["widths"].values and jax.tree.leaves(kernel)


def test_environments_and_their_parameters_are_swept():
    pendulum = pjp.grid(env=["Pendulum-v1"]) * pjp.paired(**{"env.g": [10.0, 0.0], "learning_rate": LEARNING_RATES})
    result = run(pjp.Sweep("CartPole-v1", pendulum, 1, config=SMALL))
    assert result.metrics["loss"].dims == ("env", "setting", "seed", "updates")
    assert result.metrics["env.g"].values.tolist() == [10, 0]
    setting: dict = {"env.g": 0.0}
    assert float(result.state(**setting).env_params.g) == 0
    assert result.ppo(**setting).env.name == "Pendulum-v1"


def test_a_run_that_turns_nan_is_named_and_changes_no_other(plan, result):
    with pytest.warns(UserWarning, match="^learning_rate=1e\\+30 .* turned nan in update 1, where loss was not finite"):
        poisoned = run(replace(plan, sweep=make_sweep(2, learning_rate=[1e-3, 1e30], discount=DISCOUNTS)))
    assert len(poisoned.failed()) == 4 and poisoned.num_unfinished == 0
    assert np.isnan(poisoned.ranked()["iqm"].values).tolist() == [False, False, True, True]
    assert poisoned.failed()[0].startswith("learning_rate=1e+30 discount=0.9 seed=0 turned nan in update")
    before = poisoned.metrics["failed_update"].sel(learning_rate=1e30)
    assert (before > 0).all() and np.isnan(poisoned.scores.sel(learning_rate=1e30)).all()
    assert np.isfinite(jax.tree.leaves(poisoned.policy(learning_rate=1e30, discount=0.9).params)[0]).all()
    xarray.testing.assert_equal(
        poisoned.metrics.sel(learning_rate=1e-3).drop_vars("failed_update"),
        result.metrics.sel(learning_rate=1e-3).drop_vars("failed_update"),
    )


def test_slices_do_not_change_the_first_update(result):
    other = run(make_sweep(), slice_size=3)
    for name in ("loss", "entropy", "episode_return", "num_episodes"):
        np.testing.assert_allclose(
            other.metrics[name].isel(updates=0), result.metrics[name].isel(updates=0), rtol=1e-5, atol=1e-5
        )


def test_a_plan_compiles_training_once_for_all_hyperparameters(plan, result):
    (part,) = plan.groups
    assert part.num_runs == 8 <= part.num_slices * part.slice_size
    state = result.state(**result.best())
    assert part.stored_bytes == sum(x.nbytes for x in to_arrays(state).values()) + 4 * 16 * 3
    assert part.device_bytes > sum(x.nbytes for x in to_arrays(state).values())


def test_a_sweep_is_data_that_json_holds():
    sweep = make_sweep(3, clip=[float("inf"), 0.1], widths=[(8,), (8, 8)], env=["CartPole-v1"])
    assert pjp.Sweep.from_json(json.loads(json.dumps(sweep.to_json()))) == sweep
    assert "12 runs" in str(sweep) and "8,8" in str(sweep)


def test_states_go_to_arrays_and_back(key):
    state = pjp.batched(pjp.make_ppo("CartPole-v1", SMALL)).init(jax.random.split(key, 2))
    chex.assert_trees_all_equal(from_arrays(to_arrays(state), jax.eval_shape(lambda: state)), state)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: make_sweep(learning_rte=[1e-3]), "learning_rte is not a field.*did you mean learning_rate"),
        (lambda: make_sweep(learning_rate=["fast"]), "learning_rate='fast' must be a number"),
        (lambda: make_sweep(discount=[0.9, 1.5]), "discount=1.5"),
        (lambda: make_sweep(num_envs=[4, 0]), "num_envs=0"),
        (lambda: make_sweep(num_envs=["four"]), "num_envs='four'"),
        (lambda: make_sweep(seed=[1]), "num_seeds says how many"),
        (lambda: make_sweep(0), "num_seeds=0"),
        (lambda: plan_sweep(make_sweep(**{"env.gravityy": [1.0]})), "env.gravityy is not a parameter of CartPole-v1"),
        (lambda: plan_sweep(make_sweep(**{"env.gravity": ["heavy"]})), "env.gravity=heavy must be a number"),
        (lambda: plan_sweep(make_sweep(**{"env.max_steps_in_episode": [9.5]})), "9.5 must be a whole number"),
        (lambda: plan_sweep(make_sweep(env=["CartPole-v9"])), "CartPole-v9"),
        (lambda: plan_sweep(make_sweep(), slice_size=9), "slice_size=9 must be at most 8, the runs"),
        (lambda: pjp.Sweep("CartPole-v1", cast(Any, {"clip": [1]})), "must be a Table"),
        (
            lambda: pjp.Sweep("CartPole-v1", hyperparams=pjp.Hyperparams(clip=pjp.linear(0.2, 0.1))),
            "clip is a schedule",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 1}, "another sweep, with seed=0 instead of 1"),
        ({"num_seeds": 1}, "2 seeds of every setting"),
        ({"table": pjp.grid(learning_rate=[1e-3])}, "another sweep, with the setting"),
        ({"config": replace(SMALL, num_epochs=1)}, "num_epochs=2 instead of 1"),
    ],
)
def test_a_folder_of_another_sweep_is_refused_and_kept(result, folder, change, words):
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(ValueError, match=words):
        run(replace(make_sweep(), **change), folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_results_that_do_not_fit_on_the_disk_are_refused_before_training(plan, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match="0.0 MiB free, but the results of what is to train take"):
        run(plan, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_a_sweep_resumes_on_a_disk_with_room_for_what_is_missing(plan, result, monkeypatch, tmp_path):
    run(plan, tmp_path)
    gone, *others = sorted((tmp_path / "slices").glob("*.npz"))
    gone.unlink()
    again = plan_sweep(plan.sweep, tmp_path)
    missing = plan.stored_bytes / (len(others) + 1)
    assert again.stored_bytes == pytest.approx(missing) and again.total_steps < plan.total_steps
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1.5 * missing})())
    xarray.testing.assert_equal(run(again, tmp_path).metrics, result.metrics)


@pytest.mark.parametrize(
    "where, what", [(None, {}), ({"learning_rate": 5.0}, {}), ({"clip": 0.1}, {}), ({}, {"seed": 7})]
)
def test_a_run_that_is_not_there_is_named(result, where, what):
    with pytest.raises(ValueError, match="matches 4 settings|none of the 4|was not swept|seed=7"):
        result.state(**what, **({"learning_rate": 1e-3, "discount": 0.9} if what else where or {}))


def test_a_damaged_slice_is_named_and_computed_anew(plan, result, tmp_path):
    run(plan, tmp_path)
    path = sorted((tmp_path / "slices").glob("*.npz"))[0]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
        again = run(plan, tmp_path)
    xarray.testing.assert_equal(again.metrics, result.metrics)


def test_an_interrupt_keeps_what_is_done_and_the_next_call_goes_on(plan, result, tmp_path, monkeypatch):
    real, calls, usual = Program.start, [], signal.getsignal(signal.SIGINT)

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        # The main thread handles the signal; were it slow, all would be done by then.
        while len(calls) >= 3 and signal.getsignal(signal.SIGINT) is not usual:
            time.sleep(0.01)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Program, "start", interrupted)
    with pytest.raises(pjp.Interrupted) as error:
        run(plan, tmp_path)
    part = error.value.result
    assert part.interrupted and part.num_unfinished
    assert f"{part.num_unfinished} of 8 runs unfinished" in str(error.value)
    monkeypatch.undo()
    assert 0 < part.steps < 8 * SMALL.total_steps
    assert np.isfinite(part.metrics["loss"]).any() and not part.failed()
    rest = run(plan, tmp_path)
    assert rest.steps + part.steps == 8 * SMALL.total_steps
    xarray.testing.assert_equal(rest.metrics, result.metrics)


@pytest.fixture(scope="module")
def small_slices():
    """Four slices of two runs."""
    return plan_sweep(make_sweep(), slice_size=2)


def test_calls_that_share_a_folder_divide_the_slices_and_say_so(small_slices, tmp_path, monkeypatch):
    folder, written, real = tmp_path / "shared", [], Slices.write

    def write(self, slice_):
        time.sleep(0.2)  # so that the one that starts later finds some that are being trained
        written.append((id(self), slice_.name, slice_.num_updates))
        real(self, slice_)

    monkeypatch.setattr(Slices, "write", write)
    with warnings.catch_warnings(record=True) as told, ThreadPoolExecutor(2) as pool:
        warnings.simplefilter("always")
        results = list(pool.map(lambda _: run(small_slices, folder), range(2)))
    by_call = [{name for call, name, _ in written if call == id(result.slices)} for result in results]
    assert all(by_call) and not by_call[0] & by_call[1] and len(set(written)) == len(written)
    assert sum(result.steps for result in results) == 8 * SMALL.total_steps
    sentences = [str(warning.message) for warning in told if warning.category is UserWarning]
    assert all("is shared with other calls: this one left" in sentence for sentence in sentences)
    monkeypatch.undo()
    alone = run(small_slices)
    xarray.testing.assert_equal(run(small_slices, folder).metrics, alone.metrics)
    xarray.testing.assert_equal(xarray.load_dataset(folder / "results.nc", engine="scipy"), alone.metrics)
    assert {path.suffix for path in folder.rglob("*.*")} == {".json", ".nc", ".npz"}


def test_a_slice_is_left_out_if_another_call_trains_some_of_its_runs(plan, small_slices, tmp_path):
    """The other call has begun the first of four slices of two runs; slices of four runs overlap with it."""
    (compiled,) = small_slices.groups
    first = pending_slices(small_slices.sweep, compiled.group, [], 2)[0]
    (tmp_path / "slices").mkdir()
    lock = claim(tmp_path / "slices" / f"{first.name}.lock", note="\n".join(first.runs))
    with lock, pytest.warns(UserWarning, match="this one left 1 slice to this process since .* holds what is stored"):
        result = run(plan, tmp_path)
    assert 0 < result.steps < 8 * SMALL.total_steps
    (left,) = pending_slices(plan.sweep, compiled.group, result.slices.read(), plan.groups[0].slice_size)
    (tmp_path / "slices" / f"{left.name}.npz.{'0' * 32}.half").write_text("")  # of a writer that was killed
    assert run(plan, tmp_path).steps == 8 * SMALL.total_steps - result.steps
    assert not list(tmp_path.rglob("*.half"))


def test_a_call_that_can_train_nothing_says_who_has_it(small_slices, tmp_path):
    (compiled,) = small_slices.groups
    (tmp_path / "slices").mkdir()
    with contextlib.ExitStack() as locks:
        for second, slice_ in enumerate(pending_slices(small_slices.sweep, compiled.group, [], 2)):
            path = tmp_path / "slices" / f"{slice_.name}.lock"
            locks.enter_context(claim(path))
            holder, _, note = path.read_text().partition("\n")
            since = f"2026-11-26 18:59:{second:02} UTC"  # locks of one process are taken at different times
            path.write_text(json.dumps(json.loads(holder) | {"since": since}) + "\n" + note)
        left = "left 4 slices to this process since 2026-11-26 18:59:00 UTC;"
        with pytest.raises(ValueError, match=f"^folder={tmp_path} is shared .* {left}"):
            run(small_slices, tmp_path)


def test_shares_train_their_slices_and_a_call_without_a_share_the_rest(small_slices, tmp_path):
    first, fourth = (replace(small_slices, share=Share(index, 4)) for index in (0, 3))
    with pytest.raises(ValueError, match="^share=4/9 needs a folder, the same for all shares"):
        plan_sweep(make_sweep(), share=(4, 9))
    with pytest.raises(ValueError, match="share cannot be changed after planning"):
        run(small_slices, tmp_path, share=(0, 4))
    with pytest.raises(ValueError, match="^share=4/5 has no slice, and nothing is stored yet"):
        run(replace(small_slices, share=Share(4, 5)), tmp_path)
    assert run(first, tmp_path).steps == 2 * SMALL.total_steps
    done = plan_sweep(make_sweep(), tmp_path, share=(0, 4))
    words = "share 0/4: 0 slices; missing so far: 6 of 8 runs, such as learning_rate=0.001 discount=0.99 seed=0"
    assert not done.groups and words in str(done)
    assert run(first, tmp_path).steps == 0
    assert run(fourth, tmp_path).num_unfinished == 4
    rest = run(small_slices, tmp_path)
    assert rest.steps == 4 * SMALL.total_steps
    xarray.testing.assert_equal(rest.metrics, run(small_slices).metrics)


def test_shares_that_start_at_once_with_other_slice_sizes_use_those_of_the_first(plan, small_slices, tmp_path):
    other = replace(
        plan, share=Share(1, 2), again=partial(plan_sweep, plan.sweep, share=(1, 2))
    )  # made for slices of four
    assert run(replace(small_slices, share=Share(0, 2)), tmp_path).steps == 4 * SMALL.total_steps
    with pytest.warns(UserWarning, match="divides the sweep in another way than the plan"):
        result = run(other, tmp_path)
    assert result.steps == 4 * SMALL.total_steps and [len(x.runs) for x in result.slices.read()] == [2] * 4
    xarray.testing.assert_equal(result.metrics, run(small_slices).metrics)
    with pytest.raises(ValueError, match="slice_size=4 differs from the 2 of the slices in the folder"):
        plan_sweep(make_sweep(), tmp_path, slice_size=4)


def test_a_folder_of_before_divisions_were_kept_is_read(small_slices, tmp_path):
    result = run(small_slices, tmp_path)
    record = json.loads((tmp_path / "sweep.json").read_text())
    division = record.pop("division")
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    gone = sorted((tmp_path / "slices").glob("*.npz"))[0]
    gone.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = run(small_slices, tmp_path)
    assert again.steps == 2 * SMALL.total_steps and gone.exists()
    xarray.testing.assert_equal(again.metrics, result.metrics)
    kept = read_division(tmp_path)
    assert kept and kept.slice_sizes == division["slice_sizes"] and len(kept.trained) == 3


def test_a_slice_of_a_writer_that_was_killed_on_another_machine_is_trained_in_the_end(small_slices, tmp_path):
    (compiled,) = small_slices.groups
    (tmp_path / "slices").mkdir()
    first, second, *_ = pending_slices(small_slices.sweep, compiled.group, [], 2)
    for slice_, left in ((first, 3.0), (second, 0.0)):  # seconds until the lock expires
        path = tmp_path / "slices" / f"{slice_.name}.lock"
        holder = {"host": "h", "pid": 1, "process_start": 1, "machine": "another", "since": "x", "token": slice_.name}
        path.write_text(f"{json.dumps(holder)}\n" + "\n".join(slice_.runs))
        renewed = time.time() - STALE_AFTER + left
        os.utime(path, (renewed, renewed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(small_slices, tmp_path).steps == 8 * SMALL.total_steps


def test_the_progress_bar_shows_the_mean_and_the_best_return_of_the_runs_that_are_training(
    small_slices, tmp_path, monkeypatch
):
    shown = []
    monkeypatch.setattr(tqdm, "set_postfix_str", lambda bar, text, refresh: shown.append(text))
    result = run(replace(small_slices, share=Share(0, 4)), tmp_path)  # one slice, and chunks of one update
    returns = result.metrics["episode_return"].sel(learning_rate=1e-3, discount=0.9).values  # [seed, updates]
    assert np.isnan(returns).any() and not np.isnan(returns).all()
    known = [[row[: i + 1][~np.isnan(row[: i + 1])] for row in returns] for i in range(3)]
    newest = [[row[-1] for row in rows if len(row)] for rows in known]
    assert shown == [f"return {np.mean(row):.4g}  best {max(row):.4g}" if row else "" for row in newest]


def test_a_sweep_does_not_wait_for_the_folder_of_a_run(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    with claim_folder(tmp_path), pytest.raises(ValueError, match="already holds a run"):
        plan_sweep(pjp.Sweep("CartPole-v1", pjp.grid(clip=[0.1, 0.2]), config=SMALL), tmp_path)


@pytest.mark.parametrize("full", ["some slices", "everything"])
def test_what_does_not_fit_on_the_disk_is_in_the_result_and_said(plan, small_slices, tmp_path, monkeypatch, full):
    written = []

    def write(path, *_):
        written.append(path)
        if full == "everything" or path.suffix == ".npz" and len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, *_)

    original = files.replace_file
    sweep_json = files.SWEEP
    for module in (files, datasets):
        monkeypatch.setattr(
            module, "replace_file", lambda path, *_: (original if path.name == sweep_json else write)(path, *_)
        )
    with pytest.warns(UserWarning) as warned:
        result = run(small_slices, tmp_path)
    lost = "2 slices" if full == "some slices" else "4 slices and results.nc"
    words = f"{lost} could not be written to {tmp_path} (No space left on device)"
    assert result.unsaved == words and any(str(w.message).startswith(words) for w in warned)
    xarray.testing.assert_equal(result.metrics, run(small_slices).metrics)
    setting = small_slices.sweep.table.rows()[-1]
    chex.assert_trees_all_equal(result.state(1, **setting), run(small_slices).state(1, **setting))
    assert not list(tmp_path.rglob("*.half")) and len(list(tmp_path.rglob("*.npz"))) == (2 if "some" in full else 0)
    monkeypatch.undo()
    again = run(small_slices, tmp_path)
    assert again.steps == (4 if "some" in full else 8) * SMALL.total_steps and not again.unsaved
    xarray.testing.assert_equal(again.metrics, result.metrics)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounts a small disk")
def test_a_sweep_on_a_disk_that_fills_up_ends_with_everything_in_memory(small_slices, tmp_path, monkeypatch):
    """Not even a lock can be written then."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting is not allowed")

    def fill_and_write(*args):
        with contextlib.suppress(OSError), open(tmp_path / "other", "ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        original(*args)

    original = slices.save_arrays
    monkeypatch.setattr(slices, "save_arrays", fill_and_write)
    try:
        with pytest.warns(UserWarning, match="4 slices and results.nc could not be written"):
            result = run(small_slices, tmp_path)
    finally:
        subprocess.run(["umount", tmp_path])
    monkeypatch.undo()
    xarray.testing.assert_equal(result.metrics, run(small_slices).metrics)


def start(folder, *args):
    env = os.environ | {"PYTHONPATH": f"{PROGRAM.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(PROGRAM), str(folder), *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    outputs = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return [stdout.split() for stdout, _ in outputs]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    finish(start(folder))
    return xarray.load_dataset(folder / "results.nc", engine="scipy")


@pytest.mark.slow
def test_a_sweep_killed_at_any_moment_and_started_again_ends_with_the_same_numbers(undisturbed, tmp_path):
    folder = tmp_path / "killed"
    random.seed(0)
    for _ in range(4):
        process = start(folder)
        while process.poll() is None and not (folder / "slices").exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1.5))
        process.kill()
        process.communicate()
    finish(start(folder))
    xarray.testing.assert_equal(xarray.load_dataset(folder / "results.nc", engine="scipy"), undisturbed)


@pytest.mark.slow
def test_shares_of_processes_give_the_numbers_of_one_also_if_one_is_killed(undisturbed, tmp_path):
    """Each has two of eight slices. One is killed; then it starts again in one copy of the folder, in another not."""
    folder, collected = tmp_path / "shares", tmp_path / "collected"
    shares = [start(folder, 1, 0, 1, 0, f"{index}/4") for index in range(4)]
    random.seed()
    while shares[3].poll() is None and not (folder / "slices").exists():
        time.sleep(0.01)
    time.sleep(random.uniform(0, 15))
    shares[3].kill()
    shares[3].communicate()
    steps = [int(line[0]) for line in finish(*shares[:3])]
    assert steps == [4 * 40 * 32] * 3
    shutil.copytree(folder, collected)
    for place, arguments in ((folder, (1, 0, 1, 0, "3/4")), (collected, ())):
        stored = Slices(read_sweep(place), place).read()
        missing = 16 * 40 - sum(slice_.num_updates * len(slice_.runs) for slice_ in stored)
        assert finish(start(place, *arguments))[0][0] == str(missing * 32)
        xarray.testing.assert_equal(xarray.load_dataset(place / "results.nc", engine="scipy"), undisturbed)


@pytest.fixture(scope="module")
def on_eight_devices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight") / "sweep"
    assert finish(start(folder, 8))[0][-3:] == ["1", "8", "8"]
    return xarray.load_dataset(folder / "results.nc", engine="scipy")


@pytest.mark.slow
def test_eight_devices_give_the_same_numbers_as_one_to_rounding(undisturbed, on_eight_devices):
    xarray.testing.assert_allclose(on_eight_devices, undisturbed, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_of_two_devices_give_the_same_numbers_to_the_bit(on_eight_devices, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "two"
    printed = finish(*(start(folder, 2, process, 2, port) for process in range(2)))
    assert [line[-3:] for line in printed] == [["2", "2", "8"]] * 2
    xarray.testing.assert_equal(xarray.load_dataset(folder / "results.nc", engine="scipy"), on_eight_devices)
