"""`purejaxppo search`, in this process but for kills."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import jax
import pytest

from purejaxppo.cli.main import main
from purejaxppo.experiment.sweeps import slices

pytestmark = pytest.mark.full

TINY = "--num-envs 4 --num-steps 16 --num-minibatches 2 --num-epochs 1 --widths 8".split()
RATE = ["--sample", "learning_rate=log_uniform:1e-4:1e-2"]
HALVING = [*RATE, "--num-samples", "4", "--num-seeds", "2", "--num-rungs", "2", "--eta", "2", "--num-updates", "6"]
PBT = [*RATE, "--method", "pbt", "--num-samples", "4", "--every", "2", "--num-updates", "6"]
OPTUNA = [*RATE, "--method", "optuna", "--grid", "clip=0.1,0.2", "--num-samples", "4", "--batch-size", "2"]
OPTUNA += ["--loss", "purejaxppo:ppo_loss", "--num-seeds", "1", "--num-updates", "6"]


def run(capsys, *arguments):
    """Exit status, standard output and standard error of a command."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def ranking(printed):
    """The lines of a command from the ranking to the best setting."""
    lines = printed.splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.split()[-1:] == ["score"])
    return lines[first : lines.index("the best setting trains with") + 2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Every program compiles once."""
    jax.config.update("jax_enable_compilation_cache", True)
    yield ["--compile-cache", str(tmp_path_factory.mktemp("programs"))]
    jax.config.update("jax_enable_compilation_cache", False)


@pytest.mark.parametrize(
    "flags, plan, files",
    [
        (HALVING, "halving of 4 settings x 2 seeds, one in 2 reaches the next rung", {"slices", "rungs.png"}),
        (PBT, "a population of 4 members x 384 steps", {"checkpoints", "metrics.nc", "lineage.png", "schedule.png"}),
        pytest.param(
            OPTUNA,
            "4 trials in 2 batches of 2",
            {"study.db", "batches", "history.png", "slices.png", "importances.png"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["halving", "pbt", "optuna"],
)
def test_a_search_is_planned_run_ranked_and_drawn_and_repeats_nothing(flags, plan, files, cache, tmp_path, capsys):
    if "optuna" in flags:
        pytest.importorskip("optuna")
    folder = tmp_path / "search"
    command = ["search", "CartPole-v1", *TINY, *flags, *cache, "--out", str(folder)]
    status, printed, _ = run(capsys, *command, "--dry-run")
    assert status == 0 and plan in printed and "memory of a" in printed and not folder.exists()
    status, printed, _ = run(capsys, *command)
    assert status == 0 and files | {"best.json"} <= {path.name for path in folder.iterdir()}
    best = json.loads((folder / "best.json").read_text())
    assert printed.splitlines()[-2].strip() == best["command"]
    assert shlex.split(best["command"])[:3] == ["purejaxppo", "train", "CartPole-v1"]
    assert best["method"] in (*flags, "halving") and 1e-4 < best["setting"]["learning_rate"] < 1e-2
    assert best["score"] == pytest.approx(float(ranking(printed)[1].split()[-1]), rel=1e-4)
    stored = {path: path.stat().st_mtime_ns for pattern in ("*.npz", "state") for path in folder.rglob(pattern)}
    status, again, _ = run(capsys, *command)
    assert status == 0 and ranking(again) == ranking(printed)
    assert all(path.stat().st_mtime_ns == changed for path, changed in stored.items()) and stored


def test_commands_for_agents_take_the_winner_of_a_population(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, printed, _ = run(capsys, "search", "CartPole-v1", *TINY, *PBT, *cache, "--out", "pbt")
    winner = int(ranking(printed)[1].split()[0])
    assert status == 0 and json.loads((tmp_path / "pbt" / "best.json").read_text())["member"] == winner
    for agent in (winner, 3 - winner):  # as if another one had won
        best = {"member": agent, "updates": 6}
        (tmp_path / "pbt" / "best.json").write_text(json.dumps(best))
        status, printed, _ = run(capsys, "export", "pbt", "-o", "winner.npz")
        assert status == 0 and f"winner.npz holds agent {agent} of CartPole-v1" in printed
        status, printed, _ = run(capsys, "evaluate", "pbt", "--episodes", "2")
        assert status == 0 and f"agent {agent} won the population" in printed
    (tmp_path / "pbt" / "best.json").write_text(json.dumps({"member": 3, "updates": 4}))  # of a shorter run
    status, printed, _ = run(capsys, "export", "pbt", "-o", "first.npz")
    assert status == 0 and "first.npz holds agent 0 of CartPole-v1" in printed
    status, printed, _ = run(capsys, "export", "pbt", "--agent", "1", "-o", "chosen.npz")
    assert status == 0 and "chosen.npz holds agent 1 of CartPole-v1" in printed


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "nothing is swept"),
        (["--method", "optuna"], "--num-samples=0 and --sample go together"),
        (["--method", "optuna", *RATE], "--num-samples=0 and --sample go together"),
        (["--method", "optuna", *RATE, "--num-samples", "-1"], "--num-samples=-1 must be at least 0"),
        (["--method", "optuna", *RATE, "--num-samples", "4", "--sobol"], "--sobol belongs to halving and pbt"),
        (
            ["--method", "pbt", "--sample", "learning_rate=choice:1e-3:abc", "--num-samples", "4"],
            "learning_rate='abc' must be a number",
        ),
        (["--method", "optuna", "--num-samples", "4"], "--num-samples=4 and --sample go together"),
        (["--method", "optuna", "--num-rungs", "3"], "--num-rungs=3 belongs to --method halving, not to optuna"),
        (["--every", "3"], "--every=3 belongs to --method pbt, not to halving"),
        (["--method", "optuna", "--num-devices", "2"], "--num-devices=2 belongs to --method halving and pbt, not to"),
        (["--batch-size", "0"], "--batch-size=0 must be at least 1"),
        ([*RATE, *RATE, "--num-samples", "4"], "names a field twice"),
        ([*RATE, "--num-samples", "4", "--num-rungs", "4"], "--num-rungs=4 needs eta^(num_rungs - 1) = 27 settings"),
        (["--grid", "num_envs=4,8", "--num-rungs", "2", "--eta", "2"], "the settings need 2 programs"),
        (["--method", "pbt", "--grid", "num_envs=4,8,16,32"], "num_envs differs between members"),
        (["--method", "pbt", "--grid", "clip=0.1,0.2"], "try 4 runs, or"),
        (["--method", "pbt", "--grid", "clip=.1,.2,.3,.4", "--fraction", "0.9"], "--fraction=0.9 must be a number"),
        (["--method", "pbt", "--grid", "clip=.1,.2", "--num-devices", "999"], "--num-devices=999 must be at most"),
        (["--save-every", "-1"], "--save-every=-1.0 must be a number of seconds"),
        (["--methd", "pbt"], "did you mean --method?"),
    ],
)
def test_a_search_that_cannot_be_is_one_sentence_and_status_two(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, error = run(capsys, "search", "CartPole-v1", *flags)
    assert status == 2 and words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("study", ["study.db", "batches"])
def test_the_folder_of_a_study_is_no_place_for_others_and_names_its_batches(study, tmp_path, capsys):
    if study == "batches":
        (tmp_path / study / "0").mkdir(parents=True)
        (tmp_path / study / "0" / "sweep.json").touch()
    else:
        (tmp_path / study).touch()
    out, space = ["--out", str(tmp_path)], ["--sample", "clip=uniform:.1:.2", "--num-samples", "4"]
    for command in (
        ["search", "--method", "halving", *space],
        ["search", "--method", "pbt", *space],
        ["sweep", "--grid", "clip=.1,.2"],
        ["train"],
    ):
        status, _, error = run(capsys, command[0], "CartPole-v1", *command[1:], *out)
        assert (status, error) == (2, f"purejaxppo: --out={tmp_path} already holds a study (name another folder)\n")
    for command in ("show", "plot", "evaluate", "report", "resume", "export"):
        status, _, error = run(capsys, command, str(tmp_path))
        there = "of which there is none yet" if study == "study.db" else f"such as {tmp_path / study / '0'}"
        sentence = f"{tmp_path} holds a study of Optuna: its batches are sweeps that can be read, {there}"
        assert (status, error) == (2, f"purejaxppo: {sentence}\n"), command
    assert [path.name for path in tmp_path.iterdir()] == [study]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounts a small disk")
@pytest.mark.parametrize("elsewhere", [False, True], ids=["the study, too", "not the study"])
def test_an_optuna_search_on_a_disk_that_fills_up_exits_with_status_three(elsewhere, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed")

    def fill_and_write(*args):
        with contextlib.suppress(OSError), open(disk / "other", "ab", buffering=0) as file:
            for _ in range(2**9):  # twice as much as there is
                file.write(bytes(4096))
        original(*args)

    original = slices.save_arrays
    monkeypatch.setattr(slices, "save_arrays", fill_and_write)
    storage = ["--storage", f"sqlite:///{tmp_path}/study.db"] if elsewhere else []
    try:
        status, printed, error = run(capsys, "search", "CartPole-v1", *TINY, *OPTUNA, *storage, "--out", str(disk))
    finally:
        subprocess.run(["umount", "-l", disk])  # the study may still be open
    assert status == 3 and "Traceback" not in error
    assert error.splitlines()[-1].endswith("cannot be written: No space left on device")


@pytest.mark.slow
def test_the_plan_of_halving_names_the_updates_of_its_rungs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--grid", "clip=.1,.2,.3,.4", "--num-rungs", "2", "--num-updates", "20", "--num-seeds", "1", "--dry-run"]
    status, printed, _ = run(capsys, "search", "CartPole-v1", *TINY, *flags)
    rungs = [line.split()[:2] for line in printed.splitlines() if line.split()[:1] in (["1"], ["2"])]
    assert status == 0 and rungs == [["1", "6"], ["2", "18"]]
    assert "settings on the last rung train for 2 updates more, without a comparison" in printed


def test_a_search_whose_settings_all_fail_says_so(cache, tmp_path, capsys):
    flags = "--grid learning_rate=1e30,1e29 --num-seeds 1 --num-rungs 2 --eta 2 --num-updates 4".split()
    status, printed, errors = run(capsys, "search", "CartPole-v1", *TINY, *flags, *cache, "--out", str(tmp_path / "x"))
    assert status == 4 and "turned nan" in errors and printed.count("none") == 2
    assert not (tmp_path / "x" / "best.json").exists()


@pytest.mark.parametrize("flags", [HALVING, PBT, OPTUNA], ids=["halving", "pbt", "optuna"])
def test_a_search_that_is_killed_again_and_again_comes_to_the_result_of_one_that_is_not(flags, tmp_path):
    flags = [*TINY, *flags[:-1], "3000", "--save-every", "0"]
    command = [sys.executable, "-W", "ignore", "-m", "purejaxppo", "search", "CartPole-v1", *flags, "--out"]
    whole = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    cut, kept = tmp_path / "cut", []
    for _ in range(3):
        with subprocess.Popen([*command, str(cut)], stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and saves(cut) in (kept[-1:] or [frozenset()]):
                time.sleep(0.01)
            assert process.poll() is None
            process.kill()
        kept.append(saves(cut))
    assert len({*kept}) == 3  # each call kept something, and the next one continued
    done = subprocess.run([*command, str(cut)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ranking(done.stdout) == ranking(whole.stdout)


def saves(folder):
    """The saved states in a folder, each with the time at which it was written."""
    found = [*folder.rglob("slices/*.npz"), *folder.glob("checkpoints/" + "[0-9]" * 10)]
    with contextlib.suppress(FileNotFoundError):  # replaced just now
        return frozenset((path.name, path.stat().st_mtime_ns) for path in found)
    return saves(folder)
