"""Readers of files that others wrote, on mutated files: an answer or a UserError, soon, in little memory, no code run.

Each reader gets damaged copies of good files: bits flipped, bytes deleted, inserted and zeroed, ends cut off, parts of
other files spliced in, numbers of headers at their extremes. The same mutations come every time (seed 0).
"""

import contextlib
import gzip
import io
import os
import pickle
import resource
import signal
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SIZES, TINY, in_process, places, write_cifar10, write_folder, write_google_npz
from PIL import Image

import eval
import plot
from models import create_model
from utils import checkpoint, options, readers, results
from utils.cli import UserError
from utils.log_util import already_done

RUN = "run_ViT-Ti_16_norm_LN_fp_False_img_28_pretrain_F"
CPU = torch.device("cpu")
MODEL = dict(image_size=28, patch_size=7, num_classes=10, **SIZES)
SECONDS = 20  # a reader that takes longer hangs
GROWTH = 2**30  # bytes that a reader of these small files may take


# --- mutations ---

EXTREMES = [struct.pack(form, value) for form in ("<I", ">I", "<Q", ">Q") for value in (0, 1, 2**31 - 1, 2**32 - 1)]
EXTREMES += [b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"9" * 12, b"-1", b"1e999", b"NaN", b"null", b'"x"', b"[]", b"{}"]


