"""The command line, in this process but for one run that proves the installed command."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import xarray

from purejaxppo import __version__, load
from purejaxppo.cli.agents import RenderOptions
from purejaxppo.cli.main import main, name_flags
from purejaxppo.cli.options import say
from purejaxppo.cli.sweep import SweepOptions
from purejaxppo.cli.train import ResumeOptions, TrainOptions
from purejaxppo.experiment.runs.saved import SavedRun

pytestmark = pytest.mark.full

TINY = "--num-envs 4 --num-steps 16 --num-updates 6 --num-minibatches 2 --num-epochs 1 --widths 8".split()


def run(capsys, *arguments):
    """Exit status, standard output and standard error of a command."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_train_leaves_a_table_and_a_folder_that_loads_again(tmp_path, capsys):
    folder = tmp_path / "run"
    status, printed, _ = run(capsys, "train", "CartPole-v1", *TINY, "--num-seeds", "3", "--out", str(folder))
    assert status == 0
    for words in (
        "3 agents x 384 steps",
        "return, 128 fresh episodes",
        "95 % over agents",
        "steps per second",
        "compile",
    ):
        assert words in printed
    assert {path.name for path in folder.iterdir()} == {
        "settings.json", "metrics.nc", "policy.npz", "files.json", "learning_curve.png", "checkpoints",
    }  # fmt: skip
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["config"]["num_envs"] == 4 and settings["hyperparams"]["target_kl"] == "inf"
    assert settings["sessions"][0]["versions"]["jax"] and settings["sessions"][0]["device"]["platform"]
    metrics = xarray.load_dataset(folder / "metrics.nc", engine="scipy")
    assert metrics["loss"].dims == ("seed", "updates") and metrics.sizes == {"seed": 3, "updates": 6}

    saved = load(folder)
    assert isinstance(saved, SavedRun)
    action, _ = saved.ppo.act(saved.policy, np.zeros((3, 4), np.float32))
    assert action.shape == (3,)
    with np.load(folder / "policy.npz", allow_pickle=False) as arrays:
        assert arrays["params/params/value/weight"].shape == (3, 1, 8)


def test_the_same_seed_gives_the_same_numbers(tmp_path, capsys):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(capsys, "train", "CartPole-v1", *TINY, "--seed", seed, "--out", str(tmp_path / name))
    a, b, c = (xarray.load_dataset(tmp_path / name / "metrics.nc", engine="scipy") for name in "abc")
    xarray.testing.assert_identical(a, b)
    assert not a.equals(c)


def test_steps_are_rounded_to_updates(tmp_path, capsys):
    out = str(tmp_path / "run")
    flags = [flag for flag in TINY if flag not in ("--num-updates", "6")]
    status, printed, _ = run(capsys, "train", "CartPole-v1", "--total-steps", "2e2", *flags, "--out", out)
    assert status == 0 and "1 agent x 192 steps (3 updates" in printed and "one agent: no interval" in printed


