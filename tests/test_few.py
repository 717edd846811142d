"""Fine-tuning on few images, going on with a run, and what eval.py says of it."""

import csv
import json
import re
import shutil
from functools import partial

import helpers
import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from helpers import TINY, in_process, places, same, weights, write_folder
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train
from utils import checkpoint, frozen, metrics, options
from utils.cli import UserError
from utils.loss import balanced_weights, loss_of

ID = "{}_ViT-Ti_16_norm_LN_fp_False_img_28_pretrain_{}"


run = partial(helpers.run, "train.py")


def file_of(folder, name: str, kind: str, pretrained: str = "F"):
    return folder / "output" / f"{ID.format(name, pretrained)}{kind}"


def records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    words = ["--name", "first", *TINY, "--num_steps", 20, "--opt", "adamw", "--lr", 3e-3, *places(folder)]
    run(*words)
    return file_of(folder, "first", "_checkpoint.bin")


# ---------------------------------------------------------------- --freeze, weights of classes, averages


@pytest.mark.parametrize("aug", ["none", "flip"])
def test_frozen_only_the_head_changes(tmp_path, pretrained, aug):
    """On features that are computed once, or in every step."""
    words = ["--name", "run", *TINY, "--pretrained_dir", pretrained, "--freeze", "--aug", aug, "--num_steps", 6]
    words += ["--eval_every", 3, "--lr", 0.5, "--warmup_steps", 0, "--dropout", 0.5, *places(tmp_path)]
    out = run(*words).stdout
    assert ("features are computed once" in out) == (aug == "none")
    best = file_of(tmp_path, "run", "_checkpoint.bin", "T")
    before, after = weights(pretrained), weights(best)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"head.weight", "head.bias"}
    scored = json.loads(in_process("eval.py", best, "--json").stdout)
    evals = [line for line in records(file_of(tmp_path, "run", ".jsonl", "T")) if line["event"] == "eval"]
    assert abs(scored["accuracy"] - max(line["accuracy"] for line in evals)) <= 0.001


def test_frozen_features_train_as_images_do(tmp_path, pretrained, monkeypatch):
    words = ["--name", "run", *TINY, "--pretrained_dir", pretrained, "--freeze", "--aug", "none", "--num_steps", 5]
    words += ["--ema_decay", 0.5, "--val_fraction", 0.1, "--warmup_steps", 0]
    run(*words, *places(tmp_path / "features"))
    monkeypatch.setattr(frozen, "is_random", lambda augment: True)
    run(*words, *places(tmp_path / "images"))
    a, b = (weights(file_of(tmp_path / part, "run", "_last.bin", "T")) for part in ("features", "images"))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=1e-5)
    losses = [
        records(file_of(tmp_path / part, "run", ".jsonl", "T"))[1]["train_loss"] for part in ("features", "images")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_frozen_features_are_those_of_the_weights_that_a_run_goes_on_with(tmp_path, pretrained):
    """Whatever has become of the file that it started from."""
    source = tmp_path / "pretrained.bin"
    shutil.copy(pretrained, source)
    words = ["--name", "run", *TINY, "--pretrained_dir", source, "--freeze", "--aug", "none", *places(tmp_path)]
    run(*words, "--num_steps", 2)
    state = checkpoint.read_file(source)
    state["model"] = {name: torch.randn_like(value) for name, value in state["model"].items()}
    torch.save(state, source)
    run(*words, "--num_steps", 4, "--extend")
    end = records(file_of(tmp_path, "run", ".jsonl", "T"))[-1]
    scored = json.loads(in_process("eval.py", file_of(tmp_path, "run", "_last.bin", "T"), "--json").stdout)
    assert scored["accuracy"] == pytest.approx(end["last_accuracy"], abs=0.001)


def test_frozen_features_are_not_compiled(tmp_path, pretrained, monkeypatch):
    """Each batch would take a compilation of its own, for one pass."""
    monkeypatch.setattr(torch, "compile", lambda function: lambda *args: pytest.fail("is compiled"))
    words = ["--name", "run", *TINY, "--pretrained_dir", pretrained, "--freeze", "--aug", "none", "--compile"]
    run(*words, "--num_steps", 1, *places(tmp_path))


def test_a_frozen_step_computes_the_head_alone(tmp_path):
    """Counted, as a time depends on what else runs; on two cores such a step took a 20th of the full one's time."""
    run("--name", "full", *TINY, "--num_steps", 1, *places(tmp_path))
    words = ["--name", "frozen", *TINY, "--freeze", "--pretrained_dir", file_of(tmp_path, "full", "_checkpoint.bin")]
    args = options.parse_train_args([*map(str, words), "--aug", "none", *map(str, places(tmp_path))])
    trainer = train.Trainer(args, *train.prepare(args))
    assert trainer.on_features
    trainer.use_features()
    trainer.model.train()
    batches = trainer.batches()
    with FlopCounterMode(display=False) as counter:
        trainer.update(batches)
    forward = 2 * args.train_batch_size * trainer.model.head.in_features * trainer.model.head.out_features
    assert counter.get_total_flops() == 2 * forward  # and the weight's gradient; none of the features


def test_freeze_needs_weights_and_a_head(tmp_path):
    done = run("--name", "run", *TINY, "--freeze", *places(tmp_path), check=2)
    assert "--freeze trains the head alone, of weights that --pretrained_dir FILE gives" in done.stderr
    with pytest.raises(UserError, match="Net has none"):
        frozen.freeze(nn.Sequential(nn.Linear(2, 2)), "Net")


def test_class_weights_count_classes_alike():
    labels = torch.tensor([0] * 6 + [1] * 2 + [2])
    weight = balanced_weights(labels, 3)
    assert weight.tolist() == pytest.approx([0.5, 1.5, 3.0]) and weight[labels].mean() == 1
    assert balanced_weights(labels, 5)[:3].tolist() == weight.tolist()  # as a table may name a class for testing alone
    logits = torch.randn(9, 3)
    loss = loss_of(logits, labels, 0.1, weight)
    pairs = zip(logits[:, None], labels[:, None], weight[labels], strict=True)
    by_hand = [F.cross_entropy(x, y, label_smoothing=0.1) * share for x, y, share in pairs]
    assert loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)
    parts = [loss_of(logits[i : i + 3], labels[i : i + 3], 0.1, weight) for i in (0, 3, 6)]
    assert torch.stack(parts).mean().item() == pytest.approx(loss.item(), rel=1e-5)  # accumulation changes nothing
    assert loss_of(logits, F.one_hot(labels, 3).float(), 0.1, weight).item() == pytest.approx(loss.item(), rel=1e-5)


