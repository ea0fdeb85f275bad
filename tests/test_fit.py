import dataclasses
import gc
import signal
import tracemalloc
from typing import Any, cast

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
from purejaxppo.experiment import program
from purejaxppo.experiment.report.failures import failures_of, mark_failures
from purejaxppo.experiment.report.metrics import History, label, last_episodes, learning_curve, mean_interval
from purejaxppo.experiment.report.statistics import final_scores
from purejaxppo.experiment.runs.saved import read_failures

NAN = np.nan


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


def test_the_program_of_the_last_call_is_kept_as_long_as_its_ppo_lives(key):
    ppo = make_ppo("CartPole-v1", SMALL)
    state = jax.jit(ppo.init)(key)
    first, again = (fit(ppo, state, progress=False) for _ in range(2))
    same_leaves(first.state, again.state)
    assert again.compile_seconds < 0.2 * first.compile_seconds and len(program._kept) == 1
    del ppo, first, again
    gc.collect()
    assert len(program._kept) == 0


BETA = 1.0


@jax.jit
def scaled(x):
    return x * BETA


def test_a_program_is_compiled_again_when_the_loss_reads_something_else(key, monkeypatch):
    def loss(*args, **kwargs):
        value, metrics = pjp.ppo_loss(*args, **kwargs)
        return scaled(value), metrics | {"beta": jax.numpy.float32(BETA), "jitted": scaled(jax.numpy.float32(1))}

    ppo = make_ppo("CartPole-v1", SMALL, loss=loss)
    state = pjp.first_state(ppo, key)
    compiled = pjp.compile_training(ppo, state, 1)
    found = []
    for beta in (1.0, 5.0):
        monkeypatch.setitem(globals(), "BETA", beta)
        metrics = fit(ppo, state, num_updates=1, progress=False).metrics
        found += [(metrics["beta"].item(), metrics["jitted"].item())]
    assert found == [(1, 1), (5, 5)]
    with pytest.raises(ValueError, match=r"program was compiled with another loss, .* before .*compile_training\(ppo"):
        fit(ppo, state, num_updates=1, program=compiled, progress=False)


@pytest.mark.full
def test_a_program_that_was_compiled_before_is_taken(ppo, key):
    state = jax.jit(ppo.init)(key)
    compiled = pjp.compile_training(ppo, state, 3)
    result = fit(ppo, state, program=compiled, progress=False)
    same_leaves(result.state, jax.jit(ppo.train)(state)[0])
    assert result.compile_seconds < 0.2 * compiled.compile_seconds
    with pytest.raises(ValueError, match="updates_per_chunk=4 must be at most 3, the updates of the program"):
        fit(ppo, state, program=compiled, updates_per_chunk=4)
    with pytest.raises(ValueError, match="slice_size=2 differs from the 1 of the program .leave it out"):
        fit(ppo, state, program=compiled, slice_size=2)
    with pytest.raises(ValueError, match="program was compiled for another PPO .compile_training"):
        fit(make_ppo("CartPole-v1", SMALL), state, program=compiled)
    with pytest.raises(ValueError, match=r"state belongs to another PPO than this program: .*shape \(2,\) instead of"):
        compiled(jax.vmap(ppo.init)(jax.random.split(key)))
    with pytest.warns(UserWarning, match="num_updates=9 leads to update 9, .* from update 8 on, learning_rate=0 .make"):
        fit(ppo, state, num_updates=9, program=compiled, progress=False)
    printed = [compiled, result]
    assert all(len(text) < 500 and len(text.splitlines()) <= 10 for text in map(repr, printed))


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
    state = jax.jit(ppo.init)(key)
    results = []
    with pytest.raises(KeyboardInterrupt, match="after 4 of 7 updates") as error:
        for _ in range(3):  # a loop over calls ends too
            results.append(fit(ppo, state, updates_per_chunk=2, progress=False))
    assert not results and isinstance(error.value, pjp.Interrupted)
    result = error.value.result
    assert result.interrupted and result.metrics.sizes["updates"] == 4 and result.state.num_updates == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_in_the_last_chunk_counts_and_a_result_may_be_returned(ppo, key):
    def send(metrics):
        signal.raise_signal(signal.SIGINT)

    state = jax.jit(ppo.init)(key)
    result = fit(ppo, state, updates_per_chunk=7, sinks=[send], progress=False, on_interrupt="return")
    assert result.interrupted and result.state.num_updates == 7
    with pytest.raises(ValueError, match="on_interrupt='exit' must be 'raise' or 'return'"):
        fit(ppo, state, on_interrupt=cast(Any, "exit"))


