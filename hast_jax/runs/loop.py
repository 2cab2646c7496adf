"""The loop around a pmapped step: it dispatches ahead of the device and looks at the metrics rarely."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from hast_jax.errors import UserError
from hast_jax.runs import preemption

Metrics = dict[str, float]


class Snapshot(NamedTuple):
    """Steps done, the state and the metrics after them; preempted: the run is to be saved and ended here.

    A snapshot that is there only for that has no metrics, so that a log does not show where a run was broken.
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
    """Call `step(state, *next(inputs))` from `start` to `stop`; yield what a snapshot shows now and then.

    It yields after each call that reaches a multiple of any number in `every`, at `stop`, and where SIGTERM asks the run to
    end: then for the last time, with `preempted` true. Several processes end at the next of those steps, one at any.

    The metrics are those of the step just done, averaged over this process's devices; fetching them is the only wait for the
    device. `steps_per_call` must divide `start`, `stop` and whatever step must be met exactly (`call_length`). The yielded
    state is donated to the next call: use it before going on.

    Raises UserError where a metric is not finite.
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
                preempted = preemption.agreed()  # here alone, where all wait for their devices anyway
            yield Snapshot(done, state, values, preempted)
        elif preempted:
            yield Snapshot(done, state, {}, preempted)
        if preempted:
            return


def crosses(done: int, number: int, steps_per_call: int) -> bool:
    """Whether the call that ended with the step `done` reached a multiple of `number`."""
    return done // number > (done - steps_per_call) // number


def call_length(requested: int, *intervals: int) -> int:
    """The largest number of steps a call, at most `requested`, that divides every interval; zero has every divisor."""
    common = math.gcd(*intervals) or requested
    return max(d for d in range(1, min(requested, common) + 1) if common % d == 0)


def _check_finite(values: Metrics, what: str, done: int) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"{what} diverged: {', '.join(bad)} not finite at step {done}; "
            f"lower config.{what}.lr and run the same command in a new folder."
        )
