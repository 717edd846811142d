"""plot.py and the sweeps of train1.sh and train3.sh, as a user calls them.

data/rescalevit_logs/ holds shortened logs of the form that ChaofanTao/RescaleViT publishes: a finished run, one whose
log goes on with later calls that train nothing, and one without an end.
"""

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from helpers import ROOT, call, wait_for

import plot
from utils import options, results
from utils.cli import UserError
from utils.results import mean_and_spread
from utils.run_files import RunFiles, settings

LOGS = Path(__file__).parent / "data" / "rescalevit_logs"
SCRATCH, PRETRAINED = (f"cifar10_ViT-B_32_norm_LN_fp_True_img_224_pretrain_{c}" for c in "FT")
PNG = b"\x89PNG"


def cells(text: str) -> list[list[str]]:
    """The cells of Markdown tables, without the lines below the heads."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def table(folder: Path) -> list[dict]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def size_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:4] == PNG
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


# ---------------------------------------------------------------- logs of RescaleViT


def test_table_of_rescalevit_logs(tmp_path):
    out = call("plot.py", LOGS, "--out", tmp_path).stdout
    head = ["model", "LN", "BN", "GN", "Rescale", "resolution", "parameters", "acc(%), best on test", "time(min)"]
    assert cells(out) == [
        head,
        ["ViT-B_32", "+", "", "", "", "224x224", "87.5M", "67.56", "68.5"],
        ["ViT-B_32*", "+", "", "", "", "224x224", "87.5M", "98.48", "67.7"],
        head,
        ["ViT-L_16", "", "+", "", "", "224x224", "303M", "26.87 so far, step 8300 of 20000 (seed 42)", ""],
    ]
    assert "### cifar10\n" in out and "### cifar100\n" in out
    assert (tmp_path / "results.md").read_text() in out
    first, second, third = table(tmp_path)
    assert (first["best"], first["last"], first["n"], first["minutes"]) == ("0.6756", "0.6747", "1", "68.5")
    assert (second["best"], second["last"], second["pretrained"]) == ("0.9848", "0.9844", "True")
    assert (third["state"], third["n"], third["best"], third["step"]) == ("incomplete", "0", "", "8300")
    assert (third["best_so_far"], third["parameters"]) == ("0.2687", "303400000")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "results.md", "results.csv", "comparison_cifar10.png", "comparison_cifar100.png",
        *(f"{path.stem}_curves.png" for path in LOGS.iterdir()),
    }  # fmt: skip
    for path in tmp_path.glob("*.png"):
        assert all(600 <= side <= 2000 for side in size_of(path)), path


def test_curves_of_rescalevit_logs():
    run = results.read_run(LOGS / f"{SCRATCH}.txt")
    assert run.steps == [100, 1000, 2000, 19800, 19900, 20000] and run.finished
    assert run.loss == [1.88619, 1.71997, 1.5139, 0.98283, 0.98279, 0.98277]
    assert run.accuracy == [0.2971, 0.3851, 0.4442, 0.6748, 0.6747, 0.6747]
    assert (run.dataset, run.model, run.norm, run.image_size) == ("cifar10", "ViT-B_32", "LN", 224)
    assert run.settings["learning_rate"] == 0.05 and not run.train_loss and not run.pretrained
    late = results.read_run(LOGS / f"{PRETRAINED}.txt")  # a later call without steps is not the run
    assert late.finished and late.best == 0.9848 and late.steps[-1] == 20000 and late.pretrained
    part = results.read_run(LOGS / "cifar100_ViT-L_16_norm_BN_fp_True_img_224_pretrain_F.txt")
    assert not part.finished and part.best is part.last is None and part.num_steps == 20000
    assert (part.steps[-1], part.accuracy[-1], part.loss[-1]) == (8300, 0.2687, 3.01525)


def test_a_log_cut_at_any_byte_is_read_up_to_there(tmp_path):
    text = (LOGS / f"{SCRATCH}.txt").read_text()
    whole, path = results.read_run(LOGS / f"{SCRATCH}.txt"), tmp_path / f"{SCRATCH}.txt"
    for end in range(0, len(text), 7):
        path.write_text(text[:end])
        if "\n" not in text[:end]:
            with pytest.raises(UserError, match="holds no line of a run's log"):
                results.read_run(path)
            continue
        run = results.read_run(path)
        n = len(run.steps)
        assert run.steps == whole.steps[:n] and run.loss == whole.loss[:n] and len(run.accuracy) == n
        assert not run.finished or "End Training" in text[:end]


def test_a_log_without_its_score_is_of_no_finished_run(tmp_path):
    text = (LOGS / f"{SCRATCH}.txt").read_text()
    (tmp_path / f"{SCRATCH}.txt").write_text(text.replace("Best Accuracy", "Best"))
    assert "67.48 so far, step 20000 of 20000" in call("plot.py", tmp_path).stdout
    val = "t - INFO - x - Data: cifar10, 10 classes; the best checkpoint is chosen on 9 held-out images (val)\n"
    (tmp_path / f"{SCRATCH}.txt").write_text(text + val)
    assert not results.read_run(tmp_path / f"{SCRATCH}.txt").finished  # that score is of held-out images
    (tmp_path / f"{SCRATCH}.txt").write_text(text.replace("Valid Accuracy", "Valid"))
    assert not results.read_run(tmp_path / f"{SCRATCH}.txt").finished


# ---------------------------------------------------------------- our own runs


def write_run(folder: Path, scores, seed=42, norm="LN", steps=4, ended=True, chosen_on="test", **settings) -> Path:
    """A run with an evaluation a step; the best is the highest score."""
    name = settings.pop("name", "run")
    suffix = "" if seed == 42 else f"_seed_{seed}"
    path = folder / f"{name}_ViT-Ti_16_norm_{norm}_fp_False_img_28_pretrain_F{suffix}.jsonl"
    about = dict(model_type="ViT-Ti_16", norm_type=norm, img_size=28, pretrained_dir=None, load_model_dir=None)
    settings = (
        about | dict(seed=seed, dataset="cifar10", data_dir="data", num_steps=steps, learning_rate=0.1) | settings
    )
    lines = [dict(event="start", settings=settings, selected_on=chosen_on)]
    for i, score in enumerate(scores, 1):
        lines.append(dict(event="eval", step=i, loss=2 - score, accuracy=score, train_loss=2.5 - score, seconds=60 * i))
    if ended:
        more = dict(test_accuracy=0.11, test_accuracy_last=0.1) if chosen_on == "val" else {}
        end = dict(best_accuracy=max(scores), last_accuracy=scores[-1], seconds=60 * steps + 30)
        lines.append(dict(event="end", **end, **more))
    folder.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_each_table_has_its_picture(tmp_path):
    for i, folder in enumerate(["my photos", "my_photos", "my/photos"]):
        write_run(tmp_path, [0.5], name=f"r{i}", dataset="imagefolder", data_dir=folder)
    assert "3 comparison_*.png" in call("plot.py", tmp_path).stdout
    assert len(list(tmp_path.glob("comparison_*.png"))) == 3


def test_mean_and_spread_over_seeds(tmp_path):
    seeds = {1: [0.1, 0.3, 0.5, 0.4], 2: [0.2, 0.4, 0.6, 0.6], 3: [0.1, 0.3, 0.7, 0.65]}
    for seed, scores in seeds.items():
        path = write_run(tmp_path, scores, seed)
    path.with_suffix(".txt").write_text("not read, as there is a .jsonl\n")
    begun = write_run(tmp_path, [0.9, 0.99], 4, ended=False)
    begun.write_text(begun.read_text() + begun.read_text().partition("\n")[0] + "\n")  # as an extended run starts anew
    write_run(tmp_path, [0.3, 0.2, 0.3, 0.25], norm="Rescale")
    write_run(tmp_path, [0.3, 0.2, 0.3, 0.25], 1, norm="GN", chosen_on="val", dataset="emnist", emnist_split="letters")
    out = call("plot.py", tmp_path).stdout
    assert cells(out)[1:4] == [
        ["ViT-Ti_16", "+", "", "", "", "28x28", "", "60.00 ± 10.00 (n=3)", "4.5"],
        ["ViT-Ti_16", "+", "", "", "", "28x28", "", "99.00 so far, step 2 of 4 (seed 4)", ""],
        ["ViT-Ti_16", "", "", "", "+", "28x28", "", "30.00", "4.5"],
    ]
    assert "### emnist letters, best on val\n" in out and "acc(%), test, best on val" in out
    assert cells(out)[-1][-2] == "11.00"  # the test accuracy of the checkpoint chosen on held-out images
    row, unfinished, *_ = table(tmp_path)
    assert (row["best_so_far"], unfinished["best_so_far"], unfinished["minutes"]) == ("0.6", "0.99", "2")
    assert float(row["best"]) == pytest.approx(0.6) and float(row["best_sd"]) == pytest.approx(0.1)
    assert float(row["last"]) == pytest.approx(0.55) and row["seeds"] == "1 2 3"
    assert float(row["best_so_far"]) == pytest.approx(0.6)
    assert float(row["last_sd"]) == pytest.approx(statistics.stdev([0.4, 0.6, 0.65]), abs=1e-5)
    assert (tmp_path / "comparison_cifar10.png").exists() and (tmp_path / "comparison_emnist_letters_val.png").exists()
    assert len(list(tmp_path.glob("*_curves.png"))) == 6
    steps, mean, spread = plot.curve(
        [run for run in results.read_runs(tmp_path)[0] if run.finished and run.norm == "LN"], "accuracy"
    )
    assert steps == [1, 2, 3, 4] and mean == pytest.approx([0.4 / 3, 1 / 3, 0.6, 0.55])
    assert spread[2] == pytest.approx(0.1)


def test_other_settings_are_no_seeds(tmp_path):
    write_run(tmp_path, [0.5] * 4, 1)
    write_run(tmp_path, [0.6] * 4, 2, learning_rate=0.2)
    write_run(tmp_path, [0.7] * 4, 2, data_dir="elsewhere", name="other")
    labels = [row[0] for row in cells(call("plot.py", tmp_path).stdout)[1:]]
    assert labels == [
        f"ViT-Ti_16 ({name}, learning_rate {rate})" for name, rate in (("other", 0.1), ("run", 0.1), ("run", 0.2))
    ]


def test_rows_that_a_fourth_setting_tells_apart(tmp_path):
    for seed, (most, last) in enumerate(((0, 0), (1, 0), (1, 1)), 1):
        write_run(tmp_path, [0.5], seed, mixup=most, cutmix=most, smoothing=most, ra=last)
    labels = [row[0] for row in cells(call("plot.py", tmp_path).stdout)[1:]]
    assert labels[1:] == [f"ViT-Ti_16 (mixup 1, cutmix 1, smoothing 1, ra {n})" for n in (0, 1)]


def test_rows_are_comparable_or_visibly_not(tmp_path):
    """What tells two rows apart, all rows of the table show; and sizes that are not the type's."""
    write_run(tmp_path, [0.5], steps=1000, patch_size=4, dim=48, heads=3)  # ViT-Ti_16 has 3 heads
    write_run(tmp_path, [0.6], steps=60, norm="BN")
    write_run(tmp_path, [0.7], steps=60, norm="BN", name="other")
    write_run(tmp_path, [0.8], chosen_on="val", norm="GN", ended=False)
    write_run(tmp_path, [0.9], dataset="cifar100", norm="Rescale")
    out = call("plot.py", tmp_path).stdout
    rows = [row for row in cells(out) if row[0] != "model"]
    assert [row[0] for row in rows] == [
        "ViT-Ti_16, patch 4, dim 48 (run, 1000 steps)", "ViT-Ti_16 (other, 60 steps)", "ViT-Ti_16 (run, 60 steps)",
        "ViT-Ti_16", "ViT-Ti_16",
    ]  # fmt: skip
    assert rows[3][-2] == "val 80.00 so far, step 1 of 4 (seed 42)"
    heads = [line for line in out.splitlines() if line.startswith("### ")]
    assert heads == ["### cifar10", "### cifar10, best on val", "### cifar100"]
    legends = [row.legend for row in results.tables(results.read_runs(tmp_path)[0])["cifar10", "test"]]
    assert legends[0] == "ViT-Ti_16, patch 4, dim 48 (run, 1000 steps) LN" and len(set(legends)) == 3


