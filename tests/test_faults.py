"""What a run survives: kill -9, signals, damaged files, a full disk, vanished folders, infinite numbers."""

import contextlib
import errno
import fcntl
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from helpers import ID, SIZES, TINY, call, places, wait_for, write_folder
from torch import nn

import eval
import train
from models import create_model
from utils import checkpoint, cli, dist_util, options
from utils.anomaly import Anomaly, NonFinite
from utils.cli import UserError
from utils.dist_util import Processes
from utils.log_util import RunLog
from utils.run_files import RunFiles

LAST, PREVIOUS, BEST = (f"{ID}_{kind}.bin" for kind in ("last", "last.prev", "checkpoint"))
LOCK = f".{ID}.lock"
SHORT = ["--name", "run", *TINY, "--warmup_steps", 0]
RUN = [
    *("--name", "run", *TINY, "--num_steps", 24, "--eval_every", 4, "--save_every", 3, "--opt", "adamw"),
    *("--gradient_accumulation_steps", 2, "--drop_path", 0.1, "--smoothing", 0.1),
    *("--val_fraction", 0.1, "--ema_decay", 0.5),
]


def parse(*words):
    return options.parse_train_args(list(map(str, words)))


def train_here(*words) -> int:
    """train.py in this process; a UserError comes through."""
    return train.main(parse(*words))


def end_of(process: BaseProcess) -> tuple[int | None, str]:
    """Exit status, and what it wrote to stderr."""
    process.join(120)
    return process.exitcode, process.error.read_text()


def records(folder: Path) -> list[dict]:
    """The records of a run, without what the clock and the free memory say."""
    lines = [json.loads(line) for line in (folder / "output" / f"{ID}.jsonl").read_text().splitlines()]
    apart = ("seconds", "settings", "memory_limit")
    return [{name: value for name, value in line.items() if name not in apart} for line in lines]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*")]


