"""Mistakes of users: one line with the value and the way out, status 2, nothing half-written; odd input that works.

`bad` is a folder that holds everything broken; the tables name its files.
"""

import gzip
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ID,
    ROOT,
    SIZES,
    TINY,
    Evil,
    call,
    in_process,
    no_network,
    places,
    run,
    write_cifar10,
    write_folder,
    write_google_npz,
)
from PIL import Image

from models import create_model
from utils import cli, dist_util
from utils.datasets import MINI
from utils.image_sources import read_image

MODEL = dict(image_size=28, patch_size=7, num_classes=10, **SIZES)


def one_line(done, script: str, expected: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"{script}: error: "), done.stderr
    assert expected in done.stderr, done.stderr


# --- answered without torch; `run` is the name unless another follows ---

FLAGS = [
    ("--dataset mnist", "'mnist'"),
    ("--model_type ViT-X_16", "'ViT-X_16'"),
    ("--norm_type RMS", "'RMS'"),
    ("--lr 1e-6 --min_lr 1e-5", "--min_lr 1e-05 is above the learning rate, 1e-06; lower it"),
    ("--blr 1e-3 --batch_size 64 --warmup_lr 1e-3", "--warmup_lr 0.001 is above the learning rate, 0.00025; lower it"),
    ("--train_batch_size 32 --gradient_accumulation_steps 5", "32 is not divisible by 5"),
    ("--num_steps 0", "0 is not at least 1"),
    ("--num_steps 1e3", "invalid int value: '1e3'"),
    ("--lr -1", "-1 is not above 0"),
    ("--lr -0", "-0 is not above 0"),
    ("--lr nan", "nan is not above 0"),
    ("--lr inf", "inf is above"),
    ("--lr 1e999", "1e999 is above"),
    ("--weight_decay=-inf", "-inf is not at least 0"),
    ("--epochs 1e300", "1e300 is above"),
    ("--warmup_epochs nan", "nan is not at least 0"),
    ("--mean nan 0 0 --std 1 1 1", "nan is not at least"),
    ("--mean 0 0 inf --std 1 1 1", "inf is above 1"),
    ("--mean 0 0 0 --std 1 0 1", "0 is not above 0"),
    ("--mean 0.5 0.5 --std 1 1 1", "expected 3 arguments"),
    ("--mean 0.5 0.5 0.5", "--mean and --std go together"),
    ("--mean 123.675 116.28 103.53 --std 58.395 57.12 57.375", "123.675 is above 1"),
    ("--train_batch_size 1000000000000000000", "1000000000000000000 is above 2147483647"),
    ("--seed 99999999999999999999", "99999999999999999999 is above 2147483647"),
    ("--seed -1", "-1 is not at least 0"),
    ("--seed x", "invalid int value: 'x'"),
    ("--dim 1000000000000", "1000000000000 is above 2147483647"),
    ("--num_workers 100000", "100000 is above 1024"),
    ("--pretrained_dir nowhere.npz", "nowhere.npz: no such file"),
    ("--pretrained_dir {bad}", "{bad}: a folder; name the file in it"),
    ("--dry_run --pretrained_dir nowhere.npz", "nowhere.npz: no such file"),
    ("--load_model_dir nowhere.bin", "nowhere.bin: no such file"),
    ("--load_model_dir {bad}/text --pretrained_dir {bad}/text", "exclude each other"),
    ("-v true", "--load_model_dir"),
    ("-v --fp16 --fp16_opt_level O0", "_fp_False_"),
    ("-v maybe", "neither true nor false"),
    ("--scale 0.9 0.1", "the first is above the second"),
    ("--aug none --scale 0.5 1", "--scale has no meaning with --aug none; --aug crop, mild, weak, strong, dems,"),
    ("--val_fraction 1", "1 is above"),
    ("--learnin_rate 0.1", "did you mean --learning_rate?"),
    ("stray", "unknown argument 'stray'"),
    ("--name a/b", "usable as a file name"),
    ("--name ../a", "usable as a file name"),
    ("--name .a", "usable as a file name"),
    (["--name", ""], "usable as a file name"),
    (["--name", "a\nb"], r"--name 'a\nb' must be usable"),
    (["--name", "a\x1b[31m"], r"--name 'a\x1b[31m' must be usable"),
    *(([flag, b"caf\xe9"], r"caf\udce9: is not UTF-8") for flag in ("--name", "--data_dir", "--output_dir")),
    (["--name", "-x"], "argument --name: expected one argument"),
    (["--name", "x" * 300], "bytes longer than 200; shorten it"),
    (["--name", "名" * 60], "bytes longer than 200; shorten it"),
    ("--output_dir {bad}/text", "{bad}/text is no folder to write into"),
    ("--output_dir {bad}/text/deeper/still", "{bad}/text is no folder to write into"),
    ("--log_dir {bad}/text", "--log_dir {bad}/text"),
    ("@recipes/nowhere.args", "recipes/nowhere.args: no such file; there are recipes/demo.args"),
    ("@{bad}/unknown.args", "'--colour' in {bad}/unknown.args"),
    ("@{bad}/quote.args", "No closing quotation"),
    ("@{bad}/itself.args", "{bad}/itself.args: "),
    ("@{bad}/binary.args", "{bad}/binary.args: "),
    ("@{bad}", "recipe {bad}: no such file"),
    ("@", "no such file"),
    ("--mixup_prob 1.5", "1.5 is above 1"),
    ("--mixup_switch_prob -0.1", "-0.1 is not at least 0"),
    ("--mixup -1", "-1 is not at least 0"),
    ("--mixup 0.8 --batch_size 12 --gradient_accumulation_steps 4", "images per process and pass, not 12 / 4 = 3"),
    ("--reprob 2", "2 is above 1"),
    ("--ra 0", "0 is not at least 1"),
    ("--aug crop --aug_prob 0.5", "no meaning with --aug crop; --aug dems would take it"),
    ("--layer_decay 0", "0 is not above 0"),
    ("--ema_decay 1", "1 is above"),
    ("--device tpu", "'tpu'"),
    ("--memory_limit -1", "-1 is not at least 0"),
    ("WORLD_SIZE=2 RANK=0", "WORLD_SIZE 2 without LOCAL_RANK: start with torchrun, or unset WORLD_SIZE"),
]  # fmt: skip