REFUSALS = [
    (["train", "Cartpole-v1"], "did you mean CartPole-v1"),
    (["train"], "name an environment"),
    (["fly"], "unknown command 'fly' (known: train, "),
    (["tran", "CartPole-v1"], "unknown command 'tran' (did you mean train?)"),
    (["train", "CartPole-v1", "--num-minibatches", "6", "--num-envs", "4", "--num-steps", "128"], "try 4 or 8"),
    (["train", "CartPole-v1", "--num-envs", "0"], "num_envs=0 must be at least 1"),
    (["train", "CartPole-v1", "--num-seeds", "0"], "--num-seeds=0 must be at least 1"),
    (["train", "CartPole-v1", "--discount", "1.5"], "discount=1.5 must be a number in"),
    (["train", "CartPole-v1", "--learning-rate", "nan"], "learning_rate=nan must be a number in"),
    (["train", "CartPole-v1", "--learning-rate", "fast"], "fast"),
    (["train", "CartPole-v1", "--learning-rat", "1e-3"], "--learning-rat is not a flag of purejaxppo train"),
    (
        ["train", "CartPole-v1", "--lr", "1e-3"],
        "--lr is not a flag of purejaxppo train (did you mean --learning-rate?)",
    ),
    (["train", "CartPole-v1", "--gamma=.9"], "--gamma is not a flag of purejaxppo train (did you mean --discount?)"),
    (["train", "CartPole-v1", "--qqq"], "--qqq is not a flag of purejaxppo train (--help lists them)"),
    (["sweep", "CartPole-v1", "--grid", "clip=.1,.2", "--out", "/dev/null/x"], "--out=/dev/null/x cannot be written"),
    (["train", "CartPole-v1", "--total-steps", "3"], "--total-steps=3 must be at least one rollout"),
    (["train", "CartPole-v1", "--encoder", "cnn"], "encoder='cnn' reads grids"),
    (["train", "CartPole-v1", "--total-steps", "1_0e0"], "--total-steps=10 must be at least one rollout"),
    (["train", "CartPole-v1", "--num-steps", "1.5e0"], "not a whole number"),
    (["train", "CartPole-v1", "--num-steps", "1e999"], "not a whole number"),
    (["sweep", "CartPole-v1", "--grid", "lr=1,2"], "did you mean learning_rate?"),
    (["train", "CartPole-v1", "--seed", "-1"], "seed=-1"),
    (["train", "CartPole-v1", "--seed", "9" * 30], "must be at most 2147483647"),
    (["train", "--out", "CartPole-v1", "Acrobot-v1"], "name an environment first"),
    (["train", "CartPole-v1", "--target-kl", "0.01"], "set both"),
    (["train", "CartPole-v1", "--memory", "gru"], "segment_length=32"),
    (["envs", "--all"], "--all"),
]


@pytest.mark.parametrize(
    "options, arguments, sentence, expected",
    [
        (TrainOptions, [], "num_envs=6 must be 8 (try num_steps=4)", "--num-envs=6 must be 8 (try --num-steps=4)"),
        (TrainOptions, [], "target_kl=1 and stop_on_kl=False", "--target-kl=1 and --no-stop-on-kl"),
        (TrainOptions, [], "folder=runs/lr=1 holds (name=x)", "--out=runs/lr=1 holds (name=x)"),
        (TrainOptions, [], "env='Cart' is not known", "env='Cart' is not known"),
        (SweepOptions, ["--grid", "clip=fast"], "clip='fast' must be a number", "clip='fast' must be a number"),
        (SweepOptions, [], "grid=clip must be A=B, such as clip=1", "--grid=clip must be A=B, such as clip=1"),
        (SweepOptions, ["clip=fast"], "discount=2 and clip=3", "--discount=2 and clip=3"),
        (ResumeOptions, [], "call fit(..., folder=...) again", "call fit(..., folder=...) again"),
        (ResumeOptions, [], "folder=x cannot be written", "folder=x cannot be written"),
        (RenderOptions, [], "path=a.png must end in .gif", "--out=a.png must end in .gif"),
        (RenderOptions, [], "learning_rate=1 seed=0 is not trained", "learning_rate=1 seed=0 is not trained"),
        (None, [], "folder=x", "folder=x"),
    ],
)
def test_errors_name_flags_and_nothing_else(options, arguments, sentence, expected):
    assert name_flags(sentence, options, arguments) == expected


