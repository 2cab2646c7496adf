"""Tables of the results of cells, with the paper's numbers beside ours, and the page of all experiments."""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from hast_jax.deliver.console import format_bits, markdown_row
from hast_jax.paper import experiments, figures
from hast_jax.paper.experiments import FINDINGS, PAPER_TEACHERS, Experiment, Finding
from hast_jax.paper.sweep import Result, Sweep

Row = dict[str, Any]
Results = dict[str, list[Result]]


class Section(NamedTuple):
    """One experiment. body: its Markdown. data: the same as JSON values. findings: lines among the findings of the page."""

    title: str
    body: str
    data: dict[str, Any]
    findings: tuple[str, ...] = ()

    def with_picture(self, name: str) -> "Section":
        """The section with a picture at its end. name: of a file in the same folder."""
        return self._replace(body=f"{self.body}\n\n![{self.title}]({name})")


def section(experiment: Experiment, results: Results, config: ConfigDict) -> Section:
    """The table of an experiment. results: label -> one result for each seed."""
    found = rows(experiment, results, config)
    compared = (config.teacher.network, experiments.data_set(config)) in PAPER_TEACHERS
    body = markdown(found) + (f"\n\n{experiment.note}" if experiment.note and compared else "")
    return Section(experiment.title, body, {"rows": found})


def rows(experiment: Experiment, results: Results, config: ConfigDict) -> list[Row]:
    """One row for each cell: accuracy over seeds (%), drop from the teacher, and the paper's numbers if there are any."""
    data_set = experiments.data_set(config)
    setting = (data_set, f"W{config.bits.weights}A{config.bits.activations}")
    paper_teacher = None if config.bits.rules else PAPER_TEACHERS.get((config.teacher.network, data_set))
    found = []
    for cell in experiment.cells:
        row = _row(cell.label, results[cell.label], cell.accuracy)
        paper = experiment.paper.get(setting, {}).get(cell.label)
        if paper is not None and paper_teacher is not None:
            row |= {"paper": paper, "paper_drop": paper_teacher - paper}
            if "drop" in row:
                row["difference"] = row["drop"] - row["paper_drop"]
        found.append(row | {"changes": experiments.effective(cell.changes, config)})
    return found


def _row(label: str, results: list[Result], accuracy: str) -> Row:
    good = [r for r in results if "failed" not in r]
    row: Row = {"label": label, "failed": [r["failed"] for r in results if "failed" in r], "seeds": len(good)}
    if good:
        accuracies, teacher = [r[accuracy] for r in good], good[0]["teacher"]
        mean = statistics.mean(accuracies)
        row |= {"top1": accuracies, "mean": mean, "teacher": teacher, "drop": teacher - mean}
        row["std"] = statistics.stdev(accuracies) if len(accuracies) > 1 else None
        held_out = [r["held_out"] for r in good if r.get("held_out")]
        if held_out and accuracy == "last":
            row |= {name: statistics.mean(each[name] for each in held_out) for name in ("agreement", "kl")}
    return row


def markdown(rows: list[Row]) -> str:
    """A table of the rows. The columns of the paper and of agreement are left out if they would be empty."""
    compared, judged = (any(name in row for row in rows) for name in ("paper", "agreement"))
    header = ["", "top-1", "drop"]
    header += ["agreement, held-out synthetic", "KL"] if judged else []
    header += ["paper: top-1", "paper: drop", "drop, ours - paper's"] if compared else []
    lines = [markdown_row(header), markdown_row(["---"] * len(header))]
    for row in rows:
        cells = [row["label"], *_accuracy(row)]
        if judged:
            cells += [f"{row[name]:{form}}" if name in row else "" for name, form in _AGREEMENT_COLUMNS]
        if compared:
            cells += [f"{row[name]:{form}}" if name in row else "" for name, form in _PAPER_COLUMNS]
        lines.append(markdown_row(cells))
    failures = [f"- {row['label']}: {sentence}" for row in rows for sentence in row["failed"]]
    return "\n".join(lines + (["", "Failed:", "", *failures] if failures else []))


_AGREEMENT_COLUMNS = (("agreement", ".2f"), ("kl", ".3f"))
_PAPER_COLUMNS = (("paper", ".2f"), ("paper_drop", ".2f"), ("difference", "+.2f"))


