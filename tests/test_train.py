"""train.py and eval.py as a user calls them: runs and mistakes."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    ID,
    ROOT,
    SIZES,
    TINY,
    accept_any_cifar,
    call,
    fork_train,
    places,
    run,
    same,
    weights,
    write_cifar10,
    write_cifar100,
    write_folder,
    write_google_npz,
)

import train
from utils import options
from utils.results import read_run
from utils.run_files import RunFiles

SHORT = ["--name", "run", *TINY]


def records(folder: Path, run: str = ID) -> list[dict]:
    return [json.loads(line) for line in (folder / "output" / f"{run}.jsonl").read_text().splitlines()]


def losses(folder: Path, run: str = ID) -> list[float]:
    return [record["train_loss"] for record in records(folder, run) if record["event"] == "eval"]


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


RUN = [
    *(*SHORT, "--num_steps", 12, "--eval_every", 4, "--save_every", 2, "--opt", "adamw"),
    *("--gradient_accumulation_steps", 2, "--drop_path", 0.1, "--smoothing", 0.1),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A finished run of 12 steps."""
    folder = tmp_path_factory.mktemp("reference")
    run("train.py", *RUN, *places(folder))
    return folder


def test_files_of_a_run(reference):
    names = {path.name for path in (reference / "output").iterdir()}
    kinds = [".txt", ".jsonl", "_checkpoint.bin", "_last.bin", "_last.prev.bin"]
    assert names == {f".{ID}.lock", *(f"{ID}{kind}" for kind in kinds)}
    lines = records(reference)
    assert [line["event"] for line in lines] == ["start", "eval", "eval", "eval", "end"]
    assert lines[0]["selected_on"] == lines[-1]["selected_on"] == "test"
    assert lines[0]["settings"]["train_batch_size"] == 32
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(reference / "logs" / ID)).Reload()
    tags = {f"train/{name}" for name in ("loss", "lr", "gradient_norm", "images_per_second")}
    assert tags | {"test/accuracy", "test/loss"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("train/lr")] == list(range(1, 13))


def test_log_says_what_was_run_and_what_came_out(reference):
    text = (reference / "output" / f"{ID}.txt").read_text()
    lines = [line.split(" - INFO - train - ")[1] for line in text.splitlines()]
    assert lines[0] == f"Run {ID}"
    shown = [
        r"Model: model_type=ViT-Ti_16 norm_type=LN image_size=28 patch_size=7 dim=32 .*drop_path=0\.1 num_classes=10",
        r"Total Parameter: \t0\.0M \(22,[0-9]{3}\), 0\.001 GFLOPs per image",
        r"Weights: from scratch",
        r"Data: fashionmnist-mini, 10 classes, 10000 training and 2000 test images; .* on the test images, the same .*",
        r"Flags, data: .*mean 0\.5 0\.5 0\.5, std 0\.5 0\.5 0\.5",
        r"Flags, augmentation: aug crop, .*scale 0\.05 1.*",
        r"Flags, optimisation: opt adamw, .*num_steps 12, .*learning_rate 0\.001.*smoothing 0\.1",
        r"Batch: 32 = 16 per process and pass x 2 accumulation steps",
        r"Precision: fp32; cpu, torch .*, seed 42",
    ]
    for pattern in shown:
        assert any(re.fullmatch(pattern, line) for line in lines), (pattern, text)
    best = records(reference)[-1]["best_accuracy"]
    assert lines.count("Validation Results") == 3 and lines.count("Global Steps: 12") == 1
    assert f"Best Accuracy: \t{best:f}" in lines and "End Training!" in lines
    assert re.fullmatch(r"last \d+\.\d min", lines[-1])


