"""What this code reaches: runs with several seeds, their kept logs, and the tables made from these.

    python benchmarks/results.py                                   # the tables, from benchmarks/results/
    python benchmarks/results.py --run models --data_dir data      # run what is missing in a group, and keep its logs
    python benchmarks/results.py --commands fast                   # the command of every row
    python plot.py benchmarks/results/models --out DIR             # curves of the kept logs

Groups: cifar10, cifar10_ablation, race, equal, equal_lr on CIFAR-10; fast, ablation, models, norms on Fashion-MNIST;
both are downloaded where they are missing.
Each row is a run of train.py, or of peers.py, a seed, on one CPU core. Weights and TensorBoard go to --output_dir, the
.jsonl to benchmarks/results/GROUP/. Other flags go to train.py: CIFAR-10 as a folder is --dataset imagefolder
--data_dir FOLDER.
"""

import argparse
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import ROOT, call_on_one_core, keep_log, machine, markdown, spread

from models import NORM_TYPES
from utils.device import choose_device
from utils.run_files import read_records

KEPT = ROOT / "benchmarks" / "results"
SEEDS = (1, 2, 3)

COMMON = "--dataset fashionmnist --bf16 --dropout 0 --weight_decay 0.05 --aug flip"
EQUAL = f"{COMMON} --opt adamw --lr 1e-3 --train_batch_size 100 --num_steps 3000 --warmup_steps 300 --eval_every 1000"
AT_32 = "--img_size 32 --patch_size 4 --dim 64 --heads 4 --mlp_dim 256"
VIT_32 = f"--model_type ViT-Ti_16 {AT_32} --depth 4"
MVIT_32 = f"--model_type MViT-Ti {AT_32} --depth 3 --img_sizes 16 32"
DEMS_32 = f"--model_type DEMS-Ti {AT_32} --depth 4 --merge_layer 2 3 --merge_num 64 32"
DEEP_28 = "--model_type ViT-Ti_16 --img_size 28 --patch_size 7 --dim 64 --heads 4 --mlp_dim 256 --depth 6"
VIT_28 = "--model_type ViT-Ti_16 --img_size 28 --patch_size 4 --dim 64 --heads 4 --mlp_dim 256 --depth 4"
HELD_OUT = "@recipes/fast_vit_fashionmnist.args --val_fraction 0.1"
LARGE_BATCH = "--train_batch_size 128 --num_steps 600 --warmup_steps 60"
USUAL = f"{COMMON} --opt adamw --lr 3e-3 --train_batch_size 128 --eval_every 300"
CIFAR = "--dataset cifar10 --bf16 --dropout 0 --weight_decay 0.05 --aug pad --normalize cifar --smoothing 0.1"
CIFAR += " --opt adamw --train_batch_size 256 --num_steps 2000 --warmup_steps 200 --eval_every 500"
CIFAR += " --img_size 32 --patch_size 4 --dim 128 --heads 4 --mlp_dim 512"
DEMS_6 = "--model_type DEMS-Ti --depth 6 --merge_layer 2 4 --merge_num 64 32"
KINDS = {
    "ViT": "--model_type ViT-Ti_16 --depth 6",
    **{f"ViT, {norm}": f"--model_type ViT-Ti_16 --depth 6 --norm_type {norm}" for norm in NORM_TYPES[1:]},
    "ViT, conv stem": "--model_type ViT-Ti_16 --depth 6 --stem conv",
    "ViT, residual stem": "--model_type ViT-Ti_16 --depth 2 --stem residual",
    "MViT": "--model_type MViT-Ti --depth 4 --img_sizes 16 32",
    "DEMS": DEMS_6,
    "DEMS, conv stem": f"{DEMS_6} --stem conv",
    "DEMS, its augmentation": f"{DEMS_6} --aug dems --scale 0.2 1",
}
HALF = "--num_steps 1000 --warmup_steps 100"
RATES = ("5e-4", "1e-3", "2e-3")
PEER = "--dataset cifar10 --img_size 32 --bf16 --dropout 0 --aug pad --normalize cifar --smoothing 0.1 --opt adamw"
PEER += " --train_batch_size 128 --warmup_steps 391 --eval_every 391"
CCT = f"benchmarks/peers.py --model_type CCT-2_3x2 {PEER} --weight_decay 0.03 --max_grad_norm 0 --num_steps 4692"
TIMM = f"benchmarks/peers.py --model_type timm-ViT --patch_size 4 --dim 128 --depth 6 --heads 4 --mlp_dim 512 {PEER}"
SHORT = "@recipes/fast_vit_cifar10.args --val_fraction 0.1 --num_steps 1400 --warmup_steps 140 --eval_every 1400"
RACE = "@recipes/fast_vit_cifar10.args --num_steps 1564 --warmup_steps 156 --eval_every 391"
LEVELS = (70, 80, 85, 90)  # percent
GROUPS = {
    "cifar10": {
        "ViT, residual stem, 14 epochs": "@recipes/fast_vit_cifar10.args",
        "ViT, residual stem, 4.5 epochs": "@recipes/fast_vit_cifar10_10min.args",
    },
    "race": {
        "ViT, residual stem, 2 epochs": RACE,
        "the same, learning rate 5e-3": f"{RACE} --lr 5e-3",
        **{f"CCT-2/3x2, AdamW {lr}, 12 epochs": f"{CCT} --lr {lr}" for lr in ("1e-3", "2e-3", "4e-3")},
        "timm's ViT, AdamW 1e-3, 5 epochs": f"{TIMM} --weight_decay 0.05 --lr 1e-3 --num_steps 1955",
    },
    "cifar10_ablation": {
        "the fast recipe, 2 epochs": SHORT,
        "--stem conv, depth 8": f"{SHORT} --stem conv --depth 8",
        "no stem, depth 8": f"{SHORT} --stem none --depth 8",
        "AdamW at 1e-3 instead of Muon": f"{SHORT} --opt adamw --lr 1e-3",
        "AdamW at 3e-3 instead of Muon": f"{SHORT} --opt adamw --lr 3e-3",
        "learning rate 5e-3": f"{SHORT} --lr 5e-3",
        "learning rate 2e-2": f"{SHORT} --lr 2e-2",
        "batches of 128": f"{SHORT} --train_batch_size 128 --num_steps 700 --warmup_steps 70 --eval_every 700",
        "cosine decay": f"{SHORT} --decay_type cosine",
        "no label smoothing": f"{SHORT} --smoothing 0",
        "flip alone": f"{SHORT} --aug flip",
        "averaged weights, decay 0.99": f"{SHORT} --ema_decay 0.99",
        "narrower, depth 10": f"{SHORT} --dim 96 --heads 3 --mlp_dim 384 --depth 10",
        "wider, depth 1": f"{SHORT} --dim 160 --heads 5 --mlp_dim 640 --depth 1",
    },
    "equal": {  # half of the steps of equal_lr, and the rate that it shows best for all but one
        **{kind: f"{CIFAR} {flags} --lr 2e-3 {HALF}" for kind, flags in KINDS.items()},
        "DEMS, conv stem, 1e-3": f"{CIFAR} {KINDS['DEMS, conv stem']} --lr 1e-3 {HALF}",
    },
    "equal_lr": {
        f"{kind}, {lr}": f"{CIFAR} {flags} --lr {lr} --val_fraction 0.1"
        for kind, flags in KINDS.items()
        for lr in RATES
    },
    "fast": {
        "ViT, AdamW, all steps": f"{VIT_28} {USUAL} --num_steps 2400 --warmup_steps 240",
        "ViT, fast recipe, a quarter of the epochs": "@recipes/fast_vit_fashionmnist.args",
        "ViT, fast recipe, as many epochs": "@recipes/fast_vit_fashionmnist.args --num_steps 4800 --warmup_steps 480",
        "DEMS, AdamW, all steps": f"{DEMS_32} {USUAL} --num_steps 1200 --warmup_steps 120",
        "DEMS, fast recipe, a quarter of the epochs": "@recipes/fast_dems_fashionmnist.args",
        "DEMS, fast recipe, as many epochs": "@recipes/fast_dems_fashionmnist.args --num_steps 2400 --warmup_steps 240",
    },
    "ablation": {
        "the fast recipe for ViT": HELD_OUT,
        "without the stem": f"{HELD_OUT} --stem none",
        "AdamW at 3e-3 instead of Muon": f"{HELD_OUT} --opt adamw --lr 3e-3",
        "AdamW at 1.5e-3 instead of Muon": f"{HELD_OUT} --opt adamw --lr 1.5e-3",
        "learning rate 2.5e-3": f"{HELD_OUT} --lr 2.5e-3",
        "learning rate 1e-2": f"{HELD_OUT} --lr 1e-2",
        "batches of 128 at 8e-3": f"{HELD_OUT} {LARGE_BATCH} --lr 8e-3",
        "cosine decay": f"{HELD_OUT} --decay_type cosine",
        "label smoothing 0.1": f"{HELD_OUT} --smoothing 0.1",
        "AdamW, plain patches, batches of 128, all epochs": (
            f"{VIT_28} {USUAL} --num_steps 2400 --warmup_steps 240 --val_fraction 0.1"
        ),
    },
    "models": {
        "ViT, depth 4": f"{EQUAL} {VIT_32}",
        "MViT, depth 3, scales 16 and 32 px": f"{EQUAL} {MVIT_32}",
        "DEMS, depth 4, merges to 64 and 32": f"{EQUAL} {DEMS_32}",
    },
    "norms": {norm: f"{EQUAL} {DEEP_28} --norm_type {norm}" for norm in NORM_TYPES},
}


