"""Pictures. matplotlib is imported where one is drawn, as it takes a while."""

from pathlib import Path

import torch


def plot_confusion(confusion: torch.Tensor, classes: list[str], path: Path, title: str) -> None:
    """Draw a confusion matrix, each row in percent of its class, as PNG.

    Args:
        confusion: (classes, classes) counts, rows are the true classes.
        classes: names in the order of the rows.
        path: of the PNG.
        title: above the matrix.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(classes)
    percent = (100 * confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    side = min(12.0, 4.0 + 0.35 * n)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    ticks = range(n) if n <= 40 else range(0, n, -(-n // 20))
    size = 9 if n <= 20 else 6
    axes.set_xticks(ticks, [classes[i] for i in ticks], rotation=90, fontsize=size)
    axes.set_yticks(ticks, [classes[i] for i in ticks], fontsize=size)
    if n <= 20:
        for i in range(n):
            for j in range(n):
                color = "white" if percent[i, j] > 50 else "black"
                axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", fontsize=7, color=color)
    figure.savefig(path, dpi=150)
