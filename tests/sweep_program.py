"""A small sweep in a process of its own: FOLDER [DEVICES [PROCESS PROCESSES PORT [SHARE]]]."""

import sys

import jax

from probes import SMALL

if __name__ == "__main__":
    defaults = ["1", "0", "1", "0", ""]
    folder, devices, process, processes, port, share = sys.argv[1:] + defaults[len(sys.argv) - 2 :]
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))

    import purejaxppo as pjp

    sweep = pjp.Sweep(
        "CartPole-v1", pjp.grid(learning_rate=[1e-3, 1e-2], discount=[0.9, 0.99]), num_seeds=4,
        config=SMALL.with_total_steps(32 * 40), hyperparams=pjp.Hyperparams(),
    )  # fmt: skip
    result = pjp.run_sweep(
        sweep, folder, slice_size=2, updates_per_chunk=10, save_every=0, devices=int(devices), progress=False,
        share=share or None,
    )  # fmt: skip
    print(result.steps, jax.process_count(), int(devices), len(result.slices.read()))
