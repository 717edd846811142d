"""Memory: a long run's stays as it is, and image folders follow the limit."""

import json
import os
import platform
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, places, write_folder
from PIL import Image

from utils import dist_util
from utils.data_utils import load_data, to_device
from utils.log_util import recorded_limit
from utils.readers import Files, Uniform

RUN = "run_ViT-Ti_16_norm_LN_fp_False_img_28_pretrain_F"

# A run that prints its resident memory, in bytes, after each evaluation and what follows it.
WATCHED = """
import json, resource, sys
import train
from models import MODELS, NORM_TYPES, model_sizes
from utils import options

sizes, save_last = [], train.Run.save_last

def watched(run):
    save_last(run)
    with open("/proc/self/statm") as file:
        sizes.append(int(file.read().split()[1]) * resource.getpagesize())

train.Run.save_last = watched
status = train.main(options.parse_train_args(sys.argv[1:], MODELS, NORM_TYPES, model_sizes))
print(json.dumps(sizes))
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("more", [[], ["--ema_decay", "0.9", "--val_fraction", "0.05", "--norm_type", "BN"]])
def test_a_hundred_evaluations_grow_by_less_than_5_mb(tmp_path, more):
    words = [
        "--name",
        "run",
        *TINY,
        "--num_steps",
        "110",
        "--eval_every",
        "1",
        "--save_every",
        "1",
        *places(tmp_path),
        *more,
    ]
    command = [sys.executable, "-c", WATCHED, *words]
    # large blocks go back to the system at once, so that what the allocator keeps for later does not count
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) == 110
    grown = (max(sizes[10:]) - max(sizes[:10])) / 1e6
    print("resident memory after evaluations 1, 10, 60, 110, MB:", [round(sizes[i] / 1e6, 1) for i in (0, 9, 59, 109)])
    assert grown < 5, sizes


FAULTS = """
import resource, sys
import torch
from utils import dist_util
if sys.argv[1] == "start":
    dist_util.start("cpu")
for i in range(20):
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("more, stays", [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept_for_the_next_step(more, stays):
    """Counted in page faults: a CPU's training keeps large blocks, unless the environment says otherwise."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    env = own | more
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", FAULTS, how], cwd=ROOT, env=env, text=True))
        for how in ("plain", "start")
    }
    print("page faults of ten blocks of 64 MiB:", faults)
    assert faults["plain"] > 100 and (faults["start"] < faults["plain"] / 10) == stays


def test_the_limit_follows_free_memory(monkeypatch):
    free = {"host": 8 * 2**30}
    monkeypatch.setattr(dist_util, "_host_memory", lambda: free["host"])
    assert dist_util.memory_limit(torch.device("cpu")) == 2
    free["host"] = 2**30
    assert dist_util.memory_limit(torch.device("cpu")) == 0.25
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 2**40))
    assert dist_util.memory_limit(torch.device("cuda")) == 0.125


def test_free_memory_is_known_and_shared_by_processes(monkeypatch):
    free = dist_util.free_memory(torch.device("cpu"))
    assert 2**20 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert dist_util.free_memory(torch.device("cpu")) == pytest.approx(free / 4, rel=0.5)


def test_a_continued_run_keeps_its_limit(tmp_path):
    """Else a run could keep images in memory first and stream them later, which are not the same to the bit."""
    write_folder(tmp_path / "photos", sizes=[(20, 30), (40, 28)])
    words = ["--name", "run", *TINY, "--dataset", "imagefolder", "--data_dir", str(tmp_path / "photos")]
    words += ["--train_batch_size", "4", "--num_steps", "2", *places(tmp_path)]
    command = [sys.executable, str(ROOT / "train.py"), *words]
    subprocess.run(command, check=True, capture_output=True)
    path = tmp_path / "output" / f"{RUN}.jsonl"
    lines = path.read_text().splitlines()
    start = json.loads(lines[0])
    assert start["memory_limit"] > 0 and "memory_limit" not in start["settings"]
    args = torch.load(tmp_path / "output" / f"{RUN}_last.bin", weights_only=True)["args"]
    assert args["memory_limit"] == start["memory_limit"] == recorded_limit(Namespace(**args))
    assert recorded_limit(Namespace(**args | {"overwrite": True})) is None
    assert recorded_limit(Namespace(**args | {"name": "another"})) is None


def write_many(folder: Path, count: int) -> None:
    """An image folder of many small PNGs in ten classes, most of them hard links to a few."""
    for split, n in (("train", count), ("test", 10)):
        for i in range(10):
            (folder / split / f"class{i}").mkdir(parents=True)
            first = folder / split / f"class{i}" / "0.png"
            Image.new("RGB", (8, 8), (25 * i, 0, 0)).save(first)
            for j in range(1, n // 10):
                os.link(first, first.with_name(f"{j}.png"))


@pytest.mark.slow
def test_a_hundred_thousand_images_open_in_seconds(tmp_path):
    write_many(tmp_path, 100_000)
    flags = dict(dataset="imagefolder", data_dir=tmp_path, val_fraction=0.0, seed=1, emnist_split="mnist")
    kinds = {}
    for limit, kind in ((0.0, Files), (1.0, Uniform)):
        for when in ("first", "cached"):
            began = time.monotonic()
            data = load_data(Namespace(**flags, memory_limit=limit))
            to_device(data, torch.device("cpu"))
            kinds[limit, when] = time.monotonic() - began
            assert isinstance(data.train.source, kind) and len(data.train) == 100_000
    print({f"limit {limit} GiB, {when}": f"{seconds:.1f} s" for (limit, when), seconds in kinds.items()})
    assert max(kinds[0.0, "cached"], kinds[1.0, "cached"]) < 60


def test_larger_than_the_limit_streams(tmp_path):
    write_many(tmp_path, 200)
    flags = dict(dataset="imagefolder", data_dir=tmp_path, val_fraction=0.0, seed=1, emnist_split="mnist")
    size = 200 * 3 * 8 * 8 / 2**30
    for limit, kind in ((size * 0.999, Files), (size, Uniform)):
        assert isinstance(load_data(Namespace(**flags, memory_limit=limit)).train.source, kind)
