"""The same result with any number of processes, on one node or several, and what happens when one of them is lost."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TINY, call, places, same, torchrun, weights, write_folder
from test_train import ID, records, wait_for

from utils.results import read_board

WORDS = ["--name", "run", *TINY, "--num_steps", 5, "--eval_every", 3, "--dropout", 0]


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
    call("train.py", *words, *places(folder))
    return words, folder


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
    call("train.py", *words, "--gradient_accumulation_steps", 4, *places(tmp_path))
    assert_same_result(tmp_path, folder)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_losses_of_one_and_count_each_image_once(one, tmp_path, processes):
    words, folder = one
    torchrun(processes, *words, *places(tmp_path))
    assert_same_result(tmp_path, folder)
    if processes == 2:
        assert "is finished" in torchrun(processes, *words, *places(tmp_path)).stdout


def test_validation_counts_each_image_once(one):
    words, folder = one
    path = folder / "output" / f"{ID}_checkpoint.bin"
    out = torchrun(2, *words, "-v", "--load_model_dir", path).stdout
    assert re.search(r"Valid Accuracy: \d\.\d+ \(\d/7\)", out), out
    assert out.splitlines()[-1] == call("train.py", *words, "-v", "--load_model_dir", path).stdout.splitlines()[-1]


def launch(*words, options=(), **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command += [*map(str, options), str(ROOT / "train.py"), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def workers(agent: subprocess.Popen) -> list[int]:
    """Process ids of torchrun's children."""
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def rank(pid: int) -> str:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((word[5:].decode() for word in environment if word.startswith(b"RANK=")), "")


def kill_rank(agent: subprocess.Popen, wanted: str) -> None:
    os.kill(next(pid for pid in workers(agent) if rank(pid) == wanted), signal.SIGKILL)


def test_lost_process_ends_all_or_all_start_anew(tmp_path):
    local = ("--rdzv-endpoint", "localhost:0")
    words = ["--name", "run", *TINY, "--num_steps", 150, "--eval_every", 50, "--save_every", 5]
    torchrun(2, *words, *places(tmp_path / "whole"))
    again = [*words, *places(tmp_path / "killed")]
    log = tmp_path / "killed" / "output" / f"{ID}.txt"

    agent = launch(*again, options=local)
    wait_for(log.with_name(f"{ID}_last.bin").exists, agent)
    kill_rank(agent, "0")
    out = agent.communicate(timeout=120)[0]
    assert agent.returncode == 1 and not workers_left(again), out

    agent = launch(*again, options=[*local, "--max-restarts", 1])
    wait_for(lambda: "Resuming" in log.read_text(), agent)
    kill_rank(agent, "1")
    out = agent.communicate(timeout=240)[0]
    assert agent.returncode == 0 and out.count("Resuming") == 2 and "End Training" in log.read_text(), out
    for name in (f"{ID}_last.bin", f"{ID}_checkpoint.bin"):
        assert same(weights(log.with_name(name)), weights(tmp_path / "whole" / "output" / name))
    assert [r.get("accuracy") for r in records(tmp_path / "killed")] == [
        r.get("accuracy") for r in records(tmp_path / "whole")
    ]


def workers_left(words: list) -> list[str]:
    """Command lines of processes that still work on a run."""
    folder = str(words[-1])
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [text] if folder in (text := path.read_text()) else []
        except OSError:  # it has ended
            continue
    return found


def test_mistake_that_one_process_meets_is_told(tmp_path):
    write_folder(tmp_path / "data", per_class=1, classes=("cat", "dog"), splits=("train", "test"))
    broken = tmp_path / "data" / "train" / "dog" / "000.png"
    broken.write_bytes(broken.read_bytes()[:-200])
    words = ["--dataset", "imagefolder", "--data_dir", tmp_path / "data", "--memory_limit", 0, "--num_workers", 0]
    for seed in (1, 2, 3, 4):  # so that either process has met it
        words_of_seed = [*WORDS, *words, "--train_batch_size", 2, "--seed", seed, *places(tmp_path / str(seed))]
        agent = launch(*words_of_seed, options=("--rdzv-endpoint", "localhost:0"))
        out = agent.communicate(timeout=120)[0]
        assert agent.returncode == 1 and f"{broken}: not a readable image" in out, out


def test_locked_run_refuses_all_processes(tmp_path):
    words = [*WORDS, "--num_steps", 5000, *places(tmp_path)]
    first = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, words)], cwd=ROOT)
    wait_for((tmp_path / "output" / f"{ID}_last.bin").exists, first)
    agent = launch(*words, "--overwrite", options=["--rdzv-endpoint", "localhost:0"])
    out = agent.communicate(timeout=120)[0]
    assert agent.returncode == 1 and out.count("is running already") == 1, out
    assert set(re.findall(r"exitcode  : (-?\d+)", out)) <= {"2", "-15"} and 'train.py", line' not in out, out
    assert first.poll() is None
    first.terminate()
    assert first.wait(60) == 143


STUCK = """
import sys, time
from datetime import timedelta
sys.path.insert(0, {root!r})
from utils import dist_util
processes = dist_util.start("cpu", timeout=timedelta(seconds=2))
assert dist_util.largest(processes.rank) == 1
with dist_util.first_on_each_node(processes):
    if processes.main:
        time.sleep(4)  # longer than an exchange may take
if not processes.main:
    time.sleep(600)
try:
    dist_util.largest(0)
except RuntimeError as error:
    assert dist_util.is_lost(error), error
    print("the other is stuck", flush=True)
    sys.exit(7)
"""


def test_stuck_process_is_not_waited_for_but_the_first_is(tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(tmp_path / "stuck.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "the other is stuck" in done.stdout, (done.stdout, done.stderr)


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_two_nodes_through_torchruns_rendezvous(one, tmp_path):
    words, folder = one
    options = ["--nnodes", 2, "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "two", "--local-addr"]
    words = [*words, *places(tmp_path)]
    nodes = [launch(*words, options=[*options, "localhost", "--nproc_per_node", 1]) for _ in range(2)]
    outs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert sum(out.count("Best Accuracy") for out in outs) == 1
    assert_same_result(tmp_path, folder)


@pytest.mark.slow
def test_sync_bn_on_cpu_is_refused(one, tmp_path):
    words, _ = one
    agent = launch(
        *words, "--norm_type", "BN", "--sync_bn", *places(tmp_path), options=["--rdzv-endpoint", "localhost:0"]
    )
    out = agent.communicate(timeout=120)[0]
    assert agent.returncode == 1 and out.count("--sync_bn needs CUDA, this is cpu") == 1, out
