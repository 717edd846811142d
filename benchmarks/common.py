"""What the benchmarks share: train.py's own parts, taking turns, and one table for people and for programs."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project, for the scripts of this folder


def parser_of(text: str, **numbers: float) -> argparse.ArgumentParser:
    """The parser of a benchmark with this docstring: flags for `numbers`, with these defaults, and --json."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = dict(batch="images", rounds="turns of each contestant", seconds="each turn of each contestant")
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{what.get(name, '')} [{value:g}]")
    parser.add_argument("--json", type=Path, default=None)
    return parser


def machine(device: torch.device) -> str:
    """Device, threads, load, torch and date, for the line above a table."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
        bf16 = [word for word in ("amx_bf16", "avx512_bf16") if torch.cpu.get_capabilities().get(word)]
        name += f" ({bf16[0] if bf16 else 'no bfloat16'}), {torch.get_num_threads()} of {os.cpu_count()} cores"
        name += f", load {os.getloadavg()[1]:.1f}"
    return f"{name}; torch {torch.__version__}; {date.today()}"


def set_up(words: list[str], folder: str | Path):
    """What train.py makes of its flags: a `train.Trainer`, its data on the device, before the first step.

    `folder` is for the run's files.
    """
    from train import Trainer, prepare
    from utils import options

    places = ["--output_dir", str(folder), "--log_dir", str(folder)]
    args = options.parse_train_args([*words, *places])
    return Trainer(args, *prepare(args))


def take_turns(
    contestants: dict[str, Callable], *, device: torch.device, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds a call of each contestant, once a round.

    They alternate, so that whatever else the machine does meets all alike. Each is called once before the clock runs,
    and then as often as fills `seconds`; the device has finished when the clock is read.
    """

    def timed(call: Callable, times: int) -> float:
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        for _ in range(times):
            call()
        wait()
        return (time.perf_counter() - began) / times

    times = {}
    for name, call in contestants.items():
        call()
        times[name] = max(1, round(seconds / max(timed(call, 1), 1e-6)))
    taken = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            taken[name].append(timed(call, times[name]))
    return taken


def call_on_one_core(command: list[str]) -> None:
    """Run a command in the project's folder, with one thread; what it says is shown where it fails, and all ends."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")


def keep_log(log: Path, kept: Path, data_dir: str) -> None:
    """Copy a run's .jsonl, as if its data had been in the default folder."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    text = log.read_text(encoding="utf-8").replace(f'"data_dir": {json.dumps(data_dir)}', '"data_dir": "data"')
    kept.write_text(text, encoding="utf-8")


def timm_vit(
    image_size: int, patch_size: int, num_classes: int, dim: int, depth: int, heads: int, mlp_dim: int,
    dropout: float = 0.0, drop_path: float = 0.0,
):  # fmt: skip
    """timm's VisionTransformer by this project's words."""
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=image_size, patch_size=patch_size, num_classes=num_classes, embed_dim=dim, depth=depth,
        num_heads=heads, mlp_ratio=mlp_dim / dim, pos_drop_rate=dropout, proj_drop_rate=dropout,
        drop_path_rate=drop_path,
    )  # fmt: skip


def rate(amount: int, seconds: list[float]) -> str:
    """'median (lowest-highest)' of amount / seconds."""
    rates = sorted(amount / s for s in seconds)
    digits = ",.0f" if rates[0] >= 10 else ".2f"
    return f"{statistics.median(rates):{digits}} ({rates[0]:{digits}}-{rates[-1]:{digits}})"


def times_faster(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of how many times faster we were."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def spread(values: list[float], digits: int = 2) -> str:
    """mean ± sample standard deviation, of one value itself."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def markdown(rows: list[dict]) -> str:
    """Rows of equal keys as a table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        shown = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def report(title: str, rows: list[dict], device: torch.device, path: Path | None) -> None:
    """Print a table, and write it as JSON where `path` is given."""
    print(f"\n{title}; {machine(device)}\n")
    print(markdown(rows))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(title=title, machine=machine(device), rows=rows), indent=1) + "\n")
