"""Results on disk as netCDF, small and large, and slices whose metrics are read when they are used."""

import os
import resource
import shutil
import subprocess

import numpy as np
import pytest
import xarray

import purejaxppo as pjp
from probes import SMALL
from purejaxppo.experiment import datasets
from purejaxppo.experiment.datasets import blocks_of, read_dataset, save_dataset
from purejaxppo.experiment.files import SWEEP, Place, save_json
from purejaxppo.experiment.provenance import describe_machine
from purejaxppo.experiment.sweeps import metrics as metrics_module
from purejaxppo.experiment.sweeps import slices as slices_module
from purejaxppo.experiment.sweeps.result import load_sweep, make_result
from purejaxppo.experiment.sweeps.slices import Slice, Slices
from purejaxppo.ppo import make_ppo


@pytest.fixture
def large(monkeypatch):
    """Whatever is written or read counts as large, and is copied in blocks of 64 bytes."""
    for name, value in {"LARGE": 0, "BLOCK": 64, "SMALL": 0}.items():
        monkeypatch.setattr(datasets, name, value)
    for module in (metrics_module, slices_module):
        monkeypatch.setattr(module, "LARGE", 0)


def make_dataset():
    """With everything that the metrics of a sweep have: dimensions without a coordinate, texts, vectors."""
    random = np.random.default_rng(0)
    return xarray.Dataset(
        {
            "loss": (("setting", "seed", "updates"), random.random((5, 3, 7), np.float32)),
            "num_episodes": (("setting", "seed", "updates"), random.integers(0, 9, (5, 3, 7), np.int32)),
            "of_action": (("setting", "seed", "updates", "of_action_index"), random.random((5, 3, 7, 2))),
            "failed_metric": (("setting", "seed"), np.array([["", "loss", ""]] * 5)),
        },
        {
            "clip": ("setting", np.linspace(0.1, 0.2, 5)),
            "widths": ("setting", ["64,64"] * 5),
            "seed": np.arange(3, dtype=np.int32),
            "step": ("updates", np.where(np.arange(7) < 5, np.arange(7) * 32.0, np.nan)),
        },
        {"env": "CartPole-v1", "sweep": "{}"},
    )


def test_a_large_dataset_is_read_as_it_was_written(large, tmp_path):
    dataset = make_dataset()
    save_dataset(tmp_path / "results.nc", dataset)
    assert (tmp_path / "results.nc").read_bytes()[:4] == b"\x89HDF"
    xarray.testing.assert_identical(read_dataset(tmp_path / "results.nc"), dataset)
    with xarray.open_dataset(tmp_path / "results.nc") as opened:
        xarray.testing.assert_identical(opened.load(), dataset)


def test_a_small_dataset_is_netcdf_3_as_in_older_folders(tmp_path):
    dataset = make_dataset()
    save_dataset(tmp_path / "results.nc", dataset)
    assert (tmp_path / "results.nc").read_bytes()[:3] == b"CDF"
    xarray.testing.assert_identical(read_dataset(tmp_path / "results.nc"), dataset)


@pytest.mark.parametrize("shape", [(16,), (17, 1), (2, 3, 4), (3, 40, 5), (1, 1, 100), (2, 0, 3), (0,)])
def test_blocks_make_up_an_array_and_are_small(shape, large):
    count = np.zeros(shape, int)
    for block in blocks_of(shape, 4):
        assert count[block].size <= 16
        count[block] += 1
    assert (count == 1).all()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounts a small disk")
def test_a_disk_that_fills_up_while_a_large_dataset_is_written_keeps_the_old_one(large, tmp_path, monkeypatch):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting is not allowed")
    monkeypatch.setattr(datasets, "check_room", lambda *_: None)  # which would have found out before
    monkeypatch.setattr(datasets, "SMALL", 2**10)
    try:
        (tmp_path / "results.nc").write_text("old")
        for length in (2**18, 2**21):
            with pytest.raises(OSError, match="No space left"):
                save_dataset(tmp_path / "results.nc", xarray.Dataset({"x": ("updates", np.ones(length, np.float32))}))
        assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
        save_dataset(tmp_path / "results.nc", make_dataset())  # HDF5 is as it was
        xarray.testing.assert_identical(read_dataset(tmp_path / "results.nc"), make_dataset())
    finally:
        subprocess.run(["umount", tmp_path])


