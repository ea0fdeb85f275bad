"""Compiles training cycles for an H100 or a TPU v5e without one, ours and those of peers, and counts what they need.

    python tests/benchmarks/accelerators.py [--works a1 b] [--target h100] [--peers rejax purejaxrl] [--purejaxrl PATH]
                                            [--one-graph] [--small] [--checkout PATH] [--out FILE]
                                            [--python PYTHON] [--folder .benchmarks]

Nothing here runs on an accelerator. Compiles the training of the package in --checkout and of the peers, one process
per work, and prints the kernels of a rollout step, of a minibatch, of the rest, and of a whole cycle; what the host
launches in a cycle (CUDA graphs, and kernels outside of them); what a minibatch and a cycle move and compute at least,
with the time that the published rates of an H100 allow for it (see cost.py); and the memory of the program. For a TPU,
which runs a program without such launches, it prints the memory, the work that XLA counts with each loop body once, and
the seconds of CPU that compiling takes. --out saves the same as JSON. A work that does not compile is left out with its
reason, and the exit status is 1. Flags in XLA_FLAGS take effect. --one-graph asks for the whole training as one CUDA
graph.

JAX for the target is installed into FOLDER/accelerators or FOLDER/tpu the first time (Linux, Python 3.12 or newer, 4.8
and 1.7 GB), the peers beside it, for the same JAX. h100.txtpb describes the GPU to XLA:
xla/backends/gpu/target_config/specs/h100_sxm.txtpb of openxla/xla, with CUDA 13.0. Without a device XLA cannot
autotune: all matrix products become Triton kernels, where on a GPU some may be calls of cuBLAS.
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from hlo import Launches, count_cycle, count_launches, read_program

from works import NARROW, PIXELS, Work

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGES = ["flax", "optax", "chex", "gymnax", "six", "orbax-checkpoint"]
TARGETS = {  # target -> the folder of its environment, and the JAX in it
    "h100": ("accelerators", "jax[cuda13]==0.11.2"),
    "v5e": ("tpu", "jax[tpu]==0.11.2"),
}
# Without their dependencies, which would replace JAX. gymnax before 1.0 is what both are written for.
OF_PEERS = [
    "rejax==0.1.3", "gymnax<0.1", "gym", "distrax", "tfp-nightly", "cloudpickle", "decorator", "dm-tree", "gast",
    "wrapt", "attrs",
]  # fmt: skip
ONE_GRAPH = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
# XLA gives large sorts to CUB, which asks a driver for scratch space.
NO_DRIVER = "--xla_gpu_enable_cub_radix_sort=false"
TPU_WITHOUT_ONE = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
NUM_UPDATES = 10


def of_updates(work: Work) -> Work:
    """A work of so many updates as are compiled here; their number does not change a cycle."""
    return replace(work, total_steps=NUM_UPDATES * work.steps_per_update)


WIDE = replace(NARROW, num_envs=2048, num_steps=32, num_minibatches=32)
WORKS = {
    "a": of_updates(replace(NARROW, num_seeds=2048)),
    "a1": of_updates(NARROW),
    "b": of_updates(WIDE),
    # Of the preset it has all settings of the network.
    "c": of_updates(replace(PIXELS, encoder="cnn", num_seeds=300)),
    "c1": of_updates(replace(PIXELS, encoder="cnn")),
    "d": of_updates(replace(WIDE, env="Pendulum-v1", normalize=True)),
}


def small(work: Work) -> Work:
    """The same work cut down until it only shows that counting still runs."""
    tiny = replace(work, num_envs=4, num_steps=8, num_minibatches=2, num_epochs=2, num_seeds=min(work.num_seeds, 2))
    return of_updates(tiny)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=["a1", "b"])
    parser.add_argument("--target", choices=TARGETS, default="h100")
    parser.add_argument("--peers", nargs="+", choices=["rejax", "purejaxrl"], default=[])
    parser.add_argument("--purejaxrl", type=Path, help="a checkout of purejaxrl, which is not packaged")
    parser.add_argument("--one-graph", action="store_true", help="the whole training as one CUDA graph")
    parser.add_argument("--small", action="store_true", help="tiny work, to see that counting runs")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the checkout whose package is compiled")
    parser.add_argument("--out", type=Path, help="a file for the results, as JSON")
    parser.add_argument("--python", help="the Python that makes the environment, where there is none yet")
    parser.add_argument("--folder", type=Path, default=ROOT / ".benchmarks")
    parser.add_argument("--compile", nargs=2, metavar=("PEER", "WORK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:  # this is a process that `start_process` started
        peer, name = options.compile
        work = small(WORKS[name]) if options.small else WORKS[name]
        compile_work = compile_for_tpu if options.target == "v5e" else compile_for_gpu
        print("ANSWER " + json.dumps(compile_work(peer, work, options.one_graph)))
        return
    if not (options.checkout / "purejaxppo" / "__init__.py").exists():
        parser.error(f"--checkout={options.checkout} holds no package purejaxppo")
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out={options.out} is in a folder that does not exist")
    if "purejaxrl" in options.peers and not options.purejaxrl:
        parser.error("--peers purejaxrl needs --purejaxrl PATH, a checkout")
    place, jax_package = TARGETS[options.target]
    folder = options.folder / place
    if not (folder / "installed").exists():
        install(folder, [jax_package, *PACKAGES], find_python(parser, options.python))
    if options.peers and not (folder / "peers").exists():
        subprocess.run([*pip(folder), "--target", folder / "peers", "--no-deps", *OF_PEERS], check=True)
    sources = {"purejaxppo": [options.checkout.resolve()], "rejax": [(folder / "peers").resolve()]}
    if options.purejaxrl:
        sources["purejaxrl"] = [options.purejaxrl.resolve(), *sources["rejax"]]
    flags = [*(["--small"] if options.small else []), *(["--one-graph"] if options.one_graph else [])]
    rows = {}
    for work in dict.fromkeys(options.works):
        for peer in ["purejaxppo", *options.peers]:
            print(f"compiling {work} of {peer} ...", flush=True)
            command = [folder / "bin" / "python", __file__, "--compile", peer, work, "--target", options.target, *flags]
            rows[f"{work} {peer}"] = start_process(command, sources[peer])
    print(table(rows, options.target))
    if options.out:
        results = {"target": f"compiled for {options.target}, not run on one", "checkout": str(options.checkout)}
        options.out.write_text(json.dumps(results | {"works": rows}, indent=2) + "\n")
    sys.exit(any("left_out" in row for row in rows.values()))


def find_python(parser: argparse.ArgumentParser, asked: str | None) -> str:
    """The Python to make the environment with: the one asked for, or else this one or the python3.12 on the PATH."""
    candidates = [asked] if asked else [sys.executable, "python3.12"]
    for python in candidates:
        try:
            command = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 12))"]
            probe = subprocess.run(command, capture_output=True)
        except OSError:
            continue
        if probe.returncode == 0:
            return python
    parser.error(f"jax 0.11.2 needs Python 3.12 or newer: name one with --python (tried {', '.join(candidates)})")


def install(folder: Path, packages: list[str], python: str):
    """Makes the environment that compiles."""
    print(f"installing {packages[0]} ...", flush=True)
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    subprocess.run([*pip(folder), *packages], check=True)
    (folder / "installed").write_text(" ".join(packages) + "\n")


def pip(folder: Path) -> list[Any]:
    return [folder / "bin" / "python", "-m", "pip", "install", "-q"]


def start_process(command: list[Any], sources: list[Path]) -> dict:
    """What a process of its own answers about a work; the last line of its errors where it fails."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {NO_DRIVER}"
    settings = {"JAX_PLATFORMS": "cpu", "JAX_TRACEBACK_FILTERING": "off", "XLA_FLAGS": flags, **TPU_WITHOUT_ONE}
    settings["PYTHONPATH"] = os.pathsep.join(map(str, sources))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    for line in done.stdout.splitlines():
        if line.startswith("ANSWER "):
            return json.loads(line.removeprefix("ANSWER "))
    errors = done.stderr.strip().splitlines() or ["no reason given"]
    return {"left_out": f"exit status {done.returncode}: {errors[-1]}"}


