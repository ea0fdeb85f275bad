"""One big run on several devices: environments are distributed across them, gradients are averaged."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from purejaxppo.checks import check_whole
from purejaxppo.config import Config
from purejaxppo.ppo import PPO, TrainState, bind_ppo, with_step
from purejaxppo.rollout import Rollout
from purejaxppo.starts import starts_per_step
from purejaxppo.text import shorten
from purejaxppo.validate import Expected, check_type

AXIS = "envs"


def sharded(ppo: PPO, devices: int | Sequence[Any] | None = None) -> PPO:
    """The same PPO with its environments distributed across devices: again a PPO.

    `devices` is a list or a number of them, by default all. Each of D devices acts in N / D environments and learns
    from an equal share of every minibatch. Gradients are averaged in every minibatch and moments are pooled in every
    update, so the policy is the same on every device. The config and the states are those of the whole run: `evaluate`,
    `act` and saved policies do not depend on the devices. The random draws differ from those on one device, because
    each device shuffles its own transitions. A custom loss must average over transitions; a custom step sees whole
    rollouts. Raises ValueError if a rollout cannot be divided evenly.
    """
    check_type("ppo", ppo, PPO, "as make_ppo returns it")
    if ppo.many:
        raise ValueError("sharded takes the PPO of one run (for many runs write batched(sharded(ppo)))")
    if ppo.custom:
        return with_step(sharded(ppo.custom.ppo, devices), ppo.custom.step, ppo.custom.init)
    if ppo.mesh is not None:
        raise ValueError(f"this PPO is sharded already, over {ppo.mesh.size} devices (pass the one of make_ppo)")
    devices = choose_devices(devices)
    num_starts = starts_per_step(ppo.env, ppo.config)
    config = _config_of_shard(replace(ppo.config, resets_per_step=num_starts), len(devices))
    mesh = Mesh(np.array(devices), AXIS)
    expected = Expected(ppo.env, ppo.network, ppo.config, ppo.optimizer)  # of the whole run
    shard = bind_ppo(ppo.env, ppo.network, config, ppo.loss, ppo.optimizer, AXIS)
    # check_vma would prove that replicated values agree on all shards; tests check it instead.
    on_shards = partial(jax.shard_map, mesh=mesh, check_vma=False)

    @wraps(ppo.init)
    def init(*args: Any, **kwargs: Any):
        state = ppo.init(*args, **kwargs)
        return jax.lax.with_sharding_constraint(state, jax.tree.map(partial(NamedSharding, mesh), _specs(state)))

    @wraps(ppo.collect)
    def collect(state: TrainState):
        expected.check_state(state)
        specs = _specs(state), _specs_of_rollout(jax.eval_shape(ppo.collect, state)[1])
        return on_shards(shard.collect, in_specs=specs[:1], out_specs=specs)(state)

    @wraps(ppo.learn)
    def learn(state: TrainState, rollout: Rollout):
        expected.check_learn(state, rollout)
        specs = _specs(state), _specs_of_rollout(rollout)
        return on_shards(shard.learn, in_specs=specs, out_specs=(specs[0], PartitionSpec()))(state, rollout)

    def whole(function: Callable) -> Callable:
        @wraps(function)
        def run(state: TrainState):
            expected.check_state(state)
            specs = _specs(state)
            return on_shards(function, in_specs=(specs,), out_specs=(specs, PartitionSpec()))(state)

        return run

    return ppo._replace(
        init=init, collect=collect, learn=learn, step=whole(shard.step), train=whole(shard.train), mesh=mesh
    )


def can_divide(config: Config, num_devices: int) -> bool:
    """Whether `sharded` can distribute a run of this config over so many devices."""
    try:
        _config_of_shard(config, num_devices)
    except ValueError:
        return False
    return True


def choose_devices(devices: int | Sequence[Any] | None, present: Sequence[Any] | None = None) -> list[Any]:
    """The JAX devices of a list, the first of a number, or all for None, among those `present` (by default all).

    Raises ValueError if there are fewer, or for None if there is only one.
    """
    present = list(jax.devices() if present is None else present)
    cores = (
        "jax.config.update('jax_num_cpu_devices', ...), before JAX computes anything, makes devices of a CPU's cores"
    )
    if devices is None:
        if len(present) == 1:
            raise ValueError(f"devices=None needs several devices, but there is one device here ({cores})")
        return present
    if isinstance(devices, (bool, int, float, np.integer)):
        check_whole("devices", devices, at_least=0)
        devices = int(devices)
        if not 1 <= devices <= len(present):
            raise ValueError(f"devices={devices} must be from 1 to the {len(present)} that JAX has here ({cores})")
        return present[:devices]
    chosen = list(devices) if isinstance(devices, (Sequence, np.ndarray)) else []
    if not chosen or not all(isinstance(d, jax.Device) for d in chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"devices={shorten(repr(devices))} must be a number, or a list of different devices, such as "
            "jax.devices()[:2]"
        )
    return chosen


def _specs(state: TrainState) -> TrainState:
    """The PartitionSpec of every leaf of a state: environments are sharded, everything else is replicated."""
    everywhere = jax.tree.map(lambda _: PartitionSpec(), state)
    return everywhere.replace(actors=jax.tree.map(lambda _: PartitionSpec(AXIS), state.actors))


def _specs_of_rollout(rollout: Rollout) -> Rollout:
    """The PartitionSpec of every leaf of a rollout [T, N, ...]: environments are sharded, scalars are replicated."""
    return jax.tree.map(lambda x: PartitionSpec(None, AXIS) if jnp.ndim(x) else PartitionSpec(), rollout)


def _config_of_shard(config: Config, num_devices: int) -> Config:
    """The config of one shard."""
    if config.num_envs % num_devices:
        more = config.num_envs + -config.num_envs % num_devices
        raise ValueError(
            f"num_envs={config.num_envs} must be a multiple of the {num_devices} devices that share them (try {more})"
        )
    try:
        return replace(
            config,
            num_envs=config.num_envs // num_devices,
            resets_per_step=-(-config.resets_per_step // num_devices),
        )
    except ValueError as error:
        raise ValueError(f"on each of {num_devices} devices: {error}") from None
