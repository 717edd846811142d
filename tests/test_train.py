"""train.py and eval.py as a user calls them: runs and mistakes."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from helpers import (
    ROOT,
    TINY,
    call,
    places,
    same,
    torchrun,
    write_cifar10,
    write_cifar100,
    write_folder,
    write_google_npz,
)

ID = "run_ViT-Ti_16_norm_LN_fp_False_img_28_pretrain_F"


def records(folder, run=ID) -> list[dict]:
    return [json.loads(line) for line in (folder / "output" / f"{run}.jsonl").read_text().splitlines()]


def losses(folder, run=ID) -> list[float]:
    return [record["train_loss"] for record in records(folder, run) if record["event"] == "eval"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run of 24 steps, with everything random switched on."""
    folder = tmp_path_factory.mktemp("reference")
    call("train.py", *RUN, *places(folder))
    return folder


RUN = [
    *("--name", "run", *TINY, "--num_steps", 24, "--eval_every", 8, "--save_every", 2, "--opt", "adamw"),
    *("--gradient_accumulation_steps", 2, "--drop_path", 0.1, "--smoothing", 0.1),
]


def test_files_of_a_run(reference):
    names = {path.name for path in (reference / "output").iterdir()}
    assert names == {f"{ID}.txt", f"{ID}.jsonl", f"{ID}_checkpoint.bin", f"{ID}_last.bin", f"{ID}_last.prev.bin"}
    text = (reference / "output" / f"{ID}.txt").read_text()
    for line in (
        "Global Steps: 24\n",
        "Valid Loss: ",
        "Valid Accuracy: 0.",
        "Best Accuracy: \t0.",
        "End Training!\n",
        " min\n",
    ):
        assert line in text
    lines = records(reference)
    assert [line["event"] for line in lines] == ["start", "eval", "eval", "eval", "end"]
    assert lines[0]["selected_on"] == lines[-1]["selected_on"] == "test"
    assert lines[0]["settings"]["train_batch_size"] == 32
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(reference / "logs" / ID)).Reload()
    assert {
        "train/loss",
        "train/lr",
        "train/gradient_norm",
        "train/images_per_second",
        "test/accuracy",
        "test/loss",
    } <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("train/lr")] == list(range(1, 25))


def test_eval_prints_the_accuracy_of_training(reference):
    path = reference / "output" / f"{ID}_checkpoint.bin"
    best = records(reference)[-1]["best_accuracy"]
    result = json.loads(call("eval.py", path, "--json").stdout)
    assert result["accuracy"] == best and result["correct"] == round(best * 2000) and result["seen"] == 2000
    assert result["top5"] >= result["accuracy"] and sum(map(sum, result["confusion"])) == 2000
    text = call("eval.py", path, "--output_dir", reference / "pictures").stdout
    assert f"Top-1 accuracy: {best:.5f}" in text and "Ankle boot" in text
    assert (reference / "pictures" / f"{ID}_confusion.png").read_bytes()[:4] == b"\x89PNG"


def test_eval_classifies_single_images(reference, tmp_path):
    write_folder(tmp_path, sizes=[(50, 40), (28, 28)], per_class=2, splits=["photos"], classes=["a b"])
    files = sorted((tmp_path / "photos" / "a b").iterdir())
    path = reference / "output" / f"{ID}_last.bin"
    answers = json.loads(call("eval.py", path, "--images", *files, "--json").stdout)
    assert list(answers) == [str(file) for file in files]
    for answer in answers.values():
        assert (
            len(answer) == 5
            and sum(answer.values()) <= 1.0001
            and list(answer.values()) == sorted(answer.values(), reverse=True)
        )
    assert "%" in call("eval.py", path, "--images", *files).stdout


