"""Small data, weights and command lines for the tests."""

import contextlib
import io
import multiprocessing
import os
import pickle
import resource
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
ID = "run_ViT-Ti_16_norm_LN_fp_False_img_28_pretrain_F"  # of a run that is named so, of the sizes below
SIZES = dict(dim=32, depth=2, heads=2, mlp_dim=64)
TINY = (
    "--model_type ViT-Ti_16 --patch_size 7 --img_size 28 --dim 32 --depth 2 --heads 2 --mlp_dim 64 "
    "--dataset fashionmnist-mini --train_batch_size 32 --log_every 1"
).split()


def call(script: str, *words, check: int | None = 0, env: dict | None = None) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user does; `check` is the exit status expected."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **(env or {})}, timeout=600
    )
    assert check is None or done.returncode == check, (done.returncode, done.stdout, done.stderr)
    return done


def in_process(script: str, *words) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as `call` does, in this process, which has torch loaded."""
    out, error = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before, sys.argv, status = sys.argv, [script, *map(str, words)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), contextlib.chdir(ROOT):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = before
    texts = (stream.buffer.getvalue().decode(errors="backslashreplace") for stream in (out, error))
    return subprocess.CompletedProcess(words, status, *texts)


def run(script: str, *words, check: int = 0) -> subprocess.CompletedProcess:
    """`in_process`, with the exit status that is expected."""
    done = in_process(script, *words)
    assert done.returncode == check, (done.stdout, done.stderr)
    return done


FORKS = multiprocessing.get_context("forkserver")  # its processes have torch loaded, and so start at once
FORKS.set_forkserver_preload(["pytest", "torchvision", "torch.utils.tensorboard", "train"])


def train_in_fork(words: list[str], error: Path, pause: float, largest: int | None, env: dict[str, str]) -> None:
    """Become train.py, a leader of a process group; for processes of FORKS.

    `error` is where stderr goes; `pause` seconds pass in the midst of every save, before the temporary file gets its
    name; no file may be larger than `largest` bytes.
    """
    os.setsid()
    os.environ.update(env)
    torch.set_num_threads(1)  # as in the tests' own process, whose results are compared with these
    for stream, path in ((1, os.devnull), (2, error)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    fsync = os.fsync

    def slow(file: int) -> None:
        time.sleep(pause * os.readlink(f"/proc/self/fd/{file}").endswith(".tmp"))
        fsync(file)

    os.fsync = slow
    sys.argv = ["train.py", *words]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def fork_train(*words, error: Path, pause: float = 0.0, largest: int | None = None, env: dict | None = None):
    """Start train.py as a process of its own; a multiprocessing.Process. See `train_in_fork`."""
    process = FORKS.Process(target=train_in_fork, args=(list(map(str, words)), error, pause, largest, env or {}))
    process.start()
    process.error = error
    return process


def wait_for(condition: Callable[[], bool], process) -> None:
    """Until a condition holds, while a process lives that `fork_train` or subprocess.Popen has started."""
    limit = time.monotonic() + 120
    while not condition():
        alive = process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
        assert alive and time.monotonic() < limit, getattr(process, "error", Path(os.devnull)).read_text()
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    """Process ids of a process's children; none where it has ended."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return list(map(int, path.read_text().split())) if path.exists() else []


def places(folder: Path) -> list[str]:
    """Flags that keep a run's files in a folder."""
    return ["--output_dir", str(folder / "output"), "--log_dir", str(folder / "logs")]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_cifar10(root: Path, per_file: int = 60) -> None:
    """A few random images in CIFAR-10's own format."""
    rng = np.random.default_rng(0)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        data = rng.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        (folder / name).write_bytes(
            pickle.dumps({"data": data, "labels": [i % 10 for i in range(per_file)]}, protocol=2)
        )
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}, protocol=2))


def write_cifar100(root: Path, n: int = 200) -> None:
    """A few random images in CIFAR-100's own format."""
    rng = np.random.default_rng(0)
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = [i % 100 for i in range(n)]
        (folder / name).write_bytes(pickle.dumps({"data": data, "fine_labels": labels}, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{i}" for i in range(100)]}, protocol=2))


def accept_any_cifar(monkeypatch) -> None:
    """Let torchvision read, in this process, what `write_cifar10` made up: it compares no checksums."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.isfile(path))


def no_network(monkeypatch) -> None:
    """torchvision's downloads fail, in this process, as they do without a network."""

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", fail)


class Evil:
    """Pickled, a call that makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


def write_folder(
    root: Path, sizes=((20, 20),), per_class: int = 6, splits=("train", "test"), classes=("cat", "dog")
) -> None:
    """An image folder of random PNGs whose sizes (height, width) go round."""
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                height, width = sizes[i % len(sizes)]
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:03d}.png")


def write_google_npz(
    path: Path, *, dim: int, depth: int, heads: int, mlp_dim: int, patch: int, grid: int, classes: int
) -> None:
    """Random weights under the names and shapes of Google's files."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return (rng.standard_normal(shape, dtype=np.float32) * 0.02).astype(np.float32)

    head = dim // heads
    arrays = {
        "cls": random(1, 1, dim),
        "embedding/kernel": random(patch, patch, 3, dim),
        "embedding/bias": random(dim),
        "Transformer/posembed_input/pos_embedding": random(1, 1 + grid * grid, dim),
        "Transformer/encoder_norm/scale": 1 + random(dim),
        "Transformer/encoder_norm/bias": random(dim),
        "pre_logits/kernel": random(dim, dim),
        "pre_logits/bias": random(dim),
        "head/kernel": random(dim, classes),
        "head/bias": random(classes),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            arrays[f"{attention}/{name}/kernel"] = random(dim, heads, head)
            arrays[f"{attention}/{name}/bias"] = random(heads, head)
        arrays[f"{attention}/out/kernel"] = random(heads, head, dim)
        arrays[f"{attention}/out/bias"] = random(dim)
        arrays[f"{block}/MlpBlock_3/Dense_0/kernel"] = random(dim, mlp_dim)
        arrays[f"{block}/MlpBlock_3/Dense_0/bias"] = random(mlp_dim)
        arrays[f"{block}/MlpBlock_3/Dense_1/kernel"] = random(mlp_dim, dim)
        arrays[f"{block}/MlpBlock_3/Dense_1/bias"] = random(dim)
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays[f"{block}/{norm}/scale"] = 1 + random(dim)
            arrays[f"{block}/{norm}/bias"] = random(dim)
    np.savez(path, **arrays)
