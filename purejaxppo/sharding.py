"""One big run on several devices: its environments shared out, its gradients averaged."""

from dataclasses import replace
from functools import partial, wraps

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from purejaxppo.config import Config
from purejaxppo.ppo import PPO, TrainState

AXIS = "envs"


def sharded(ppo: PPO, devices=None) -> PPO:
    """The same PPO with its environments shared out over D devices, all there are by default: again a PPO.

    Every device acts in N / D environments and learns from an equal part of every minibatch; gradients and moments
    are averaged at every step, so that the policy is the same everywhere. Settings and states are those of the whole:
    `evaluate`, `act` and a saved policy know nothing of devices. The draws are not those of one device, since each
    shuffles what it holds. A loss of one's own must be a mean over transitions. Raises ValueError where a rollout
    cannot be shared out evenly.
    """
    devices = jax.devices() if devices is None else list(devices)
    if ppo.mesh is not None or not devices:
        raise ValueError("sharded takes a PPO that is not sharded yet, and one device or more")
    config = _config_of_shard(ppo.config, len(devices))
    mesh = Mesh(np.array(devices), AXIS)

    @wraps(ppo.init)
    def init(*args, **kwargs):
        state = ppo.init(*args, **kwargs)
        return jax.lax.with_sharding_constraint(state, jax.tree.map(partial(NamedSharding, mesh), _specs(state)))

    def on_shards(function):
        @wraps(function)
        def run(state):
            specs = _specs(state)
            shard = partial(function, config=config, axis_name=AXIS)
            # That all shards agree on what they share is tested, not checked by types.
            out = specs, PartitionSpec()
            return jax.shard_map(shard, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False)(state)

        return run

    return ppo._replace(init=init, step=on_shards(ppo.step), train=on_shards(ppo.train), mesh=mesh)


def _specs(state: TrainState):
    """Where every leaf of a state lies: environments in shards, all else everywhere."""
    if state.num_updates.ndim:
        raise ValueError("sharded takes the PPO of one run: for many runs write batched(sharded(ppo))")
    everywhere = jax.tree.map(lambda _: PartitionSpec(), state)
    return everywhere.replace(actors=jax.tree.map(lambda _: PartitionSpec(AXIS), state.actors))


def _config_of_shard(config: Config, num_devices: int) -> Config:
    """The settings of one of the shards."""
    if config.num_envs % num_devices:
        raise ValueError(f"num_envs={config.num_envs} must be a multiple of the {num_devices} devices that share them")
    try:
        return replace(
            config,
            num_envs=config.num_envs // num_devices,
            resets_per_step=-(-config.resets_per_step // num_devices),
        )
    except ValueError as error:
        raise ValueError(f"on each of {num_devices} devices: {error}") from None