def assert_same_run(folder: Path, reference: Path) -> None:
    """The same records and, to the bit, the same weights, averages and optimizer; nothing else is left but the lock."""
    assert records(folder) == records(reference)
    for name in (LAST, BEST):
        ours, theirs = (checkpoint.read_file(part / "output" / name) for part in (folder, reference))
        assert ours.keys() == theirs.keys()
        for state in (ours, theirs):
            for apart in ("args", "seconds", "log", "config", "classes", "files", "precision", "selected_on", "kept"):
                state.pop(apart, None)
        assert ours.pop("kept", None) == theirs.pop("kept", None)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert hidden(folder / "output") == [LOCK]


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
def whole(tmp_path_factory):
    """An uninterrupted run of 24 steps, by this process."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_here(*RUN, *places(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """The same run, ended without warning after its save of step 15."""
    folder = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patch:
        train_until(patch, folder, LAST, 15)
    return folder


@pytest.fixture
def begun(unfinished, tmp_path):
    """A copy of `unfinished`."""
    return shutil.copytree(unfinished, tmp_path / "run")


# ---------------------------------------------------------------- kill -9 and signals


@pytest.mark.slow
def test_a_users_process_computes_the_same(whole, tmp_path):
    done = call("train.py", *RUN, *places(tmp_path), env={"OMP_NUM_THREADS": "1"})
    assert done.stderr == "" and "End Training!" in done.stdout
    assert_same_run(tmp_path, whole)


def assert_goes_on(folder: Path, whole: Path, capsys) -> None:
    """What it did after its last save is all that is done again."""
    step = checkpoint.read_file(folder / "output" / LAST)["step"]
    capsys.readouterr()
    assert train_here(*RUN, *places(folder)) == 0
    assert f"Resuming {ID} after step {step} of 24" in capsys.readouterr().out
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_killed_25_times_it_ends_as_the_uninterrupted_one(start, whole, tmp_path, capsys):
    """Each other time within a save, else up to a quarter of a second after training began."""
    chance, kills = random.Random(0), 25
    log, output = tmp_path / "output" / f"{ID}.txt", tmp_path / "output"

    def saving() -> bool:
        with contextlib.suppress(FileNotFoundError):  # its end came between the two calls
            return any(path.stat().st_mtime_ns > began for path in output.glob(".*.tmp"))
        return False

    for number in range(kills):
        began = time.time_ns()  # a kill leaves a file to the next turn
        size = log.stat().st_size if log.exists() else 0
        process = start(*RUN, *places(tmp_path), pause=0.1)
        wait_for(lambda size=size: log.exists() and log.stat().st_size != size, process)
        if number == kills - 1:  # also a busy machine has then saved something to go on from
            wait_for((output / LAST).exists, process)
        if number % 2:
            wait_for(saving, process)
        else:
            time.sleep(chance.uniform(0, 0.25))
        process.kill()
        assert end_of(process) == (-signal.SIGKILL, "")
        assert saving() or not number % 2
    assert_goes_on(tmp_path, whole, capsys)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_and_leaves_with_its_status(start, whole, tmp_path, capsys, how):
    new = ["--overwrite"] * (how == signal.SIGTERM)
    process = start(*RUN, *new, *places(tmp_path), pause=0.1)
    wait_for((tmp_path / "output" / LAST).exists, process)
    os.kill(process.pid, how)
    assert end_of(process) == (128 + how, "")
    step = checkpoint.read_file(tmp_path / "output" / LAST)["step"]
    by = "Ctrl-C" if how == signal.SIGINT else how.name
    line = f"Stopped by {by} after step {step}; saved, the same command{', without --overwrite,' * len(new)} goes on"
    assert line in (tmp_path / "output" / f"{ID}.txt").read_text()
    assert_goes_on(tmp_path, whole, capsys)


@pytest.mark.parametrize("who", ["TORCHELASTIC", "SLURM"])
def test_a_command_that_is_started_again_overwrites_nothing(whole, begun, monkeypatch, capsys, who):
    monkeypatch.setenv(f"{who}_RESTART_COUNT", "1")
    assert train_here(*RUN, *places(begun), "--overwrite") == 0
    assert "Resuming" in capsys.readouterr().out
    assert_same_run(begun, whole)


def test_signal_to_the_whole_group_leaves_streaming_workers_alone(start, tmp_path):
    """As torchrun and SLURM send it."""
    write_folder(tmp_path / "data", per_class=20)
    words = ["--dataset", "imagefolder", "--data_dir", tmp_path / "data", "--memory_limit", 0, "--num_workers", 2]
    process = start(*RUN, "--num_steps", 5000, *words, *places(tmp_path))
    wait_for((tmp_path / "output" / LAST).exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert end_of(process) == (128 + signal.SIGTERM, "")
    assert "Stopped by SIGTERM after step" in (tmp_path / "output" / f"{ID}.txt").read_text()


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
def at_ctrl_c(request):
    """Ctrl-C as programs find it: ignored in the background of a script."""
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("words", ["train.py", "eval.py x.bin"])
def test_interrupt_while_pytorch_is_loaded(tmp_path, words, at_ctrl_c):
    lost = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    pass\n"
    (tmp_path / "torch.py").write_text(lost + "os._exit(7)")  # as a callback of Python's import loses an exception
    status = 7 if at_ctrl_c == signal.SIG_IGN else -signal.SIGINT
    assert call(*words.split(), check=status, env={"PYTHONPATH": str(tmp_path)}).stderr == ""


def test_interrupt_of_a_script(at_ctrl_c, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as end:
        cli.run_main(lambda args: signal.raise_signal(signal.SIGINT), None)
    assert end.value.code == (None if at_ctrl_c == signal.SIG_IGN else 130)


def test_second_interrupt_leaves_at_once(start, tmp_path):
    process = start(*RUN, *places(tmp_path), pause=30)
    wait_for(lambda: list((tmp_path / "output").glob(".*.tmp")), process)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert process.is_alive()  # it finishes its save
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == -signal.SIGINT


@pytest.mark.parametrize("file", [BEST, LAST])
def test_a_kill_between_best_and_last_changes_nothing(whole, tmp_path, monkeypatch, file):
    train_until(monkeypatch, tmp_path, file, records(whole)[-1]["best_step"])
    assert train_here(*RUN, *places(tmp_path)) == 0
    assert_same_run(tmp_path, whole)


def test_streamed_run_ends_as_the_uninterrupted_one(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", sizes=((20, 30),), per_class=20)
    words = [*RUN, "--dataset", "imagefolder", "--data_dir", tmp_path / "data", "--memory_limit", 0, "--num_workers", 0]
    words += ["--num_steps", 12]
    assert train_here(*words, *places(tmp_path / "whole")) == 0
    train_until(monkeypatch, tmp_path / "parts", LAST, 6, words)
    assert train_here(*words, *places(tmp_path / "parts")) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_run_goes_on_where_a_scaler_is_needed_now(begun, monkeypatch):
    """As one with --fp16 that began on a CPU and continues on a GPU."""
    monkeypatch.setattr(train, "make_scaler", lambda *args: torch.amp.GradScaler("cpu"))
    assert train_here(*RUN, *places(begun)) == 0
    assert checkpoint.read_file(begun / "output" / LAST)["scaler"]["scale"] > 1


# ---------------------------------------------------------------- when a run saves


class Clock:
    """In the place of the module `time`: only steps and saves take time."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "flags, step_takes, save_takes, expected",
    [
        # at evaluations, but a save of 2 s waits for 40 s: it takes a twentieth of the time at most
        ("--eval_every 1", 10, 2, [1, 6, 11, 12]),
        ("--eval_every 1", 10, 0, list(range(1, 13))),
        # without evaluations, when the last save is more than 5 minutes old
        ("--eval_every 99", 100, 2, [4, 8, 12]),
        # and saves may take long, with evaluations too
        ("--eval_every 1", 100, 60, [1, 5, 9, 12]),
        ("--eval_every 99 --save_every 5", 1, 60, [5, 10, 12]),
    ],
)
def test_when_it_saves_and_the_best_is_never_behind(tmp_path, monkeypatch, flags, step_takes, save_takes, expected):
    clock, saved, kept = Clock(), [], []
    save, update, record = checkpoint.save, train.Trainer.update, RunLog.record

    def save_slowly(path, obj, *more):
        save(path, obj, *more)
        if path.name == LAST:
            clock.now += save_takes
            saved.append(obj["step"])

    def step_slowly(trainer, batches):
        clock.now += step_takes
        return update(trainer, batches)

    def look(log, **values):
        record(log, **values)
        if values["event"] == "eval":
            best = checkpoint.read_file(tmp_path / "output" / BEST)
            kept.append((values["best"], best["accuracy"], values["accuracy"], values["step"], best["step"]))

    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(checkpoint, "save", save_slowly)
    monkeypatch.setattr(train.Trainer, "update", step_slowly)
    monkeypatch.setattr(RunLog, "record", look)
    words = [*SHORT, "--num_steps", 12, "--lr", 0.1, *flags.split(), *places(tmp_path)]
    assert train_here(*words) == 0
    assert saved == expected
    best, best_step = -1.0, 0
    for logged, on_disk, accuracy, step, step_on_disk in kept:
        best, best_step = (accuracy, step) if accuracy > best else (best, best_step)
        assert logged == on_disk == best and step_on_disk == best_step


