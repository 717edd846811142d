"""How the time of a training step grows: with tokens, batch, size of the data set, and processes; and how far each
model and norm, at the published size for 32 px, keeps up with its FLOPs.

    python benchmarks/scaling.py                      # a small ViT on one core; processes have one core each
    python benchmarks/scaling.py --bf16 --device cuda # other flags go to train.py

Tokens, batch and data, then models and norms, take turns in one process, train.py's own update with data and
augmentation each.
Processes are runs of train.py, whose TensorBoard says how many images they trained a second.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, call_on_one_core, parser_of, rate, report, set_up, take_turns, times_faster
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models import NORM_TYPES
from utils.image_sources import Uniform

BASE = "--model_type ViT-Ti_16 --patch_size 4 --dataset fashionmnist-mini --memory_limit 8".split()
BASE += "--opt adamw --dropout 0 --aug strong".split()
SIZES = "--img_size 28 --dim 128 --depth 6 --heads 4 --mlp_dim 512 --train_batch_size 64".split()
TI = "--img_size 32 --patch_size 2 --train_batch_size 32".split()
KINDS = {f"ViT-Ti, {norm}": ["--norm_type", norm] for norm in NORM_TYPES}
KINDS |= {"DEMS-Ti": ["--model_type", "DEMS-Ti"], "MViT-Ti": "--model_type MViT-Ti --img_sizes 16 32".split()}


def updates(words: list[str], folder: str, copies: int = 1):
    """A function that takes one update, counted FLOPs and images of it, and its device; `copies` make a larger set."""
    trainer = set_up(["--name", "scaling", *BASE, *words], folder)
    if copies > 1:
        train = trainer.data.train
        train.source = Uniform(train.source.images.repeat(copies, 1, 1, 1))
        train.ids, train.labels = torch.arange(copies * len(train)), train.labels.repeat(copies)
    trainer.model.train()
    batches, images = trainer.batches(), trainer.args.train_batch_size
    return lambda: trainer.update(batches), 3 * trainer.gflops * images, images, trainer.device


def processes_speed(count: int, words: list[str], folder: str) -> float:
    """Images a second that `count` processes of one core each train, all together."""
    place = Path(folder) / str(count)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--standalone"]
    command += [str(ROOT / "train.py"), "--name", "scaling", *BASE, *SIZES]
    command += ["--num_steps", "60", "--eval_every", "60", "--log_every", "5", *words]
    command += ["--output_dir", str(place / "output"), "--log_dir", str(place / "logs")]
    call_on_one_core(command)
    board = EventAccumulator(str(next((place / "logs").iterdir()))).Reload()
    return statistics.median(event.value for event in board.Scalars("train/images_per_second")[2:])


def compare(title: str, kind: str, cases: dict[str, tuple], own: argparse.Namespace, path: Path | None) -> torch.device:
    """Let `updates` take turns, and report each beside the first; their device."""
    first, (*_, device) = next(iter(cases.items()))
    contestants = {name: case[0] for name, case in cases.items()}
    taken = take_turns(contestants, device=device, rounds=own.rounds, seconds=own.seconds)
    rows = []
    for name, (_, flops, images, _) in cases.items():
        time = times_faster(taken[first], taken[name])
        rows.append({
            kind: name,
            "ms a step": f"{1000 * statistics.median(taken[name]):.0f}",
            "images/s": rate(images, taken[name]),
            "time, x the first": time,
            "counted FLOPs, x the first": flops / cases[first][1],
            "FLOP/s, x the first": flops / cases[first][1] / time,
        })  # fmt: skip
    report(title, rows, device, path)
    return device


def main() -> None:
    parser = parser_of(__doc__, rounds=5, seconds=1.5)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    own, words = parser.parse_known_args()
    torch.set_num_threads(1)

    def path(part: str) -> Path | None:
        return own.json and own.json.with_stem(f"{own.json.stem}_{part}")

    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "49 patches, batch 64, 10,000 images": updates([*SIZES, *words], folder),
            "100 patches": updates([*SIZES, *words, "--img_size", "40"], folder),
            "batch 128": updates([*SIZES, *words, "--train_batch_size", "128"], folder),
            "batch 256": updates([*SIZES, *words, "--train_batch_size", "256"], folder),
            "100,000 images": updates([*SIZES, *words], folder, copies=10),
        }
        compare("Growth, median (lowest-highest)", "step of ViT, dim 128, depth 6", cases, own, path("growth"))
        cases = {name: updates([*TI, *more, *words], folder) for name, more in KINDS.items()}
        title = "Models at 32 px, patch 2, batch 32, median (lowest-highest)"
        device = compare(title, "step", cases, own, path("models"))
        rows = []
        unit, there = ("GPU", torch.cuda.device_count()) if device.type == "cuda" else ("core", os.cpu_count())
        for count in own.processes:
            if unit == "GPU" and count > there:
                continue
            speed = processes_speed(count, words, folder)
            base = rows[0]["images/s"] if rows else speed
            rows.append({"processes": count, "images/s": round(speed), "x the first": speed / base})
        if rows:
            title = f"Processes of one {unit} each, {there} {unit}s, the same whole batch of 64"
            report(title, rows, device, path("processes"))


if __name__ == "__main__":
    main()
