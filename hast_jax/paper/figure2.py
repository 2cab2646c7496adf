"""Figure 2 of the supplement, from checkpoints of the base cell: gradients during fine-tuning, Hessians at its end."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hast_jax import from_config
from hast_jax.errors import UserError
from hast_jax.paper import figures, landscape
from hast_jax.paper.experiments import RECIPE_LAM, Cell
from hast_jax.paper.sweep import Sweep
from hast_jax.paper.tables import Section
from hast_jax.runs import preemption, synthetic_set
from hast_jax.runs.run_folder import RunFolder, open_for_reading
from hast_jax.stages import finetune

Array = jax.Array
Variables = Mapping[str, Any]

BATCHES = 8  # number of batches on which the gradients are compared
HESSIAN_IMAGES, PROBES, DEPTH = 128, 4, 32
GRID, WIDTH = 800, 0.1  # number of points of a drawn density, and the width of each node in it


class Base(NamedTuple):
    """The finished base cell of the first seed.

    students: (epoch, trained variables) before fine-tuning and at the checkpoints that were kept.
    """

    losses: landscape.LossFunctions
    fixed: finetune.FixedInputs
    students: list[tuple[int, Any]]
    config: Any


def base(sweep: Sweep) -> Base:
    """The base cell, which is run first if it has not finished.

    Raises UserError if it failed, or if the checkpoint of its last epoch is gone.
    """
    cell, seed = Cell("HAST", {}), sweep.seeds[0]
    result = sweep.run_one(cell, seed)
    if "failed" in result:
        raise UserError(f"the base cell failed: {result['failed']}")
    folder, made = open_for_reading(sweep.path(cell, seed))
    config = sweep.config.copy_and_resolve_references()  # the paths in the cell's own config may have moved since
    config.seed, config.finetune.keep_every = seed, made.finetune.keep_every
    config.finetune.lam = config.finetune.lam or RECIPE_LAM  # neither figure depends on its value
    teacher, variables, student = from_config.bare_teacher(config), sweep.teacher, from_config.student(config)
    images, labels = synthetic_set.load(sweep.images({}, seed), tuple(config.teacher.image), config.teacher.classes)
    most = max(BATCHES * config.finetune.batch, HESSIAN_IMAGES)  # images that the figure needs
    count = min(most, config.synthesis.images)
    constants = jnp.asarray(images[:count]), jnp.asarray(labels[:count])
    fixed = finetune.fixed_inputs(variables, folder.read_ranges(student.range_names), *constants, config)
    losses = landscape.losses(teacher, student, config.finetune)
    students = list(_students(folder, variables, config.finetune, student.range_names))
    if students[-1][0] != config.finetune.epochs:
        raise UserError(
            f"{folder} has no checkpoint of its last epoch, which Figure 2 needs: delete the folder to run it again."
        )
    return Base(losses, fixed, students, config)


def _students(
    folder: RunFolder, variables: Variables, settings: Any, range_names: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[int, Any]]:
    fresh = finetune.init(variables["params"], folder.read_ranges(range_names), settings)
    yield 0, fresh.trained
    with folder.open_checkpoints("latest", keep=2, writing=False) as checkpoints:
        for step, state in checkpoints.restore_each(fresh):
            epoch = step // settings.steps_per_epoch
            whole = step % settings.steps_per_epoch == 0  # False for a checkpoint of a run that was stopped within an epoch
            if whole and (epoch % settings.keep_every == 0 or epoch == settings.epochs):
                yield epoch, state.trained


def gradient_angles(sweep: Sweep) -> Section:
    """Figure 2a: cosine similarity of gradients, on clean images without augmentation."""
    found = base(sweep)
    batch, images, labels = found.config.finetune.batch, found.fixed.images, found.fixed.labels
    batches = max(1, min(BATCHES, len(labels) // batch))
    cosines = jax.jit(partial(landscape.gradient_cosines, found.losses))
    values: dict[str, list[list[float]]] = {"fa": [], "ce": []}
    for _, trained in found.students:
        preemption.check()
        rows = (slice(i * batch, (i + 1) * batch) for i in range(batches))
        each = [cosines(trained, found.fixed, images[r], labels[r]) for r in rows]
        for loss, by_epoch in values.items():
            by_epoch.append([float(one[loss]) for one in each])
    epochs = [epoch for epoch, _ in found.students]
    curves = {"FA and KL": np.asarray(values["fa"]), "CE and KL": np.asarray(values["ce"])}
    figures.cosines(epochs, curves, sweep.workdir / "figure2a")
    body = (
        f"Cosine similarity of the gradients with respect to the student's parameters, on {batches} batches of {batch} clean "
        f"synthetic images. Error bars: standard deviation over batches. Seed {sweep.seeds[0]}."
    )
    title, data = "Figure 2a: do the losses pull in one direction?", {"epochs": epochs, "cosine_with_kl": values}
    return Section(title, body, data, angle_findings(epochs, values)).with_picture("figure2a.png")


def angle_findings(epochs: list[int], values: dict[str, list[list[float]]]) -> tuple[str, str]:
    """The supplement's two claims about Figure 2a, and whether they hold. values: loss -> [epochs, batches]."""
    means = {loss: np.mean(by_epoch, 1) for loss, by_epoch in values.items()}

    def say(loss):
        return f"cosine {means[loss].min():+.3f} to {means[loss].max():+.3f}, epochs 0 to {epochs[-1]}"

    return (
        f"the paper: gradients of FA and KL agree throughout: **{_holds(bool(np.all(means['fa'] > 0)))}** ({say('fa')})",
        f"the paper: gradients of CE and KL oppose throughout: **{_holds(bool(np.all(means['ce'] < 0)))}** ({say('ce')})",
    )


