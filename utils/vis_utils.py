"""Drawing: tensors on the CPU and a title in, a figure out. Imports no torch."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import unicodedata
import warnings
from typing import TYPE_CHECKING

import numpy as np
from einops import rearrange
from matplotlib import font_manager, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.cli import one_line

if TYPE_CHECKING:
    import torch

rcParams["text.parse_math"] = False  # a $ in a name is a $
warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names may be in any script


def legible(names: list[str]) -> list[str]:
    """All names of a picture as a font of this machine can write them: with further fonts than matplotlib's where these
    have their characters, else their places, `#3`, which a line on stderr explains.
    """
    rcParams["font.family"] = ["DejaVu Sans"]
    missing = {ord(char) for name in names for char in name if char.isprintable()}
    missing -= set(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())
    for path in sorted(font_manager.findSystemFonts()) if missing else ():  # also those newer than matplotlib's cache
        with contextlib.suppress(OSError, RuntimeError):  # a file that is no font
            font = font_manager.get_font(path)
            if missing & (found := set(font.get_charmap())) and not font.style_flags:  # upright, not bold
                font_manager.fontManager.addfont(path)
                rcParams["font.family"] = [*rcParams["font.family"], font.family_name]
                missing -= found
    unknown = {name: f"#{names.index(name)}" for name in names if missing.intersection(map(ord, name))}
    if unknown:
        shown = ", ".join(f"{number} {name}" for name, number in list(unknown.items())[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        print(f"no font here has the characters of {shown}{more}: pictures show the numbers", file=sys.stderr)
    return [unknown.get(name, one_line(name)) for name in names]


def width(text: str, size: float) -> float:
    """Inches that a line takes at this size of the font; characters of other fonts are as wide as high."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    font.set_size(size, 72)
    narrow = "".join(char for char in text if cells(char) == 1)
    font.set_text(narrow)
    return font.get_width_height()[0] / 64 / 72 + (len(text) - len(narrow)) * size / 72


def wrap(text: str, inches: float, size: float) -> str:
    """Lines that are broken where they would be longer than so many inches."""
    lines = []
    for line in text.split("\n"):
        longest = len(line)
        while line and max(width(part, size) for part in textwrap.wrap(line, longest) or [""]) > inches:
            longest = longest * 9 // 10
        lines += textwrap.wrap(line, longest) if line else [line]
    return "\n".join(lines)


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of so many inches, that is only ever saved, never shown; the title's lines fit into it."""
    figure = Figure(figsize=(max(6.5, width), height), layout="constrained")
    FigureCanvasAgg(figure)
    title = wrap(title, figure.get_figwidth() - 0.3, 10)
    figure.set_figheight(height + 0.16 * max(0, title.count("\n") - 1))
    figure.suptitle(title, fontsize=10)
    return figure


