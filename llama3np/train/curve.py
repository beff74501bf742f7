"""loss.png: the losses of metrics.jsonl over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llama3np.errors import InputError
from llama3np.train import durable, metrics

INSTALL = 'pip install "llama3np[train]"'
_POINTS = 500  # of the training curve at most: more than the picture has columns to show


def draw(metrics_path: Path, path: Path) -> None:
    """Draw training loss, a mean over neighbouring steps, and validation loss.

    The same metrics and version of matplotlib give the same bytes. Raises InputError, with what to
    install, where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"the curve needs matplotlib: {INSTALL}") from None
    lines = metrics.read(metrics_path)
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no window, no state that outlives this
    axes = figure.add_subplot()
    axes.set_xlabel("steps")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    _plot(axes, lines)
    durable.replace_file(
        path, lambda file: figure.savefig(file, format="png", metadata={"Software": None})
    )


def _plot(axes: Any, lines: list[dict[str, Any]]) -> None:
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    if train:
        axes.plot(*_smoothed(np.array(train)), label="training", linewidth=1)
    if validation:
        axes.plot(*zip(*validation, strict=True), label="validation", marker=".")
        best = min(loss for _, loss in validation)
        axes.set_title(f"lowest validation loss {best:.4f}", fontsize="medium")
    if train or validation:
        axes.legend()


def _smoothed(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses, (n, 2), as means over groups of neighbours, _POINTS of them at most."""
    groups = np.array_split(points, min(len(points), _POINTS))
    means = np.array([group.mean(axis=0) for group in groups])
    return means[:, 0], means[:, 1]