def run_name(group: str, row: str) -> str:
    return f"{group}-{''.join(c if c.isalnum() else '-' for c in row)}"


def command(group: str, row: str, seed: int | str) -> list[str]:
    words = GROUPS[group][row].split()
    script = [] if words[0].endswith(".py") else ["train.py"]
    return [*script, *words, "--name", run_name(group, row), "--seed", str(seed)]


def run(group: str, row: str, seed: int, args: argparse.Namespace, more: list[str]) -> None:
    """Train one row with one seed, and with flags `more`, unless its log is kept already."""
    if find(group, row, seed):
        return
    folder = args.output_dir.resolve()
    places = ["--data_dir", args.data_dir, "--output_dir", str(folder), "--log_dir", str(folder / "logs")]
    call_on_one_core([sys.executable, *command(group, row, seed), "--device", args.device, *places, *more])
    log = next(folder.glob(f"{run_name(group, row)}_*_seed_{seed}.jsonl"))
    keep_log(log, KEPT / group / log.name, args.data_dir)
    where = "one core a run" if args.device == "cpu" else f"{args.jobs} runs at a time"
    (KEPT / group / "machine.txt").write_text(f"{machine(choose_device(args.device))}, {where}")
    print(f"{log.stem}: {records(log)[-1]['seconds'] / 60:.1f} min", flush=True)


