"""What the commands show: a progress bar, the table at the end of a run, and the forms of its cells."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from hast_jax.runs.progress import Update, silent

SHOWN = ("loss", "kl", "fa", "hard", "lr")  # metrics beside the progress bar
STAGE_NAMES = {"synthesis": "synthesis", "calibrate": "calibration", "finetune": "fine-tuning"}  # for people
TEACHER, EVALUATION = "teacher", "evaluate"  # stages: the teacher's accuracy is known; a network is evaluated


class Bar:
    """A callback for progress. It shows a bar on a terminal or in a notebook; elsewhere it prints a line after each stage.

    Use it as a context manager, so that an error does not leave a bar behind.
    """

    def __init__(self, console: Console):
        self.console = console
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}  # of the running stage, and of an evaluation within it
        self._previous: dict[str, Update] = {}
        self._begun: set[str] = set()  # stages

    def __call__(self, update: Update) -> None:
        """Show an update."""
        live = self.console.is_terminal or self.console.is_jupyter
        if update.done and update.stage in STAGE_NAMES.keys() - self._begun:
            where = f"after step {update.done:,} of {update.total:,}" if update.done < update.total else "after its last step"
            self.console.print(f"{STAGE_NAMES[update.stage]}: resumed {where}", highlight=False)
        self._begun.add(update.stage)
        if update.finished:
            self._finish(update, live)
        elif live:
            self._move(update)

    def _move(self, update: Update) -> None:
        bar = self._bar = self._bar or self._start(update)
        if update.stage not in self._tasks:
            name = STAGE_NAMES.get(update.stage, update.stage)
            self._tasks[update.stage] = bar.add_task(name, total=update.total, shown="", speed="")
        before = self._previous.get(update.stage, update)
        self._previous[update.stage] = update
        seconds = update.seconds - before.seconds
        shown = "  ".join(f"{name} {update.metrics[name]:.4g}" for name in SHOWN if name in update.metrics)
        speed = f"{(update.done - before.done) / seconds:.1f}/s" if seconds > 0 else ""
        bar.update(self._tasks[update.stage], completed=update.done, shown=shown, speed=speed)

    def _start(self, update: Update) -> Progress:
        columns = (
            TextColumn("{task.description:<11}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[shown]}", style="dim"),
        )
        bar = Progress(*columns, console=self.console, transient=update.stage == EVALUATION)
        bar.start()
        return bar

    def _finish(self, update: Update, live: bool) -> None:
        task = self._tasks.pop(update.stage, None)
        self._previous.pop(update.stage, None)
        if self._bar is not None and task is not None:
            self._bar.update(task, completed=update.total)
            if self._tasks:  # an evaluation within a stage has ended
                self._bar.remove_task(task)
            else:
                self._stop()
        if update.stage == TEACHER:
            top1, images = update.metrics["top1"], int(update.metrics["images"])
            self.console.print(f"teacher: top-1 {top1:.2f} % of {images:,} images", highlight=False)
        elif update.stage != EVALUATION and not live:
            name = STAGE_NAMES.get(update.stage, update.stage)
            self.console.print(f"{name}: {update.total:,} steps in {format_seconds(update.seconds)}")

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._tasks, self._previous = {}, {}

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()


def library_bar(visible: bool) -> contextlib.AbstractContextManager[Callable[[Update], None]]:
    """The progress bar of a library call, on the standard error output or in a notebook."""
    return Bar(Console(stderr=True)) if visible else contextlib.nullcontext(silent)


def format_seconds(seconds: float) -> str:
    """A duration for people: 12.3 s, 4 min 05 s, 2 h 03 min."""
    seconds = round(seconds, 1)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_images(result: Mapping[str, Any]) -> str:
    """The number of images that the student learned from, and their origin. result: as in `result.json`."""
    if result.get("real_split"):  # older results lack it
        return f"{result['images']:,} real images ({result['real_split']} split)"
    made = "made elsewhere" if result["iterations"] is None else f"x {result['iterations']:,} iterations"
    return f"{result['images']:,} images {made}"


def held_out_words(held_out: Mapping[str, Any]) -> str:
    """The agreement on synthetic images of another seed, in words. held_out: as in `result.json`."""
    return (
        f"The student agrees with the teacher on {held_out['agreement']:.1f} % of {held_out['images']:,} synthetic images that "
        f"it was not trained on (KL divergence {held_out['kl']:.3f})."
    )


def show_result(console: Console, result: dict[str, Any]) -> None:
    """Print the table at the end of a run. result: as in `result.json`."""
    title = f"{result['network']} on {result['dataset']}, {short_bits(result['bits'])}, seed {result['seed']}"
    if result["teacher"] is not None:
        table = Table("", "top-1 %", "drop", title=escape(title))
        rows = {
            "full precision (teacher)": result["teacher"],
            "quantized, no fine-tuning": result["no_finetuning"],
            "quantized, last epoch": result["last"],
            f"quantized, best epoch ({result['best_epoch']}; selected on test data)": result["best"],
        }
        for name, value in rows.items():
            table.add_row(name, f"{value:.2f}", "" if name.startswith("full") else f"{result['teacher'] - value:.2f}")
        console.print(table)
    else:
        console.print(f"{escape(title)}: no evaluation data (config.eval.dataset is none)")
    if result.get("held_out"):
        console.print(held_out_words(result["held_out"]))
    times = ", ".join(f"{STAGE_NAMES[name]} {format_seconds(seconds)}" for name, seconds in result["seconds"].items())
    console.print(f"{format_images(result)}, {result['steps']:,} steps of {result['batch']}")
    console.print(f"{times}; {result['hardware']}")


def markdown_row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def short_bits(bits: dict[str, Any]) -> str:
    """Bits as W3A3. Rules for single layers are only mentioned."""
    return format_bits({**bits, "rules": ""}) + (", some layers otherwise" if bits.get("rules") else "")


def format_bits(bits: dict[str, Any]) -> str:
    """Bits as W3A3, followed by the rules for single layers in brackets."""
    rules = f" ({bits['rules']})" if bits.get("rules") else ""  # older results lack them
    return f"W{bits['weights']}A{bits['activations']}{rules}"