def test_finished_run_is_left_alone_and_other_settings_are_refused(reference):
    before = (reference / "output" / f"{ID}.txt").read_bytes()
    assert "is finished: best accuracy 0." in call("train.py", *RUN, *places(reference)).stdout
    error = call("train.py", *RUN, *places(reference), "--lr", 0.5, check=2).stderr
    assert error.count("\n") == 1 and "learning_rate 0.001 -> 0.5" in error and "--overwrite" in error
    assert (reference / "output" / f"{ID}.txt").read_bytes() == before


def test_run_that_came_to_nothing_may_begin_with_other_settings(tmp_path):
    words = [*TINY, "--name", "run", "--num_steps", 4, "--eval_every", 2, *places(tmp_path)]
    # as where there is no compiler, or too little memory
    error = call("train.py", *words, "--compile", check=2, env={"CXX": "/nowhere/g++"}).stderr
    assert error.count("\n") == 1 and "--compile: torch cannot compile the model here" in error
    call("train.py", *words, "--lr", 0.01)
    assert [record["event"] for record in records(tmp_path)] == ["start", "eval", "eval", "end"]
    assert records(tmp_path)[0]["settings"]["learning_rate"] == 0.01


def start(*words) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition, process) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)


def test_activation_checkpointing_computes_the_same(tmp_path):
    words = ["--name", "run", *TINY, "--num_steps", 4, "--eval_every", 2, "--ema_decay", 0.5, "--drop_path", 0.2]
    call("train.py", *words, *places(tmp_path / "whole"))
    call("train.py", *words, "--grad_checkpoint", *places(tmp_path / "parts"))
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), rel=1e-6)


@pytest.mark.slow  # half a minute of C++ compiler
def test_compiled_run_computes_the_same(tmp_path):
    words = [*TINY, "--name", "run", "--num_steps", 10, "--eval_every", 5, "--opt", "adamw", "--dropout", 0]
    for name, flags in {"plain": [], "compiled": ["--compile", "--grad_checkpoint"]}.items():
        call("train.py", *words, *flags, *places(tmp_path / name))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    call("eval.py", tmp_path / "compiled" / "output" / f"{ID}_checkpoint.bin")


def test_batchnorm_statistics_agree_over_processes(tmp_path):
    words = ["--name", "run", *TINY, "--norm_type", "BN", "--num_steps", 3, "--dropout", 0, "--ema_decay", 0.5]
    out = torchrun(2, *words, *places(tmp_path)).stdout
    assert "running statistics are averaged over processes" in out
    run = ID.replace("LN", "BN")
    end = records(tmp_path, run)[-1]
    result = json.loads(call("eval.py", tmp_path / "output" / f"{run}_checkpoint.bin", "--json").stdout)
    assert result["accuracy"] == end["last_accuracy"]  # one process's buffers gave what two have counted together


def test_averaged_weights_resume_and_are_what_is_kept(tmp_path):
    words = ["--name", "run", *TINY, "--num_steps", 8, "--eval_every", 4, "--ema_decay", 0.8]
    call("train.py", *words, *places(tmp_path / "a"))
    lines = [line for line in records(tmp_path / "a") if line["event"] == "eval"]
    assert all("raw_accuracy" in line for line in lines)
    last = torch.load(tmp_path / "a" / "output" / f"{ID}_last.bin", weights_only=True)
    average = {name.removeprefix("module."): value for name, value in last["average"].items() if name != "n_averaged"}
    assert not same(average, last["model"])
    process = start(*words, "--save_every", 1, *places(tmp_path / "b"))
    wait_for((tmp_path / "b" / "output" / f"{ID}_last.bin").exists, process)
    process.kill()
    process.wait()
    call("train.py", *words, *places(tmp_path / "b"))
    again = torch.load(tmp_path / "b" / "output" / f"{ID}_last.bin", weights_only=True)
    assert same(again["average"], last["average"]) and losses(tmp_path / "a") == losses(tmp_path / "b")