def compile_for_gpu(peer: str, work: Work, one_graph: bool) -> dict:
    """Compiles the training of a work for the H100: its kernels, launches, bytes and seconds."""
    with tempfile.TemporaryDirectory() as dump:
        texts = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_train.*"
        os.environ["XLA_FLAGS"] += f" {texts}"
        from jax.experimental import topologies

        target = (HERE / "h100.txtpb").read_text()
        topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
        options = {"xla_gpu_enable_command_buffer": ONE_GRAPH} if one_graph else {}
        compiled, seconds = compile_training(peer, work, topology.devices[0], "cuda", options)
        (thunks,) = Path(dump).glob("*.thunk_sequence_after_thunk_passes.txt")
        text = compiled.as_text()
        assert text is not None  # the compiler for CUDA has it
        program = read_program(text)
        launches = max(count_launches(thunks.read_text(), program), default=Launches(0, 0), key=sum)
    kernels = count_cycle(program, NUM_UPDATES, work.num_steps, work.num_epochs * work.num_minibatches)
    return {**kernels, "graph_launches": launches.graphs, "plain_launches": launches.plain, **seconds}


def compile_for_tpu(peer: str, work: Work, _: bool) -> dict:
    """Compiles the training of a work for a TPU v5e: its work, bytes and seconds."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    compiled, seconds = compile_training(peer, work, topology.devices[0], "tpu", {})
    cost = compiled.cost_analysis() or {}
    return {"operations": cost.get("flops"), "bytes": cost.get("bytes accessed"), **seconds}


def compile_training(peer: str, work: Work, device: Any, platform: str, options: dict) -> tuple[Any, dict]:
    """The training of a work compiled for a device that is not there, with its memory, seconds and versions."""
    import jax

    def train(*args):  # by this name its texts are found
        return training(*args)

    if peer == "purejaxppo":
        training, arguments = of_this_package(work)
    else:
        training, make = importlib.import_module(f"peers.{peer}").training(work)
        arguments = jax.eval_shape(lambda: make(0))
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    start, used = time.perf_counter(), time.process_time()
    donated = 0 if peer == "purejaxppo" else ()
    lowered = jax.jit(train, donate_argnums=donated).trace(*arguments).lower(lowering_platforms=(platform,))
    compiled = lowered.compile(compiler_options=options)
    memory = compiled.memory_analysis()
    assert memory is not None  # these compilers report it
    return compiled, {
        "settings": asdict(work),
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "compile_seconds": time.perf_counter() - start,
        "compile_cpu_seconds": time.process_time() - used,
        "host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "versions": {package: metadata.version(package) for package in ("jax", "jaxlib", "flax", "optax", "gymnax")},
    }


def of_this_package(work: Work) -> tuple:
    """The training of a work, and the shapes of the state that it takes."""
    import jax

    ppo, key = ppo_of(work), jax.random.key(0)
    key = jax.random.split(key, work.num_seeds) if work.num_seeds > 1 else key
    return ppo.train, (jax.eval_shape(ppo.init, key),)


def ppo_of(work: Work, **settings: Any) -> Any:
    """This package's PPO for a work, batched if it has several agents; `settings` are other fields of its config."""
    import purejaxppo as pjp

    network = pjp.Config() if work.encoder == "mlp" else pjp.preset(work.env).config
    config = replace(
        network,
        encoder=work.encoder,
        num_envs=work.num_envs,
        num_steps=work.num_steps,
        num_updates=work.num_updates,
        num_minibatches=work.num_minibatches,
        num_epochs=work.num_epochs,
        normalize_observation=work.normalize,
        scale_reward=work.normalize,
        **settings,
    )
    ppo = pjp.make_ppo(work.env, config)
    return pjp.batched(ppo) if work.num_seeds > 1 else ppo


