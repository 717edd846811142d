"""The same result with any number of processes, on one node or several, and what happens when one of them is lost."""

import contextlib
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers import FORKS, ID, ROOT, TINY, in_process, places, run, same, wait_for, weights, write_folder

import train as script
from utils import cli, dist_util, options
from utils.results import read_board
from utils.run_files import read_records

WORDS = ["--name", "run", *TINY, "--num_steps", 5, "--eval_every", 3, "--dropout", 0]


# ---------------------------------------------------------------- processes with torchrun's environment, at once


def member(rank: int, world: int, port: int, out: Path, script, *words) -> None:
    """Become process `rank` of a `script` of the project, or of a function; for processes of FORKS."""
    env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in env.items()} | {"MASTER_ADDR": "localhost"})
    torch.set_num_threads(1)  # as torchrun has it
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    if callable(script):
        script(*words)
    sys.argv = [script, *words]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class World:
    """Processes of a script, or of a function, each of which writes what it says into a file of `folder`."""

    def __init__(self, processes: int, folder: Path, script, *words):
        port, words = free_port(), [str(word) for word in words]
        self.outs = [folder / f"out_{rank}" for rank in range(processes)]
        args = [(rank, processes, port, self.outs[rank], script, *words) for rank in range(processes)]
        self.processes = [FORKS.Process(target=member, args=each) for each in args]
        for process in self.processes:
            process.start()

    def end(self, *status: int, seconds: float = 120) -> list[str]:
        """What each has said, once they have ended with a status each."""
        limit = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, limit - time.monotonic()))
        ended = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()  # what is stuck
        outs = [out.read_text() for out in self.outs]
        assert ended == list(status), (ended, outs)
        return outs


