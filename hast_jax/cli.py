"""What the commands share: their flags, and how they end with an error.

Every error that the user can mend ends a command with one sentence and exit status 1. A run that SIGTERM stopped ends with
exit status 75: it is not finished, and the same command resumes it.

A command is a module with a docstring, `define_flags()` and `main(arguments)`. If it takes words besides flags, it has the
constant TAKES_WORDS = True. Its flags are defined when the command runs, not when the module is imported, so that several
commands can be imported together.
"""

import functools
import importlib
import itertools
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from hast_jax import config as config_lib
from hast_jax import fields, paths
from hast_jax.errors import InputError, Notice, Stopped, UserError, refused_by_disk
from hast_jax.kinds import close, shown
from hast_jax.runs import processes

COMMANDS = {
    "quantize": "main",
    "evaluate": "evaluate",
    "export": "export",
    "reproduce": "reproduce",
    "benchmark": "benchmark",
    "report": "report",
    "results": "results",
    "pretrain": "pretrain",
}
REAL_IMAGES = ("dataset", "split", "data_dir", "crop", "class_order")  # fields of config.eval
STOPPED = 75  # exit status of a run that saved and stopped on SIGTERM: EX_TEMPFAIL of sysexits.h, "try again later"
ONE_PROCESS = "this command works in one process: leave out --processes."
UNAVAILABLE = "Configuration is not available because of an earlier failure to load: "  # ml_collections' words
OUT_OF_MEMORY = (
    "the memory of a device is too small ({words}): set --config.synthesis.stack=1, --config.synthesis.remat=True with a small "
    "synthesis.micro_batch, --config.finetune.stream=True or a smaller finetune.batch or eval.batch."
)


def run(command: ModuleType, arguments: list[str] | None = None) -> None:
    """Run a command. Wrong flags and config files end in one sentence too. arguments: by default those of the process."""
    # Errors of libraries arrive as exceptions. The libraries' logs would only hide our error message.
    absl_logging.set_verbosity(absl_logging.FATAL)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *rest: (
        f"hast_jax: {message}\n" if issubclass(category, Notice) else plain(message, category, *rest)
    )
    sys.excepthook = _print_uncaught
    sys.modules["__main__"].__doc__ = command.__doc__  # --help begins with it
    with user_errors():
        others = set(flags.FLAGS)
        command.define_flags()
        for name in set(flags.FLAGS) - others:  # --help shows only these flags
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
        words = getattr(command, "TAKES_WORDS", False)
        app.run(command.main, arguments, flags_parser=functools.partial(_parse, words=words))


def console_script() -> None:
    """`hast-jax COMMAND ...` is `python -m hast_jax.MODULE ...`."""
    name, *arguments = sys.argv[1:] or [""]
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"hast_jax: name a command: {known}; hast-jax COMMAND --help shows its flags.", file=sys.stderr)
        sys.exit(1)
    run(importlib.import_module(f"hast_jax.{COMMANDS[name]}"), [f"hast-jax {name}", *arguments])


def define_config(required: bool = True) -> None:
    """Define the flag of the config file."""
    config_flags.DEFINE_config_file("config", help_string=fields.help_text())
    if required:
        flags.mark_flag_as_required("config")


def define_workdir(help_text: str, default: str | None = None) -> None:
    """Define the flag of the run folder, which must not be empty, as the value of an unset variable of the shell is."""
    flags.DEFINE_string("workdir", default, help_text, required=default is None)
    flags.register_validator("workdir", lambda value: value != "", "--workdir is empty: name a folder")


def define_real_images() -> None:
    """Define a flag for each of `REAL_IMAGES`, which names other real images than those of the run."""
    for name in REAL_IMAGES:
        field = fields.FIELDS[f"eval.{name}"]
        define = flags.DEFINE_float if isinstance(field.default, float) else flags.DEFINE_string
        define(name, None, f"eval.{name}, if it is not the run's. {field.help}")


def real_images() -> dict[str, Any]:
    """The values of the flags of `define_real_images` that are given."""
    values = {name: flags.FLAGS[name].value for name in REAL_IMAGES}
    return {name: value for name, value in values.items() if value is not None}


def define_own_network() -> None:
    """Define the flags that name the user's code and weights, for a command that makes the network of a run folder."""
    flags.DEFINE_string("network", None, "FILE.py:NAME of your own network. Its code is run.")
    flags.DEFINE_string("names", None, "FILE.py:FUNCTION that names the weights (teacher.names). Its code is run.")
    flags.DEFINE_string("weights", None, "The teacher's weights (teacher.weights), if they have moved.")


