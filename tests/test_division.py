"""How a sweep is divided into slices and shares, without training anything."""

import os
import time
from dataclasses import replace
from threading import Event

import numpy as np
import pytest

import purejaxppo as pjp
from probes import SMALL
from purejaxppo.experiment import lock
from purejaxppo.experiment.lock import await_signs, claim
from purejaxppo.experiment.sweeps.division import describe_missing, divide, own_slices, read_share
from purejaxppo.experiment.sweeps.slices import Slice

SLURM = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}


def make_sweep(num_seeds=3, sizes=(2, 4, 8), discounts=(0.9, 0.99)):
    """Groups of different numbers of settings: the last size has one setting, the others as many as discounts."""
    rows = [(size, discount) for size in sizes[:-1] for discount in discounts] + [(sizes[-1], 0.9)]
    table = pjp.paired(num_envs=[size for size, _ in rows], discount=[discount for _, discount in rows])
    return pjp.Sweep("CartPole-v1", table, num_seeds, config=replace(SMALL, num_minibatches=1))


def division_of(sweep, size, stored=(), kept=None):
    return divide(sweep, stored, kept, {sweep.name_program(group): size for group in sweep.groups()})


def names(own):
    return [slice_.name for slices in own.values() for slice_ in slices]


def finished(own, share_of_updates=1.0):
    """The slices as they are stored after training."""
    return [
        replace(
            slice_, metrics={"loss": np.zeros((len(slice_.runs), int(group.config.num_updates * share_of_updates)))}
        )
        for group, slices in own.items()
        for slice_ in slices
    ]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 50])
def test_shares_are_disjoint_cover_the_sweep_and_are_as_equal_as_can_be(size, number):
    sweep = make_sweep()
    division = division_of(sweep, size)
    whole = own_slices(sweep, [], division)
    shares = [own_slices(sweep, [], division, read_share((i, number))) for i in range(number)]
    together = [name for share in shares for name in names(share)]
    assert len(together) == len(set(together)) and set(together) == set(names(whole))
    assert {run for slices in whole.values() for slice_ in slices for run in slice_.runs} == sweep.runs().keys()
    for counts in [[len(names(share)) for share in shares], *([len(x.get(g, [])) for x in shares] for g in whole)]:
        assert max(counts) - min(counts) <= 1


def test_groups_of_one_slice_go_to_different_shares():
    sweep = make_sweep(1, discounts=(0.9,))
    shares = [own_slices(sweep, [], division_of(sweep, 1), read_share((i, 3))) for i in range(3)]
    assert [[group.config.num_envs for group in share] for share in shares] == [[2], [4], [8]]


@pytest.mark.parametrize("done", [0.5, 1.0])
def test_a_share_is_the_same_whatever_is_stored_already(done):
    sweep = make_sweep()
    division = division_of(sweep, 2)
    stored = finished(own_slices(sweep, [], division), done)
    for seed in range(5):
        some = [slice_ for slice_ in stored if np.random.default_rng(seed + len(slice_.runs[0])).random() < 0.5][seed:]
        for share in map(read_share, [(0, 4), (2, 4)]):
            before, now = (set(names(own_slices(sweep, x, division, share))) for x in ([], some))
            assert now == (before if done < 1 else before - {slice_.name for slice_ in some})


def test_what_is_added_to_a_trained_sweep_is_shared_as_equally():
    """A fourth seed for every setting: counted among all slices of one run, every new one would be of one share."""
    sweep, more = make_sweep(3), make_sweep(4)
    first = division_of(sweep, 1)
    stored = finished(own_slices(sweep, [], first))
    division = division_of(more, 1, stored, first)
    shares = [own_slices(more, stored, division, read_share((i, 4))) for i in range(4)]
    assert sorted(len(names(share)) for share in shares) == [1, 1, 1, 2]
    later = stored + finished(shares[0])
    assert divide(more, later, division) == division
    assert names(own_slices(more, later, division, read_share((1, 4)))) == names(shares[1])


def test_a_slice_that_was_trained_and_is_lost_is_trained_again():
    sweep = make_sweep()
    stored = finished(own_slices(sweep, [], division_of(sweep, 2)))
    division = division_of(sweep, 2, stored)
    assert own_slices(sweep, stored, division) == {} and len(division.trained) == len(stored)
    assert names(own_slices(sweep, stored[1:], division)) == [stored[0].name]


