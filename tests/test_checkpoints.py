"""Runs that go on: killed, interrupted, damaged, extended, under other settings."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint
import pytest
import resume_program
import xarray

from probes import SMALL
from purejaxppo import Interrupted, batched, fit, load, make_ppo, runs, with_hyperparams
from purejaxppo.cli.main import main
from purejaxppo.experiment import lock
from purejaxppo.experiment.files import to_arrays
from purejaxppo.experiment.lock import LOCK, claim_folder
from purejaxppo.experiment.program import Program
from purejaxppo.experiment.runs import checkpoints, saved
from purejaxppo.experiment.runs.checkpoints import Checkpoints
from purejaxppo.experiment.runs.launch import read_newest_settings, resume
from purejaxppo.experiment.runs.saved import SavedRun
from purejaxppo.experiment.runs.settings import RunSettings
from purejaxppo.experiment.runs.sinks import csv_file, json_lines

pytestmark = pytest.mark.full

CONFIG = dataclasses.replace(SMALL, num_updates=9)


@functools.cache
def begin(config=CONFIG, discounts=()):
    """A batch of two, with both normalisers, and its first state."""
    config = dataclasses.replace(config, normalize_observation=True, scale_reward=True)
    ppo = batched(make_ppo("Pendulum-v1", config))
    swept = {"discount": discounts} if discounts else None
    return ppo, jax.jit(ppo.init)(*runs(jax.random.key(3), swept, num_seeds=2 // max(len(discounts), 1)))


def same(state, other):
    for name, x in to_arrays(state).items():
        np.testing.assert_array_equal(x, to_arrays(other)[name], err_msg=name)


@pytest.fixture(scope="module")
def whole():
    """What a run that is left alone comes to."""
    return fit(*begin(), progress=False)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a run with checkpoints after 3 and 6 updates."""
    folder = tmp_path_factory.mktemp("runs") / "kept"
    fit(*begin(), num_updates=6, updates_per_chunk=3, folder=folder, save_every=0, progress=False)
    return folder


@pytest.fixture
def copy(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "copy")


def newest(folder) -> Path:
    return Checkpoints(folder).paths()[0]


def test_a_run_continues_in_its_folder_from_its_own_result(tmp_path, key):
    ppo = make_ppo("CartPole-v1", dataclasses.replace(SMALL, num_updates=4))
    state = jax.jit(ppo.init)(key)
    first = fit(ppo, state, num_updates=2, folder=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="holds another run, with learning_rate="):
        fit(ppo, with_hyperparams(first.state, learning_rate=1e-3), folder=tmp_path / "run", progress=False)
    for _ in range(2):  # as a cell of a notebook that runs again
        second = fit(ppo, first.state, folder=tmp_path / "run", progress=False)
        same(second.state, fit(ppo, state, progress=False).state)
        assert second.metrics["updates"].values.tolist() == [1, 2, 3, 4]
    begun = fit(ppo, first.state, folder=tmp_path / "new", progress=False)
    assert begun.metrics["updates"].values.tolist() == [3, 4]
    same(begun.state, second.state)


def test_a_run_in_parts_is_the_run_in_one_to_the_bit(whole, copy):
    result = fit(*begin(), folder=copy, progress=False)
    assert result.num_updates == 3 and not result.interrupted
    same(result.state, whole.state)
    xarray.testing.assert_identical(result.metrics, whole.metrics)
    again = fit(*begin(), folder=copy, progress=False)
    assert again.num_updates == 0
    same(again.state, whole.state)


def test_a_saved_run_has_its_whole_state(kept, whole):
    saved = load(kept, begin()[0])
    assert isinstance(saved, SavedRun) and saved.settings.config.num_updates == 9
    same(fit(saved.ppo, saved.state(), progress=False).state, whole.state)


def test_metrics_are_a_table_with_a_row_per_run_and_update(whole):
    table = whole.to_dataframe()
    assert len(table) == 2 * 9 and table["updates"].unique().tolist() == list(range(1, 10))
    first = table[(table["run"] == 1) & (table["updates"] == 4)]
    assert first["loss"].item() == whole.metrics["loss"].sel(run=1, updates=4).item()