# ---------------------------------------------------------------- damaged files


def test_every_flipped_or_missing_byte_is_noticed_or_changes_nothing(tmp_path):
    path, chance, noticed = tmp_path / "last.bin", random.Random(0), set()
    state = {"model": {"weight": torch.randn(6, 6)}, "step": 3, "best": 0.5}
    checkpoint.save(path, state)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
        try:
            torch.testing.assert_close(checkpoint.read_file(path), state, rtol=0, atol=0)
        except UserError as error:
            assert "last.bin: " in str(error)
            noticed.add(at)
    weight = state["model"]["weight"].numpy().tobytes()
    assert {*range(whole.index(weight), whole.index(weight) + len(weight))} <= noticed
    for end in [*range(0, len(whole), 7), *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="last.bin: "):
            checkpoint.read_file(path)


def test_flipped_bit_of_the_best_weights_is_noticed(whole, tmp_path):
    path = tmp_path / BEST
    shutil.copy(whole / "output" / BEST, path)
    right = torch.load(path, weights_only=True)["model"]
    data = bytearray(path.read_bytes())
    data[data.index(right["blocks.1.mlp.fc1.weight"].numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(data)
    wrong = torch.load(path, weights_only=True)["model"]  # torch itself takes it for right
    assert not torch.equal(wrong["blocks.1.mlp.fc1.weight"], right["blocks.1.mlp.fc1.weight"])
    with pytest.raises(UserError, match="damaged, the checksum of .* is wrong"):
        eval.load_run(path, "cpu")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "missing"])
def test_damaged_last_gives_way_to_the_one_before(whole, begun, capsys, damage):
    last = begun / "output" / LAST
    data = last.read_bytes()
    if damage == "missing":  # a crash between the two renames of a save
        last.unlink()
    else:
        weight = checkpoint.read_file(last)["model"]["blocks.1.mlp.fc1.weight"]
        middle = data.index(weight.numpy().tobytes()) + 1000
        flipped = data[:middle] + bytes([data[middle] ^ 8]) + data[middle + 1 :]
        last.write_bytes({"flipped": flipped, "truncated": data[:-1], "empty": b""}[damage])
    assert train_here(*RUN, *places(begun)) == 0
    out = capsys.readouterr().out
    assert f"{last} is damaged or missing; {last.with_name(PREVIOUS)} takes its place" in out
    assert f"Resuming {ID} after step 12 of 24" in out
    assert_same_run(begun, whole)


