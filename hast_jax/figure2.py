"""Figure 2 of the supplement, from the checkpoints of the base cell: gradients along fine-tuning, Hessians at its end."""

from collections.abc import Iterator
from functools import partial
from io import StringIO
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from hast_jax import figures, finetune, landscape, pipeline
from hast_jax.checkpoint import Checkpoints
from hast_jax.errors import UserError
from hast_jax.experiments import Cell
from hast_jax.files import write_json
from hast_jax.run_folder import open_for_reading
from hast_jax.sweep import Sweep

Array = jax.Array

BATCHES = 8  # on which the gradients are compared
HESSIAN_IMAGES, PROBES, DEPTH = 128, 3, 32
GRID = 400


class Base(NamedTuple):
    """The base cell: its job and what its fine-tuning did not change."""

    job: pipeline.Job
    frozen: finetune.Frozen

    def losses(self) -> landscape.Losses:
        """See `landscape.losses`."""
        return landscape.losses(self.job.teacher, self.job.student, self.job.config.finetune)

    def students(self) -> Iterator[tuple[int, Any]]:
        """(epoch, params) before fine-tuning and at each kept checkpoint."""
        yield 0, self.job.variables["params"]
        cfg = self.job.config.finetune
        with Checkpoints(self.job.folder.checkpoints("latest"), keep=2, writing=False) as checkpoints:
            for step, state in checkpoints.restore_each(finetune.init(self.job.variables["params"], cfg)):
                yield step // cfg.steps_per_epoch, state.params


def base(sweep: Sweep) -> Base:
    """Run the base cell where it is not finished. Raises UserError where it failed."""
    cell, seed = Cell("HAST", {}), sweep.seeds[0]
    result = sweep.run_one(cell, seed)
    if "failed" in result:
        raise UserError(f"the base cell failed, so there is no figure 2: {result['failed']}")
    folder, config = open_for_reading(sweep.path(cell, seed))
    job, _ = pipeline.prepare(config, folder.path, Console(file=StringIO()))
    images, labels = pipeline.training_images(job)
    return Base(job, finetune.freeze(job.variables, folder.read_ranges(), images, labels, config))


def gradient_angles(sweep: Sweep, name: str) -> str:
    """Figure 2a: write figure and JSON, return the Markdown."""
    found = base(sweep)
    batch, losses = found.job.config.finetune.batch, found.losses()
    batches = max(1, min(BATCHES, len(found.frozen.labels) // batch))
    cosines = jax.jit(partial(landscape.gradient_cosines, losses))
    epochs: list[int] = []
    values: dict[str, list[list[float]]] = {"ce": [], "fa": []}
    for epoch, params in found.students():
        each = [
            cosines(params, found.frozen, *(a[i * batch : (i + 1) * batch] for a in (found.frozen.images, found.frozen.labels)))
            for i in range(batches)
        ]
        epochs.append(epoch)
        for loss in values:
            values[loss].append([float(one[loss]) for one in each])
    labels = {"fa": "FA and KL", "ce": "CE and KL"}
    figures.cosines(epochs, {labels[loss]: np.asarray(values[loss]) for loss in labels}, sweep.workdir / name)
    means = {loss: float(np.mean(values[loss][1:])) for loss in values}
    findings = [
        f"gradients of FA and KL agree: **{_holds(means['fa'] > 0)}** (cosine {means['fa']:+.3f}, mean along fine-tuning)",
        f"gradients of CE and KL do not: **{_holds(means['ce'] < 0)}** (cosine {means['ce']:+.3f})",
    ]
    write_json(sweep.workdir / f"{name}.json", {"epochs": epochs, "cosine_with_kl": values, "findings": findings})
    text = f"Cosine similarity of gradients on {batches} batches of {batch} synthetic images; bars: standard deviation."
    return _section("Figure 2a: do the losses pull in one direction?", name, text)


def hessian_spectra(sweep: Sweep, name: str) -> str:
    """Figure 2b: write figure and JSON, return the Markdown."""
    found = base(sweep)
    losses, params = found.losses(), list(found.students())[-1][1]
    images, labels = found.frozen.images[:HESSIAN_IMAGES], found.frozen.labels[:HESSIAN_IMAGES]
    key = jax.random.fold_in(jax.random.key(found.job.config.seed), 5)
    grids, densities, rows = {}, {}, {}
    for loss in landscape.LOSSES:
        one = lambda *arguments, loss=loss: losses(*arguments)[loss]
        constants = (found.frozen, images, labels)
        nodes, weights = landscape.hessian_spectrum(one, params, constants, key, PROBES, DEPTH)
        spread = float(np.sqrt(weights @ nodes**2))
        scaled, title = nodes / spread, loss.upper()
        grids[title] = np.linspace(float(scaled.min()) - 1, float(scaled.max()) + 1, GRID)
        width = (grids[title][-1] - grids[title][0]) / 100
        densities[title] = landscape.density(scaled, weights, grids[title], width)
        rows[loss] = {
            "largest": float(nodes.max()),
            "smallest": float(nodes.min()),
            "root_mean_square": spread,
            "tail": float(nodes.max()) / spread,
        }
    figures.spectra(grids, densities, sweep.workdir / name)
    longest = max(rows, key=lambda loss: rows[loss]["tail"])
    tails = ", ".join(f"{loss.upper()} {row['tail']:.0f}" for loss, row in rows.items())
    finding = f"CE has the longer Hessian tail: **{_holds(longest == 'ce')}** (largest eigenvalue / root mean square: {tails})"
    write_json(sweep.workdir / f"{name}.json", {"spectra": rows, "findings": [finding]})
    table = ["| | largest | smallest | root mean square | largest / rms |", "|---|---|---|---|---|"]
    table += [f"| {n.upper()} | " + " | ".join(f"{value:.4g}" for value in row.values()) + " |" for n, row in rows.items()]
    text = (
        f"At the end of fine-tuning, on {len(labels)} synthetic images, by stochastic Lanczos quadrature ({PROBES} probes of "
        f"depth {DEPTH}). The factors of the method (alpha T^2, lambda) are in KL and FA.\n\n" + "\n".join(table)
    )
    return _section("Figure 2b: eigenvalues of the Hessians", name, text)


def _holds(condition: bool) -> str:
    return "holds" if condition else "does not hold"


def _section(title: str, name: str, text: str) -> str:
    return f"## {title}\n\n{text}\n\n![{title}]({name}.png)\n"
