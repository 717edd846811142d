"""What a run survives: kill -9, signals, damaged files, a full disk, vanished folders, infinite numbers."""

import contextlib
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, call, places, same, weights, write_folder
from torch import nn

import train
from models import MODELS, NORM_TYPES, create_model, model_sizes
from utils import checkpoint, dist_util, options
from utils.anomaly import Anomaly
from utils.cli import UserError

ID = "run_ViT-Ti_16_norm_LN_fp_False_img_28_pretrain_F"
LAST, PREVIOUS, BEST = (f"{ID}_{kind}.bin" for kind in ("last", "last.prev", "checkpoint"))
RUN = [
    *("--name", "run", *TINY, "--num_steps", 24, "--eval_every", 4, "--save_every", 3, "--opt", "adamw"),
    *("--gradient_accumulation_steps", 2, "--drop_path", 0.1, "--smoothing", 0.1),
    *("--val_fraction", 0.1, "--ema_decay", 0.5),
]
# train.py with a pause in the midst of every save, before the temporary file gets its name
SLOW = """
import os, runpy, sys, time
fsync = os.fsync
name = lambda file: os.readlink(f"/proc/self/fd/{{file}}")
os.fsync = lambda file: (time.sleep({pause} * name(file).endswith(".tmp")), fsync(file))
sys.argv, sys.path[0] = sys.argv[1:], {root!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*words, pause: float | None = None, **kwargs) -> subprocess.Popen:
    runner = [] if pause is None else ["-c", SLOW.format(pause=pause, root=str(ROOT))]
    command = [sys.executable, *runner, str(ROOT / "train.py"), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **kwargs)


def train_here(*words) -> int:
    """train.py in this process; a UserError comes through."""
    return train.main(options.parse_train_args([str(word) for word in words], MODELS, NORM_TYPES, model_sizes))


def wait_for(condition, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.002)


def records(folder: Path) -> list[dict]:
    """The records of a run, without what the clock and the free memory say."""
    lines = [json.loads(line) for line in (folder / "output" / f"{ID}.jsonl").read_text().splitlines()]
    apart = ("seconds", "settings", "memory_limit")
    return [{name: value for name, value in line.items() if name not in apart} for line in lines]


def assert_same_run(folder: Path, reference: Path) -> None:
    assert records(folder) == records(reference)
    for name in (LAST, BEST):
        assert same(weights(folder / "output" / name), weights(reference / "output" / name))
    assert not list((folder / "output").glob(".*"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run of 24 steps, by a process of its own."""
    folder = tmp_path_factory.mktemp("reference")
    call("train.py", *RUN, *places(folder))
    return folder


class Killed(BaseException):
    """As if the power had gone."""