def test_eval_prints_the_accuracy_of_training(reference, tmp_path):
    path = reference / "output" / f"{ID}_checkpoint.bin"
    best = records(reference)[-1]["best_accuracy"]
    result = json.loads(run("eval.py", path, "--json", "--output_dir", tmp_path).stdout)
    assert result["accuracy"] == best and result["correct"] == round(best * 2000) and result["seen"] == 2000
    assert result["top5"] >= result["accuracy"] and sum(map(sum, result["confusion"])) == 2000
    text = run("eval.py", path, "--output_dir", tmp_path / "pictures").stdout
    assert f"Top-1 accuracy: {best:.5f}" in text and "Ankle boot" in text
    assert (tmp_path / "pictures" / f"{ID}_confusion.png").read_bytes()[:4] == b"\x89PNG"


def test_eval_classifies_single_images(reference, tmp_path):
    write_folder(tmp_path, sizes=[(50, 40), (28, 28)], per_class=2, splits=["photos"], classes=["a b"])
    files = sorted((tmp_path / "photos" / "a b").iterdir())
    path = reference / "output" / f"{ID}_last.bin"
    answers = json.loads(run("eval.py", path, "--images", *files, "--json").stdout)
    assert list(answers) == [str(file) for file in files]
    for answer in answers.values():
        shares = list(answer.values())
        assert len(shares) == 5 and 0 < sum(shares) <= 1.0001 and shares == sorted(shares, reverse=True)
    lines = run("eval.py", path, "--images", *files).stdout.splitlines()
    for line, (file, answer) in zip(lines, answers.items(), strict=True):
        name, share = next(iter(answer.items()))
        assert line.startswith(f"{file}: {name} {100 * share:.1f} %, ")


def test_finished_run_is_left_alone_and_other_settings_are_refused(reference):
    before = content(reference)
    best, last = (records(reference)[-1][f"{name}_accuracy"] for name in ("best", "last"))
    out = run("train.py", *RUN, *places(reference)).stdout
    assert (
        out == f"{ID} is finished: best accuracy {best:f}, last {last:f}; --extend with more --epochs goes on with it\n"
    )
    error = run("train.py", *RUN, *places(reference), "--lr", 0.5, check=2).stderr
    assert error.count("\n") == 1 and "learning_rate 0.001 -> 0.5" in error and "--overwrite" in error
    assert content(reference) == before


@pytest.mark.parametrize("norm", ["LN", "BN"])
def test_accumulation_of_a_run_whose_log_tells_of_no_statistics(reference, tmp_path, norm):
    """As logs were; the norm says it."""
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    log = tmp_path / "output" / f"{ID.replace('_LN_', f'_{norm}_')}.jsonl"
    text = (tmp_path / "output" / f"{ID}.jsonl").read_text().replace('"norm_type": "LN"', f'"norm_type": "{norm}"')
    assert '"statistics": false, ' in text
    log.write_text(text.replace('"statistics": false, ', ""))
    words = [*RUN, *places(tmp_path), "--norm_type", norm, "--gradient_accumulation_steps", 1]
    done = run("train.py", *words, check=0 if norm == "LN" else 2)
    assert ("is finished" if norm == "LN" else "gradient_accumulation_steps 2 -> 1") in done.stdout + done.stderr


def test_a_flag_that_is_newer_than_the_run_is_another_setting(reference, tmp_path):
    """At its default it changes nothing; otherwise, it would not be seen that the run is without it."""
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    log = tmp_path / "output" / f"{ID}.jsonl"
    log.write_text(log.read_text().replace('"smoothing": 0.1, ', "").replace('"ra": 1, ', ""))
    assert '"smoothing"' not in log.read_text() and '"ra"' not in log.read_text()
    error = run("train.py", *RUN, *places(tmp_path), check=2).stderr
    assert "exists with other settings: smoothing 0.0 -> 0.1; another --name" in error
    assert "is finished" in run("train.py", *RUN, *places(tmp_path), "--smoothing", 0).stdout


@pytest.fixture
def unfinished(tmp_path, monkeypatch) -> Path:
    """The same run, ended after its evaluation of step 8 and the save that follows."""
    save_last = train.Trainer.save_last

    def once(trainer):
        save_last(trainer)
        if trainer.progress.step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "save_last", once)
        train.main(options.parse_train_args(list(map(str, [*RUN, *places(tmp_path)]))))
    return tmp_path