def _accuracy(row: Row) -> list[str]:
    if "mean" not in row:
        return ["failed", ""]
    spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
    missing = f" ({row['seeds']} of {row['seeds'] + len(row['failed'])} seeds)" if row["failed"] else ""
    return [f"{row['mean']:.2f}{spread}{missing}", f"{row['drop']:.2f}"]


def draw_sensitivity(rows: list[Row], path: Path) -> bool:
    """Draw Figure 1 from its rows, whose labels are "name=value". Returns False if every cell failed: nothing is drawn."""
    panels: dict[str, list[tuple[float, float, float | None]]] = {}
    good = [row for row in rows if "mean" in row]
    for row in good:
        name, value = row["label"].split("=")
        panels.setdefault(name, []).append((float(value), row["mean"], row["std"]))
    if good:
        figures.sensitivity(panels, good[0]["teacher"], path)
    return bool(good)


def context(sweep: Sweep, devices: int) -> str:
    """A text with what all tables have in common: network, bits, budget, seeds."""
    config = sweep.config
    made = f"{config.synthesis.images:,} images x {config.synthesis.iterations:,} iterations"
    steps = f"{config.finetune.epochs * config.finetune.steps_per_epoch:,} steps of {config.finetune.batch}"
    seeds = ", ".join(map(str, sweep.seeds))
    if config.synthesis.source and len(sweep.seeds) > 1:
        seeds += f" on the images of seed {config.seed}"
    bits = format_bits(config.bits)
    hardware = f"{devices} x {jax.devices()[0].device_kind}"
    return (
        f"{config.teacher.network} on {config.eval.dataset}, {bits}: {made}, {steps}, seed {seeds}, {hardware}. Top-1 in per "
        f"cent on {sweep.test_images:,} real images at the last epoch. In a table, ± is the standard deviation over seeds. The "
        f"drop is measured from the full-precision teacher. The paper: {experiments.PAPER_BUDGET}."
    )


def page(sections: dict[str, Section], sweep: Sweep, context: str) -> str:
    """The page of all experiments: their context, the findings, and a section for each."""
    lines = [verdict(finding, sections, sweep.test_images) for finding in FINDINGS if finding.experiment in sections]
    lines += [line for each in sections.values() for line in each.findings]
    config = sweep.config
    title = f"# The supplement's experiments: {config.teacher.network} on {config.eval.dataset}"
    rule = (
        "Here ± is twice the standard error of a difference. A finding is undecided if its difference is smaller. The standard "
        "error comes from the number of real images and from the spread over seeds. With one seed it leaves out that spread."
    )
    findings = "\n".join(f"- {line}" for line in lines)
    bodies = [f"## {each.title}\n\n{each.body}" for each in sections.values()]
    return "\n\n".join([title, context, "## Findings", rule, findings, *bodies]) + "\n"


def verdict(finding: Finding, sections: dict[str, Section], images: int) -> str:
    """A line that says whether a finding holds, from the rows of its experiment. images: number of real images evaluated on."""
    rows = sections[finding.experiment].data.get("rows", [])
    by_label = {row["label"]: row for row in rows}

    def pick(key):
        return (rows[key] if rows else {}) if isinstance(key, int) else by_label.get(key, {})

    pair = pick(finding.better), pick(finding.worse)
    if any("mean" not in row or row["failed"] for row in pair):
        return f"{finding.sentence}: not measured, because a cell failed or was left out"
    if pair[0]["changes"] == pair[1]["changes"]:
        return f"{finding.sentence}: not measured, because with this config both cells are the same run"
    difference = pair[0]["mean"] - pair[1]["mean"]
    error = 2 * math.sqrt(sum(_variance(row, images) for row in pair))
    decision = "undecided" if abs(difference) <= error else "holds" if difference > 0 else "does not hold"
    names = f"{pair[0]['label']} {difference:+.2f} against {pair[1]['label']}, ± {error:.2f}"
    return f"{finding.sentence}: **{decision}** ({names})"


def _variance(row: Row, images: int) -> float:
    of_images = row["mean"] * (100 - row["mean"]) / images
    return of_images + (row["std"] ** 2 / row["seeds"] if row["std"] is not None else 0)
