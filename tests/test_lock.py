"""Locks: one writer per place, whatever becomes of the one before."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from purejaxppo.experiment import lock as module
from purejaxppo.experiment.files import make_new
from purejaxppo.experiment.lock import LOCK, LockHeld, LockLost, claim, claim_folder, read_holder, read_note


@pytest.fixture
def path(tmp_path):
    return tmp_path / LOCK


def let_pass(path, seconds):
    """Sets the last renewal of a lock back in time."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def rewrite(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_lock_names_its_holder_and_leaves_nothing(path):
    with claim(path) as lock:
        fields = json.loads(path.read_text())
        assert fields["pid"] == os.getpid() and fields["host"] and fields["process_start"] and fields["since"]
        lock.check()
    assert not list(path.parent.iterdir())


def test_the_second_is_told_who_holds_the_folder(tmp_path):
    folder = tmp_path / "new" / "run"
    with claim_folder(folder) as lock:
        with pytest.raises(ValueError, match=f"^folder={folder} is being written by this process since .* UTC \\("):
            with claim_folder(folder):
                pass
        rewrite(lock.path, pid=1, host="other", machine="other")
        with pytest.raises(LockHeld, match="by process 1 on other since"), claim_folder(str(folder)):
            pass
        with claim_folder(lock) as same:
            assert same is lock
        assert lock.path.exists()
    with claim_folder(folder):
        pass


def test_a_folder_that_cannot_be_locked_is_refused_in_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_create", full)
    with pytest.raises(ValueError, match="cannot be written: No space left on device"), claim_folder(tmp_path / "run"):
        pass


def test_the_lock_of_a_process_that_has_ended_is_taken_at_once(path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for fields in ({"pid": ended.pid}, {"process_start": 1}):
        claim(path)
        rewrite(path, **fields)
        with claim(path) as lock:
            lock.check()
        assert not list(path.parent.iterdir())


@pytest.mark.parametrize("seconds, taken", [(110, False), (130, True)])
def test_a_lock_is_taken_when_it_was_not_renewed_for_two_minutes(path, seconds, taken):
    first = claim(path)
    rewrite(path, machine="another one")
    let_pass(path, seconds)
    if not taken:
        with pytest.raises(LockHeld):
            claim(path)
        return
    with claim(path) as second:
        with pytest.raises(LockLost, match="not renewed for two minutes and is now held by this process"):
            first.check()
        first.release()
        second.check()
        assert path.exists()


def test_a_lock_that_was_removed_is_lost(path):
    lock = claim(path)
    path.unlink()
    with pytest.raises(LockLost, match="was removed"):
        lock.check()
    lock.release()


def test_a_lock_is_renewed_while_it_is_held(path, monkeypatch):
    monkeypatch.setattr(module, "RENEW_EVERY", 0.01)
    with claim(path):
        let_pass(path, 1000)
        old, renewed = path.stat().st_mtime, threading.Event()
        while path.stat().st_mtime == old and not renewed.wait(0.01):
            pass
        assert not module.is_stale(path, module._this_process())


@pytest.mark.parametrize("text", ["", "{}", "[1]", "{", '{"pid": "\\u001b[2J"}', "\0" * 10000])
def test_a_damaged_lock_is_held_by_an_unknown_process_until_it_is_stale(path, text):
    path.write_text(text)
    with pytest.raises(LockHeld, match="an unknown process"):
        claim(path)
    let_pass(path, 130)
    claim(path).release()
    assert not path.exists()


def test_a_pipe_instead_of_a_lock_does_not_block(path):
    os.mkfifo(path)
    with pytest.raises(LockHeld):
        claim(path)


def test_of_many_that_take_over_one_lock_at_once_one_gets_it(path):
    for _ in range(20):
        claim(path)
        rewrite(path, pid=2**30)
        ready = threading.Barrier(8)

        def take(_):
            ready.wait()
            try:
                return claim(path)
            except LockHeld:
                return None

        with ThreadPoolExecutor(8) as pool:
            locks = [lock for lock in pool.map(take, range(8)) if lock]
        assert len(locks) == 1
        locks[0].check()
        locks[0].release()
        assert not list(path.parent.iterdir())


def test_a_writer_may_wait_for_another(path):
    first = claim(path)
    threading.Timer(0.2, first.release).start()
    claim(path, wait=10).release()


def test_a_fork_does_not_release_the_lock_of_its_parent(path, monkeypatch):
    lock = claim(path)
    monkeypatch.setattr(os, "getpid", lambda: lock.holder.pid + 1)
    lock.release()
    assert path.exists()


def test_a_lock_that_is_released_while_its_note_is_read_is_taken(tmp_path, monkeypatch):
    held, is_stale = claim(tmp_path / LOCK), module.is_stale

    def released(path, holder):
        stale = is_stale(path, holder)
        held.release()
        return stale

    def read(path):
        with monkeypatch.context() as patch:
            patch.setattr(module, "is_stale", released)
            return read_note(path)

    monkeypatch.setattr(module, "read_note", read)
    with claim_folder(tmp_path, wait=5) as taken:
        taken.check()


def hold_in_turn(path: str, times: int):
    """Adds to a number in a file, which only works if one process does so at a time."""
    number = Path(path).with_name("number")
    for _ in range(times):
        with claim(Path(path), wait=60) as lock:
            before = int(number.read_text())
            lock.check()
            number.write_text(str(before + 1))


def test_default_folders_never_collide(tmp_path):
    (tmp_path / "run-3").symlink_to("nowhere")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: make_new(tmp_path / "run"), range(20)))
    assert len(set(made)) == 20 and all(path.is_dir() for path in made)
    assert sorted(made)[:3] == [tmp_path / "run", tmp_path / "run-10", tmp_path / "run-11"]
    assert tmp_path / "run-3" not in made


@pytest.mark.full
def test_processes_take_turns(path):
    number = path.with_name("number")
    number.write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=hold_in_turn, args=(str(path), 40)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert number.read_text() == "80" and list(path.parent.iterdir()) == [number]


@pytest.mark.full
def test_the_lock_of_a_killed_process_is_free(path):
    program = f"""if True:
        from pathlib import Path
        from purejaxppo.experiment.lock import claim
        claim(Path({str(path)!r})); print("held", flush=True); input()
    """
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        with pytest.raises(LockHeld, match=re.escape(f"process {process.pid} on ")):
            claim(path)
        process.kill()  # nobody has asked yet how it ended
        claim(path, wait=10).release()
    assert read_holder(path) is None
