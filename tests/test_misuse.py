"""Wrong use of the functions in a table: each raises a ValueError with the argument, its value and a remedy."""

import re
from dataclasses import replace
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import purejaxppo as pjp
from purejaxppo.envs.import_gymnax import import_gymnax
from purejaxppo.loss import policy_loss
from purejaxppo.validate import as_key

api: Any = pjp  # without types, so that it can be used wrongly
CONFIG = pjp.Config(num_envs=2, num_steps=4, num_updates=2, num_epochs=1, num_minibatches=2, widths=(4,))
KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 3)
HYPERPARAMS = pjp.Hyperparams()


def reset(key, params):
    position = jax.random.uniform(key)
    return position, position[None]


def move(key, position, action, params):
    position = position + params["stride"] * (action - 0.5)
    return pjp.Step(position, position[None], -jnp.abs(position), position > 3, jnp.bool_(False))


WALK = pjp.Env(reset, move, params={"stride": 0.1, "size": 3}, action_space=pjp.Discrete(2), name="walk")


@cache
def make(config=CONFIG, **plugged):
    return pjp.make_ppo(WALK, config, **plugged)


GRID = jnp.zeros((3, 3), jnp.uint8)


@cache
def make_of_parts():
    """The PPO of an environment whose observations have two parts."""

    def observe(position):
        return {"grid": GRID, "vector": jnp.stack([position, position])}

    def reset_parts(key, params):
        state, _ = reset(key, params)
        return state, observe(state)

    def move_parts(key, position, action, params):
        result = move(key, position, action, params)
        return result._replace(obs=observe(result.state))

    return pjp.make_ppo(WALK._replace(reset=reset_parts, step=move_parts, name="parts"), CONFIG)


def act_on_parts(obs):
    ppo = make_of_parts()
    return jax.eval_shape(lambda: ppo.act(ppo.init(KEY).policy, obs))


@cache
def many():
    return pjp.batched(make())


@cache
def start():
    """The shapes of the first state of one run."""
    return start_of(make())


def start_of(ppo):
    return jax.eval_shape(ppo.init, KEY)


@cache
def starts():
    """The shapes of the first state of three runs."""
    return jax.eval_shape(many().init, KEYS)


@cache
def state():
    """A state of zeros, which costs no compilation."""
    return zeros(start())


def zeros(shapes):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    made = jax.tree.map(lambda x: jnp.broadcast_to(KEY, x.shape) if is_key(x) else jnp.zeros(x.shape, x.dtype), shapes)
    return api.with_hyperparams(made, target_kl=jnp.inf)  # 0 would need stop_on_kl


def step(ppo, of=None):
    return jax.eval_shape(ppo.step, start_of(ppo) if of is None else of)


def with_loss(change):
    """A step whose loss returns `change(loss, report)` of the usual ones."""

    def loss(params, minibatch, hyperparams, *, network, config):
        return change(*pjp.ppo_loss(params, minibatch, hyperparams, network=network, config=config))

    return step(make(loss=loss))


def with_beta(params, minibatch, hyperparams, *, network, config):
    loss, report = pjp.ppo_loss(params, minibatch, hyperparams, network=network, config=config)
    return loss * hyperparams.extra["beta"], report


def with_metric(**metrics):
    def custom(ppo, state):
        state, ours = ppo.step(state)
        return state, ours | metrics

    return step(pjp.with_step(make(), custom))


def failing_batch():
    """A batched PPO whose custom step reports a metric under the name that the host reads."""

    def custom(ppo, state):
        state, ours = ppo.step(state)
        return state, ours | {"failure": jnp.full(3, 9, jnp.int32)}

    return pjp.with_step(many(), custom)


def with_module(forward):
    """A PPO with a linen module."""

    class Module(nn.Module):
        @nn.compact
        def __call__(self, obs):
            return forward(pjp.Categorical(nn.Dense(2)(obs)), nn.Dense(1)(obs)[..., 0])

    return pjp.make_ppo(WALK, CONFIG, network=Module())


def normalized(layer):
    """A PPO with a linen layer before the heads."""

    class Module(nn.Module):
        @nn.compact
        def __call__(self, obs):
            x = layer()(obs)
            return pjp.Categorical(nn.Dense(2)(x)), nn.Dense(1)(x)[..., 0]

    return pjp.make_ppo(WALK, CONFIG, network=Module())


class OfNNX(nnx.Module):
    def __init__(self, rngs, layer=lambda rngs: lambda x: x):
        self.layer, self.logits, self.value = layer(rngs), nnx.Linear(1, 2, rngs=rngs), nnx.Linear(1, 1, rngs=rngs)

    def __call__(self, obs):
        return pjp.Categorical(self.logits(self.layer(obs))), self.value(obs)[..., 0]


def population():
    return pjp.evolving(make(), every=1, fraction=0.5)