def test_both_damaged_say_the_way_out(begun):
    for name in (LAST, PREVIOUS):
        (begun / "output" / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match=f"{LAST} and .*{PREVIOUS}: damaged.*--overwrite"):
        train_here(*RUN, *places(begun))
    assert (begun / "output" / LAST).read_bytes() == b"nothing"
    assert train_here(*RUN, *places(begun), "--overwrite", "--num_steps", 1) == 0
    assert [record["event"] for record in records(begun)] == ["start", "eval", "end"]


@pytest.mark.parametrize("text", [None, "", '{"event": "end"}\n'])
def test_lost_settings_say_the_way_out(begun, text, capsys):
    log = begun / "output" / f"{ID}.jsonl"
    log.unlink() if text is None else log.write_text(text)
    lacks = f"{ID}.jsonl: lacks the run's settings; bring it back, or --overwrite"
    for words in ([], ["--extend", "--num_steps", 30]):
        with pytest.raises(UserError, match=lacks):
            train_here(*RUN, *places(begun), *words)
    capsys.readouterr()
    assert train_here(*RUN, *places(begun), "--dry_run") == 0  # of a sweep, one such log stops no other run
    assert "24 steps; would be refused: " in (out := capsys.readouterr().out) and lacks in out


def test_damaged_log_may_be_overwritten(begun, capsys):
    (begun / "output" / f"{ID}.jsonl").write_text("{\n{}\n")
    assert train_here(*RUN, *places(begun), "--dry_run") == 0
    assert "line 1 is no JSON object; move the file away" in capsys.readouterr().out
    assert train_here(*RUN, *places(begun), "--overwrite", "--num_steps", 1) == 0


def test_deleting_removes_every_file_but_the_lock(begun):
    (begun / "output" / f".{LAST}.tmp").touch()
    (begun / "output" / "other.bin").touch()
    RunFiles(begun / "output", begun / "logs", ID).delete()
    assert {*os.listdir(begun / "output")} == {"other.bin", LOCK} and not os.listdir(begun / "logs")


# ---------------------------------------------------------------- one process a run


def test_second_process_is_refused_and_the_first_undisturbed(start, whole, tmp_path, capsys):
    words = [*RUN, *places(tmp_path)]
    first = start(*words, pause=1)
    wait_for((tmp_path / "output" / LAST).exists, first)
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=f"run {ID} is running already .*, process {first.pid}\\)"):
            train_here(*words, *more)
    assert first.is_alive()
    first.kill()  # its lock goes with it
    assert end_of(first) == (-signal.SIGKILL, "")
    assert_goes_on(tmp_path, whole, capsys)


