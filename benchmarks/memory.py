"""What `device.keep_memory` brings a CPU: steps with glibc's defaults and with freed memory kept.

    python benchmarks/memory.py                       # bfloat16, one thread

What glibc is told holds for a process, so each figure is of a process of its own, and the two kinds take turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import parser_of, rate, report, times_faster

from models import create_model
from utils.device import keep_memory

CASES = {
    "ViT-Ti, 32 px, patch 2, batch 128": (128, dict(model_type="ViT-Ti_16", image_size=32, patch_size=2)),
    "ViT-B_32, 224 px, batch 64": (64, dict(model_type="ViT-B_32", image_size=224)),
}


def measure(name: str, threads: int, steps: int = 4) -> dict:
    """Median seconds of a step after the first, forward, backward and AdamW; and the most memory that it took."""
    torch.set_num_threads(threads)
    batch, config = CASES[name]
    model = create_model(num_classes=10, dropout=0.0, **config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = torch.randn(batch, 3, *model.image_size), torch.randint(0, 10, (batch,))
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return dict(seconds=statistics.median(seconds[1:]), gigabytes=int(peak.split()[1]) / 1e6)


def main() -> None:
    parser = parser_of(__doc__, rounds=5, threads=1)
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "KIND"), help=argparse.SUPPRESS)  # a process's own part
    args = parser.parse_args()
    if args.measure:
        if args.measure[1] == "kept":
            keep_memory(torch.device("cpu"))
        print(json.dumps(measure(args.measure[0], args.threads)))
        return
    torch.set_num_threads(args.threads)
    rows = []
    for name, (batch, _) in CASES.items():
        taken = {"kept": [], "returned": []}
        for _ in range(args.rounds):
            for kind, found in taken.items():
                words = [sys.executable, __file__, "--threads", str(args.threads), "--measure", name, kind]
                found.append(json.loads(subprocess.check_output(words)))
        kept, returned = ([found["seconds"] for found in taken[kind]] for kind in ("kept", "returned"))
        memory = [statistics.median(found["gigabytes"] for found in taken[kind]) for kind in ("kept", "returned")]
        rows.append({
            "step": name,
            "kept, images/s": rate(batch, kept),
            "returned (glibc's default), images/s": rate(batch, returned),
            "kept / returned": times_faster(kept, returned),
            "peak memory, GB, kept and returned": f"{memory[0]:.1f}, {memory[1]:.1f}",
        })  # fmt: skip
    report("Freed memory, bfloat16, median (lowest-highest)", rows, torch.device("cpu"), args.json)


if __name__ == "__main__":
    main()
