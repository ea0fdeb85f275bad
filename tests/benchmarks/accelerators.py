"""Counts the GPU kernels of a training cycle, compiled for an H100 without one.

    python tests/benchmarks/accelerators.py [--works a1 b] [--small] [--checkout PATH] [--out FILE]
                                            [--python PYTHON] [--folder .benchmarks]

Compiles `ppo.train` of the package in --checkout, one process per work, and prints the kernels of a rollout step, of a
minibatch, of the rest, and of a whole cycle, with the memory that the program takes. --out saves the same as JSON. A
work that does not compile is left out with its reason, and the exit status is 1. Flags in XLA_FLAGS take effect.

JAX with CUDA is installed into FOLDER/accelerators the first time (Linux, Python 3.12 or newer, 4.8 GB). h100.txtpb
describes the GPU to XLA: xla/backends/gpu/target_config/specs/h100_sxm.txtpb of openxla/xla, with CUDA 13.0. Without a
device XLA cannot autotune: all matrix products become Triton kernels, where on a GPU some may be calls of cuBLAS.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

from hlo import count_cycle, read_program

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGES = ["jax[cuda13]==0.11.2", "flax", "optax", "chex", "gymnax", "six", "orbax-checkpoint"]
NUM_UPDATES = 10


@dataclass(frozen=True)
class Work:
    """PPO on one environment with these settings; all others are the defaults."""

    env: str = "CartPole-v1"
    num_envs: int = 4
    num_steps: int = 128
    num_minibatches: int = 4
    num_epochs: int = 4
    num_agents: int = 1
    normalize: bool = False  # observations standardised, rewards scaled
    encoder: str = "mlp"  # with another one, all other settings of the network are those of the environment's preset


WIDE = Work(num_envs=2048, num_steps=32, num_minibatches=32)
WORKS = {
    "a": Work(num_agents=2048),
    "a1": Work(),
    "b": WIDE,
    "c": Work("Breakout-MinAtar", 64, 128, num_minibatches=8, num_agents=300, encoder="cnn"),
    "d": replace(WIDE, env="Pendulum-v1", normalize=True),
}


def small(work: Work) -> Work:
    """The same work cut down until it only shows that counting still runs."""
    return replace(
        work, num_envs=4, num_steps=8, num_minibatches=2, num_epochs=2, num_agents=min(work.num_agents, 2)
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=["a1", "b"])
    parser.add_argument("--small", action="store_true", help="tiny work, to see that counting runs")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the checkout whose package is compiled")
    parser.add_argument("--out", type=Path, help="a file for the results, as JSON")
    parser.add_argument("--python", help="the Python that makes the environment, where there is none yet")
    parser.add_argument("--folder", type=Path, default=ROOT / ".benchmarks")
    parser.add_argument("--compile", choices=WORKS, help="compile one work in this process and answer in JSON")
    options = parser.parse_args()
    if options.compile:  # this is a process that `start_process` started
        work = small(WORKS[options.compile]) if options.small else WORKS[options.compile]
        print("ANSWER " + json.dumps(compile_work(work)))
        return
    if not (options.checkout / "purejaxppo" / "__init__.py").exists():
        parser.error(f"--checkout={options.checkout} holds no package purejaxppo")
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out={options.out} is in a folder that does not exist")
    folder = options.folder / "accelerators"
    if not (folder / "installed").exists():
        install(folder, find_python(parser, options.python))
    extra, rows = ["--small"] if options.small else [], {}
    for work in dict.fromkeys(options.works):
        print(f"compiling {work} ...", flush=True)
        rows[work] = start_process(folder / "bin" / "python", work, extra, options.checkout)
    print(table(rows))
    if options.out:
        results = {"target": "compiled for an H100, not run on one", "checkout": str(options.checkout), "works": rows}
        options.out.write_text(json.dumps(results, indent=2) + "\n")
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


def install(folder: Path, python: str):
    """Makes the environment that compiles."""
    print(f"installing {PACKAGES[0]} ...", flush=True)
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", *PACKAGES], check=True)
    (folder / "installed").write_text(" ".join(PACKAGES) + "\n")


def start_process(python: Path, work: str, extra: list[str], checkout: Path) -> dict:
    """What a process of its own answers about a work; the last line of its errors where it fails."""
    command = [python, __file__, "--compile", work, *extra]
    settings = {"PYTHONPATH": str(checkout.resolve()), "JAX_PLATFORMS": "cpu", "JAX_TRACEBACK_FILTERING": "off"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    for line in done.stdout.splitlines():
        if line.startswith("ANSWER "):
            return json.loads(line.removeprefix("ANSWER "))
    errors = done.stderr.strip().splitlines() or ["no reason given"]
    return {"left_out": f"exit status {done.returncode}: {errors[-1]}"}


def compile_work(work: Work) -> dict:
    """Compiles the training of a work for the H100: its kernels, bytes and seconds."""
    import jax
    from jax.experimental import topologies

    target = (HERE / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    train, state = prepare(work)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
    start = time.perf_counter()
    compiled = jax.jit(train, donate_argnums=0).trace(state).lower(lowering_platforms=("cuda",)).compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # the compiler for CUDA reports both
    program = read_program(text)
    return {
        "settings": asdict(work),
        **count_cycle(program, NUM_UPDATES, work.num_steps, work.num_epochs * work.num_minibatches),
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "compile_seconds": seconds,
        "versions": {package: metadata.version(package) for package in ("jax", "jaxlib", "flax", "optax", "gymnax")},
    }


def prepare(work: Work) -> tuple:
    """The training of a work, and the shapes of the state that it takes."""
    import jax

    import purejaxppo as pjp

    network = pjp.Config() if work.encoder == "mlp" else pjp.preset(work.env).config
    config = replace(
        network,
        encoder=work.encoder,
        num_envs=work.num_envs,
        num_steps=work.num_steps,
        num_updates=NUM_UPDATES,
        num_minibatches=work.num_minibatches,
        num_epochs=work.num_epochs,
        normalize_observation=work.normalize,
        scale_reward=work.normalize,
    )
    ppo, key = pjp.make_ppo(work.env, config), jax.random.key(0)
    if work.num_agents > 1:
        ppo, key = pjp.batched(ppo), jax.random.split(key, work.num_agents)
    return ppo.train, jax.eval_shape(ppo.init, key)


def table(rows: dict) -> str:
    lines = [
        "\nGPU kernels of a training cycle, compiled for an H100, not run on one",
        f"{'work':<6}{'rollout step':>14}{'minibatch':>11}{'rest':>8}{'cycle':>9}{'unknown loops':>15}"
        f"{'temporary':>14}{'arguments':>14}{'compile':>10}{'jax':>9}",
    ]
    for work, row in rows.items():
        if "left_out" in row:
            lines.append(f"{work:<6}{row['left_out']}")
            continue
        lines.append(
            f"{work:<6}{row['rollout_step']:>14.4g}{row['minibatch']:>11.4g}{row['rest']:>8,}{row['cycle']:>9,}"
            f"{row['unknown_loops']:>15}{row['temporary_bytes'] / 2**20:>10,.2f} MiB"
            f"{row['argument_bytes'] / 2**20:>10,.2f} MiB{row['compile_seconds']:>8.1f} s{row['versions']['jax']:>9}"
        )
    lines.append("unknown loops: the compiler does not know their trip counts; one iteration of each is counted")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
