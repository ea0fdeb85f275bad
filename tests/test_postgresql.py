"""A search that several machines share: workers on one study in a PostgreSQL database, which come and go."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import purejaxppo as pjp
from probes import SMALL
from purejaxppo.cli.main import main
from purejaxppo.experiment.sweeps.studies import INSTEAD_OF, INTERRUPTED, WORKER

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "optuna_program.py"


@pytest.fixture(scope="module")
def server():
    """A server of its own, which nobody outside this machine can reach, with the URL of a database."""
    pytest.importorskip("psycopg")
    on_path = shutil.which("initdb")
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *([Path(on_path)] if on_path else [])]
    if not found:
        pytest.skip("needs the programs of PostgreSQL")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # the path of a socket must be short
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    if user and "postgres" not in {x.pw_name for x in pwd.getpwall()}:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    if user:
        shutil.chown(folder, "postgres")

    def call(program, *arguments):
        command = [found[0].with_name(program), "-D", folder / "data", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **user)

    call("initdb", "-A", "trust", "-U", "postgres", "--no-sync")
    start = partial(
        call, "pg_ctl", "-w", "-l", folder / "log", "-o", f"-k {folder} -c listen_addresses= -c fsync=off", "start"
    )
    start()
    try:
        yield SimpleNamespace(url=f"postgresql+psycopg://postgres@/postgres?host={folder}", start=start, call=call)
    finally:
        call("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture
def storage(server, request):
    """A database of its own for every test."""
    import psycopg

    name = request.node.name.split("[")[0][-40:]
    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f'create database "{name}"'.encode())
    return server.url.replace("/postgres?", f"/{name}?")


def start(storage, *arguments):
    folders = [str(PROGRAM.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-W", "error::UserWarning", str(PROGRAM), storage, *map(str, arguments)]
    return subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)}, stderr=subprocess.PIPE, text=True
    )


def trials_of(storage):
    try:
        return optuna.load_study(study_name="purejaxppo", storage=storage).trials
    except Exception:  # the tables or the study are not there yet
        return []


def worked(trial, process):
    return trial.user_attrs.get(WORKER, "").endswith(f":{process.pid}")


def await_running(storage, process, num_finished=0):
    """Waits until a worker trains a batch, and so many trials are finished."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        trials = trials_of(storage)
        mine = [trial for trial in trials if worked(trial, process) and trial.state.name == "RUNNING"]
        if len(mine) == 3 and sum(trial.state.is_finished() for trial in trials) >= num_finished:
            return mine
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("the worker did not train a batch in time")


def finish(*processes):
    errors = [process.communicate(timeout=500)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors


def of_state(trials, state):
    return [trial for trial in trials if trial.state.name == state and INTERRUPTED not in trial.user_attrs]


def test_three_workers_share_a_study_and_one_that_is_killed_is_replaced(storage):
    workers = [start(storage, 60, 3000) for _ in range(3)]
    killed = workers[1]
    try:
        await_running(storage, killed, num_finished=9)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        lost = [trial for trial in trials_of(storage) if worked(trial, killed) and trial.state.name == "RUNNING"]
        finish(workers[0], workers[2])
    finally:
        for worker in workers:
            worker.kill()
    trials = trials_of(storage)
    pruned, failed = of_state(trials, "PRUNED"), of_state(trials, "FAIL")
    complete = of_state(trials, "COMPLETE") + pruned
    assert len(complete) == 60 and 0 < len(pruned) < 60 and not of_state(trials, "RUNNING")
    assert all(1500 <= trial.last_step < 3000 for trial in pruned)  # by the returns of its own training
    assert len({trial.params["learning_rate"] for trial in complete}) == 60  # nothing is drawn twice
    assert all(any(worked(trial, worker) for trial in complete) for worker in workers)
    assert sorted(trial.number for trial in failed) == sorted(trial.number for trial in lost)
    again = {trial.user_attrs[INSTEAD_OF]: trial for trial in complete if INSTEAD_OF in trial.user_attrs}
    assert again.keys() == {trial.number for trial in lost}
    assert all(again[trial.number].params == trial.params for trial in lost)
    assert not any(worked(trial, killed) for trial in again.values())


def test_a_worker_that_comes_back_to_its_folder_resumes_its_batch(storage, tmp_path):
    worker = start(storage, 6, 30_000, tmp_path / "first")
    mine = await_running(storage, worker)
    worker.kill()
    worker.wait()
    finish(start(storage, 6, 30_000, tmp_path / "first"))
    trials = trials_of(storage)
    complete = of_state(trials, "COMPLETE") + of_state(trials, "PRUNED")
    assert len(complete) == 6 == len(trials) and {trial.number for trial in mine} <= {
        trial.number for trial in complete
    }


def test_a_database_that_goes_away_ends_a_command_in_one_sentence_which_continues_later(storage, server, tmp_path):
    folder = tmp_path / "search"
    flags = "--num-envs 4 --num-steps 8 --num-updates 20000 --num-seeds 1 --widths 8 --num-samples 2".split()
    space = "--sample learning_rate=log_uniform:1e-4:1e-2 --batch-size 2 --save-every 0".split()
    command = [sys.executable, "-m", "purejaxppo", "search", "CartPole-v1", "--method", "optuna", *flags, *space]
    command += ["--storage", storage, "--out", str(folder)]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while worker.poll() is None and not list(folder.glob("batches/*/slices/*.npz")):
            time.sleep(0.05)
        server.call("pg_ctl", "-m", "immediate", "stop")
        _, error = worker.communicate(timeout=300)
    finally:
        worker.kill()
        server.start()
    last = error.strip().splitlines()[-1]
    assert worker.returncode == 3 and "Traceback" not in error
    assert last.startswith("purejaxppo: the study cannot be written: its database does not answer: ")
    assert last.endswith("(what is trained stays, and the same call continues)")
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert len(of_state(trials_of(storage), "COMPLETE")) == 2


@pytest.mark.parametrize(
    "url, words",
    [
        (
            "postgresql+psycopg://me:secret@127.0.0.1:1/trials",
            r"me:\*\*\*@127.0.0.1:1/trials cannot be opened: .*refused",
        ),
        ("nothing", "storage=... cannot be opened: .*such as postgresql"),
        ("postgresql+nothing://host/trials", "storage=postgresql.*cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_one_sentence_without_its_password(url, words):
    space = {"learning_rate": pjp.log_uniform(1e-4, 1e-1)}
    with pytest.raises(ValueError, match=words) as error:
        pjp.optuna_search("CartPole-v1", space, num_trials=1, batch_size=1, storage=url, config=SMALL)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_the_command_takes_the_url_of_a_storage(storage, tmp_path, capsys):
    flags = "--num-envs 4 --num-steps 8 --num-updates 2 --num-seeds 1 --widths 8 --num-samples 3 --batch-size 3".split()
    command = ["search", "CartPole-v1", "--method", "optuna", *flags, "--sample", "learning_rate=log_uniform:1e-4:1e-2"]
    status = main([*command, "--storage", storage, "--out", str(tmp_path / "search")])
    assert status == 0, capsys.readouterr()
    assert len(of_state(trials_of(storage), "COMPLETE")) == 3 and not (tmp_path / "search" / "study.db").exists()