wide = replace(CONFIG, widths=(8,))
act = lambda *args: make().act(state().policy, *args)
evaluate = lambda *args, **options: make().evaluate(*args, **options)

CASES: dict[str, tuple[Any, str]] = {
    # make_ppo
    "a transformation as optimizer": (
        lambda: make(optimizer=optax.adamw(1e-3)),
        "optimizer=GradientTransformation.* must be a function from Hyperparams .*lambda hyperparams: optax.adamw",
    ),
    "a constructor of optax as optimizer": (
        lambda: make(optimizer=optax.adam),
        r"optimizer=adam\(learning_rate, .* must be a function from Hyperparams",
    ),
    "an optimizer with two arguments": (
        lambda: make(optimizer=lambda rate, decay: optax.adam(rate)),
        r"optimizer=<lambda>\(rate, decay\) must be a function from Hyperparams",
    ),
    "an optimizer that returns a number": (
        lambda: start_of(make(optimizer=lambda hyperparams: 3)),
        r"optimizer=<lambda>\(hyperparams\) must return an optax transformation, not 3",
    ),
    "a name as loss": (lambda: make(loss="spo"), r"loss='spo' must be a function \(params, minibatch, .*surrogate="),
    "a surrogate as loss": (
        lambda: make(loss=policy_loss),
        r"loss=policy_loss\(log_ratio, .* must be a function \(params",
    ),
    "a loss that returns one number": (
        lambda: with_loss(lambda loss, report: loss),
        r"loss must return the pair \(loss, report\), .*not float32\[\]",
    ),
    "a loss that returns its report first": (
        lambda: with_loss(lambda loss, report: (report, loss)),
        r"must return the pair \(loss, report\), the report as a dictionary, not {'approx_kl'.* and float32\[\]$",
    ),
    "a loss without a report": (
        lambda: with_loss(lambda loss, report: (loss, None)),
        r"must return the pair \(loss, report\), the report as a dictionary, not float32\[\] and None",
    ),
    "a loss with a coefficient that is not given": (
        lambda: step(make(loss=with_beta)),
        r"loss finds no 'beta' \(test_misuse.py, line \d+\) .*Hyperparams\(extra={'beta': ...}\)",
    ),
    "a loss that returns three values": (
        lambda: with_loss(lambda loss, report: (loss, report, 0)),
        "loss must return the pair .*not 3 values",
    ),
    "a loss per transition": (
        lambda: with_loss(lambda loss, report: (jnp.full((1, 4), loss), report)),
        r"must return one number as its loss, not float32\[1, 4\] \(take a mean\)",
    ),
    "a report per transition": (
        lambda: with_loss(lambda loss, report: (loss, report | {"kl": jnp.full((1, 4), loss)})),
        r"the loss reports kl of shape \(1, 4\); it must be a scalar or a vector \(take a mean\)",
    ),
    "a report that is text": (
        lambda: with_loss(lambda loss, report: (loss, report | {"kind": "spo"})),
        "the loss reports kind as 'spo'; it must be",
    ),
    "a report in a report": (
        lambda: with_loss(lambda loss, report: (loss, report | {"kl": {"mean": loss}})),
        r"the loss reports kl as \{'mean': float32\[\]\}; it must be",
    ),
    **{
        f"a loss that reports {name}": (
            lambda name=name: with_loss(lambda loss, report: (loss, report | {name: loss})),
            f"reports.* '?{name}'?, a name that is taken .*use another name",
        )
        for name in ("learning_rate", "episode_return", "grad_norm", "step", "failure", "failed_metric", "parent")
    },
    "a preset as config": (
        lambda: api.make_ppo("CartPole-v1", api.preset("CartPole-v1")),
        r"config=Preset\(.* must be a Config \(.*config, hyperparams = preset",
    ),
    "parameters of an environment as config": (
        lambda: api.make_ppo(*import_gymnax().make("CartPole-v1")),
        r"config=EnvParams.* must be a Config \(.*make_ppo\(\(env, params\), config\)",
    ),
    "hyperparameters as config": (
        lambda: api.make_ppo(WALK, HYPERPARAMS),
        r"config=Hyperparams\(.* must be a Config \(hyperparameters go to ppo.init",
    ),
    "a dictionary as config": (
        lambda: api.make_ppo(WALK, {"num_envs": 2}),
        r"config={'num_envs': 2} must be a Config \(write Config\(\*\*config\)",
    ),
    "hyperparameters in a dictionary as config": (
        lambda: api.make_ppo(WALK, {"clip": 0.1}),
        r"config={'clip': 0.1} must be a Config \(hyperparameters go to ppo.init\(key, Hyperparams\(",
    ),
    "parameters in a dictionary as config": (
        lambda: api.make_ppo(WALK, {"stride": 0.5, "size": 3}),
        r"config={'stride': 0.5, 'size': 3} must be a Config \(.*env._replace\(params=...\) of an Env",
    ),
    "the function preset as config": (
        lambda: api.make_ppo(WALK, api.preset),
        r"config=<function preset.* must be a Config \(.*config, hyperparams = preset\(...\)",
    ),
    "a class as config": (
        lambda: api.make_ppo(WALK, api.Config),
        r"config=<class .* must be a Config \(write Config\(\)",
    ),
    "parameters of gymnax as a dictionary": (
        lambda: api.make_ppo((import_gymnax().make("CartPole-v1")[0], {"gravity": 5.0}), CONFIG),
        r"params={'gravity': 5.0} of CartPole-v1 must have .*env.default_params.replace",
    ),
    "parameters of another environment of gymnax": (
        lambda: api.make_ppo((import_gymnax().make("CartPole-v1")[0], import_gymnax().make("MountainCar-v0")[1])),
        "params=EnvParams.* of CartPole-v1 must have masscart",
    ),
    "a config as environment": (
        lambda: api.make_ppo(CONFIG),
        r"^env=Config\(.{1,80} is not an environment: pass a name",
    ),
    # init
    "a number as key": (lambda: make().init(0), r"key=0 must be a random key, such as jax.random.key\(0\)"),
    "keys of several runs": (lambda: make().init(KEYS), r"key has shape \(3,\), but must be a single key .batched"),
    "the key second": (lambda: make().init(HYPERPARAMS, KEY), "hyperparams=.* must be Hyperparams"),
    "a dictionary as hyperparameters": (
        lambda: make().init(KEY, {"clip": 0.1}),
        r"hyperparams={'clip': 0.1} must be Hyperparams \(write Hyperparams\(\*\*hyperparams",
    ),
    "a hyperparameter by another name": (
        lambda: make().init(KEY, {"lr": 1e-3}),
        r"hyperparams={'lr': 0.001} must be Hyperparams \(did you mean learning_rate",
    ),
    "a setting of a config as hyperparameter": (
        lambda: make().init(KEY, {"num_envs": 8}),
        r"hyperparams={'num_envs': 8} must be Hyperparams \(num_envs is a field of Config",
    ),
    "environment parameters as hyperparameters": (
        lambda: make().init(KEY, {"stride": 0.1}),
        "hyperparams={'stride': 0.1} must be .*parameters of the environment go to env_params=",
    ),
    "a config as hyperparameters": (lambda: make().init(KEY, CONFIG), "hyperparams=Config.* goes to make_ppo"),
    "a preset as hyperparameters": (
        lambda: make().init(KEY, api.preset("CartPole-v1")),
        "hyperparams=Preset.*config, hyperparams = preset",
    ),
    "hyperparameters of several runs": (
        lambda: make().init(KEY, api.Hyperparams(learning_rate=jnp.ones(3))),
        r"hyperparams.learning_rate has shape \(3,\), but this PPO is of one run .*batched\(ppo\)",
    ),
    "a schedule of several runs": (
        lambda: make().init(KEY, api.Hyperparams(learning_rate=api.linear(jnp.ones(3), 0))),
        r"hyperparams.learning_rate has shape \(3,\), but this PPO is of one run .*batched\(ppo\)",
    ),
    "a list of a hyperparameter": (
        lambda: make().init(KEY, api.Hyperparams(clip=[0.1, 0.2])),
        r"clip=\[0.1, 0.2\] must be a number, or an array .*jnp.array",
    ),
    "environment parameters of other names": (
        lambda: make().init(KEY, HYPERPARAMS, {"length": 0.5}),
        r"env_params={'length': float32\[\]} must have the structure of those of walk: .*ppo.env.params",
    ),
    "environment parameters without one": (
        lambda: make().init(KEY, HYPERPARAMS, {"stride": 0.5}),
        r"env_params=.* must have the structure of those of walk: \['size'\] is missing",
    ),
    "environment parameters of another shape": (
        lambda: make().init(KEY, HYPERPARAMS, {"stride": jnp.ones(3), "size": 3}),
        r"env_params\['stride'\] has shape \(3,\), but must have \(\), as in walk; give R values to batched",
    ),
    "environment parameters of another type": (
        lambda: make().init(KEY, HYPERPARAMS, {"stride": 0.5, "size": 3.5}),
        r"env_params\['size'\]=3.5 must be int32, as in walk",
    ),
    "keys that are one key": (lambda: many().init(KEY), r"key must hold one key per run, \[R\], not shape \(\)"),
    "keys that are a number": (lambda: many().init(0), r"key=0 must be a random key per run, \[R\], such as"),
    "hyperparameters of another number of runs": (
        lambda: many().init(KEYS, api.Hyperparams(clip=jnp.ones(2))),
        r"hyperparams.clip has shape \(2,\), but there are 3 keys",
    ),
    "environment parameters of another number of runs": (
        lambda: many().init(KEYS, HYPERPARAMS, {"stride": jnp.ones(2), "size": 3}),
        r"env_params\['stride'\] has shape \(2,\), but must have \(\) or \(3,\), one value per run",
    ),
    # step, collect, learn, train
    **{
        f"a batch to {name} of one run": (
            lambda name=name: jax.eval_shape(getattr(make(), name), starts()),
            r"state holds 3 runs, but this PPO is of one run .*batched\(ppo\), or state\[0\]",
        )
        for name in ("step", "collect", "train")
    },
    "one run to step of a batch": (lambda: step(many(), start()), r"needs states with a leading axis R"),
    "a rollout of one run to learn of a batch": (
        lambda: jax.eval_shape(many().learn, starts(), jax.eval_shape(make().collect, start())[1]),
        r"rollout.* has shape .*, but must be \[R, ...\] with R = 3 runs .*the PPO that is not batched",
    ),
    "a policy as state": (
        lambda: step(make(), start().policy),
        r"state=Policy .* must be a TrainState \(from ppo.init",
    ),
    "a state of another num_envs": (
        lambda: step(make(), start_of(make(replace(CONFIG, num_envs=4)))),
        r"state has 4 environments, but num_envs=2 \(make it with the init of this PPO\)",
    ),
    "a state of another environment": (
        lambda: step(make(), start_of(api.make_ppo("CartPole-v1", CONFIG))),
        "state.env_params belongs to another environment: .*init of this PPO",
    ),
    "a state of an environment with a time limit": (
        lambda: step(make(), start_of(api.make_ppo(api.time_limit(WALK, 5), CONFIG))),
        r"state.actors.env_state belongs to another environment: an array is missing",
    ),
    "a state of another network": (
        lambda: step(make(), start_of(make(wide))),
        r"state.policy.params belongs to another network: \['params'\].* has shape .* instead of",
    ),
    "a state of another optimizer": (
        lambda: step(make(), start_of(make(optimizer=lambda h: optax.sgd(h.learning_rate, momentum=0.9)))),
        "state.opt_state belongs to another optimizer",
    ),
    "a state without moments": (
        lambda: step(make(replace(CONFIG, normalize_observation=True)), start()),
        "state.policy.observation belongs to another config .normalize_observation",
    ),
    "a state to an evolving PPO": (lambda: step(population(), starts()), "state=TrainState .* must be a Population"),
    "a population to a batched PPO": (
        lambda: step(many(), jax.eval_shape(population().init, KEYS)),
        "state is a Population, which belongs to the PPO that evolving returned",
    ),
    **{
        f"a key of the older kind in a state of {kind}": (
            lambda ppo=ppo, first=first, key=key: api.fit(ppo(), zeros(first()).replace(key=key)),
            rf"state.key=uint32\[{shape}\] must be made by jax.random.key, .*jax.random.wrap_key_data",
        )
        for kind, ppo, first, key, shape in [
            ("one run", make, start, jax.random.PRNGKey(1), "2"),
            ("a batch", many, starts, jax.random.split(jax.random.PRNGKey(1), 3), "3, 2"),
        ]
    },
    "a number as key of a state": (
        lambda: api.fit(make(), state().replace(key=1)),
        "state.key=int32.* must be made by jax.random.key, such as",
    ),
    "keys in a state of one run": (
        lambda: step(make(), start().replace(key=KEYS)),
        r"state.key has shape \(3,\), but must be a single key",
    ),
    "a key of the older kind in a population": (
        lambda: step(population(), jax.eval_shape(population().init, KEYS).replace(key=jax.random.PRNGKey(1))),
        r"state.key=uint32\[2\] must be made by jax.random.key",
    ),
    "a dictionary in a state": (
        lambda: api.fit(make(), state().replace(hyperparams={"clip": 0.1})),
        "state.hyperparams={'clip': 0.1} must be Hyperparams",
    ),
    # a target without its stop
    **{
        f"a target as {kind}": (
            lambda value=value: make().init(KEY, api.Hyperparams(target_kl=value)),
            "target_kl=0.02 and stop_on_kl=False have no effect: set both",
        )
        for kind, value in [("a number of numpy", np.float32(0.02)), ("an array", jnp.float32(0.02))]
    },
    "a target of a batch": (
        lambda: many().init(KEYS, api.Hyperparams(target_kl=jnp.full(3, 0.02))),
        "target_kl=0.02 and stop_on_kl=False have no effect: set both",
    ),
    "a target of a state": (
        lambda: api.fit(make(), api.with_hyperparams(state(), target_kl=0.02)),
        "target_kl=0.02 and stop_on_kl=False have no effect: set both",
    ),
    "a target of the states of a batch": (
        lambda: api.fit(many(), api.with_hyperparams(zeros(starts()), target_kl=0.02)),
        "target_kl=0.02 and stop_on_kl=False have no effect: set both",
    ),
    "a sweep over targets": (
        lambda: api.Sweep(WALK, api.grid(target_kl=[0.02, 0.05]), config=CONFIG),
        "target_kl=0.02 and stop_on_kl=False have no effect: set both",
    ),
    "a sweep over stops": (
        lambda: api.Sweep(WALK, api.grid(stop_on_kl=[False, True]), config=CONFIG),
        "target_kl=inf and stop_on_kl=True have no effect: set both",
    ),
    "a schedule over too many optimizer steps": (
        lambda: step(
            make(replace(CONFIG, num_updates=2**30)),
            api.with_hyperparams(state(), learning_rate=api.schedule(optax.linear_schedule(1e-3, 0, 100))),
        ),
        "learning_rate is a schedule over optimizer steps, of which num_updates=1073741824 with 2 each make more than",
    ),
    # act and evaluate
    "several observations": (
        lambda: act(jnp.zeros((5, 1))),
        r"obs is float32\[5, 1\], but must be float32\[1\] \(jax.vmap\(ppo.act, in_axes=\(None, 0\)\)",
    ),
    "a batch of one observation": (lambda: act(jnp.zeros((1, 1))), r"obs is float32\[1, 1\], but must be float32\[1\]"),
    "an observation of another structure": (lambda: act({"x": jnp.zeros(1)}), "obs is {'x': float32.* but must be"),
    "a part of an observation that lacks": (
        lambda: act_on_parts({"grid": GRID}),
        r"^obs\['vector'\] is missing \(give one observation",
    ),
    "a part of an observation too many": (
        lambda: act_on_parts({"grid": GRID, "vector": jnp.zeros(2), "more": jnp.zeros(1)}),
        r"^obs\['more'\] is no part of an observation \(give one",
    ),
    "a part of an observation of another shape": (
        lambda: act_on_parts({"grid": GRID, "vector": jnp.zeros(3)}),
        r"^obs\['vector'\] is float32\[3\], but must be float32\[2\] \(give one",
    ),
    "a part of an observation of another kind": (
        lambda: act_on_parts({"grid": GRID.astype(jnp.float32), "vector": jnp.zeros(2)}),
        r"^obs\['grid'\] is float32\[3, 3\], but must be uint8\[3, 3\] \(convert it to uint8\)",
    ),
    "a list as observation": (lambda: act([0.0]), r"obs is \[float32\[\]\], but must be float32\[1\]"),
    "a complex observation": (lambda: act(np.zeros(1, complex)), r"obs is complex64.*convert it to float32"),
    "a number as key of act": (lambda: act(jnp.zeros(1), 3), "key=3 must be a random key"),
    "another memory": (lambda: act(jnp.zeros(1), None, jnp.zeros(4)), r"memory is float32\[4\], but must be \(\)"),
    "a state to act": (
        lambda: make().act(state(), jnp.zeros(1)),
        r"policy=TrainState.* must be a Policy \(give its .policy\)",
    ),
    "policies of a batch": (
        lambda: jax.eval_shape(make().act, starts().policy, jnp.zeros(1)),
        r"policy holds one policy per run, \[R, ...\], but this PPO is of one run",
    ),
    "a policy of one run for a batch": (
        lambda: many().act(state().policy, jnp.zeros((3, 1))),
        "policy is of one run, but this PPO is batched .what belongs to one run goes to the PPO that is not batched",
    ),
    "one observation for a batch": (
        lambda: jax.eval_shape(many().act, starts().policy, jnp.zeros(1)),
        r"obs has shape \(1,\), but must be \[R, ...\] with R = 3 runs",
    ),
    "a policy before the key": (lambda: evaluate(state().policy, KEY), "key=Policy.* must be a random key"),
    "a state to evaluate": (lambda: evaluate(KEY, state()), r"policy=TrainState.* must be a Policy"),
    "no episodes": (lambda: evaluate(KEY, state().policy, num_episodes=0), "num_episodes=0 must be at least 1"),
    "no steps": (lambda: evaluate(KEY, state().policy, max_steps=0), "max_steps=0 must be at least 1"),
    "a number as environment parameters": (
        lambda: evaluate(KEY, state().policy, 128),
        r"env_params=int32\[\] must have the structure of those of walk",
    ),
    # networks
    "a network that returns logits": (
        lambda: with_module(lambda distribution, value: (distribution.logits, value)),
        r"must return a distribution .*the first is an array \[2, 2, 2\].*pjp.Categorical",
    ),
    "a network that returns the value first": (
        lambda: with_module(lambda distribution, value: (value, distribution)),
        "must return a distribution and then the value",
    ),
    "a network that returns one thing": (
        lambda: with_module(lambda distribution, value: distribution),
        r"must return the pair \(distribution, value \[B\]\), not a Categorical",
    ),
    "a network that returns three things": (
        lambda: with_module(lambda distribution, value: (distribution, value, value)),
        "must return a memory, a distribution and a value, not 4 values",
    ),
    "a value with an axis too many": (
        lambda: with_module(lambda distribution, value: (distribution, value[..., None])),
        r"values \[T, B\] = \(2, 2\), not \(2, 2, 1\) \(drop the last axis",
    ),
    "dropout": (lambda: normalized(partial(nn.Dropout, 0.5, deterministic=False)), "leave out Dropout and BatchNorm"),
    "batch normalisation": (
        lambda: normalized(partial(nn.BatchNorm, use_running_average=False)),
        "leave out Dropout and BatchNorm.*LayerNorm",
    ),
    "batch normalisation of nnx": (
        lambda: api.from_nnx(lambda rngs: OfNNX(rngs, lambda rngs: nnx.BatchNorm(1, rngs=rngs))),
        "the module holds BatchStat, but may only hold nnx.Param .*leave out",
    ),
    "dropout of nnx": (
        lambda: api.from_nnx(lambda rngs: OfNNX(rngs, lambda rngs: nnx.Dropout(0.5, rngs=rngs))),
        "the module holds RngCount, RngKey, but may only hold nnx.Param",
    ),
    "a module of nnx as network": (
        lambda: api.make_ppo(WALK, CONFIG, network=OfNNX(nnx.Rngs(0))),
        r"^network=.{1,60} must be a Network, .*from_nnx\(build\)",
    ),
    "a module of nnx as its builder": (
        lambda: api.from_nnx(OfNNX(nnx.Rngs(0))),
        r"build=OfNNX\(...\) is a module; .*from_nnx\(lambda rngs: MyModule\(rngs\)\)",
    ),
    "a network that fails when traced": (
        lambda: with_module(lambda distribution, value: distribution.logit),
        r"cannot be applied to observations .*no attribute 'logit' \(test_misuse.py, line \d+\)",
    ),
    "a class of modules": (lambda: api.make_ppo(WALK, CONFIG, network=nn.Dense), "network=<class.* an instance of it"),
    # transforms
    "batched twice": (lambda: api.batched(many()), "batched takes the PPO of one run.*leave out"),
    "sharded of batched": (lambda: api.sharded(many()), r"sharded takes the PPO of one run .*batched\(sharded\(ppo"),
    "evolving of batched": (lambda: api.evolving(many(), every=1), "evolving takes the PPO of one run.*leave out"),
    **{
        f"{name} of a name": (
            lambda name=name: getattr(api, name)("CartPole-v1", **{"every": 1} if name == "evolving" else {}),
            r"ppo='CartPole-v1' must be a PPO \(as make_ppo returns it",
        )
        for name in ("batched", "sharded", "evolving", "adaptive_learning_rate")
    },
    "a name as devices": (lambda: api.sharded(make(), "cpu"), "devices='cpu' must be a number, or a list"),
    "half a device": (lambda: api.sharded(make(), 1.5), "devices=1.5 must be a whole number"),
    "the step before the PPO": (
        lambda: api.with_step(lambda ppo, state: ppo.step(state), make()),
        r"ppo=<function.* must be a PPO \(with_step\(ppo, step\)\)",
    ),
    "a step without its PPO": (
        lambda: api.with_step(make(), lambda state: make().step(state)),
        r"step=<lambda>\(state\) must be a function \(ppo, state\) -> state, metrics",
    ),
    "a step with its arguments the other way round": (
        lambda: api.with_step(make(), lambda state, ppo: ppo.step(state)),
        r"step=<lambda>\(state, ppo\) must be a function \(ppo, state\) -> state, metrics",
    ),
    "a complex metric of a step": (lambda: with_metric(x=1j), "metric 'x' of step is complex"),
    "an init with other arguments": (
        lambda: api.with_step(make(), lambda ppo, state: ppo.step(state), lambda key: None),
        r"init=<lambda>\(key\) must be a function \(ppo, key, hyperparams, env_params\)",
    ),
    **{
        f"a step that reports {name}": (
            lambda name=name: with_metric(**{name: 0.0}),
            f"metric '{name}' .* under a free name",
        )
        for name in ("evaluation_return", "failure", "failed_metric", "updates")
    },
    "fit of a batch whose step reports failure": (
        lambda: api.fit(failing_batch(), zeros(starts())),
        "metric 'failure' .* under a free name",
    ),
    "a metric of a step in a metric": (lambda: with_metric(kl={"mean": 0.0}), "metric 'kl' of step is {'mean'"),
    "concatenating single runs": (lambda: api.concatenate(state(), state()), "needs states with a leading axis R"),
    "concatenating a list": (
        lambda: api.concatenate([state()]),
        r"state=\[.* must be a TrainState",
    ),
    "concatenating nothing": (lambda: api.concatenate(), "concatenate needs at least one batch"),
    "a number of runs as values": (
        lambda: api.runs(KEY, 8),
        "values=8 must be a table or a dictionary .*num_seeds=",
    ),
    "a seed as key of runs": (lambda: api.runs(0), "key=0 must be a random key"),
    "another hyperparameter of a state": (
        lambda: api.with_hyperparams(state(), rate=1e-3),
        "rate is not a hyperparameter .did you mean learning_rate",
    ),
    "a number as key of sample": (
        lambda: api.sample(0, 4, clip=api.uniform(0.1, 0.3)),
        r"key=0 must be a random key, such as jax.random.key\(0\)",
    ),
    **{
        f"a time limit of {limit!r}": (
            lambda limit=limit: api.time_limit(WALK, limit),
            f"^max_steps={limit!r} must be {words}",
        )
        for limit, words in [
            (0, "at least 1"),
            (-1, "at least 1"),
            (True, "a whole number"),
            (2.5, "a whole number"),
            ("500", "a whole number"),
            (10**12, "at most 2147483647"),
        ]
    },
    "a time limit of a name": (lambda: api.time_limit("CartPole-v1", 5), "env='CartPole-v1' must be an Env .make_env"),
    **{
        f"{function.__name__} of a name": (
            lambda function=function: function("CartPole-v1"),
            r"sweep='CartPole-v1' must be a Sweep \(such as Sweep\('CartPole-v1', grid",
        )
        for function in (api.plan_sweep, api.run_sweep, api.successive_halving)
    },
    "a table before its environment": (
        lambda: api.Sweep(api.grid(clip=[0.1, 0.2]), "CartPole-v1"),
        r"env=Table.* is a table \(the environment comes first: Sweep\(env, table\)",
    ),
    "bounds that are text": (lambda: api.log_uniform("1e-4", 1e-2), "low='1e-4' must be a number below high=0.01"),
    **{
        f"a sweep over {name}": (
            lambda name=name: api.Sweep(WALK, api.grid(**{name: [1, 2]})),
            rf"{name} is not a field of a sweep \({words}\)",
        )
        for name, words in [
            *((name, r"did you mean widths\?") for name in ("hidden", "layers", "hidden_sizes")),
            ("depth", "Config and Hyperparams have the names"),
        ]
    },
    "a dictionary as config of a sweep": (
        lambda: api.Sweep(WALK, config={"num_envs": 2}),
        r"config={'num_envs': 2} must be a Config \(write Config\(\*\*config\)",
    ),
    "a dictionary as hyperparameters of a sweep": (
        lambda: api.Sweep(WALK, hyperparams={"clip": 0.1}),
        "hyperparams={'clip': 0.1} must be Hyperparams .such as",
    ),
    "an episode that is greedy by a word": (
        lambda: api.record_episode(make(), state().policy, KEY, greedy="no"),
        "greedy='no' must be True or False",
    ),
    "an episode of another environment's parameters": (
        lambda: api.record_episode(make(), state().policy, KEY, {"length": 0.5}),
        "env_params=.* must have the structure of those of walk",
    ),
    "an adaptive rate below text": (
        lambda: api.adaptive_learning_rate(make(replace(CONFIG, num_epochs=2)), highest="1"),
        "highest='?1'? must be a number",
    ),
    # fit and compile_training, which refuse before they compile
    **{
        f"{function.__name__} with the state first": (
            lambda function=function: function(state(), make()),
            r"ppo=TrainState.* must be a PPO \(give the PPO first, then its state\)",
        )
        for function in (api.fit, api.compile_training)
    },
    "fit of a batch by one": (lambda: api.fit(make(), zeros(starts())), "state holds 3 runs, but this PPO is of one"),
    "fit of one by a batch": (lambda: api.fit(many(), state()), "needs states with a leading axis R"),
    "fit of a key": (lambda: api.fit(make(), KEY), "state=.* must be a TrainState .from ppo.init"),
    "fit of shapes": (lambda: api.fit(make(), start()), "state.key is a shape, not an array"),
    "fit with a sink alone": (
        lambda: api.fit(make(), state(), sinks=print),
        r"sinks=<built-in function print> must be a list of functions",
    ),
    "fit with the name of a sink": (
        lambda: api.fit(make(), state(), sinks=["csv"]),
        r"sinks=\['csv'\] must be a list of functions, such as \[pjp.sinks",
    ),
    "fit with a negative interval": (lambda: api.fit(make(), state(), save_every=-1), "save_every=-1 must be"),
    "fit with two intervals": (lambda: api.fit(make(), state(), save_every=[1, 2]), r"save_every=\[1, 2\] must be one"),
    **{
        f"a sweep saved every {seconds!r}": (
            lambda seconds=seconds: api.run_sweep(api.Sweep(WALK), save_every=seconds),
            f"save_every='?{seconds}'? must be a number",
        )
        for seconds in ("60", float("nan"), -1)
    },
    "fit with slices of nothing": (lambda: api.fit(make(), state(), slice_size=0), "slice_size=0 must be at least 1"),
    "fit with a function as program": (
        lambda: api.fit(make(), state(), program=make().train),
        r"program=<function.* must be a Program \(from compile_training",
    ),
    "compile_training of a batch by one": (
        lambda: api.compile_training(make(), starts()),
        "state holds 3 runs, but this PPO is of one",
    ),
    "compile_training of another num_envs": (
        lambda: api.compile_training(make(), start_of(make(replace(CONFIG, num_envs=4)))),
        "state has 4 environments, but num_envs=2",
    ),
    # trained agents
    "agents that are a folder": (
        lambda: api.evaluate_agents("runs/mine"),
        r"agents='runs/mine' must be .* \(from load_agents\(folder\)\)",
    ),
    "a folder after the PPO": (lambda: api.load(make(), "runs/mine"), "folder=PPO on walk .* must be a path"),
    "a name as PPO of a folder": (
        lambda: api.load_agents("runs/mine", "CartPole-v1"),
        "ppo='CartPole-v1' must be a PPO",
    ),
    "an export without its PPO": (
        lambda: api.export(state().policy, "policy.npz", "policy.npz"),
        "ppo=Policy .* must be a PPO .agents.ppo",
    ),
    "an export of a state": (
        lambda: api.export(make(), state(), "policy.npz"),
        "policy=TrainState .* must be a Policy .such as agents.policy",
    ),
    "an export into a folder that is not there": (
        lambda: api.export(make(), state().policy, "/nowhere/policy.npz"),
        "path=/nowhere/policy.npz cannot be written: No such file .*name another path",
    ),
    "an export with incomplete parameters": (
        lambda: api.export(make(), state().policy, "policy.npz", {"stride": 0.5}),
        r"env_params=.* must have the structure of those of walk: \['size'\] is missing",
    ),
    "a number as folder of compiled programs": (lambda: api.cache_compilation(3), "folder=3 must be a path, such as"),
    "a sweep into a folder that cannot be": (
        lambda: api.run_sweep(api.Sweep(WALK, config=CONFIG), "/dev/null/x"),
        "^folder=/dev/null/x cannot be written: Not a directory .name another folder",
    ),
    "an export of a batch": (
        lambda: api.export(many(), zeros(starts()).policy, "policy.npz"),
        "ppo is batched, but one agent is asked for",
    ),
    "an episode of another network": (
        lambda: api.record_episode(make(), zeros(start_of(make(wide))).policy, KEY),
        "policy.params belongs to another network",
    ),
    "an episode with a seed": (lambda: api.record_episode(make(), state().policy, 0), "key=0 must be a random key"),
    "first_state without a PPO": (
        lambda: api.first_state(KEY),
        r"ppo=.* must be a PPO \(first_state\(ppo, key",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_use_is_refused_in_a_sentence_with_the_remedy(name):
    misuse, words = CASES[name]
    with pytest.raises(ValueError) as error:
        misuse()
    message = str(error.value)
    assert re.search(words, message), message
    assert len(message) < 320 and "\n" not in message


def test_keys_of_the_older_kind_are_taken_too():
    old = jax.random.PRNGKey(7)
    np.testing.assert_array_equal(jax.random.key_data(as_key(old)), jax.random.key_data(jax.random.key(7)))
    assert jax.eval_shape(make().init, old).key.dtype == KEY.dtype
    assert jax.eval_shape(many().init, jax.random.split(old, 3)).key.shape == (3,)


def test_environment_parameters_get_the_types_of_the_environment():
    params = jax.eval_shape(lambda: make().init(KEY, HYPERPARAMS, {"stride": 1, "size": 4})).env_params
    assert (params["stride"].dtype, params["size"].dtype) == (jnp.float32, jnp.int32)


def test_everything_prints_in_a_few_lines():
    shown = [make(), many(), state(), state().policy, make().network, WALK, jax.eval_shape(population().init, KEYS)]
    assert all(len(text.splitlines()) <= 10 and len(text) < 700 for text in map(repr, shown))
    assert repr(state().policy).splitlines()[0] == "Policy"
    assert "  num_updates  int32[]" in repr(state()).splitlines()
    assert repr(WALK).startswith("Env 'walk': actions Discrete(2)")
    pendulum = pjp.make_env("Pendulum-v1")
    assert "actions Box(-2.0, 2.0, (1,), float32), observations Box(-inf, inf, (3,)," in repr(pendulum)
    assert repr(pendulum._replace(observation_space=None)) == repr(pendulum)
    assert "actions unknown (ZeroDivisionError)" in repr(pendulum._replace(action_space=lambda params: 1 / 0))
    assert repr(pjp.Box(np.zeros((2, 3)), np.ones((2, 3)), (2, 3))) == "Box(0.0, 1.0, (2, 3), float32)"
    assert repr(pjp.Box(np.arange(2), 3, (2,))) == "Box([0 1], 3, (2,), float32)"
    traced = jax.eval_shape(lambda x: jnp.zeros(len(repr(pjp.Box(x, 1.0, (2,))))), jnp.zeros(2))  # as in a program
    assert traced.shape[0] < 99
    assert repr(pjp.privileged({"a": pjp.Discrete(2)})) == "{'a': privileged(Discrete(2))}"