def test_class_weights_count_classes_alike_in_mixed_images():
    """An image of two classes is what each of them would be by itself, by its share."""
    labels, others, share = torch.arange(8) % 3, torch.arange(8) // 4, torch.rand(8)
    logits, weight = torch.randn(8, 3), torch.tensor([0.5, 1.5, 3.0])
    targets = torch.lerp(F.one_hot(others, 3).float(), F.one_hot(labels, 3).float(), share[:, None])
    loss, other = (F.cross_entropy(logits, y, label_smoothing=0.1, reduction="none") for y in (labels, others))
    by_hand = (share * weight[labels] * loss + (1 - share) * weight[others] * other).mean()
    assert loss_of(logits, targets, 0.1, weight).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_class_weights_in_a_run(tmp_path):
    write_folder(tmp_path / "photos", splits=["."], per_class=10)
    for i in range(8):
        (tmp_path / "photos" / "dog" / f"{i:03}.png").unlink()
    words = [word for word in TINY if word not in ("--dataset", "fashionmnist-mini")]
    words += ["--data_dir", tmp_path / "photos", "--train_batch_size", 4, "--num_steps", 2, *places(tmp_path)]
    out = run("--name", "run", *words, "--class_weights", "balanced").stdout
    assert "class_weights balanced" in out


def test_training_accuracy_is_recorded(tmp_path):
    run(
        "--name", "run", *TINY, "--num_steps", 40, "--eval_every", 20, "--opt", "adamw", "--lr", 3e-3, *places(tmp_path)
    )
    evals = [line for line in records(file_of(tmp_path, "run", ".jsonl")) if line["event"] == "eval"]
    assert 0 < evals[0]["train_accuracy"] < evals[1]["train_accuracy"] < 1
    assert f"Train Accuracy: {evals[1]['train_accuracy']:.5f}" in file_of(tmp_path, "run", ".txt").read_text()


# ---------------------------------------------------------------- going on, paths


