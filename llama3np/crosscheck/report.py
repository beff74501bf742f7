"""Show a comparison: a table and sentences for people, one object for programs, a plot."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import Any

from llama3np.crosscheck import taps
from llama3np.crosscheck.compare import Comparison, Divergence, Flip, Row
from llama3np.errors import InputError

SHOWN = 10  # flips and missing taps that are listed one by one
STREAM = ("embed", "h_mid", "h", "norm", "logits")  # the stream that everything is added to

# ---- for programs --------------------------------------------------------------------------------


def as_json(result: Comparison) -> dict[str, Any]:
    """What --json prints. A number that is not finite is a string: "nan", "inf" or "-inf"."""
    first = result.first_divergence
    return {
        "verdict": result.verdict,
        "first_divergence": None if first is None else plain(asdict(first)),
        "taps": {row.name: plain(_row(row)) for row in result.rows},
        "recognised": result.recognised,
        "missing": result.missing,
        "unused": result.unused,
        "ties": [plain(flip._asdict()) for flip in result.flips],
        "notes": result.notes,
        "precision": result.precision._asdict(),
        "factor": result.factor,
    }


def _row(row: Row) -> dict[str, Any]:
    found = row._asdict() | {"allowed": row.allowed and row.allowed._asdict()}
    found["ulps"] = row.ulps and row.ulps._asdict()
    found["kl"] = row.kl and {"mean": row.kl[0], "max": row.kl[1]}
    return {key: value for key, value in found.items() if key != "name" and value is not None}


def plain(value: Any) -> Any:
    """The same for JSON, which has no numbers that are not finite."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not isfinite(value) else value


# ---- for people ----------------------------------------------------------------------------------


def lines(result: Comparison) -> Iterator[str]:
    """What is said around the table: how it was judged and read, and what was found."""
    kind = result.precision
    yield (
        f"judged as {kind.dtype} ({kind.why}): budget is {result.factor} x the measured error of "
        f"{' and '.join(kind.profiles)}"
    )
    yield from result.notes
    yield from recognised_lines(result.recognised, [row.name for row in result.rows])
    if result.unused:
        yield f"not compared, as no tap of the reference: {some(result.unused)}"
    if result.missing:
        yield f"missing in the candidate: {some(folded(result.missing))}"
    yield from map(flip_line, result.flips[:SHOWN])
    if len(result.flips) > SHOWN:
        yield f"and {len(result.flips) - SHOWN} more positions with another likeliest token"
    yield verdict_line(result)


def recognised_lines(recognised: Mapping[str, list[str]], names: Iterable[str]) -> Iterator[str]:
    """What was done to which of the taps that were compared."""
    compared = {taps.parse(name)[1] for name in names}
    for words, kinds in recognised.items():
        yield f"recognised {words}: {'every tap' if compared <= set(kinds) else ', '.join(kinds)}"


