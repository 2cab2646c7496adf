"""What a person sees of a run: progress, tables and a picture; and what tools read: `metrics.jsonl`, TensorBoard events."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX import SummaryWriter

from hast_jax.runs.files import write_text

SHOWN = ("loss", "kl", "fa", "hard", "lr")  # metrics beside the progress bar
PICTURE_IMAGES = 64


class Stage:
    """A running stage: `update` moves the bar and writes metrics."""

    def __init__(self, reporter: "Reporter", name: str, bar: Progress, task: TaskID, spent: float):
        self._reporter, self._name, self._bar, self._task = reporter, name, bar, task
        self._start = time.perf_counter() - spent
        self._previous = (bar.tasks[task].completed, time.perf_counter())

    @property
    def seconds(self) -> float:
        """Time spent in this stage, the parts before a resume included."""
        return time.perf_counter() - self._start

    def update(self, done: int, metrics: dict[str, float] | None = None) -> None:
        """`done` steps are finished; `metrics` are logged under that step."""
        metrics = metrics or {}
        (before, then), now = self._previous, time.perf_counter()
        self._previous = (done, now)
        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
        self._bar.update(self._task, completed=done, shown=shown, speed=f"{(done - before) / (now - then):.1f}/s")
        self._reporter.log(self._name, done, self.seconds, metrics)


class Reporter:
    """Progress on `console` (quiet where that is no terminal) and the logs of one run folder.

    `metrics.jsonl` holds one line for each look at the metrics: stage, step, seconds spent in the stage, values.
    """

    def __init__(self, folder: Path, console: Console, writing: bool = True):
        """writing: False for a process that leaves the files to another."""
        self.console, self._writing = console, writing
        self._path = folder / "metrics.jsonl"
        self._lines = read_metrics(self._path)
        self._tensorboard = folder / "tensorboard"
        self._events: dict[str, SummaryWriter] = {}

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Stage]:
        """A stage of `total` steps of which `done` are finished; what was logged after them by a killed run is dropped."""
        self._lines = [line for line in self._lines if line["stage"] != name or line["step"] <= done]
        if self._writing:
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))
            self._events[name] = SummaryWriter(str(self._tensorboard / name), purge_step=done + 1)
        columns = (
            TextColumn("{task.description:<11}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[shown]}", style="dim"),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(name, total=total, completed=done, shown="", speed="")
            stage = Stage(self, name, bar, task, self.seconds(name))
            yield stage
            bar.update(task, completed=total)
        self.log(name, total, stage.seconds, {})
        if not self.console.is_terminal:
            self.console.print(f"{name}: {total} steps in {format_seconds(stage.seconds)}")

    def seconds(self, stage: str) -> float:
        """Time spent in a stage so far, by its last line."""
        return max((line["seconds"] for line in self._lines if line["stage"] == stage), default=0.0)

    def log(self, stage: str, step: int, seconds: float, values: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl` and the values to TensorBoard."""
        line = {"stage": stage, "step": step, "seconds": round(seconds, 3), **values}
        self._lines.append(line)
        if not self._writing:
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
    """The lines of a `metrics.jsonl`; a last line cut short by a killed run is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def format_seconds(seconds: float) -> str:
    """As a person says it: 12.3 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_images(result: dict[str, Any]) -> str:
    """How many synthetic images, and how they came to be."""
    if result.get("real_split"):  # older results lack it
        return f"{result['images']} real images ({result['real_split']} split)"
    made = "of another run" if result["iterations"] is None else f"x {result['iterations']} iterations"
    return f"{result['images']} images {made}"


def show_result(console: Console, result: dict[str, Any]) -> None:
    """The last table of a run, from what `result.json` holds."""
    bits = result["bits"]
    title = f"{result['network']} on {result['dataset']}, W{bits['weights']}A{bits['activations']}, seed {result['seed']}"
    if result["teacher"] is not None:
        table = Table("", "top-1 %", "drop", title=title)
        rows = {
            "full precision (teacher)": result["teacher"],
            "quantized, no fine-tuning": result["no_finetuning"],
            "HAST, last epoch": result["last"],
            f"HAST, best epoch ({result['best_epoch']}; selected on test data)": result["best"],
        }
        for name, value in rows.items():
            table.add_row(name, f"{value:.2f}", "" if name.startswith("full") else f"{result['teacher'] - value:.2f}")
        console.print(table)
    else:
        console.print(f"{title}: no evaluation data (config.eval.dataset is none)")
    times = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in result["seconds"].items())
    console.print(f"{format_images(result)}, {result['steps']} steps of {result['batch']}")
    console.print(f"{times}; {result['hardware']}")


def save_picture(path: Path, images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """A PNG of the first 64 normalised images [n, height, width, channels], eight to a row."""
    from matplotlib.image import imsave

    pixels = np.clip(images[:PICTURE_IMAGES] * np.asarray(std) + np.asarray(mean), 0, 1)
    side = 8
    pixels = np.concatenate([pixels, np.ones((-len(pixels) % side, *pixels.shape[1:]))])
    pixels = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, -1)
    rows, size = len(pixels) // side, pixels.shape[1]
    grid = pixels.reshape(rows, side, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(rows * size, side * size, 3)
    enlarge = max(1, 1024 // grid.shape[1])
    imsave(path, np.ascontiguousarray(np.repeat(np.repeat(grid, enlarge, 0), enlarge, 1)))