def test_a_large_dataset_that_does_not_fit_is_refused_before_it_is_written(large, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_dataset(tmp_path / "results.nc", make_dataset())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    """A sweep of four runs in two slices: the first has made 3 updates of 3, of which its second run lost the last
    two; the other one 2. Every number tells its run and its update."""
    config = SMALL.with_total_steps(3 * SMALL.steps_per_update)
    sweep = pjp.Sweep("CartPole-v1", pjp.grid(clip=[0.1, 0.2]), 2, config=config, hyperparams=pjp.Hyperparams())
    save_json(tmp_path / SWEEP, {"sweep": sweep.to_json(), "sessions": [describe_machine()]})
    (tmp_path / "slices").mkdir()
    slices, names = Slices(sweep, tmp_path), list(sweep.runs())
    for i, length in enumerate((3, 2)):
        numbers = np.add.outer([20 * i + 10, 20 * i + 20], np.arange(length)).astype(np.float32)
        metrics = {name: numbers for name in ("learning_rate", "episode_return", "loss")}
        metrics |= {"num_episodes": np.ones((2, length), np.int32), "failure": np.ones((2, length), np.int32)}
        done = [3, 1] if i == 0 else [2, 2]
        slices.write(Slice((names[2 * i], names[2 * i + 1]), metrics, {"num_updates": np.array(done, np.int32)}))
    return tmp_path


RETURNS = [[[10, 11, 12], [20, 21, 22]], [[30, 31, np.nan], [40, 41, np.nan]]]


def test_of_a_large_sweep_only_the_slices_are_read_that_are_needed(large, folder, monkeypatch):
    read, original = [], Place.read
    monkeypatch.setattr(Place, "read", lambda self, path: read.append(path) or original(self, path))
    result = load_sweep(folder)
    assert len(read) == 1  # which metric was not finite first
    metric = result.metrics["episode_return"]
    assert metric.isel(clip=0, seed=1, updates=2) == 22 and len(read) == 2
    assert metric.sel(clip=0.2).isel(seed=[1, 0], updates=slice(0, 2)).values.tolist() == [[40, 41], [30, 31]]
    assert len(read) == 3 and read[1] != read[2]
    np.testing.assert_array_equal(metric.values, RETURNS)
    assert len(read) == 5 and metric.values.sum() != 0 and len(read) == 5  # kept from then on
    assert result.metrics["num_episodes"].values[1, :, 2].tolist() == [0, 0]
    assert result.num_unfinished == 2
    assert [sentence[:36] for sentence in result.failed()] == ["clip=0.1 seed=1 turned nan in update"]


def test_a_large_sweep_has_the_metrics_of_a_small_one(folder, request):
    small = load_sweep(folder)
    request.getfixturevalue("large")
    xarray.testing.assert_identical(load_sweep(folder).metrics.load(), small.metrics)
    np.testing.assert_array_equal(small.metrics["episode_return"], RETURNS)
    make_result(small.sweep, small.slices, small.slices.read(), make_ppo)
    xarray.testing.assert_identical(read_dataset(folder / "results.nc"), small.metrics)


def test_a_slice_that_trained_further_since_shows_what_it_was(large, folder):
    result = load_sweep(folder)
    stored = next(slice_ for slice_ in result.slices.read() if slice_.num_updates == 2)
    metrics = {name: np.concatenate([x, np.asarray(x)[:, :1]], 1) for name, x in stored.metrics.items()}
    result.slices.write(Slice(stored.runs, metrics, {"num_updates": np.array([3, 3], np.int32)}))
    np.testing.assert_array_equal(result.metrics["episode_return"].values, RETURNS)
    assert not load_sweep(folder).metrics["episode_return"].isnull().any()


def test_a_damaged_number_of_a_large_slice_is_named_when_it_is_used_and_before_training(large, tmp_path):
    config = SMALL.with_total_steps(5000 * SMALL.steps_per_update)
    sweep = pjp.Sweep("CartPole-v1", config=config, hyperparams=pjp.Hyperparams())
    save_json(tmp_path / SWEEP, {"sweep": sweep.to_json(), "sessions": [describe_machine()]})
    (tmp_path / "slices").mkdir()
    numbers = np.arange(5000, dtype=np.float32)[None]
    metrics = {name: numbers for name in ("learning_rate", "episode_return", "loss")}
    slices = Slices(sweep, tmp_path)
    slices.write(Slice(tuple(sweep.runs()), metrics, {"num_updates": np.array([5000], np.int32)}))
    (path,) = (tmp_path / "slices").iterdir()
    content = path.read_bytes()
    last = content.rindex(numbers.tobytes()) + numbers.nbytes - 4
    path.write_bytes(content[:last] + b"xxxx" + content[last + 4 :])
    result = load_sweep(tmp_path)
    assert result.metrics["learning_rate"][0, -1] == 4999
    with pytest.raises(ValueError, match=f"{path} is damaged: .*CRC"):
        result.metrics["loss"].load()
    with pytest.warns(UserWarning, match="is damaged: .*CRC"):
        assert slices.read(verify=True) == []


@pytest.mark.slow
def test_a_variable_of_more_than_4_gib_is_written_in_little_memory_and_its_rows_are_read_alone(tmp_path):
    shape = 1_100_000, 1000
    assert np.prod(shape, dtype=np.int64) * 4 > 2**32
    numbers = np.broadcast_to(np.arange(shape[1], dtype=np.float32), shape)  # which takes no memory
    save_dataset(tmp_path / "results.nc", xarray.Dataset({"loss": (("run", "updates"), numbers)}))
    assert (tmp_path / "results.nc").stat().st_size > 2**32
    with xarray.open_dataset(tmp_path / "results.nc") as opened:
        assert opened["loss"].shape == shape
        for row in (0, shape[0] // 2, shape[0] - 1):
            np.testing.assert_array_equal(opened["loss"][row].values, numbers[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    assert peak < 2**31
