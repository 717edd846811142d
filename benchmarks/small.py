"""Small comparisons that two CPU cores finish in half an hour: models of equal cost, and norms, with three seeds.

    python benchmarks/small.py --data_dir data        # complete Fashion-MNIST; downloads it where it is missing
    python benchmarks/small.py --dataset fashionmnist-mini

Each cell is a train.py run of 1,000 steps, two at a time with one core each; finished ones are not repeated. Prints two
Markdown tables: accuracy on the test images after the last step (nothing is chosen by them), mean and standard
deviation over seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMON = (
    "--num_steps 1000 --warmup_steps 100 --train_batch_size 100 --opt adamw --learning_rate 1e-3 --weight_decay 0.05 "
    "--dropout 0 --aug flip --eval_every 1000 --save_every 200"
)
SMALL = "--img_size 32 --patch_size 4 --dim 64 --heads 4 --mlp_dim 256"
MODELS = {
    "ViT": f"--model_type ViT-Ti_16 {SMALL} --depth 4",
    "MViT": f"--model_type MViT-Ti {SMALL} --depth 3 --img_sizes 16 32",
    "DEMS": f"--model_type DEMS-Ti {SMALL} --depth 4 --merge_layer 2 3 --merge_num 64 32",
}
NORM = "--model_type ViT-Ti_16 --img_size 28 --patch_size 7 --dim 64 --heads 4 --mlp_dim 256 --depth 6 --norm_type"
NORMS = {norm: f"{NORM} {norm}" for norm in ("LN", "BN", "GN", "Rescale")}
SEEDS = (1, 2, 3)


def run(cell: tuple[str, str, int], more: list[str], folder: Path) -> list[dict]:
    """Train one cell; its records."""
    name, flags, seed = cell
    words = ["--name", name, *COMMON.split(), *flags.split(), "--seed", str(seed), "--output_dir", str(folder)]
    command = [sys.executable, "train.py", *words, "--log_dir", str(folder / "logs"), *more]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    path = next(folder.glob(f"{name}_*_seed_{seed}.jsonl"))
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(title: str, cells: dict[str, list[list[dict]]]) -> None:
    print(f"\n| {title} | parameters | MFLOPs per image | accuracy, % |\n|---|---|---|---|")
    for name, runs in cells.items():
        start = runs[0][0]
        accuracy = [100 * records[-1]["last_accuracy"] for records in runs]
        spread = f"{statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f}"
        print(f"| {name} | {start['parameters']:,} | {1000 * start['gflops']:.1f} | {spread} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashionmnist", choices=["fashionmnist", "fashionmnist-mini"])
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--output_dir", type=Path, default=Path("output/small"))
    args = parser.parse_args()
    more = ["--dataset", args.dataset, "--data_dir", args.data_dir]
    folder = args.output_dir.resolve() / args.dataset
    cells = [(f"small-{name}", flags, seed) for name, flags in (MODELS | NORMS).items() for seed in SEEDS]
    with ThreadPoolExecutor(2) as pool:
        runs = iter(list(pool.map(lambda cell: run(cell, more, folder), cells)))
    table("model", {name: [next(runs) for _ in SEEDS] for name in MODELS})
    table("norm", {name: [next(runs) for _ in SEEDS] for name in NORMS})


if __name__ == "__main__":
    main()
