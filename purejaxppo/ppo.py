"""Proximal Policy Optimization as pure functions: `init` starts a run, `step` is one update, `train` is all of them.

A step is `learn` after `collect`. `with_step` gives a PPO a custom step; the result is again a PPO.
"""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purejaxppo.advantages import estimate, scale_rewards
from purejaxppo.collectives import gather_shards, key_of_shard
from purejaxppo.config import Config, Hyperparams, as_arrays
from purejaxppo.envs import make_env
from purejaxppo.envs.base import Env, action_space, bound_action, observation_space
from purejaxppo.envs.check import check_shapes, check_squash
from purejaxppo.envs.memory_inputs import with_memory_inputs
from purejaxppo.envs.roles import has_privileged, with_privileged
from purejaxppo.evaluate import evaluate
from purejaxppo.loss import ppo_loss
from purejaxppo.networks.actor_critic import make_network
from purejaxppo.networks.network import Network, as_network, check_network, respect_mask
from purejaxppo.normalize import (
    measure_observations,
    merge_observations,
    observation_moments,
    standardize_observations,
)
from purejaxppo.record import Record, pack
from purejaxppo.rollout import Actors, Policy, Rollout, apply_policy, first_limits, start, start_policy, unroll
from purejaxppo.starts import fill_pool
from purejaxppo.summary import join_metrics, measure_rollout, summarize
from purejaxppo.update import adam, update
from purejaxppo.validate import (
    Expected,
    as_env_params,
    as_key,
    as_rollout,
    as_step,
    check_config,
    check_hyperparams,
    check_loss,
    check_optimizer,
    check_step,
    check_target_kl,
    check_type,
    make_transformation,
)


class TrainState(Record):
    """The state of a run: everything that the next step needs. A subclass may have more fields, see `with_step`."""

    key: jax.Array
    hyperparams: Hyperparams  # float32 leaves []
    env_params: Any
    policy: Policy
    opt_state: Any
    actors: Actors
    num_updates: jax.Array  # [] int32, done so far

    def __getitem__(self, runs: Any) -> "TrainState":
        """One run of a batch by its index, or a smaller batch by a slice, a mask or a list of indices.

        Raises IndexError for an index out of range, and for a state of one run.
        """
        shape = self.num_updates.shape
        if not shape:
            raise IndexError(
                "the state is of one run, so it has no runs to choose from (batched(ppo) makes such states)"
            )
        if isinstance(runs, int) and not -shape[0] <= runs < shape[0]:
            raise IndexError(f"index {runs} is out of range: the state holds {shape[0]} runs")
        return jax.tree.map(lambda x: x[jnp.asarray(runs) if isinstance(runs, list) else runs], self)


class PPO(NamedTuple):
    """Pure functions with their static arguments bound, and these arguments."""

    init: Callable  # key, hyperparams=Hyperparams(), env_params=None -> TrainState
    collect: Callable  # state -> state, Rollout: act for T steps
    learn: Callable  # state, Rollout -> state, metrics: learn from it
    step: Callable  # state -> state, metrics: collect, then learn
    train: Callable  # state -> state, metrics [U]: `config.num_updates` steps
    evaluate: Callable  # key, policy, env_params=None, *, num_episodes, greedy, max_steps -> Evaluation [E]
    act: Callable  # policy, obs, key=None, memory=None, env_params=None -> action, memory
    env: Env
    network: Network
    config: Config
    loss: Callable  # as given to `make_ppo`
    optimizer: Callable
    mesh: Any = None  # of devices that share the environments of a run (`sharded`) or the runs of a batch (`batched`)
    freeze: Callable | None = None  # state, next state, metrics -> next state, metrics; keeps runs that would turn nan
    custom: "Custom | None" = None  # the arguments of `with_step`
    changes: tuple = ()  # functions that make it learn otherwise: custom steps and inits, `evolving`
    many: bool = False  # whether states hold R runs, [R, ...]

    def __repr__(self) -> str:
        config = self.config
        names = [getattr(f, "__name__", None) or repr(f) for f in (self.loss, self.optimizer)]
        cycle = f", step {getattr(self.custom.step, '__name__', self.custom.step)}" if self.custom else ""
        return "\n".join(
            [
                f"PPO on {self.env.name}"
                + (", batched" if self.many else "")
                + (f", over {self.mesh.size} devices" if self.mesh else ""),
                f"  collect  {config.num_envs} environments x {config.num_steps} steps",
                f"  learn    {config.num_epochs} epochs x {config.num_minibatches} minibatches, "
                f"loss {names[0]}, optimizer {names[1]}{cycle}",
                f"  train    {config.num_updates} updates, {config.total_steps:,} steps",
                f"  fields   {', '.join(self._fields)}",
            ]
        )