@pytest.mark.parametrize("arguments, words", REFUSALS)
def test_bad_input_is_answered_in_a_sentence_with_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    status, printed, complaint = run(capsys, *arguments)
    assert status == 2
    assert words in printed + complaint and "Traceback" not in printed + complaint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command, flags, name",
    [
        ("train", [], "policy.npz"),
        ("train", [], "metrics.nc"),
        ("sweep", ["--grid", "learning_rate=1e-3"], "results.nc"),
    ],
)
def test_files_of_something_else_are_not_replaced(command, flags, name, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    status, _, complaint = run(capsys, command, "CartPole-v1", *TINY, *flags, "--out", str(tmp_path))
    assert status == 2 and f"has a {name}, but no run or sweep that it is of (name another folder)" in complaint
    assert (tmp_path / name).read_text() == "mine" and {path.name for path in tmp_path.iterdir()} == {name}


def test_the_version_is_printed(capsys):
    status, printed, _ = run(capsys, "--version")
    assert (status, printed) == (0, f"purejaxppo {__version__}\n")


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path, capsys):
    (tmp_path / "settings.json").write_text("mine")
    status, _, complaint = run(capsys, "train", "CartPole-v1", *TINY, "--out", str(tmp_path))
    assert status == 2 and "already holds a run" in complaint
    assert (tmp_path / "settings.json").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status, _, complaint = run(capsys, "train", "CartPole-v1", *TINY, "--out", str(tmp_path / "file" / "run"))
    assert status == 2 and "cannot be written" in complaint


def test_a_folder_without_a_run_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        load(tmp_path)


def test_envs_lists_every_environment_with_its_preset(capsys):
    status, printed, _ = run(capsys, "envs")
    environments, suites = printed.split("other suites")
    assert status == 0 and len(environments.splitlines()) == 26 and len(suites.splitlines()) == 8
    assert "Breakout-MinAtar" in printed and "MNISTBandit" not in printed


def test_help_names_every_setting(capsys):
    _, printed, _ = run(capsys, "train", "--help")
    for flag in ("--num-seeds", "--learning-rate", "--target-kl", "--bootstrap-on-truncation", "--out"):
        assert flag in printed


def test_agents_that_turn_nan_are_named_everywhere_and_have_no_score(tmp_path, capsys):
    folder, failed = str(tmp_path / "run"), "run 1 turned nan in update 1, where loss was not finite"
    begin = ["train", "CartPole-v1", *TINY, "--num-seeds", "2", "--learning-rate", "1e30", "--out", folder]
    status, printed, errors = run(capsys, *begin)
    assert status == 4 and "2 of 2 agents, left out above" in printed
    assert failed in errors and "all 2 runs have failed" in errors
    table = {line[2:30].strip(): line[30:] for line in printed.splitlines()}
    assert table["return, last episodes"] == table["return, 128 fresh episodes"] == "failed"
    status, _, errors = run(capsys, "resume", folder)
    assert status == 4 and failed in errors
    status, printed, _ = run(capsys, "show", folder)
    assert status == 4 and failed in printed
    status, printed, _ = run(capsys, "evaluate", folder)
    assert status == 4 and failed in printed and printed.split()[-2:] == ["mean", "failed"]
    status, _, errors = run(capsys, "export", folder, "-o", str(tmp_path / "policy.npz"))
    assert status == 0 and failed.replace("run 1", "run 0") in errors


@pytest.mark.parametrize("arguments", [["envs"], ["bench", "--help"]])
def test_a_reader_that_leaves_ends_a_command_quietly(arguments):
    command = [sys.executable, "-m", "purejaxppo", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_terminal_gets_no_control_characters_from_a_file(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"env": "Cart\x1b[2J\u202e", "config": {"\x1b]0;": 1}}))
    status, printed, errors = run(capsys, "show", str(folder))
    assert status == 2 and (printed + errors).removesuffix("\n").isprintable()
    say("Cart\x1b[2J", "a\nb", "\N{GREEK SMALL LETTER ALPHA}")
    assert capsys.readouterr().out == "Cart\\x1b[2J\na\\nb\n\N{GREEK SMALL LETTER ALPHA}\n"