def test_a_flag_that_is_newer_than_some_runs(tmp_path):
    """Runs from before had its default: they are seeds of those that have it now, and other rows than the others."""
    write_run(tmp_path, [0.5], seed=1)
    write_run(tmp_path, [0.6], seed=2, freeze=False)
    write_run(tmp_path, [0.7], seed=3, own=5)
    write_run(tmp_path, [0.8], seed=4, freeze=True)
    ((_, rows),) = results.tables(results.read_runs(tmp_path)[0]).items()
    assert {row.label: len(row.runs) for row in rows} == {
        "ViT-Ti_16 (own None, freeze False)": 2, "ViT-Ti_16 (own 5, freeze False)": 1,
        "ViT-Ti_16 (own None, freeze True)": 1,
    }  # fmt: skip


def test_models_and_norms_of_others_are_rows_and_columns(tmp_path):
    """Own models come with own names; nothing in the table is a list of ours, and what is no run is named."""
    path = write_run(tmp_path, [0.1, 0.2, 0.3, 0.4], norm="RMS", model_type="CaiT-S_24")
    path.rename(tmp_path / "own_CaiT-S_24_norm_RMS_fp_False_img_28_pretrain_F.jsonl")
    write_run(tmp_path, [0.1, 0.2, 0.3, 0.5])
    (tmp_path / "notes.txt").write_text("not of a run\n")
    done = call("plot.py", tmp_path)
    head, *rows = cells(done.stdout)
    assert head[:6] == ["model", "LN", "BN", "GN", "Rescale", "RMS"]
    assert [row[:6] + row[-2:-1] for row in rows] == [
        ["CaiT-S_24", "", "", "", "", "+", "40.00"],
        ["ViT-Ti_16", "+", "", "", "", "", "50.00"],
    ]
    assert done.stderr.startswith("plot.py: left out: ") and "notes.txt: is not named as a run is" in done.stderr


