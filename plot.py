"""Tables and curves of all runs in a folder.

    python plot.py                              # output/
    python plot.py output/ --logs logs/         # with the training loss of every logged step, from TensorBoard
    python plot.py output/RUN.jsonl --out .     # one run
    python plot.py RescaleViT/output --out pictures   # logs of ChaofanTao/RescaleViT, as they are

Prints a table a data set, and writes results.md, results.csv, comparison_DATASET.png and RUN_curves.png. Accuracy is
that of the best checkpoint, mean and sample standard deviation over seeds; unfinished runs show their best so far and
are in no mean. Files that are not of a run are named and left out.
"""

from utils import cli, options
from utils.cli import refuse

if __name__ == "__main__":  # a wrong flag is answered before anything is loaded
    ARGS = options.plot_parser().parse_args()

import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np

from utils import results
from utils.results import Row, Run
from utils.vis_utils import legend_below, legible, new_figure

LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
COLOURS = "#4477aa #ee6677 #228833 #ccbb44 #000000 #66ccee #aa3377".split()  # Paul Tol's; none like the one before
FEW = 20  # evaluations that are points, too


def draw_run(run: Run, logs: Path | None):
    """Evaluated loss and accuracy against steps, and beside them the training loss; with `logs`, of every step."""
    steps, train = results.read_board(logs / (run.settings.get("name") or run.id), "train/loss") if logs else ([], [])
    history = bool(steps) or len(run.train_loss) == len(run.steps) > 0
    state = f"best {100 * run.best:.2f} %, last {100 * run.last:.2f} %" if run.finished else run.best_so_far
    figure = new_figure(12 if history else 7, 4.5, "\n".join(legible([run.id, f"{run.dataset}: {state}"])))
    left = figure.add_subplot(1, 1 + history, 1)
    right = left.twinx()
    style = dict(marker="o" if len(run.steps) <= FEW else None, markersize=3)  # a few are points, many a line
    larger, on = style | dict(markersize=6), run.chosen_on
    lines = left.plot(run.steps, run.loss, color="tab:green", label=f"{on} loss", **larger)
    lines += right.plot(run.steps, 100 * np.array(run.accuracy), color="tab:blue", label=f"{on} accuracy", **style)
    # training is scored over the steps since the evaluation before, so in their middle
    middles = [(start + end) / 2 for start, end in zip([0, *run.steps], run.steps, strict=False)]
    if len(run.train_accuracy) == len(run.steps):
        dashed = style | dict(color="tab:blue", alpha=0.5, linestyle="--")
        lines += right.plot(middles, 100 * np.array(run.train_accuracy), label="training accuracy", **dashed)
    left.set(xlabel="step", title="Evaluation")
    left.set_ylabel("loss", color="tab:green")
    right.set_ylabel("accuracy, %", color="tab:blue")
    left.grid(alpha=0.3)
    left.legend(handles=lines, loc="center right")
    if history:
        aug, smoothing, mixup, cutmix = map(run.settings.get, ("aug", "smoothing", "mixup", "cutmix"))
        harder = dict(augmented=aug not in (None, "none"), smoothed=smoothing, mixed=mixup or cutmix)
        how = f" ({', '.join(word for word, so in harder.items() if so)})" if any(harder.values()) else ""
        axes = figure.add_subplot(1, 2, 2)
        if steps:
            axes.plot(steps, train, color="tab:orange", alpha=0.4, linewidth=0.8, label=f"training loss{how}, one step")
        if len(run.train_loss) == len(run.steps):
            axes.plot(middles, run.train_loss, color="tab:red", label=f"training loss{how}, mean", **style)
        axes.plot(run.steps, run.loss, color="tab:green", label=f"{on} loss", **style)
        axes.set(xlabel="step", ylabel="loss", title="Training history")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def curve(runs: list[Run], values: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over runs, at the steps that all of them have."""
    found = [dict(zip(run.steps, getattr(run, values), strict=True)) for run in runs]
    steps = [step for step in sorted(found[0]) if all(step in run for run in found)]
    table = np.array([[run[step] for step in steps] for run in found])
    return steps, table.mean(axis=0), table.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))


def looks(rows: list[Row]) -> list[dict]:
    """Colour and line of each row: one tells the norm and the start, the other the model, whichever are more; where
    there are not enough of them, neighbours have other colours, and lines go round more slowly.
    """
    norms = [f"{row.run.norm} {row.run.pretrained}" for row in rows]
    models = [row.label for row in rows]
    colours, lines = (norms, models) if len(set(norms)) >= len(set(models)) else (models, norms)
    by_colour, by_line = (list(dict.fromkeys(names)) for names in (colours, lines))
    places = [(by_colour.index(colour), by_line.index(line)) for colour, line in zip(colours, lines, strict=True)]
    if len(by_colour) > len(COLOURS) or len(by_line) > len(LINES):
        places = [(i % len(COLOURS), i // len(COLOURS) % len(LINES)) for i in range(len(rows))]
    return [dict(color=COLOURS[colour], linestyle=LINES[line]) for colour, line in places]


def draw_comparison(dataset: str, chosen_on: str, rows: list[Row]):
    """Evaluated accuracy and loss of all runs on a data set: the mean over seeds, in a band of ± one deviation."""
    band = "; mean over seeds, band ± sample standard deviation" if any(len(row.runs) > 1 for row in rows) else ""
    names = legible([dataset, *(row.legend for row in rows)])
    figure = new_figure(12, 5, names.pop(0) + band)
    for place, (values, scale, unit) in enumerate((("accuracy", 100, ", %"), ("loss", 1, ""))):
        axes = figure.add_subplot(1, 2, 1 + place)
        for row, name, look in zip(rows, names, looks(rows), strict=True):
            steps, mean, spread = curve(row.runs, values)
            thin = dict(linewidth=0.8 if not row.run.finished else 1.6 if len(rows) <= 8 else 1.1)
            if steps and not row.run.finished:  # a cross where it stands
                thin |= dict(marker="x", markevery=[-1])
            elif len(steps) <= FEW:
                thin |= dict(marker="o", markersize=3)
            axes.plot(steps, scale * mean, label=name if place == 0 else None, **look, **thin)
            if len(row.runs) > 1:
                low, high = scale * (mean - spread), scale * (mean + spread)
                axes.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel="step", ylabel=f"{chosen_on} {values}{unit}")
        axes.grid(alpha=0.3)
    legend_below(figure)
    return figure


def main(args: Namespace) -> int:
    refuse(args.logs and not Path(args.logs).is_dir(), f"{args.logs}: no such folder")
    runs, left_out = results.read_runs(args.runs)
    notes = [f"{run.id}: the last line is cut off and left out" for run in runs if run.cut_off]
    for note in (*notes, *(f"left out: {each}" for each in left_out)):
        print(f"plot.py: {cli.one_line(note)}", file=sys.stderr)
    found = results.tables(runs)
    text = "\n".join(results.markdown(*key, rows) for key, rows in found.items())
    print(text)
    path = Path(args.runs)
    folder = Path(args.out) if args.out else path if path.is_dir() else path.parent
    with cli.refusing(f"{folder}: cannot be written to", "choose another --out", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.md").write_text(text, encoding="utf-8")
        (folder / "results.csv").write_text(results.csv_text(found), encoding="utf-8")
        named = []
        for (dataset, chosen_on), rows in found.items():
            name = re.sub(r"[^\w.-]+", "_", dataset)[-70:] + ("" if chosen_on == "test" else f"_{chosen_on}")
            named.append(name)
            name += f"_{named.count(name)}" * (named.count(name) > 1)  # of folders whose names differ elsewhere
            draw_comparison(dataset, chosen_on, rows).savefig(folder / f"comparison_{name}.png", dpi=150)
        drawn = [run for run in runs if run.steps]
        for run in drawn:
            draw_run(run, Path(args.logs) if args.logs else None).savefig(folder / f"{run.id}_curves.png", dpi=150)
    print(f"{folder}: results.md, results.csv, {len(found)} comparison_*.png, {len(drawn)} *_curves.png")
    return 0


if __name__ == "__main__":
    cli.run_main(main, ARGS)
