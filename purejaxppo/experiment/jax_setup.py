"""How JAX is set up before it computes: threads, devices, flags of XLA, and the folder of compiled programs."""

import contextlib
import functools
import hashlib
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout

from purejaxppo.text import quote

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
CACHE_BYTES = 2 * 2**30  # of compiled programs that are kept; those of a command take about one megabyte
# On Linux, in containers, and on Linux under Windows.
NVIDIA_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")


def use_deterministic_kernels():
    """Has GPUs compute the same bits in every run: XLA leaves out kernels that do not, and does not autotune.

    Without it, results on a GPU agree to rounding; a CPU computes the same bits anyway. It adds to the environment
    variable XLA_FLAGS, which child processes inherit and which the folder of a run records. Raises RuntimeError if JAX
    has started to compute.
    """
    if DETERMINISTIC in os.environ.get("XLA_FLAGS", "").split():
        return
    _refuse_once_started("use_deterministic_kernels")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()


def use_one_thread():
    """Limits XLA to one CPU thread, which is faster for one agent with minibatches of less than 512 transitions.

    Handing such small work to other threads costs more than it saves. Everything else gets slower: large minibatches
    (see `sharded`), many agents (see `compile_training`). It sets the environment variable NPROC=1, which child
    processes inherit; if the variable is set already, it stays. Raises RuntimeError if JAX has started to compute.
    """
    if "NPROC" in os.environ:
        return
    _refuse_once_started("use_one_thread")
    os.environ["NPROC"] = "1"


def _refuse_once_started(what: str):
    num_devices = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    try:
        for changed in (num_devices + 1, num_devices):  # and back: JAX refuses changes once it has started
            jax.config.update("jax_num_cpu_devices", changed)
    except RuntimeError:
        raise RuntimeError(f"{what} comes too late: JAX has started to compute (call it first)") from None


def cores_as_devices():
    """Makes every CPU core a device, for `sharded`, unless JAX has started or the number is set already."""
    told = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    told = told or jax.config.jax_num_cpu_devices >= 0  # pyright: ignore[reportAttributeAccessIssue]
    if not told:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", num_cores())


def cache_compilation(folder: str | Path | None = None):
    """Keeps compiled programs in a folder, so that a later process with the same programs need not compile them.

    By default it is `purejaxppo` in the user's cache folder, unless JAX has one already (JAX_COMPILATION_CACHE_DIR) or
    keeps none (JAX_ENABLE_COMPILATION_CACHE).
    Each version of JAX, kind of device, kind of processor and number of CPU threads, which a program is compiled for,
    has a subfolder, so machines may share the folder. A subfolder holds up to `CACHE_BYTES`; what was used longest ago
    leaves first.

    Call it before the first program is compiled, and after what must come before JAX starts, such as `use_one_thread`.

    Raises:
        ValueError: if the folder cannot be made or written.
    """
    if not isinstance(folder, (str, Path, type(None))):
        raise ValueError(f"folder={quote(folder)} must be a path, such as 'compiled'")
    config: Any = jax.config
    if folder is None and (config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache):
        return
    try:
        if folder is None:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "purejaxppo"
        kept = Path(folder) / _machine_kind()
        kept.mkdir(parents=True, exist_ok=True)
        with FileLock(kept / ".lockfile", timeout=10):  # JAX's own
            _remove_halves(kept)
    except (OSError, RuntimeError, Timeout) as error:  # RuntimeError where the user has no home folder
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"folder={folder} cannot be made and written: {reason} (name another folder)") from None
    jax.config.update("jax_compilation_cache_dir", str(kept))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _machine_kind() -> str:
    """A name for all machines and processes that compile the same programs."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), lines[0])
    processor = f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
    threads = os.environ.get("NPROC") or num_cores()
    name = f"jax-{jax.__version__}-{jax.devices()[0].device_kind}-{processor}-{threads}-threads"
    return name.replace(" ", "-").replace("/", "-")


def _remove_halves(folder: Path):
    """Removes programs that a killed process left without the time of their use, on which JAX stumbles."""
    for path in folder.glob("*-cache"):
        if not path.with_name(path.name.removesuffix("-cache") + "-atime").exists():
            path.unlink()


@functools.cache
def warn_of_idle_gpu():
    """Warns once if JAX computes on the CPU of a machine with an NVIDIA device and was not asked to."""
    asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if not asked and jax.default_backend() == "cpu" and any(map(os.path.exists, NVIDIA_DEVICES)):
        warnings.warn('JAX computes on the CPU, but there is an NVIDIA device (pip install "purejaxppo[cuda]" uses it)')


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