def own_network() -> dict[str, str | None]:
    """The values of the flags of `define_own_network`."""
    return {name: flags.FLAGS[name].value for name in ("network", "names", "weights")}


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Let the module of a command be called as the library's function of the same name, such as `hast_jax.export`.

    Once the command is imported, the module takes the place of the function.
    """

    class Command(ModuleType):
        def __call__(self, *arguments: Any, **named: Any) -> Any:
            return function(*arguments, **named)

    sys.modules[module].__class__ = Command


def define_processes() -> None:
    """Define the flag by which several processes find each other, for a command that can work in several."""
    words = "For one run in several processes: auto (Slurm, TPU, MPI), or HOST:PORT,NUMBER,INDEX (address of process 0)."
    flags.DEFINE_string("processes", "", words)


def join() -> None:
    """Join the other processes of the run if --processes is given. A command calls this before it uses a device."""
    if flags.FLAGS.processes:
        processes.join(flags.FLAGS.processes)


@contextmanager
def user_errors(resumes: bool = False) -> Iterator[None]:
    """End the process with one sentence on stderr and exit status 1 if the block raises an error that the user can mend.

    These errors are `UserError`, errors of the disk (`refused_by_disk`), too little memory of a device, and an interrupt from
    the keyboard. `Stopped` ends the process with exit status 75. If several processes share a run, any other error of JAX's
    runtime ends this process (`leave_broken`). resumes: whether the command goes on where it was interrupted. If the
    environment variable HAST_JAX_DEBUG is set, the traceback comes first.
    """
    try:
        try:
            yield
        except Exception:
            if os.environ.get("HAST_JAX_DEBUG"):
                traceback.print_exc()
            raise
    except Stopped as stopped:
        print(f"hast_jax: {stopped}", file=sys.stderr)
        sys.exit(STOPPED)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        refused = refused_by_disk(error)
        if refused is None:
            raise
        _fail(str(refused))
    except jax.errors.JaxRuntimeError as error:
        words = str(error).split("\n")[0][:200]
        if "RESOURCE_EXHAUSTED" in words:
            _fail(OUT_OF_MEMORY.format(words=words))
        if processes.count() == 1:
            raise
        processes.leave_broken(words)
    except KeyboardInterrupt:
        _fail("interrupted: run the same command again to resume." if resumes else "interrupted.")


def shipped_config(path: str) -> str:
    """`path` if it is a file; otherwise the path of the package's config of this name.

    path: may have a variant after a colon, which is kept. Raises UserError if there is no such file.
    """
    name, colon, variant = path.partition(":")
    given = paths.local(name)
    if given.is_file():
        return f"{given}{colon}{variant}"
    here = Path(__file__).parent
    packaged = here / "configs"
    configs = packaged if packaged.is_dir() else here.parent / "configs"  # of a checkout
    found = configs / f"{given.stem}.py"
    if found.is_file() and str(given) in (given.stem, f"configs/{given.stem}.py"):
        return f"{found}{colon}{variant}"
    known = ", ".join(sorted(each.stem for each in configs.glob("*.py")))
    raise UserError(f"there is no config file {name!r}: give the path of one, or the name of a shipped config ({known}).")


def _parse(arguments: list[str], words: bool) -> list[str]:
    arguments = [_with_shipped_config(*each) for each in itertools.pairwise(["", *arguments])]
    arguments = _last_values(arguments)
    for argument in arguments:
        named = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if named:
            config_lib.check_name(named[1])
    try:
        left = flags.FLAGS(arguments)
        hasattr(getattr(flags.FLAGS, "config", None), "lock")  # raises the error of a config that could not be read
    except flags.Error as error:
        raise _wrong_flag(_last_line(error), [] if words else arguments[1:]) from error
    except BrokenPipeError:  # who reads the help has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        raise UserError(f"the config file cannot be read: {_last_line(error)}") from error
    except InputError as error:
        raise UserError(f"the config cannot be built: {_last_line(error)}") from error
    except Exception as error:  # whatever a config file does wrong
        line = _last_line(error)
        raise _unbuilt(line if re.match(r"\w+Error: ", line) else f"{type(error).__name__}: {line}") from error
    if len(left) > 1 and not words:
        advice = f"write --{left[1]}" if "=" in left[1] else "write its flag before it, as --FLAG=VALUE; --help shows the flags"
        raise UserError(f"the command does not take the word {left[1]!r}: {advice}.")
    return left


def _last_values(arguments: list[str]) -> list[str]:
    """The arguments without the values of fields that are given again later: tuples would grow.

    `--config.FIELD VALUE` becomes `--config.FIELD=VALUE`.
    """
    joined: list[str] = []
    for argument in arguments:
        open_field = re.fullmatch(r"--?config\.([\w.]+)", joined[-1]) if joined and "--" not in joined else None
        if open_field and open_field[1] in fields.FIELDS and not isinstance(fields.FIELDS[open_field[1]].default, bool):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    found = [re.match(r"--?config\.([\w.]+)=", argument) for argument in joined]
    names = [each and each[1] for each in found]
    return [each for place, each in enumerate(joined) if names[place] is None or names[place] not in names[place + 1 :]]


def _wrong_flag(words: str, arguments: list[str]) -> UserError:
    """The error of a flag. words: absl's, which take the place of ours where absl knows more.

    arguments: those of a command that takes no words.
    """
    if missing := re.match(r"flag --(\w+)=None: ", words):
        if len(arguments) == 1 and not arguments[0].startswith("-"):
            return UserError(f"--{missing[1]} is missing: write --{missing[1]}={arguments[0]}; --help shows the flags.")
        nothing = ", or its get_config returns nothing" if missing[1] == "config" else ""
        return UserError(f"--{missing[1]} is missing{nothing}: --help says what it takes.")
    if field := re.match(r"flag --config\.([\w.]+)=(.*?): ", words):
        if field[1] not in fields.FIELDS:
            inner = next(path for path in fields.FIELDS if path.startswith(f"{field[1]}."))
            return UserError(f"config.{field[1]} is a group of fields: set one of these, such as --config.{inner}.")
        return config_lib.refusal(field[1], field[2], fields.FIELDS[field[1]].kind())
    if "is defined twice" in words:
        return UserError("--config is given twice: give one config.")
    if re.match(r"\w+Error: ", words):
        return _unbuilt(words)
    return _wrong_flag_of_command(words)


def _wrong_flag_of_command(words: str) -> UserError:
    """The error of a flag that is no field of a config. words: absl's."""
    if unknown := re.match(r"Unknown command line flag '([^']*)'", words):
        if unknown[1] == "processes":
            return UserError(ONE_PROCESS)
        names = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
        return UserError(f"there is no flag --{unknown[1]}{close(unknown[1], names)}: --help shows the flags.")
    if missing := re.match(r"Missing value for flag --?([\w.]+)", words):
        return UserError(f"--{missing[1]} has no value: write --{missing[1]}=VALUE.")
    if wrong := re.match(r"flag --(\w+)=(.*?): (.*)", words):
        parser = flags.FLAGS[wrong[1]].parser
        wanted = parser.syntactic_help
        if isinstance(parser, flags.EnumParser):
            wanted = f"one of {', '.join(parser.enum_values)}"
        if isinstance(parser, flags.BooleanParser):
            wanted = "true or false"
        # A text may be anything, so its error comes from a validator, which has written its own sentence.
        words = f"--{wrong[1]} is {shown(wrong[2])}: it must be {wanted}." if wanted else f"{wrong[3]}."
    return UserError(words)


