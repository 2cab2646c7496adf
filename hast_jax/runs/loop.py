"""The loop around a pmapped step: it dispatches calls ahead of the device and fetches the metrics rarely."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from hast_jax.errors import UserError
from hast_jax.runs import preemption

Metrics = dict[str, float]


class Snapshot(NamedTuple):
    """Number of steps done, and the state and the metrics after them. preempted: the run is to be saved and ended here.

    A snapshot that is made only because the run ends has no metrics, so that the log does not show where a run was interrupted.
    """

    done: int
    state: Any
    metrics: Metrics
    preempted: bool


def drive(
    step: Callable[..., tuple[Any, Any]],
    state: Any,
    inputs: Iterator[tuple[Any, ...]],
    *,
    start: int,
    stop: int,
    steps_per_call: int,
    every: tuple[int, ...],
    what: str,
    all_processes: bool = True,
) -> Iterator[Snapshot]:
    """Call `step(state, *next(inputs))` from `start` to `stop`, and yield snapshots.

    A snapshot is due at `stop`, and after each call that reaches a multiple of any number in `every`. After SIGTERM the last
    snapshot has `preempted` true. A single process yields this snapshot after the running call. Several processes
    yield it when the next snapshot is due.

    The metrics are those of the step just done, averaged over this process's devices. Only fetching them waits for the device.
    `steps_per_call` must divide `start`, `stop` and every step that must be met exactly (`call_length`). The yielded state is
    donated to the next call: use it before the next snapshot is asked for.

    what: the config section of the loop, or the name of a loop without metrics, for error messages. all_processes: whether all
    processes run this loop in step. If they do not, several processes ignore SIGTERM in it. Raises UserError if a metric is not
    finite.
    """
    done = start
    while done < stop:
        state, metrics = step(state, *next(inputs))
        done += steps_per_call
        due = done >= stop or any(crosses(done, number, steps_per_call) for number in every)
        preempted = preemption.asked()
        if due:
            values = {name: float(np.mean(value)) for name, value in jax.device_get(metrics).items()}
            _check_finite(values, what, done)
            if all_processes:
                preempted = preemption.agreed()  # only here, where all processes wait for their devices anyway
            yield Snapshot(done, state, values, preempted)
        elif preempted:
            yield Snapshot(done, state, {}, preempted)
        if preempted:
            return


def crosses(done: int, number: int, steps_per_call: int) -> bool:
    """Whether the call that ended with the step `done` reached a multiple of `number`."""
    return done // number > (done - steps_per_call) // number


def call_length(requested: int, *intervals: int) -> int:
    """The largest number of steps per call, at most `requested`, that divides every interval. Every number divides zero."""
    common = math.gcd(*intervals)
    if not common:
        return requested
    return max(d for d in range(1, min(requested, common) + 1) if common % d == 0)


def _check_finite(values: Metrics, what: str, done: int) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"{what} diverged: {', '.join(bad)} not finite at step {done}; "
            f"lower config.{what}.lr and run the same command in a new folder."
        )
