"""Stopping when asked: SIGTERM, which schedulers send before they take a machine away, saves and ends the run."""

import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

_asked = threading.Event()


def listen() -> None:
    """From now on SIGTERM ends the run at the next step's end instead of at once."""

    def note(number: int, frame: FrameType | None) -> None:
        _asked.set()

    signal.signal(signal.SIGTERM, note)


def asked() -> bool:
    """Whether SIGTERM has come. Whoever sees it saves what is worth it and calls `leave`."""
    return _asked.is_set()


def leave() -> NoReturn:
    """End the process with exit status 0: all that is needed to go on is saved."""
    print("hast_jax: stopped by SIGTERM; the same command goes on where it was.", file=sys.stderr)
    sys.exit(0)