def train(processes: int, folder: Path, *words) -> list[str]:
    """What each process of a run has said, which ends well; its files are in `folder`."""
    folder.mkdir(exist_ok=True)
    return World(processes, folder, "train.py", *words, *places(folder)).end(*processes * [0])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An image folder with 16 training and 7 test images, 4 and 3 of a class."""
    folder = tmp_path_factory.mktemp("photos")
    write_folder(folder, sizes=[(20, 30), (28, 28)], per_class=8, splits=["train"])
    write_folder(folder, sizes=[(20, 30), (28, 28)], per_class=4, splits=["test"])
    (folder / "test" / "dog" / "003.png").unlink()
    return folder


@pytest.fixture(scope="module")
def one(photos, tmp_path_factory):
    """The flags, and a run with them of one process."""
    words = [*WORDS, "--dataset", "imagefolder", "--data_dir", photos, "--train_batch_size", 8]
    folder = tmp_path_factory.mktemp("one")
    run("train.py", *words, *places(folder))
    return words, folder


def records(folder: Path) -> list[dict]:
    return read_records(folder / "output" / f"{ID}.jsonl")[0]


def losses(folder: Path) -> list[float]:
    """The training loss of every step."""
    steps, values = read_board(folder / "logs" / ID, "train/loss")
    assert steps == [1, 2, 3, 4, 5]
    return values


def assert_same_result(folder: Path, one: Path) -> None:
    assert losses(folder) == pytest.approx(losses(one), rel=1e-5)
    ours, theirs = ([r for r in records(part) if r["event"] == "eval"] for part in (folder, one))
    assert [r["seen"] for r in ours] == [7, 7] and [r["correct"] for r in ours] == [r["correct"] for r in theirs]
    for name in ("loss", "train_loss"):
        assert [r[name] for r in ours] == pytest.approx([r[name] for r in theirs], rel=1e-5)


def test_four_accumulation_steps(one, tmp_path):
    words, folder = one
    run("train.py", *words, "--gradient_accumulation_steps", 4, *places(tmp_path))
    assert_same_result(tmp_path, folder)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_losses_of_one_and_count_each_image_once(one, tmp_path, processes):
    words, folder = one
    first, *others = train(processes, tmp_path, *words)
    assert "End Training!" in first and not any(others)
    assert records(tmp_path)[0]["processes"] == processes
    assert_same_result(tmp_path, folder)
    first, *others = train(processes, tmp_path, *words)
    assert first.startswith(f"{ID} is finished: ") and not any(others)


def cut_off(*words: str) -> None:
    """train.py, but that it ends without a word after its first save."""
    save = script.Trainer.save_last

    def once(self) -> None:
        save(self)
        os._exit(9)

    script.Trainer.save_last = once
    script.main(options.parse_train_args(list(words)))


def test_resumed_processes_give_the_losses_of_one(one, tmp_path):
    words, folder = one
    World(2, tmp_path, cut_off, *words, "--save_every", 2, *places(tmp_path)).end(9, 9)
    first, _ = train(2, tmp_path, *words)
    assert "Resuming" in first
    assert_same_result(tmp_path, folder)


def test_validation_counts_each_image_once(one, tmp_path):
    words, folder = one
    words = [*words, "-v", "--load_model_dir", folder / "output" / f"{ID}_checkpoint.bin"]
    first, other = train(2, tmp_path, *words)
    assert re.search(r"Valid Accuracy: \d\.\d+ \(\d/7\)", first) and not other
    assert first.splitlines()[-1] == in_process("train.py", *words).stdout.splitlines()[-1]
    assert not (tmp_path / "output").exists()


def breaking(path: str, size: str, *words: str) -> None:
    """train.py, but that a file is cut off once all are loaded."""
    begin = script.Trainer.begin_or_resume

    def then_break(self) -> None:
        begin(self)
        os.truncate(path, int(size))

    script.Trainer.begin_or_resume, sys.argv = then_break, ["train.py"]
    args = options.parse_train_args(list(words))
    cli.run_main(script.main, args, dist_util.explain, dist_util.stop)


def test_mistake_that_one_process_meets_is_told(tmp_path):
    write_folder(tmp_path / "data", per_class=1)
    broken = tmp_path / "data" / "train" / "dog" / "000.png"
    whole = broken.read_bytes()
    words = [*WORDS, "--dataset", "imagefolder", "--data_dir", tmp_path / "data", "--memory_limit", 0]
    words += ["--no_cache", "--num_workers", 0, "--train_batch_size", 2, *places(tmp_path)]
    told = set()
    for seed in range(1, 9):  # until either process has met it
        broken.write_bytes(whole)
        outs = World(2, tmp_path, breaking, broken, len(whole) - 200, *words, "--seed", seed).end(2, 2)
        found = [rank for rank, out in enumerate(outs) if f"{broken}: not a readable image" in out]
        assert len(found) == 1 and outs[found[0]].splitlines()[-1].startswith("train.py: error: "), outs
        assert not any("Traceback" in out for out in outs), outs
        told.update(found)
        if told == {0, 1}:
            return
    raise AssertionError(f"only process {told} has met it")


def test_locked_run_refuses_all_processes(tmp_path):
    words = [*WORDS, "--num_steps", 5000, "--save_every", 1, *places(tmp_path)]
    first = World(1, tmp_path, "train.py", *words)
    wait_for((tmp_path / "output" / f"{ID}_last.bin").exists, first.processes[0])
    (tmp_path / "others").mkdir()
    holder, other = World(2, tmp_path / "others", "train.py", *words, "--overwrite").end(2, 2)
    assert holder.count("\n") == 1 and f"is running already ({socket.gethostname()}, process " in holder
    assert not other and first.processes[0].is_alive()
    first.processes[0].terminate()
    (said,) = first.end(143)
    assert "Stopped by SIGTERM" in said


def stuck() -> None:
    processes = dist_util.start("cpu", timeout=timedelta(seconds=2))
    assert dist_util.largest(processes.rank) == [1]
    with dist_util.first_on_each_node(processes):
        if processes.main:
            time.sleep(3)  # longer than an exchange may take
    if not processes.main:
        time.sleep(600)
    try:
        dist_util.largest(0)
    except RuntimeError as error:
        print(dist_util.explain(error), flush=True)
        os._exit(7)


def test_stuck_process_is_not_waited_for_but_the_first_is(tmp_path):
    world = World(2, tmp_path, stuck)
    world.processes[0].join(60)
    assert world.processes[0].exitcode == 7 and world.processes[1].is_alive(), world.outs[0].read_text()
    assert world.outs[0].read_text().startswith("another process is gone or stuck; the same command goes on")
    world.processes[1].kill()


LONG = ["--name", "run", *TINY, "--num_steps", 120, "--eval_every", 60, "--save_every", 5]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    train(2, folder, *LONG)
    return folder


def assert_same_end(folder: Path, whole: Path) -> None:
    for name in (f"{ID}_last.bin", f"{ID}_checkpoint.bin"):
        assert same(weights(folder / "output" / name), weights(whole / "output" / name))
    ours, theirs = ([r.get("accuracy") for r in records(part)] for part in (folder, whole))
    assert ours == theirs and records(folder)[-1]["event"] == "end"


@pytest.mark.parametrize("lost", [0, 1])
def test_others_end_when_one_is_lost_and_the_same_command_goes_on(whole, tmp_path, lost):
    world = World(2, tmp_path, "train.py", *LONG, *places(tmp_path))
    wait_for((tmp_path / "output" / f"{ID}_last.bin").exists, world.processes[1 - lost])
    world.processes[lost].kill()
    outs = world.end(*((-9, 2) if lost == 0 else (2, -9)))
    # the first process speaks for all
    assert ("train.py: error: another process is gone or stuck; the same" in outs[0]) == (lost == 1), outs
    assert "Traceback" not in "".join(outs) and records(tmp_path)[-1]["event"] != "end"
    assert "Resuming" in train(2, tmp_path, *LONG)[0]
    assert_same_end(tmp_path, whole)


# ---------------------------------------------------------------- torchrun


def launch(*words, options=()) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command += [*map(str, options), str(ROOT / "train.py"), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(agent: subprocess.Popen) -> dict[str, int]:
    """Process ids of torchrun's children, by rank."""
    found = {}
    for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has ended
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {word[5:].decode(): int(pid) for word in words if word.startswith(b"RANK=")}
    return found


