"""Some minutes on an NVIDIA GPU: what matters most first, each line a process of its own.

    python tests/benchmarks/gpu_slot.py --prepare FOLDER          # on any machine: what has to be carried, and its size
    python tests/benchmarks/gpu_slot.py --carried FOLDER --out FOLDER [--minutes 9] [--lines 0 1] [--small]

The machine with the GPU needs Python 3.12 with jax 0.11, flax, optax and chex; it may be cut off from everything else.
--prepare puts gymnax, rejax and what they need into FOLDER, for Python 3.12 on Linux, and refuses more than 64 MiB
together with this checkout. The measurement imports the core of the package only.

Every line prints, and writes to --out: seconds of compiling; milliseconds of a cycle, the median of three runs that
exclude compiling; environment steps per second; kernels of a cycle, counted in the program that ran, and microseconds
of each; peak memory; and whether two runs from one state have the same bits. The profile of a few goes to --out, for
TensorBoard or Perfetto. What no time is left for is named. --small tries the same on any device, with tiny work.
"""

import argparse
import hashlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerators import OF_PEERS, ONE_GRAPH, ROOT, WORKS, small
from hlo import count_cycle, read_program

LIMIT = 64 * 2**20  # bytes that may be carried
OF_OURS = ["gymnax==1.0.1", "six"]
DETERMINISTIC = {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}


@dataclass(frozen=True)
class Line:
    """One measurement, in a process of its own."""

    what: str
    work: str
    cycles: int  # of one run
    peer: str = "purejaxppo"
    precision: str = "highest"
    one_graph: bool = False
    profile: bool = False
    environment: dict[str, str] = field(default_factory=dict)