class Custom(NamedTuple):
    """A custom step and init, and the PPO that they are given."""

    ppo: PPO
    step: Callable
    init: Callable | None


def make_ppo(
    env: Any,
    config: Config = Config(),
    *,
    network: Any = None,
    loss: Callable = ppo_loss,
    optimizer: Callable = adam,
) -> PPO:
    """PPO for an environment, as a bundle of pure functions.

        >>> ppo = pjp.make_ppo("CartPole-v1", pjp.Config(num_envs=8, num_updates=2))
        >>> state = ppo.init(jax.random.key(0), pjp.Hyperparams(learning_rate=3e-4))
        >>> state, metrics = jax.jit(ppo.train)(state)
        >>> metrics["loss"].shape
        (2,)

    Args:
        env: a name (`purejaxppo envs` lists them), a gymnax environment, a pair (gymnax environment, params), or an
            `Env`.
        config: sizes, and which details are on.
        network: a `Network` or a flax linen module; by default the one that `config` describes.
        loss: a function like `ppo_loss`; the advantages that it gets are standardised already.
        optimizer: a function from `Hyperparams` to an optax transformation.

    Raises:
        ValueError: before anything compiles, if environment, network and config do not fit together.
    """
    check_config(config)
    check_loss(loss)
    check_optimizer(optimizer)
    env = make_env(env)
    problems = check_shapes(env)
    if problems:
        raise ValueError(f"environment {env.name!r} failed its checks: {' '.join(problems)}")
    env = with_memory_inputs(env) if config.memory_inputs else env
    spaces = observation_space(env), action_space(env, env.params)
    if config.bound_action == "tanh":
        check_squash(spaces[1])
    network = make_network(config, *spaces) if network is None else respect_mask(as_network(network), spaces[0])
    obs = jax.eval_shape(partial(_first_observation, env=env, config=config), jax.random.key(0))
    check_network(network, obs, *spaces, config)
    return bind_ppo(env, network, config, loss, optimizer)


def bind_ppo(
    env: Env, network: Network, config: Config, loss: Callable, optimizer: Callable, axis_name: str | tuple = ()
) -> PPO:
    """The PPO of an environment, a network and a config that fit together.

    Args:
        env: as `make_env` returns it.
        network: as `as_network` returns it.
        config: of the run, or of one shard.
        loss: see `make_ppo`.
        optimizer: see `make_ppo`.
        axis_name: the mesh axis whose shards hold `config.num_envs` environments each (see `sharded`), () for none.
    """
    bound, expected = partial(bind, config.matmul_precision), Expected(env, network, config, optimizer)
    check_state, check_learn = (None, None) if axis_name else (expected.check_state, expected.check_learn)  # of a run
    acting = {"env": env, "network": network, "config": config}
    learning = {"network": network, "config": config, "loss": loss, "optimizer": optimizer, "axis_name": axis_name}
    ppo = PPO(
        init=bound(init, **acting, optimizer=optimizer),
        collect=bound(collect, check_state, **acting, axis_name=axis_name),
        learn=bound(learn, check_learn, **learning),
        step=bound(step, check_state, **acting | learning),
        train=train,  # replaced below
        evaluate=bound(evaluate, expected.check_evaluate, **acting),
        act=bound(act, expected.check_act, **acting),
        **acting,
        loss=loss,
        optimizer=optimizer,
    )
    return replace_step(ppo, ppo.step)


def bind(precision: str, function: Callable, check: Callable | None = None, **static: Any) -> Callable:
    """A function with static arguments bound, which keeps its name, docstring and remaining signature.

    Its float32 matrix products have the given precision: JAX's default is TF32 on recent GPUs. `check` is given the
    remaining arguments by name before each call, and may refuse them.
    """
    signature = inspect.signature(function)
    left = [parameter for name, parameter in signature.parameters.items() if name not in static]
    signature = signature.replace(parameters=left)

    @wraps(function)
    def bound(*args, **kwargs):
        if check is not None:
            check(**signature.bind(*args, **kwargs).arguments)
        with jax.default_matmul_precision(_precision_in_jax(precision)):
            return function(*args, **static, **kwargs)

    vars(bound)["__signature__"] = signature
    return bound


def _precision_in_jax(precision: str) -> str:
    """JAX's name of a `matmul_precision`. CPUs, which compute in float32 anyway, refuse that of bfloat16."""
    on_cpu = jax.default_backend() == "cpu"
    return {"bfloat16": "highest" if on_cpu else "BF16_BF16_F32"}.get(precision, precision)