def test_a_run_killed_before_its_last_files_is_completed(copy):
    fit(*begin(), folder=copy, progress=False)
    for name in ("policy.npz", "metrics.nc"):
        (copy / name).unlink()
    ppo, state = begin()
    with pytest.raises(ValueError, match=r"is not finished \(fit\(..., folder=.*\) continues it"):
        load(copy, ppo)
    assert fit(ppo, state, folder=copy, progress=False).num_updates == 0
    assert load(copy, ppo).metrics.sizes["updates"] == 9


def test_only_the_newest_checkpoints_are_kept_and_ordinary_libraries_open_them(kept):
    assert [path.name for path in Checkpoints(kept).paths()] == ["0000000006", "0000000003"]
    path = newest(kept)
    assert xarray.load_dataset(path / "metrics.nc").sizes == {"run": 2, "updates": 6}
    assert json.loads((path / "settings.json").read_text())["config"]["num_updates"] == 9
    state = orbax.checkpoint.PyTreeCheckpointer().restore(path / "state")
    np.testing.assert_array_equal(state["num_updates"], [6, 6])
    assert set(json.loads((path / "files.json").read_text())) >= {"metrics.nc", "settings.json", "state/_METADATA"}
    ppo, _ = begin()
    assert load(kept, ppo).metrics.sizes == {"seed": 2, "updates": 6}


@pytest.mark.slow
def test_killed_at_any_moment_and_called_again_a_run_comes_to_the_same_numbers(tmp_path):
    command = [sys.executable, resume_program.__file__, str(tmp_path / "run")]
    for kill in range(3):
        process = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL)
        deadline, before = time.monotonic() + 120, Checkpoints(tmp_path / "run").paths()[:1]
        while Checkpoints(tmp_path / "run").paths()[:1] == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.13 * kill)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it had ended before it was killed"
    ppo, state = resume_program.begin()
    result = fit(ppo, state, folder=tmp_path / "run", progress=False)
    assert 0 < result.num_updates < resume_program.NUM_UPDATES
    expected = fit(ppo, state, progress=False)
    same(result.state, expected.state)
    xarray.testing.assert_identical(result.metrics, expected.metrics)


