import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import pytest

import purejaxppo as pjp
from probes import SMALL
from purejaxppo.experiment import jax_setup, program
from purejaxppo.experiment.jax_setup import num_cores
from purejaxppo.experiment.program import best_slice_size

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def five():
    """A batch of five small runs, its first state, and what one program makes of all of them together."""
    ppo = pjp.batched(pjp.make_ppo("CartPole-v1", SMALL))
    state = jax.jit(ppo.init)(*pjp.runs(jax.random.key(0), num_seeds=5))
    return ppo, state, *jax.jit(ppo.train)(state)


@pytest.mark.parametrize("device, number", [(__file__, 1), ("/nothing", 0)])
def test_an_nvidia_device_that_jax_does_not_use_is_named_once(device, number, monkeypatch, recwarn):
    monkeypatch.setattr(jax_setup, "NVIDIA_DEVICES", (device,))
    jax_setup.warn_of_idle_gpu.cache_clear()
    jax_setup.warn_of_idle_gpu()
    jax_setup.warn_of_idle_gpu()
    assert [str(warning.message).count('"purejaxppo[cuda]"') for warning in recwarn] == [1] * number


def test_the_first_state_is_that_of_init(five):
    ppo, state, *_ = five
    first = pjp.first_state(ppo, *pjp.runs(jax.random.key(0), num_seeds=5))
    assert jax.tree.structure(first) == jax.tree.structure(state)
    for ours, whole in zip(comparable(first), comparable(state), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)


def comparable(state):
    return jax.tree.leaves((jax.random.key_data(state.key), state.policy, state.opt_state, state.actors))


@pytest.mark.parametrize("slice_size, num_slices", [(1, 5), (2, 3), (3, 2), (5, 1)])
def test_slices_of_any_size_give_the_numbers_of_one_batch(five, slice_size, num_slices):
    ppo, state, after, metrics = five
    program = pjp.compile_training(ppo, state, slice_size=slice_size)
    assert (program.num_slices, program.slice_size) == (num_slices, slice_size)
    sliced, sliced_metrics = program(state)
    for ours, whole in zip(comparable(sliced), comparable(after), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-5)
    assert {name: x.shape for name, x in sliced_metrics.items()} == {name: x.shape for name, x in metrics.items()}
    np.testing.assert_array_equal(sliced_metrics["num_episodes"], metrics["num_episodes"])


def test_a_program_leaves_its_state_alone_unless_it_is_donated(five):
    ppo, state, *_ = five
    program = pjp.compile_training(ppo, state, 2, slice_size=5)
    once, metrics = program(state, 1)
    assert metrics["loss"].shape == (5, 1)
    twice, _ = program(state, 1)
    for first, second in zip(comparable(once), comparable(twice), strict=True):
        np.testing.assert_array_equal(first, second)
    program(once, donate=True)
    assert once.actors.first.is_deleted() and not state.actors.first.is_deleted()


def test_bad_lengths_and_slices_are_refused_in_a_sentence(five):
    ppo, state, *_ = five
    with pytest.raises(ValueError, match="slice_size=6 must be at most 5, the runs"):
        pjp.compile_training(ppo, state, slice_size=6)
    with pytest.raises(ValueError, match="num_updates=0 must be at least 1"):
        pjp.compile_training(ppo, state, 0)
    program = pjp.compile_training(ppo, state, 1)
    for length, words in ((0, "at least 1"), (2, "at most 1, the num_updates"), (0.5, "a whole number")):
        with pytest.raises(ValueError, match=f"length={length} must be {words}"):
            program(state, cast(Any, length))


@pytest.mark.parametrize(
    "num_runs, num_cores, sizes, expected",
    [
        (1, 2, {}, 1),
        (8, 2, {}, 4),  # both cores at work
        (3, 2, {}, 2),
        (32, 2, {}, 8),  # 8 x 512 transitions are in a core's cache
        (33, 2, {}, 6),
        (32, 1, {}, 8),
        (4, 8, {}, 1),
        (512, 2, {"num_envs": 2048, "num_steps": 32}, 1),
    ],
)
def test_slices_fill_the_cores_and_fit_their_caches(num_runs, num_cores, sizes, expected):
    assert best_slice_size(num_runs, num_cores, pjp.Config(**sizes)) == expected


@pytest.mark.parametrize(
    ("precision", "of_jax"),
    [
        ("highest", "(Precision.HIGHEST, Precision.HIGHEST)"),
        ("high", "(Precision.HIGH, Precision.HIGH)"),
        ("default", "(Precision.DEFAULT, Precision.DEFAULT)"),
        ("bfloat16", "BF16_BF16_F32"),
    ],
)
def test_every_product_of_a_cycle_has_the_precision_of_the_config(precision, of_jax, key, monkeypatch):
    ppo = pjp.make_ppo("CartPole-v1", pjp.Config(**vars(SMALL) | {"matmul_precision": precision}))
    state = ppo.init(key)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # for what a CPU cannot compute
    program = str(jax.make_jaxpr(ppo.step)(state))
    products = program.count("dot_general[")
    found = program.count(f"precision={of_jax}")
    assert products > 6 and found == products


