"""The progress of a run: reported to a callback and, if the run has a folder, logged in `metrics.jsonl` and TensorBoard."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hast_jax.kinds import parse_json
from hast_jax.runs.files import write_text


class Update(NamedTuple):
    """A report of progress: `done` of `total` steps of a stage, the seconds spent in it, and the metrics of the last step.

    seconds: includes the time before a resume. finished: whether this is the last update of the stage.
    """

    stage: str
    done: int
    total: int
    seconds: float
    metrics: dict[str, float]
    finished: bool = False


Progress = Callable[[Update], None]
LINE = {"stage": str, "step": int, "seconds": int | float}  # what each line of a log has, besides values


def silent(update: Update) -> None:
    """A callback that shows nothing."""


class Stage:
    """A running stage."""

    def __init__(self, recorder: "Recorder", name: str, total: int, spent: float):
        self._recorder, self._name, self._total = recorder, name, total
        self._start = time.perf_counter() - spent

    @property
    def seconds(self) -> float:
        """Seconds spent in this stage, including the time before a resume."""
        return time.perf_counter() - self._start

    def update(self, done: int, metrics: dict[str, float] | None = None) -> None:
        """Report that `done` steps are finished, and log `metrics` under that step."""
        self._recorder.log(self._name, done, self.seconds, metrics or {})
        self._recorder.progress(Update(self._name, done, self._total, self.seconds, metrics or {}))


class Recorder:
    """Reports a run's progress to a callback, and keeps its log.

    `metrics.jsonl` holds one line for each time that metrics are fetched: stage, step, seconds spent in the stage, values.
    """

    def __init__(self, folder: Path | None = None, progress: Progress = silent, writing: bool = True):
        """folder: that of the log; None: the log is kept in memory. writing: False if another process writes the files."""
        self.progress = progress
        self._path = folder / "metrics.jsonl" if folder else None
        self._lines = read_metrics(self._path) if self._path else []
        self._writing = writing and folder is not None
        self._events: dict[str, Any] = {}
        self.own_seconds: dict[str, float] = {}  # of each stage, since this recorder was made

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Stage]:
        """A stage of `total` steps, of which `done` are finished. Later lines that a killed run has logged are dropped."""
        self._lines = [line for line in self._lines if line["stage"] != name or line["step"] <= done]
        if self._writing and self._path:
            from tensorboardX import SummaryWriter

            write_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))
            self._events[name] = SummaryWriter(str(self._path.parent / "tensorboard" / name), purge_step=done + 1)
        spent = self.seconds(name)
        stage = Stage(self, name, total, spent)
        self.progress(Update(name, done, total, stage.seconds, {}))
        yield stage
        self.own_seconds[name] = stage.seconds - spent
        self.log(name, total, stage.seconds, {})
        self.progress(Update(name, total, total, stage.seconds, {}, finished=True))

    def seconds(self, stage: str) -> float:
        """Seconds spent in a stage so far, by its last line in the log."""
        return max((line["seconds"] for line in self._lines if line["stage"] == stage), default=0.0)

    def log(self, stage: str, step: int, seconds: float, values: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl` and the values to TensorBoard."""
        line = {"stage": stage, "step": step, "seconds": round(seconds, 3), **values}
        self._lines.append(line)
        if not self._writing or not self._path:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self._events[stage].add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the TensorBoard events."""
        for events in self._events.values():
            events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` that are whole. A killed run may have cut the last one short."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            line = parse_json(text)
            if isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in LINE.items()):
                lines.append(line)
    return lines
