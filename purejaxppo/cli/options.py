"""What the commands that train share: flags made from `Config` and `Hyperparams`, on top of a preset."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import tyro

from purejaxppo.checks import check_whole
from purejaxppo.cli.distributed import first_speaks
from purejaxppo.cli.plugged import Plugged, make_plugged
from purejaxppo.config import Config, Hyperparams, nearest
from purejaxppo.ppo import PPO
from purejaxppo.text import printable

Options = TypeVar("Options", bound="TrainingOptions")
WHOLE_NUMBERS = tyro.constructors.ConstructorRegistry()  # active in a `with` statement
NOT_SAVED = 3  # the exit status if results could not be written
ALL_FAILED = 4  # the exit status if every agent turned nan


@dataclass(frozen=True)
class TrainingOptions:
    """Flags of every command that trains; those that are not given come from the preset of the environment."""

    env: tyro.conf.Positional[str]
    """A name that `purejaxppo envs` lists, or module:name of an environment."""
    compile_cache: str | None = None
    """Folder that keeps compiled programs for later commands, or off; by default one in the user's cache folder."""
    deterministic: bool = False
    """Have a GPU compute the same bits in every run; without, results agree to rounding. A CPU does so anyway."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)
    hyperparams: tyro.conf.OmitArgPrefixes[Hyperparams] = field(default_factory=Hyperparams)
    plugged: tyro.conf.OmitArgPrefixes[Plugged] = field(default_factory=Plugged)


@WHOLE_NUMBERS.primitive_rule
def _read_whole_number(
    type_info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Flags of whole numbers take 100000 also as 1e5 and as 100_000."""
    if type_info.type is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="INT", instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda value: isinstance(value, int), str_from_instance=lambda number: [str(number)],
    )  # fmt: skip


def whole_number(text: str) -> int:
    """A whole number from its text. Raises ValueError for any other text."""
    try:
        number = float(text) if "e" in text.lower() else int(text)
    except ValueError:
        number = float("nan")
    if number % 1:  # nan of infinity
        raise ValueError(f"{text!r} is not a whole number, such as 100000, 100_000 or 1e5")
    return int(number)


def say(*lines: str):
    """Prints lines; whatever a file on disk puts into them, a terminal gets no control characters."""
    print(*map(printable, lines), sep="\n", flush=True)


def prepare_jax(arguments: list[str]):
    """Applies the flags that must come before JAX starts, which even looking up an environment does."""
    from purejaxppo.experiment.jax_setup import cores_as_devices, use_deterministic_kernels, use_one_thread

    flags = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    if "--num-devices" in flags:
        cores_as_devices()
    for flag, use in (("--one-thread", use_one_thread), ("--deterministic", use_deterministic_kernels)):
        if flag in flags:
            try:
                use()
            except RuntimeError as error:
                raise ValueError(str(error)) from None


def parse(kind: type[Options], command: str, arguments: list[str]) -> Options:
    """The options of a command, on top of the preset of its environment, which is the first argument."""
    from purejaxppo.envs import check_name
    from purejaxppo.experiment.presets import preset

    env, asks_help = arguments[0] if arguments else "-", {"--help", "-h"} & set(arguments)
    if env.startswith("-"):
        if not asks_help:
            raise ValueError(
                f"name an environment first: purejaxppo {command} ENV [flags] (`purejaxppo envs` lists them)"
            )
        env = "CartPole-v1"
    elif ":" not in env:
        check_name(env)
    default = kind(env) if ":" in env else kind(env, **preset(env)._asdict())
    with first_speaks():
        options, unknown = tyro.cli(
            kind, args=arguments, default=default, prog=f"purejaxppo {command}", return_unknown_args=True
        )
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise ValueError(f"{flag} is not a flag of purejaxppo {command} ({_suggest_flag(flag, kind)})")
    return options


def _suggest_flag(flag: str, kind: type[TrainingOptions]) -> str:
    """The remedy of a message about an unknown flag of the commands that train."""
    known = {option.name for group in (kind, Config, Hyperparams, Plugged) for option in fields(group)}
    known -= {"env", "config", "hyperparams", "plugged"}  # without flags of their own
    near = nearest(flag.strip("-").replace("-", "_"), sorted(known)).replace("_", "-")
    return f"did you mean --{near}?" if near else "--help lists them"


def check_counts(options: Any, *names: str, at_least: int = 1):
    """Refuses options that are not whole numbers from `at_least` to 2**31 - 1; None passes."""
    for name in names:
        if getattr(options, name) is not None:
            check_whole(name, getattr(options, name), at_least=at_least)


def check_num_devices(number: int | None, present: int | None = None):
    """Refuses more devices than are present, by default all that JAX has; None passes."""
    import jax

    present = jax.device_count() if present is None else present
    if number is not None and number > present:
        raise ValueError(f"num_devices={number} must be at most {present}, the number of devices (on a CPU: of cores)")


def complete(options: Any, arguments: list[str]) -> Any:
    """Options with the number of updates that `total_steps` implies. Refuses `arguments` that give both."""
    if options.total_steps is None:
        return options
    if any(argument.split("=")[0] == "--num-updates" for argument in arguments):
        raise ValueError(
            f"total_steps={options.total_steps} and --num-updates {options.config.num_updates} both say how long to "
            "train (leave one out)"
        )
    return replace(options, config=options.config.with_total_steps(options.total_steps))


def make_folder(name: str) -> Path:
    """Makes the default folder of a command, runs/NAME-TIME; commands that start at once get folders of their own."""
    from purejaxppo.experiment.files import make_new

    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return make_new(Path("runs") / f"{name.replace('/', '-').replace(':', '-')}-{time}")


def keep_programs(folder: str | None = None):
    """Keeps compiled programs for later commands, by default if it can; "off" uses none that are kept, either.

    Raises ValueError if a folder that the caller named cannot be used.
    """
    import jax

    from purejaxppo.experiment.jax_setup import cache_compilation

    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    try:
        cache_compilation(folder)
    except ValueError as error:
        if folder is not None:
            raise ValueError(str(error).replace("folder=", "compile_cache=", 1)) from None


def make(options: TrainingOptions) -> PPO:
    """Makes the PPO that the options describe. Raises ValueError if they do not fit together."""
    import jax

    keep_programs(options.compile_cache)
    ppo = make_plugged(options.env, options.config, options.plugged)
    jax.eval_shape(lambda key: ppo.init(key, options.hyperparams), jax.random.key(0))
    return ppo


def draw_without_screen():
    """Has matplotlib draw into files, whatever screen there is."""
    import matplotlib

    matplotlib.use("Agg")


def save_figures(figures: Mapping[str, Any], out: Path) -> list[str]:
    """Writes plots as NAME.png into a folder; returns the names of the files."""
    from purejaxppo.experiment.files import replace_file

    for name, figure in figures.items():
        replace_file(out / f"{name}.png", lambda half, figure=figure: figure.savefig(half, dpi=150, format="png"))
    return [f"{name}.png" for name in figures]
