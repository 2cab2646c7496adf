"""The figures of the supplement, and accuracy over time, as PNG and SVG. They are readable when printed in grey."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

STYLES: tuple[dict[str, Any], ...] = (
    {"linestyle": "-", "marker": "o"},
    {"linestyle": "--", "marker": "s"},
    {"linestyle": ":", "marker": "^"},
)
COLOURS = ("#1b1b1b", "#b34a00", "#0072b2")  # they differ clearly in lightness


def sensitivity(panels: dict[str, list[tuple[float, float, float | None]]], teacher: float, path: Path) -> None:
    """Accuracy over each hyper-parameter (Figure 1). panels: name -> (value, mean, standard deviation or None)."""
    figure = Figure(figsize=(3.2 * len(panels), 3), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, points) in zip(axes, panels.items()):
        values, means, deviations = zip(*points)
        bars = [np.nan if each is None else each for each in deviations]  # no bar where a mean is of one seed
        axis.errorbar(values, means, bars, color=COLOURS[0], capsize=3, **STYLES[0])
        axis.set_xlabel("lambda" if name == "lam" else name)
    figure.axes[0].set_ylabel("top-1, %")
    figure.suptitle(f"Sensitivity (teacher: {teacher:.2f} %)")
    save(figure, path)


def cosines(epochs: list[int], values: dict[str, np.ndarray], path: Path) -> None:
    """Cosine similarity of gradients during fine-tuning (Figure 2a). values: label -> [epochs, batches]."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for (label, each), style, colour in zip(values.items(), STYLES, COLOURS):
        axis.errorbar(epochs, each.mean(1), each.std(1), color=colour, capsize=3, label=label, **style)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xlabel="epochs of fine-tuning", ylabel="cosine similarity")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    save(figure, path)


def spectra(spectra: dict[str, tuple[np.ndarray, np.ndarray]], linear_width: float, path: Path) -> None:
    """Eigenvalue density of each loss's Hessian (Figure 2b), one panel per loss. spectra: label -> eigenvalues, density.

    The axis of eigenvalues is linear within `linear_width` of zero and logarithmic beyond. It thus shows both the bulk and
    single large eigenvalues.
    """
    figure = Figure(figsize=(4.2 * len(spectra), 3.2), layout="constrained")
    axes = figure.subplots(1, len(spectra), sharex=True, sharey=True, squeeze=False)[0]
    everywhere = np.concatenate([eigenvalues for eigenvalues, _ in spectra.values()])
    ticks = _decades(everywhere.min(), everywhere.max(), linear_width)
    for axis, (name, (eigenvalues, density)) in zip(axes, spectra.items()):
        axis.plot(eigenvalues, np.maximum(density, 1e-12), color=COLOURS[0])
        axis.set_xscale("asinh", linear_width=linear_width)
        axis.set(title=name, xlabel="eigenvalue", yscale="log", ylim=(1e-7, None))
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
    figure.axes[0].set_ylabel("density")
    save(figure, path)


def over_time(curves: dict[str, list[tuple[float, float]]], teacher: float, path: Path) -> None:
    """Top-1 over the time of the whole job. curves: label -> (seconds, top-1 in per cent)."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for number, (label, points) in enumerate(curves.items()):
        seconds, top1 = zip(*points)
        style, colour = STYLES[number % len(STYLES)], COLOURS[(number + number // len(STYLES)) % len(COLOURS)]
        axis.plot([each / 60 for each in seconds], top1, color=colour, label=label, **style)
    axis.axhline(teacher, color="grey", linewidth=0.8)
    axis.annotate("teacher", (0, teacher), textcoords="offset points", xytext=(2, -10), color="grey")
    axis.set(xlabel="minutes from the start of the job", ylabel="top-1, %", xlim=(0, None))
    axis.legend()
    save(figure, path)


def _decades(low: float, high: float, linear_width: float) -> list[float]:
    """Ticks: zero, and every second power of ten within [low, high] that can be told apart from zero on the axis."""
    powers = 10.0 ** np.arange(np.ceil(np.log10(10 * linear_width)), np.log10(max(-low, high, 10 * linear_width)) + 1, 2)
    return [*(-power for power in reversed(powers) if power <= -low), 0, *(power for power in powers if power <= high)]


def save(figure: Any, path: Path) -> None:
    """Write `path`.png and `path`.svg. The same figure always gives the same bytes."""
    path = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "hast_jax"}):
        figure.savefig(f"{path}.png", dpi=150)
        figure.savefig(f"{path}.svg", metadata={"Date": None})