def train_until(monkeypatch, folder: Path, file: str, step: int, run: list = RUN) -> None:
    """Train in this process until `file` of `step`, or of a later one, has been written."""
    save = checkpoint.save

    def once(path, obj, *more):
        save(path, obj, *more)
        if path.name == file and obj["step"] >= step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", once)
        train_here(*run, *places(folder))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The same uninterrupted run, by this process."""
    folder = tmp_path_factory.mktemp("here")
    assert train_here(*RUN, *places(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """The same run, ended without warning after its save of step 15."""
    folder = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patch:
        train_until(patch, folder, LAST, 15)
    return folder


# ---------------------------------------------------------------- kill -9 and signals


def kill_at_random(folder: Path, reference: Path, kills: int, longest: float) -> None:
    """Kill a run `kills` times: each other time within a save, else up to `longest` seconds after training began."""
    chance = random.Random(0)
    log, last = folder / "output" / f"{ID}.txt", folder / "output" / LAST
    words = [*RUN, *places(folder)]

    def saving() -> bool:
        with contextlib.suppress(FileNotFoundError):  # its end came between the two calls
            return any(path.stat().st_mtime_ns > began for path in (folder / "output").glob(".*.tmp"))
        return False

    for number in range(kills):
        began = time.time_ns()  # a kill leaves a file to the next turn
        size = log.stat().st_size if log.exists() else 0
        process = start(*words, pause=0.1)
        wait_for(lambda size=size: log.exists() and log.stat().st_size != size, process)
        if number % 2:
            wait_for(saving, process)
        else:
            time.sleep(chance.uniform(0, longest))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        assert saving() or not number % 2
    step = checkpoint.read_file(last, own=True)["step"]  # what it did after its last save is all that is done again
    assert f"Resuming {ID} after step {step} of 24" in call("train.py", *words).stdout
    assert_same_run(folder, reference)


def test_killed_at_random_moments_it_ends_as_the_uninterrupted_one(reference, tmp_path):
    kill_at_random(tmp_path, reference, kills=8, longest=0.3)


@pytest.mark.slow
def test_killed_25_times_it_ends_as_the_uninterrupted_one(reference, tmp_path):
    kill_at_random(tmp_path, reference, kills=25, longest=0.3)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_and_leaves_with_its_status(reference, tmp_path, how):
    process = start(*RUN, *places(tmp_path), pause=0.1)
    wait_for((tmp_path / "output" / LAST).exists, process)
    process.send_signal(how)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 128 + how
    step = checkpoint.read_file(tmp_path / "output" / LAST, own=True)["step"]
    assert f"Signal {how} after step {step}; saved" in (tmp_path / "output" / f"{ID}.txt").read_text()
    assert f"after step {step} of 24" in call("train.py", *RUN, *places(tmp_path)).stdout
    assert_same_run(tmp_path, reference)


def test_signal_to_the_whole_group_leaves_streaming_workers_alone(tmp_path):
    """As torchrun and SLURM send it."""
    write_folder(tmp_path / "data", per_class=20)
    words = ["--dataset", "imagefolder", "--data_dir", tmp_path / "data", "--memory_limit", 0, "--num_workers", 2]
    process = start(*RUN, "--num_steps", 5000, *words, *places(tmp_path), start_new_session=True)
    wait_for((tmp_path / "output" / LAST).exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM and "Error" not in error
    assert "Signal 15 after step" in (tmp_path / "output" / f"{ID}.txt").read_text()


def test_second_interrupt_leaves_at_once(tmp_path):
    process = start(*RUN, *places(tmp_path), pause=30)
    wait_for(lambda: list((tmp_path / "output").glob(".*.tmp")), process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None  # it finishes its save
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == -signal.SIGINT
    process.stderr.close()


@pytest.mark.parametrize("file", [BEST, LAST])
def test_a_kill_between_best_and_last_changes_nothing(here, tmp_path, monkeypatch, file):
    best_step = records(here)[-1]["best_step"]
    train_until(monkeypatch, tmp_path, file, best_step)
    assert train_here(*RUN, *places(tmp_path)) == 0
    assert_same_run(tmp_path, here)


def test_streamed_run_ends_as_the_uninterrupted_one(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", sizes=((20, 30),), per_class=20)
    words = [*RUN, "--dataset", "imagefolder", "--data_dir", tmp_path / "data", "--memory_limit", 0, "--num_workers", 0]
    assert train_here(*words, *places(tmp_path / "whole")) == 0
    train_until(monkeypatch, tmp_path / "parts", LAST, 9, words)
    assert train_here(*words, *places(tmp_path / "parts")) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_run_goes_on_where_a_scaler_is_needed_now(tmp_path, monkeypatch):
    """As one with --fp16 that began on a CPU and continues on a GPU."""
    train_until(monkeypatch, tmp_path, LAST, 9)
    monkeypatch.setattr(train, "make_scaler", lambda *args: torch.amp.GradScaler("cpu"))
    assert train_here(*RUN, *places(tmp_path)) == 0
    assert checkpoint.read_file(tmp_path / "output" / LAST, own=True)["scaler"]["scale"] > 1


# ---------------------------------------------------------------- damaged files


def test_every_flipped_or_missing_byte_is_noticed(tmp_path):
    path = tmp_path / "last.bin"
    checkpoint.save(path, {"model": {"weight": torch.randn(20, 20)}, "step": 3})
    whole = path.read_bytes()
    assert checkpoint.read_file(path, own=True)["step"] == 3
    assert torch.load(path, weights_only=True)["step"] == 3  # the checksum is in nobody's way
    chance, found = random.Random(0), 0
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << chance.randrange(8)
        for damaged in (flipped, whole[:at]):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="last.bin: "):
                checkpoint.read_file(path, own=True)
            found += 1
    assert found == 2 * len(whole) > 2000


def test_flipped_byte_of_the_best_checkpoint_is_noticed(here, tmp_path):
    whole = (here / "output" / BEST).read_bytes()
    path = tmp_path / BEST
    path.write_bytes(whole[:70000] + bytes([whole[70000] ^ 1]) + whole[70001:])
    torch.load(path, weights_only=True)  # torch itself takes the wrong weight for right
    with pytest.raises(UserError, match="its checksum is wrong"):
        checkpoint.read_weights(path)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "missing"])
def test_damaged_last_gives_way_to_the_one_before(here, unfinished, tmp_path, capsys, damage):
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    last = folder / "output" / LAST
    whole = last.read_bytes()
    if damage == "missing":  # a crash between the two renames of a save
        last.unlink()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 8]) + whole[middle + 1 :]
        last.write_bytes({"flipped": flipped, "truncated": whole[:-1], "empty": b""}[damage])
    assert train_here(*RUN, *places(folder)) == 0
    out = capsys.readouterr().out
    assert f"{last} is damaged or missing; {last.with_name(PREVIOUS)} takes its place" in out
    assert f"Resuming {ID} after step 12 of 24" in out
    assert_same_run(folder, here)


def test_both_damaged_say_the_way_out(unfinished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    for name in (LAST, PREVIOUS):
        (folder / "output" / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match=f"{LAST} and .*{PREVIOUS}: damaged.*--overwrite"):
        train_here(*RUN, *places(folder))
    assert (folder / "output" / LAST).read_bytes() == b"nothing"
    assert train_here(*RUN, *places(folder), "--overwrite") == 0


def test_overwrite_removes_every_file(unfinished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    (folder / "output" / f".{LAST}.tmp").touch()
    (folder / "output" / "other.bin").touch()
    train.delete_run(folder / "output", folder / "logs", ID)
    assert os.listdir(folder / "output") == ["other.bin"] and not os.listdir(folder / "logs")


# ---------------------------------------------------------------- one process a run


def test_second_process_is_refused_and_the_first_undisturbed(reference, tmp_path):
    words = [*RUN, *places(tmp_path)]
    first = start(*words, pause=2)
    wait_for((tmp_path / "output" / LAST).exists, first)
    for more in ([], ["--overwrite"]):
        error = call("train.py", *words, *more, check=2).stderr
        assert error.count("\n") == 1
        assert f"run {ID} is running already" in error and f"process {first.pid})" in error
    assert first.poll() is None
    first.kill()  # its lock goes with it
    first.wait()
    first.stderr.close()
    call("train.py", *words)
    assert_same_run(tmp_path, reference)


def test_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def lockf(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert train_here("--name", "run", *TINY, "--num_steps", 1, *places(tmp_path)) == 0
    assert "no lock (No locks available), so don't start this run twice" in capsys.readouterr().err


# ---------------------------------------------------------------- full, read-only and vanished folders


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def assert_one_line(process: subprocess.Popen, *expected: str) -> None:
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and error.count("\n") == 1 and error.startswith("train.py: error: "), error
    assert all(part in error for part in expected), error


def test_full_disk_leaves_the_last_save(here, unfinished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    before = files(folder / "output")
    limit = min(map(len, before.values())) // 2
    process = start(*RUN, *places(folder), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert_one_line(process, ".bin: cannot be written (File too large)")
    assert files(folder / "output") == before and not list((folder / "output").glob(".*"))
    assert train_here(*RUN, *places(folder)) == 0
    assert_same_run(folder, here)


def mount(*words) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr}")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=1100k", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_and_read_only_file_system(reference, small_disk, tmp_path):
    words = [*RUN, "--output_dir", small_disk / "output", "--log_dir", tmp_path / "logs"]
    assert_one_line(start(*words), "cannot be written (No space left on device)")
    assert not list((small_disk / "output").glob(".*"))
    checkpoint.read_file(small_disk / "output" / LAST, own=True)
    before = files(small_disk / "output")
    mount("-o", "remount,ro,size=20m", small_disk)
    assert_one_line(start(*words), "is no folder to write into")
    assert files(small_disk / "output") == before
    mount("-o", "remount,rw", small_disk)
    call("train.py", *words)
    assert_same_run(small_disk, reference)


@pytest.mark.parametrize("which", ["output", "logs"])
def test_folder_removed_in_mid_run(tmp_path, which):
    process = start(*RUN, *places(tmp_path), "--num_steps", 5000, pause=0.01)
    wait_for((tmp_path / "output" / PREVIOUS).exists, process)
    shutil.move(tmp_path / which, tmp_path / "gone")
    assert_one_line(process, str(tmp_path / which), "No such file or directory")
    output = tmp_path / ("gone" if which == "output" else "output")
    assert checkpoint.read_last(output / LAST, output / PREVIOUS)[0]
    if which == "logs":
        assert not list(output.glob(".*"))


# ---------------------------------------------------------------- not finite


@pytest.fixture
def tiny_run(tmp_path):
    """`tiny_run(*flags)` -> a Run in this process, with its batches, ready for `update`."""

    def make(*flags):
        words = ["--name", "run", *TINY, "--num_steps", 8, "--warmup_steps", 0, "--memory_limit", 1, *flags]
        words += places(tmp_path)
        args = options.parse_train_args([str(word) for word in words], MODELS, NORM_TYPES, model_sizes)
        options.resolve_normalization(args, None)
        processes = dist_util.start("cpu")
        data = train.data_utils.load_data(args)
        run = train.Run(args, processes, data, keep_head=True)
        batches = train.data_utils.train_batches(
            data.train, run.augment, seed=0, start=0, stop=8, batch_size=32, device=processes.device
        )
        return run, batches

    return make


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_scaler_skips_an_overflow_and_lowers_the_scale(tiny_run, opt):
    run, batches = tiny_run("--opt", opt)
    run.scaler = torch.amp.GradScaler("cpu")  # that of CUDA's float16, whose gradients overflow
    weight = run.model.blocks[0].mlp.fc1.weight
    before, scale = weight.clone(), run.scaler.get_scale()
    hook = weight.register_hook(lambda grad: grad * float("inf"))
    run.update(batches)
    run.check_finite()
    assert torch.equal(weight, before) and run.scaler.get_scale() == scale / 2
    hook.remove()
    run.update(batches)
    run.check_finite()
    assert not torch.equal(weight, before) and weight.isfinite().all()
    with torch.no_grad():
        weight[0, 0] = float("nan")  # this is no overflow
    run.update(batches)
    with pytest.raises(train.NonFinite, match="not finite at step 3"):
        run.check_finite()


def test_without_a_scaler_an_infinite_gradient_stops(tiny_run):
    run, batches = tiny_run()
    run.model.blocks[0].mlp.fc1.weight.register_hook(lambda grad: grad * float("inf"))
    run.update(batches)
    with pytest.raises(train.NonFinite, match="not finite at step 1, learning rate 0.02.*; nothing was saved"):
        run.check_finite()


def test_saves_take_a_small_part_of_the_time(tmp_path, monkeypatch):
    """With an evaluation in every step and slow saves, most evaluations leave theirs to a later one."""
    saved, save = [], checkpoint.save

    def slow_save(path, obj, previous=None):
        time.sleep(1)
        saved.append((Path(path).name, obj["step"]))
        save(path, obj, previous)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    words = ["--name", "run", *TINY, "--num_steps", 12, "--eval_every", 1, "--lr", 0.1, "--warmup_steps", 0]
    assert train_here(*words, *places(tmp_path)) == 0
    lasts = [step for name, step in saved if name == LAST]
    assert lasts[0] == 1 and lasts[-1] == 12 and len(lasts) < 6
    evals = [record for record in records(tmp_path) if record["event"] == "eval"]
    best = max(evals, key=lambda record: record["accuracy"])
    kept = torch.load(tmp_path / "output" / BEST, weights_only=True)
    assert (kept["step"], kept["accuracy"]) == (best["step"], best["accuracy"])


def test_stopped_run_names_the_module_when_called_again(tmp_path, capsys):
    words = ["--name", "run", *TINY, "--num_steps", 20, "--save_every", 1, "--warmup_steps", 0, *places(tmp_path)]
    words += ["--lr", 1e30, "--max_grad_norm", 0]
    assert train_here(*words) == 3
    out = capsys.readouterr().out
    assert "Stopped: not finite at step 2, learning rate 9.75" in out and "--detect_anomaly" in out
    last = tmp_path / "output" / LAST
    assert f"{last} is from before" in out and checkpoint.read_file(last, own=True)["step"] == 1
    assert train_here(*words, "--detect_anomaly") == 3
    out = capsys.readouterr().out
    assert "Resuming" in out and "step 2" in out and "first the output of blocks.0.norm1 (LayerNorm)" in out


def test_module_whose_output_overflows_is_named(tmp_path, capsys):
    config = dict(image_size=28, patch_size=7, dim=32, depth=2, heads=2, mlp_dim=64, num_classes=10)
    model = create_model("ViT-Ti_16", **config)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[3] = 3e38
    torch.save({"model": model.state_dict()}, tmp_path / "huge.bin")
    words = ["--name", "run", *TINY, "--num_steps", 2, "--load_model_dir", tmp_path / "huge.bin", "--compile"]
    assert train_here(*words, "--detect_anomaly", *places(tmp_path)) == 3
    out = capsys.readouterr().out
    assert "not finite at step 1" in out and "not compiled" in out
    assert "first the output of blocks.1.mlp.fc2 (Linear)" in out


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()  # at 0 the gradient is infinite


def test_module_whose_gradient_is_infinite_is_named():
    model = nn.Sequential(nn.Linear(3, 3), Root(), nn.Linear(3, 1))
    anomaly = Anomaly(model)
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    model(torch.ones(2, 3)).sum().backward()
    assert anomaly.found == "gradient that 1 (Root) passes on"
    anomaly.clear()
    model.eval()(torch.full((2, 3), float("nan")))
    assert anomaly.found == ""  # evaluation is not its business


# ---------------------------------------------------------------- BatchNorm over GPUs


def test_sync_bn_converts_and_keeps_the_names():
    config = dict(norm_type="BN", image_size=28, patch_size=7, dim=32, depth=2, heads=2, mlp_dim=64, num_classes=10)
    plain = create_model("ViT-Ti_16", **config)
    synced = dist_util.sync_batchnorm(create_model("ViT-Ti_16", **config), torch.device("cuda"))
    kinds = [type(module) for module in synced.modules()]
    assert kinds.count(nn.SyncBatchNorm) == 5 and nn.BatchNorm1d not in kinds
    synced.load_state_dict(plain.state_dict())
    assert len(dist_util.statistics_of(synced)) == 10
    words = dict(norm_type="LN", patch_size=2, merge_num=(16, 8), merge_layer=(1, 2))
    assert not dist_util.statistics_of(create_model("DEMS-Ti", **{**config, "image_size": 16, **words}))
    images = torch.randn(4, 3, 28, 28)
    assert torch.equal(plain.eval()(images), synced.eval()(images))
    with pytest.raises(UserError, match="--sync_bn needs CUDA, this is cpu"):
        dist_util.sync_batchnorm(plain, torch.device("cpu"))


def test_sync_bn_in_one_process_says_that_it_does_nothing(tmp_path, capsys):
    words = ["--name", "run", *TINY, "--num_steps", 1, "--sync_bn", *places(tmp_path)]
    assert train_here(*words, "--norm_type", "BN") == 0
    assert "--sync_bn: batch statistics are those of the one process, as without" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_here(*words)
    assert "--sync_bn has no meaning with --norm_type LN" in capsys.readouterr().err
