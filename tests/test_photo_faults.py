"""What can befall a folder of photos in training, with real mounts and signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ID, ROOT, TINY, children, in_process, places, run, wait_for, write_folder
from PIL import Image

WORDS = ["--name", "run", *[word for word in TINY if word not in ("--dataset", "fashionmnist-mini")]]


def mounting() -> list[str]:
    """How to run a command in a namespace of mounts of its own."""
    for command in (["unshare", "-m"], ["unshare", "-Urm"]):
        mount = [*command, "sh", "-c", "mount -t tmpfs none /mnt"]
        if shutil.which("unshare") and subprocess.run(mount, capture_output=True).returncode == 0:
            return command
    return []


UNSHARE = mounting()
needs_mounts = pytest.mark.skipif(not UNSHARE, reason="no mounts of one's own are allowed here (unshare -m)")


@pytest.fixture
def photos(tmp_path):
    write_folder(tmp_path / "photos", sizes=[(120, 130), (140, 112)], splits=["."], per_class=10)
    return tmp_path / "photos"


def words(photos, *more) -> list[str]:
    more = ["--data_dir", photos, "--train_batch_size", 4, "--num_steps", 2, *places(photos.parent), *more]
    return [*WORDS, *map(str, more)]


def mounted(mounts: str, *words) -> subprocess.CompletedProcess:
    command = [*UNSHARE, "sh", "-ec", f'{mounts}; exec "$@"', "sh", sys.executable, str(ROOT / "train.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@needs_mounts
def test_read_only_data(photos):
    done = mounted(f"mount --bind {photos} {photos}; mount -o remount,ro,bind {photos}", *words(photos))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (cache,) = (photos.parent / "output").glob("photos-*.train.cache.npz")
    assert f"cache {cache}, 0.9 MB ({photos} cannot be written)" in done.stdout
    assert not list(photos.glob("*.npz"))


@needs_mounts
@pytest.mark.slow
@pytest.mark.parametrize("size, batch, workers", [(1, 64, 2), (64, 512, 2)])
def test_small_shared_memory(photos, size, batch, workers):
    more = ["--memory_limit", 0, "--num_workers", workers, "--train_batch_size", batch]
    done = mounted(f"mount -t tmpfs -o size={size}M none /dev/shm", *words(photos, *more))
    assert done.returncode == 0, done.stderr
    assert f"/dev/shm has {size} MB, too few" in done.stderr and done.stderr.count("\n") == 1
    assert "End Training!" in done.stdout


def wait_for_steps(process, photos, steps: int) -> None:
    log = photos.parent / "output" / f"{ID}.txt"
    wait_for(lambda: log.exists() and log.read_text().count("Global Steps") >= steps, process)


def streamed(photos, *more) -> list[str]:
    return words(photos, "--memory_limit", 0, "--num_workers", 2, "--num_steps", 100_000, "--eval_every", 5, *more)


def test_a_killed_worker_is_one_line(start, photos):
    process = start(*streamed(photos, "--eval_every", 1000, "--save_every", 2))
    last = photos.parent / "output" / f"{ID}_last.bin"
    wait_for(lambda: last.exists() and children(process.pid), process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    process.join(30)
    error = process.error.read_text()
    assert process.exitcode == 2 and error.count("\n") == 1, error
    assert "a process that decodes images was ended by the system" in error and "the same command goes on" in error


@pytest.mark.parametrize(
    "signum, workers", [(signal.SIGTERM, 2), pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow), (signal.SIGINT, 0)]
)
def test_a_signal_acts_while_data_stalls(start, photos, signum, workers):
    process = start(*streamed(photos, "--num_workers", workers))
    wait_for_steps(process, photos, 1)
    for path in photos.rglob("*.png"):
        path.unlink()
        os.mkfifo(path)  # opened, it waits for a writer
    time.sleep(1)
    os.kill(process.pid, signum)
    process.join(30)
    assert process.exitcode == 128 + signum, process.error.read_text()
    assert process.error.read_text() == ""
    log = (photos.parent / "output" / f"{ID}.txt").read_text()
    assert f"Signal {signum} while waiting for data, after step" in log
    assert (photos.parent / "output" / f"{ID}_last.bin").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken, reason, refusal",
    [
        (False, "No such file or directory", "dog 8 -> 7 images"),
        (True, "cannot identify image file", "not a readable image"),
    ],
)
def test_a_file_that_vanishes_or_breaks_in_mid_run(broken, reason, refusal, start, photos):
    process = start(*streamed(photos))
    wait_for_steps(process, photos, 1)
    gone = photos / "dog" / "003.png"
    gone.rename(photos.parent / "kept.png")
    if broken:
        gone.write_bytes(b"no image")
    process.join(60)
    error = process.error.read_text()
    assert process.exitcode == 2 and error.count("\n") == 1, error
    assert f"{gone}: not a readable image ({reason}" in error
    steps = (photos.parent / "output" / f"{ID}.txt").read_text().count("Global Steps")
    refused = run("train.py", *streamed(photos), check=2)
    assert refusal in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    assert broken or "bring them back, or start anew" in refused.stderr
    (photos.parent / "kept.png").rename(gone)
    again = start(*streamed(photos))
    wait_for_steps(again, photos, steps + 1)


# ---------------------------------------------------------------- a run remembers its data


@pytest.fixture
def begun(photos):
    """A finished run, and what the same command says after a change."""
    run("train.py", *words(photos, "--test_fraction", 0.5))

    def again(*more) -> str:
        done = in_process("train.py", *words(photos, "--test_fraction", 0.5, *more))
        assert done.stderr.count("\n") <= 1
        return done.stderr or done.stdout

    assert "is finished" in again()
    return again


def test_renamed_and_added_classes_on_resume(begun, photos):
    (photos / "cat").rename(photos / "zebra")
    said = begun()
    assert "exists with other images: class cat is gone, class zebra is new;" in said and "--overwrite" in said
    assert "another --name, with --pretrained_dir " in said  # --load_model_dir wants the same classes
    (photos / "zebra").rename(photos / "cat")
    assert "is finished" in begun()
    shutil.copytree(photos / "cat", photos / "ant")
    assert "other images: class ant is new" in begun()


def test_swapped_and_changed_files_on_resume(begun, photos):
    a, b, other = photos / "cat" / "000.png", photos / "cat" / "001.png", photos / "other.png"
    a.rename(other)
    b.rename(a)
    other.rename(b)
    assert "cat other names or sizes of files" in begun()
    a.rename(other)
    b.rename(a)
    other.rename(b)
    assert "is finished" in begun()
    Image.new("RGB", (30, 30)).save(a)
    assert "cat other names or sizes of files" in begun()
    os.utime(b)
    a.unlink()
    assert "cat 5 -> 4 images" in begun()


def test_a_run_without_fingerprint_goes_on(begun, photos):
    """Of an older version."""
    log = photos.parent / "output" / f"{ID}.jsonl"
    first, *rest = log.read_text().splitlines()
    start = {name: value for name, value in json.loads(first).items() if name not in ("files", "classes")}
    log.write_text("\n".join([json.dumps(start), *rest]) + "\n")
    (photos / "cat" / "000.png").unlink()
    assert "is finished" in begun()


@pytest.mark.parametrize(
    "flags, goes_on",
    [("", True), ("--norm_type BN", False), ("--norm_type Rescale", False), ("--stem residual --patch_size 4", False)],
)
def test_other_accumulation_goes_on_unless_norms_count_passes(photos, flags, goes_on):
    own = words(photos, *flags.split())
    run("train.py", *own)
    done = in_process("train.py", *own, "--gradient_accumulation_steps", "2")
    assert ("is finished" in done.stdout) == goes_on, done.stderr
    more = in_process("train.py", *own, "--num_steps", "4", "--extend", "--gradient_accumulation_steps", "2")
    assert ("Resuming" in more.stdout and "End Training!" in more.stdout) == goes_on, more.stderr
    assert goes_on or "gradient_accumulation_steps 1 -> 2" in done.stderr


def test_a_folder_that_has_changed_is_said_where_test_images_are_drawn(begun, photos):
    """Another name may put an image that was trained on among the test images."""
    checkpoint = photos.parent / "output" / f"{ID}_checkpoint.bin"
    assert "perhaps trained on" not in run("eval.py", checkpoint).stderr
    cat = photos / "cat"
    (cat / "2025").mkdir()
    for path in list(cat.glob("*.png")):
        path.rename(cat / "2025" / path.name)
    said = f"{ID}: perhaps trained on some of the test images; changed since: cat\n"
    assert said in run("eval.py", checkpoint).stderr
    anew = words(photos, "--test_fraction", 0.5, "--name", "anew", "--pretrained_dir", checkpoint)
    assert f"{checkpoint}: perhaps trained on some of the test images" in run("train.py", *anew).stdout
    state = torch.load(checkpoint, weights_only=True)
    del state["files"]  # of an older version
    torch.save(state, checkpoint)
    assert "perhaps trained on" not in run("eval.py", checkpoint).stderr
