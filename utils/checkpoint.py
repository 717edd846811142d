"""Save and read this project's checkpoints.

A run writes `RUN_checkpoint.bin`, the best weights and all that eval.py needs, and `RUN_last.bin`, all that resuming
needs. They are torch's zip archives of tensors and plain values, whose checksums are compared at reading.
"""

import contextlib
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from utils.cli import UserError, refuse, refusing

# Of files that other programs wrote; on stderr it would read as if something were wrong.
warnings.filterwarnings("ignore", message="Detected pickle protocol")


def read_file(path: str | os.PathLike):
    """Read a torch file (`.bin`, `.pth`) as data; plain containers and tensors only.

    UserError if it is missing, damaged, or holds anything that would have to be executed.
    """
    path = Path(path)
    refuse(not path.is_file(), f"{path}: no such file")
    with refusing(f"{path}: not a checkpoint, or damaged", "get it again"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch itself takes a wrong weight for right
                    raise UserError(f"{path}: damaged, the checksum of {damaged} is wrong; copy or train it again")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            unsafe = "refused, it holds more than tensors and plain values and could run code"
            reason = unsafe if "GLOBAL" in str(error) else "not a checkpoint, or damaged; get it again"
            raise UserError(f"{path}: {reason}") from None


def read_own(path: str | os.PathLike | None) -> dict:
    """What a checkpoint of train.py holds; {} for a file of another kind, or none. UserError as `read_file`."""
    if not path or Path(path).suffix in (".npz", ".safetensors"):
        return {}
    state = read_file(path)
    return state if isinstance(state, dict) and {"model", "args", "classes"} <= state.keys() else {}


def kept_weights(state: dict) -> dict[str, torch.Tensor]:
    """Weights that counted at a run's newest evaluation: its `average`, where there is one and it was not worse than
    the raw ones, else its `model`.
    """
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
            try:
                os.fsync(folder)  # the names, too, outlast a power cut
            finally:
                os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # of a failure
