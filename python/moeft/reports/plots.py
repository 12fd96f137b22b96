"""Pictures of a run as PNG files: its losses, where its bytes are, and how much its layers matter.

Colours are the first ones of Okabe and Ito, which people with any colour vision can tell apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeft.errors import MissingExtraError
from moeft.reports.text import mib

_BLUE, _ORANGE, _GREY, _INK = "#0072B2", "#D55E00", "#B8B8B8", "#333333"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.markersize": 5,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def plot_loss(train_logs: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw training and held-out loss over steps, and the learning rate in a strip below.

    Args:
        train_logs: ``train_log`` events: ``step``, ``loss`` in nats per token, ``learning_rate``. A loss of None, from
            a step that was not finite, leaves a gap.
        evals: ``eval`` events: ``step``, ``loss``.
        path: PNG file to write.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with _figure(path, 7.0, 4.2) as figure:
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        train = _series(train_logs, "loss")
        losses.plot(*train, color=_BLUE, linewidth=1.6, label="training", marker="o" if len(train[0]) < 3 else None)
        if evals:
            held_out = _series(evals, "loss")
            losses.plot(*held_out, color=_ORANGE, linewidth=0.8, linestyle=":", marker="D", label="held out")
            last = (held_out[0][-1], held_out[1][-1])
            losses.annotate(f"{last[1]:.3f}", last, (0, 7), textcoords="offset points", ha="right", color=_ORANGE)
        losses.set_title("Loss")
        losses.set_ylabel("nats per token")
        losses.set_ylim(bottom=0)
        losses.grid(axis="y")
        losses.legend(loc="upper right")

        rates.fill_between(*_series(train_logs, "learning_rate"), color=_GREY, linewidth=0)
        rates.set_ylabel("learning\nrate")
        rates.set_ylim(bottom=0)
        rates.set_xlabel("optimizer step")
        rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        rates.yaxis.get_offset_text().set_fontsize(7)
        rates.tick_params(axis="y", labelsize=7)
        figure.align_ylabels()


def plot_capabilities(
    train_logs: Sequence[Mapping[str, Any]], gates: Sequence[Mapping[str, Any]], bounded: Sequence[str], path: Path
) -> None:
    """Draw the training loss and below it each capability with its interval, over the same steps.

    Args:
        train_logs: As for :func:`plot_loss`.
        gates: ``gate`` events: ``step``, ``verdict``, ``readings``.
        bounded: Names of the readings to draw.
        path: PNG file to write.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with _figure(path, 7.0, 1.8 + 1.5 * len(bounded)) as figure:
        losses, *others = figure.subplots(1 + len(bounded), 1, sharex=True)
        losses.plot(*_series(train_logs, "loss"), color=_BLUE, linewidth=1.6)
        losses.set_title("Training loss, and what the gate watches")
        losses.set_ylabel("nats per token")
        losses.grid(axis="y")
        for axes, name in zip(others, bounded, strict=True):
            found = {e["step"]: (e, r) for e in gates for r in e["readings"] if r["name"] == name}
            steps = sorted(found)
            readings = [found[step][1] for step in steps]
            low, value, high = ([_nan(reading[key]) for reading in readings] for key in ("low", "value", "high"))
            axes.fill_between(steps, low, high, color=_BLUE, alpha=0.15, linewidth=0)
            axes.plot(steps, value, color=_BLUE, linewidth=1.2, marker="o")
            axes.axhline(value[0], color=_GREY, linewidth=0.8, linestyle=":")
            breached = [i for i, step in enumerate(steps) if found[step][0]["breaches"]]
            axes.plot([steps[i] for i in breached], [value[i] for i in breached], "X", color=_ORANGE, markersize=8)
            axes.set_title(name, fontweight="normal")
            axes.grid(axis="y")
        others[-1].set_xlabel("optimizer step")
        others[-1].xaxis.get_major_locator().set_params(integer=True)
        figure.align_ylabels()


