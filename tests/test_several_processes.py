"""Commands of two processes with two devices each; PUREJAXPPO_KILLS=20 kills one of a sweep's as often."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray

from purejaxppo.experiment.sweeps.slices import Slices, read_sessions, read_sweep

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("PUREJAXPPO_KILLS", 2))
TINY = "CartPole-v1 --num-envs 4 --num-steps 8 --num-minibatches 2 --num-epochs 2 --widths 8".split()
GRID = "--grid learning_rate=1e-3,1e-2 --grid discount=0.9,0.99 --num-seeds 8 --slice-size 2 --num-devices 2".split()
SWEEP = ["sweep", *TINY, "--num-updates", "600", "--updates-per-chunk", "50", *GRID]
TRAIN = "--num-updates 50 --num-seeds 2 --save-every 0 --evaluate-every 20 --keep-best".split()
TRAIN = ["train", *TINY, *TRAIN]


@pytest.fixture(scope="module", autouse=True)
def heed_interrupts():
    """A shell that starts pytest in the background has it ignore Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def start(folder, arguments, cache, *words, devices=2):
    """A process of a command; its folder is a flag of all commands but `resume`."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    enabled = {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "true"}
    command = [sys.executable, "-m", "purejaxppo", *arguments, "--out", str(folder), "--compile-cache", cache]
    if arguments[0] == "resume":
        command[-4:-2] = []
    command += ["--distributed", *words] if words else []
    return subprocess.Popen(
        command, env=os.environ | enabled, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_two(folder, arguments, cache):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [start(folder, arguments, cache, f"{index}/2", address) for index in range(2)]


def finish(*processes):
    """What the processes printed, all of which succeed."""
    printed = [process.communicate(timeout=600) for process in processes]
    assert all(process.returncode == 0 for process in processes), printed
    return [output for output, _ in printed]


def kill(process):
    """Kills a command of several processes: its parent, or the one that trains."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(random.choice([process.pid, int(child)]), signal.SIGKILL)


def await_line(process, words):
    """Waits until a process has printed a line with some words."""
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(process.communicate())


def read(folder, name="results.nc"):
    return xarray.load_dataset(folder / name, engine="scipy")


def stored_updates(folder):
    """Updates of all runs that the slices of a sweep hold."""
    if not (folder / "sweep.json").exists():
        return 0
    return sum(slice_.num_updates * len(slice_.runs) for slice_ in Slices(read_sweep(folder), folder).read())