def damage(path: Path, random) -> str:
    """Does something bad to one of the files of a checkpoint."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    file, kind = files[random.integers(len(files))], ("cut", "flip", "remove")[random.integers(3)]
    data = bytearray(file.read_bytes())
    if kind == "remove":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(data[: random.integers(len(data))])
    else:
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        file.write_bytes(data)
    return f"{kind} {file.relative_to(path)}"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(kept, tmp_path):
    random = np.random.default_rng(0)
    expected = Checkpoints(kept).newest()
    older = Checkpoints(shutil.copytree(kept, tmp_path / "before"))
    shutil.rmtree(older.paths()[0])
    before = older.newest()
    assert expected and before
    for i in range(100):
        folder = shutil.copytree(kept, tmp_path / str(i))
        what = damage(newest(folder), random)
        with pytest.warns(UserWarning, match=f"{newest(folder).name} is damaged"):
            found = Checkpoints(folder).newest()
        assert found and found.path.name == "0000000003", what
        for name, x in before.arrays.items():
            np.testing.assert_array_equal(found.arrays[name], x, err_msg=what)
        assert not np.array_equal(found.arrays["num_updates"], expected.arrays["num_updates"])
        shutil.rmtree(folder)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole, copy):
    damage(newest(copy), np.random.default_rng(1))
    with pytest.warns(UserWarning, match="is damaged"):
        result = fit(*begin(), folder=copy, progress=False)
    assert result.num_updates == 6
    same(result.state, whole.state)


def test_what_is_damaged_takes_no_whole_checkpoints_place(kept, tmp_path):
    folder = shutil.copytree(kept, tmp_path / "copy")
    damage(newest(folder), np.random.default_rng(1))
    checkpoints = Checkpoints(folder, keep=1)
    with pytest.warns(UserWarning, match="is damaged"):
        before = checkpoints.newest()
    assert before
    checkpoints.save(4, begin()[1], before.metrics, before.settings)
    assert [path.name for path in checkpoints.paths()] == ["0000000004"]


def test_without_a_whole_checkpoint_nothing_is_made_up(copy):
    for path in Checkpoints(copy).paths():
        damage(path, np.random.default_rng(2))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no checkpoint in .* is whole: .*damaged"):
        fit(*begin(), folder=copy, progress=False)


@pytest.mark.parametrize(
    "other, words",
    [
        (lambda: begin(dataclasses.replace(CONFIG, num_epochs=3)), "num_epochs=2 instead of 3"),
        (lambda: begin(discounts=(0.9, 0.99)), "discount=0.99 instead of \\[0.9, 0.99\\]"),
        (lambda: begin(dataclasses.replace(CONFIG, num_updates=7)), "num_updates=9 instead of 7"),
    ],
)
def test_a_run_of_other_settings_is_refused_with_the_fields_that_differ(kept, other, words):
    with pytest.raises(ValueError, match=f"holds another run, with .*{words}"):
        fit(*other(), folder=kept)


def test_a_run_is_extended_with_a_word_on_its_schedules(copy):
    fit(*begin(), folder=copy, progress=False)
    with pytest.warns(UserWarning, match="extended from num_updates=9 to 12; its schedules now end"):
        result = fit(*begin(dataclasses.replace(CONFIG, num_updates=12)), folder=copy, progress=False)
    assert result.num_updates == 3 and result.metrics.sizes["updates"] == 12
    rate = result.metrics["learning_rate"].values[0] / result.metrics["learning_rate"].values[0, 0]
    np.testing.assert_allclose(rate[[8, 9, 11]], [1 - 8 / 9, 1 - 9 / 12, 1 - 11 / 12], rtol=1e-5)


def test_other_versions_and_devices_are_warned_of(copy):
    path = newest(copy)
    settings = json.loads((path / "settings.json").read_text())
    session = settings["sessions"][-1]
    session["versions"]["jax"], session["device"]["kind"] = "0.1.2", "abacus"
    del session["versions"]["optax"]  # as a suite that was not imported then
    metrics = xarray.load_dataset(path / "metrics.nc")
    Checkpoints(copy).save(7, begin()[1], metrics, RunSettings.from_json(settings))
    with pytest.warns(UserWarning, match="jax 0.1.2 is now .*, device abacus is now") as warned:
        fit(*begin(), folder=copy, progress=False)
    assert not any("optax" in str(warning.message) for warning in warned)


def test_a_disk_that_fails_is_a_warning_and_the_run_goes_on(tmp_path, monkeypatch, whole):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.warns(UserWarning, match="could not write its last checkpoint .*No space left"):
        result = fit(*begin(), folder=tmp_path / "run", progress=False)
    same(result.state, whole.state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_call_goes_on(tmp_path, number, whole):
    def send(metrics):
        if metrics["updates"][-1] == 4:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="the same call resumes from") as error:
        fit(*begin(), folder=tmp_path / "run", updates_per_chunk=2, sinks=[send], progress=False)
    result = error.value.result
    assert result.interrupted and result.num_updates == 4 and signal.getsignal(number) is before
    assert newest(tmp_path / "run").name == "0000000004"
    same(fit(*begin(), folder=tmp_path / "run", progress=False).state, whole.state)


def test_a_folder_has_one_writer_and_the_second_call_is_told_who_it_is(tmp_path, whole):
    folder, told = tmp_path / "run", []

    def nested(metrics):
        if metrics["updates"][0] == 1:
            with pytest.raises(ValueError, match=f"^folder={folder} is being written by this process since .*UTC"):
                fit(*begin(), folder=folder, progress=False)
            told.append(True)

    result = fit(*begin(), folder=folder, sinks=[nested], progress=False)
    assert told and not (folder / LOCK).exists()
    same(result.state, whole.state)
    assert fit(*begin(), folder=folder, progress=False).num_updates == 0
    assert main(["train", "CartPole-v1", "--out", str(folder)]) == 2


def test_a_run_that_was_taken_over_writes_nothing_more_and_returns_what_it_has(tmp_path):
    folder = tmp_path / "run"

    def sleep(metrics):
        if metrics["updates"][-1] == 4:
            (folder / LOCK).unlink()
            stack.enter_context(claim_folder(folder))

    with contextlib.ExitStack() as stack, pytest.warns(UserWarning, match="now held by this process .* in memory"):
        result = fit(*begin(), folder=folder, updates_per_chunk=2, sinks=[sleep], progress=False)
    assert result.interrupted and result.num_updates == 6 and not list(folder.glob("*.n*"))
    assert {path.name for path in folder.iterdir()} == {"settings.json"}


def test_an_error_in_training_releases_the_folder(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(Program, "start", fail)
    with pytest.raises(RuntimeError, match="no"):
        fit(*begin(), folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / LOCK).exists()


def save_again(folder, num_updates=7, **options):
    """Writes another checkpoint beside those of `kept`."""
    checkpoints = Checkpoints(folder, **options)
    before = checkpoints.newest()
    assert before
    checkpoints.save(num_updates, begin()[1], before.metrics, before.settings)
    return [path.name for path in checkpoints.paths()]


def test_only_folders_of_ten_digits_are_checkpoints_and_nothing_else_is_touched(copy, tmp_path):
    inside, outside = copy / "checkpoints", tmp_path / "outside"
    for folder in (outside, inside / "2024-thesis", inside / "2024.half", inside / "00000000070"):
        folder.mkdir()
        (folder / "text").write_text("mine")
    for file in ("0000000009", "0000000006.half", "12.half"):
        (inside / file).write_text("mine")
    for link in ("0000000008", "0000000005.half", "0000000007"):
        (inside / link).symlink_to(outside, target_is_directory=True)
    others = {path.name for path in inside.iterdir()} - {"0000000003", "0000000006", "0000000007"}
    assert save_again(copy, keep=1) == ["0000000007"]
    now = {path.name for path in inside.iterdir()}
    (moved,) = now - others - {"0000000007"}
    assert others < now and (inside / moved).is_symlink() and moved.startswith("0000000007.")
    assert all((folder / "text").read_text() == "mine" for folder in (outside, inside / "2024-thesis"))


def test_what_killed_processes_left_is_removed_by_the_next_writer(copy):
    for name in ("0000000009.half", f"0000000009.{'0' * 32}.half", "0000000006.old.half"):
        (copy / "checkpoints" / name / "state").mkdir(parents=True)
    for name in (f"metrics.nc.{'0' * 32}.half", "policy.npz.123.half"):
        (copy / name).write_text("")
    (copy / "mine.half").write_text("")
    fit(*begin(), folder=copy, progress=False)
    assert [path.name for path in copy.rglob("*.half")] == ["mine.half"]


def test_files_outside_are_not_written_through_links(copy, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in ("settings.json", "metrics.nc", "policy.npz", "files.json"):
        (copy / name).unlink()
        (copy / name).symlink_to(outside)
        (copy / f"{name}.half").symlink_to(outside)
    fit(*begin(), folder=copy, progress=False)
    assert outside.read_text() == "mine" and not (copy / "metrics.nc").is_symlink()
    assert load(copy, begin()[0]).metrics.sizes["updates"] == 9


@pytest.mark.parametrize("name", ["policy.npz", "metrics.nc", "settings.json"])
def test_a_changed_file_of_a_complete_run_is_named_and_written_again(copy, name):
    fit(*begin(), folder=copy, progress=False)
    before = {path: (copy / path).read_bytes() for path in ("policy.npz", "metrics.nc")}
    path = copy / name
    text = path.read_bytes()
    path.write_bytes(text.replace(b"0.99", b"0.98") if name == "settings.json" else text[:-9] + b"X" + text[-8:])
    assert path.read_bytes() != text
    with pytest.raises(ValueError, match=f"the run in {copy} is damaged: {name} has changed since it was written"):
        load(copy, begin()[0])
    assert fit(*begin(), folder=copy, progress=False).num_updates == 0
    assert {path: (copy / path).read_bytes() for path in before} == before
    saved = load(copy, begin()[0])
    assert isinstance(saved, SavedRun) and saved.settings.steps_per_second and float(saved.hyperparams.discount) > 0.985


def test_a_file_that_is_not_listed_does_not_count(copy):
    (newest(copy) / "files.json").write_text("{}")
    with pytest.warns(UserWarning, match="0000000006 is damaged \\(metrics.nc is not listed"):
        assert Checkpoints(copy).newest().path.name == "0000000003"  # pyright: ignore[reportOptionalMemberAccess]
    (newest(copy) / "state" / "more").write_text("")
    (copy / "files.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged: settings.json is not listed in files.json"):
        load(copy, begin()[0])
    (copy / "files.json").write_text("[")
    with pytest.raises(ValueError, match="is damaged: files.json cannot be read"):
        load(copy, begin()[0])
    (copy / "files.json").unlink()  # as older versions left it
    assert load(copy, begin()[0]).metrics.sizes["updates"] == 6


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_failed_checkpoint_frees_its_space_and_makes_room_only_if_it_must(copy, monkeypatch):
    tries = []

    def limited(*_):
        tries.append([path.name for path in Checkpoints(copy).paths()])
        if len(tries[-1]) > 1:
            full()

    monkeypatch.setattr(checkpoints, "check_room", limited)
    assert save_again(copy) == ["0000000007", "0000000006"]
    assert tries == [["0000000006", "0000000003"], ["0000000006"]]
    monkeypatch.setattr(checkpoints, "write_digests", full)
    with pytest.raises(OSError, match="No space left"):
        save_again(copy, 8)
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["0000000007"]


CHECKPOINT, RESULTS = (checkpoints, "check_room"), (saved, "save_arrays")


@pytest.mark.parametrize(
    "places, words",
    [
        ([CHECKPOINT], "its last checkpoint .* keeps its results and its checkpoint after 6 updates"),
        ([RESULTS], "its results .* keeps its checkpoint after 9 updates, from which it resumes"),
        ([CHECKPOINT, RESULTS], "its last checkpoint and its results .* keeps its checkpoint after 6 updates"),
    ],
)
def test_what_does_not_fit_at_the_end_is_in_the_result_and_said(copy, monkeypatch, whole, places, words):
    def fill(metrics):
        if metrics["updates"][-1] == 9:
            for module, function in places:
                monkeypatch.setattr(module, function, full)

    with pytest.warns(UserWarning, match=f"^the run could not write {words}"):
        result = fit(*begin(), folder=copy, sinks=[fill], progress=False)
    same(result.state, whole.state)
    assert "(No space left on device) after 9 updates" in result.unsaved and not list(copy.rglob("*.half"))
    monkeypatch.undo()
    same(fit(*begin(), folder=copy, progress=False).state, whole.state)
    assert load(copy, begin()[0]).metrics.sizes["updates"] == 9


def test_a_lock_that_cannot_be_read_for_a_moment_does_not_end_a_run(copy, monkeypatch, whole):
    def unreadable(path):
        asked.append(path)
        if len(asked) < 3:
            raise OSError(116, "Stale file handle")
        return original(path)

    asked, original = [], lock.read_holder
    monkeypatch.setattr(lock, "read_holder", unreadable)
    result = fit(*begin(), folder=copy, updates_per_chunk=1, progress=False)
    same(result.state, whole.state)
    assert len(asked) > 3 and not result.unsaved and load(copy, begin()[0]).metrics.sizes["updates"] == 9


def test_damaged_metrics_are_not_drawn(copy, capsys):
    fit(*begin(), folder=copy, progress=False)
    content = bytearray((copy / "metrics.nc").read_bytes())
    content[-9] ^= 64
    (copy / "metrics.nc").write_bytes(content)
    assert main(["plot", str(copy)]) == 2 and "damaged" in capsys.readouterr().err


def test_files_are_flushed_through_descriptors_that_may_write(copy, monkeypatch):
    """As Windows demands."""
    import fcntl

    def fsync(descriptor, real=os.fsync):
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode) and fcntl.fcntl(descriptor, fcntl.F_GETFL) & 3 == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert save_again(copy)[0] == "0000000007"


def test_settings_that_are_damaged_are_read_from_the_newest_checkpoint(copy):
    before = read_newest_settings(copy)
    for text in ("{", (copy / "settings.json").read_text().replace("0.99", "0.98")):
        (copy / "settings.json").write_text(text)
        with pytest.warns(UserWarning, match=r"damaged.*the settings of .*0000000006 are used"):
            assert read_newest_settings(copy).hyperparams == before.hyperparams


ON_DEVICES = """if True:
    import sys
    import jax
    jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
    from purejaxppo.cli.main import main
    if sys.argv[2] == "2":
        flags = "--num-envs 4 --num-steps 8 --num-updates 2 --num-minibatches 2 --num-epochs 1 --widths 8".split()
        sys.exit(main(["train", "CartPole-v1", *flags, "--num-devices", "2", "--out", sys.argv[1]]))
    sys.exit(main(["resume", sys.argv[1], "--total-steps", "96"]))
