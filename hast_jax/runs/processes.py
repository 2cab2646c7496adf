"""The processes of a run: how they come together, which of them writes, and what they tell each other."""

import contextlib
import faulthandler
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hast_jax.errors import UserError, refused_by_disk
from hast_jax.runs.files import write_text

HEARTBEAT_SECONDS = 30  # JAX ends this process if another one gives no sign of life for so long
MAX_MESSAGE = 4096  # bytes of an error message that one process sends to the others
LOOK_SECONDS = 1  # between two looks at whether another process has failed
FAILURE = "failure.txt"  # in the run folder: why one of several processes ended

_failure: Path | None = None
_fails = False  # whether this process ends with an error
_all_fail = False  # whether the other processes raise the same error as this one


def join(processes: str) -> None:
    """Become one of several processes that work on one run; call it before `parallel.setup`.

    processes: "auto" on a Slurm, TPU or MPI cluster, which JAX recognises; or "HOST:PORT,NUMBER,INDEX": the address of process
    0, the number of processes, and the index of this one. Raises UserError for other texts, or if not all processes join.
    """
    options: dict[str, Any] = {}
    if processes != "auto":
        said = re.fullmatch(r"(.+:(\d{1,5})),(\d{1,5}),(\d{1,5})", processes)
        port, number, index = map(int, said.groups()[1:]) if said else (0, 0, 0)
        if said is None or not 0 < port < 2**16 or not index < number:
            wanted = "auto, or HOST:PORT,NUMBER,INDEX with an INDEX from 0 to NUMBER - 1, another one in each process"
            raise UserError(f"--processes is {processes!r}: it must be {wanted}.")
        options = {"coordinator_address": said[1], "num_processes": number, "process_id": index}
    faulthandler.disable()  # its pages of tracebacks would bury JAX's message that another process has died
    jax.config.update("jax_enable_preemption_service", False)  # it sometimes misses SIGTERM
    try:
        jax.distributed.initialize(**options, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=60)
    except (RuntimeError, ValueError) as error:
        words = str(error).split("\n")[0]
        raise UserError(
            f"the processes of --processes={processes} did not come together ({words}): check the address, and start all."
        ) from error


def is_main() -> bool:
    """Whether this is process 0, which alone writes results."""
    return index() == 0


def count() -> int:
    """How many processes work on this run."""
    return jax.process_count()


def on_main(action: Callable[[], Any]) -> None:
    """Run `action` in process 0 while the others wait. A UserError or an error of the disk is raised in all as UserError."""
    told: UserError | None = None
    if is_main():
        try:
            action()
        except UserError as error:
            told = error
        except OSError as error:
            told = refused_by_disk(error)
            if told is None:
                raise
            told.__cause__ = error
    if jax.process_count() > 1:
        message = _text(multihost_utils.broadcast_one_to_all(_bytes(str(told or ""))))
        told = told or (UserError(message) if message else None)
        _note_common_failure(told)
    if told is not None:
        raise told


@contextlib.contextmanager
def failing_as_one() -> Iterator[None]:
    """If any process raises a UserError in the block, all raise one after it. In the block no process may wait for another."""
    error = None
    try:
        yield
    except UserError as raised:
        error = raised
    if jax.process_count() > 1:
        messages = map(_text, multihost_utils.process_allgather(_bytes(str(error or ""))))
        for index, message in enumerate(messages):
            if message and error is None:
                error = UserError(f"process {index} of this run cannot start: {message}")
        _note_common_failure(error)
    if error is not None:
        raise error


def _bytes(message: str) -> np.ndarray:
    """The message in an array of a fixed size, which processes can exchange."""
    text, encoded = np.zeros(MAX_MESSAGE, np.uint8), np.frombuffer(message.encode()[:MAX_MESSAGE], np.uint8)
    text[: len(encoded)] = encoded
    return text


def _text(array: np.ndarray) -> str:
    return bytes(array).rstrip(b"\0").decode(errors="ignore")


def index() -> int:
    """The index of this process."""
    return jax.process_index()


def total(values: np.ndarray) -> np.ndarray:
    """The sum of a host array over all processes. Every process must call it."""
    if jax.process_count() == 1:
        return values
    return np.sum(multihost_utils.process_allgather(values), 0)


def require_same(values: dict[str, int]) -> None:
    """Raise UserError in every process if the values, below 2**32, differ between processes. Every process must call it."""
    if jax.process_count() == 1:
        return
    found = multihost_utils.process_allgather(np.asarray(list(values.values()), np.uint32))
    differing = [name for name, column in zip(values, found.T) if len(set(column.tolist())) > 1]
    if differing:
        error = UserError(
            f"the processes of this run do not have the same {', '.join(differing)}: give all the same command and files, "
            "on one file system, and start them again."
        )
        _note_common_failure(error)
        raise error


def gather(tree: Any) -> Any:
    """The leaves [devices, rows, ...] of all processes (`parallel.distribute`), joined to NumPy arrays [all rows, ...].

    Every process must call it.
    """
    own = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(tree))
    if jax.process_count() == 1:
        return own
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), multihost_utils.process_allgather(own))


def share_failures(folder: Path) -> None:
    """From now on, a process that fails leaves its error message in `folder` for the others. Every process must call this."""
    global _failure
    _failure = folder / FAILURE if jax.process_count() > 1 else None
    if _failure is not None:
        on_main(lambda: (folder / FAILURE).unlink(missing_ok=True))
        threading.Thread(target=_watch, args=(_failure,), daemon=True).start()


def _watch(failure: Path) -> None:
    """End this process when another one has told why it failed. This process may be waiting for it, in vain."""
    while _failure == failure:
        time.sleep(LOOK_SECONDS)
        if failure.exists():
            time.sleep(LOOK_SECONDS)  # if all fail together, this process is about to say so itself
            if not _fails:
                leave_broken("")


def tell_failure(message: str) -> None:
    """Leave the error message of this process for the other processes, if there are any (`share_failures`)."""
    global _fails
    _fails = True
    if _failure is not None:
        with contextlib.suppress(OSError):
            write_text(_failure, f"process {jax.process_index()}: {message}")


def leave_if_alone() -> None:
    """End this process at once if it fails alone in a shared run: JAX's shutdown would wait for the others, and they for it.

    Process 0 leaves last, because JAX aborts the others when process 0 is gone, before they can say why.
    """
    if not jax.distributed.is_initialized() or _all_fail:
        return
    sys.stderr.flush()
    if is_main():
        time.sleep(3 * LOOK_SECONDS)
    os._exit(1)


def _note_common_failure(error: UserError | None) -> None:
    global _all_fail
    _all_fail = error is not None


def leave_broken(words: str) -> None:
    """End this process at once with an error message: another one seems to have died, and JAX's shutdown would wait for it."""
    message = f"most likely another process of this run has ended ({words}); start all processes again to resume."
    if _failure is not None and _failure.exists():
        message = f"another process of this run has ended, {_failure.read_text()}"
    print(f"hast_jax: {message}", file=sys.stderr, flush=True)
    os._exit(1)
