"""Stopping when asked: SIGTERM, which schedulers send before they take a machine away, saves and ends the run."""

import itertools
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

from jax.experimental import multihost_utils

from hast_jax import parallel

_heard = threading.Event()
_looks = itertools.count()


def listen() -> None:
    """From now on SIGTERM ends the run at the next step's end instead of at once. Of several processes JAX itself listens."""

    def note(number: int, frame: FrameType | None) -> None:
        _heard.set()

    signal.signal(signal.SIGTERM, note)


def asked() -> bool:
    """Whether the run is to end here. Whoever sees it saves what is worth it and calls `leave`."""
    return _heard.is_set()


def agreed() -> bool:
    """Whether all processes are to end here, because SIGTERM came to one: each must look as often as the others.

    Of several processes JAX brings the notice to the others in a second or two, and then says yes at one look alone: it is
    remembered, so that a look from which the run cannot end hands it on to the next.
    """
    if parallel.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_looks)):
        _heard.set()
    return asked()


def leave() -> NoReturn:
    """End the process with exit status 0: all that is needed to go on is saved."""
    print("hast_jax: stopped by SIGTERM; the same command goes on where it was.", file=sys.stderr)
    sys.exit(0)