def test_a_finished_run_is_extended_as_if_it_had_been_longer(tmp_path):
    """To the bit, where the rate doesn't depend on the length."""
    words = ["--name", "run", *TINY, "--opt", "adamw", "--eval_every", 2, "--ema_decay", 0.5, "--warmup_steps", 0]
    words += ["--min_lr", 1e-3, "--lr", 1e-3]
    long, short = places(tmp_path / "long"), places(tmp_path / "short")
    run(*words, "--num_steps", 8, *long)
    run(*words, "--num_steps", 4, *short)
    assert "--extend with more --epochs goes on" in run(*words, "--num_steps", 4, *short).stdout
    assert "num_steps 4 -> 8" in run(*words, "--num_steps", 8, *short, check=2).stderr
    out = run(*words, "--num_steps", 8, "--extend", *short).stdout
    assert "Resuming" in out and "after step 4 of 8" in out
    a, b = (checkpoint.read_file(file_of(tmp_path / part, "run", "_last.bin")) for part in ("long", "short"))
    assert same(a["model"], b["model"]) and same(a["average"], b["average"])
    torch.testing.assert_close(a["optimizer"], b["optimizer"], rtol=0, atol=0)
    for again in (["--extend"], []):
        assert "is finished" in run(*words, "--num_steps", 8, *again, *short).stdout
    assert "--extend to 4 steps: run" in run(*words, "--num_steps", 4, "--extend", *short, check=2).stderr
    lines = records(file_of(tmp_path / "short", "run", ".jsonl"))
    assert [line["event"] for line in lines] == ["start", "eval", "eval", "start", "eval", "eval", "end"]
    table = in_process("plot.py", tmp_path / "short" / "output").stdout
    assert "| 8" in table or "8 " in table
    missing = run("--name", "none", *TINY, "--num_steps", 8, "--extend", *short, check=2)
    assert "--extend: there is no run none_" in missing.stderr


def test_warm_up_shrinks_with_the_run(tmp_path):
    out = run("@recipes/demo.args", "--num_steps", 20, *places(tmp_path)).stdout
    assert "Warm-up: 2 steps, as the 150 asked for are not fewer than the run's 20" in out