def test_the_folder_decides_on_slice_sizes_then_its_slices_then_the_caller():
    sweep = make_sweep()
    stored = finished(own_slices(sweep, [], division_of(sweep, 2)))[:1]
    sizes = list(division_of(sweep, 3, stored).slice_sizes.values())
    assert sizes == [2, 3, 3]
    assert division_of(sweep, 3, stored, division_of(sweep, 1)).slice_sizes == division_of(sweep, 1).slice_sizes


def test_groups_that_differ_in_their_updates_alone_have_sizes_of_their_own():
    sweep = pjp.Sweep("CartPole-v1", pjp.grid(num_updates=[1, 2]), config=SMALL)
    assert len({sweep.name_program(group) for group in sweep.groups()}) == 2


def test_what_is_missing_is_counted_and_the_first_is_named():
    sweep = make_sweep()
    stored = finished(own_slices(sweep, [], division_of(sweep, 3)))
    assert describe_missing(sweep, stored) == "none of 15 runs"
    assert describe_missing(sweep, stored[1:]) == "3 of 15 runs, such as num_envs=2 discount=0.9 seed=0"
    assert describe_missing(sweep, [Slice(x.runs, {}, {}) for x in stored]).startswith("15 of 15 runs")


@pytest.mark.parametrize("share", [(1, 4), (np.int64(1), np.int64(4)), [1, 4], "1/4"])
def test_a_share_is_a_pair_or_a_text(share):
    assert read_share(share) == (1, 4) and str(read_share(share)) == "1/4"


@pytest.mark.parametrize("share", ["4/4", "-1/4", "1", "1/2/3", "a/b", "0.5/4", "", (1,), (1.0, 4), (4, 4), 3, (0, 0)])
def test_any_other_share_is_refused_in_one_sentence(share):
    with pytest.raises(ValueError, match="^share=.* must be the index of a share, from 0, and their number: [^\n]*$"):
        read_share(share)


@pytest.mark.parametrize(
    "changes, index, number",
    [
        ({}, 2, 4),
        ({"SLURM_ARRAY_TASK_ID": "5"}, 0, 4),
        ({"SLURM_ARRAY_TASK_ID": "13", "SLURM_ARRAY_TASK_STEP": "4"}, 2, 4),
    ],
)
def test_a_share_is_read_from_the_variables_of_a_job_array(changes, index, number, monkeypatch):
    assert read_share("slurm", SLURM | changes) == (index, number)
    for name, value in (SLURM | changes).items():
        monkeypatch.setenv(name, value)
    assert read_share("slurm") == (index, number)


@pytest.mark.parametrize("name", SLURM)
def test_a_missing_variable_is_named(name):
    with pytest.raises(ValueError, match=f"^share=slurm needs .* but {name} is not set [^\n]*$"):
        read_share("slurm", {key: value for key, value in SLURM.items() if key != name})


@pytest.mark.parametrize(
    "changes", [{"SLURM_ARRAY_TASK_ID": "9"}, {"SLURM_ARRAY_TASK_ID": "4"}, {"SLURM_ARRAY_TASK_STEP": "4"}]
)
def test_a_job_array_with_gaps_is_refused(changes):
    with pytest.raises(ValueError, match="^share=slurm needs a job array without gaps, but task [^\n]*$"):
        read_share("slurm", SLURM | changes)


@pytest.mark.parametrize("fate", ["killed", "at work", "released", "here"])
def test_the_wait_for_a_writer_elsewhere_ends_when_its_fate_is_certain(fate, tmp_path, monkeypatch):
    path = tmp_path / "some.lock"
    with claim(path) as held:
        if fate != "here":
            monkeypatch.setattr(lock, "_machine", lambda: "another")  # the lock is then one of another machine
        old = time.time() - lock.STALE_AFTER + (2.0 if fate == "killed" else 60.0)
        os.utime(path, (old, old))
        changes = {"at work": lambda: os.utime(path), "released": path.unlink}

        class Interrupt(Event):
            def wait(self, timeout=None):
                waits.append(timeout)
                changes.get(fate, lambda: time.sleep(timeout or 0))()
                return False

        waits = []
        await_signs([path, tmp_path / "none.lock"], Interrupt())
        assert len(waits) in {"killed": (2, 3), "here": (0,)}.get(fate, (1,))
        assert lock.is_stale(path, held.holder) == (fate in ("killed", "released"))
