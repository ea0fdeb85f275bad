"""What the commands that train have in common: flags made from `Config` and `Hyperparams`, on top of a preset."""

import datetime
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from purejaxppo.config import Config, Hyperparams


@dataclass(frozen=True)
class Settings:
    """What every command that trains takes. Flags that are not given come from the preset of the environment."""

    env: tyro.conf.Positional[str]
    """A name that `purejaxppo envs` lists."""
    compile_cache: Path | None = None
    """Folder that keeps compiled programs for the next time."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)
    hyperparams: tyro.conf.OmitArgPrefixes[Hyperparams] = field(default_factory=Hyperparams)


def prepare_cpu(arguments: list[str]):
    """Does what flags ask of a CPU, before all else: even to look an environment up has JAX begin to compute."""
    from purejaxppo.experiment.program import cores_as_devices, use_one_thread

    flags = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    if "--num-devices" in flags:
        cores_as_devices()
    if "--one-thread" in flags:
        try:
            use_one_thread()
        except RuntimeError as error:
            raise ValueError(str(error)) from None


def parse(kind, command: str, arguments: list[str]):
    """The flags of a command on top of the preset of the environment, which comes first."""
    from purejaxppo.envs import env_names, make_env
    from purejaxppo.experiment.presets import preset

    env, asks_help = arguments[0] if arguments else "-", {"--help", "-h"} & set(arguments)
    if env.startswith("-"):
        if not asks_help:
            raise ValueError(
                f"name an environment first: purejaxppo {command} ENV [flags] (`purejaxppo envs` lists them)"
            )
        env = "CartPole-v1"
    elif env not in env_names():
        make_env(env)
    return tyro.cli(kind, args=arguments, default=kind(env, **preset(env)._asdict()), prog=f"purejaxppo {command}")


def check_whole(**least):
    """Refuses a number below its least, or too large for a key; each is given as (number, least)."""
    for name, (number, low) in least.items():
        if not low <= number < 2**31:
            raise ValueError(f"{name}={number} must be from {low} to 2**31 - 1")


def complete(options, name: str):
    """Options with the number of updates that `total_steps` asks for, and a folder."""
    if options.total_steps is not None:
        options = replace(options, config=options.config.with_total_steps(options.total_steps))
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return options if options.out else replace(options, out=Path("runs") / f"{name}-{time}")


def make(options):
    """The PPO of the options, refused now if anything in them does not fit."""
    import jax

    from purejaxppo.experiment.program import cache_compilation
    from purejaxppo.ppo import make_ppo

    if options.compile_cache is not None:
        cache_compilation(options.compile_cache)
    ppo = make_ppo(options.env, options.config)
    jax.eval_shape(lambda key: ppo.init(key, options.hyperparams), jax.random.key(0))
    return ppo
