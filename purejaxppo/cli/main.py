"""The command `purejaxppo`: calls the function of each command, and answers bad input with one sentence."""

import difflib
import errno
import importlib
import os
import re
import signal
import sys
import warnings
from dataclasses import fields
from typing import Any

from purejaxppo import __version__
from purejaxppo.config import Config, Hyperparams
from purejaxppo.table import PLUGGED
from purejaxppo.text import printable

# Command -> the module here that has it, as a function of the same name.
COMMANDS = {
    "train": "train", "resume": "train", "sweep": "sweep", "search": "search", "plot": "sweep", "evaluate": "agents",
    "render": "agents", "export": "agents", "show": "agents", "report": "report", "bench": "bench", "envs": "bench",
}  # fmt: skip

# What the system says of a disk that takes no more.
NO_WRITING = {errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}

INTERRUPTED = 130

USAGE = """usage: purejaxppo COMMAND ...

  purejaxppo train ENV [flags]   train one agent or many, by the preset of the environment
  purejaxppo resume RUN          continue a run that was interrupted or killed, or extend one
  purejaxppo sweep ENV [flags]   train many settings with several seeds each, rank and plot them
  purejaxppo search ENV [flags]  look for the best setting by successive halving, a population, or Optuna
  purejaxppo plot FOLDER         redraw the plots of a sweep or of a run
  purejaxppo evaluate FOLDER     play whole episodes with trained agents, also in Gymnasium (--in gymnasium)
  purejaxppo render FOLDER       draw an episode as a GIF
  purejaxppo export FOLDER       write an agent as one file that acts without this package
  purejaxppo show FOLDER         print what a run or a sweep is and what made it
  purejaxppo report FOLDER       write one page of HTML on a run or a sweep, with interactive plots
  purejaxppo bench ENV [flags]   measure compile time, steps per second, memory, and the time of each stage
  purejaxppo envs [SUITE]        list the environments with their presets, and the suites
  purejaxppo COMMAND --help      all flags of a command
  purejaxppo --version           the version

exit status: 0, or 2 for bad input, 3 if results could not be written, 4 if every agent turned nan, 5 if a process of
--distributed was lost, 130 after an interrupt
"""


def script():
    """The command as a process of its own. SIGTERM interrupts as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if any(word.partition("=")[0] == "--distributed" for word in sys.argv):
        from purejaxppo.cli.distributed import run

        status = run(main, sys.argv[1:])
    else:
        status = main()
    sys.stderr.flush()
    if status == INTERRUPTED:
        os._exit(status)  # XLA may still be compiling in a thread, which aborts the process that Python exits
    sys.exit(status)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status, with one sentence on standard error if it is not 0.

    2 stands for bad input, 3 for results that could not be written, 4 if every agent turned nan, 130 for an interrupt,
    and 141 if nobody reads the output any more.
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as in `purejaxppo envs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        return 128 + 13  # that of a program that SIGPIPE ends


def _run(arguments: list[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"purejaxppo {__version__}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
        return _refuse(f"unknown command {command!r} ({remedy})")
    options = None
    try:
        module = importlib.import_module(f"purejaxppo.cli.{COMMANDS[command]}")
        run, options = getattr(module, command), getattr(module, f"{command.capitalize()}Options", None)
        from purejaxppo.cli.options import WHOLE_NUMBERS

        with WHOLE_NUMBERS, warnings.catch_warnings():
            warnings.showwarning = _warn
            return run(rest)
    except ValueError as error:
        return _refuse(name_flags(str(error), options, rest))
    except OSError as error:
        if error.errno not in NO_WRITING:
            raise
        from purejaxppo.cli.options import NOT_SAVED

        return _refuse(f"{error.filename or 'the results'} cannot be written: {error.strerror}", status=NOT_SAVED)
    except KeyboardInterrupt:
        return _refuse("interrupted", status=INTERRUPTED)


def name_flags(sentence: str, options: Any, arguments: list[str]) -> str:
    """The sentence of an error with flags in place of the arguments of the library.

    The first word is translated if the command has such a flag. The others are if all are settings of the algorithm,
    as in a sentence about two of them, or in a remedy. What the caller wrote as `name=value` stays.

    Args:
        sentence: of a ValueError.
        options: the dataclass of the command's flags, or None.
        arguments: what the caller wrote.
    """
    own = {field.name for field in fields(options)} - {"folder"} if options else set()
    nested = {"plugged": set(PLUGGED), "acting": {"env", "network"}}
    own = own.union(*(names for name, names in nested.items() if name in own))
    algorithm = {field.name for kind in (Config, Hyperparams) for field in fields(kind)} if "config" in own else set()
    has_folder = bool(options) and "folder" in options.__dataclass_fields__  # an argument without a flag
    renamed = {"path": "out", **({} if has_folder else {"folder": "out"})} if "out" in own else {}
    positional = {"env"} if "config" in own else set()
    written = {*positional, *re.findall(r"(?<!-)\b(\w+)=", " ".join(a for a in arguments if not a.startswith("--")))}

    def flag(match: re.Match) -> str:
        name, value = str(match[1]), str(match[2])
        kebab = renamed.get(name, name).replace("_", "-")
        return {"True": f"--{kebab}", "False": f"--no-{kebab}"}.get(value, f"--{kebab}={value}")

    if "allow_changed" in own:
        words = re.compile(r"allow_changed=\[(.*?)\]")
        sentence = words.sub(lambda match: f"--allow-changed {re.sub('[^a-z_ .]', '', match[1])}", sentence)
    elif "acting" in (options.__dataclass_fields__ if options else ()):
        remedy = "(give what it was trained with, by --env or --network)"
        sentence = re.sub(r"\(give the PPO that was trained as ppo=.*\)", remedy, sentence)
    first = re.match(r"(\w+)=", sentence)
    if not first or first[1] in written or first[1] not in own | algorithm | renamed.keys():
        return sentence
    if first[1] not in algorithm:
        return re.sub(r"^(\w+)=(\S)", flag, sentence)
    return re.sub(rf"\b({'|'.join(algorithm - written)})=(True\b|False\b|\S)", flag, sentence)


def _refuse(sentence: str, status: int = 2) -> int:
    _say_once("purejaxppo:", sentence)
    return status


def _warn(message, category, *_args, **_kwargs):
    if category is UserWarning:
        _say_once("purejaxppo: warning:", str(message))


def _say_once(beginning: str, sentence: str):
    """Prints a sentence on standard error, unless another process of this command has done so."""
    from purejaxppo.experiment.distributed import is_news

    if is_news(sentence):
        print(beginning, *map(printable, sentence.split("\n")), file=sys.stderr)