PLOT = [
    ("{bad}/none", "none: no such folder"),
    ("{bad}/logs/none", "holds no run"),
    ("{bad}/text", "not named as a run"),
    ("{bad}/logs/bare", "does not begin with the record 'start'"),
    ("{bad}/logs/other", "does not begin with the record 'start'"),
    ("{bad}/logs/middle", "line 1 is no JSON object"),
    ("{bad}/logs/deep", "line 1 is no JSON object"),
    ("{bad}/logs/array", "line 1 is no JSON object"),
    ("{bad}/logs/old", "lacks 'settings'"),
    ("{bad}/logs/settings", "not from this train.py ('int' object is not iterable)"),
    ("{bad}/logs/flags", "lacks 'model_type'"),
    ("{bad}/logs/words", "not from this train.py (could not convert string to float: 'high')"),
    ("{bad}/logs/binary", "cannot be read, or is no text"),
    ("{bad}/logs/loss", "is no log of a run (could not convert string to float: 'high')"),
    ("{good} --logs {bad}/none", "none: no such folder"),
    ("{good} --out {bad}/text", "cannot be written to"),
    ("{good} --out /proc/nowhere", "cannot be written to"),
    ("--otu x", "did you mean --out?"),
]

# Calls scripts one after another, as processes of their own do before they load torch; prints how each went.
WITHOUT_TORCH = """
import contextlib, io, json, os, runpy, sys
answers = []
for script, words, env in json.load(sys.stdin):
    out, error = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True) for _ in range(2))
    sys.argv, status = [script, *words], 0
    os.environ.update(env)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code
    for name in env:
        del os.environ[name]
    texts = (stream.buffer.getvalue().decode() for stream in (out, error))
    answers.append([words, status, *texts])
    assert "torch" not in sys.modules, words
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers(good, bad, tmp_path_factory) -> dict[str, list]:
    """What the scripts answer to FLAGS, PLOT and what is right, in one process, without torch; FLAGS write nothing."""
    folder, calls = tmp_path_factory.mktemp("flags"), []
    for words, _ in FLAGS:
        words = words.format(bad=bad).split() if isinstance(words, str) else list(map(os.fsdecode, words))
        env = dict(word.split("=") for word in words if re.match("[A-Z_]+=", word))
        words = [word for word in words if word.split("=")[0] not in env]
        calls.append(("train.py", ["--name", "run", *TINY, *places(folder), *words], env))
    calls += [("plot.py", words.format(bad=bad, good=good).split(), {}) for words, _ in PLOT]
    calls += [("train.py", ["--help"], {}), ("plot.py", [str(good), "--out", str(tmp_path_factory.mktemp("out"))], {})]
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, input=json.dumps(calls), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr and not list(folder.iterdir()), (done.stdout, done.stderr)
    found = [subprocess.CompletedProcess(*answer) for answer in json.loads(done.stdout)]
    return {"train.py": found[: len(FLAGS)], "plot.py": found[len(FLAGS) : -2], "right": found[-2:]}


@pytest.mark.parametrize("i", range(len(FLAGS)))
def test_flags(answers, bad, i):
    one_line(answers["train.py"][i], "train.py", FLAGS[i][1].format(bad=bad))


@pytest.mark.parametrize("i", range(len(PLOT)))
def test_plots(answers, i):
    one_line(answers["plot.py"][i], "plot.py", PLOT[i][1])


def test_help_and_tables_need_no_torch(answers):
    help_of_train, table = answers["right"]
    assert help_of_train.returncode == table.returncode == 0
    assert "--train_batch_size" in help_of_train.stdout and "results.csv" in table.stdout


# --- answered by the model, before there is data: none is at {tmp}/nowhere ---

SIZE_MISTAKES = [
    ("--img_size 30", "image size 30 is not divisible by patch size 7"),
    ("--model_type DEMS-Ti --img_size 56 --merge_layer 1 3", "don't rise within 1 .. 2, the depth"),
    ("--stem conv", "a conv stem needs patches of 2, 4, 8, ... pixels, not 7"),
    ("--model_type DEMS-Ti --stem residual", "DEMS-Ti with norm LN takes no residual_stem"),
    ("--model_type MViT-Ti --img_sizes 10 28", "image size 10 is not divisible by patch size 7"),
    ("--img_sizes 14 28", "ViT-Ti_16 with norm LN takes no image_sizes"),
    ("--merge_num 64", "ViT-Ti_16 with norm LN takes no merge_num"),
    ("--grad_checkpoint --norm_type BN", "BN would count in its statistics"),
    ("--grad_checkpoint --norm_type Rescale", "Rescale would count in its statistics"),
]  # fmt: skip


@pytest.mark.parametrize("words, expected", SIZE_MISTAKES, ids=[str(i) for i in range(len(SIZE_MISTAKES))])
def test_sizes(tmp_path, words, expected):
    words = ["--name", "run", *TINY, *places(tmp_path), "--dataset", "imagefolder", *words.split()]
    for more in (["--data_dir", tmp_path / "nowhere"], ["--dry_run"]):
        one_line(in_process("train.py", *words, *more), "train.py", expected)
    assert not list(tmp_path.iterdir())


# --- broken files ---


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(999)))]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("good")
    run("train.py", "--name", "run", *TINY, "--num_steps", 2, *places(folder))
    return folder / "output"


@pytest.fixture(scope="module")
def bad(good, tmp_path_factory) -> Path:
    """Everything broken."""
    bad = tmp_path_factory.mktemp("bad")
    (bad / "text").write_text("just text")
    (bad / "empty").write_bytes(b"")
    recipes = {"unknown": b"--img_size 28  # pixels\n--colour 3\n", "quote": b"--name 'a\n", "binary": b"\xff\xfe\0\1"}
    recipes |= {"itself": f"@{bad}/itself.args".encode()}
    for name, text in recipes.items():
        (bad / f"{name}.args").write_bytes(text)

    state = create_model("ViT-Ti_16", **MODEL).state_dict()

    def weights(name: str, **changes) -> None:
        torch.save(state | changes, bad / name)

    weights("nan.pth", **{"blocks.1.mlp.fc1.bias": torch.full((64,), torch.nan)})
    weights("inf.pth", **{"norm.weight": torch.tensor([torch.inf] * 32)})
    weights("double.pth", **{"norm.weight": torch.full((32,), 1e300, dtype=torch.float64)})
    weights("int.pth", **{"norm.weight": torch.ones(32, dtype=torch.int64)})
    weights("complex.pth", **{"norm.weight": torch.ones(32, dtype=torch.complex64)})
    weights("sparse.pth", **{"blocks.0.mlp.fc1.weight": torch.eye(64, 32).to_sparse()})
    weights("shape.pth", **{"norm.weight": torch.ones(33)})
    weights("pos.pth", pos_embed=torch.zeros(2, 17, 32))
    torch.save({}, bad / "nothing.pth")
    torch.save([1, 2], bad / "list.pth")
    torch.save({"model": Evil(bad / "ran")}, bad / "evil.pth")
    (bad / "truncated.pth").write_bytes((bad / "int.pth").read_bytes()[:9000])
    write_google_npz(bad / "google.npz", **SIZES, patch=7, grid=4, classes=10)
    whole = (bad / "google.npz").read_bytes()
    (bad / "truncated.npz").write_bytes(whole[:5000])
    (bad / "flipped.npz").write_bytes(whole[:5000] + bytes([whole[5000] ^ 0xFF]) + whole[5001:])
    (bad / "text.npz").write_text("not weights")
    with np.load(bad / "google.npz") as file:
        arrays = dict(file)
    np.savez(bad / "nan.npz", **arrays | {"cls": arrays["cls"] * np.nan})
    np.savez(bad / "words.npz", **arrays | {"cls": np.array(["a"])})
    np.savez(bad / "flat.npz", **arrays | {"head/kernel": np.ones(5, np.float32)})
    np.savez(bad / "object.npz", cls=np.array([Evil(bad / "ran")], dtype=object))

    start, score = map(json.loads, (good / f"{ID}.jsonl").read_text().splitlines()[:2])
    logs = {
        "bare": "",
        "middle": "{\n{}\n",
        "other": '{"event": "eval"}\n',
        "old": '{"event": "start"}\n',
        "array": "[1]\n",
        "deep": "[" * 100_000 + "\n",
        "settings": json.dumps(start | {"settings": 5}) + "\n",
        "flags": json.dumps(start | {"settings": {"seed": 1}}) + "\n",
        "words": "\n".join(map(json.dumps, (start, score | {"accuracy": "high"}))) + "\n",
    }
    for name, text in logs.items():
        (bad / "logs" / name).mkdir(parents=True)
        (bad / "logs" / name / f"{ID}.jsonl").write_text(text)
    loss = b"Global Steps: 1\nValid Loss: high\nValid Accuracy: 0\n"
    for name, data in {"binary": b"\xff\xfe\0", "loss": loss}.items():
        (bad / "logs" / name).mkdir()
        (bad / "logs" / name / f"{ID}.txt").write_bytes(data)
    (bad / "logs" / "none").mkdir()

    write_folder(bad / "fine")
    (bad / "fine" / "test" / "cat" / "000.png").rename(bad / "fine" / "image.png")
    folders = "no_test no_train empty_train one_class empty_class strange_class level unknown broken bomb link newline"
    for name in folders.split():
        write_folder(bad / name, per_class=2)
    shutil.rmtree(bad / "no_test" / "test")
    shutil.rmtree(bad / "no_train" / "train")
    for name in ("cat", "dog"):
        shutil.rmtree(bad / "empty_train" / "train" / name)
    for split in ("train", "test"):
        shutil.rmtree(bad / "one_class" / split / "dog")
    (bad / "empty_class" / "train" / "eel").mkdir()
    (bad / "strange_class" / "train" / "a\x1b[2J").mkdir()
    shutil.rmtree(bad / "level" / "train")
    shutil.copytree(bad / "fine" / "train" / "cat", bad / "level" / "train")
    (bad / "unknown" / "test" / "dog").rename(bad / "unknown" / "test" / "owl")
    (bad / "broken" / "train" / "cat" / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (bad / "bomb" / "train" / "cat" / "000.png").write_bytes(png_header(60_000, 60_000))
    (bad / "link" / "train" / "cat" / "gone.png").symlink_to("nowhere.png")
    (bad / "newline" / "train" / "cat" / "a\nb.png").write_text("no image")

    (bad / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (bad / "large.png").write_bytes(png_header(13_000, 13_000))  # Pillow only warns
    (bad / "cut.png").write_bytes((bad / "fine" / "image.png").read_bytes()[:200])
    (bad / "a b'\"$(touch x).png").write_text("no image")
    Image.fromarray(np.ones((4, 4), np.float32)).save(bad / "float.tif")

    for kind in ("code", "cut"):
        write_cifar10(bad / f"cifar_{kind}", per_file=4)
    batch = "cifar-10-batches-py/test_batch"
    (bad / "cifar_code" / batch).write_bytes(pickle.dumps(Evil(bad / "ran")))
    (bad / "cifar_cut" / batch).write_bytes((bad / "cifar_cut" / batch).read_bytes()[:5000])
    for kind in ("cut", "text", "range", "mixed", "legacy"):
        raw = bad / f"idx_{kind}" / "FashionMNIST" / "raw"
        shutil.copytree(MINI, raw)
    images = "FashionMNIST/raw/train-images-idx3-ubyte"
    (bad / "idx_cut" / f"{images}.gz").write_bytes((MINI / f"{Path(images).name}.gz").read_bytes()[:100_000])
    (bad / "idx_text" / images).write_bytes(b"no images")
    shutil.copy(MINI / "train-labels-idx1-ubyte.gz", bad / "idx_mixed" / f"{images}.gz")
    labels = gzip.decompress((MINI / "t10k-labels-idx1-ubyte.gz").read_bytes())
    (bad / "idx_range" / "FashionMNIST/raw/t10k-labels-idx1-ubyte").write_bytes(labels[:-1] + b"\x0a")
    for path in (bad / "idx_legacy" / "FashionMNIST" / "raw").iterdir():  # torchvision takes the old files as enough
        path.unlink()
    (bad / "idx_legacy" / "FashionMNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(1, 28, 28), torch.zeros(1)), bad / "idx_legacy" / "FashionMNIST" / "processed" / name)
    return bad


FILES = [
    ("--pretrained_dir {bad}/nan.pth", "nan.pth: blocks.1.mlp.fc1.bias has values that are not finite"),
    ("--pretrained_dir {bad}/inf.pth", "inf.pth: norm.weight has values that are not finite"),
    ("--pretrained_dir {bad}/double.pth", "double.pth: norm.weight has values that are not finite"),
    ("--pretrained_dir {bad}/nan.npz", "nan.npz: cls_token has values that are not finite"),
    ("--pretrained_dir {bad}/int.pth", "int.pth: norm.weight is of torch.int64, the model's of torch.float32"),
    ("--pretrained_dir {bad}/complex.pth", "norm.weight is of torch.complex64"),
    ("--pretrained_dir {bad}/sparse.pth", "blocks.0.mlp.fc1.weight does not fit ("),
    ("--pretrained_dir {bad}/shape.pth", "norm.weight is (33,) in the file, (32,) in the model"),
    ("--pretrained_dir {bad}/pos.pth", "pos_embed is (2, 17, 32) in the file"),
    ("--pretrained_dir {bad}/nothing.pth", "nothing.pth: holds no weights"),
    ("--pretrained_dir {bad}/list.pth", "list.pth: holds no weights"),
    ("--pretrained_dir {bad}/empty", "empty: not a checkpoint, or damaged"),
    ("--pretrained_dir {bad}/text", "text: not a checkpoint, or damaged"),
    ("--pretrained_dir {bad}/truncated.pth", "truncated.pth: not a checkpoint, or damaged"),
    ("--pretrained_dir {bad}/evil.pth", "evil.pth: refused"),
    ("--pretrained_dir {bad}/text.npz", "text.npz: no readable .npz of Google's"),
    ("--pretrained_dir {bad}/truncated.npz", "truncated.npz: no readable .npz of Google's"),
    ("--pretrained_dir {bad}/flipped.npz", "flipped.npz: no readable .npz of Google's (Bad CRC-32"),
    ("--pretrained_dir {bad}/words.npz", "words.npz: no readable .npz of Google's (can't convert"),
    ("--pretrained_dir {bad}/flat.npz", "flat.npz: no readable .npz of Google's"),
    ("--pretrained_dir {bad}/object.npz", "object.npz: no readable .npz of Google's (Object arrays cannot"),
    ("--pretrained_dir {bad}/google.npz --depth 3", "lacks blocks.2.norm1.weight"),
    ("--pretrained_dir {bad}/google.npz --img_size 8 --patch_size 1", "google.npz: patch_embed.proj.weight is"),
    ("--load_model_dir {bad}/google.npz -v true", "pre_logits.weight, pre_logits.bias: no place for it in ViT"),
    ("--device cuda --gpu_id 99", "torch sees no GPU here"),
    ("--val_fraction 0.01 --dataset imagefolder --data_dir {bad}/fine", "holds out no image"),
    ("--dataset imagefolder --data_dir {bad}/nowhere", "nowhere: no such folder"),
    ("--dataset imagefolder --data_dir {bad}/text", "text: no such folder"),
    ("--dataset cifar10 --data_dir {bad}/text", "put cifar-10-python.tar.gz"),
    ("--dataset imagefolder --data_dir {bad}/no_test", "too few images a class to test on 0.2 of them"),
    ("--dataset imagefolder --data_dir {bad}/no_train", "has no train/; put CLASS folders into one, beside test"),
    ("--dataset imagefolder --data_dir {bad}/empty_train", "no class folders in it"),
    ("--dataset imagefolder --data_dir {bad}/level", "has no train/; put CLASS folders into one, beside test/"),
    ("--dataset imagefolder --data_dir {bad}/one_class", "only one class, cat"),
    ("--dataset imagefolder --data_dir {bad}/empty_class", "eel: no images in it (it is empty)"),
    ("--dataset imagefolder --data_dir {bad}/strange_class", r"a\x1b[2J: the name of a class must be printable"),
    ("--dataset imagefolder --data_dir {bad}/unknown", "class 'owl' is not among the 2 known: cat, dog"),
    ("--dataset imagefolder --data_dir {bad}/broken", "cat/000.png: not a readable image"),
    ("--dataset imagefolder --data_dir {bad}/broken --memory_limit 0", "cat/000.png: not a readable image"),
    ("--dataset imagefolder --data_dir {bad}/bomb", "cat/000.png: not a readable image"),
    ("--dataset imagefolder --data_dir {bad}/link", "cat/gone.png: not a readable image (No such file or directory)"),
    ("--dataset imagefolder --data_dir {bad}/newline", r"cat/a\nb.png: not a readable image"),
    ("--dataset cifar10 --data_dir {bad}/cifar_code", "CIFAR10 is not there and can't be downloaded (no route"),
    ("--dataset cifar10 --data_dir {bad}/cifar_cut", "put cifar-10-python.tar.gz from https://www.cs.toronto"),
    ("--dataset fashionmnist --data_dir {bad}/idx_cut", "train-images-idx3-ubyte.gz: no IDX file, or damaged"),
    ("--dataset fashionmnist --data_dir {bad}/idx_text", "train-images-idx3-ubyte: no IDX file, or damaged"),
    ("--dataset fashionmnist --data_dir {bad}/idx_range", "7, 8, 9, 10], 10 classes"),
    ("--dataset fashionmnist --data_dir {bad}/idx_legacy", "-ubyte.gz: no IDX file, or damaged (No such file"),
    ("--dataset fashionmnist --data_dir {bad}/idx_mixed", "train images are torch.uint8 (10000, 1), not"),
]  # fmt: skip


@pytest.mark.parametrize("words, expected", FILES, ids=[str(i) for i in range(len(FILES))])
def test_files(bad, tmp_path, monkeypatch, words, expected):
    no_network(monkeypatch)
    done = in_process("train.py", "--name", "run", *TINY, *places(tmp_path), *words.format(bad=bad).split())
    one_line(done, "train.py", expected)
    assert not list(tmp_path.iterdir()) and not (bad / "ran").exists()


# --- eval.py ---


def changed(state: dict, key: str, **changes) -> dict:
    return state | {key: state[key] | changes}


CHECKPOINTS = {
    "bare": (lambda s: {"model": {}}, "lacks 'args'"),
    "list": (lambda s: [1], "list indices must be integers"),
    "missing": (lambda s: {k: v for k, v in s.items() if k != "classes"}, "lacks 'classes'"),
    "type": (lambda s: changed(s, "config", dim="32"), ""),
    "sizes": (lambda s: changed(s, "config", dim=33), "dim 33 is not divisible by heads 2"),
    "word": (lambda s: changed(s, "config", colour=3), "takes no colour"),
    "config": (lambda s: s | {"config": 5}, ""),
    "weights": (lambda s: s | {"model": [1]}, ""),
    "shape": (lambda s: changed(s, "config", dim=64), ""),
    "key": (lambda s: s | {"model": {k: v for k, v in s["model"].items() if k != "norm.bias"}}, ""),
    "more": (lambda s: changed(s, "model", more=torch.ones(1)), ""),
    "flags": (lambda s: s | {"args": {}}, "no attribute 'img_size'"),
    "mean": (lambda s: changed(s, "args", mean=[0.0]), ""),
    "precision": (lambda s: s | {"precision": "fp8"}, "lacks 'fp8'"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(good, tmp_path, kind):
    change, expected = CHECKPOINTS[kind]
    path = tmp_path / f"{kind}.bin"
    torch.save(change(torch.load(good / f"{ID}_checkpoint.bin", weights_only=True)), path)
    done = in_process("eval.py", path, "--plot", "position")
    one_line(done, "eval.py", expected)
    assert f"{path}: not a checkpoint of this train.py (" in done.stderr
    assert list(tmp_path.iterdir()) == [path]


EVAL = [
    ("{bad}/none.bin", "none.bin: cannot be read (No such file or directory)"),
    ("{bad}", ": cannot be read (Is a directory); name a file"),
    ("{bad}/evil.pth", "evil.pth: refused"),
    ("{good} --images {bad}/none.png", "none.png: not a readable image (No such file"),
    ("{good} --images {bad}/text", "text: not a readable image"),
    ("{good} --images {bad}/empty", "empty: not a readable image"),
    ("{good} --images {bad}/cut.png", "cut.png: not a readable image"),
    ("{good} --images {bad}/bomb.png", "bomb.png: not a readable image"),
    ("{good} --images {bad}/float.tif", "pixels of 32 bits, which have no agreed range"),
    (["{good}", "--images", "{bad}/a b'\"$(touch x).png"], "a b'\"$(touch x).png: not a readable image"),
    ("{good} --images {bad}/unknown --plot attention", "--plot attention looks at single files"),
    ("{good} --split val", "fashionmnist-mini has no val images beside its test images"),
    ("{good} --images a.png --dataset cifar10", "leave out --dataset"),
    ("{good} --dataset imagefolder --data_dir {bad}/fine", "'cat' is not among the 10 known"),
    ("{good} --labels a.csv --dataset cifar10", "goes with --dataset imagefolder, not cifar10"),
    ("{good} --top 0", "0 is not at least 1"),
    ("{bad}/nan.pth", "nan.pth: not a checkpoint of this train.py (lacks 'args'); score bare weights with train.py"),
    ("{bad}/truncated.pth", "truncated.pth: not a checkpoint, or damaged"),
    ("{good} --blocks 0", "--plot attention shows, which is missing"),
    ("{good} --plot attention --blocks 2", "--blocks 2: the model has blocks 0 to 1"),
    ("{good} --plot wrong", "argument --plot: invalid choice: 'wrong'; choose from attention, position, patches"),
    ("{good} --plot errors --images a.png", "--images goes with --plot attention alone; draw errors without --images"),
    (f"{{good}} --plot attention --images {' a.png' * 9}", "--plot attention has room for 8 images, not 9"),
    ("{good} --plot position --output_dir {bad}/text", "choose another --output_dir"),
    ("{good} --output_dir {bad}/text", "choose another --output_dir"),
    ("", "required: checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize("words, expected", EVAL, ids=[str(i) for i in range(len(EVAL))])
def test_evaluation(good, bad, words, expected):
    before = sorted(good.iterdir())
    words = words.split() if isinstance(words, str) else words
    words = [word.format(bad=bad, good=good / f"{ID}_checkpoint.bin") for word in words]
    one_line(in_process("eval.py", *words), "eval.py", expected)
    assert sorted(good.iterdir()) == before and not (bad / "ran").exists()


def test_files_that_are_no_runs_are_named_and_left_out(good, bad, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    kinds = {path.name: next(path.iterdir()) for path in sorted((bad / "logs").iterdir()) if path.name != "none"}
    for kind, path in kinds.items():
        shutil.copy(path, tmp_path / path.name.replace("run_", f"{kind}_"))
    done = in_process("plot.py", tmp_path)
    assert done.returncode == 0 and "| ViT-Ti_16, patch 7, dim 32, depth 2, heads 2, mlp 64 " in done.stdout
    for kind, line in zip(kinds, done.stderr.splitlines(), strict=True):
        assert line.startswith(f"plot.py: left out: {tmp_path}/{kind}_ViT-Ti_16"), line


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"), "2.00 GiB.)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "you tried)"),
        (MemoryError(), "out of memory (the host)"),
    ],
)
def test_too_little_memory_is_said(capsys, error, expected):
    def full(args):
        raise error

    with pytest.raises(SystemExit) as left:
        cli.run_main(full, None, dist_util.explain)
    text = capsys.readouterr().err
    assert left.value.code == 2 and text.count("\n") == 1
    assert expected in text and text.endswith("; fewer images per pass, or a smaller model\n")


def test_mistakes_of_the_code_keep_their_traceback(capsys):
    def wrong(args):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.run_main(wrong, None, dist_util.explain)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "script, words",
    [
        ("train.py", "--name run --dataset imagefolder --data_dir {bad}/bomb --img_size 32 --output_dir {tmp}/o"),
        ("eval.py", "{good} --images {bad}/large.png"),
        ("plot.py", "{bad}/logs/words"),
    ],
)
def test_in_a_process_of_its_own(good, bad, tmp_path, script, words):
    """Nothing of warnings or tracebacks beside the line, as a user sees it."""
    words = words.format(bad=bad, tmp=tmp_path, good=good / f"{ID}_checkpoint.bin").split()
    one_line(call(script, *words, check=2), script, ": ")
    assert not list(tmp_path.iterdir())


# --- odd, but right ---


def rgb(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_odd_images_are_read(tmp_path):
    """Pixel values of every mode that image files have."""
    red = (200, 30, 10)
    flat = Image.new("RGB", (6, 4), red)
    flat.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(rgb(tmp_path / "cmyk.jpg").astype(int) - red).max() <= 3
    flat.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert (rgb(tmp_path / "cmyk.tif") == red).all()
    clear = Image.new("RGBA", (6, 4), (*red, 0))
    clear.save(tmp_path / "clear.png")
    assert (rgb(tmp_path / "clear.png") == red).all()  # transparency is dropped, as in torchvision's ImageFolder
    palette = flat.quantize(4)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert (rgb(tmp_path / "palette.png") == red).all()
    Image.new("LA", (6, 4), (90, 10)).save(tmp_path / "gray_alpha.png")
    assert (rgb(tmp_path / "gray_alpha.png") == 90).all()
    Image.new("1", (6, 4), 1).save(tmp_path / "bilevel.png")
    assert (rgb(tmp_path / "bilevel.png") == 255).all()
    frames = [Image.new("RGB", (6, 4), colour) for colour in (red, (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (rgb(tmp_path / "moving.gif") == red).all()  # the first frame
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert (rgb(tmp_path / "moving.webp") == red).all()


def test_odd_names_are_names(good, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    names = ["a b.png", "quote'\".png", "-x.png", "ünï 图.png", "new\nline.png", "$(touch x).png", "%s{}.png", "a.PNG"]
    for name in names:
        Image.fromarray(image).save(tmp_path / name, format="PNG")
    files = [tmp_path / name for name in names]
    done = in_process("eval.py", good / f"{ID}_checkpoint.bin", "--json", "--images", *files)
    answers = json.loads(done.stdout)
    assert list(answers) == list(map(str, files)) and len({str(answer) for answer in answers.values()}) == 1


def test_odd_folder_is_trained_and_scored(tmp_path):
    """Odd names of classes and files, hidden ones, links, no images among images."""
    folder = tmp_path / 'my photos\' "$(x)"'
    classes = ["a b", "-x", "$x^2$ $\\frac$", "ünï 图", "100%"]
    write_folder(folder, per_class=2, classes=classes)
    first = folder / "train" / "a b"
    (first / ".hidden.png").write_text("no image")
    (first / "notes.txt").write_text("no image")
    (first / "deeper").mkdir()
    (first / "000.png").rename(first / "deeper" / "new\nline.PNG")
    (first / "again.png").symlink_to(first / "001.png")
    (folder / "train" / ".hidden").mkdir()
    (folder / "train" / "stray.png").write_text("not of a class, so not read")
    words = ["--name=-é $}$", *TINY, "--dataset", "imagefolder", "--data_dir", folder, "--train_batch_size", 4]
    done = run("train.py", *words, "--num_steps", 2, *places(tmp_path))
    assert "5 classes, 11 training and 10 test images" in done.stdout
    path = tmp_path / "output" / f"-é $}}$_{ID.removeprefix('run_')}_checkpoint.bin"
    out = run("eval.py", path).stdout
    assert all(f"  {name}" in out for name in classes)
    run("plot.py", tmp_path / "output")


@pytest.mark.parametrize(
    "words",
    ["--num_steps 1_0", "--lr 1e-320", "--weight_decay -0", "--save_every 2147483647", "--eval_every 2000000000"],
)
def test_odd_numbers_are_numbers(tmp_path, words):
    done = run("train.py", "--dry_run", "--name", "run", *TINY, *places(tmp_path), *words.split())
    assert done.stdout.strip().startswith("10 steps" if "1_0" in words else "10000 steps")
    assert not list(tmp_path.iterdir())


def test_more_classes_than_there_are(good, tmp_path):
    Image.new("RGB", (5, 5)).save(tmp_path / "a.png")
    done = in_process("eval.py", good / f"{ID}_checkpoint.bin", "--images", tmp_path / "a.png", "--top", 99, "--json")
    assert len(json.loads(done.stdout)[str(tmp_path / "a.png")]) == 10


# --- the sweeps ---

SWEEPS = [
    (dict(ARCHS="ViT-X_1"), "invalid choice: 'ViT-X_1'"),
    (dict(ARCHS=" "), "nothing to do"),
    (dict(ARCHS="*"), "invalid choice: '*'"),
    (dict(NORMS="LN XX"), "invalid choice: 'XX'"),
    (dict(SEEDS="x"), "invalid int value: 'x'"),
    (dict(CELL="16"), "nothing to do; look at ARCHS, NORMS, SEEDS and CELL"),
    (dict(CELL="two"), "nothing to do"),
    (dict(CELL="PATH[$(touch {tmp}/ran)]"), "nothing to do"),
    (dict(GPUS="x"), "argument --gpu_id: invalid int value: 'x'"),
    (dict(GPUS=" "), "argument --gpu_id: invalid int value: ''"),
    (dict(NAME="../x"), "usable as a file name"),
    (dict(NAME="$(touch {tmp}/ran)/`touch {tmp}/ran`"), "usable as a file name"),
    (dict(NAME="a\nb"), r"'a\nb' must be usable"),
    (dict(DATASET="mnist"), "invalid choice: 'mnist'"),
    (dict(FLAGS="--lerning_rate 1"), "did you mean --learning_rate?"),
    (dict(FLAGS="--num_steps $(touch {tmp}/ran)"), "invalid int value: '$(touch'"),
]


@pytest.mark.parametrize("env, expected", SWEEPS, ids=[str(i) for i in range(len(SWEEPS))])
@pytest.mark.parametrize("shell", ["bash --posix train1.sh", "sh train3.sh"])
def test_sweeps(tmp_path, shell, env, expected):
    shell, script = shell.rsplit(" ", 1)
    env = {name: value.format(tmp=tmp_path) for name, value in env.items()}
    words = [*places(tmp_path), *env.pop("FLAGS", "").split()]
    env = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)} | env
    done = subprocess.run(
        [*shell.split(), str(ROOT / script), *words], capture_output=True, text=True, env=env, timeout=60
    )
    one_line(done, "train.py", expected)
    assert done.stdout == "" and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_hostile_names_run_nothing(tmp_path):
    """A name that a shell would run is only a name, from the sweep to the files and the pictures."""
    name = "a b'\"$(touch ran);`touch ran`*${HOME}$x^2$ $}$é-"
    flags = "--dataset fashionmnist-mini --img_size 28 --patch_size 7 --dim 32 --depth 1 --heads 2 --mlp_dim 32".split()
    flags += ["--num_steps", "2", "--train_batch_size", "8", "--eval_batch_size", "2000", *places(tmp_path)]
    env = dict(NAME=name, ARCHS="ViT-Ti_16", NORMS="LN", PYTHON=sys.executable, TMPDIR=str(tmp_path), DRY_RUN="0")
    done = subprocess.run(["sh", str(ROOT / "train1.sh"), *flags], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, **env})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "output"] and not (ROOT / "ran").exists()
    run_id = f"{name}_ViT-Ti_16_norm_LN_fp_True_img_28_pretrain_F"
    files = {path.name for path in (tmp_path / "output").iterdir()}
    assert {f"{run_id}.jsonl", f"{run_id}_checkpoint.bin", f"{run_id}_curves.png", "results.md"} <= files
    assert [path.name for path in (tmp_path / "logs").iterdir()] == [run_id]
    checkpoint = tmp_path / "output" / f"{run_id}_checkpoint.bin"
    run("eval.py", checkpoint, "--plot", "position")
    run("eval.py", checkpoint)