def test_home_and_recipes_from_windows(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "\ufeff# a comment\r\n--name run\r\n--data_dir ~/data --output_dir=~/out # more\r\n"
    (tmp_path / "my.args").write_bytes(text.encode())
    (tmp_path / "outer.args").write_text("@~/my.args\n--seed 1\n")
    for recipe in ("@~/my.args", f"@{tmp_path}/my.args", "@~/outer.args"):
        args = options.parse_train_args([recipe, "--log_dir=~/logs"])
        assert (args.name, args.data_dir) == ("run", f"{tmp_path}/data")
        assert (args.output_dir, args.log_dir) == (f"{tmp_path}/out", f"{tmp_path}/logs")
    (tmp_path / "my.args").write_text("--name a#1 --output_dir 'b #2' --log_dir # it's a comment\nc\n")
    args = options.parse_train_args([f"@{tmp_path}/my.args"])
    assert (args.name, args.output_dir, args.log_dir) == ("a#1", "b #2", "c")
    args = options.eval_parser().parse_args(["~/x.bin", "--images", "~/a.png"])
    assert args.checkpoint == f"{tmp_path}/x.bin" and args.images == [f"{tmp_path}/a.png"]


# ---------------------------------------------------------------- eval.py


@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 10_000))
def test_scores_are_scikit_learns(classes, n, seed):
    rng = np.random.default_rng(seed)
    true, answer = rng.integers(0, classes, (2, n))
    confusion = torch.from_numpy(sklearn.metrics.confusion_matrix(true, answer, labels=range(classes)))
    scores, means = metrics.class_scores(confusion), metrics.mean_scores(confusion)
    words = dict(labels=range(classes), zero_division=0)
    expected = sklearn.metrics.precision_recall_fscore_support(true, answer, **words)
    for mine, theirs in zip(scores.values(), expected, strict=True):
        assert mine.tolist() == pytest.approx(list(theirs))
    macro = sklearn.metrics.precision_recall_fscore_support(true, answer, average="macro", zero_division=0)[:3]
    assert [means[f"macro_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(macro)
    if len(set(answer) - set(true)) == 0:  # else it warns
        assert means["balanced_accuracy"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(true, answer))


def test_worst_confusions_by_name():
    confusion = torch.tensor([[5, 3, 0], [0, 2, 4], [1, 0, 9]])
    expected = [("b", "c", 4, 6), ("a", "b", 3, 8), ("c", "a", 1, 10)]
    assert metrics.worst_confusions(confusion, ["a", "b", "c"]) == expected


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of two classes, and a run on it."""
    folder = tmp_path_factory.mktemp("photos")
    write_folder(folder / "photos", splits=["."], per_class=10, sizes=[(30, 40), (50, 28)])
    words = [word for word in TINY if word not in ("--dataset", "fashionmnist-mini")]
    words += ["--data_dir", folder / "photos", "--train_batch_size", 4, "--num_steps", 2, *places(folder)]
    run("--name", "run", *words, "--val_fraction", 0.25)
    return folder


def test_evaluation_of_each_split(photos):
    path, seen = file_of(photos, "run", "_checkpoint.bin"), {}
    for split in ("train", "val", "test"):
        result = json.loads(in_process("eval.py", path, "--split", split, "--json").stdout)
        seen[split] = result["seen"]
        assert result["split"] == split and "top5" not in result
    assert seen == dict(train=12, val=4, test=4)
    out = in_process("eval.py", path).stdout
    assert "Top-5" not in out and "Balanced accuracy: " in out and "mean of the classes" in out
    assert re.search(r"(cat taken for dog|dog taken for cat): \d of 2", out) or "(4/4)" in out


def test_scores_stand_in_columns_in_any_script(tmp_path):
    """As a terminal shows them, where a Korean character is as wide as two letters."""
    write_folder(tmp_path / "photos", splits=["."], classes=["고양이", "dog"])
    words = [word for word in TINY if word not in ("--dataset", "fashionmnist-mini")]
    run("--name", "run", *words, "--data_dir", tmp_path / "photos", "--num_steps", 1, *places(tmp_path))
    out = in_process("eval.py", file_of(tmp_path, "run", "_checkpoint.bin")).stdout
    cat, dog = (len(re.search(rf"^  {name} +(?=\d)", out, re.MULTILINE)[0]) for name in ("고양이", "dog"))
    assert cat + 3 == dog


def test_pictures_of_other_data_lie_beside(photos, tmp_path):
    path = file_of(photos, "run", "_checkpoint.bin")
    first = json.loads(in_process("eval.py", path, "--json").stdout)["confusion_png"]
    shutil.copytree(photos / "photos", tmp_path / "others")
    other = json.loads(in_process("eval.py", path, "--data_dir", tmp_path / "others", "--json").stdout)["confusion_png"]
    split = json.loads(in_process("eval.py", path, "--split", "val", "--json").stdout)["confusion_png"]
    table = tmp_path / "labels.csv"  # of the run's own photos
    table.write_text("file,label,split\n" + "".join(f"{name}/000.png,{name},test\n" for name in ("cat", "dog")))
    labels = json.loads(in_process("eval.py", path, "--labels", table, "--json").stdout)["confusion_png"]
    assert len({first, other, split, labels}) == 4 and other.endswith("_imagefolder_others_confusion.png")


def test_other_data_may_be_split_already(photos, tmp_path):
    write_folder(tmp_path, splits=["train", "val", "test"], per_class=5)
    shutil.rmtree(tmp_path / "val" / "cat")
    for split, seen in dict(train=10, val=5, test=10).items():  # the run held out a quarter for validation
        words = ["--data_dir", tmp_path, "--split", split, "--json"]
        done = in_process("eval.py", file_of(photos, "run", "_checkpoint.bin"), *words)
        assert json.loads(done.stdout or "{}").get("seen") == seen, done.stderr
    shutil.rmtree(tmp_path / "train")
    shutil.rmtree(tmp_path / "test" / "cat")
    for split, seen in dict(val=5, test=5, train=None).items():
        done = in_process("eval.py", file_of(photos, "run", "_checkpoint.bin"), *words[:2], "--split", split, "--json")
        assert json.loads(done.stdout or "{}").get("seen") == seen, done.stderr
    assert "--split train: imagefolder has no train images beside its test images" in done.stderr


def test_predictions_of_a_folder(photos, tmp_path):
    path = file_of(photos, "run", "_checkpoint.bin")
    shutil.copytree(photos / "photos", tmp_path / "new", ignore=shutil.ignore_patterns("*.npz"))
    (tmp_path / "new" / "cat" / "broken.png").write_bytes(b"no image")
    (tmp_path / "new" / "notes.txt").touch()
    done = helpers.run("eval.py", path, "--images", tmp_path / "new", "--output_dir", tmp_path)
    assert f"left out: {tmp_path}/new/cat/broken.png: not a readable image" in done.stdout
    assert f"{tmp_path}/predictions.csv: 20 images" in done.stdout
    assert done.stderr == "Not read, as no image for this Pillow: 1 .txt\n"
    with open(tmp_path / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 and list(rows[0]) == ["file", "class", "probability", "runner-up"]
    single = json.loads(in_process("eval.py", path, "--images", rows[3]["file"], "--json").stdout)[rows[3]["file"]]
    assert list(single) == [rows[3]["class"], rows[3]["runner-up"]]
    assert single[rows[3]["class"]] == pytest.approx(float(rows[3]["probability"]), abs=1e-4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    done = in_process("eval.py", path, "--images", tmp_path / "bad")
    assert done.returncode == 2 and "none of 1 images can be read; " in done.stderr
    assert "no images in it" in in_process("eval.py", path, "--images", tmp_path / "empty").stderr
