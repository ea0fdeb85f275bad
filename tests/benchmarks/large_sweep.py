"""Seconds and memory of the host for a sweep of 10,000 runs x 1,000 updates: plan, resume, rank, draw, report.

    python tests/benchmarks/large_sweep.py [--folder FOLDER] [--settings 1250] [--num-seeds 8] [--num-updates 1000]
                                           [--only resume ...] [--profile] [--out FILE]

The runs are not trained: their slices are written in the format of the package, with random metrics; one run of fifty
turned nan. The folder is kept for later calls if it is named. Every line is the work of a process of its own: seconds
without its imports, those of a processor, and the peak of its whole memory. Compiling is timed apart. "One slice
missing" trains that slice. --profile prints the 25 functions that take most time.
"""

import argparse
import cProfile
import json
import pstats
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from os import link
from pathlib import Path
from typing import Any

SLICE_SIZE = 40


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the sweep is, or is written first")
    parser.add_argument("--settings", type=int, default=1250)
    parser.add_argument("--num-seeds", type=int, default=8)
    parser.add_argument("--num-updates", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place) / "sweep"
        if not folder.exists():
            start_child(options, folder, "write")
        rows = {name: start_child(options, folder, name) for name in options.only}
    for name, row in rows.items():
        compiling = f"  and {row['compile_seconds']:.1f} s of compiling" if row["compile_seconds"] else ""
        seconds = f"{row['seconds']:7.2f} s  {row['cpu_seconds']:7.2f} s of a processor"
        print(f"{name:28} {seconds}  {row['peak_bytes'] / 2**30:6.2f} GiB{compiling}")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2) + "\n")


def start_child(options: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    """The figures of a process that does one work."""
    sizes = {"settings": options.settings, "num-seeds": options.num_seeds, "num-updates": options.num_updates}
    command = [sys.executable, __file__, "--folder", str(folder), "--child", name]
    command += [word for flag, value in sizes.items() for word in (f"--{flag}", str(value))]
    done = subprocess.run(command + ["--profile"] * options.profile, stdout=subprocess.PIPE, text=True, check=True)
    *printed, figures = done.stdout.strip().split("\n")
    print(*printed, sep="\n", end="\n" if printed else "")
    return json.loads(figures)


def run_child(options: argparse.Namespace):
    """Does one work and prints its figures as JSON."""
    import purejaxppo.experiment.sweeps.run  # noqa: F401

    profile = cProfile.Profile()
    sweep = make_sweep(options)
    work = write if options.child == "write" else WORKS[options.child]
    start, cpu = time.perf_counter(), time.process_time()
    compile_seconds = (profile.runcall if options.profile else call)(work, sweep, options.folder)
    cpu_seconds = time.process_time() - cpu
    seconds = time.perf_counter() - start - compile_seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    if options.profile:
        pstats.Stats(profile, stream=sys.stdout).sort_stats("cumulative").print_stats(25)
    figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "compile_seconds": compile_seconds, "peak_bytes": peak}
    print(json.dumps(figures))


def call(work: Callable, *args: Any) -> float:
    """What `Profile.runcall` does, without a profile."""
    return work(*args)