def with_step(ppo: PPO, step: Callable, init: Callable | None = None) -> PPO:
    """The same PPO with a custom step: again a PPO, which every transform, `fit` and sweeps accept.

        >>> def step(ppo, state):
        ...     state, rollout = ppo.collect(state)
        ...     return ppo.learn(state, rollout.replace(reward=rollout.reward * 0.1))
        >>> ppo = pjp.with_step(pjp.make_ppo("CartPole-v1"), step)

    Args:
        ppo: the PPO whose `collect`, `learn` and `step` the custom step may call.
        step: `step(ppo, state) -> state, metrics`. It may change the state: hyperparameters, environment parameters, or
            fields of a subclass of `TrainState`; it may add to the metrics of `ppo.learn`. A scheduled hyperparameter
            has its current value in `state.hyperparams.at(state.num_updates, ppo.config)`. Under `sharded` the step
            sees whole rollouts.
        init: `init(ppo, key, hyperparams, env_params) -> state`, for a state with more fields.

    Raises:
        ValueError: for functions with other arguments; at tracing, if the step returns another kind of state, or drops
            metrics of `ppo.learn`.
    """
    check_type("ppo", ppo, PPO, "with_step(ppo, step)")
    check_step(step, init)

    def whole_step(state: TrainState):
        new, metrics = as_step(state, step(ppo, state))
        return ppo.freeze(state, new, metrics) if ppo.freeze else (new, metrics)

    def whole_init(key, hyperparams=Hyperparams(), env_params=None):
        return init(ppo, key, hyperparams, env_params) if init else ppo.init(key, hyperparams, env_params)

    bound = partial(bind, ppo.config.matmul_precision)
    new = replace_step(ppo, wraps(ppo.step)(bound(whole_step)))
    changes = (*ppo.changes, step, *([init] if init else []))
    return new._replace(init=wraps(ppo.init)(bound(whole_init)), custom=Custom(ppo, step, init), changes=changes)


def replace_step(ppo: PPO, step: Callable) -> PPO:
    """A PPO with another step, `state -> state, metrics`, and the training that repeats it."""
    return ppo._replace(step=step, train=bind(ppo.config.matmul_precision, train, step=step, config=ppo.config))


def init(
    key: jax.Array,
    hyperparams: Hyperparams = Hyperparams(),
    env_params: Any = None,
    *,
    env: Env,
    network: Network,
    config: Config,
    optimizer: Callable,
) -> TrainState:
    """The first state of a run.

    Args:
        key: of the run.
        hyperparams: numbers or schedules.
        env_params: by default those of the environment.
        env: where to act.
        network: gets its first parameters.
        config: sizes.
        optimizer: hyperparams -> optax transformation.

    Raises:
        ValueError: for arguments of another kind, or of more than one run.
    """
    check_hyperparams(hyperparams)
    check_target_kl(hyperparams.target_kl, config)
    key, network_key, actors_key, pool_key = jax.random.split(as_key(key), 4)
    hyperparams, env_params = as_arrays(hyperparams), as_env_params(env_params, env)
    now = hyperparams.at(0, config)
    check_hyperparams(now)  # schedules as numbers
    actors = start(actors_key, env_params, env=env, network=network, num_envs=config.num_envs)
    pool = fill_pool(pool_key, env_params, env=env, config=config)
    actors = actors.replace(pool=pool, first_limit=first_limits(config))
    policy = start_policy(network_key, actors.obs, actors.memory, env=env, network=network, config=config)
    transformation = make_transformation(optimizer, now)
    return TrainState(
        key=key,
        hyperparams=hyperparams,
        env_params=env_params,
        policy=policy,
        opt_state=transformation.init(policy.params),
        actors=actors,
        num_updates=jnp.int32(0),
    )


def collect(
    state: TrainState, *, env: Env, network: Network, config: Config, axis_name: str | tuple = ()
) -> tuple[TrainState, Rollout]:
    """The first half of a step: acts for T environment steps.

    Args:
        state: where the environments stand.
        env: where to act.
        network: applies the policy.
        config: sizes.
        axis_name: mesh axis of the shards, () for one shard.

    Returns:
        The state after the T steps, and the rollout to `learn` from.
    """
    key, rollout_key, update_key = jax.random.split(state.key, 3)
    actors, rollout = unroll(
        key_of_shard(rollout_key, axis_name),
        state.actors,
        state.policy,
        state.env_params,
        env=env,
        network=network,
        config=config,
    )
    return state.replace(key=key, actors=actors), rollout.replace(key=update_key)


