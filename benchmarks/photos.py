"""How many photos do I need? A small ViT from scratch, with a frozen body, and fine-tuned, on few images a class.

    python benchmarks/photos.py --data_dir data --out benchmarks/results/photos

The model is pretrained by recipes/demo.args on the 8 classes of Fashion-MNIST's first 10,000 images that are neither
sandals nor bags; then all 10 classes are learnt from 20, 50 and 100 images each, drawn from the complete training set
(`--data_dir` holds FashionMNIST/raw/), and scored on its 10,000 test images after the last step. Mean and sample
standard deviation over seeds, of which each draws images of its own, in a table in `--out`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from common import ROOT, machine, markdown, spread

import train
from utils import options
from utils.datasets import fashionmnist, fashionmnist_mini
from utils.presets import DATASETS
from utils.run_files import RunFiles

LEFT_OUT = (5, 8)  # sandals, bags
SHAPE = "--model_type ViT-Ti_16 --img_size 28 --patch_size 7 --dim 96 --depth 4 --heads 4 --mlp_dim 192 --dropout 0"
COMMON = f"{SHAPE} --opt adamw --weight_decay 0.05 --smoothing 0.1 --train_batch_size 50 --eval_every 100000"
WAYS = {
    "from scratch": "--aug flip --lr 0.001 --epochs 100 --warmup_epochs 5",
    "frozen": "--aug none --lr 0.01 --epochs 100 --warmup_epochs 5 --freeze",
    "fine-tuned": "--aug flip --lr 0.001 --epochs 40 --warmup_epochs 2 --layer_decay 0.75",
}


def eight_classes(root: Path) -> tuple[dict, list[str]]:
    splits, classes = fashionmnist_mini(root)
    kept = [i for i in range(10) if i not in LEFT_OUT]
    place = torch.tensor([kept.index(i) if i in kept else -1 for i in range(10)])
    parts = {name: (images, place[labels.long()]) for name, (images, labels) in splits.items()}
    parts = {name: (images[labels >= 0], labels[labels >= 0]) for name, (images, labels) in parts.items()}
    return parts, [classes[i] for i in kept]


def few(root: Path, per_class: int, seed: int) -> tuple[dict, list[str]]:
    """So many images of each class, drawn by the seed; all test images."""
    splits, classes = fashionmnist(root, folder="FashionMNIST/raw", file="", url="")
    images, labels = splits["train"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    index = torch.cat([order[labels[order] == label][:per_class] for label in range(10)])
    return {"train": (images[index], labels[index]), "test": splits["test"]}, classes


def run(words: str, out: Path) -> tuple[dict, Path]:
    """A run's last record and its checkpoint; a finished one is left alone."""
    places = ["--output_dir", str(out), "--log_dir", str(out)]
    args = options.parse_train_args([*words.split(), *places])
    files = RunFiles.of(args)
    if train.main(args):
        sys.exit(f"{files.id} was interrupted")
    return files.record("end"), files.best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--out", default="benchmarks/results/photos")
    parser.add_argument("--runs", default="output/photos_benchmark", help="folder of the runs' files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--images", type=int, nargs="+", default=[20, 50, 100], help="a class")
    args = parser.parse_args()
    runs = Path(args.runs)
    DATASETS["eight"] = dict(read=eight_classes)
    DATASETS["few"] = dict(read=few, per_class=0, seed=0)

    _, weights = run(f"@{ROOT}/recipes/demo.args --name eight --dataset eight", runs)
    rows = []
    for per_class in args.images:
        for way, flags in WAYS.items():
            scores, began = [], time.monotonic()
            for seed in args.seeds:
                DATASETS["few"] |= dict(per_class=per_class, seed=seed)
                start = "" if way == "from scratch" else f" --pretrained_dir {weights}"
                name = f"{way.replace(' ', '_')}_{per_class}"
                words = f"--name {name} --dataset few --data_dir {args.data_dir} {COMMON} {flags}{start} --seed {seed}"
                scores.append(100 * run(words, runs)[0]["last_accuracy"])
            seconds = (time.monotonic() - began) / len(args.seeds)
            rows.append(dict(images=per_class, way=way, scores=scores, seconds=seconds))
            print(json.dumps(rows[-1]), flush=True)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = {per_class: {"images a class": per_class} for per_class in args.images}
    for row in rows:
        lines[row["images"]][row["way"]] = spread(row["scores"], digits=1)
    title = f"`python benchmarks/photos.py`; {machine(torch.device('cpu'))}; {len(args.seeds)} seeds"
    (out / "photos.md").write_text(f"{title}\n\n{markdown(list(lines.values()))}\n")
    (out / "photos.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
