import os

os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # commands keep programs, tests compile their own

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


# Most tests compile programs that run for a moment, so they compile in half the time, in child processes too; learning
# takes longer so. XLA_FLAGS="" pytest tests what users run.
def pytest_configure(config):
    if "not slow" in config.option.markexpr:
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture
def key():
    return jax.random.key(0)