def some(names: list[str]) -> str:
    """The first of many names."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def folded(names: list[str]) -> list[str]:
    """Taps by kind, "layers.*.q" for all of its layers that are among them."""
    kinds = dict.fromkeys(taps.parse(name)[1] for name in names)
    return [f"layers.*.{kind}" if kind in taps.LAYER else kind for kind in kinds]


def flip_line(flip: Flip) -> str:
    """One position at which the likeliest token is another one."""
    return (
        f"position {flip.position}: likeliest token {flip.found} in place of {flip.expected}, "
        f"margin {flip.margin:.3g} = {flip.budgets:.2g} budgets: "
        f"{'a tie' if flip.tie else 'no tie'}"
    )


def verdict_line(result: Comparison) -> str:
    """The verdict in one sentence."""
    if result.first_divergence:
        return "diverges first at " + divergence_line(result.first_divergence)
    count = len(result.rows)
    if result.verdict == "incomplete":
        agree = "1 tap agrees" if count == 1 else f"{count} taps agree"
        return f"incomplete: {agree}, but logits are missing (--partial compares without)"
    return "agrees: " + ("1 tap, " if count == 1 else f"{count} taps, all ") + "within the budget"


def divergence_line(first: Divergence) -> str:
    """Where it begins, with both values."""
    if first.position is None:
        return f"{first.tap}: {first.why}"
    head = "" if first.head is None else f", head {first.head}"
    return (
        f"{first.tap}, position {first.position}{head}, index {first.index}: expected "
        f"{first.expected:.7g}, found {first.found:.7g}, allowed {first.allowed:.2g} off "
        f"({first.why})"
    )


def table(result: Comparison, full: bool = False) -> Any:
    """A rich table, a row for each tap; of layers in which nothing is wrong one for all, or `full`.

    After the first layer that diverges, layers are told by the worst of their taps too.
    """
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for name in ("tap", "max abs", "budgets", "NMSE", "cosine", "ulps median", "max", "KL mean"):
        shown.add_column(name, justify="left" if name == "tap" else "right", no_wrap=True)
    shown.add_column("")
    first = result.first_divergence
    for layer, group in groupby(result.rows, key=lambda row: taps.parse(row.name)[0]):
        rows = list(group)
        whole = full or layer is None or (first is not None and first.layer == layer)
        if whole or len(result.rows) <= 2 * (len(taps.DIMS)):
            for row in rows:
                shown.add_row(row.name, *cells(row))
        else:
            worst = max(rows, key=budgets)
            shown.add_row(f"layers.{layer}: {len(rows)} taps, worst {worst.name}", *cells(worst))
    return shown


def budgets(row: Row) -> float:
    """How much of its budget a tap uses: over 1 is too much."""
    if row.allowed is None or row.max_abs is None or row.nmse is None:
        return float("inf")
    parts = [(row.max_abs, row.allowed.max_abs), (row.nmse**0.5, row.allowed.nmse**0.5)]
    return max((far / most if most else float("inf")) if far else 0.0 for far, most in parts)


def cells(row: Row) -> list[str]:
    """The numbers of one tap as text."""
    if row.allowed is None or row.ulps is None:
        return ["", "", "", "", "", "", "", "SHAPE"]
    kl = "" if row.kl is None else f"{row.kl[0]:.2g}"
    ulps = [f"{row.ulps.median:g}", f"{row.ulps.max:.6g}"]
    numbers = [f"{row.max_abs:.2e}", f"{budgets(row):.2g}", f"{row.nmse:.1e}", f"{row.cosine:.7f}"]
    return [*numbers, *ulps, kl, "ok" if row.agrees else "OVER"]


# ---- a plot --------------------------------------------------------------------------------------


def figure_class() -> Any:
    """Matplotlib's Figure; InputError, with the command that installs it, where it is not there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('--plot: needs matplotlib: pip install "llama3np[explain]"') from None
    return Figure


def plot(result: Comparison, path: str | Path) -> None:
    """Write a plot of the error's growth over depth: relative error of each tap, and the budget.

    Raises InputError without matplotlib, for an ending that it does not write, and for a path that
    cannot be written; then nothing is left there.
    """
    path = Path(path)
    figure = figure_class()(figsize=(10, 5), layout="constrained")
    if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise InputError(f"{path}: expected a picture, .png, .svg or .pdf, found {path.suffix!r}")
    draw(result, figure.subplots())
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format=path.suffix[1:].lower(), dpi=150)
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def draw(result: Comparison, axes: Any) -> None:
    """Relative errors, sqrt(NMSE), in execution order; a zero, or no number, is not drawn."""
    rows = [(i, row) for i, row in enumerate(result.rows) if row.allowed and row.nmse is not None]
    stream = [(i, row) for i, row in rows if taps.parse(row.name)[1] in STREAM]
    limit = [row.allowed.nmse**0.5 for _, row in rows if row.allowed]
    axes.plot([i for i, _ in rows], limit, color="0.5", label="budget")
    for points, style, label in ((rows, ".", "taps"), (stream, "o-", "residual stream, logits")):
        drawn = [(i, row.nmse**0.5) for i, row in points if row.nmse and isfinite(row.nmse)]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), style, ms=4, label=label)
    if result.first_divergence:
        first = next(i for i, row in enumerate(result.rows) if not row.agrees)
        axes.axvline(first, color="C3", ls=":", label=f"first: {result.first_divergence.tap}")
    starts = {taps.parse(row.name)[0]: i for i, row in reversed(list(enumerate(result.rows)))}
    axes.set_xticks([i for layer, i in starts.items() if layer is not None])
    axes.set_xticklabels([layer for layer in starts if layer is not None], fontsize=7)
    axes.set(yscale="log", xlabel="layer", ylabel="relative error, sqrt(NMSE)")
    axes.legend(fontsize=8)