def plot_rates(points: Sequence[Mapping[str, Any]], bound: float, chosen: float, path: Path) -> None:
    """Draw the divergence that a range test found at each learning rate, with its bound and the rate that was taken.

    Args:
        points: ``rate`` and ``divergence`` in nats per token, None where a loss was not finite.
        bound: Largest divergence that was allowed.
        chosen: The rate that was taken.
        path: PNG file to write.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with _figure(path, 5.0, 3.2) as figure:
        axes = figure.subplots()
        axes.plot([p["rate"] for p in points], [_nan(p["divergence"]) for p in points], color=_BLUE, marker="o")
        axes.axhline(bound, color=_ORANGE, linewidth=0.8, linestyle=":", label="bound")
        axes.axvline(chosen, color=_GREY, linewidth=0.8, label="taken")
        axes.set_xscale("log")
        axes.set_yscale("log", nonpositive="clip")
        axes.set_title("Divergence from the base after a few steps")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("nats per token")
        axes.grid(axis="y")
        axes.legend(loc="upper left")


def plot_bytes(before: Mapping[str, int], after: Mapping[str, int], path: Path) -> None:
    """Draw bytes per component as a pair of bars each, the largest component first.

    Args:
        before: Bytes by component.
        after: Bytes by component; a component of one side only has no bar on the other.
        path: PNG file to write.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    names = sorted({**before, **after}, key=lambda name: max(before.get(name, 0), after.get(name, 0)), reverse=True)
    with _figure(path, 7.0, 1.3 + 0.52 * len(names)) as figure:
        axes = figure.subplots()
        for offset, side, color, label in ((-0.2, before, _GREY, "before"), (0.2, after, _BLUE, "after")):
            sizes = [side.get(name, 0) / 2**20 for name in names]
            bars = axes.barh([row + offset for row in range(len(names))], sizes, height=0.36, color=color, label=label)
            labels = [mib(side[name]) if name in side else "" for name in names]
            axes.bar_label(bars, labels, padding=3, fontsize=8)
        axes.set_title("Bytes per component")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("MiB")
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower right")


def plot_layer_importance(layers: Mapping[int, float], path: Path) -> None:
    """Draw the mean of the Fisher diagonal of every decoder layer, on a logarithmic axis where all are above zero.

    Args:
        layers: Decoder layer -> mean.
        path: PNG file to write.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with _figure(path, 7.0, 3.2) as figure:
        axes = figure.subplots()
        axes.bar(list(layers), list(layers.values()), color=_BLUE, width=0.8)
        axes.set_title("Importance of layers")
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("mean Fisher diagonal")
        if min(layers.values()) > 0:
            axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")


def plot_confusion(confusion: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """Draw which tool was called where which one was wanted; a share of each row's replies in shades of blue.

    Args:
        confusion: Wanted tool -> tool that was called -> replies.
        path: PNG file to write.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    rows = sorted(confusion)
    columns = sorted({name for row in confusion.values() for name in row} | set(rows))
    with _figure(path, 2.4 + 0.34 * len(columns), 1.8 + 0.28 * len(rows)) as figure:
        axes = figure.subplots()
        shares = [[confusion[row].get(name, 0) / sum(confusion[row].values()) for name in columns] for row in rows]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(rows):
            for x, name in enumerate(columns):
                if count := confusion[row].get(name):
                    axes.text(x, y, str(count), ha="center", va="center", fontsize=7,
                              color="white" if shares[y][x] > 0.6 else _INK)  # fmt: skip
        axes.set_title("Called tools by wanted tool, replies")
        axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        axes.set_xlabel("called")
        axes.set_ylabel("wanted")
        axes.tick_params(length=0)


def plot_rounds(rounds: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw held-out accuracy over rounds with its interval, and the gate's loss if there is one.

    Args:
        rounds: ``accuracy`` with ``value``, ``low`` and ``high``, and ``gate_loss`` or None, from round 0 on.
        path: PNG file to write.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    gated = [entry.get("gate_loss") for entry in rounds]
    with _figure(path, 5.0, 3.2) as figure:
        axes = figure.subplots()
        values = [entry["accuracy"]["value"] for entry in rounds]
        below = [entry["accuracy"]["value"] - entry["accuracy"]["low"] for entry in rounds]
        above = [entry["accuracy"]["high"] - entry["accuracy"]["value"] for entry in rounds]
        axes.errorbar(range(len(rounds)), values, (below, above), color=_BLUE, marker="o", capsize=3)
        axes.set_title("Right replies to held-out requests")
        axes.set_xlabel("round")
        axes.set_ylabel("share", color=_BLUE)
        axes.set_ylim(0, 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        if all(loss is not None for loss in gated):
            losses = axes.twinx()
            losses.plot(range(len(rounds)), gated, color=_ORANGE, linestyle=":", marker="D", linewidth=0.8)
            losses.set_ylabel("loss of the gate, nats per token", color=_ORANGE)
            losses.spines["right"].set_visible(True)


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of ``width`` x ``height`` inches, written to ``path`` at the end; no global style changes."""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("pictures need matplotlib; install it with: pip install 'moeft[report]'") from error
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _series(events: Sequence[Mapping[str, Any]], field: str) -> tuple[list[int], list[float]]:
    """Steps in order and the value of a field at each; None becomes NaN, which matplotlib leaves out.

    A run that continued from a checkpoint repeats a few steps; the later value counts.
    """
    values = {event["step"]: event[field] for event in events if field in event}
    steps = sorted(values)
    return steps, [float("nan") if values[step] is None else values[step] for step in steps]
