"""Memory: a long run's stays as it is, and image folders follow the limit."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ID, ROOT, TINY, places, run, write_folder
from PIL import Image

import train
from utils import device, options
from utils.datasets import load_data
from utils.image_sources import Files, Uniform

# A run that prints its resident memory, in bytes, after each evaluation and what follows it.
WATCHED = """
import json, resource, sys
import train
from utils import options

sizes, save_last = [], train.Trainer.save_last

def watched(trainer):
    save_last(trainer)
    with open("/proc/self/statm") as file:
        sizes.append(int(file.read().split()[1]) * resource.getpagesize())

train.Trainer.save_last = watched
status = train.main(options.parse_train_args(sys.argv[1:]))
print(json.dumps(sizes))
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_hundred_evaluations_grow_by_less_than_5_mb(tmp_path):
    """With averages, batch statistics and held-out images, all that a run keeps; on few images, to be quick."""
    write_folder(tmp_path / "photos", sizes=[(28, 28)], per_class=32)
    words = ["--name", "run", *TINY, "--dataset", "imagefolder", "--data_dir", str(tmp_path / "photos")]
    words += places(tmp_path)
    words += "--num_steps 110 --eval_every 1 --save_every 1 --ema_decay 0.9 --val_fraction 0.3 --norm_type BN".split()
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
import resource
import torch
from utils import device

def faults():
    for i in range(20):
        if i == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**23)  # 32 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
device.keep_memory(torch.device("cpu"))
print(plain, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("more, stays", [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept_for_the_next_step(more, stays):
    """Counted in page faults: a CPU's training keeps large blocks, unless the environment says otherwise."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    text = subprocess.check_output([sys.executable, "-c", FAULTS], cwd=ROOT, env=own | more, text=True)
    plain, kept = map(int, text.split())
    print("page faults of ten blocks of 32 MiB:", plain, "then", kept)
    assert plain > 100 and (kept < plain / 10) == stays


def test_the_limit_follows_free_memory(monkeypatch):
    free = {"host": 8 * 2**30}
    monkeypatch.setattr(device, "host_memory", lambda: free["host"])
    assert device.memory_limit(torch.device("cpu")) == 2
    free["host"] = 2**30
    assert device.memory_limit(torch.device("cpu")) == 0.25
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 2**40))
    assert device.memory_limit(torch.device("cuda")) == 0.125


def test_free_memory_is_known_and_shared_by_processes(monkeypatch):
    free = device.host_memory()
    assert 2**20 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device.host_memory() == pytest.approx(free / 4, rel=0.5)


def test_a_continued_run_keeps_its_limit(tmp_path, monkeypatch):
    """Else a run could keep images in memory first and stream them later, which are not the same to the bit."""
    write_folder(tmp_path / "photos", sizes=[(20, 30), (40, 28)])
    words = ["--name", "run", *TINY, "--dataset", "imagefolder", "--data_dir", str(tmp_path / "photos")]
    words += ["--train_batch_size", "4", "--num_steps", "2", *places(tmp_path)]
    run("train.py", *words)
    start = json.loads((tmp_path / "output" / f"{ID}.jsonl").read_text().splitlines()[0])
    assert start["memory_limit"] > 0 and "memory_limit" not in start["settings"]

    def limit(*more: str) -> tuple[float, type]:
        args = options.parse_train_args([*words, *more])
        _, data, _ = train.prepare(args)
        return args.memory_limit, type(data.train.source)

    in_memory = limit()[1]
    monkeypatch.setattr(device, "memory_limit", lambda device: 0.0)  # now there is less
    assert limit() == (start["memory_limit"], in_memory) and in_memory is not Files
    assert limit("--overwrite") == limit("--name", "another") == (0.0, Files)
    assert limit("--memory_limit", "0.5") == (0.5, in_memory)


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
    kinds = {}
    for limit, kind in ((0.0, Files), (1.0, Uniform)):
        for when in ("first", "cached"):
            began = time.monotonic()
            data = load_data("imagefolder", tmp_path, memory_limit=limit).to(torch.device("cpu"))
            kinds[limit, when] = time.monotonic() - began
            assert isinstance(data.train.source, kind) and len(data.train) == 100_000
    print({f"limit {limit} GiB, {when}": f"{seconds:.1f} s" for (limit, when), seconds in kinds.items()})
    assert max(kinds[0.0, "cached"], kinds[1.0, "cached"]) < 60


def test_larger_than_the_limit_streams(tmp_path):
    write_many(tmp_path, 200)
    size = 200 * 3 * 8 * 8 / 2**30
    for limit, kind in ((size * 0.999, Files), (size, Uniform)):
        assert isinstance(load_data("imagefolder", tmp_path, memory_limit=limit).train.source, kind)


PEAK = "import resource, sys, train; {then}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"


@pytest.mark.slow
def test_three_hundred_photos_of_very_different_sizes(tmp_path):
    """A tenth above 3000 pixels, one of 7000 x 3000, a class of one: what training takes beyond torch itself."""
    rng = np.random.default_rng(0)
    sizes = [(7000, 3000)] + [(3000 + 40 * i, 2000 + 30 * i) for i in range(29)]
    sizes += [tuple(rng.integers(60, 1500, 2).tolist()) for _ in range(270)]
    for i, size in enumerate(sizes):
        path = tmp_path / "photos" / ("rare" if i == 299 else "few" if i > 286 else f"class{i % 4}") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size).save(path)
    words = "--name run --model_type ViT-Ti_16 --patch_size 32 --bf16 --aug mild --train_batch_size 64".split()
    words += ["--eval_batch_size", "64", "--num_steps", "4", "--data_dir", str(tmp_path / "photos"), *places(tmp_path)]
    then = f"from utils import options; train.main(options.parse_train_args({words}))"
    empty, full = (
        int(subprocess.check_output([sys.executable, "-c", PEAK.format(then=what)], cwd=ROOT, text=True).split()[-1])
        for what in ("pass", then)
    )
    cache = (tmp_path / "photos" / "train.cache.npz").stat().st_size / 2**20
    print(f"torch {empty} MB, training {full} MB, cache {cache:.0f} MB")
    assert full - empty < 725 and cache < 150  # with torch for CUDA 1.5 GB in all