def _unbuilt(words: str) -> UserError:
    """The error of a config file whose code fails. words: the name and the message of its exception."""
    return UserError(f"the config cannot be built: {words}; HAST_JAX_DEBUG=1 shows the traceback.")


def _with_shipped_config(before: str, argument: str) -> str:
    """`argument`, in which the path of a config is that of `shipped_config`. before: the argument before it."""
    if before in ("--config", "-config"):
        return shipped_config(argument)
    flag, equals, path = argument.partition("=")
    return f"{flag}={shipped_config(path)}" if equals and flag in ("--config", "-config") else argument


def _print_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python, but without what Orbax's readers say after one of them has met a damaged file and ended their loop."""
    if str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _last_line(error: Exception) -> str:
    """The last line of an error message, into which ml_collections puts more than our reader needs."""
    line = str(error).strip().split("\n")[-1].strip()
    for more in (f"{InputError.__module__}.{InputError.__name__}: ", UNAVAILABLE):
        line = line.removeprefix(more)
    return line


def _say_nothing(_: object) -> None:
    """In place of a hook that prints an error."""


def _fail(message: str) -> None:
    processes.tell_failure(message)
    print(f"hast_jax: {message}", file=sys.stderr)
    # What libraries say of the same fault while the process ends, such as TensorBoard's writers on a full disk, would hide it.
    sys.unraisablehook, threading.excepthook = _say_nothing, _say_nothing
    processes.leave_if_alone()
    sys.exit(1)
