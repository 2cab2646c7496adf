"""What the commands share: every error that a person can mend ends in one sentence and exit status 1."""

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging

from hast_jax import parallel
from hast_jax.errors import UserError

PROCESSES = flags.DEFINE_string(
    "processes", "", "Several processes, one run: auto (Slurm, TPU, MPI), or HOST:PORT,NUMBER,INDEX with process 0's address."
)
CAUSES = {
    errno.ENOSPC: "the disk is full: make room and run the same command again, it goes on where it was",
    errno.EDQUOT: "the disk quota is used up: make room and run the same command again, it goes on where it was",
    errno.EACCES: "no permission",
    errno.EROFS: "the file system is read-only",
}


def join(together: bool = True) -> None:
    """Join the other processes, where there are some. The first thing that a command does.

    together: whether this command knows how to work in several processes. Raises UserError where it does not and is asked to.
    """
    if PROCESSES.value and not together:
        raise UserError("this command works in one process: leave out --processes.")
    if PROCESSES.value:
        parallel.join(PROCESSES.value)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn `UserError`, and what the disk refuses, into one sentence on stderr and exit status 1."""
    try:
        yield
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in CAUSES:
            raise
        _fail(f"{error.filename or 'a file of the run'}: {CAUSES[error.errno]}.")
    except jax.errors.JaxRuntimeError as error:
        if parallel.process_count() == 1:
            raise
        parallel.leave_broken(error)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it was.")


def run(main: Callable[[list[str]], Any]) -> None:
    """`app.run` with one-sentence errors for flags and config files too."""
    # What goes wrong in a library reaches us as an exception; its log would only hide our sentence.
    absl_logging.set_verbosity(absl_logging.FATAL)
    with user_errors():
        app.run(main, flags_parser=_parse)


def _parse(args: list[str]) -> list[str]:
    try:
        return flags.FLAGS(args)
    except flags.Error as error:
        raise UserError(str(error)) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the config cannot be built: {error}") from error
    except OSError as error:
        raise UserError(f"the config file cannot be read: {error}") from error


def _fail(message: str) -> None:
    print(f"hast_jax: {message}", file=sys.stderr)
    sys.exit(1)