def test_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def lockf(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert train_here(*SHORT, "--num_steps", 1, *places(tmp_path)) == 0
    assert "no lock (No locks available), so don't start this run twice" in capsys.readouterr().err


# ---------------------------------------------------------------- full, read-only and vanished folders


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def assert_one_line(process: BaseProcess, *expected: str) -> None:
    status, error = end_of(process)
    assert status == 2 and error.count("\n") == 1 and error.startswith("train.py: error: "), error
    assert all(part in error for part in expected), error


def test_full_disk_leaves_the_last_save(start, whole, begun, capsys):
    before = files(begun / "output")
    largest = min(map(len, before.values())) // 2
    assert_one_line(start(*RUN, *places(begun), largest=largest), ".bin: cannot be written (File too large)")
    assert files(begun / "output") == before and hidden(begun / "output") == [LOCK]
    assert_goes_on(begun, whole, capsys)


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


def test_full_and_read_only_file_system(start, whole, small_disk, tmp_path, capsys):
    words = [*RUN, "--output_dir", small_disk / "output", "--log_dir", tmp_path / "logs"]
    assert_one_line(start(*words), "cannot be written (No space left on device)")
    assert hidden(small_disk / "output") == [LOCK]
    step = checkpoint.read_file(small_disk / "output" / LAST)["step"]
    before = files(small_disk / "output")
    mount("-o", "remount,ro,size=20m", small_disk)
    assert_one_line(start(*words), "is no folder to write into")
    assert files(small_disk / "output") == before
    mount("-o", "remount,rw", small_disk)
    assert train_here(*words) == 0
    assert f"Resuming {ID} after step {step} of 24" in capsys.readouterr().out
    assert_same_run(small_disk, whole)


@pytest.mark.parametrize("which", ["output", "logs"])
def test_folder_removed_in_mid_run(start, tmp_path, which):
    process = start(*RUN, *places(tmp_path), "--num_steps", 5000, pause=0.01)
    wait_for((tmp_path / "output" / PREVIOUS).exists, process)
    shutil.move(tmp_path / which, tmp_path / "gone")
    assert_one_line(process, str(tmp_path / which), "No such file or directory")
    output = tmp_path / ("gone" if which == "output" else "output")
    assert checkpoint.read_last(output / LAST, output / PREVIOUS)[0]
    if which == "logs":
        assert hidden(output) == [LOCK]


# ---------------------------------------------------------------- not finite


@pytest.fixture
def tiny_run(tmp_path):
    """`tiny_run(*flags)` -> a Trainer in this process, with its batches, ready for `update`."""

    def make(*flags):
        args = parse(*SHORT, "--num_steps", 8, "--memory_limit", 1, *flags, *places(tmp_path))
        trainer = train.Trainer(args, *train.prepare(args))
        return trainer, trainer.batches()

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
    with pytest.raises(NonFinite, match="not finite at step 3"):
        run.check_finite()


def test_without_a_scaler_an_infinite_gradient_stops(tiny_run):
    run, batches = tiny_run()
    run.model.blocks[0].mlp.fc1.weight.register_hook(lambda grad: grad * float("inf"))
    run.update(batches)
    with pytest.raises(NonFinite, match="not finite at step 1, learning rate 0.02.*; nothing was saved"):
        run.check_finite()


def test_what_is_not_finite_is_not_saved(tiny_run):
    run, batches = tiny_run()
    run.update(batches)
    with torch.no_grad():
        run.model.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    run.update(batches)
    for write in (run.save_last, run.validate):
        with pytest.raises(NonFinite, match="not finite at step 2"):
            write()
    assert not list(run.files.folder.iterdir())


def test_stopped_run_names_the_module_when_called_again(tmp_path, capsys):
    words = [*SHORT, "--num_steps", 20, "--save_every", 1, "--lr", 1e30, "--max_grad_norm", 0, *places(tmp_path)]
    assert train_here(*words) == 3
    out = capsys.readouterr().out
    assert "Stopped: not finite at step 2, learning rate 9.75" in out and "--detect_anomaly" in out
    last = tmp_path / "output" / LAST
    assert f"{last} is from before" in out and checkpoint.read_file(last)["step"] == 1
    assert train_here(*words, "--detect_anomaly", "--grad_checkpoint") == 3
    out = capsys.readouterr().out
    assert "Resuming" in out and "step 2" in out and "first the output of blocks.0.norm1 (LayerNorm)" in out


def test_module_whose_output_overflows_is_named(tmp_path, capsys):
    model = create_model("ViT-Ti_16", image_size=28, patch_size=7, num_classes=10, **SIZES)
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
    anomaly.found = ""
    model.eval()(torch.full((2, 3), float("nan")))
    assert anomaly.found == ""  # evaluation is not its business


# ---------------------------------------------------------------- BatchNorm over processes

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_batch_statistics_of_several_gpus_are_shared():
    def make(norm: str) -> nn.Module:
        return create_model("ViT-Ti_16", norm, image_size=28, patch_size=7, num_classes=10, **SIZES)

    plain = make("BN")
    synced, notes = dist_util.share_statistics(make("BN"), Processes(GPU, world=2))
    assert notes == ["Batch statistics are those of all processes together"]
    kinds = [type(module) for module in synced.modules()]
    assert kinds.count(nn.SyncBatchNorm) == 5 and nn.BatchNorm1d not in kinds
    synced.load_state_dict(plain.state_dict())
    assert len(dist_util.statistics_of(synced)) == len(dist_util.statistics_of(plain)) == 10
    images = torch.randn(4, 3, 28, 28)
    assert torch.equal(plain.eval()(images), synced.eval()(images))

    same, notes = dist_util.share_statistics(plain, Processes(CPU, world=2))
    assert same is plain and re.match("Batch statistics are each process's own; running .* are averaged", notes[0])
    for model, processes in ((plain, Processes(GPU)), (make("LN"), Processes(GPU, world=2))):
        kinds = [type(module) for module in model.modules()]
        same, notes = dist_util.share_statistics(model, processes)
        assert same is model and notes == [] and [type(module) for module in same.modules()] == kinds


def test_models_without_batchnorm_have_no_statistics():
    words = dict(image_size=16, num_classes=10, patch_size=2, merge_num=(16, 8), merge_layer=(1, 2))
    assert not dist_util.statistics_of(create_model("DEMS-Ti", **SIZES, **words))
