"""Figures as SVG text that takes the page's colors: lines and letters are `currentColor`, the background is clear."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flexmoe_jax.study.results import MARK_MEANS, MEAN, Kind, SystemResult

INK = "#010203"  # replaced by currentColor
PALETTE = ("#8a8f98", "#3b82d6", "#e2803a", "#2fa07a", "#b65fc4", "#d6a21f", "#d8504d", "#5b6ee1")
KIND_COLORS = {Kind.METHOD: PALETTE[2], Kind.BASELINE: PALETTE[1], Kind.ABLATION: PALETTE[3], Kind.PART: PALETTE[0]}
COMPARED = (Kind.METHOD, Kind.BASELINE)  # in pictures of what a reader chooses between
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flexmoe",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": PALETTE[0],
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def expert_colors(names: Sequence[str]) -> dict[str, str]:
    """A color for each expert; the first, `public`, is grey."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def ranking(groups: Mapping[Kind, Sequence[SystemResult]], method: str) -> str:
    """Each system's difference to the method in mean bits per byte, with its interval; grouped, the best on top."""

    def draw(plt: Any) -> Any:
        rows: list[tuple[Kind, SystemResult | None]] = []
        for kind, systems in groups.items():
            rows += [(kind, None), *((kind, system) for system in systems)]
        figure, axes = plt.subplots(figsize=(8.5, 0.23 * len(rows) + 0.8))
        for place, (kind, system) in enumerate(rows):
            if system is not None:
                at = system.against_method.get(MEAN)
                value, low, high = (at.value, at.low, at.high) if at else (0.0, 0.0, 0.0)
                axes.errorbar(
                    value,
                    place,
                    xerr=[[value - low], [high - value]],
                    fmt="o",
                    color=KIND_COLORS[kind],
                    markersize=5,
                    capsize=2,
                )
        labels = [kind.heading if system is None else system.label for kind, system in rows]
        axes.set_yticks(range(len(rows)), labels)
        for label, (_, system) in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if system is None else "normal")
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.axvline(0, color=KIND_COLORS[Kind.METHOD], linewidth=1)
        marked = any(system.sees_text for _, system in rows if system)
        means = f"mean held-out bits per byte, difference to {method} (left is better)"
        axes.set_xlabel(f"{means}\n{MARK_MEANS}" if marked else means)
        return figure

    return _svg(draw, f"Every system's difference to {method}, with 95% intervals")


def costs(groups: Mapping[Kind, Sequence[tuple[SystemResult, float]]]) -> str:
    """Mean bits per byte by what a token costs: (system, multiple of the public model's operations), grouped.

    Without systems that see the text they score: their costs are not those of a language model.
    """

    def draw(plt: Any) -> Any:
        figure, axes = plt.subplots(figsize=(8.5, 4.2))
        for kind, systems in groups.items():
            shown = [(system.name, cost, system.mean.value) for system, cost in systems if not system.sees_text]
            x, y = [cost for _, cost, _ in shown], [bits for _, _, bits in shown]
            axes.plot(x, y, "o", color=KIND_COLORS[kind], label=kind.heading, markersize=5)
            for name, *place in shown:
                axes.annotate(name, place, (5, 0), textcoords="offset points", fontsize=7, va="center")
        axes.set_xlabel("operations of a token, as a multiple of the public model's")
        axes.set_ylabel("mean held-out bits per byte")
        axes.margins(x=0.15)
        axes.legend(fontsize=8)
        return figure

    return _svg(draw, "What a token costs, and what it buys")


def learning_curves(panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> str:
    """A panel for each text, a line for each system: training loss by step."""

    def draw(plt: Any) -> Any:
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        figure, grid = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.5 * rows), squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (text, runs) in zip(grid.flat, panels.items(), strict=False):
            for color, (name, points) in zip(PALETTE[1:], runs.items(), strict=False):
                axes.plot(*np.array(points).T, color=color, label=name, linewidth=1.4)
            axes.set_title(f"{text} text", fontsize=10)
            axes.legend(fontsize=7, handlelength=1.2)
        figure.supxlabel("step", fontsize=10)
        figure.supylabel("training loss, nats per token", fontsize=10)
        return figure

    return _svg(draw, "Learning curves")


def routing(share: Mapping[str, Sequence[Sequence[float]]], experts: Sequence[str]) -> str:
    """Heat maps, one per domain: the mean weight that each layer gives each expert (the paper's Figure 2)."""

    def draw(plt: Any) -> Any:
        columns = min(4, len(share))
        rows = -(-len(share) // columns)
        layers = len(next(iter(share.values())))
        size = (max(2.5, 0.55 * len(experts)) * columns, (0.34 * layers + 1.3) * rows)
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
        for axes in grid.flat[len(share) :]:
            axes.set_visible(False)
        for axes, (domain, share_LE) in zip(grid.flat, share.items(), strict=False):
            _heat_map(axes, np.array(share_LE), "{:.2f}", cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"{domain} text", fontsize=10)
            axes.set_xticks(range(len(experts)), experts, fontsize=8, rotation=30)
            axes.set_yticks(range(layers), [str(n) for n in range(layers)])
        grid[0, 0].set_ylabel("layer")
        return figure

    return _svg(draw, "Routed weight of each expert by layer and domain")


def matrix(values: Mapping[str, Mapping[str, float]], title: str) -> str:
    """A heat map of changes in bits per byte (blue is better): `values` by row and column, by the names shown."""

    def draw(plt: Any) -> Any:
        rows, columns = list(values), list(next(iter(values.values())))
        table = np.array([[values[row][column] for column in columns] for row in rows])
        most = np.abs(table).max() or 1.0
        figure, axes = plt.subplots(figsize=(1.1 * len(columns) + 1.6, 0.5 * len(rows) + 1.1))
        _heat_map(axes, table, "{:+.3f}", cmap="RdBu_r", vmin=-most, vmax=most)
        axes.set_xticks(range(len(columns)), columns, rotation=30)
        axes.set_yticks(range(len(rows)), rows)
        return figure

    return _svg(draw, title)


def _heat_map(axes: Any, values: np.ndarray, text: str, **colors: Any) -> None:
    """A colored cell for each entry of a matrix, with the number in it; `text` is its format."""
    axes.imshow(values, aspect="auto", **colors)
    for (row, column), value in np.ndenumerate(values):
        ink = "white" if abs(value) > 0.58 * colors["vmax"] else "black"
        axes.text(column, row, text.format(value), ha="center", va="center", fontsize=8, color=ink)
    axes.grid(False)


def _svg(draw: Callable[[Any], Any], title: str) -> str:
    """The figure that `draw(pyplot)` returns as SVG of the page's width."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure = draw(plt)
        figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Title": title})
        plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg).groups()  # type: ignore[union-attr]
    size = f'style="width:100%;max-width:{float(width) * 4 / 3:.0f}px;height:auto" role="img" aria-label="{title}"'
    return svg.replace(f'width="{width}pt" height="{height}pt"', size, 1)