def test_a_cpu_computes_products_of_bfloat16_in_float32(key):
    exact, rounded = (
        jax.jit(pjp.make_ppo("CartPole-v1", replace(SMALL, matmul_precision=precision)).train)
        for precision in ("highest", "bfloat16")
    )
    state = pjp.make_ppo("CartPole-v1", SMALL).init(key)
    assert (exact(state)[1]["loss"] == rounded(state)[1]["loss"]).all()


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_process(tmp_path):
    program = (
        "import sys, jax, purejaxppo as pjp; pjp.cache_compilation();"
        "hits = [];"
        "jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith('cache_hits')));"
        "ppo = pjp.make_ppo('CartPole-v1', pjp.Config(num_updates=2));"
        "pjp.compile_training(ppo, jax.eval_shape(ppo.init, jax.random.key(0))); print(sum(hits))"
    )
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(tmp_path)}
    start = partial(subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = [int(start(env=env).stdout) for _ in range(2)]
    (folder,) = (tmp_path / "purejaxppo").iterdir()
    assert found[0] == 0 and found[1] >= 1 and f"jax-{jax.__version__}-cpu" in folder.name
    next(folder.glob("*-atime")).unlink()  # as a process leaves it that is killed while it writes
    repaired = start(env=env)
    assert int(repaired.stdout) == found[1] - 1 and "cache" not in repaired.stderr
    assert len(list(folder.glob("*-cache"))) == len(list(folder.glob("*-atime"))) == found[1]
    assert int(start(env=env | {"NPROC": "1"}).stdout) == 0  # other code for another number of threads
    start(env=env | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "other")})  # a folder that JAX has already stays
    assert any((tmp_path / "other").iterdir())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads have names to count on Linux only")
@pytest.mark.skipif(num_cores() < 2, reason="there is but one thread anyway")
def test_one_thread_is_one_thread_of_xla():
    program = (
        "import sys, pathlib, jax, purejaxppo as pjp;"
        "'one' in sys.argv and pjp.use_one_thread();"
        "jax.numpy.ones((512, 512)).dot(jax.numpy.ones((512, 512))).block_until_ready();"
        "names = [path.joinpath('comm').read_text() for path in pathlib.Path('/proc/self/task').iterdir()];"
        "print(sum('XLAEigen' in name for name in names))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    command = [sys.executable, "-c", program]
    several, one = (
        int(subprocess.run([*command, how], capture_output=True, check=True, env=environment).stdout)
        for how in ("all", "one")
    )
    assert several > 1 and one == 1


@pytest.mark.parametrize("use, name", [(pjp.use_one_thread, "NPROC"), (pjp.use_deterministic_kernels, "XLA_FLAGS")])
def test_what_comes_too_late_is_refused(use, name, five, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match=f"{use.__name__} comes too late: JAX has started to compute"):
        use()
    assert name not in os.environ


class Gpu(NamedTuple):
    platform: str


def test_a_gpu_alone_is_asked_for_one_graph(five, monkeypatch):
    ppo, state, *_ = five
    asked, lowered = [], jax.stages.Lowered
    real = lowered.compile
    monkeypatch.setattr(lowered, "compile", lambda self, options=None: asked.append(options) or real(self))
    pjp.compile_training(ppo, state, 1, slice_size=5, one_graph=True)
    monkeypatch.setattr(program, "_devices", lambda state: {Gpu("gpu")})
    pjp.compile_training(ppo, state, 1, slice_size=5, one_graph=True)
    assert asked == [None, program.ONE_GRAPH] and "WHILE" in str(program.ONE_GRAPH)


@pytest.fixture
def no_cache():
    """No folder of compiled programs yet, and JAX would keep them."""
    before = {name: jax.config.values[name] for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_home_that_is_not_there_is_one_sentence(monkeypatch, no_cache):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(ValueError, match="folder=None cannot be made and written: Could not determine home"):
        pjp.cache_compilation()


def test_deterministic_kernels_are_a_flag_of_xla_that_is_recorded_and_added_once():
    program = (
        "import os, jax, purejaxppo as pjp; from purejaxppo.experiment.provenance import describe_machine;"
        "pjp.use_deterministic_kernels(); pjp.use_deterministic_kernels();"
        "print(jax.numpy.ones(3).sum(), describe_machine()['xla_flags'])"
    )
    env = os.environ | {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "3.0 --xla_cpu_enable_fast_math=false --xla_gpu_deterministic_ops=true\n"
