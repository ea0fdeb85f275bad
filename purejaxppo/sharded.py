"""One big run on several devices: its environments shared out, its gradients averaged."""

from dataclasses import replace
from functools import partial, wraps

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from purejaxppo.config import Config
from purejaxppo.ppo import PPO, TrainState, bind_ppo, with_step
from purejaxppo.rollout import Rollout

AXIS = "envs"


def sharded(ppo: PPO, devices=None) -> PPO:
    """The same PPO with its environments shared out over `devices`, a list or how many; all by default: again a PPO.

    Each of D devices acts in N / D environments and learns from an equal part of every minibatch; gradients are
    averaged in every minibatch and moments pooled in every cycle, so that the policy is the same everywhere. Settings
    and states are those of the whole: `evaluate`, `act` and a saved policy know nothing of devices. The draws are not
    those of one device, since each shuffles what it holds. A custom loss must be a mean over transitions; a custom step
    sees whole rollouts. Raises ValueError where a rollout cannot be shared out evenly.
    """
    if ppo.custom:
        base, step, init = ppo.custom
        return with_step(sharded(base, devices), step, init)
    if ppo.mesh is not None:
        raise ValueError(f"this PPO is sharded already, over {ppo.mesh.size} devices")
    devices = choose_devices(devices)
    config = _config_of_shard(ppo.config, len(devices))
    mesh = Mesh(np.array(devices), AXIS)
    shard = bind_ppo(ppo.env, ppo.network, config, ppo.loss, ppo.optimizer, AXIS)
    # That all shards agree on what they share is tested, not checked by types.
    on_shards = partial(jax.shard_map, mesh=mesh, check_vma=False)

    @wraps(ppo.init)
    def init(*args, **kwargs):
        state = ppo.init(*args, **kwargs)
        return jax.lax.with_sharding_constraint(state, jax.tree.map(partial(NamedSharding, mesh), _specs(state)))

    @wraps(ppo.collect)
    def collect(state):
        specs = _specs(state), _specs_of_rollout(jax.eval_shape(ppo.collect, state)[1])
        return on_shards(shard.collect, in_specs=specs[:1], out_specs=specs)(state)

    @wraps(ppo.learn)
    def learn(state, rollout):
        specs = _specs(state), _specs_of_rollout(rollout)
        return on_shards(shard.learn, in_specs=specs, out_specs=(specs[0], PartitionSpec()))(state, rollout)

    def whole(function):
        @wraps(function)
        def run(state):
            specs = _specs(state)
            return on_shards(function, in_specs=(specs,), out_specs=(specs, PartitionSpec()))(state)

        return run

    return ppo._replace(
        init=init, collect=collect, learn=learn, step=whole(shard.step), train=whole(shard.train), mesh=mesh
    )


def choose_devices(devices, present=None) -> list[jax.Device]:
    """The devices that are meant by a list, a number or None (all), out of those `present`, all of JAX's by default.

    Raises ValueError where there are not so many.
    """
    present = jax.devices() if present is None else present
    cores = (
        "jax.config.update('jax_num_cpu_devices', ...), before JAX computes anything, makes devices of a CPU's cores"
    )
    if devices is None:
        if len(present) == 1:
            raise ValueError(f"there is one device to share a run out to ({cores})")
        return present
    if isinstance(devices, int):
        if not 1 <= devices <= len(present):
            raise ValueError(f"devices={devices} must be from 1 to the {len(present)} that JAX has here ({cores})")
        return present[:devices]
    devices = list(devices)
    if not devices or not all(isinstance(d, jax.Device) for d in devices) or len(set(devices)) < len(devices):
        raise ValueError(
            f"devices={devices} must be a number, or a list of different devices such as jax.devices()[:2]"
        )
    return devices


def _specs(state: TrainState):
    """Where every leaf of a state lies: environments in shards, all else everywhere."""
    if state.num_updates.ndim:
        raise ValueError("sharded takes the PPO of one run: for many runs write batched(sharded(ppo))")
    everywhere = jax.tree.map(lambda _: PartitionSpec(), state)
    return everywhere.replace(actors=jax.tree.map(lambda _: PartitionSpec(AXIS), state.actors))


def _specs_of_rollout(rollout: Rollout):
    """Where every leaf of a rollout [T, N, ...] lies: environments in shards, scalars everywhere."""
    return jax.tree.map(lambda x: PartitionSpec(None, AXIS) if jnp.ndim(x) else PartitionSpec(), rollout)


def _config_of_shard(config: Config, num_devices: int) -> Config:
    """The settings of one of the shards."""
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
