import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray
from scipy import stats
from test_ppo import same_leaves

import purejaxppo as pjp
from probes import SMALL
from purejaxppo import batched, fit, make_ppo
from purejaxppo.experiment.report.metrics import label, last_episodes, learning_curve, mean_interval


@pytest.fixture(scope="module")
def ppo():
    return make_ppo("CartPole-v1", dataclasses.replace(SMALL, num_updates=7))


@pytest.mark.full
def test_chunks_are_the_same_as_one_program_to_the_bit(ppo, key):
    """Chunks of 3, 3 and 1: the last is shorter."""
    state = jax.jit(ppo.init)(key)
    whole, metrics = jax.jit(ppo.train)(state)
    result = fit(ppo, state, updates_per_chunk=3, progress=False)
    same_leaves(result.state, whole)
    for name, values in metrics.items():
        np.testing.assert_array_equal(result.metrics[name], values)
    assert result.compile_seconds > 0 and result.run_seconds > 0
    assert not state.actors.obs.is_deleted()


@pytest.mark.full
def test_a_batch_is_fitted_with_its_runs_labelled(ppo, key):
    many = batched(ppo)
    result = fit(many, jax.jit(many.init)(jax.random.split(key, 2)), updates_per_chunk=4, progress=False)
    assert result.metrics.sizes == {"run": 2, "updates": 7}
    np.testing.assert_array_equal(result.metrics["step"], 32.0 * np.arange(1, 8))
    assert result.metrics["episode_return"].dims == ("run", "updates")


@pytest.mark.full
def test_a_run_goes_on_where_it_stopped(ppo, key):
    state = jax.jit(ppo.init)(key)
    first = fit(ppo, state, num_updates=4, progress=False)
    second = fit(ppo, first.state, progress=False)
    assert second.metrics["updates"].values.tolist() == [5, 6, 7]
    same_leaves(second.state, fit(ppo, state, progress=False).state)
    with pytest.raises(ValueError, match="this run is complete"):
        fit(ppo, second.state)


def test_an_interrupt_keeps_what_was_done(ppo, key, monkeypatch):
    from purejaxppo.experiment.runs import fit as module

    real = module.chunks

    def interrupted(*args, **kwargs):
        for i, result in enumerate(real(*args, **kwargs)):
            if i == 1:
                signal.raise_signal(signal.SIGINT)
            yield result

    monkeypatch.setattr(module, "chunks", interrupted)
    before = signal.getsignal(signal.SIGINT)
    result = fit(ppo, jax.jit(ppo.init)(key), updates_per_chunk=2, progress=False)
    assert result.metrics.sizes["updates"] == 4 and result.state.num_updates == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_shows_return_speed_and_time_left(ppo, key, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    fit(ppo, jax.jit(ppo.init)(key), updates_per_chunk=1)
    shown = capsys.readouterr().err
    assert "compiling" in shown and "compiled in" in shown and "return" in shown and "steps/s" in shown


def metrics_of(returns, counts):
    return label({"episode_return": returns, "num_episodes": counts, "learning_rate": np.zeros_like(returns)}, SMALL)


def test_the_last_episodes_are_counted_back_from_the_end():
    returns = np.array([[1.0, 2.0, np.nan, 4.0]])
    counts = np.array([[5, 3, 0, 2]])
    metrics = metrics_of(returns, counts)
    np.testing.assert_allclose(last_episodes(metrics, 4), [(2 * 4 + 2 * 2) / 4])
    np.testing.assert_allclose(last_episodes(metrics, 100), [(2 * 4 + 3 * 2 + 5 * 1) / 10])
    assert np.isnan(last_episodes(metrics_of(returns * np.nan, counts * 0)))


def test_a_learning_curve_weighs_updates_by_their_episodes():
    curve = learning_curve(metrics_of(np.array([[1.0, 2.0, np.nan, np.nan]]), np.array([[1, 3, 0, 0]])), num_points=2)
    np.testing.assert_allclose(curve, [[1.75, np.nan]])
    np.testing.assert_array_equal(curve["step"], [64, 128])


def test_the_interval_is_students():
    values = np.array([3.0, 5, 4, 9])
    mean, low, high = mean_interval(values)
    np.testing.assert_allclose((low, high), stats.t.interval(0.95, 3, values.mean(), stats.sem(values)))
    assert mean == 5.25 and np.isnan(mean_interval([1.0])[1])


def test_metrics_survive_the_file(tmp_path):
    metrics = metrics_of(np.array([[1.0, np.nan]], np.float32), np.array([[5, 0]], np.int32))
    metrics.to_netcdf(tmp_path / "metrics.nc", engine="scipy")
    xarray.testing.assert_identical(xarray.load_dataset(tmp_path / "metrics.nc", engine="scipy"), metrics)


def test_a_number_of_steps_beyond_int32_is_exact():
    counted = label({"learning_rate": np.zeros(3)}, dataclasses.replace(SMALL, num_envs=2**20), updates_before=2**20)
    assert counted["step"][-1] == (2**20 + 3) * 2**23


def test_runs_whose_step_looks_at_all_of_them_go_through_together(key):
    """In slices a mean over runs would be one over some."""

    def step(ppo, state):
        state, metrics = ppo.step(state)
        return state, metrics | {"mean_loss": jnp.full(4, metrics["loss"].mean())}

    ppo = pjp.with_step(pjp.batched(pjp.make_ppo("CartPole-v1", SMALL)), step)
    state = jax.jit(ppo.init)(jax.random.split(key, 4))
    result = pjp.fit(ppo, state, progress=False)
    np.testing.assert_allclose(
        result.metrics["mean_loss"], result.metrics["loss"].mean("run").expand_dims(run=4), rtol=1e-5
    )
    with pytest.raises(ValueError, match="slice_size=2 is not possible"):
        pjp.fit(ppo, state, slice_size=2, progress=False)