def make_sweep(options: argparse.Namespace) -> Any:
    """A grid of two fields with about as many values, of small runs."""
    import numpy as np

    import purejaxppo as pjp

    rows = max(n for n in range(1, int(options.settings**0.5) + 1) if options.settings % n == 0)
    rates, clips = np.geomspace(1e-4, 1e-2, options.settings // rows), np.linspace(0.1, 0.3, rows)
    config = pjp.Config(
        num_envs=2, num_steps=8, num_updates=options.num_updates, num_minibatches=1, num_epochs=1, widths=(16,)
    )
    table = pjp.grid(learning_rate=rates.tolist(), clip=clips.tolist())
    return pjp.Sweep("CartPole-v1", table, options.num_seeds, config, pjp.Hyperparams())


def write(sweep: Any, folder: Path) -> float:
    """Writes the slices of a finished sweep, without training: the first states, and random metrics."""
    import jax
    import numpy as np

    from purejaxppo.experiment.files import to_arrays
    from purejaxppo.experiment.sweeps.columns import run_arguments
    from purejaxppo.experiment.sweeps.division import own_slices
    from purejaxppo.experiment.sweeps.plan import plan_sweep
    from purejaxppo.experiment.sweeps.slices import Slice, open_slices

    plan = plan_sweep(sweep, slice_size=SLICE_SIZE)
    (compiled,) = plan.groups
    num_updates = np.full(SLICE_SIZE, sweep.config.num_updates, np.int32)
    state = compiled.start(*run_arguments(sweep, compiled.ppo, [(0, 0)] * SLICE_SIZE))
    names = jax.eval_shape(compiled.ppo.step, state)[1]
    leaves = to_arrays(state) | {"num_updates": num_updates}
    slices, random = open_slices(folder, sweep, plan.identities, division=plan.division), np.random.default_rng(0)
    shape = SLICE_SIZE, sweep.config.num_updates
    for empty in own_slices(sweep, [], plan.division)[compiled.group]:
        levels = random.random((SLICE_SIZE, 1)) * np.linspace(0, 500, shape[1])
        metrics = {
            name: (levels + random.random(shape, np.float32) if x.dtype.kind == "f" else np.ones(shape)).astype(x.dtype)
            for name, x in names.items()
        }
        metrics["failure"] = np.zeros(shape, np.int32)
        failed = np.flatnonzero(random.random(SLICE_SIZE) < 0.02)
        for name, x in metrics.items():
            x[failed, shape[1] // 2 :] = 1 if name == "failure" else 0 if x.dtype.kind == "i" else np.nan
        done = np.where(np.isin(np.arange(SLICE_SIZE), failed), shape[1] // 2, num_updates).astype(np.int32)
        slices.write(Slice(empty.runs, metrics, leaves | {"num_updates": done}))
    return compiled.compile_seconds


def plan(sweep: Any, folder: Path) -> float:
    """Plans the finished sweep."""
    from purejaxppo.experiment.sweeps.plan import plan_sweep

    return sum(compiled.compile_seconds for compiled in plan_sweep(sweep, folder).groups)


def resume(sweep: Any, folder: Path) -> float:
    """Resumes the finished sweep, of which there is nothing left to train."""
    from purejaxppo.experiment.sweeps.plan import plan_sweep
    from purejaxppo.experiment.sweeps.run import run_sweep

    ready = plan_sweep(sweep, folder)
    run_sweep(ready, folder, progress=False)
    return sum(compiled.compile_seconds for compiled in ready.groups)


def lacking_one(work: Callable) -> Callable:
    """The same work in a copy of the folder without one of its slices."""

    def work_there(sweep: Any, folder: Path) -> float:
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            copy = Path(place) / "sweep"
            shutil.copytree(folder, copy, copy_function=link)  # files are replaced, never changed
            min((copy / "slices").glob("*.npz")).unlink()
            return work(sweep, copy)

    return work_there


def rank(sweep: Any, folder: Path) -> float:
    """Reads the sweep back and ranks its settings."""
    from purejaxppo.experiment.report.ranking import as_table
    from purejaxppo.experiment.sweeps.result import load_sweep

    as_table(load_sweep(folder).ranked())
    return 0.0


def draw(sweep: Any, folder: Path) -> float:
    """All plots as files, as `purejaxppo plot` draws them."""
    from purejaxppo.cli.sweep import plot

    with tempfile.TemporaryDirectory() as out:
        plot([str(folder), "--out", out])
    return 0.0


def report(sweep: Any, folder: Path) -> float:
    """The page of `purejaxppo report`."""
    from purejaxppo.experiment.agents.report import write_report

    with tempfile.TemporaryDirectory() as out:
        write_report(folder, Path(out) / "report.html")
    return 0.0


WORKS: dict[str, Callable] = {
    "plan": plan,
    "plan, one slice missing": lacking_one(plan),
    "resume": resume,
    "resume, one slice missing": lacking_one(resume),
    "rank": rank,
    "draw": draw,
    "report": report,
}

if __name__ == "__main__":
    main()
