"""The operations of a compiled program that take the most time, by JAX's profiler."""

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

LONGEST = 20  # operations that are named
NAME_LENGTH = 80  # kernels of libraries have names of hundreds of letters

Event = tuple[str, float, float]  # name, start and end in nanoseconds


def of(call: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Trace one call of `steps` steps: {"span_ms", "busy_ms", "longest": [{"name", "ms", "calls"}]}, each for one step.

    span_ms: from the first operation to the end of the last. busy_ms: the part of the span in which any operation runs.
    Operations whose names differ by a number at the end are added up. On several devices, `ms` and `calls` are sums over them.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python's own calls would fill the trace
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(call())
        events = [event for path in Path(folder).rglob("*.xplane.pb") for event in _events(path)]
    time: dict[str, float] = defaultdict(float)
    calls = Counter[str]()
    for name, start, end in events:
        time[_kind(name)] += end - start
        calls[_kind(name)] += 1
    longest = [
        {"name": name, "ms": round(spent / steps / 1e6, 4), "calls": round(calls[name] / steps, 1)}
        for name, spent in sorted(time.items(), key=lambda item: -item[1])[:LONGEST]
    ]
    span = max((end for _, _, end in events), default=0) - min((start for _, start, _ in events), default=0)
    return {"span_ms": round(span / steps / 1e6, 4), "busy_ms": round(_union(events) / steps / 1e6, 4), "longest": longest}


def _events(path: Path) -> Iterator[Event]:
    """The operations in a trace. An accelerator has planes of its own; on a CPU, an operation is told by its statistics."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    accelerators = [plane for plane in planes if plane.name.startswith(("/device:GPU", "/device:TPU"))]
    for plane in accelerators or planes:
        for line in plane.lines:
            if accelerators and not (line.name.startswith("Stream") or line.name == "XLA Ops"):
                continue
            for event in line.events:
                if accelerators or "hlo_op" in dict(event.stats):
                    yield event.name, event.start_ns, event.start_ns + event.duration_ns


def _kind(name: str) -> str:
    return re.sub(r"([._]\d+)+$", "", name)[:NAME_LENGTH]


def _union(events: list[Event]) -> float:
    """Nanoseconds in which at least one event is running."""
    busy, latest = 0.0, 0.0
    for _, start, end in sorted(events, key=lambda event: event[1]):
        busy += max(0.0, end - max(start, latest))
        latest = max(latest, end)
    return busy
