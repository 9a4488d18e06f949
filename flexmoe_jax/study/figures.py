"""Figures as SVG text that takes the page's colours: lines and letters are `currentColor`, the background is clear."""

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np

INK = "#010203"  # replaced by currentColor
PALETTE = ("#8a8f98", "#3b82d6", "#e2803a", "#2fa07a", "#b65fc4", "#d6a21f", "#d8504d", "#5b6ee1")
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "flexmoe", "font.family": "sans-serif", "font.size": 10,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": PALETTE[0],
    "grid.alpha": 0.25, "legend.frameon": False,
}  # fmt: skip


def colours(names: list[str]) -> dict[str, str]:
    """A colour for each expert, `public` grey."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def ranking(rows: list[tuple[str, dict]], method: str) -> str:
    """How much every system's mean bits per byte differ from the method's, with the interval, the best on top."""

    def draw(plt):
        figure, axes = plt.subplots(figsize=(7, 0.24 * len(rows) + 0.8))
        for place, (name, cell) in enumerate(reversed(rows)):
            colour = PALETTE[2] if name == method else PALETTE[1] if name.startswith(method) else PALETTE[0]
            error = [[cell["value"] - cell["low"]], [cell["high"] - cell["value"]]]
            axes.errorbar(cell["value"], place, xerr=error, fmt="o", color=colour, markersize=5, capsize=2)
        axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
        axes.axvline(0, color=PALETTE[2], linewidth=1)
        axes.set_xlabel(f"mean held-out bits per byte, difference to {method} (left is better)")
        return figure

    return _svg(draw, f"Every system's difference to {method}, with 95% intervals")


def learning_curves(groups: dict[str, dict[str, list]]) -> str:
    """A panel for each group, a line for each run: training loss by step."""

    def draw(plt):
        columns = min(3, len(groups))
        rows = -(-len(groups) // columns)
        figure, grid = plt.subplots(rows, columns, figsize=(3.3 * columns, 2.4 * rows), squeeze=False)
        for axes in grid.flat[len(groups) :]:
            axes.set_visible(False)
        for axes, (title, runs) in zip(grid.flat, groups.items(), strict=False):
            for colour, (name, points) in zip(PALETTE[1:], runs.items(), strict=False):
                axes.plot(*np.array(points).T, color=colour, label=name, linewidth=1.4)
            axes.set_title(title, fontsize=10)
            axes.legend(fontsize=7)
        figure.supxlabel("step", fontsize=10)
        figure.supylabel("training loss, nats per token", fontsize=10)
        return figure

    return _svg(draw, "Learning curves")


def routing(share: dict[str, list], experts: list[str]) -> str:
    """Heat maps: the mean weight each layer gives each expert, a map for each domain (the paper's Figure 2)."""

    def draw(plt):
        columns = min(4, len(share))
        rows = -(-len(share) // columns)
        layers = len(next(iter(share.values())))
        size = (2.5 * columns, (0.34 * layers + 1.3) * rows)
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
        for axes in grid.flat[len(share) :]:
            axes.set_visible(False)
        for axes, (domain, share_LE) in zip(grid.flat, share.items(), strict=False):
            axes.imshow(share_LE, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (layer, expert), value in np.ndenumerate(np.array(share_LE)):
                colour = "white" if value > 0.55 else "black"
                axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
            axes.set_title(f"{domain} text", fontsize=10)
            axes.set_xticks(range(len(experts)), experts, fontsize=8, rotation=30)
            axes.set_yticks(range(layers), [str(n) for n in range(layers)])
            axes.grid(False)
        grid[0, 0].set_ylabel("layer")
        return figure

    return _svg(draw, "Routed weight of each expert by layer and domain")


def matrix(values: dict[str, dict[str, float]]) -> str:
    """Rows leave, columns are read: the change in bits per byte."""

    def draw(plt):
        rows, columns = list(values), list(next(iter(values.values())))
        table = np.array([[values[row][column] for column in columns] for row in rows])
        most = np.abs(table).max() or 1.0
        figure, axes = plt.subplots(figsize=(1.1 * len(columns) + 1.6, 0.5 * len(rows) + 1.1))
        axes.imshow(table, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            colour = "white" if abs(value) > 0.6 * most else "black"
            axes.text(j, i, f"{value:+.3f}", ha="center", va="center", fontsize=9, color=colour)
        axes.set_xticks(range(len(columns)), columns, rotation=30)
        axes.set_yticks(range(len(rows)), [f"without {row}" for row in rows])
        axes.grid(False)
        return figure

    return _svg(draw, "Change in bits per byte when an owner leaves")


def _svg(draw: Callable, title: str) -> str:
    """What `draw(pyplot)` returns, a figure, as SVG of the page's width."""
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