def test_the_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "purejaxppo", "train", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("purejaxppo: env='nothing'")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_a_command_quietly_at_any_moment_after_its_imports(number, tmp_path):
    """Also while XLA compiles in a thread, which aborted the process."""
    command = [sys.executable, "-m", "purejaxppo", "train", "CartPole-v1", "--total-steps", "50000000", "--out"]
    for i, seconds in enumerate((0, 1, 2, 3, 4, 6)):
        folder = str(tmp_path / str(i))
        with subprocess.Popen([*command, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout and "1 agent" in process.stdout.readline()  # its imports are done
            time.sleep(seconds)
            process.send_signal(number)
            printed, errors = process.communicate()
        assert process.returncode == 130, (seconds, process.returncode, errors)
        assert "interrupted" in printed + errors and "Traceback" not in errors and "terminate" not in errors


def test_the_length_of_a_run_is_given_once(capsys):
    status, _, errors = run(capsys, "train", "CartPole-v1", "--total-steps", "3000", "--num-updates", "4")
    assert status == 2 and "--total-steps=3000" in errors and "leave one out" in errors


@pytest.mark.slow
def test_a_run_on_two_devices_loads_as_any_other(tmp_path):
    command = [sys.executable, "-m", "purejaxppo", "train", "CartPole-v1", *TINY, "--num-devices"]
    environment = {name: x for name, x in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    if len(os.sched_getaffinity(0)) > 1:
        folder = tmp_path / "run"
        done = subprocess.run(
            [*command, "2", "--out", str(folder)], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert "on 2 x cpu" in done.stdout
        saved = load(folder)
        assert isinstance(saved, SavedRun)
        assert saved.settings.notes["launch"]["num_devices"] == 2 and saved.metrics.sizes == {"seed": 1, "updates": 6}
    done = subprocess.run([*command, "999"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--num-devices=999 must be at most " in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_sweep_on_two_devices_comes_to_the_same_numbers(tmp_path):
    environment = {name: x for name, x in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-m", "purejaxppo", "sweep", "CartPole-v1", *TINY, "--grid", "clip=.1,.2"]
    command += ["--num-seeds", "2", "--slice-size", "2"]
    for devices in (1, 2):
        flags = ["--num-devices", str(devices), "--out", str(tmp_path / str(devices))]
        done = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    one, two = (load(tmp_path / str(devices)).metrics for devices in (1, 2))
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "2" / "sweep.json").read_text())["sessions"][0]["device"]["count"] >= 2


@pytest.mark.slow
def test_a_run_on_one_thread_comes_to_the_same_numbers(tmp_path):
    for name, flags in (("all", []), ("one", ["--one-thread"])):
        command = ["train", "CartPole-v1", *TINY, "--out", str(tmp_path / name), *flags]
        done = subprocess.run([sys.executable, "-m", "purejaxppo", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    several, one = (load(tmp_path / name).metrics for name in ("all", "one"))
    np.testing.assert_allclose(several["loss"], one["loss"], rtol=1e-4)


def test_one_thread_asked_for_too_late_is_one_sentence_and_status_2(capsys, monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    jax.devices()
    status, _, complaint = run(capsys, "train", "CartPole-v1", *TINY, "--one-thread")
    assert status == 2 and "too late" in complaint and complaint.count("\n") == 1


def test_a_run_does_not_spill_into_the_current_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = run(capsys, "train", "CartPole-v1", *TINY, "--out", "")
    assert status == 2 and "name a folder for the results" in error
    assert not list(tmp_path.iterdir())


def test_a_sweep_is_planned_run_ranked_drawn_and_drawn_anew(tmp_path, capsys):
    folder = tmp_path / "sweep"
    command = ["sweep", "CartPole-v1", *TINY, "--grid", "learning_rate=1e-3,1e30", "--grid", "discount=.9,.99"]
    command += ["--num-seeds", "2", "--out", str(folder)]
    status, printed, _ = run(capsys, *command, "--dry-run")
    assert status == 0 and "4 settings x 2 seeds = 8 runs" in printed and not folder.exists()
    status, printed, errors = run(capsys, *command)
    assert status == 0 and "iqm" in printed and "learning_rate=1e+30 discount=0.9 seed=0 turned nan" in errors
    pictures = {"learning_curves.png", "heatmap.png", "importance.png"}
    assert run(capsys, "show", str(folder))[0] == 0
    assert {path.name for path in folder.iterdir()} == {"sweep.json", "slices", "results.nc"} | pictures
    assert xarray.load_dataset(folder / "results.nc", engine="scipy")["loss"].sizes["seed"] == 2
    status, printed, _ = run(capsys, "plot", str(folder), "--line", "discount", "--out", str(tmp_path / "pictures"))
    assert status == 0 and {path.name for path in (tmp_path / "pictures").iterdir()} == pictures


@pytest.mark.slow
def test_shares_of_a_sweep_say_what_is_missing_and_how_it_is_collected(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "sweep"
    command = ["sweep", "CartPole-v1", *TINY, "--grid", "clip=.1,.2", "--num-seeds", "2", "--slice-size", "2"]
    command += ["--updates-per-chunk", "4", "--out", str(folder)]
    collect = f"the same command without --share, with --out {folder}, trains what is missing then, ranks and plots"
    for name, value in (("ID", "8"), ("MIN", "7"), ("COUNT", "2")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    status, printed, _ = run(capsys, *command, "--share")
    assert status == 0 and collect in printed and "iqm" not in printed
    assert "share 1/2: 1 slice; missing so far: 4 of 4 runs, such as clip=0.1 seed=0\n" in printed
    assert "share 1/2: 768 steps in " in printed
    assert "missing of the whole sweep: 2 of 4 runs, such as clip=0.1 seed=0\n" in printed
    assert {path.name for path in folder.iterdir()} == {"sweep.json", "slices", "results.nc"}
    status, printed, _ = run(capsys, *command, "--share", "1/2")
    assert status == 0 and "share 1/2: 0 slices" in printed and collect in printed
    status, printed, _ = run(capsys, *command)
    assert status == 0 and "to train: 1 slice; missing so far: 2 of 4 runs" in printed and "iqm" in printed
    assert "learning_curves.png" in {path.name for path in folder.iterdir()}
    status, printed, _ = run(capsys, *command, "--share", "0/2")
    assert status == 0 and "missing of the whole sweep: none of 4 runs\n" in printed


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "nothing is swept"),
        (["--grid", "learning_rte=1,2"], "learning_rte is not a field of a sweep (did you mean learning_rate?"),
        (["--grid", "learning_rate="], "must be FIELD=VALUE,VALUE"),
        (["--grid", "learning_rate=fast"], "learning_rate='fast' must be a number"),
        (["--grid", "num_envs=4.5"], "num_envs=4.5 must be a whole number"),
        (["--grid", "widths=64xabc"], "widths='64xabc'"),
        (["--grid", "clip=.1", "--grid", "clip=.2"], "names a field twice"),
        (["--sample", "clip=uniform:.1:.2"], "--num-samples=0"),
        (["--grid", "clip=.1,.2", "--num-devices", "999"], "--num-devices=999 must be at most "),
        (["--grid", "clip=.1,.2", "--updates-per-chunk", "0"], "--updates-per-chunk=0 must be at least 1"),
        (["--grid", "clip=.1,.2", "--slice-size", "0"], "--slice-size=0 must be at least 1"),
        (["--grid", "clip=.1,.2", "--share", "0/4"], "--share=0/4 needs --out FOLDER"),
        (["--grid", "clip=.1,.2", "--share"], "--share=slurm needs --out FOLDER"),
        (["--grid", "clip=.1,.2", "--out", "x", "--share", "4/4"], "--share=4/4 must be the index of a share, from 0"),
        (["--grid", "clip=.1,.2", "--out", "x", "--share", "0", "4"], "--share=0 4 must be the index of a share"),
        (["--grid", "clip=.1,.2", "--out", "x", "--share"], "--share=slurm needs the variables of a job array, but SL"),
        (["--sample", "clip=normal:.1:.2", "--num-samples", "2"], "FIELD=KIND:LOW:HIGH"),
        (["--sample", "lr=log_uniform:1e-4:1e-2", "--num-samples", "2"], "lr is not a field of a sweep (did you mean"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_sentence_and_status_two(arguments, words, capsys):
    status, _, error = run(capsys, "sweep", "CartPole-v1", *arguments)
    assert status == 2 and words in error and error.count("\n") == 1
