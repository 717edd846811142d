"""RescaleViT's published runs on CIFAR-10 (ViT-B_32, 224 px, batch 128), their first steps, and ours beside them.

    python benchmarks/replay.py --data_dir data                   # four norms, 500 of 20,000 steps each
    python benchmarks/replay.py --norms LN --steps 1000           # other flags go to train.py
    python benchmarks/replay.py --steps 0 --figure replay.png     # table and curves of benchmarks/results/replay/

Runs of recipes/rescalevit_cifar10.args, learning rates of 20,000 steps included, that are stopped at --steps. The same
command goes on with them. 500 steps are 1.6 PFLOP, and five evaluations 0.4.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, keep_log, machine, markdown

from models import NORM_TYPES
from utils import options
from utils.device import choose_device
from utils.run_files import RunFiles, read_records
from utils.vis_utils import legend_below, new_figure

KEPT = ROOT / "benchmarks" / "results" / "replay"
POLL = 2  # seconds
STEPS = (100, 200, 300, 400, 500)
PUBLISHED = {  # github.com/ChaofanTao/RescaleViT, its logs: accuracy in percent, validation loss
    "LN": ((29.71, 31.10, 30.72, 34.53, 33.40), (1.88619, 1.87989, 1.89501, 1.81853, 1.83898)),
    "BN": ((28.64, 32.30, 30.66, 31.76, 33.18), (1.94267, 1.85269, 1.88589, 1.85481, 1.79288)),
    "GN": ((26.92, 30.54, 31.11, 32.11, 33.65), (1.98252, 1.88277, 1.84295, 1.80868, 1.80459)),
    "Rescale": ((20.50, 23.12, 26.35, 26.87, 29.86), (2.05831, 2.04675, 1.99625, 1.98719, 1.91556)),
}


def evaluations(path: Path) -> dict[int, dict]:
    """Step -> what a run logged at it; nothing of a run that hasn't begun."""
    records = read_records(path)[0] if path.exists() else []
    return {record["step"]: record for record in records if record["event"] == "eval"}


def replay(norm: str, steps: int, words: list[str]) -> None:
    """Train until the evaluation at `steps`, and keep the log."""
    words = ["@recipes/rescalevit_cifar10.args", "--name", "replay", "--norm_type", norm, *words]
    args = options.parse_train_args(words)
    log = RunFiles.of(args).json
    if max(evaluations(log), default=0) < steps:
        process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT)
        try:
            while process.poll() is None and max(evaluations(log), default=0) < steps:
                time.sleep(POLL)
        finally:
            process.terminate()  # it saves, and can go on
            process.wait()
        if max(evaluations(log), default=0) < steps:
            sys.exit(f"{norm}: train.py ended before step {steps}")
    keep_log(log, KEPT / f"{norm}.jsonl", args.data_dir)
    (KEPT / "machine.txt").write_text(machine(choose_device(args.device)))


def shown(ours: float | None, published: float, digits: int) -> str:
    return f"{'-' if ours is None else f'{ours:.{digits}f}'} / {published:.{digits}f}"


def draw(path: Path) -> None:
    """Accuracy against steps, a panel for each norm."""
    title = "RescaleViT, ViT-B_32 on CIFAR-10 from scratch: test accuracy, %, over the first steps"
    figure = new_figure(10, 3.2, title)
    panels = figure.subplots(1, len(PUBLISHED), sharey=True)
    for axes, (norm, (accuracy, _)) in zip(panels, PUBLISHED.items(), strict=True):
        ours = evaluations(KEPT / f"{norm}.jsonl")
        axes.plot(STEPS, accuracy, "o--", color="0.5", markersize=4, label="published")
        steps = [step for step in STEPS if step in ours]
        axes.plot(steps, [100 * ours[step]["accuracy"] for step in steps], "o-", markersize=4, label="ours")
        axes.set(title=norm, xlabel="step", xticks=STEPS)
    legend_below(figure)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", nargs="+", choices=NORM_TYPES, default=NORM_TYPES)
    parser.add_argument("--steps", type=int, default=STEPS[-1])
    parser.add_argument("--figure", type=Path, metavar="PNG")
    own, words = parser.parse_known_args()
    for norm in own.norms if own.steps else ():
        replay(norm, own.steps, words)
    rows = []
    for norm, (accuracy, loss) in PUBLISHED.items():
        ours = evaluations(KEPT / f"{norm}.jsonl")
        for what, published in (("accuracy", accuracy), ("loss", loss)):
            row, scale, digits = {"norm": norm, "": what}, *((100, 2) if what == "accuracy" else (1, 5))
            mine = [scale * ours[step][what] if step in ours else None for step in STEPS]
            for step, *pair in zip(STEPS, mine, published, strict=True):
                row[f"step {step}, ours / published"] = shown(*pair, digits)
            late = [statistics.mean(values[2:]) if None not in values else None for values in (mine, published)]
            row["mean of the last three"] = shown(*late, digits)
            if ours:
                rows.append(row)
    if rows:
        print(f"{(KEPT / 'machine.txt').read_text()}\n\n{markdown(rows)}")
    if own.figure:
        draw(own.figure)


if __name__ == "__main__":
    main()