LINES = [
    Line("one agent", "a1", 100),
    Line("one agent of rejax", "a1", 100, peer="rejax"),
    Line("one wide agent", "b", 40),
    Line("one wide agent of rejax", "b", 40, peer="rejax"),
    Line("2048 agents", "a", 20),
    Line("300 agents with a CNN", "c", 4),
    Line("the same in TF32", "c", 4, precision="default"),
    Line("one agent as one CUDA graph", "a1", 100, one_graph=True),
    Line("one wide agent as one CUDA graph", "b", 40, one_graph=True),
    Line("one wide agent, deterministic", "b", 40, environment=DETERMINISTIC),
    Line("Pendulum, wide, both normalisers", "d", 40),
    Line("profile of a wide agent", "b", 2, profile=True),
    Line("2048 agents of rejax", "a", 20, peer="rejax"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prepare", type=Path, metavar="FOLDER", help="gather what has to be carried, and nothing else"
    )
    parser.add_argument("--carried", type=Path, metavar="FOLDER", help="what --prepare gathered")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--lines", nargs="+", type=int, default=list(range(len(LINES))), help="which lines, from 0")
    parser.add_argument("--out", type=Path, help="a folder for the results and the profile")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        sys.exit(prepare(options.prepare))
    if options.carried is None or options.out is None or not options.carried.is_dir():
        parser.error("name the folder that --prepare made with --carried, and one for the results with --out")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child is not None:
        print("ANSWER " + json.dumps(measure(LINES[options.child], options.out, options.small)))
        return
    end, rows = time.monotonic() + 60 * options.minutes, []
    for number in options.lines:
        left = end - time.monotonic()
        row = start(number, options, left) if left > 20 else {"left_out": "no time left"}
        rows.append({"what": LINES[number].what, "work": LINES[number].work, **row})
        print(json.dumps(rows[-1]), flush=True)
        (options.out / "gpu_slot.json").write_text(json.dumps(rows, indent=2) + "\n")


def prepare(folder: Path) -> int:
    """Gathers the packages that a bare machine lacks; 1 if they are too large to be carried with the checkout."""
    target = ["--python-version", "3.12", "--only-binary=:all:", "--no-deps", "--upgrade"]
    for name, packages in (("purejaxppo", OF_OURS), ("rejax", OF_PEERS)):
        packages = [package for package in packages if package != "gym"]  # has no wheel, and nothing here uses it
        pip = [sys.executable, "-m", "pip", "install", "-q", *target, "--target", str(folder / name)]
        subprocess.run([*pip, *packages], check=True)
    sizes = {str(folder / name): size_of(folder / name) for name in ("purejaxppo", "rejax")}
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    files = [ROOT / name for name in tracked.stdout.split("\0") if name]
    sizes[str(ROOT)] = sum(path.stat().st_size for path in files if path.is_file())
    for path, size in sizes.items():
        print(f"{size / 2**20:8.1f} MiB  {path}")
    print(f"{sum(sizes.values()) / 2**20:8.1f} MiB  of {LIMIT / 2**20:.0f} MiB")
    return int(sum(sizes.values()) > LIMIT)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def start(number: int, options: argparse.Namespace, seconds: float) -> dict:
    """What a process of its own measures; its last words where it fails."""
    line, small_too = LINES[number], ["--small"] if options.small else []
    command = [sys.executable, __file__, "--child", str(number), *small_too]
    command += ["--carried", str(options.carried), "--out", str(options.out)]
    paths = [options.carried.resolve() / line.peer, *([ROOT] if line.peer == "purejaxppo" else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | line.environment
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"left_out": f"not done within the {seconds:.0f} s that were left"}
    for words in done.stdout.splitlines():
        if words.startswith("ANSWER "):
            return json.loads(words.removeprefix("ANSWER "))
    return {"left_out": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}


def measure(line: Line, out: Path, is_small: bool) -> dict[str, Any]:
    """One measurement on the first device of this process."""
    import jax

    jax.config.update("jax_default_matmul_precision", line.precision)  # also of peers, which leave it to JAX
    work = small(WORKS[line.work]) if is_small else WORKS[line.work]
    work = replace(work, total_steps=line.cycles * work.steps_per_update)
    train, arguments = training_of(line, work)
    given = jax.block_until_ready(arguments(0))
    device = jax.devices()[0]
    begin = time.perf_counter()
    options: dict[str, str | bool] = (
        {"xla_gpu_enable_command_buffer": ONE_GRAPH} if line.one_graph and device.platform == "gpu" else {}
    )
    executable = jax.jit(train).lower(*given).compile(compiler_options=options)
    compile_seconds = time.perf_counter() - begin
    first, second = (fingerprint(executable(*given)) for _ in range(2))  # warms up, too
    if line.profile:
        with jax.profiler.trace(str(out / "profile")):
            jax.block_until_ready(executable(*given))
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(executable(*given))
        seconds.append(time.perf_counter() - begin)
    per_cycle = statistics.median(seconds) / line.cycles
    counted = work.num_steps, work.num_epochs * work.num_minibatches
    instructions = count_cycle(read_program(str(executable.as_text())), line.cycles, *counted)["cycle"]
    kernels = instructions if device.platform == "gpu" else None  # on a CPU they are no kernels
    return {
        "device": device.device_kind,
        "compile_seconds": round(compile_seconds, 1),
        "milliseconds_per_cycle": per_cycle * 1e3,
        "spread": [min(seconds) / line.cycles * 1e3, max(seconds) / line.cycles * 1e3],
        "steps_per_second": round(work.num_seeds * work.steps_per_update / per_cycle),
        "kernels_per_cycle": kernels,
        "microseconds_per_kernel": per_cycle * 1e6 / kernels if kernels else None,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "two_runs_have_the_same_bits": first == second,
        "precision": line.precision,
        "jax": jax.__version__,
    }


def training_of(line: Line, work: Any) -> tuple:
    """The training of a work, and its arguments for a seed."""
    import jax

    if line.peer != "purejaxppo":
        return importlib.import_module(f"peers.{line.peer}").training(work)
    from accelerators import ppo_of

    ppo = ppo_of(work, matmul_precision=line.precision)

    def arguments(seed: int) -> tuple:
        key = jax.random.key(seed)
        return (jax.jit(ppo.init)(jax.random.split(key, work.num_seeds) if work.num_seeds > 1 else key),)

    return ppo.train, arguments


def fingerprint(tree: Any) -> str:
    """A hash of all numbers of a result."""
    import jax
    import numpy as np

    found = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        is_key = jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
        found.update(np.asarray(jax.random.key_data(x) if is_key else x).tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