def test_a_run_that_turns_nan_is_named_with_its_update_and_what_was_not_finite(tmp_path, key):
    """The second run learns from rewards that are infinite from its third update on."""

    def step(ppo, state):
        state, rollout = ppo.collect(state)
        poison = (state.hyperparams.extra["poison"] > 0) & (state.num_updates >= 2)
        return ppo.learn(state, rollout.replace(reward=jnp.where(poison, jnp.inf, rollout.reward)))

    tiny = pjp.Config(num_envs=2, num_steps=4, num_updates=5, num_epochs=1, num_minibatches=1, widths=(4,))
    many = batched(pjp.with_step(make_ppo("CartPole-v1", tiny), step))
    columns = pjp.Hyperparams(extra={"poison": jnp.array([0.0, 1.0])})
    state = jax.jit(many.init)(jax.random.split(key, 2), columns)
    jax.eval_shape(many.step, state)  # traced before, where it does not report why it failed
    with pytest.warns(UserWarning, match="^run 1 turned nan in update 3, where loss was not finite") as warned:
        result = fit(many, state, updates_per_chunk=2, folder=tmp_path / "run", progress=False)
    assert len(warned) == 1 and len(result.failed()) == 1
    assert result.metrics["failed_update"].values.tolist() == [0, 3]
    assert result.metrics["failed_metric"].values.tolist() == ["", "loss"]
    assert np.isnan(final_scores(result.metrics)[1])
    assert read_failures(tmp_path / "run") == {1: result.failed()[0]}
    for name in ("metrics.nc", "policy.npz"):  # killed before its end
        (tmp_path / "run" / name).unlink()
    assert read_failures(tmp_path / "run") == {1: result.failed()[0]}
    with pytest.warns(UserWarning, match="^run 1 turned nan in update 3"):
        fit(many, state, folder=tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    "loss, grad_norm, parameter, update, cause",
    [
        ([1, 2, 3], [1, 2, 3], 1.0, 0, ""),
        ([1, NAN, 3], [1, np.inf, 3], 1.0, 0, ""),  # an optimizer may skip what is not finite
        ([1, NAN, NAN], [1, NAN, NAN], NAN, 2, "loss"),
        ([1, 2, NAN], [1, np.inf, NAN], NAN, 2, "grad_norm"),
        ([1, 2, 3], [1, 2, NAN], NAN, 3, "grad_norm"),
        ([1, 2, 3], [1, 2, 3], NAN, 3, "policy.params"),
        (None, [NAN, NAN, NAN], NAN, 1, "grad_norm"),  # of a loss that reports no "loss"
        (None, [NAN, 1, NAN], NAN, 3, "grad_norm"),
        (None, [1, 2, 3], NAN, 3, "policy.params"),
        (None, [1, NAN, NAN], 1.0, 0, ""),
    ],
)
def test_the_failure_of_a_single_run_is_read_from_its_metrics_and_its_state(loss, grad_norm, parameter, update, cause):
    reported = {} if loss is None else {"loss": loss}
    metrics = label(reported | {"grad_norm": grad_norm, "learning_rate": np.ones(3)}, SMALL)
    leaves = {"key": np.zeros(2), "policy/params/w": np.array([1, parameter]), "actors/obs": np.array(NAN)}
    found = mark_failures(metrics, leaves)
    assert (found["failed_update"].item(), found["failed_metric"].item()) == (update, cause)
    assert len(failures_of(found)) == bool(update)


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


def test_metrics_of_many_chunks_are_kept_in_one_array_each():
    """Numbers and vectors, in chunks of one update; one metric is reported rarely."""
    config, random = dataclasses.replace(SMALL, num_updates=50), np.random.default_rng(0)
    history, chunks = History(config, updates_before=3), []
    for i in range(47):
        metrics = {name: random.random((2, 1), np.float32) for name in ("learning_rate", "loss")}
        metrics |= {"num_episodes": random.integers(9, size=(2, 1), dtype=np.int32), "parts": random.random((2, 1, 3))}
        metrics |= {"evaluation_return": random.random((2, 1), np.float32)} if i % 9 == 5 else {}
        history.append(metrics)
        chunks.append(label(metrics, config, 3 + i))
    whole = xarray.concat(chunks, "updates", data_vars="minimal")
    xarray.testing.assert_identical(history.to_dataset(), whole)
    assert {name: x.dtype for name, x in history.to_dataset().items()} == {name: x.dtype for name, x in whole.items()}


def test_metrics_take_no_more_memory_than_their_numbers():
    history, numbers = History(SMALL), {name: np.zeros(1, np.float32) for name in ("learning_rate", *"abcdefghij")}
    for _ in range(16):
        history.append(numbers)
    tracemalloc.start()
    for _ in range(4000):
        history.append(numbers)
    peak = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert peak < 2 * 4 * 11 * 4016 + 20_000


@pytest.mark.full
def test_reports_of_failures_do_not_change_a_bit_of_training():
    config = pjp.Config(
        num_envs=8, num_steps=32, num_updates=4, normalize_observation=True, scale_reward=True, bound_action="tanh"
    )  # fmt: skip
    ppo = batched(make_ppo("Pendulum-v1", config))
    state = jax.jit(ppo.init)(jax.random.split(jax.random.key(0), 3))
    result, (alone, _) = fit(ppo, state, slice_size=3, progress=False), jax.jit(ppo.train)(state)
    jax.tree.map(np.testing.assert_array_equal, result.state.policy, alone.policy)
