"""What the commands share: every error that a person can mend ends in one sentence and exit status 1."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging

from hast_jax.errors import UserError, refused_by_disk
from hast_jax.runs import parallel

PROCESSES = flags.DEFINE_string(
    "processes", "", "Several processes, one run: auto (Slurm, TPU, MPI), or HOST:PORT,NUMBER,INDEX with process 0's address."
)
OUT_OF_MEMORY = (
    "the memory of a device is too small ({words}): set --config.synthesis.stack=1, --config.synthesis.remat=True with a small "
    "synthesis.micro_batch, --config.finetune.stream=True or a smaller finetune.batch or eval.batch."
)


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
        refused = refused_by_disk(error)
        if refused is None:
            raise
        _fail(str(refused))
    except jax.errors.JaxRuntimeError as error:
        words = str(error).split("\n")[0][:200]
        if "RESOURCE_EXHAUSTED" in words:
            _fail(OUT_OF_MEMORY.format(words=words))
        if parallel.process_count() == 1:
            raise
        parallel.leave_broken(words)
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