def test_last_save_of_a_run_with_an_average_is_scored_by_that(tmp_path):
    words = [*TINY, "--name", "run", "--num_steps", 6, "--ema_decay", 0.9, "--eval_every", 3, "--lr", 0.5]
    out = call("train.py", *words, "--warmup_steps", 0, *places(tmp_path)).stdout
    score = re.findall(r"Valid Accuracy: ([\d.]+)", out)[-1]
    assert re.findall(r"raw weights: ([\d.]+)", out)[-1] != score
    last = tmp_path / "output" / f"{ID}_last.bin"
    assert f"Top-1 accuracy: {score}" in call("eval.py", last).stdout
    out = call("train.py", *words, "-v", "--load_model_dir", last, *places(tmp_path)).stdout
    assert f"Valid Accuracy: {score}" in out


def test_fine_tuning_takes_classes_and_normalisation_along(tmp_path):
    write_folder(tmp_path / "pets", per_class=8)
    write_folder(tmp_path / "birds", per_class=8, classes=["owl", "tit"])
    words = [*TINY, "--dataset", "imagefolder", "--num_steps", 2, "--train_batch_size", 4, *places(tmp_path)]
    first = [*words, "--name", "run", "--data_dir", tmp_path / "pets", "--normalize", "cifar", "--lr", 0.1]
    call("train.py", *first, "--warmup_steps", 0)
    path = tmp_path / "output" / f"{ID}_checkpoint.bin"
    more = [*words, "--pretrained_dir", path, "--data_dir"]
    assert "re-initialised" not in (out := call("train.py", "--name", "same", *more, tmp_path / "pets").stdout)
    assert "mean [0.4914, 0.4822, 0.4465]" in out
    out = call("train.py", "--name", "other", *more, tmp_path / "birds", "--normalize", "imagenet").stdout
    assert "re-initialised: head.weight, head.bias" in out and "mean [0.485, 0.456, 0.406]" in out
    flags = [*words, "--name", "x", "--load_model_dir", path, "--data_dir", tmp_path / "birds"]
    assert "has other classes than imagefolder" in call("train.py", *flags, check=2).stderr


def test_val_fraction_reports_the_test_set_apart(tmp_path):
    call(
        "train.py",
        "--name",
        "run",
        *TINY,
        "--num_steps",
        4,
        "--eval_every",
        2,
        "--val_fraction",
        0.1,
        *places(tmp_path),
    )
    lines = records(tmp_path)
    assert lines[1]["split"] == lines[-1]["selected_on"] == "val" and lines[1]["seen"] == 1000
    result = json.loads(call("eval.py", tmp_path / "output" / f"{ID}_checkpoint.bin", "--json").stdout)
    assert result["accuracy"] == lines[-1]["test_accuracy"] and result["seen"] == 2000


def test_image_folder_from_training_to_evaluation(tmp_path):
    write_folder(tmp_path / "photos", sizes=[(20, 30), (40, 28)])
    words = [
        *TINY,
        "--dataset",
        "imagefolder",
        "--data_dir",
        tmp_path / "photos",
        "--train_batch_size",
        4,
        "--num_steps",
        3,
    ]
    call("train.py", "--name", "run", *words, *places(tmp_path))
    call("train.py", "--name", "streamed", *words, "--memory_limit", 0, "--num_workers", 1, *places(tmp_path))
    assert losses(tmp_path) == pytest.approx(losses(tmp_path, ID.replace("run", "streamed", 1)), rel=0.05)
    path = tmp_path / "output" / f"{ID}_checkpoint.bin"
    assert json.loads(call("eval.py", path, "--json").stdout)["accuracy"] == records(tmp_path)[-1]["best_accuracy"]
    write_folder(tmp_path / "others", classes=["cat", "owl"])
    error = call("eval.py", path, "--data_dir", tmp_path / "others", check=2).stderr
    assert error.count("\n") == 1 and "'owl' is not among the 2 known: cat, dog" in error


