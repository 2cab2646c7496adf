"""SIGTERM saves and ends the run. Schedulers send this signal before they take a machine away."""

import signal
import threading
from types import FrameType
from typing import NoReturn

import numpy as np

from hast_jax.errors import Stopped
from hast_jax.runs import processes

_heard = threading.Event()


def listen() -> None:
    """From now on, SIGTERM ends the run between two steps instead of at once. Only a command calls this."""

    def note(number: int, frame: FrameType | None) -> None:
        _heard.set()

    signal.signal(signal.SIGTERM, note)


def asked() -> bool:
    """Whether SIGTERM has come; the caller then saves and calls `leave`. Always False in a run of several processes."""
    return processes.count() == 1 and _heard.is_set()


def agreed() -> bool:
    """Whether SIGTERM has come to any process, so that all must end. Every process must call this at the same step."""
    return bool(processes.total(np.asarray([_heard.is_set()])).any())


def check() -> None:
    """End the process if SIGTERM has come. Everything that is needed to resume must be saved already."""
    if asked():
        leave()


def leave() -> NoReturn:
    """End the run, after all that is needed to resume was saved."""
    raise Stopped("stopped by SIGTERM: run the same command again to resume.")
