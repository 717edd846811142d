"""The examples; and a model of somebody else, as one file and one row, with nothing of a ViT in it."""

import json
import re
import sys
import time
from unittest.mock import patch

import pytest
import torch
from helpers import ROOT, call, in_process, places, same, weights

from eval import load_run
from models import MODELS
from utils import options
from utils.cli import UserError
from utils.datasets import load_data
from utils.dist_util import Interrupt
from utils.presets import AUGS, DATASETS

MODEL = """
import torch


class Perceptron(torch.nn.Module):
    def __init__(self, image_size, num_classes, hidden=8):
        super().__init__()
        torch.linspace(0, 1, 3).numpy()  # rates or positions, which 'meta' tensors have none of
        self.first = torch.nn.Linear(3 * image_size**2, hidden)
        self.last = torch.nn.Linear(hidden, num_classes)

    def forward(self, x):
        return self.last(torch.relu(self.first(x.flatten(1))))
"""
FLAGS = (
    "--name own --model_type Perceptron-S --dataset fashionmnist-mini --img_size 8 --train_batch_size 32 --lr 3e-3 "
    "--num_steps 40 --eval_every 20 --eval_batch_size 500 --opt adamw"
).split()


def run(script: str, *words, status: int = 0) -> str:
    done = in_process(script, *words)
    assert done.returncode == status and not done.stderr, (done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(autouse=True)
def tables_as_before():
    with patch.dict(MODELS), patch.dict(DATASETS), patch.dict(AUGS):
        yield


@pytest.fixture
def row(tmp_path, monkeypatch) -> None:
    (tmp_path / "perceptron_of_mine.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(MODELS, "Perceptron-S", dict(cls="perceptron_of_mine:Perceptron", hidden=16))


def test_a_model_is_one_file_and_one_row(row, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    name = "own_Perceptron-S_norm_LN_fp_False_img_8_pretrain_F"
    assert "time unknown" in run("train.py", *FLAGS, *places(whole), "--dry_run") and not whole.exists()
    run("train.py", *FLAGS, *places(whole))
    start, *_, end = map(json.loads, (whole / "output" / f"{name}.jsonl").read_text().splitlines())
    assert start["parameters"] == (3 * 8 * 8 + 1) * 16 + (16 + 1) * 10 and end["best_accuracy"] > 0.15

    with monkeypatch.context() as context:  # a signal during the first step
        context.setattr(Interrupt, "__enter__", lambda self: self.__dict__.update(signum=15, before={}) or self)
        assert "Stopped by SIGTERM after step 1; saved" in run("train.py", *FLAGS, *places(cut), status=143)
    assert "Resuming" in run("train.py", *FLAGS, *places(cut))
    checkpoint = whole / "output" / f"{name}_checkpoint.bin"
    assert same(weights(checkpoint), weights(cut / "output" / checkpoint.name))

    shown = f"{100 * end['best_accuracy']:.2f}"
    assert f"Top-1 accuracy: {end['best_accuracy']:.5f}" in run("eval.py", checkpoint)
    assert f"Valid Accuracy: {end['best_accuracy']:.5f}" in run(
        "train.py", *FLAGS, *places(tmp_path), "-v", "true", "--load_model_dir", checkpoint
    )
    data = load_data("fashionmnist-mini", train=False)
    with pytest.raises(RuntimeError, match="^Expected one of cpu"):  # not the file's fault, nor is this
        load_run(checkpoint, "gpu")
    full = patch.object(torch.nn.Module, "to", side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    with full, pytest.raises(torch.OutOfMemoryError):
        load_run(checkpoint, "cpu")
    loaded, images = load_run(checkpoint, "cpu"), data.test.source.images[:1]
    ((best, probability),) = loaded.predict(images, top=1)[0]
    assert best in data.classes and 0.1 < probability <= 1
    assert loaded.predict(images / 255, top=1) == [[(best, probability)]]
    for wrong in (images.float(), images / 127.5 - 1):  # of another range
        with pytest.raises(UserError, match="pixels of floats are from 0 to 1"):
            loaded.predict(wrong)
    with pytest.raises(UserError, match="pixels are bytes or floats, not torch.int32"):
        loaded.predict(257 * images.int())  # as 16-bit gray is read
    with pytest.raises(UserError, match=r"Image.fromarray .* not ndarray"):
        loaded.predict(images[0].permute(1, 2, 0).numpy())
    for wrong in (images[0, 0], images.expand(-1, 4, -1, -1), images[None], images[:, :, :0]):
        with pytest.raises(UserError, match=r"an image is \(1 or 3, height, width\) pixels, not \("):
            loaded.predict(wrong)
    for top in (0, -1):
        with pytest.raises(UserError, match=f"top is the number of names for each image, at least 1, not {top}"):
            loaded.predict(images, top)
    assert "m.json" in run("eval.py", checkpoint, "--export", tmp_path / "m.safetensors")
    run("eval.py", checkpoint, "--plot", "errors")
    assert [path.name for path in checkpoint.parent.glob("*_errors.png")]
    done = in_process("eval.py", checkpoint, "--plot", "attention")
    assert done.returncode == 2 and "Perceptron has no token_layout(), so only errors can be drawn" in done.stderr
    (row,) = re.findall(r"\| Perceptron-S .*", run("plot.py", whole / "output"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "+" and {"8x8", "3,258"} <= {*cells} and shown in cells


def test_a_word_of_an_own_model_is_a_flag_and_a_name_in_sizes(row, tmp_path, monkeypatch):
    parser = options.train_parser()
    parser.add_argument("--hidden", type=int)
    monkeypatch.setattr(options, "train_parser", lambda: parser)
    monkeypatch.setattr(options, "SIZES", [*options.SIZES, "hidden"])
    words = [*FLAGS, *places(tmp_path), "--num_steps", 1]
    assert "hidden=4" in run("train.py", *words, "--hidden", 4)
    words += ["-v", "--load_model_dir", next((tmp_path / "output").glob("*_checkpoint.bin"))]
    assert "Valid Accuracy" in run("train.py", *words)  # it comes with the checkpoint
    assert "has hidden 4, not 5; leave --hidden out" in in_process("train.py", *words, "--hidden", 5).stderr


def test_own_model_edits_no_file_of_the_kit(tmp_path, monkeypatch):
    recipe = tmp_path / "mine.args"
    recipe.write_text("--width 8  # own flags may stand there, too\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--name", "mine", "@~/mine.args", *places(tmp_path)]
    (tmp_path / "quote.args").write_text("--name 'a\n")
    for name, reason in dict(quote="holds no flags as on the command line", nowhere="no such file; there are").items():
        error = in_process("examples/own_model.py", f"@~/{name}.args").stderr
        assert error.startswith(f"own_model.py: error: recipe {tmp_path}/{name}.args: {reason}")
    out = run("examples/own_model.py", *words)
    score = float(re.search(r"Best Accuracy: \t([\d.]+)", out)[1])
    assert score > 0.6  # of three classes, after 200 steps
    assert len(re.findall(r"^(across|down|aslant): (across|down|aslant) \d+ %, \w+ \d+ %$", out, re.M)) == 3
    settings = json.loads(next((tmp_path / "output").glob("*.jsonl")).read_text().splitlines()[0])["settings"]
    assert (settings["model_type"], settings["dataset"], settings["aug"]) == ("ConvNet", "stripes", "faded")
    assert "is finished: best accuracy" in run("examples/own_model.py", *words)
    with monkeypatch.context() as context:  # another of torchrun's processes
        context.setenv("RANK", "1")
        assert "aslant" not in run("examples/own_model.py", *words)
    other = in_process("examples/own_model.py", *words, "--width", 16)
    assert other.returncode == 2 and "exists with other settings: width 8 -> 16" in other.stderr
    # batch statistics of an own model, too, are of passes
    other = in_process("examples/own_model.py", *words, "--gradient_accumulation_steps", 2)
    assert other.returncode == 2 and "other settings: gradient_accumulation_steps 1 -> 2;" in other.stderr
    names = re.findall(r"own_model.py --name (\w+)", (ROOT / "examples" / "own_model.py").read_text())
    assert len({*names}) == len(names) == 2  # so its own lines are not refused, one after another
    assert "| ConvNet" in run("plot.py", tmp_path / "output")
    checkpoint = next((tmp_path / "output").glob("*_checkpoint.bin"))
    scored = run("examples/own_model.py", *words, "-v", "true", "--load_model_dir", checkpoint)
    assert f"Valid Accuracy: {score:.5f}" in scored


def test_the_words_of_a_row_are_in_force_and_classes_are_words(monkeypatch):
    monkeypatch.setitem(AUGS, "cutout", dict(flip=True, reprob=0.9))
    assert options.parse_train_args(["--aug", "cutout"]).reprob == 0.9
    assert options.parse_train_args(["--aug", "cutout", "--reprob", "0.5"]).reprob == 0.5
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), [0, 1, 0, 1]
    monkeypatch.setitem(DATASETS, "own", dict(read=lambda root: ({"train": images, "test": images}, range(2))))
    assert load_data("own").classes == ["0", "1"]


def test_minimal_in_short(tmp_path):
    """A few steps of the copy that a user would make of it."""
    text = (ROOT / "examples" / "minimal.py").read_text()
    assert "STEPS, BATCH" in text and len(text.splitlines()) < 60
    copy = tmp_path / "copy.py"
    text = text.replace("1000, 100, 28", "100, 10, 28").replace("__file__", repr(str(ROOT / "examples" / "copy.py")))
    copy.write_text(text)
    out = run(copy)
    assert "step 100 of 100, loss " in out and re.search(r"test accuracy \d\d\.\d\d % \(\d+ of 2000\)", out)


@pytest.mark.slow
def test_minimal_reaches_what_it_says():
    begin = time.monotonic()
    out = call("examples/minimal.py").stdout
    assert float(re.search(r"test accuracy ([\d.]+) %", out)[1]) > 84
    print(f"examples/minimal.py took {time.monotonic() - begin:.0f} s", file=sys.stderr)