@pytest.mark.parametrize("flag", ["--fp16", "--bf16"])
def test_half_precision_on_cpu_says_what_it_does(tmp_path, flag):
    out = call("train.py", "--name", "run", *TINY, "--num_steps", 2, flag, *places(tmp_path), "--device", "cpu").stdout
    line = next(line for line in out.splitlines() if line.startswith("Precision"))
    assert "bf16" in line or "no bfloat16" in line
    assert ("float16 needs CUDA" in line) == (flag == "--fp16")


# ---------------------------------------------------------------- the command lines of the reference projects

SMALL = "--num_steps 3 --train_batch_size 4 --eval_batch_size 30".split()


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar10(folder, per_file=12)
    write_cifar100(folder, n=100)
    return folder


def test_fine_tuning_from_google_weights(cifar, tmp_path):
    npz = tmp_path / "imagenet21k_ViT-B_32.npz"
    write_google_npz(npz, dim=768, depth=12, heads=12, mlp_dim=3072, patch=32, grid=7, classes=21)
    line = f"--name cifar10 --dataset cifar10 --model_type ViT-B_32 --pretrained_dir {npz}".split()
    out = call("train.py", *line, *SMALL, "--data_dir", cifar, *places(tmp_path)).stdout
    assert "87.5M (87,462,922)" in out and "re-initialised: head.weight, head.bias" in out and "Best Accuracy" in out
    assert (tmp_path / "output" / "cifar10_ViT-B_32_norm_LN_fp_False_img_224_pretrain_T_checkpoint.bin").exists()


def test_lines_of_the_references(cifar, tmp_path):
    sizes = "--dim 48 --depth 2 --heads 3 --mlp_dim 96".split()
    line = "--name cifar10-100_500 --dataset cifar10 --norm_type LN --model_type ViT-B_16 --fp16 --fp16_opt_level O2"
    line = line.split()
    call("train.py", *line, *SMALL, *sizes, "--data_dir", cifar, *places(tmp_path))
    line = (
        "--name c --dataset cifar100 --model ViT-L_32 --batch_size 4 --epochs 0.1 --blr 1e-3 --opt adamw --min_lr 1e-5"
    )
    call("train.py", *line.split(), "--warmup_epochs", 0, *sizes, "--data_location", cifar, *places(tmp_path))
    path = tmp_path / "output" / "c_ViT-L_32_norm_LN_fp_False_img_224_pretrain_F_checkpoint.bin"
    end = records(tmp_path, path.name.removesuffix("_checkpoint.bin"))[-1]
    line = f"--name cifar100 --dataset cifar100 -v true --model_type ViT-L_32 --load_model_dir {path}".split()
    out = call("train.py", *line, *sizes, "--data_dir", cifar).stdout
    assert f"Valid Accuracy: {end['best_accuracy']:.5f} (" in out
    out = call(
        "train.py", "--name", "more", *line[2:4], *line[6:], *SMALL, *sizes, "--data_dir", cifar, *places(tmp_path)
    ).stdout
    assert "re-initialised" not in out and "Best Accuracy" in out


# ---------------------------------------------------------------- the command line


def test_help_needs_no_torch():
    code = """
import runpy, sys
sys.argv = ["train.py", "--help"]
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--train_batch_size" in done.stdout, done.stderr


def test_recipes_are_valid():
    recipes = sorted((ROOT / "recipes").glob("*.args"))
    assert recipes
    for recipe in recipes:
        done = call("train.py", f"@{recipe}", "--name", "x", "--num_steps", 0, check=2)
        assert "--num_steps" in done.stderr, done.stderr


def test_default_folders_are_ignored_by_git():
    done = subprocess.run(
        ["git", "check-ignore", "output/x.bin", "logs/x", "data/cifar", "checkpoint/x.npz"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 128) and (done.returncode == 128 or len(done.stdout.split()) == 4)


assert os.environ.get("WORLD_SIZE", "1") == "1"
