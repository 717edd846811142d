"""What the benchmarks share: train.py's own parts, taking turns, and one table for people and for programs."""

import argparse
import json
import os
import platform
import statistics
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


def set_up(words: list[str], folder: str | Path, copies: int = 1):
    """What train.py makes of its flags: a `train.Trainer`, its data on the device, before the first step.

    Args:
        words: flags.
        folder: for the run's files.
        copies: of the training images, which must be in memory then, for a larger set.
    """
    from models import MODELS, NORM_TYPES
    from train import Trainer, prepare
    from utils import options
    from utils.datasets import Uniform

    places = ["--output_dir", str(folder), "--log_dir", str(folder)]
    args = options.parse_train_args(MODELS, NORM_TYPES, [*words, *places])
    processes, data, source = prepare(args)
    train = data.train
    if copies > 1:
        train.source = Uniform(train.source.images.repeat(copies, 1, 1, 1))
        train.ids, train.labels = torch.arange(copies * len(train.ids)), train.labels.repeat(copies)
    return Trainer(args, processes, data, source)


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


def rate(amount: int, seconds: list[float]) -> str:
    """'median (lowest-highest)' of amount / seconds."""
    rates = sorted(amount / s for s in seconds)
    digits = ",.0f" if rates[0] >= 10 else ".2f"
    return f"{statistics.median(rates):{digits}} ({rates[0]:{digits}}-{rates[-1]:{digits}})"


def times_faster(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of how many times faster we were."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def print_table(rows: list[dict]) -> None:
    """Rows of equal keys as a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        shown = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
        print("| " + " | ".join(shown) + " |")


def report(title: str, rows: list[dict], device: torch.device, path: Path | None) -> None:
    """Print a table, and write it as JSON where `path` is given."""
    print(f"\n{title}; {machine(device)}\n")
    print_table(rows)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(title=title, machine=machine(device), rows=rows), indent=1) + "\n")
