"""Figure 2 of the supplement, from the checkpoints of the base cell: gradients along fine-tuning, Hessians at its end."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hast_jax import figures, finetune, landscape, networks, synthetic_set
from hast_jax.checkpoint import Checkpoints
from hast_jax.errors import UserError
from hast_jax.experiments import Cell
from hast_jax.run_folder import open_for_reading
from hast_jax.sweep import Sweep
from hast_jax.tables import Section

Array = jax.Array

BATCHES = 8  # on which the gradients are compared
HESSIAN_IMAGES, PROBES, DEPTH = 128, 4, 32
GRID, WIDTH = 800, 0.1  # points, and width of a node, of the drawn densities


class Base(NamedTuple):
    """The finished base cell of the first seed. students: (epoch, params) before fine-tuning and at its kept checkpoints."""

    losses: landscape.LossFunctions
    frozen: finetune.Frozen
    students: list[tuple[int, Any]]
    config: Any


def base(sweep: Sweep) -> Base:
    """Run the base cell where it is not finished. Raises UserError where it failed."""
    cell, seed = Cell("HAST", {}), sweep.seeds[0]
    result = sweep.run_one(cell, seed)
    if "failed" in result:
        raise UserError(f"the base cell failed: {result['failed']}")
    folder, config = open_for_reading(sweep.path(cell, seed))
    teacher, variables = networks.teacher(config)
    images, labels = synthetic_set.load(sweep.images({}, seed), tuple(config.teacher.image))
    most = max(BATCHES * config.finetune.batch, HESSIAN_IMAGES)  # that are looked at
    count = min(most, config.synthesis.images)
    constants = jnp.asarray(images[:count]), jnp.asarray(labels[:count])
    frozen = finetune.freeze(variables, folder.read_ranges(), *constants, config)
    losses = landscape.losses(teacher, networks.student(config), config.finetune)
    students = [(0, variables["params"]), *_kept(folder.checkpoints("latest"), variables["params"], config.finetune)]
    return Base(losses, frozen, students, config)


def _kept(path: Path, params: Any, config: Any) -> Iterator[tuple[int, Any]]:
    with Checkpoints(path, keep=2, writing=False) as checkpoints:
        for step, state in checkpoints.restore_each(finetune.init(params, config)):
            epoch = step // config.steps_per_epoch
            whole = step % config.steps_per_epoch == 0  # not where a run was stopped in between
            if whole and (epoch % config.keep_every == 0 or epoch == config.epochs):
                yield epoch, state.params


def gradient_angles(sweep: Sweep) -> Section:
    """Figure 2a: cosine similarity of gradients, on clean images as they are, without augmentation."""
    found = base(sweep)
    batch, images, labels = found.config.finetune.batch, found.frozen.images, found.frozen.labels
    batches = max(1, min(BATCHES, len(labels) // batch))
    cosines = jax.jit(partial(landscape.gradient_cosines, found.losses))
    values: dict[str, list[list[float]]] = {"fa": [], "ce": []}
    for _, params in found.students:
        rows = (slice(i * batch, (i + 1) * batch) for i in range(batches))
        each = [cosines(params, found.frozen, images[r], labels[r]) for r in rows]
        for loss, by_epoch in values.items():
            by_epoch.append([float(one[loss]) for one in each])
    epochs = [epoch for epoch, _ in found.students]
    means = {loss: np.mean(by_epoch, 1) for loss, by_epoch in values.items()}
    figures.cosines(
        epochs,
        {label: np.asarray(values[loss]) for label, loss in (("FA and KL", "fa"), ("CE and KL", "ce"))},
        sweep.workdir / "figure2a",
    )
    say = lambda loss: f"cosine {means[loss].min():+.3f} to {means[loss].max():+.3f}, epochs 0 to {epochs[-1]}"
    findings = (
        f"the paper: gradients of FA and KL agree throughout: **{_holds(bool(np.all(means['fa'] > 0)))}** ({say('fa')})",
        f"the paper: those of CE and KL oppose throughout: **{_holds(bool(np.all(means['ce'] < 0)))}** ({say('ce')})",
    )
    body = (
        f"Cosine similarity of the gradients with respect to the student's parameters, on {batches} batches of {batch} clean "
        f"synthetic images; bars: standard deviation over batches; seed {sweep.seeds[0]}."
    )
    section = Section(
        "Figure 2a: do the losses pull in one direction?", body, {"epochs": epochs, "cosine_with_kl": values}, findings
    )
    return section.with_picture("figure2a.png")


def hessian_spectra(sweep: Sweep) -> Section:
    """Figure 2b: eigenvalue densities at the end of fine-tuning, without the losses' constant weights alpha and lambda."""
    found = base(sweep)
    params, cfg = found.students[-1][1], found.config.finetune
    constants = (found.frozen, found.frozen.images[:HESSIAN_IMAGES], found.frozen.labels[:HESSIAN_IMAGES])
    key = jax.random.fold_in(jax.random.key(found.config.seed), 5)
    nodes, weights = {}, {}
    for loss, factor in {"ce": 1.0, "kl": 1 / cfg.alpha, "fa": 1 / cfg.lam}.items():
        one = lambda *arguments, loss=loss, factor=factor: factor * found.losses(*arguments)[loss]
        nodes[loss], weights[loss] = landscape.hessian_spectrum(one, params, constants, key, PROBES, DEPTH)
    width = 1e-4 * max(float(np.abs(each).max()) for each in nodes.values())
    curves = {_LABELS[loss]: _density(nodes[loss], weights[loss], width) for loss in nodes}
    figures.spectra(curves, width, sweep.workdir / "figure2b")
    spectra = {
        loss: {
            "largest": float(nodes[loss].max()),
            "smallest": float(nodes[loss].min()),
            "mean": float(weights[loss] @ nodes[loss]),
            "root_mean_square": float(np.sqrt(weights[loss] @ nodes[loss] ** 2)),
        }
        for loss in nodes
    }
    for row in spectra.values():
        row["largest_by_rms"] = row["largest"] / row["root_mean_square"]
    table = [
        "| | largest eigenvalue | smallest | mean | root mean square | largest / root mean square |",
        "|---|---|---|---|---|---|",
    ]
    table += [f"| {_LABELS[n]} | {' | '.join(f'{value:.3g}' for value in row.values())} |" for n, row in spectra.items()]
    body = (
        f"With respect to the student's parameters at the end of fine-tuning, on {len(constants[1])} clean synthetic images, "
        f"by stochastic Lanczos quadrature ({PROBES} probes of depth {DEPTH}); seed {sweep.seeds[0]}. KL "
        "keeps its T^2 and is without alpha, FA is without lambda: these weights would only stretch the axis. The last "
        "column does not depend on them.\n\n" + "\n".join(table)
    )
    section = Section("Figure 2b: eigenvalues of the Hessians", body, {"spectra": spectra}, (_tail(spectra),))
    return section.with_picture("figure2b.png")


_LABELS = {"ce": "CE", "kl": "T^2 KL", "fa": "FA"}


def _density(nodes: np.ndarray, weights: np.ndarray, linear_width: float) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and density, evenly spaced and widened on the axis on which they are drawn."""
    drawn = np.arcsinh(nodes / linear_width)
    grid = np.linspace(drawn.min() - 0.5, drawn.max() + 0.5, GRID)
    return linear_width * np.sinh(grid), landscape.density(drawn, weights, grid, WIDTH)


def _tail(spectra: dict[str, dict[str, float]]) -> str:
    """Whether CE's largest eigenvalue is the largest: by itself, and beside the root mean square of its own spectrum."""
    longest = [max(spectra, key=lambda loss: spectra[loss][name]) == "ce" for name in ("largest", "largest_by_rms")]
    decision = _holds(longest[0]) if longest[0] == longest[1] else "depends on the losses' scales"
    sizes = ", ".join(f"{_LABELS[n]} {row['largest']:.3g} ({row['largest_by_rms']:.3g})" for n, row in spectra.items())
    return f"the paper: CE has the longer Hessian tail: **{decision}** (largest eigenvalue, and by root mean square: {sizes})"


def _holds(condition: bool) -> str:
    return "holds" if condition else "does not hold"