@pytest.fixture(scope="module")
def sweep_of_one(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("one") / "sweep"
    finish(start(folder, SWEEP, cache))
    return read(folder)


def test_two_processes_of_a_sweep_give_the_numbers_of_one_and_the_first_speaks(sweep_of_one, cache, tmp_path):
    first, second = finish(*start_two(tmp_path / "sweep", SWEEP, cache))
    assert "num_runs" in first and not second
    xarray.testing.assert_equal(read(tmp_path / "sweep"), sweep_of_one)
    (session,) = read_sessions(tmp_path / "sweep")
    assert session.get("steps") == 4 * 8 * sweep_of_one["loss"].size  # of both


def test_bad_input_is_said_once(cache, tmp_path):
    for flag, words in (("--num-seeds=0", "--num-seeds=0 must be"), ("--num-envs=0", "num_envs=0"), ("--no", "--no ")):
        processes = start_two(tmp_path / "sweep", [*SWEEP, flag], cache)
        said = [process.communicate(timeout=120)[1] for process in processes]
        assert [process.returncode for process in processes] == [2, 2]
        assert "".join(said).count(words) == 1, said


def test_a_sweep_of_which_a_process_is_killed_ends_within_a_minute_and_the_same_command_finishes_it(
    sweep_of_one, cache, tmp_path
):
    folder = tmp_path / "sweep"
    random.seed()
    for _ in range(KILLS):
        before = stored_updates(folder)
        if before == sweep_of_one["loss"].size:
            finish_sweep(folder, sweep_of_one, cache)
            before = 0
        processes = start_two(folder, SWEEP, cache)
        await_line(processes[0], "runs over")  # both have joined
        moment = random.choice(["before it trains", "while it trains", "while it trains"])
        while moment == "while it trains" and processes[0].poll() is None and stored_updates(folder) == before:
            time.sleep(0.05)
        time.sleep(random.uniform(0, 3))
        lost = random.randrange(2)
        kill(processes[lost])
        killed = time.monotonic()
        _, said = processes[1 - lost].communicate(timeout=60)
        seconds, stored = time.monotonic() - killed, stored_updates(folder)
        processes[lost].communicate(timeout=60)
        print(
            f"process {lost} killed, the other ended in {seconds:.1f} s with {processes[1 - lost].returncode}, "
            f"{before} then {stored} updates are stored"
        )
        assert stored >= before
        if processes[1 - lost].returncode == 0:  # it was killed after all its work was done
            xarray.testing.assert_equal(read(folder), sweep_of_one)
            continue
        assert processes[1 - lost].returncode == 5, said
        assert said.startswith(f"purejaxppo: process {lost} of 2 was lost"), said
        assert said.count("\n") == 1 and f"what {folder} holds stays, and the same command" in said
    finish_sweep(folder, sweep_of_one, cache)


def finish_sweep(folder, expected, cache):
    """Has the same command finish a sweep that was killed, with the numbers of one that was not."""
    finish(*start_two(folder, SWEEP, cache))
    xarray.testing.assert_equal(read(folder), expected)
    shutil.rmtree(folder)


def await_checkpoint(folder, process):
    while process.poll() is None and not list((folder / "checkpoints").glob("[0-9]" * 10)):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()


def lose_one(processes, lost):
    """Kills one of two processes within three seconds, which ends the other."""
    time.sleep(random.uniform(0, 3))
    kill(processes[lost])
    for process in processes:
        process.communicate(timeout=60)
    assert processes[1 - lost].returncode == 5


def test_a_sharded_run_of_two_processes_is_killed_and_resumes_in_two_and_in_one(cache, tmp_path):
    undisturbed, folder, alone = (tmp_path / name for name in ("undisturbed", "run", "alone"))
    finish(*start_two(undisturbed, TRAIN, cache))
    expected, processes = read(undisturbed, "metrics.nc"), start_two(folder, TRAIN, cache)
    assert expected["evaluation_return"].notnull().any("seed")[[19, 39, 49]].all()
    await_checkpoint(folder, processes[0])
    lose_one(processes, 0)
    shutil.copytree(folder, alone)
    finish(*start_two(folder, TRAIN, cache))
    xarray.testing.assert_equal(read(folder, "metrics.nc"), expected)
    best = [np.load(path / "best_policy.npz") for path in (folder, undisturbed)]
    assert set(best[0]) == set(best[1]) and all((best[0][name] == best[1][name]).all() for name in best[0])
    done = max(int(path.name) for path in (alone / "checkpoints").glob("[0-9]" * 10))
    finish(start(alone, ["resume", str(alone)], cache, devices=4))
    found = read(alone, "metrics.nc")
    xarray.testing.assert_equal(found.isel(updates=slice(done)), expected.isel(updates=slice(done)))
    following = [data[["loss", "grad_norm"]].isel(updates=slice(done, done + 2)) for data in (found, expected)]
    xarray.testing.assert_allclose(*following, rtol=1e-3)


def test_a_run_of_one_process_resumes_in_two(cache, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, [*TRAIN, "--num-devices", "4"], cache, devices=4)
    await_checkpoint(folder, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    first, _ = finish(*start_two(folder, TRAIN, cache))
    assert "on 4 x cpu" in first and read(folder, "metrics.nc").sizes["updates"] == 50


def test_ctrl_c_in_one_process_ends_a_run_of_two_after_the_same_chunk(cache, tmp_path):
    processes = start_two(tmp_path / "run", TRAIN, cache)
    await_checkpoint(tmp_path / "run", processes[1])
    processes[1].send_signal(signal.SIGINT)
    printed = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [130, 130], printed
    assert "the same command continues" in printed[0][0] and not printed[1][0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["0/2", "1/2"])
def test_a_process_says_that_it_waits_for_the_others_and_a_signal_ends_that(place, number, cache, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = start(tmp_path / "run", TRAIN, cache, place, address)
    assert process.stderr
    line = process.stderr.readline()
    assert line == f"waiting at {address} for the other processes, for up to 300 seconds\n"
    process.send_signal(number)
    printed, error = process.communicate(timeout=20)
    assert (process.returncode, printed, error) == (130, "", "purejaxppo: interrupted\n")
    assert not (tmp_path / "run").exists()


SPACE = "--grid learning_rate=1e-3,1e-2,1e-4,1e-1 --num-seeds 2 --num-updates 30 --save-every 0".split()
HALVING = ["search", *TINY, *SPACE, "--evaluate-every", "5", "--method", "halving", "--eta", "2", "--num-rungs", "2"]
PBT = ["search", *TINY, *SPACE, "--evaluate-every", "5", "--method", "pbt", "--every", "5"]


def test_halving_in_two_processes_gives_the_numbers_of_one_to_rounding(cache, tmp_path):
    finish(start(tmp_path / "one", HALVING, cache, devices=1))
    first, second = finish(*start_two(tmp_path / "two", HALVING, cache))
    assert "the best setting trains with" in first and not second
    expected, found = read(tmp_path / "one"), read(tmp_path / "two")
    first_rung = [data["loss"].isel(updates=slice(5)) for data in (found, expected)]
    xarray.testing.assert_allclose(*first_rung, rtol=1e-3)


def test_a_population_on_the_devices_of_two_processes_gives_the_numbers_of_one(cache, tmp_path):
    finish(start(tmp_path / "one", [*PBT, "--num-devices", "4"], cache, devices=4))
    first, second = finish(*start_two(tmp_path / "two", PBT, cache))
    assert "the best setting trains with" in first and not second
    expected, found = read(tmp_path / "one", "metrics.nc"), read(tmp_path / "two", "metrics.nc")
    xarray.testing.assert_equal(found, expected)  # a run lies on one device, and only copies pass between them


@pytest.mark.parametrize("search", [HALVING, PBT], ids=["halving", "pbt"])
def test_a_search_of_which_a_process_is_killed_is_finished_by_the_same_command(search, cache, tmp_path):
    folder, longer = tmp_path / "search", [*search, "--num-updates", "200"]
    processes = start_two(folder, longer, cache)
    while processes[0].poll() is None and not [*folder.glob("slices/*.npz"), *folder.glob("checkpoints/[0-9]*")]:
        time.sleep(0.05)
    lose_one(processes, random.randrange(2))
    first, second = finish(*start_two(folder, longer, cache))
    assert "the best setting trains with" in first and not second
    finish(*start_two(tmp_path / "undisturbed", longer, cache))
    name = "metrics.nc" if search == PBT else "results.nc"
    expected, found = read(tmp_path / "undisturbed", name), read(folder, name)
    xarray.testing.assert_equal(found["loss"], expected["loss"])