def test_dry_run_says_what_would_be_done(reference, unfinished):
    def plan(folder: Path, *more) -> str:
        before = content(folder)
        out = run("train.py", *RUN, *places(folder), "--dry_run", *more).stdout
        assert out.count("\n") == 1 and content(folder) == before
        return out.strip()

    new = unfinished.parent / "nowhere"
    assert plan(new) == f"12 steps; time unknown, as {new}/output holds no finished run of this cost"
    assert plan(new, "--epochs", 2).startswith("2 epochs; time unknown")
    assert not new.exists()
    assert plan(unfinished).startswith("12 steps; goes on after step 8 of 12; time unknown, ")
    assert plan(unfinished, "--lr", 1, "--seed", 42) == (
        f"12 steps; would be refused: run {ID} exists with other settings: learning_rate 0.001 -> 1.0; "
        "another --name, or --overwrite"
    )
    best, last = (records(reference)[-1][f"{name}_accuracy"] for name in ("best", "last"))
    assert plan(reference) == f"12 steps; finished: best accuracy {best:f}, last {last:f}"
    assert "exists with other settings: num_steps 12 -> 24" in plan(reference, "--num_steps", 24)
    assert plan(reference, "--overwrite", "--lr", 1).startswith("12 steps; about ")
    assert plan(reference, "-v").startswith("evaluates ") and str(reference) in plan(reference, "-v")
    # what is refused is told in the words of the run itself
    for folder, words in ((reference, ["--extend", "--num_steps", 6]), (new, ["--extend"]), (unfinished, ["--lr", 1])):
        told = plan(folder, *words).split(" steps; would be refused: ")[1]
        assert run("train.py", *RUN, *places(folder), *words, check=2).stderr == f"train.py: error: {told}\n"
    # a finished run of equal cost tells the time: 100 times as many steps
    minutes = records(reference)[-1]["seconds"] / 60
    out = plan(reference, "--name", "other", "--num_steps", 1200, "--lr", 0.1)
    assert out == f"1200 steps; about {100 * minutes:.1f} min, as {ID} took {minutes:.1f}"
    for flags in ("--dim 48 --heads 3", "--epochs 9 --dataset fashionmnist", "--epochs 9 --ra 2"):
        assert "time unknown" in plan(reference, "--name", "other", *flags.split())
    out = plan(reference, "--extend", "--num_steps", 120)  # ten times as many, of which one part is done
    assert f"goes on after step 12 of 12; about {9 * minutes:.1f} min" in out
    # 11.97 steps, which the run has rounded to 12
    assert plan(reference, "--extend", "--epochs", 0.0383).startswith("0.0383 epochs; finished: best")
    # and of a run that goes on, the time of the third that is left
    for path in (reference / "output").glob(f"{ID}.*"):
        shutil.copy(path, unfinished / "output" / path.name.replace("run_", "other_", 1))
    out = plan(unfinished)
    assert f"goes on after step 8 of 12; about {minutes / 3:.1f} min, as {ID.replace('run', 'other', 1)} took " in out
    assert "Resuming" in run("train.py", *RUN, *places(unfinished)).stdout


