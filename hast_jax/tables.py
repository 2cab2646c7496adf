"""From the results of cells to tables, with the paper's numbers beside ours."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from hast_jax import figures
from hast_jax.experiments import FINDINGS, PAPER_TEACHERS, Experiment, Finding
from hast_jax.sweep import Sweep

Row = dict[str, Any]
Results = dict[str, list[dict[str, Any]]]


def rows(experiment: Experiment, results: Results, config: ConfigDict) -> list[Row]:
    """One row a cell: accuracy at the last epoch over seeds (%), drop from the teacher, and the paper's where it has one.

    results: label -> one result for each seed. Where a cell leaves the method as it is ("HAST"), the accuracy before any
    fine-tuning is a row too.
    """
    setting = (config.eval.dataset, f"W{config.bits.weights}A{config.bits.activations}")
    published = experiment.paper.get(setting, {})
    paper_teacher = PAPER_TEACHERS.get((config.teacher.network, config.eval.dataset))
    found = []
    if "HAST" in results:
        found.append(_row("quantized without fine-tuning", results["HAST"], "no_finetuning", None, None))
    for cell in experiment.cells:
        paper = published.get(cell.label) if paper_teacher else None
        found.append(_row(cell.label, results[cell.label], "last", paper, paper_teacher) | {"changes": cell.changes})
    return found


def _row(label: str, results: list[dict[str, Any]], field: str, paper: float | None, paper_teacher: float | None) -> Row:
    row: Row = {"label": label, "failed": [r["failed"] for r in results if "failed" in r]}
    good = [r for r in results if "failed" not in r]
    if good:
        accuracies, teacher = [r[field] for r in good], good[0]["teacher"]
        mean = statistics.mean(accuracies)
        row |= {"top1": accuracies, "mean": mean, "teacher": teacher, "drop": teacher - mean}
        row["std"] = statistics.stdev(accuracies) if len(accuracies) > 1 else None
        if paper is not None and paper_teacher is not None:
            row |= {"paper": paper, "paper_drop": paper_teacher - paper}
            row["difference"] = row["drop"] - row["paper_drop"]
    return row


def markdown(title: str, rows: list[Row]) -> str:
    """A table of the rows; the paper's columns only where it has a number."""
    compared = any("paper" in row for row in rows)
    header = ["", "top-1, last epoch", "drop"]
    header += ["paper: top-1", "paper: drop", "drop, ours - paper's"] if compared else []
    lines = [f"## {title}", "", _line(header), _line(["---"] * len(header))]
    for row in rows:
        cells = [row["label"], *_accuracy(row)]
        if compared:
            cells += [f"{row[name]:{form}}" if name in row else "" for name, form in _PAPER_COLUMNS]
        lines.append(_line(cells))
    failures = [f"- {row['label']}: {sentence}" for row in rows for sentence in row["failed"]]
    return "\n".join(lines + (["", "Failed:", *failures] if failures else [])) + "\n"


_PAPER_COLUMNS = (("paper", ".2f"), ("paper_drop", ".2f"), ("difference", "+.2f"))


def _accuracy(row: Row) -> list[str]:
    if "mean" not in row:
        return ["failed", ""]
    spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
    return [f"{row['mean']:.2f}{spread}", f"{row['drop']:.2f}"]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw_sensitivity(rows: list[Row], path: Path) -> None:
    """Figure 1 from its rows, whose labels are "name=value"."""
    panels: dict[str, tuple[list[float], list[float], list[float]]] = {}
    for row in (row for row in rows if "mean" in row):
        name, value = row["label"].split("=")
        columns = panels.setdefault(name, ([], [], []))
        for column, number in zip(columns, (float(value), row["mean"], row["std"] or 0.0)):
            column.append(number)
    if panels:
        figures.sensitivity(panels, next(row["teacher"] for row in rows if "mean" in row), path)


def page(texts: list[str], sweep: Sweep, images: int) -> str:
    """The page of all experiments: the budget, the findings, the sections. images: real ones, of the evaluation."""
    config = sweep.config
    bits = f"W{config.bits.weights}A{config.bits.activations}"
    made = f"{config.synthesis.images} images x {config.synthesis.iterations} iterations"
    steps = f"{config.finetune.epochs * config.finetune.steps_per_epoch} steps of {config.finetune.batch}"
    seeds = ", ".join(map(str, sweep.seeds))
    verdicts = [_verdict(finding, sweep.workdir, images) for finding in FINDINGS]
    intro = [
        f"# {config.teacher.network} on {config.eval.dataset}, {bits}: the experiments of the supplement",
        "",
        f"{made}, {steps}, seed {seeds}; {images} real images for evaluation alone; {jax.devices()[0].device_kind}. Accuracies "
        "are top-1 in per cent at the last epoch; drop is from the full-precision teacher.",
        "",
        "## Findings of the supplement",
        "",
        "Undecided: the difference is below its standard error, that of two shares of independent images.",
        "",
        *verdicts,
        *(f"- {line}" for name in ("figure2a", "figure2b") for line in _read(sweep.workdir / f"{name}.json")["findings"]),
        "",
    ]
    return "\n".join(intro) + "\n" + "\n".join(texts)


def _verdict(finding: Finding, workdir: Path, images: int) -> str:
    rows = _read(workdir / f"{finding.experiment}.json")["rows"]
    by_label = {row["label"]: row for row in rows}
    better, worse = (rows[key] if isinstance(key, int) else by_label[key] for key in (finding.better, finding.worse))
    if "mean" not in better or "mean" not in worse:
        return f"- {finding.sentence}: not measured, a cell failed"
    difference = better["mean"] - worse["mean"]
    error = math.sqrt(sum(row["mean"] * (100 - row["mean"]) for row in (better, worse)) / images)
    verdict = "undecided" if abs(difference) < error else "holds" if difference > 0 else "does not hold"
    return f"- {finding.sentence}: **{verdict}** ({better['label']} {difference:+.2f} against {worse['label']}, ± {error:.2f})"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
