"""Readers of files that others wrote: what is cut off, or another kind of file, is one line, and no code runs."""

import contextlib
import gzip
import io
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ID, SIZES, TINY, no_network, places, run, write_cifar10, write_google_npz
from PIL import Image

import eval
from models import create_model
from utils import checkpoint, datasets, image_sources, options, results, weights
from utils.cli import UserError

MODEL = create_model("ViT-Ti_16", image_size=28, patch_size=7, num_classes=10, **SIZES)
IMAGES = (".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".ppm")
TORCH = (".pth", ".legacy.pth", "_checkpoint.bin")
IDX = ("-idx3-ubyte", "-idx3-ubyte.gz")

# Each reader, with the names' ends of the files that it reads.
READERS = {
    "load_weights": (lambda path: weights.load_weights(MODEL, path), (".npz", ".safetensors", *TORCH)),
    "read_file": (checkpoint.read_file, TORCH),
    "load_run": (lambda path: eval.load_run(path, "cpu"), ("_checkpoint.bin",)),
    "read_image": (image_sources.read_image, IMAGES),
    "_read_idx": (datasets._read_idx, IDX),
    "read_run": (results.read_run, (".jsonl",)),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, bytes]:
    """A file of each kind, by the end of its name."""
    folder = tmp_path_factory.mktemp("good")
    run("train.py", "--name", "run", *TINY, "--num_steps", 4, "--eval_every", 2, *places(folder))
    files = {end: (folder / "output" / f"{ID}{end}").read_bytes() for end in ("_checkpoint.bin", ".jsonl")}
    write_google_npz(folder / "w.npz", **SIZES, patch=7, grid=4, classes=10)
    torch.save({"model": MODEL.state_dict()}, folder / "w.pth")
    torch.save(MODEL.state_dict(), folder / "w.legacy.pth", _use_new_zipfile_serialization=False)
    with contextlib.suppress(ImportError):
        from safetensors.torch import save_file

        save_file(MODEL.state_dict(), folder / "w.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    for end in IMAGES:
        Image.fromarray(pixels).save(folder / f"w{end}")
    images = b"\0\0\x08\3" + b"".join(side.to_bytes(4, "big") for side in (5, 28, 28)) + bytes(range(245)) * 16
    (folder / "w-idx3-ubyte").write_bytes(images)
    (folder / "w-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    return files | {path.name[1:]: path.read_bytes() for path in folder.glob("w*")}


def refused(read, path: Path) -> str:
    with pytest.raises(UserError) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", READERS)
def test_files_that_are_cut_off_are_one_line(tmp_path, good, name):
    read, ends = READERS[name]
    for end in filter(good.__contains__, ends):
        path, whole = tmp_path / f"{ID}{end}", good[end]
        path.write_bytes(whole)
        read(path)  # as it is, it can be read
        size = len(whole)
        end_matters = [] if end in IMAGES else [size - 9]  # Pillow does without some images' last bytes
        for part in (0, 1, 9, size // 4, size // 2, 3 * size // 4, *end_matters):
            path.write_bytes(whole[:part])
            if end == ".jsonl" and b"\n" in whole[:part]:  # as a crash leaves it
                assert read(path).cut_off
            else:
                refused(read, path)


@pytest.mark.parametrize("name", READERS)
def test_files_of_another_kind_are_one_line(tmp_path, good, name):
    read, ends = READERS[name]
    others = {end: data for end, data in good.items() if end not in ends}
    others |= {"text": b"just text\n" * 99, "zeros": bytes(9999), "noise": np.random.default_rng(1).bytes(9999)}
    for kind, data in others.items():
        for end in ends:
            path = tmp_path / f"{ID}{end}"
            path.write_bytes(data)
            assert refused(read, path), (kind, end)


# --- no code ---


class Call:
    """Pickled, a call of a function."""

    def __init__(self, *function_and_arguments):
        self.value = function_and_arguments

    def __reduce__(self):
        return self.value[0], self.value[1:]


def payloads(canary: str) -> list[Call]:
    return [
        Call(os.system, f"touch {canary}"),
        Call(exec, f"open({canary!r}, 'w')"),
        Call(subprocess.call, ["touch", canary]),
        Call(open, canary, "w"),
        Call(torch.save, 1, canary),
        Call(np.save, canary, 1),
    ]


def forms(thing) -> list[bytes]:
    """Pickles as they are, in torch's two kinds of files and in numpy's, and a zip archive that looks like both."""
    array = np.array([thing], dtype=object)
    found = [pickle.dumps(thing, protocol) for protocol in (0, 2, 4)]
    for save in (
        lambda file: torch.save(thing, file),
        lambda file: torch.save(thing, file, _use_new_zipfile_serialization=False),
        lambda file: np.savez(file, cls=array, fingerprint=array),
        lambda file: np.save(file, array),
    ):
        save(file := io.BytesIO())
        found.append(file.getvalue())
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, data in (("archive/data.pkl", found[1]), ("archive/version", b"3\n"), ("cls.npy", found[-1])):
            archive.writestr(name, data)
    return [*found, file.getvalue()]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {"head.weight": torch.ones(1), "x": [(x,)]}}])
def test_no_payload_runs(tmp_path, monkeypatch, wrap):
    """In any form, under any name, in every reader."""
    no_network(monkeypatch)
    write_cifar10(tmp_path, per_file=3)
    canary = tmp_path / "ran"
    reads = [read for read, _ in READERS.values()] + [weights.read_weights, checkpoint.read_file]
    for payload in payloads(str(canary)):
        for data in forms(wrap(payload)):
            for end in (".npz", ".bin", ".safetensors", ".png", ".jsonl"):
                path = tmp_path / f"{ID}{end}"
                path.write_bytes(data)
                for read in reads:
                    with contextlib.suppress(UserError):
                        read(path)
                assert image_sources.Cache([path], "x").read("pixels") is None
            (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(data)
            with pytest.raises(UserError):
                datasets.load_data("cifar10", tmp_path)
            assert not canary.exists(), payload.value


def test_logs_and_recipes_are_only_text(tmp_path):
    canary = tmp_path / "ran"
    code = f"__import__('os').system('touch {canary}')"
    (tmp_path / f"{ID}.txt").write_text(
        f"t - INFO - x - Training parameters Namespace(a={code}, num_steps=4, b=[{code} for _ in range(9)])\n"
        f"t - INFO - x - Global Steps: 1\n"
    )
    found = results.read_run(tmp_path / f"{ID}.txt")
    assert found.num_steps == 4 and set(found.settings) == {"num_steps"} and not canary.exists()
    (tmp_path / "a.args").write_text(f"--name '$(touch {canary})' `touch {canary}`")
    with pytest.raises(SystemExit):
        options.parse_train_args([f"@{tmp_path}/a.args"])
    assert not canary.exists()