COLUMNS = {
    "h100": {
        "rollout_step": "rollout step", "minibatch": "minibatch", "rest": "rest", "cycle": "cycle",
        "graph_launches": "graphs", "plain_launches": "other launches", "unknown_loops": "unknown loops",
        "minibatch_bytes": "minibatch bytes", "bytes": "cycle bytes", "operations": "operations",
        "seconds_at_published_rates": "s at rates",
    },
    "v5e": {"operations": "operations", "bytes": "bytes", "compile_cpu_seconds": "CPU seconds"},
}  # fmt: skip


def table(rows: dict, target: str) -> str:
    columns = COLUMNS[target]
    title = {"h100": "GPU kernels of a training cycle, compiled for an H100", "v5e": "Training, compiled for a TPU v5e"}
    lines = [
        f"\n{title[target]}, not run on one",
        f"{'work':<15}" + "".join(f"{words:>{len(words) + 3}}" for words in columns.values())
        + f"{'temporary':>16}{'arguments':>16}{'compile':>11}{'jax':>8}",
    ]  # fmt: skip
    for work, row in rows.items():
        if "left_out" in row:
            lines.append(f"{work:<15}{row['left_out']}")
            continue
        cells = "".join(f"{row[name]:>{len(words) + 3},.5g}" for name, words in columns.items())
        lines.append(
            f"{work:<15}{cells}{row['temporary_bytes'] / 2**20:>12,.2f} MiB{row['argument_bytes'] / 2**20:>12,.2f} MiB"
            f"{row['compile_seconds']:>9.1f} s{row['versions']['jax']:>8}"
        )
    if target == "h100":
        lines.append("graphs, other launches: what the host launches in a cycle; both 0 if all of it is in one graph")
        lines.append("unknown loops: the compiler does not know their trip counts; one iteration of each is counted")
        lines.append("s at rates: seconds of a cycle at 3.35 TB/s and 67 TFLOP/s in float32, without launches")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