def test_values_of_other_types_are_named_or_shown(tmp_path):
    path = write_run(tmp_path, [0.1, 0.2, 0.3, 0.4])
    start, *others = map(json.loads, path.read_text().splitlines())
    copy = tmp_path / path.name.replace("_pretrain_F", "_pretrain_F_seed_1")
    places = [(start["settings"], name) for name in start["settings"]] + [(start, "parameters"), (start, "selected_on")]
    for place, name in places:
        for value in (None, "x", 1.5, [1], {"a": 1}):
            place[name], before = value, place.get(name)
            copy.write_text("".join(json.dumps(record) + "\n" for record in (start, *others)))
            place[name] = before
            found = results.tables(results.read_runs(tmp_path)[0])
            assert "40.00" in "".join(results.markdown(*key, rows) for key, rows in found.items()), (name, value)
            assert results.csv_text(found).count("\n") > 1


def test_one_file_alone_and_a_cut_last_line(tmp_path):
    path = write_run(tmp_path, [0.1, 0.2, 0.3, 0.4])
    write_run(tmp_path, [0.1], norm="BN", ended=False)
    text = path.read_text()
    path.write_text(text[: text.index('"event": "end"') + 5])
    done = call("plot.py", path, "--out", tmp_path / "new" / "folder")
    assert done.stderr == f"plot.py: {path.stem}: the last line is cut off and left out\n"
    assert [row[-2] for row in cells(done.stdout)[1:]] == ["40.00 so far, step 4 of 4 (seed 42)"]
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 4


