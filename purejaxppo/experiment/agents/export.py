"""Export of a policy as one file that acts without this package; it includes the normaliser and the bounds."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from purejaxppo.envs.base import (
    ActionMask,
    Box,
    Discrete,
    action_space,
    bound_action,
    image_scale,
    observation_space,
)
from purejaxppo.envs.roles import allowed_actions, seen_by, with_privileged, without_privileged
from purejaxppo.experiment.agents.load import check_agent
from purejaxppo.experiment.files import check_file, name_leaf, to_arrays
from purejaxppo.networks.actor_critic import make_network
from purejaxppo.ppo import PPO, bind
from purejaxppo.rollout import Policy, add_time, apply_policy
from purejaxppo.text import Word
from purejaxppo.validate import as_env_params

# What a policy with memory inputs reads, as a comment of the code that calls it.
PREVIOUS = (
    "# obs['previous_action'] is the action before, one-hot if it is discrete, and obs['previous_reward'] its reward; "
    "both are 0 where an episode begins"
)
FORMATS = (".stablehlo", ".npz")


def export(
    ppo: PPO,
    policy: Policy,
    path: str | Path,
    env_params: Any = None,
    *,
    platforms: Sequence[str] = ("cpu", "cuda"),
) -> str:
    """Writes a policy that takes the most probable action, and returns the Python code that uses the file.

    A `.stablehlo` file is a function from observations [B, ...], for any B, to actions [B, ...] within their bounds,
    which `jax.export` reads. For a recurrent network it maps (observations, memory [B, ...], first [B]) to (actions,
    memory); where `first` is set an episode begins and the memory is reset. An `.npz` file holds arrays for NumPy; it
    supports an `mlp` without memory that reads one Box, beside an action mask perhaps, and a Discrete or Box action.
    Both respect a mask, and take observations without their privileged parts; then the critic's share of the memory has
    no meaning, and no action depends on it.

    Args:
        ppo: of one agent.
        policy: for example `agents.policy(0)`.
        path: the file; its suffix, .stablehlo or .npz, says what to write.
        env_params: by default those of the environment.
        platforms: that a .stablehlo file runs on.

    Raises:
        ValueError: for a policy or parameters of another PPO, a file that cannot be written, another suffix, or a
            network that .npz does not support.
    """
    check_agent(ppo, policy)
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"path={path} must end in {' or '.join(FORMATS)}, which says what to write")
    env_params = as_env_params(env_params, ppo.env)
    check_file(path)
    if path.suffix == ".npz":
        arrays, lines = _as_numpy(ppo, policy, env_params, path)
        np.savez(path, **cast(dict[str, Any], arrays))
        return lines
    path.write_bytes(_as_stablehlo(ppo, policy, env_params, platforms))
    read = f"policy = jax.export.deserialize(bytearray(open({str(path)!r}, 'rb').read()))"
    memory = jax.eval_shape(lambda: ppo.network.initial_memory(1))
    if not jax.tree.leaves(memory):
        return f"import jax, jax.export\n\n{read}\nactions = policy.call(obs)  # {_shapes(ppo)}"
    zeros = jax.tree.map(lambda x: Word(f"np.zeros({_batch(x.shape[1:], '()')}, np.{x.dtype})"), memory)
    lines = [
        "import jax, jax.export",
        "import numpy as np",
        "",
        read,
        "batch = 1  # environments in which it acts at the same time",
        f"memory = {zeros}",
        "first = np.ones(batch, bool)  # where an episode begins; False in the steps after that",
        *([PREVIOUS] if ppo.config.memory_inputs else []),
        f"actions, memory = policy.call(obs, memory, first)  # {_shapes(ppo)}",
    ]
    return "\n".join(lines)


def _as_stablehlo(ppo: PPO, policy: Policy, env_params, platforms) -> bytes:
    import jax.export

    space, bound = action_space(ppo.env, env_params), ppo.config.bound_action
    spaces, like = observation_space(ppo.env), _observation(ppo)

    def act(obs, memory, first):
        obs = jax.vmap(lambda x: with_privileged(spaces, x, like))(obs)
        memory, distribution, _ = apply_policy(
            policy, memory, add_time(obs), first[None], network=ppo.network, config=ppo.config
        )
        return jax.vmap(lambda action: bound_action(action, space, bound))(distribution.mode()[0]), memory

    def act_without_memory(obs):
        return act(obs, (), jnp.zeros(jax.tree.leaves(obs)[0].shape[0], bool))[0]

    (batch,) = jax.export.symbolic_shape("b")
    obs = without_privileged(spaces, like)
    memory = jax.eval_shape(lambda: ppo.network.initial_memory(1))
    obs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype), obs)
    memory = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), memory)
    recurrent = bool(jax.tree.leaves(memory))
    arguments = (obs, memory, jax.ShapeDtypeStruct((batch,), bool)) if recurrent else (obs,)
    function = jax.jit(bind(ppo.config.matmul_precision, act if recurrent else act_without_memory))
    return bytes(jax.export.export(function, platforms=list(platforms))(*arguments).serialize())


def _as_numpy(ppo: PPO, policy: Policy, env_params, path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a policy, and the code of the function that acts by them."""
    policy = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), policy)  # NumPy has no bfloat16
    found, config = to_arrays(policy), ppo.config
    trunk, space = "params/params/actor/MLP_0/Dense_{}/{}", action_space(ppo.env, env_params)
    heads = {Discrete: "params/params/Logits_0/logits/{}", Box: "params/params/Gaussian_0/loc/{}"}
    head = heads.get(type(space), "")
    names = [trunk.format(i, kind) for i in range(len(config.widths)) for kind in ("weight", "bias")]
    spaces = observation_space(ppo.env)
    places = jax.tree_util.tree_map_with_path(lambda path, _: name_leaf(path), spaces)
    (read, place), mask = seen_by(spaces, places, critic=False), allowed_actions(spaces, places)
    known = isinstance(read, Box) and head and not config.memory
    known = known and {*names, head.format("weight")} <= found.keys() and _is_of_config(ppo, policy)
    if not known:
        raise ValueError(
            f"path={path} can hold only an mlp without memory over one Box, not this network (try .stablehlo)"
        )
    arrays = {}
    for i in range(len(config.widths) + 1):
        where = trunk.format(i, "{}") if i < len(config.widths) else head
        arrays |= {f"{kind}_{i}": found[where.format(kind)] for kind in ("weight", "bias")}
    lines = [
        "import numpy as np",
        "",
        f"policy = dict(np.load({str(path)!r}))",
        "",
        "",
        f"def act(obs):  # {_shapes(ppo)}",
        f"    x = np.asarray({_taken_from(place)}, np.float32)",
    ]
    scale = image_scale(read, seen_by(spaces, _observation(ppo), critic=False)[1].dtype)
    if scale != 1:
        lines.append(f"    x = x / np.float32({scale})")
    moments = f"observation/{place}" if place else "observation"
    if f"{moments}/mean" in found:
        deviation = np.sqrt(found[f"{moments}/variance"] + np.float32(1e-8))
        arrays |= {"mean": found[f"{moments}/mean"], "deviation": deviation}
        limit = config.observation_clip
        lines.append(f"    x = np.clip((x - policy['mean']) / policy['deviation'], -{limit}, {limit})")
    last = len(config.widths)
    function = {"tanh": "np.tanh({})", "relu": "np.maximum({}, 0)"}[config.activation]
    hidden = function.format("x @ policy[f'weight_{i}'].T + policy[f'bias_{i}']")
    lines += [
        "    x = x.reshape(len(x), -1)",
        f"    for i in range({last}):",
        f"        x = {hidden}",
        f"    x = x @ policy['weight_{last}'].T + policy['bias_{last}']",
    ]
    if mask is not None:
        lines += [
            f"    mask = np.asarray({_taken_from(mask)}, bool)",
            "    x = np.where(mask | ~mask.any(-1, keepdims=True), x, -np.inf)",
        ]
    if isinstance(space, Discrete):
        return arrays, "\n".join([*lines, "    return x.argmax(-1)"])
    bounds = {
        name: np.broadcast_to(np.asarray(getattr(space, name), np.float32), space.shape) for name in ("low", "high")
    }
    lines.append(f"    low, high, x = policy['low'], policy['high'], x.reshape(-1, *{space.shape})")
    if config.bound_action == "tanh":
        lines.append("    x = low + (high - low) * (np.tanh(x) + 1) / 2")
    return arrays | bounds, "\n".join([*lines, "    return np.clip(x, low, high)"])