def learn(
    state: TrainState,
    rollout: Rollout,
    *,
    network: Network,
    config: Config,
    loss: Callable,
    optimizer: Callable,
    axis_name: str | tuple = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The second half of a step: estimates advantages and learns for some epochs.

    It learns from the rollout as it is given, so a custom step may change it first; the reported returns and lengths of
    episodes are always those of the environment. Where an episode ended and at the last step, values are bootstrapped
    from `next_obs`, elsewhere from the next `obs`.

    Args:
        state: after `collect`.
        rollout: from `collect`.
        network: applies the policy.
        config: sizes and details.
        loss: see `make_ppo`.
        optimizer: see `make_ppo`.
        axis_name: mesh axis of the shards, () for one shard.

    Returns:
        The next state, and metrics: scalars, or vectors if the loss reports some.

    Raises:
        ValueError: for a rollout of another shape.
    """
    rollout = as_rollout(rollout, config)
    hyperparams = state.hyperparams.at(state.num_updates, config)
    policy, actors, reward = scale_rewards(state.policy, state.actors, rollout, hyperparams.discount, config, axis_name)
    batch = estimate(policy, rollout, reward, actors.memory, hyperparams, network=network, config=config)
    params, opt_state, learned = update(
        key_of_shard(rollout.key, axis_name),
        policy.params,
        state.opt_state,
        batch,
        hyperparams,
        loss=partial(loss, network=network, config=config),
        optimizer=optimizer,
        config=config,
        observation=policy.observation,
        axis_name=axis_name,
    )
    measured_obs, measured = gather_shards(
        (measure_observations(policy.observation, rollout.obs), measure_rollout(rollout, batch)), axis_name
    )
    # The policy acted and learned under the old moments, so that its ratio began at 1; the next step has the new ones.
    policy = policy.replace(observation=merge_observations(policy.observation, measured_obs))
    policy = policy.replace(params=params)
    state = state.replace(policy=policy, actors=actors, opt_state=opt_state, num_updates=state.num_updates + 1)
    metrics = summarize(measured, rollout) | {"learning_rate": hyperparams.learning_rate}
    return state, join_metrics(metrics, {"reports of the loss": learned})


def step(
    state: TrainState,
    *,
    env: Env,
    network: Network,
    config: Config,
    loss: Callable,
    optimizer: Callable,
    axis_name: str | tuple = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update: `learn` after `collect`, whose arguments it takes. Returns the next state and metrics."""
    state, rollout = collect(state, env=env, network=network, config=config, axis_name=axis_name)
    return learn(state, rollout, network=network, config=config, loss=loss, optimizer=optimizer, axis_name=axis_name)


def train(state: TrainState, *, step: Callable, config: Config) -> tuple[TrainState, dict[str, jax.Array]]:
    """All `config.num_updates` steps of a run in one program; metrics are [U, ...], for R runs [R, U, ...]."""
    runs = state.num_updates.ndim

    def one(state, _):
        state, metrics = step(state)
        return state, pack(metrics, runs)

    state, rows = jax.lax.scan(one, state, length=config.num_updates)
    return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, runs), rows.unpack())


def act(
    policy: Policy,
    obs: Any,
    key: jax.Array | None = None,
    memory: Any = None,
    env_params: Any = None,
    *,
    env: Env,
    network: Network,
    config: Config,
) -> tuple[Any, Any]:
    """The action of a policy for one observation, which may lack privileged parts, and the memory after it.

    Without these parts the critic's share of the memory has no meaning; the action does not depend on it.

        >>> action, memory = ppo.act(state.policy, obs)  # the first step of an episode
        >>> action, memory = ppo.act(state.policy, obs, memory=memory)

    Args:
        policy: for example `state.policy`.
        obs: one observation, without a batch axis.
        key: samples the action; without a key it is the mode.
        memory: from the last call of this episode; None begins an episode.
        env_params: hold the bounds of the action; by default those of the environment.
        env: defines the action space.
        network: applies the policy.
        config: says how actions are bounded.

    Returns:
        The action, within its bounds, and the memory for the next call.
    """
    first = jnp.full((1, 1), memory is None)
    memory = network.initial_memory(1) if memory is None else memory
    if has_privileged(env.observation_space):
        _, like = jax.eval_shape(env.reset, jax.random.key(0), env.params)
        obs = with_privileged(env.observation_space, obs, like)
    obs = jax.tree.map(lambda x: jnp.asarray(x)[None, None], obs)
    memory, distribution, _ = apply_policy(policy, memory, obs, first, network=network, config=config)
    action = (distribution.mode() if key is None else distribution.sample(key))[0, 0]
    space = action_space(env, env.params if env_params is None else env_params)
    return bound_action(action, space, config.bound_action), memory


def _first_observation(key, *, env, config):
    """One observation, as the network of a new run reads it."""
    obs = env.reset(key, env.params)[1]
    moments = observation_moments(obs) if config.normalize_observation else ()
    return standardize_observations(moments, obs, config.observation_clip)
