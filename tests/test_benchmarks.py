import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import purejaxppo as pjp
from purejaxppo.cli.main import main
from purejaxppo.experiment.bench import bench

pytestmark = pytest.mark.full

COMPARE = Path(__file__).parent / "benchmarks" / "compare.py"
TINY = ["--num-steps", "16", "--num-envs", "4", "--num-updates", "4", "--rounds", "1", "--seconds", "0.01"]


def test_bench_prints_its_tables_and_leaves_the_figures(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", "CartPole-v1", *TINY, "--num-seeds", "1", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for word in ("steps/s", "compile", "peak memory", "acting", "environment", "advantages", "shuffling", "learning"):
        assert word in printed
    figures = json.loads(out.read_text())
    assert [row["num_seeds"] for row in figures["training"]] == [1, 3]
    assert all(0 < row["least"] <= row["steps_per_second"] <= row["most"] for row in figures["training"])
    assert figures["peak_bytes"] > 2**20 and figures["config"]["matmul_precision"] == "highest"
    np.testing.assert_allclose(sum(stage["share"] for stage in figures["stages"]), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    ["Pendulum-v1", "MemoryChain-bsuite", "Breakout-MinAtar"],
)
def test_bench_takes_every_kind_of_action_observation_and_memory(env):
    config, hyperparams = pjp.preset(env)
    config = dataclasses.replace(config, num_envs=4, num_steps=16, num_updates=2, num_minibatches=2)
    ppo = pjp.make_ppo(env, config)
    results = bench(ppo, hyperparams, [1], rounds=1, seconds=0.01, report=lambda line: None)
    assert {stage["stage"] for stage in results["stages"]} >= {"acting", "environment", "learning"}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num-seeds", "0"], "--num-seeds=0 must be at least 1"),
        (["--rounds", "0"], "--rounds=0 must be at least 1"),
        (["--seconds", "-1"], "seconds=-1.0 must be a positive number"),
        (["--num-seeds", "1", "99999999999"], "--num-seeds=99999999999 must be at most"),
        (["--out", "/nowhere/at/all.json"], "out=/nowhere/at/all.json cannot be written: No such file or directory"),
        (["--target-kl", "0.01"], "--target-kl=0.01 and --no-stop-on-kl have no effect"),
        (["--compile-cache", __file__], f"--compile-cache={__file__} cannot be made and written: Not a directory"),
    ],
)
def test_bench_refuses_bad_flags_in_one_sentence(flags, words, capsys):
    assert main(["bench", "CartPole-v1", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_figures_that_stand_in_the_file_outlive_a_refusal(tmp_path):
    out = tmp_path / "bench.json"
    out.write_text("kept")
    assert main(["bench", "CartPole-v1", "--out", str(out), "--target-kl", "0.01"]) == 2
    assert out.read_text() == "kept"


@pytest.mark.slow
def test_the_comparison_with_a_peer_runs(tmp_path):
    """A tiny work with rejax, installed for it: that it runs, and that both do the work, and that one that hangs is
    left out; nothing about speed."""
    command = [sys.executable, COMPARE, "--small", "--rounds", "1", "--works", "narrow", "--peers", "rejax"]
    done = subprocess.run([*command, "--folder", tmp_path], capture_output=True, text=True, env=without_jax_flags())
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "comparison.json").read_text())["works"]["narrow"]
    assert set(rows) == {"purejaxppo", "rejax"}, done.stdout
    for row in rows.values():
        assert len(row["runs"]) == 1 and row["runs"][0] > 0 and row["compile_seconds"] > 0, row

    late = subprocess.run(
        [*command, "--limit", "0.01", "--folder", tmp_path], capture_output=True, text=True, env=without_jax_flags()
    )
    assert late.returncode == 0, late.stderr
    assert late.stdout.count("no answer within 0.01 s") == 2, late.stdout


def without_jax_flags() -> dict:
    return {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