# ---------------------------------------------------------------- sweeps

SMALL = (
    "--dataset fashionmnist-mini --img_size 28 --patch_size 7 --dim 32 --depth 2 --heads 2 --mlp_dim 64 "
    "--num_steps 4 --eval_every 2 --train_batch_size 32 --eval_batch_size 512"
).split()


class Sweep:
    """A sweep of train1.sh with its results in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.output = folder, folder / "output"
        (folder / "tmp").mkdir()

    def start(self, *words, script="train1.sh", **env) -> subprocess.Popen:
        env = dict(ARCHS="ViT-Ti_16", PYTHON=sys.executable, OMP_NUM_THREADS="1", TMPDIR=str(self.folder / "tmp")) | env
        flags = ["--output_dir", str(self.output), "--log_dir", str(self.folder / "logs")]
        command = ["sh", str(ROOT / script), *SMALL, *flags, *map(str, words)]
        files = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder)
        return subprocess.Popen(command, env={**os.environ, **env}, start_new_session=True, **files)

    def run(self, *words, status=0, **more) -> tuple[str, str]:
        process = self.start(*words, **more)
        out, error = process.communicate(timeout=300)
        assert process.returncode == status, (process.returncode, out, error)
        assert not list((self.folder / "tmp").glob("tmp.*"))
        return out, error

    def ends(self) -> dict[str, int]:
        """When each finished run was last written, by norm and seed."""
        paths = [path for path in self.output.glob("*.jsonl") if '"event": "end"' in path.read_text()]
        return {path.stem.split("_norm_")[1]: path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two norms and two seeds; killed during the second run, and called again."""
    sweep = Sweep(tmp_path_factory.mktemp("sweep"))
    settings = dict(NORMS="LN BN", SEEDS="1 2")
    process = sweep.start(**settings)
    wait_for(lambda: len(list(sweep.output.glob("*.txt"))) == 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = sweep.ends()
    assert 1 <= len(before) < 4
    for left in (sweep.folder / "tmp").glob("tmp.*"):  # nobody could clean up
        shutil.rmtree(left)
    out, _ = sweep.run(GPUS="0 0", **settings)
    return sweep, before, out


@pytest.mark.slow
def test_killed_sweep_finishes_what_is_missing(swept):
    sweep, before, out = swept
    after = sweep.ends()
    assert len(after) == 4 and before.items() <= after.items()
    assert out.startswith("### fashionmnist-mini\n")  # of two at a time only the table is shown
    texts = [path.read_text() for path in sweep.output.glob("*.txt")]
    assert len(texts) == 4 and all(text.count("End Training!") == 1 for text in texts)
    rows = cells(out)[1:]
    assert [row[1:3] for row in rows] == [["+", ""], ["", "+"]]
    assert all(row[-2].endswith("(n=2)") and "±" in row[-2] for row in rows)
    assert {row["n"] for row in table(sweep.output)} == {"2"}


@pytest.mark.slow
def test_failed_cell_is_named_and_stops_no_other(swept):
    sweep = swept[0]
    other = sweep.output / "fashionmnist-mini-100_500_ViT-Ti_16_norm_GN_fp_True_img_28_pretrain_F_seed_1.jsonl"
    # there is such a run with other settings
    other.write_text('{"event": "start", "settings": {"num_steps": 5}}\n{"event": "eval", "step": 5}\n')
    report = sweep.output / "results.md"  # cannot be written
    report.unlink()
    report.mkdir()
    out, error = sweep.run("--eval_batch_size", 511, NORMS="GN LN", SEEDS="1", status=1)
    other.unlink()
    report.rmdir()
    assert "is finished" in out
    cell = "@recipes/rescalevit_cifar10.args --model_type ViT-Ti_16 --norm_type GN --seed 1"
    assert error.endswith(f"failed:\n  {cell}: status 2\n  plot.py {sweep.output}: status 2\n")


@pytest.mark.slow
@pytest.mark.parametrize("how, gpus", [(signal.SIGINT, "0"), (signal.SIGTERM, "0 0")])
def test_stopped_sweep_loses_nothing(tmp_path, how, gpus):
    sweep, workers = Sweep(tmp_path), len(gpus.split())
    process = sweep.start("--num_steps", 5000, "--eval_every", 20, NORMS="LN BN GN", SEEDS="7", GPUS=gpus)
    wait_for(lambda: len(list(sweep.output.glob("*_last.bin"))) == workers, process)
    if how == signal.SIGINT:  # Ctrl-C reaches the whole foreground group
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + how, (out, error)
    assert error.endswith("sweep stopped; the same command, without --overwrite, goes on from here\n")
    logs = [path.read_text() for path in sweep.output.glob("*.txt")]
    assert len(logs) == workers and all("saved, the same command goes on from there" in log for log in logs)
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_dry_run_says_what_would_happen(swept):
    sweep = swept[0]
    out, _ = sweep.run(NORMS="LN Rescale", SEEDS="1 42", DRY_RUN="1")
    commands = [line for line in out.splitlines() if line.startswith("python train.py ")]
    assert len(commands) == 4 and "--model_type ViT-Ti_16 --norm_type Rescale --seed 42" in commands[3]
    assert all("--name=fashionmnist-mini-100_500 --dataset fashionmnist-mini" in command for command in commands)
    answers = [line for line in out.splitlines() if line.startswith("  ")]
    assert answers[0].startswith("  4 steps; finished: best accuracy 0.")
    assert all("  4 steps; about 0." in answer for answer in answers[1:])
    assert "in all about 0 min, one after another\n" in out
    out, _ = sweep.run("--num_steps", 8, NORMS="LN", SEEDS="1", DRY_RUN="1")
    assert "exists with other settings: num_steps 4 -> 8" in out


def test_epochs_that_make_the_same_steps_are_no_difference(tmp_path):
    start = dict(event="start", settings=dict(num_steps=16, epochs=0.1024, learning_rate=0.03))
    files = RunFiles(tmp_path, tmp_path, "run")
    files.json.write_text(json.dumps(start) + '\n{"event": "eval"}\n')

    for epochs, names in ((0.1, []), (0.1024, []), (0.12, ["num_steps 16 -> 19"])):
        assert files.differences(dict(num_steps=None, epochs=epochs, learning_rate=0.03)) == names
    changed = files.differences(dict(num_steps=17, epochs=None, learning_rate=0.01))
    assert changed == ["num_steps 16 -> 17", "learning_rate 0.03 -> 0.01"]


def test_flags_of_any_type_are_no_difference(tmp_path):
    now = settings(Namespace(places=(1, 2), folder=Path("a"), num_steps=4))
    files = RunFiles(tmp_path, tmp_path, "run")
    files.json.write_text(json.dumps(dict(event="start", settings=now)) + '\n{"event": "eval"}\n')
    assert files.differences(now) == []


def test_dry_run_goes_on_from_a_save_alone(tmp_path):
    args = options.parse_train_args([*SMALL, "--output_dir", str(tmp_path), "--log_dir", str(tmp_path)])
    files, had = RunFiles.of(args), settings(args) | dict(epochs=1.0, mean=[0.5] * 3, std=[0.5] * 3, warmup_steps=0)
    score = dict(event="eval", step=2, loss=1, accuracy=0.5, train_loss=1, seconds=60)
    end = dict(event="end", step=4, selected_on="test", best_accuracy=0.5, last_accuracy=0.5, seconds=120)
    lines = [json.dumps(line) + "\n" for line in (dict(event="start", settings=had, selected_on="test"), score, end)]

    files.json.write_text("".join(lines[:2]))
    assert results.plan(args)[0].startswith("4 steps; time unknown")  # from the start, as train.py does
    files.last.touch()
    files.json.write_text(lines[0])
    assert results.plan(args)[0].startswith("4 steps; goes on; ")  # stopped before the first evaluation
    files.json.write_text("".join(lines[:2]))
    assert results.plan(args)[0].startswith("4 steps; goes on after step 2 of 4; ")
    files.json.write_text("".join(lines))
    args.extend, args.num_steps = True, 8
    assert "goes on after step" in results.plan(args)[0]
    files.last.unlink()
    assert f"8 steps; would be refused: --extend: {files.last} is gone" in results.plan(args)[0]


def test_the_whole_sweep_is_the_published_one(tmp_path):
    env = dict(DRY_RUN="1", ARCHS="")
    out, _ = Sweep(tmp_path).run(**env)
    assert out.count("time unknown") == 16 and "in all" not in out
    lines = [line for line in out.splitlines() if "python train.py " in line]
    assert len(lines) == 16 and all("@recipes/rescalevit_cifar10.args" in line for line in lines)
    assert [("--train_batch_size 64" in line) for line in lines] == 12 * [False] + 4 * [True]
    last = lines[-1]
    assert last.index("--train_batch_size 64") < last.index("--train_batch_size 32")  # the user's flags come last


def test_flags_that_are_spelled_otherwise(tmp_path):
    python, recipe = tmp_path / "python", tmp_path / "my.args"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho "$@" >>"$TMPDIR/calls"\n')
    python.chmod(0o755)
    recipe.write_text("--dataset emnist  # mine\n--output_dir 'a b'\n")
    sweep, calls = Sweep(tmp_path), tmp_path / "tmp" / "calls"
    sweep.run("--data-set", "cifar100", "--output=elsewhere", NORMS="LN", PRETRAINED="0", PYTHON=str(python))
    check, cell, plots = calls.read_text().splitlines()
    assert "--name=cifar100-100_500 --dataset cifar100" in cell and plots == "plot.py elsewhere"
    sweep.run("--dry-run", NORMS="LN", PYTHON=str(python))
    assert calls.read_text().count("\n") == 4  # nothing but the check
    sweep.run(f"@{recipe}", NORMS="LN", PRETRAINED="0", PYTHON=str(python))
    cell, plots = calls.read_text().splitlines()[-2:]
    assert "--name=emnist-100_500 --dataset emnist" in cell and plots == "plot.py a b"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_sweep_stopped_while_its_flags_are_checked_leaves_nothing(tmp_path, how):
    python, sweep = tmp_path / "python", Sweep(tmp_path)
    python.write_text('#!/bin/sh\ntouch "$TMPDIR/begun"; exec sleep 60\n')
    python.chmod(0o755)
    process = sweep.start(PYTHON=str(python))
    wait_for((tmp_path / "tmp" / "begun").exists, process)
    os.killpg(process.pid, how)
    process.communicate(timeout=60)
    assert process.returncode == 128 + how and os.listdir(tmp_path / "tmp") == ["begun"]


def test_help_of_a_sweep_is_train_pys_and_starts_nothing(tmp_path):
    sweep = Sweep(tmp_path)
    out, error = sweep.run("--help")
    assert out.startswith("usage: train.py") and error == "" and not (tmp_path / "output").exists()


def test_one_cell_of_a_job_array(tmp_path):
    sweep = Sweep(tmp_path)
    out, _ = sweep.run(NORMS="LN BN", SEEDS="1 2", DRY_RUN="1", CELL="2")
    assert out.count("train.py ") == 1 and "--norm_type BN --seed 1" in out
    _, error = sweep.run(NORMS="LN BN", SEEDS="1 2", CELL="4", status=2)
    assert error == "train.py: error: nothing to do; look at ARCHS, NORMS, SEEDS and CELL\n"


def test_a_score_that_is_no_number_is_shown_as_such():
    mean, spread = mean_and_spread([0.5, float("nan")])
    assert mean != mean and spread is None
