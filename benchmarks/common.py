"""What the benchmarks share: taking turns, and one table for people and for programs."""

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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project, for the scripts of this folder


def machine(device: torch.device) -> str:
    """Device, threads, torch and date, for the line above a table."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
        threads = torch.get_num_threads()
        name += f", {threads} of {os.cpu_count()} cores"
    return f"{name}; torch {torch.__version__}; {date.today()}"


def set_up(words: list[str]):
    """What train.py makes of its flags: the resolved flags, this process's place, and the data on the device."""
    from models import MODELS, NORM_TYPES, model_sizes
    from utils import data_utils, dist_util, options

    args = options.parse_train_args(words, MODELS, NORM_TYPES, model_sizes)
    processes = dist_util.start(args.device, args.gpu_id)
    options.resolve_normalization(args, None)
    data = data_utils.load_data(args)
    data_utils.to_device(data, processes.device)
    options.resolve_steps(args, len(data.train))
    return args, processes, data


def take_turns(
    contestants: dict[str, Callable[[], object]], *, device: torch.device, rounds: int = 5, seconds: float = 1.0
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
    return (
        f"{statistics.median(rates):,.0f} ({rates[0]:,.0f}-{rates[-1]:,.0f})"
        if rates[0] >= 10
        else (f"{statistics.median(rates):.2f} ({rates[0]:.2f}-{rates[-1]:.2f})")
    )


def times_faster(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of how many times faster we were."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def report(title: str, rows: list[dict], device: torch.device, path: Path | None) -> None:
    """Print rows of equal keys as a Markdown table, and write them as JSON where `path` is given."""
    print(f"\n{title}; {machine(device)}\n")
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print(
            "| "
            + " | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
            + " |"
        )
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(title=title, machine=machine(device), rows=rows), indent=1) + "\n")