def mutate(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """One to four changes."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        size = len(data)
        head = min(size, 200) if rng.random() < 0.3 else size  # headers are short, and matter most
        i = int(rng.integers(head)) if head else 0
        length = int(rng.integers(1, 1 + min(64, size + 1)))
        match rng.integers(8):
            case 0 if size:
                data[i] ^= 1 << int(rng.integers(8))
            case 1:
                data[i : i + length] = b""
            case 2:
                data[i:i] = rng.bytes(length)
            case 3:
                data[i : i + length] = bytes(min(length, size - i))
            case 4 if rng.random() < 0.3:
                del data[i:]
            case 5:
                j = int(rng.integers(len(other)))
                data[i : i + length] = other[j : j + length]
            case 6:
                extreme = EXTREMES[rng.integers(len(EXTREMES))]
                data[i : i + len(extreme)] = extreme
            case 7 if size:
                data[i] = int(rng.integers(256))
    return bytes(data)


def mutate_members(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Mutate a file of a zip archive, and write the archive anew, so that its checksums hold."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = names[rng.integers(len(names))]
        chosen = next((n for n in names if n.endswith("data.pkl")), chosen) if rng.random() < 0.5 else chosen
        for name in names:
            content = old.read(name)
            new.writestr(name, mutate(content, rng, other) if name == chosen else content)
    return out.getvalue()


def mutate_gzip(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    return gzip.compress(mutate(gzip.decompress(data), rng, other), compresslevel=1)


# --- guards ---


@contextlib.contextmanager
def guarded(what: str):
    """Fail on a hang, or on much more memory than the process had before."""

    def hang(signum, frame):
        raise BaseException(f"{what}: no answer within {SECONDS} seconds")  # noqa: TRY002, no reader may catch it

    before = signal.signal(signal.SIGALRM, hang)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    assert grown < GROWTH, f"{what}: took {grown / 2**20:.0f} MiB"


def fuzz(name: str, path: Path, read, n: int, mutators=(mutate,), other: bytes = b"", seed: int = 0) -> dict[str, int]:
    """Read `n` mutations of a file; {'answered': ..., 'refused': ...}."""
    good, counts = path.read_bytes(), {"answered": 0, "refused": 0}
    read()  # as it is, it can be read
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        data = mutators[i % len(mutators)](good, rng, other or good)
        path.write_bytes(data)
        try:
            with guarded(f"{name} {i}"):
                read()
            counts["answered"] += 1
        except UserError as error:
            counts["refused"] += 1
            assert str(error)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{name}, mutation {i} with seed {seed}: {type(error).__name__} {error}") from error
    path.write_bytes(good)
    print(f"fuzz {name}: {n} mutations, {counts}")
    return counts


# --- readers ---


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("good")
    done = in_process("train.py", "--name", "run", *TINY, "--num_steps", 4, "--eval_every", 2, *places(folder))
    assert done.returncode == 0, done.stderr
    return folder / "output"


def case_npz(folder: Path, good: Path):
    path = folder / "weights.npz"
    write_google_npz(path, **SIZES, patch=7, grid=4, classes=10)
    model = create_model("ViT-Ti_16", **MODEL)
    return path, lambda: checkpoint.load_weights(model, path), (mutate, mutate_members)


def case_compressed_npz(folder: Path, good: Path):
    path = folder / "small.npz"
    np.savez_compressed(path, **{"head/kernel": np.ones((64, 10), np.float32), "cls": np.zeros((1, 1, 64))})
    return path, lambda: checkpoint.read_weights(path), (mutate, mutate_members)


def case_pth(folder: Path, good: Path):
    path = folder / "weights.pth"
    torch.save({"model": create_model("ViT-Ti_16", **MODEL).state_dict()}, path)
    model = create_model("ViT-Ti_16", **MODEL)
    return path, lambda: checkpoint.load_weights(model, path), (mutate, mutate_members)


def case_legacy_pth(folder: Path, good: Path):
    path = folder / "legacy.pth"
    state = {"cls_token": torch.zeros(1, 1, 8), "head.weight": torch.ones(4, 8)}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path, lambda: checkpoint.read_weights(path), (mutate,)


def case_safetensors(folder: Path, good: Path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = folder / "weights.safetensors"
    safetensors.save_file(create_model("ViT-Ti_16", **MODEL).state_dict(), path)
    model = create_model("ViT-Ti_16", **MODEL)
    return path, lambda: checkpoint.load_weights(model, path), (mutate,)


def case_checkpoint(folder: Path, good: Path):
    path = folder / f"{RUN}_checkpoint.bin"
    path.write_bytes((good / path.name).read_bytes())

    def read():
        model, run = eval.load_run(str(path), CPU)
        list(eval.eval_augment(run["args"], CPU, run["precision"]).draw(torch.tensor([[9, 9]])))
        model(torch.zeros(1, 3, *model.image_size))

    return path, read, (mutate, mutate_members)


def case_start_from_checkpoint(folder: Path, good: Path):
    path = folder / f"{RUN}_checkpoint.bin"
    path.write_bytes((good / path.name).read_bytes())

    def read():
        args = options.argparse.Namespace(mean=None)
        options.resolve_normalization(args, checkpoint.facts_of(path).get("args"))

    return path, read, (mutate, mutate_members)


def case_folder_cache(folder: Path, good: Path, mutators=(mutate,)):
    write_folder(folder / "photos", sizes=[(9, 7), (5, 8)], per_class=3)
    path, sets = folder / "photos" / "train.cache.npz", []

    def read():
        (sets_, _) = readers.image_folder(folder / "photos", ("train", "test"), 2**30, None)
        source = sets_["train"].source
        sets.append(source.take(torch.arange(6)))
        if mutators == (mutate,):  # damage is noticed, and the images decoded anew; forged checksums are not
            assert torch.equal(sets[0], sets[-1])

    read()
    return path, read, mutators


def case_forged_cache(folder: Path, good: Path):
    return case_folder_cache(folder, good, (mutate_members,))


def case_idx(folder: Path, good: Path):
    raw = folder / "raw"
    raw.mkdir()
    for prefix in ("train", "t10k"):
        images = b"\0\0\x08\3" + struct.pack(">III", 5, 28, 28) + bytes(5 * 784)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1" + struct.pack(">I", 5) + bytes(range(5)))
    return raw / "train-images-idx3-ubyte", lambda: readers.idx_set(raw, ("train", "t10k")), (mutate,)


def case_idx_gz(folder: Path, good: Path):
    path, read, _ = case_idx(folder, good)
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed, read, (mutate, mutate_gzip)


def case_cifar(folder: Path, good: Path):
    write_cifar10(folder, per_file=3)
    args = options.argparse.Namespace(dataset="cifar10")
    return folder / "cifar-10-batches-py" / "data_batch_2", lambda: readers.named(args, folder), (mutate,)


def case_cifar_meta(folder: Path, good: Path):
    write_cifar10(folder, per_file=3)
    args = options.argparse.Namespace(dataset="cifar10")
    return folder / "cifar-10-batches-py" / "batches.meta", lambda: readers.named(args, folder), (mutate,)


def case_recipe(folder: Path, good: Path):
    path = folder / "mine.args"
    path.write_text("# comment\n--name 'a b' --dataset cifar10\n--lr 1e-3 --scale 0.1 1\n--model_type ViT-S_16\n")

    def read():
        error = io.StringIO()
        try:
            with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
                plot.plan([f"@{path}", "--output_dir", str(folder / "output")])
        except SystemExit as end:
            assert (end.code, error.getvalue().count("\n")) in ((2, 1), (0, 0)), error.getvalue()
            raise UserError(error.getvalue()) from None

    return path, read, (mutate,)


def tables(path: Path) -> None:
    found = results.tables(results.read_runs(path.parent))
    for key, rows in found.items():
        results.markdown(*key, rows)
    results.csv_text(found)


def case_jsonl(folder: Path, good: Path):
    path = folder / f"{RUN}.jsonl"
    path.write_bytes((good / path.name).read_bytes())
    return path, lambda: tables(path), (mutate,)


def case_txt(folder: Path, good: Path):
    path = folder / f"{RUN}.txt"
    path.write_bytes((good / path.name).read_bytes())
    return path, lambda: tables(path), (mutate,)


def case_rescalevit_log(folder: Path, good: Path):
    logs = Path(__file__).parent / "data" / "rescalevit_logs"
    source = next(logs.glob("cifar10*pretrain_F.txt"))
    (folder / source.name).write_bytes(source.read_bytes())
    return folder / source.name, lambda: tables(folder / source.name), (mutate,)


def case_log_of_a_run(folder: Path, good: Path):
    """What train.py reads of a log, to know whether the run is finished."""
    path = folder / f"{RUN}.jsonl"
    path.write_bytes((good / path.name).read_bytes())
    args = torch.load(good / f"{RUN}_checkpoint.bin", weights_only=True)["args"] | {"output_dir": str(folder)}

    def read():
        with contextlib.redirect_stdout(io.StringIO()):
            already_done(options.argparse.Namespace(**args))

    return path, read, (mutate,)


def case_image(suffix: str, **how):
    def case(folder: Path, good: Path):
        path = folder / f"image{suffix}"
        pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, **how)

        def read():
            readers.read_image(path)
            readers._size(path)

        return path, read, (mutate,)

    return case


CASES = {name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")}
CASES.pop("image")
for suffix in (".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".ppm"):
    CASES[f"image{suffix}"] = case_image(suffix)
CASES["image_lzw.tif"] = case_image(".tif", compression="tiff_lzw")


@pytest.mark.parametrize("name", CASES)
def test_mutated_files(tmp_path, good, name):
    path, read, mutators = CASES[name](tmp_path, good)
    fuzz(name, path, read, 200, mutators, other=Path(__file__).read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_mutated_files(tmp_path, good, name):
    path, read, mutators = CASES[name](tmp_path, good)
    fuzz(name, path, read, int(os.environ.get("FUZZ", 3000)), mutators, other=Path(__file__).read_bytes(), seed=1)


# --- no code ---


class Call:
    """Pickled, a call of a function."""

    def __init__(self, function, *args):
        self.value = function, args

    def __reduce__(self):
        return self.value


def payloads(canary: Path) -> list:
    import builtins
    import subprocess

    touch = f"open({str(canary)!r}, 'w')"
    return [
        Call(os.system, f"touch {canary}"),
        Call(builtins.exec, touch),
        Call(builtins.eval, touch),
        Call(subprocess.call, ["touch", str(canary)]),
        Call(getattr, Call(__import__, "os"), "system"),
        Call(open, str(canary), "w"),
        Call(os.open, str(canary), os.O_CREAT),
        Call(torch.save, 1, str(canary)),
        Call(np.save, str(canary), 1),
        Call(Path.touch, canary),
    ]


WRAPS = [lambda x: x, lambda x: {"model": x}, lambda x: {"model": {"head.weight": torch.ones(1), "x": [(x,)]}}]


@pytest.mark.parametrize("wrap", range(len(WRAPS)))
def test_no_payload_runs(tmp_path, wrap):
    """Ten calls, in pickles of every protocol, zip records, legacy files, object arrays, and every reader."""
    canary, tried = tmp_path / "ran", 0
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(tmp_path, per_file=3)
    for payload in payloads(canary):
        thing = WRAPS[wrap](payload)
        forms = [pickle.dumps(thing, protocol) for protocol in range(6)]
        for legacy in (True, False):
            buffer = io.BytesIO()
            torch.save(thing, buffer, _use_new_zipfile_serialization=legacy)
            forms.append(buffer.getvalue())
        buffer = io.BytesIO()
        np.savez(buffer, cls=np.array([thing], dtype=object), fingerprint=np.array([thing], dtype=object))
        forms.append(buffer.getvalue())
        buffer = io.BytesIO()
        np.save(buffer, np.array([thing], dtype=object))
        forms.append(buffer.getvalue())
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(thing, 2))
            archive.writestr("archive/version", "3\n")
            archive.writestr("cls.npy", forms[-1])
        forms.append(buffer.getvalue())
        for data in forms:
            for suffix in (".npz", ".bin", ".pth", ".safetensors", ".png"):
                path = tmp_path / f"file{suffix}"
                path.write_bytes(data)
                for read in (checkpoint.read_weights, checkpoint.facts_of, checkpoint.read_file, readers.read_image):
                    with contextlib.suppress(UserError):
                        read(path)
                with contextlib.suppress(UserError):
                    eval.load_run(str(path), CPU)
                assert readers._read_cache(path, "x", 1, True) is None
                tried += 6
                assert not canary.exists(), (payload.value, suffix)
            (folder / "test_batch").write_bytes(data)
            with pytest.raises(UserError):
                readers._cifar10(tmp_path)
            tried += 1
            assert not canary.exists(), payload.value
    print(f"{tried} attempts to run code")


def test_logs_and_recipes_are_only_text(tmp_path):
    canary = tmp_path / "ran"
    code = f"__import__('os').system('touch {canary}')"
    (tmp_path / f"{RUN}.txt").write_text(
        f"t - INFO - x - Training parameters Namespace(a={code}, num_steps=4, b=[{code} for _ in range(9)])\n"
        f"t - INFO - x - Global Steps: 1\n"
    )
    run = results.read_run(tmp_path / f"{RUN}.txt")
    assert run.num_steps == 4 and set(run.settings) == {"num_steps"} and not canary.exists()
    (tmp_path / "a.args").write_text(f"--name '$(touch {canary})' `touch {canary}`")
    with pytest.raises(SystemExit):
        plot.plan([f"@{tmp_path}/a.args"])
    assert not canary.exists()


# --- no room for what is only claimed ---


@pytest.mark.parametrize("count", [10**9, 10**12, 2**62])
def test_claims_are_refused_before_there_is_room(tmp_path, count):
    """Headers that claim 10^9 and more elements, in files of few bytes; the address space has no room for them."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="<f4", fortran_order=False, shape=(count,)))
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as file:
        file.writestr("cls.npy", header.getvalue())
    raw = tmp_path / "raw"
    raw.mkdir()
    for prefix in ("train", "t10k"):
        sides = [min(count, 2**32 - 1), min(2**32 - 1, count // 10), 1]
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(b"\0\0\x08\3" + struct.pack(">III", *sides))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1" + struct.pack(">I", sides[0]))
    torch.save({"cls_token": torch.ones(1).expand(count)}, tmp_path / "w.pth")
    query = {f"blocks.0.attn.{part}.weight": torch.ones(1).expand(count) for part in ("query", "key", "value")}
    torch.save(query, tmp_path / "q.pth")
    data = {"data": np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (3,), (0,)), "labels": [0]}
    write_cifar10(tmp_path, per_file=1)
    text = pickle.dumps(data, 2).replace(b"K\x03\x85", b"\x8a\x08" + struct.pack("<q", count) + b"\x85")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(text)
    readings = [
        lambda: checkpoint.read_weights(tmp_path / "w.npz"),
        lambda: readers.idx_set(raw, ("train", "t10k")),
        lambda: checkpoint.read_weights(tmp_path / "w.pth"),
        lambda: checkpoint.read_weights(tmp_path / "q.pth"),
        lambda: readers._cifar10(tmp_path),
    ]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, limits[1]))
    try:
        for read in readings:
            with pytest.raises(UserError):
                read()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