def workers_left(folder: Path) -> list[str]:
    """Command lines of processes that still work on a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found += [text] if str(folder) in (text := path.read_text()) else []
    return found


@pytest.mark.slow
def test_torchrun_starts_all_anew_or_ends_all(whole, tmp_path):
    """After the first loss it may restart them, after the second no more; in between they go on from the last save."""
    log, words = tmp_path / "output" / f"{ID}.txt", [*LONG, *places(tmp_path)]
    agent = launch(*words, options=["--rdzv-endpoint", "localhost:0", "--max-restarts", 1])
    wait_for(log.with_name(f"{ID}_last.bin").exists, agent)
    os.kill(workers(agent)["1"], signal.SIGKILL)
    wait_for(lambda: "Resuming" in log.read_text(), agent)
    os.kill(workers(agent)["0"], signal.SIGKILL)
    out = agent.communicate(timeout=120)[0]
    assert agent.returncode == 1 and log.read_text().count("Resuming") == 1 and not workers_left(tmp_path), out
    assert "Resuming" in train(2, tmp_path, *LONG)[0]
    assert_same_end(tmp_path, whole)


@pytest.mark.slow
def test_two_nodes_through_torchruns_rendezvous(one, tmp_path):
    words, folder = one
    options = ["--nnodes", 2, "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "two", "--local-addr"]
    words = [*words, *places(tmp_path)]
    nodes = [launch(*words, options=[*options, "localhost", "--nproc_per_node", 1]) for _ in range(2)]
    outs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert sum(out.count("Best Accuracy") for out in outs) == 1
    assert_same_result(tmp_path, folder)