def hessian_spectra(sweep: Sweep) -> Section:
    """Figure 2b: eigenvalue densities at the end of fine-tuning, without the weights alpha and lambda of the losses."""
    found = base(sweep)
    trained, settings = found.students[-1][1], found.config.finetune
    constants = (found.fixed, found.fixed.images[:HESSIAN_IMAGES], found.fixed.labels[:HESSIAN_IMAGES])
    key = jax.random.fold_in(jax.random.key(found.config.seed), 5)
    probes = {}
    for loss, factor in {"ce": 1.0, "kl": 1 / settings.alpha, "fa": 1 / settings.lam}.items():

        def one(*arguments, loss=loss, factor=factor):
            return factor * found.losses(*arguments)[loss]

        probes[loss] = landscape.hessian_spectrum(one, trained, constants, key, PROBES, DEPTH)
    width = 1e-4 * max(float(np.abs(one.nodes).max()) for each in probes.values() for one in each)
    curves = {_LABELS[loss]: _density(landscape.average(each), width) for loss, each in probes.items()}
    figures.spectra(curves, width, sweep.workdir / "figure2b")
    spectra = {loss: moments(each) for loss, each in probes.items()}
    body = (
        f"With respect to the student's parameters at the end of fine-tuning, on {len(constants[1])} clean synthetic images, "
        f"by stochastic Lanczos quadrature ({PROBES} probes of depth {DEPTH}). Seed {sweep.seeds[0]}. KL "
        "includes its factor T^2 but not alpha, and FA does not include lambda: these weights would only stretch the axis. The "
        "last column does not depend on them. ± is its standard error over the probes.\n\n"
        "| | largest eigenvalue | smallest | mean | root mean square | largest / root mean square |\n"
        "|---|---|---|---|---|---|\n"
    )
    body += "\n".join(
        f"| {_LABELS[loss]} | {row['largest']:.3g} | {row['smallest']:.3g} | {row['mean']:.3g} | {row['root_mean_square']:.3g} "
        f"| {_ratio(row)} |"
        for loss, row in spectra.items()
    )
    section = Section("Figure 2b: eigenvalues of the Hessians", body, {"spectra": spectra}, (tail_finding(spectra),))
    return section.with_picture("figure2b.png")


_LABELS = {"ce": "CE", "kl": "T^2 KL", "fa": "FA"}


def moments(probes: list[landscape.Quadrature]) -> dict[str, float]:
    """Largest and smallest eigenvalue, mean, root mean square, largest / root mean square, and the error of this ratio.

    The error is a standard error. It comes from the root mean square alone, which is an average over probes. Any single probe
    finds the largest eigenvalue.
    """
    nodes, weights = landscape.average(probes)
    squares = [float(each.weights @ each.nodes**2) for each in probes]
    rms = float(np.sqrt(np.mean(squares)))
    ratio = float(nodes.max()) / rms
    return {
        "largest": float(nodes.max()),
        "smallest": float(nodes.min()),
        "mean": float(weights @ nodes),
        "root_mean_square": rms,
        "largest_by_rms": ratio,
        "largest_by_rms_error": ratio * float(np.std(squares, ddof=1)) / np.sqrt(len(squares)) / (2 * rms**2),
    }


def _density(spectrum: landscape.Quadrature, linear_width: float) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and density for a plot with an asinh axis: points are evenly spaced, and nodes equally wide, on this axis."""
    drawn = spectrum._replace(nodes=np.arcsinh(spectrum.nodes / linear_width))
    grid = np.linspace(drawn.nodes.min() - 0.5, drawn.nodes.max() + 0.5, GRID)
    return linear_width * np.sinh(grid), landscape.density(drawn, grid, WIDTH)


def tail_finding(spectra: dict[str, dict[str, float]]) -> str:
    """Whether CE has the largest ratio of the largest eigenvalue to the root mean square of all eigenvalues.

    The largest eigenvalue alone depends on the weight of the loss, but the ratio does not. The claim is undecided unless the
    difference is larger than twice its standard error.
    """
    ce, *others = (spectra[loss] for loss in ("ce", "kl", "fa"))

    def lead(other):
        return ce["largest_by_rms"] - other["largest_by_rms"]

    def error(other):
        return 2 * float(np.hypot(ce["largest_by_rms_error"], other["largest_by_rms_error"]))

    if any(lead(other) < -error(other) for other in others):
        decision = "does not hold"
    else:
        decision = "holds" if all(lead(other) > error(other) for other in others) else "undecided"
    sizes = ", ".join(f"{_LABELS[loss]} {_ratio(row)}" for loss, row in spectra.items())
    return f"the paper: CE has the longer Hessian tail: **{decision}** (largest eigenvalue by root mean square: {sizes})"


def _ratio(row: dict[str, float]) -> str:
    return f"{row['largest_by_rms']:.3g} ± {row['largest_by_rms_error']:.2g}"


def _holds(condition: bool) -> str:
    return "holds" if condition else "does not hold"
