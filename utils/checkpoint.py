"""Save and read this project's checkpoints.

A run writes `RUN_checkpoint.bin`, the best weights and all that eval.py needs, and `RUN_last.bin`, all that resuming
needs. They are torch's zip archives of tensors and plain values, whose checksums are compared at reading.
"""

import argparse
import contextlib
import datetime
import os
import pathlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from utils.cli import UserError, refuse, refusing

# Of files that other programs wrote; on stderr it would read as if something were wrong.
warnings.filterwarnings("ignore", message="Detected pickle protocol|'torch.load' received a zip file")


# Plain values that other programs keep beside their weights; rebuilt by these, whatever class the file names.
PASSIVE = [
    argparse.Namespace, dict, list, tuple, set, int, float, str, bool, complex,
    (lambda factory=None: {}, "collections.defaultdict"),
    datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone,
    np.dtype, np.ndarray, *{type(np.dtype(code)) for code in np.typecodes["All"]},
    *((getattr(np._core.multiarray, name), f"numpy.{core}.multiarray.{name}")
      for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *((pathlib.PurePosixPath, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
      for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
]  # fmt: skip


def check_kind(path: Path) -> None:
    """UserError at what cannot be a file of weights, with what it is."""
    with refusing(f"{path}: cannot be read", "name a file that you may read", OSError), open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    other = start.startswith((b"version https://git-lfs", b"<!doctype", b"<html", b"<?xml"))
    refuse(other, f"{path}: a pointer of Git LFS or a web page, not the file; git lfs pull, or download it again")
    others = path.suffix in (".json", ".pt2", ".onnx", ".h5", ".msgpack")
    refuse(others, f"{path}: holds no weights that can be read here; take one file of .bin, .pth, .npz or .safetensors")


def read_file(path: str | os.PathLike):
    """Read a torch file (`.bin`, `.pth`) as data: tensors, plain containers and values.

    UserError if it is missing, damaged, or holds anything that would have to be executed.
    """
    path = Path(path)
    check_kind(path)
    with refusing(f"{path}: not a checkpoint, or damaged", "get it again"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch itself takes a wrong weight for right
                    raise UserError(f"{path}: damaged, the checksum of {damaged} is wrong; copy or train it again")
        try:
            with torch.serialization.safe_globals(PASSIVE):
                return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            code = re.search(r"GLOBAL (\S+)|TorchScript", str(error))
            if not code:
                raise ValueError(str(error).partition(" In PyTorch")[0]) from None  # torch advises to load it unsafely
            save = f"m = torch.load({path.name!r}, weights_only=False); torch.save(m.state_dict(), 'weights.pth')"
            raise UserError(
                f"{path}: refused, it holds a {code[1] or code[0]} and could run code; if you trust it, save its "
                f"weights alone, where that class is installed: {save} (m['model'] for m.state_dict() if m is a dict)"
            ) from None


def kept_weights(state: dict) -> dict[str, torch.Tensor]:
    """A run's `average` weights, if it has them and they were not worse at its newest evaluation; else its `model`."""
    if not isinstance(state.get("average"), dict) or state.get("kept") == "raw":
        return state["model"]
    return {name.removeprefix("module."): v for name, v in state["average"].items() if name != "n_averaged"}


def read_last(path: Path, previous: Path) -> tuple[dict | None, Path]:
    """What the newer of two files of `save` that is whole holds, and which it was; None if neither is there.

    UserError if one or both are there, and none is whole.
    """
    there = [file for file in (path, previous) if file.exists()]
    for file in there:
        with contextlib.suppress(UserError):
            return read_file(file), file
    refuse(there, f"{' and '.join(map(str, there))}: damaged, so the run cannot go on; --overwrite starts it anew")
    return None, path


def save(path: str | os.PathLike, obj: dict, previous: str | os.PathLike | None = None) -> None:
    """Write `obj` so that `path` always holds a whole file: to a temporary one, flushed, then renamed.

    What `path` held so far is kept as `previous`; between the two renames there is nothing at `path`. UserError where
    the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with refusing(f"{path}: cannot be written", "free some space or choose another --output_dir"):
            with open(temporary, "wb") as file:
                try:
                    torch.save(obj, file)
                except RuntimeError as error:  # behind which torch hides why the file can't be written
                    raise error.__context__ or error from None
                file.flush()
                os.fsync(file.fileno())
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # the names, too, outlast a power cut
            os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # of a failure
