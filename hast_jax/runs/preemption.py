"""Stopping when asked: SIGTERM, which schedulers send before they take a machine away, saves and ends the run."""

import signal
import threading
from types import FrameType
from typing import NoReturn

import numpy as np

from hast_jax.errors import Stopped
from hast_jax.runs import parallel

_heard = threading.Event()


def listen() -> None:
    """From now on SIGTERM ends the run at the end of a step instead of at once. Only a command calls this."""

    def note(number: int, frame: FrameType | None) -> None:
        _heard.set()

    signal.signal(signal.SIGTERM, note)


def asked() -> bool:
    """Whether SIGTERM has come to this process, the only one. Whoever sees it saves what is worth it and calls `leave`."""
    return parallel.process_count() == 1 and _heard.is_set()


def agreed() -> bool:
    """Whether all processes are to end here, because SIGTERM has come to any. Every process must call it at the same step."""
    return bool(parallel.total(np.asarray([_heard.is_set()])).any())


def leave() -> NoReturn:
    """End the run: all that is needed to go on is saved."""
    raise Stopped("stopped by SIGTERM; the same command goes on where it was.")