"""


@pytest.mark.slow
def test_a_run_of_two_devices_resumes_on_one_with_a_warning(tmp_path):
    for devices in "21":
        command = [sys.executable, "-c", ON_DEVICES, str(tmp_path / "run"), devices]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if devices == "1":
            words = "numbers may differ from those of an uninterrupted run: num_devices 2 is now 1"
            assert words in done.stderr
    assert load(tmp_path / "run").metrics.sizes == {"seed": 1, "updates": 3}


def test_logs_go_on_where_the_checkpoint_was(tmp_path):
    """Four updates were logged, three of them are in a checkpoint: the fourth is logged anew."""
    ppo, state = begin()
    logs = [lambda: csv_file(tmp_path / "log.csv"), lambda: json_lines(tmp_path / "log.jsonl")]
    fit(ppo, state, num_updates=3, folder=tmp_path / "run", sinks=[log() for log in logs], progress=False)
    rest = fit(ppo, state, progress=False, num_updates=4).metrics.isel(updates=[3])
    for log in logs:
        log()(rest)
    result = fit(ppo, state, folder=tmp_path / "run", sinks=[log() for log in logs], progress=False)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["updates"], row["run"]) for row in rows] == [(u, r) for u in range(1, 10) for r in (0, 1)]
    np.testing.assert_array_equal([row["loss"] for row in rows], result.metrics["loss"].values.T.ravel())
    table = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
    np.testing.assert_array_equal(table["updates"], [row["updates"] for row in rows])
    np.testing.assert_allclose(table["loss"], [row["loss"] for row in rows])


def test_evaluation_while_training_does_not_change_training(whole):
    result = fit(*begin(), evaluate_every=4, progress=False)
    same(result.state, whole.state)
    there = np.isfinite(result.metrics["evaluation_return"].values)
    np.testing.assert_array_equal(there, [np.isin(np.arange(1, 10), [4, 8, 9])] * 2)


def test_a_run_begun_in_python_is_not_resumed_by_its_folder(kept):
    with warnings.catch_warnings(), pytest.raises(ValueError, match="was started in Python: call fit"):
        warnings.simplefilter("error")
        resume(kept)


@pytest.mark.parametrize(
    "options, words", [({"keep": 0}, "keep=0 must be"), ({"evaluate_every": 0}, "evaluate_every=0")]
)
def test_bad_numbers_are_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        fit(*begin(), folder=tmp_path / "run", **options)


def test_what_a_run_leaves_is_refused_where_it_is_damaged(copy):
    for name in ("policy.npz", "metrics.nc"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="is damaged"):
            load(copy, begin()[0])
        (copy / name).write_bytes(whole)
    load(copy, begin()[0])


def test_evaluation_may_begin_when_a_run_goes_on(copy):
    """What was not played before is nan."""
    result = fit(*begin(), folder=copy, evaluate_every=2, progress=False)
    there = np.isfinite(result.metrics["evaluation_return"].values)
    np.testing.assert_array_equal(there, [np.isin(np.arange(1, 10), [8, 9])] * 2)


def test_start_states_that_wait_are_part_of_a_checkpoint(tmp_path, key):
    """A resumed run begins its episodes where the uninterrupted one did, first episodes that are staggered included."""
    config = dataclasses.replace(SMALL, num_updates=4, resets_per_step=1, stagger=20)
    ppo = batched(make_ppo("Breakout-MinAtar", config))
    state = jax.jit(ppo.init)(jax.random.split(key, 2))
    whole = fit(ppo, state, updates_per_chunk=2, progress=False)
    fit(ppo, state, num_updates=2, updates_per_chunk=2, folder=tmp_path / "run", progress=False)
    resumed = fit(ppo, state, updates_per_chunk=2, folder=tmp_path / "run", progress=False)
    same(resumed.state, whole.state)
    assert resumed.state.actors.pool.age.shape == (2, SMALL.num_envs)