def legend_below(figure) -> None:
    """A legend under the figure, in as many columns as fit, which makes it that much higher."""
    size = 9
    handles, labels = figure.axes[0].get_legend_handles_labels()
    labels = [wrap(label, figure.get_figwidth() - 1, size) for label in labels]
    longest = max(width(line, size) for label in labels for line in label.split("\n"))
    columns = max(1, min(4, len(labels), int((figure.get_figwidth() - 0.3) // (longest + 0.6))))
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=size)
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent(figure.canvas.get_renderer()).height / 100)


def cells(text: str) -> int:
    """How many letters a text is as wide as; Chinese, Japanese and Korean characters count two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def shorten(text: str, length: int = 20) -> str:
    if cells(text) <= length:
        return text
    while cells(text) > length - 1:
        text = text[:-1]
    return f"{text}…"


def plot_confusion(confusion: torch.Tensor, classes: list[str], title: str):
    """Draw a confusion matrix, (classes, classes) counts whose rows are the true classes, in percent of each row.

    Colour shows the errors, up to the largest; gray is what is right, on the diagonal, and a class without images.
    """
    n = len(classes)
    percent = (100 * confusion / confusion.sum(dim=1, keepdim=True)).numpy()
    errors = np.where(np.eye(n, dtype=bool), np.nan, percent)
    names = [shorten(name, 24) for name in legible(classes)]
    size = 9 if n <= 20 else 7 if n <= 50 else 5.5
    labels = max(width(name, size) for name in names)
    side = min(12.0, 3.0 + 0.35 * n)
    figure = new_figure(side + 1.6 + labels, side + labels, title)
    axes = figure.add_subplot()
    axes.set_facecolor("0.88")
    image = axes.imshow(errors, cmap="Reds", vmin=0, vmax=max(1.0, np.nan_to_num(errors).max()))
    figure.colorbar(image, ax=axes, label="errors, % of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true")
    ticks = range(0, n, -(-n // 100))
    axes.set_xticks(ticks, [names[i] for i in ticks], rotation=90, fontsize=size)
    axes.set_yticks(ticks, [names[i] for i in ticks], fontsize=size)
    if n <= 20:
        for i, j in np.argwhere(~np.isnan(percent)):
            color = "white" if i != j and percent[i, j] > 0.6 * image.norm.vmax else "black"
            axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", fontsize=7, color=color)
    return figure


def _middles(parts: list[tuple[str, int, int]], apart: float) -> tuple[list[float], list[str]]:
    """Where and how to name parts of an axis; those closer than `apart` are named together."""
    places, names = [], []
    for name, start, end in parts:
        middle = (start + end - 1) / 2
        if places and middle - places[-1] < apart:
            places[-1], names[-1] = (places[-1] + middle) / 2, f"{names[-1]}\n{name}"
        else:
            places, names = [*places, middle], [*names, name]
    return places, names


def _unlike(matrices: np.ndarray, parts: list[tuple[str, int, int]], tolerance: float) -> list[int]:
    """Rows of (heads, n, n) without those that another one of the same scale is like, within a tolerance."""
    kept = []
    for _, start, end in [("", 0, parts[0][1]), *parts]:
        first = len(kept)
        for row in range(start, end):
            apart = np.abs(matrices[:, kept[first:]] - matrices[:, row : row + 1]).max(axis=(0, 2), initial=0)
            if apart.min(initial=np.inf) > tolerance:
                kept.append(row)
    return kept


def plot_heads(
    maps: torch.Tensor, blocks: list[int], heads: list[int], parts: list[tuple[str, int, int]], image: torch.Tensor,
    merged: list[int], title: str,
):  # fmt: skip
    """Draw attention (blocks, heads, n, n), whose rows are the attending tokens, a row a block, a column a head, beside
    the image (3, h, w) in 0..1.

    `blocks` and `heads` are their numbers; `parts` name, first and last + 1 token of each scale: several are told apart
    by lines. Of the blocks `merged`, where many tokens look alike, rows that look the same are drawn once.
    """
    rows, columns, n, _ = maps.shape
    side = min(2.6, max(1.3, 12 / columns))
    figure = new_figure(side * (columns + 0.8) + 1.8, side * rows + 1.2, title)
    grid = figure.subplots(rows, columns + 1, squeeze=False, sharex="col", width_ratios=[0.8, *[1] * columns])
    for axes in grid[:, 0]:
        axes.axis("off")
    grid[0, 0].imshow(image.permute(1, 2, 0).numpy())
    ticks = _middles(parts, apart=0.05 * n)
    for matrices, block, line in zip(maps.numpy(), blocks, grid[:, 1:], strict=True):
        low, high = np.quantile(matrices, (0.005, 0.995))  # single tokens that draw it all would leave the rest dark
        low, high = min(low, 0.5 / n), max(high, 1.5 / n)  # nor shows an even share as noise
        kept = _unlike(matrices, parts, (high - low) / 10) if block in merged else list(range(n))
        places = [(name, *np.searchsorted(kept, (start, end))) for name, start, end in parts]
        for axes, matrix, head in zip(line, matrices[:, kept], heads, strict=True):
            drawn = axes.imshow(matrix, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
            axes.set_box_aspect(1)
            axes.tick_params(labelsize=7, labelleft=axes is line[0])
            if block == blocks[0]:
                axes.set_title(f"head {head}", fontsize=9)
            if len(parts) > 1:
                for (_, start, _), (_, top, _) in zip(parts[1:], places[1:], strict=True):
                    axes.axhline(top - 0.5, color="white", linewidth=0.6)
                    axes.axvline(start - 0.5, color="white", linewidth=0.6)
                axes.set_xticks(*ticks, rotation=90)
                axes.set_yticks(*_middles(places, apart=0.05 * len(kept)))
            elif len(kept) < n:
                axes.set_yticks(range(len(kept)), kept)
        alike = f"\n{len(kept)} kinds of {n} rows" if len(kept) < n else ""
        line[0].set_ylabel(f"block {block}: token that attends{alike}", fontsize=8)
        bar = figure.colorbar(drawn, ax=list(line), extend="both", pad=0.01)
        bar.ax.tick_params(labelsize=7)
    figure.supxlabel("token that is attended to", fontsize=9)
    return figure


def plot_overlays(images: torch.Tensor, names: list[str], rows: list[tuple[str, torch.Tensor]], title: str):
    """Draw images (b, 3, h, w) in 0..1 in columns with names, and below each the maps over it.

    `rows` are label and maps (b, rows, columns) of patches; 1 stands for an even share.
    """
    pixels = images.permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1:3]
    b = len(images)
    figure = new_figure(1.45 * b + 1.8, 1.5 * (len(rows) + 1) + 0.8, title)
    grid = figure.subplots(len(rows) + 1, b + 1, squeeze=False, width_ratios=[1.0] * b + [0.08])
    grid, bars = grid[:, :b], grid[:, b]
    bars[0].axis("off")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, image, name in zip(grid[0], pixels, names, strict=True):
        axes.imshow(image)
        axes.set_title(name, fontsize=8)
    grid[0, 0].set_ylabel("image", fontsize=8)
    for (label, maps), line, place in zip(rows, grid[1:], bars[1:], strict=True):
        low, high = min(0.5, maps.min().item()), max(1.5, np.quantile(maps.numpy(), 0.99))  # noise stays pale
        for axes, image, heat in zip(line, pixels, maps.numpy(), strict=True):
            axes.imshow(image.mean(axis=-1), cmap="gray", vmin=-0.5, vmax=1)  # what is black is seen through colour
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            shown = axes.imshow(heat, cmap="inferno", vmin=low, vmax=high, alpha=0.6, extent=extent)
        line[0].set_ylabel(label, fontsize=8)
        figure.colorbar(shown, cax=place, extend="max")
        place.tick_params(labelsize=7)
    figure.supxlabel("colour: attention that a patch receives from the class token, 1 = an even share", fontsize=9)
    return figure


def plot_distances(distances: torch.Tensor, even: float, title: str):
    """Draw the mean attention distance (depth, heads) in pixels by depth, one dot a head.

    `even` is the distance if every token attended to all it sees alike.
    """
    depth, heads = distances.shape
    figure = new_figure(6.5, 4.2, title)
    axes = figure.add_subplot()
    axes.axhline(even, color="gray", linestyle="--", linewidth=1, label="even attention")
    axes.plot(distances.mean(dim=1).numpy(), color="black", linewidth=1, label="mean over heads")
    blocks = np.arange(depth).repeat(heads)
    axes.scatter(blocks, distances.flatten().numpy(), s=26, alpha=0.7, zorder=3, label="one head")
    axes.set(xlabel="block", ylabel="mean attention distance (pixels)")
    axes.set_ylim(0, 1.1 * max(even, distances.max().item()))
    axes.set_xticks(range(0, depth, max(1, depth // 12)))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def tile(tiles: np.ndarray, columns: int, gap: int, fill: float | tuple) -> np.ndarray:
    """Lay tiles (n, h, w, ...) out in rows of `columns`, `gap` >= 1 pixels of `fill` between; (rows, columns, ...)."""
    n, height, width, *rest = tiles.shape
    rows = -(-n // columns)
    canvas = np.full((rows * columns, height + gap, width + gap, *rest), fill, dtype=np.float32)
    canvas[:n, :height, :width] = tiles
    return rearrange(canvas, "(r c) h w ... -> (r h) (c w) ...", c=columns)[:-gap, :-gap]


def _panels(count: int, height: float, title: str):
    """A figure and its `count` axes, at most two in a row."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure = new_figure(5.0 * columns + 1.2, height * rows + 0.6, title)
    return figure, [figure.add_subplot(rows, columns, 1 + i) for i in range(count)]


def plot_similarity(tables: list[tuple[str, torch.Tensor, tuple[int, int]]], title: str):
    """Draw, for patches spread over the grid, how alike their position embedding is to each one of the grid.

    `tables` has name, cosine similarity (n, n) and grid (rows, columns) of each scale.
    """
    figure, panels = _panels(len(tables), 5.0, title)
    low = min(similarity.min().item() for _, similarity, _ in tables)
    for axes, (name, similarity, (rows, columns)) in zip(panels, tables, strict=True):
        shown = [np.linspace(0, side - 1, min(side, 8)).round().astype(int) for side in (rows, columns)]
        gap = max(1, rows // 7)
        maps = similarity.numpy().reshape(rows, columns, rows, columns)
        tiles = rearrange(maps[np.ix_(*shown)], "h w rows columns -> (h w) rows columns")
        image = axes.imshow(tile(tiles, len(shown[1]), gap, np.nan), vmin=low, vmax=1, interpolation="nearest")
        for set_ticks, places, side in ((axes.set_yticks, shown[0], rows), (axes.set_xticks, shown[1], columns)):
            set_ticks(np.arange(len(places)) * (side + gap) + (side - 1) / 2, places, fontsize=8)
        left_out = len(tiles) < rows * columns
        which = f", {len(shown[0])} x {len(shown[1])} of them shown, the others left out" if left_out else ""
        axes.set_title(f"{name}, grid {rows} x {columns}{which}", fontsize=9)
        axes.set_xlabel("column of the patch", fontsize=9)
        axes.set_ylabel("row of the patch", fontsize=9)
    figure.colorbar(image, ax=panels, label="cosine similarity", shrink=0.7)
    return figure


def plot_filters(groups: list[tuple[str, torch.Tensor]], title: str):
    """Draw filters, each scaled to its own range; groups have a name and filters (n, c, h, w) each, c 3 or 1."""
    figure, panels = _panels(len(groups), 3.4, title)
    for axes, (name, filters) in zip(panels, groups, strict=True):
        low, high = filters.amin(dim=(1, 2, 3), keepdim=True), filters.amax(dim=(1, 2, 3), keepdim=True)
        tiles = ((filters - low) / (high - low).clamp(min=1e-12)).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
        n = len(tiles)
        widths = range(round((1.2 * n) ** 0.5), round((3 * n) ** 0.5) + 1) if n > 4 else [n]
        columns = min(widths, key=lambda width: -n % width)  # the fewest empty places
        gap, color = max(1, tiles.shape[1] // 8), (0.75, 0.85, 0.95)  # unlike any pixel of a gray filter
        canvas = tile(tiles, columns, gap, color)
        axes.imshow(canvas, interpolation="nearest")
        axes.set(facecolor=color, xticks=[], yticks=[])
        axes.set(xlim=(-0.5 - gap, canvas.shape[1] - 0.5 + gap), ylim=(canvas.shape[0] - 0.5 + gap, -0.5 - gap))
        sides = f"{filters.shape[-1]} x {filters.shape[-2]} px, each scaled to its own range"
        axes.set_title(f"{name}\n{sides}", fontsize=9)
    return figure


def plot_mistakes(
    images: torch.Tensor, true: list[str], predicted: list[str], probability: list[float], names: list[str], title: str
):
    """Draw misclassified images (b, 3, h, w) in 0..1, with what they are, what was predicted, and their own names."""
    columns = min(5, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(2.0 * columns, 2.4 * rows + 0.6, title)
    for i, image in enumerate(images):
        axes = figure.add_subplot(rows, columns, 1 + i)
        axes.axis("off")
        axes.imshow(image.permute(1, 2, 0).numpy())
        found = f"{shorten(predicted[i])} {100 * probability[i]:.1f} %"
        axes.set_title(f"{found}\nis {shorten(true[i])}\n{shorten(names[i], 28)}", fontsize=8)
    return figure
