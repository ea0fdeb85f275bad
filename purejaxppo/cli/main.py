"""The command `purejaxppo`: calls the function of each command, and answers bad input with one sentence."""

import importlib
import re
import sys
import warnings

# Command -> the module here that has it, as a function of the same name.
COMMANDS = {
    "train": "train", "resume": "train", "sweep": "sweep", "plot": "sweep", "evaluate": "agents", "render": "agents",
    "export": "agents", "show": "agents", "bench": "bench", "envs": "bench",
}  # fmt: skip
# Arguments of the library that have another name here.
FLAGS = {"folder": "out", "path": "out"}

USAGE = """usage: purejaxppo COMMAND ...

  purejaxppo train ENV [flags]   train one agent or many, by the preset of the environment
  purejaxppo resume RUN          continue a run that was interrupted or killed, or extend one
  purejaxppo sweep ENV [flags]   train many settings with several seeds each, rank and plot them
  purejaxppo plot FOLDER         redraw the plots of a sweep or of a run
  purejaxppo evaluate FOLDER     play whole episodes with trained agents, also in Gymnasium (--in gymnasium)
  purejaxppo render FOLDER       draw an episode as a GIF
  purejaxppo export FOLDER       write an agent as one file that acts without this package
  purejaxppo show FOLDER         print what a run or a sweep is and what made it
  purejaxppo bench ENV [flags]   measure compile time, steps per second, memory, and the time of each stage
  purejaxppo envs                list the environments with their presets
  purejaxppo COMMAND --help      all flags of a command
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 2, with one sentence on standard error, for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if command not in COMMANDS:
        return _refuse(f"unknown command {command!r} (known: {', '.join(COMMANDS)})")
    run = getattr(importlib.import_module(f"purejaxppo.cli.{COMMANDS[command]}"), command)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return run(rest)
    except ValueError as error:
        return _refuse(_name_flags(str(error), rest))
    except KeyboardInterrupt:
        return _refuse("interrupted", status=130)


def _name_flags(sentence: str, arguments: list[str]) -> str:
    """The sentence of an error with flags in place of the library's arguments, unless the caller wrote those."""
    written = {"env", *re.findall(r"(?<!-)\b(\w+)=", " ".join(a for a in arguments if not a.startswith("--")))}

    def flag(match: re.Match) -> str:
        name, value = str(match[1]), str(match[2])
        if name in written:
            return str(match[0])
        kebab = FLAGS.get(name, name).replace("_", "-")
        return {"True": f"--{kebab}", "False": f"--no-{kebab}"}.get(value, f"--{kebab}={value}")

    return re.sub(r"(?<![\w.{'\"-])([a-z]\w*)=(True\b|False\b|[^\s=])", flag, sentence)


def _refuse(sentence: str, status: int = 2) -> int:
    print(f"purejaxppo: {sentence}", file=sys.stderr)
    return status


def _warn(message, category, *_args, **_kwargs):
    if category is UserWarning:
        print(f"purejaxppo: warning: {message}", file=sys.stderr)