def _taken_from(place: Any) -> str:
    """The code that takes a part of an observation by its path."""
    return "obs" + "".join(f"[{name!r}]" for name in place.split("/") if name)


def _observation(ppo: PPO) -> Any:
    """The shapes of one observation."""
    return jax.eval_shape(ppo.env.reset, jax.random.key(0), ppo.env.params)[1]


def _is_of_config(ppo: PPO, policy: Policy) -> bool:
    """Whether the network is the one of the config, and not a custom one with weights of the same names."""
    space = observation_space(ppo.env)

    def draw(part):
        x = jax.random.normal(jax.random.key(0), (1, 8, *part.shape))
        return x > 0 if isinstance(part, ActionMask) else x if isinstance(part, Box) else x.astype(jnp.int32)

    obs = jax.tree.map(draw, space)
    try:
        network = make_network(ppo.config, space, action_space(ppo.env, ppo.env.params))
        ours, theirs = (n.apply(policy.params, (), obs, jnp.ones((1, 8), bool))[1:] for n in (network, ppo.network))
        return jax.tree.all(jax.tree.map(partial(np.array_equal, equal_nan=True), ours, theirs))
    except (FlaxError, TypeError, ValueError):  # other shapes, another distribution
        return False


def _shapes(ppo: PPO) -> str:
    """Shapes of inputs and outputs, for readers."""
    parts = jax.tree_util.tree_leaves_with_path(without_privileged(observation_space(ppo.env), _observation(ppo)))
    inputs = [f"obs{jax.tree_util.keystr(path)} {x.dtype}{_batch(x.shape)}" for path, x in parts]
    return f"{', '.join(inputs)} -> actions {_batch(action_space(ppo.env, ppo.env.params).shape)}"


def _batch(shape: Sequence[int], brackets: str = "[]") -> str:
    return f"{brackets[0]}{', '.join(['batch', *map(str, shape)])}{brackets[1]}"