def find(group: str, row: str, seed: int) -> Path | None:
    return next((KEPT / group).glob(f"{run_name(group, row)}_*_seed_{seed}.jsonl"), None)


def records(path: Path) -> list[dict]:
    return read_records(path)[0]


def minutes_to(percent: int, runs: list[list[dict]]) -> str:
    """Until the first evaluation with this accuracy, median over the runs; '-' where one doesn't reach it."""
    evaluations = [[each for each in run if each["event"] == "eval"] for run in runs]
    reached = [[each["seconds"] for each in run if 100 * each["accuracy"] >= percent] for run in evaluations]
    return f"{statistics.median(first for first, *_ in reached) / 60:.1f}" if all(reached) else "-"


def table(group: str) -> None:
    rows = {row: [records(path) for seed in SEEDS if (path := find(group, row, seed))] for row in GROUPS[group]}
    rows = {row: runs for row, runs in rows.items() if runs}
    if not rows:
        return
    chosen = next(iter(rows.values()))[0][-1]["selected_on"]
    print(f"\n`python benchmarks/results.py --run {group}`; {(KEPT / group / 'machine.txt').read_text()}\n")
    lines = []
    for row, runs in rows.items():
        start, ends = runs[0][0], [end for *_, end in runs]
        flags = start["settings"]
        lines.append({
            group: row,
            "parameters": f"{start['parameters']:,}",
            "MFLOPs": f"{1000 * start['gflops']:.1f}",
            "epochs": f"{flags['epochs']:.1f}",
            "PFLOP": f"{3e-6 * start['gflops'] * flags['num_steps'] * flags['train_batch_size']:.3f}",
            "seeds": len(runs),
            f"{chosen}, %": spread([100 * end["last_accuracy"] for end in ends]),
            "minutes": f"{statistics.median(end['seconds'] for end in ends) / 60:.1f}",
        })  # fmt: skip
        if group == "race":
            lines[-1] |= {f"min to {percent} %": minutes_to(percent, runs) for percent in LEVELS}
    if group == "equal_lr":  # a line a kind, a column a learning rate
        accuracy = {line[group]: line["val, %"] for line in lines}
        lines = [
            {group: kind} | {lr: accuracy.get(f"{kind}, {lr}", "-") for lr in RATES}
            for kind in KINDS
            if any(f"{kind}, {lr}" in accuracy for lr in RATES)
        ]
    print(markdown(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", choices=GROUPS, default=[], metavar="GROUP")
    parser.add_argument("--commands", nargs="+", choices=GROUPS, default=[], metavar="GROUP")
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=SEEDS, help="[all]")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--output_dir", type=Path, default=Path("output/results"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one core each [2]")
    args, more = parser.parse_known_args()
    if more and not args.run:
        parser.error(f"{' '.join(more)}: flags of train.py go with --run")
    for group in args.commands:
        for row in GROUPS[group]:
            print("python " + " ".join(command(group, row, "1")))
    cells = [(group, row, seed) for group in args.run for seed in args.seeds for row in GROUPS[group]]
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(lambda cell: run(*cell, args, more), cells))
        except KeyboardInterrupt:  # which the runs have got too: they save, and end
            pool.shutdown(cancel_futures=True)
            sys.exit(130)
    if not args.commands:
        for group in args.run or GROUPS:
            table(group)


if __name__ == "__main__":
    main()