def test_dry_run_of_several_processes_is_said_once(reference, monkeypatch):
    for name, value in dict(WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR="localhost", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert run("train.py", *RUN, *places(reference), "--dry_run").stdout.count("\n") == lines


def test_dry_run_says_what_is_wrong(reference):
    before = content(reference)
    for flag, value, reason in (("--dim", 33, "not divisible by heads 2"), ("--lr", -1, "-1 is not above 0")):
        error = run("train.py", *RUN, *places(reference), "--dry_run", flag, value, check=2).stderr
        assert error.count("\n") == 1 and reason in error
    assert content(reference) == before


def assert_may_begin_anew(folder: Path) -> None:
    assert [record["event"] for record in records(folder)] == ["start"]
    run("train.py", *SHORT, "--num_steps", 4, "--eval_every", 2, *places(folder), "--lr", 0.01)
    assert [record["event"] for record in records(folder)] == ["start", "eval", "eval", "end"]
    assert records(folder)[0]["settings"]["learning_rate"] == 0.01


def test_run_that_came_to_nothing_may_begin_with_other_settings(tmp_path, monkeypatch):
    def full(*args, **words):
        raise MemoryError

    words = [*SHORT, "--num_steps", 4, "--eval_every", 2, *places(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", full)
        error = run("train.py", *words, check=2).stderr
    assert error == "train.py: error: out of memory (the host); fewer images per pass, or a smaller model\n"
    assert_may_begin_anew(tmp_path)


@pytest.mark.slow  # torch.compile loads much, and looks for a compiler
def test_no_compiler_is_said_in_one_line(tmp_path):
    words = [*SHORT, "--num_steps", 4, "--eval_every", 2, *places(tmp_path), "--compile"]
    env = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    error = call("train.py", *words, check=2, env=env).stderr
    assert error.count("\n") == 1 and "--compile: torch cannot compile the model here" in error
    assert_may_begin_anew(tmp_path)


def test_activation_checkpointing_computes_the_same(tmp_path):
    words = [*SHORT, "--num_steps", 4, "--eval_every", 2, "--ema_decay", 0.5, "--drop_path", 0.2]
    run("train.py", *words, *places(tmp_path / "whole"))
    run("train.py", *words, "--grad_checkpoint", *places(tmp_path / "parts"))
    assert len(losses(tmp_path / "whole")) == 2
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), rel=1e-6)


@pytest.mark.slow  # half a minute of C++ compiler
def test_compiled_run_computes_the_same(tmp_path):
    words = [*SHORT, "--num_steps", 10, "--eval_every", 5, "--opt", "adamw", "--dropout", 0]
    for name, flags in {"plain": [], "compiled": ["--compile", "--grad_checkpoint"]}.items():
        run("train.py", *words, *flags, *places(tmp_path / name))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    run("eval.py", tmp_path / "compiled" / "output" / f"{ID}_checkpoint.bin")


def test_batchnorm_statistics_agree_over_processes(tmp_path):
    words = [*SHORT, "--norm_type", "BN", "--num_steps", 3, "--dropout", 0, "--ema_decay", 0.5, *places(tmp_path)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        env = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
    places_of = [env | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]  # as torchrun has them
    errors = [tmp_path / f"stderr{rank}" for rank in "01"]
    both = [fork_train(*words, error=error, env=env) for error, env in zip(errors, places_of, strict=True)]
    for process in both:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0], [error.read_text() for error in errors]
    name = ID.replace("LN", "BN")
    assert "running statistics are averaged over processes" in (tmp_path / "output" / f"{name}.txt").read_text()
    start, *_, end = records(tmp_path, name)
    result = json.loads(run("eval.py", tmp_path / "output" / f"{name}_checkpoint.bin", "--json").stdout)
    assert start["processes"] == 2
    assert result["accuracy"] == end["last_accuracy"]  # one process's buffers gave what two have counted together


def test_averaged_weights_are_what_is_scored_and_kept(tmp_path):
    words = [*SHORT, "--num_steps", 6, "--ema_decay", 0.9, "--eval_every", 3, "--lr", 0.5, "--warmup_steps", 0]
    out = run("train.py", *words, *places(tmp_path)).stdout
    score = re.findall(r"Valid Accuracy: ([\d.]+)", out)[-1]
    (kept,) = set(re.findall(r"(raw|average) weights \(these count\): " + score, out))
    evals = [line for line in records(tmp_path) if line["event"] == "eval"]
    assert all(line["accuracy"] == max(line["raw_accuracy"], line["average_accuracy"]) for line in evals)
    assert all(line[f"{line['kept']}_accuracy"] == line["accuracy"] for line in evals)
    assert any(line["raw_accuracy"] != line["average_accuracy"] for line in evals)
    path = tmp_path / "output" / f"{ID}_last.bin"
    last = torch.load(path, weights_only=True)
    average = {name.removeprefix("module."): value for name, value in last["average"].items() if name != "n_averaged"}
    assert not same(average, last["model"])
    assert f"Top-1 accuracy: {score}" in run("eval.py", path).stdout
    out = run("train.py", *words, "-v", "--load_model_dir", path, *places(tmp_path)).stdout
    assert f"Valid Accuracy: {score} (" in out
    best = tmp_path / "output" / f"{ID}_checkpoint.bin"
    highest = max(evals, key=lambda line: line["accuracy"])
    assert json.loads(run("eval.py", best, "--json").stdout)["accuracy"] == highest["accuracy"]
    if highest["step"] == 6:
        assert same(weights(best), average if kept == "average" else last["model"])


def test_fine_tuning_takes_classes_and_normalisation_along(tmp_path):
    write_folder(tmp_path / "pets", per_class=8)
    write_folder(tmp_path / "birds", per_class=8, classes=["owl", "tit"])
    words = [*TINY, "--dataset", "imagefolder", "--num_steps", 2, "--train_batch_size", 4, *places(tmp_path)]
    first = ["--name", "run", "--data_dir", tmp_path / "pets", "--normalize", "cifar", "--lr", 0.1]
    out = run("train.py", *words, *first, "--warmup_steps", 0).stdout
    assert "mean 0.4914 0.4822 0.4465, std 0.247 0.2435 0.2616" in out
    path = tmp_path / "output" / f"{ID}_checkpoint.bin"
    more = [*words, "--pretrained_dir", path, "--data_dir"]
    out = run("train.py", "--name", "same", *more, tmp_path / "pets").stdout
    assert "re-initialised" not in out and "mean 0.4914 0.4822 0.4465, std 0.247 0.2435 0.2616" in out
    out = run("train.py", "--name", "other", *more, tmp_path / "birds", "--normalize", "imagenet").stdout
    assert "re-initialised: head.weight, head.bias" in out and "mean 0.485 0.456 0.406" in out
    flags = [*words, "--name", "x", "--load_model_dir", path, "--data_dir", tmp_path / "birds"]
    assert "has other classes than imagefolder" in run("train.py", *flags, check=2).stderr


def test_val_fraction_reports_the_test_set_apart(tmp_path):
    words = [*SHORT, "--num_steps", 4, "--eval_every", 2, "--val_fraction", 0.1, *places(tmp_path)]
    out = run("train.py", *words, "--crop_pct", 0.8).stdout
    start, *evals, end = records(tmp_path)
    assert start["images"] == [9000, 1000, 2000] and "chosen on 1000 held-out images (val)" in out
    assert [(line["split"], line["seen"]) for line in evals] == 2 * [("val", 1000)] and end["selected_on"] == "val"
    for file, name in (("checkpoint", "test_accuracy"), ("last", "test_accuracy_last")):
        result = json.loads(run("eval.py", tmp_path / "output" / f"{ID}_{file}.bin", "--json").stdout)
        assert result["accuracy"] == end[name] and result["seen"] == 2000
    assert f"Test Accuracy: \t{end['test_accuracy']:f} (last step {end['test_accuracy_last']:f})" in out
    score = [*SHORT, "-v", "--load_model_dir", tmp_path / "output" / f"{ID}_checkpoint.bin"]
    assert f"Valid Accuracy: {end['test_accuracy']:.5f}" in run("train.py", *score).stdout  # cut as in the run
    assert f"Valid Accuracy: {end['test_accuracy']:.5f}" not in run("train.py", *score, "--crop_pct", 1).stdout
    from_text, from_json = (read_run(tmp_path / "output" / f"{ID}{suffix}") for suffix in (".txt", ".jsonl"))
    for fact in ("dataset", "chosen_on", "best", "last"):
        assert getattr(from_text, fact) == pytest.approx(getattr(from_json, fact))


def test_large_images_are_kept_for_scoring_as_in_the_run(tmp_path):
    write_folder(tmp_path / "pets", sizes=[(90, 120)])
    words = ["--dataset", "imagefolder", "--data_dir", tmp_path / "pets", *places(tmp_path)]
    run("train.py", "--name", "run", *TINY, *words, "--num_steps", 1, "--train_batch_size", 4, "--aug", "flip")
    cache = (tmp_path / "pets" / "test.cache.npz").read_bytes()
    out = run("train.py", *words, "-v", "--load_model_dir", tmp_path / "output" / f"{ID}_checkpoint.bin").stdout
    assert f"Valid Loss: {records(tmp_path)[-2]['loss']:.5f}" in out
    assert (tmp_path / "pets" / "test.cache.npz").read_bytes() == cache


def test_images_held_out_in_the_run_are_scored(tmp_path):
    write_folder(tmp_path / "pets", splits=["."], per_class=10)
    words = ["--dataset", "imagefolder", "--data_dir", tmp_path / "pets", *places(tmp_path)]
    own = ["--num_steps", 1, "--train_batch_size", 4, "--seed", 1, "--test_fraction", 0.3]
    run("train.py", "--name", "run", *TINY, *words, *own)
    files = RunFiles(tmp_path / "output", tmp_path / "logs", f"{ID}_seed_1")
    out = run("train.py", *words, "-v", "--load_model_dir", files.best).stdout
    assert f"Valid Loss: {files.record('eval')['loss']:.5f}" in out and "/6)" in out
    fine = ["train.py", "--name", "fine", *TINY, *words, "--num_steps", 1, "--train_batch_size", 4]
    fine += ["--pretrained_dir", files.best]
    for more in ((), ("--seed", 1), ("--seed", 2, "--test_fraction", 0.3)):  # other test images than the run's
        error = run(*fine, *more, check=2).stderr
        assert "drawn for testing now; keep to its --seed 1 --test_fraction 0.3" in error and error.count("\n") == 1
    run(*fine, "--seed", 1, "--test_fraction", 0.3)


def test_image_folder_from_training_to_evaluation(tmp_path):
    write_folder(tmp_path / "photos", sizes=[(20, 30), (40, 28)])
    words = [*TINY, "--dataset", "imagefolder", "--train_batch_size", 4, "--num_steps", 3, *places(tmp_path)]
    words += ["--data_dir", tmp_path / "photos"]
    run("train.py", "--name", "run", *words)
    run("train.py", "--name", "streamed", *words, "--memory_limit", 0, "--num_workers", 1)
    assert losses(tmp_path) == pytest.approx(losses(tmp_path, ID.replace("run", "streamed", 1)), rel=0.05)
    path = tmp_path / "output" / f"{ID}_checkpoint.bin"
    assert json.loads(run("eval.py", path, "--json").stdout)["accuracy"] == records(tmp_path)[-1]["best_accuracy"]
    write_folder(tmp_path / "others", classes=["cat", "owl"])
    error = run("eval.py", path, "--data_dir", tmp_path / "others", check=2).stderr
    assert error.count("\n") == 1 and "'owl' is not among the 2 known: cat, dog" in error


@pytest.mark.parametrize("flag", ["--fp16", "--bf16"])
def test_half_precision_on_cpu_says_what_it_does(tmp_path, flag):
    out = run("train.py", *SHORT, "--num_steps", 2, flag, *places(tmp_path), "--device", "cpu").stdout
    line = next(line for line in out.splitlines() if line.startswith("Precision"))
    assert "bf16" in line or "no bfloat16" in line
    assert ("float16 needs CUDA" in line) == (flag == "--fp16")


@pytest.mark.parametrize("word", ["cls", "norm_cls"])
@pytest.mark.parametrize("norm", ["LN", "BN"])
def test_checkpoint_cannot_name_a_class(reference, tmp_path, word, norm):
    """Models are found by their names in the table alone; else a file could have any module imported and called."""
    path = tmp_path / "evil.bin"
    state = torch.load(reference / "output" / f"{ID}_checkpoint.bin", weights_only=True)
    torch.save(state | {"config": state["config"] | {word: "this:s", "norm_type": norm}}, path)
    for words in (["--json"], ["--plot", "position"]):
        error = run("eval.py", path, *words, check=2).stderr
        assert error.count("\n") == 1 and "this" not in sys.modules
        assert (
            error.startswith(f"eval.py: error: {path}: not a checkpoint of this train.py (") and f"no {word})" in error
        )
    assert [file.name for file in tmp_path.iterdir()] == ["evil.bin"]


# ---------------------------------------------------------------- the command lines of the reference projects

FEW = "--num_steps 3 --train_batch_size 4 --eval_batch_size 30".split()
THIN = "--dim 48 --depth 2 --heads 3 --mlp_dim 96".split()


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar10(folder, per_file=12)
    write_cifar100(folder, n=100)
    with pytest.MonkeyPatch.context() as patch:
        accept_any_cifar(patch)
        yield folder


@pytest.mark.parametrize(
    "sizes, shown",
    [(SIZES, r"0\.1M \(11\d,\d{3}\)"), pytest.param({}, r"87\.5M \(87,462,922\)", marks=pytest.mark.slow)],
)
def test_fine_tuning_from_google_weights(cifar, tmp_path, sizes, shown):
    npz = tmp_path / "imagenet21k_ViT-B_32.npz"
    full = dict(dim=768, depth=12, heads=12, mlp_dim=3072)
    write_google_npz(npz, **(full | sizes), patch=32, grid=7, classes=21)
    line = f"--name cifar10 --dataset cifar10 --model_type ViT-B_32 --pretrained_dir {npz}".split()
    line += [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
    out = run("train.py", *line, *FEW, "--data_dir", cifar, *places(tmp_path)).stdout
    assert re.search(rf"Total Parameter: \t{shown}", out)
    assert "re-initialised: head.weight, head.bias; ignored: pre_logits" in out and "Best Accuracy" in out
    assert (tmp_path / "output" / "cifar10_ViT-B_32_norm_LN_fp_False_img_224_pretrain_T_checkpoint.bin").exists()


def test_lines_of_the_references(cifar, tmp_path):
    line = "--name cifar10-100_500 --dataset cifar10 --norm_type LN --model_type ViT-B_16 --fp16 --fp16_opt_level O2"
    run("train.py", *line.split(), *FEW, *THIN, "--data_dir", cifar, *places(tmp_path))
    line = "--name c --dataset cifar100 --model ViT-L_32 --batch_size 4 --epochs 0.1 --blr 1e-3 --opt adamw"
    more = ["--min_lr", 1e-5, "--warmup_epochs", 0, *THIN, "--data_location", cifar, *places(tmp_path)]
    run("train.py", *line.split(), *more)
    path = tmp_path / "output" / "c_ViT-L_32_norm_LN_fp_False_img_224_pretrain_F_checkpoint.bin"
    end = records(tmp_path, path.name.removesuffix("_checkpoint.bin"))[-1]
    line = f"--dataset cifar100 --model_type ViT-L_32 --load_model_dir {path} --data_dir {cifar}".split()
    before = content(tmp_path)
    out = run("train.py", "--name", "cifar100", "-v", "true", *line, *THIN).stdout
    assert f"Valid Accuracy: {end['best_accuracy']:.5f} (" in out and content(tmp_path) == before
    out = run("train.py", "--name", "more", *line, *FEW, *THIN, *places(tmp_path)).stdout
    assert "re-initialised" not in out and "Best Accuracy" in out


# ---------------------------------------------------------------- the command line


def test_default_folders_are_ignored_by_git():
    words = ["git", "check-ignore", "output/x.bin", "logs/x", "data/cifar", "checkpoint/x.npz"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 128) and (done.returncode == 128 or len(done.stdout.split()) == 4)


assert os.environ.get("WORLD_SIZE", "1") == "1"  # not under torchrun
