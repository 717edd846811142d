"""Save and read checkpoints, and read weight files of other projects.

A run writes `RUN_checkpoint.bin` (best weights and all that eval.py needs) and `RUN_last.bin` (all that resuming
needs), each with a checksum behind its end, where torch.load does not look. `load_weights(model, path)` reads any of:
Google's `.npz`, this project's and jeonsworld/ViT-pytorch's `.bin`, timm's and DeiT's `.pth`, `.safetensors`. Files
are data: nothing in them is ever executed.
"""

import contextlib
import io
import os
import pickle
import re
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from utils.cli import UserError, one_line
from utils.options import recorded

# Of files that other programs wrote; on stderr it would read as if something were wrong.
warnings.filterwarnings("ignore", message="Detected pickle protocol")
MAX_PACKED, MAX_SMALL = 20, 2**28  # a zip archive may unpack to so many times its size, or to so many bytes

CHECKSUM = re.compile(rb"crc32 ([0-9a-f]{8})\n")  # of all bytes before it; the last line of a file of `save`
CHECKSUM_BYTES = 15

# (pattern, replacement) from the parameter names of jeonsworld/ViT-pytorch and ChaofanTao/RescaleViT to ours.
JEONSWORLD_NAMES = [
    (r"^transformer\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^transformer\.embeddings\.cls_token$", "cls_token"),
    (r"^transformer\.embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^transformer\.embeddings\.hybrid_model\.(?:body\.)?", "patch_embed.stem."),
    (r"^(patch_embed\.stem\..*\.)downsample\.", r"\1conv_proj."),
    (r"^transformer\.encoder\.encoder_norm\.", "norm."),
    (r"^transformer\.encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.ffn_norm\.", ".norm2."),
    (r"\.ffn_addbias\.", ".bias2."),
    (r"\.addbias\.", ".bias1."),
    (r"(\.bias[12])\._bias$", r"\1.bias"),
    (r"(\.bias[12])\.init_mean$", r"\1.mean"),
    (r"^(blocks\.\d+)\._scale$", r"\1.scale"),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn\.out\.", ".attn.proj."),
]
# The same from the array names of Google's .npz files.
GOOGLE_NAMES = [
    (r"^cls$", "cls_token"),
    (r"^embedding/", "patch_embed/proj/"),
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks/\1/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_2/", "/norm2/"),
    (r"/MultiHeadDotProductAttention_1/", "/attn/"),
    (r"/attn/out/", "/attn/proj/"),
    (r"/MlpBlock_3/Dense_0/", "/mlp/fc1/"),
    (r"/MlpBlock_3/Dense_1/", "/mlp/fc2/"),
    (r"^(conv|gn)_root/", r"patch_embed/stem/root/\1/"),
    (r"^block(\d)/", r"patch_embed/stem/block\1/"),
    (r"/(kernel|scale)$", "/weight"),
]


def _rename(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def _from_google(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Rename the arrays of a Google `.npz` and turn its (in, out) kernels into torch's (out, in)."""
    state = {}
    for key, array in arrays.items():
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if key.endswith("/kernel"):
            if tensor.ndim == 4:
                tensor = rearrange(tensor, "h w i o -> o i h w")
            elif re.search(r"/(query|key|value)/kernel$", key):
                tensor = rearrange(tensor, "d h dh -> (h dh) d")
            elif tensor.ndim == 3:
                tensor = rearrange(tensor, "h dh d -> d (h dh)")
            else:
                tensor = rearrange(tensor, "i o -> o i")
        elif key.endswith(("/scale", "/bias")):
            tensor = tensor.flatten()
        state[_rename(key, GOOGLE_NAMES).replace("/", ".")] = tensor
    return state


def _fuse_qkv(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join attn.query, attn.key and attn.value into attn.qkv."""
    fused = {}
    for name, tensor in state.items():
        if ".attn.query." in name:
            parts = [state[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            fused[name.replace(".query.", ".qkv.")] = torch.cat(parts)
        elif ".attn.key." not in name and ".attn.value." not in name:
            fused[name] = tensor
    return fused


def _state_dict(obj) -> dict[str, torch.Tensor]:
    """Find the tensors in what a torch file held: bare, or under `model` or `state_dict`; drop wrappers' prefixes."""
    if isinstance(obj, dict) and isinstance(obj.get("average"), dict):
        obj = kept_weights(obj)
    for key in ("model", "state_dict"):
        if isinstance(obj, dict) and isinstance(obj.get(key), dict):
            obj = obj[key]
    if not isinstance(obj, dict):
        return {}
    tensors = {str(name): value for name, value in obj.items() if isinstance(value, torch.Tensor)}
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in tensors.items()}


def kept_weights(state: dict) -> dict:
    """Weights that the run of a checkpoint evaluates and keeps: its `average`, where there is one, else its `model`."""
    if not isinstance(state.get("average"), dict):
        return state["model"]
    named = {str(name).removeprefix("module."): value for name, value in state["average"].items()}
    named.pop("n_averaged", None)
    return named


def _is_whole(path: Path) -> bool | None:
    """Whether a file is as `save` wrote it, to the byte; None for one without a checksum."""
    with open(path, "rb") as file:
        left = max(0, os.path.getsize(path) - CHECKSUM_BYTES)
        file.seek(left)
        found = CHECKSUM.fullmatch(file.read())
        if not found:
            return None
        file.seek(0)
        crc = 0
        while left:
            data = file.read(min(left, 2**20))
            crc, left = zlib.crc32(data, crc), left - len(data)
    return crc == int(found[1], 16)


def read_file(path: str | os.PathLike, own: bool = False):
    """Read a torch file (`.bin`, `.pth`) as data; plain containers and tensors only.

    Args:
        own: written by `save`, so that a missing checksum means damage.

    Raises:
        UserError: missing, damaged, or holding anything that would have to be executed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    _members(path)
    try:
        whole = _is_whole(path)
        if whole or (whole is None and not own):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise UserError(
                f"{path}: refused, it holds more than tensors and plain values and could run code"
            ) from None
        raise UserError(f"{path}: not a checkpoint, or damaged; download or train it again") from None
    except Exception as error:  # a damaged file can raise nearly anything in torch.load
        raise UserError(f"{path}: not a checkpoint, or damaged ({type(error).__name__}); get it again") from None
    raise UserError(f"{path}: damaged, its checksum is wrong or missing; copy or train it again")


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """What a zip archive holds, as `.npz` and `.bin` are; [] for another file.

    Raises:
        UserError: damaged, or it would fill the memory.
    """
    try:
        if not zipfile.is_zipfile(path):
            return []
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
    except Exception as error:  # a damaged directory can raise nearly anything
        raise UserError(f"{path}: damaged ({error}); get it again") from None
    size = sum(member.file_size for member in members)
    if size > max(MAX_SMALL, MAX_PACKED * path.stat().st_size):
        raise UserError(f"{path}: refused, it would unpack to {size / 2**30:.1f} GiB, far more than weights do")
    return members


def _read_npy(data: bytearray) -> np.ndarray:
    """An array of a `.npy` file in memory; unlike np.load, it makes no room for what the header claims alone.

    Raises:
        ValueError: not such a file, or not of plain numbers.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of .npy is not known")
    shape, fortran, dtype = readers[version](file)
    if dtype.kind not in "fiub":
        raise ValueError(f"an array of {dtype} holds no plain numbers")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        names = [member.filename for member in _members(path)]
        with zipfile.ZipFile(path) as file:
            return {name.removesuffix(".npy"): _read_npy(bytearray(file.read(name))) for name in names}
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(f"{path}: not a readable .npz file ({error}); download it again") from None


def _is_npz(path: Path) -> bool:
    return path.suffix == ".npz" or any(member.filename.endswith(".npy") for member in _members(path))


def check_tensor(path: str | os.PathLike, name: str, value, target: torch.Tensor) -> None:
    """Refuse what does not belong where `target` is.

    Raises:
        UserError: no plain tensor, of another kind of numbers, or with values that are not finite.
    """
    if not isinstance(value, torch.Tensor) or not _is_plain(value):
        raise UserError(f"{path}: {name} is no plain tensor; save the weights again, dense and on the CPU")
    if value.is_floating_point() != target.is_floating_point() or value.is_complex():
        raise UserError(f"{path}: {name} is of {value.dtype}, the model's of {target.dtype}; another kind of file?")
    if value.shape == target.shape and not value.to(target.dtype).isfinite().all():
        raise UserError(f"{path}: {name} has values that are not finite; take an earlier checkpoint")


def _is_plain(value: torch.Tensor) -> bool:
    """Dense, on the CPU, and every element stored; a few stored bytes can pose as a tensor of any size."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read a weight file of any supported kind.

    Returns:
        Tensors under this project's parameter names.

    Raises:
        UserError: missing, damaged, unsafe, or without weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; put downloaded weights there, or leave the flag out to start from scratch"
        )
    if _is_npz(path):
        arrays = _read_npz(path)
        try:
            state = _from_google(arrays)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: not weights as Google's ({str(error).splitlines()[0]})") from None
    elif path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(f"{path}: reading it needs the package safetensors; pip install safetensors") from None
        try:
            state = _state_dict(load_file(path))
        except Exception as error:  # safetensors' own error class derives from Exception
            raise UserError(f"{path}: not a readable .safetensors file ({error})") from None
    else:
        state = {_rename(name, JEONSWORLD_NAMES): tensor for name, tensor in _state_dict(read_file(path)).items()}
    if not state:
        raise UserError(f"{path}: holds no weights")
    for name, value in state.items():
        if not _is_plain(value):
            raise UserError(f"{path}: {name} is no plain tensor; save the weights again, dense and on the CPU")
    try:
        return _fuse_qkv(state)
    except KeyError as error:
        raise UserError(f"{path}: incomplete, {error} is missing") from None
    except RuntimeError:
        raise UserError(f"{path}: query, key and value of an attention are of different shapes") from None


def resize_pos_embed(pos: torch.Tensor, grid: tuple[int, int], prefix: int = 1) -> torch.Tensor:
    """Resample a position embedding to another grid: bilinear, corners aligned, the class token's row kept.

    Args:
        pos: (1, p + n, d) of a square grid, n = side * side, with p = 0, 1 or 2 rows for class tokens in front.
        grid: rows and columns wanted.
        prefix: rows in front wanted; where `pos` has more, the first are taken; rows that it lacks are zeros.

    Returns:
        (1, prefix + rows * columns, d)

    Raises:
        ValueError: `pos` does not belong to a square grid.
    """
    for found in (1, 0, 2):
        side = round(max(0, pos.shape[1] - found) ** 0.5)
        if side and side * side == pos.shape[1] - found:
            break
    else:
        raise ValueError(f"a position embedding of {pos.shape[1]} rows belongs to no square grid")
    front, patches = pos[:, : min(found, prefix)], pos[:, found:]
    if front.shape[1] < prefix:
        front = torch.cat([front, pos.new_zeros(1, prefix - front.shape[1], pos.shape[2])], dim=1)
    patches = rearrange(patches, "1 (h w) d -> 1 d h w", h=side)
    patches = F.interpolate(patches.float(), size=grid, mode="bilinear", align_corners=True).to(pos.dtype)
    return torch.cat([front, rearrange(patches, "1 d h w -> 1 (h w) d")], dim=1)


@dataclass
class LoadReport:
    """Parameter names by what became of them."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for word in ("resized", "reinitialised", "ignored"):
            names = getattr(self, word)
            if names:
                shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                parts.append(one_line(f"{word.replace('reinit', 're-init')}: {shown}"))
        return "; ".join(parts)


def _depth(names) -> int:
    return 1 + max((int(m[1]) for m in (re.match(r"blocks\.([0-9]{1,6})\.", name) for name in names) if m), default=-1)


def _zero_head(target: dict[str, torch.Tensor]) -> None:
    for name in target:
        if name.startswith("head."):
            target[name] = torch.zeros_like(target[name])


def facts_of(path: str | os.PathLike | None) -> dict:
    """What a checkpoint of train.py says of itself, without its tensors; {} for any other file, or none.

    Raises:
        UserError: a damaged or unsafe file.
    """
    if not path or _is_npz(Path(path)) or Path(path).suffix == ".safetensors":
        return {}
    state = read_file(path)
    return recorded(path, state) if isinstance(state, dict) and {"args", "classes"} <= state.keys() else {}


def load_weights(model: nn.Module, path: str | os.PathLike, keep_head: bool = True) -> LoadReport:
    """Copy a weight file's tensors into a model of the same sizes.

    The position embedding is resampled to the model's grid; a head of another number of classes starts anew, at zero;
    what the file lacks keeps its fresh values.

    Args:
        model: one of `create_model`.
        path: a file of any kind that `read_weights` reads.
        keep_head: False starts the head anew even if it fits, as for other classes of the same number.

    Returns:
        What was loaded, resized, re-initialised and left over.

    Raises:
        UserError: unreadable file, one of another model, or one that matches next to nothing.
    """
    state, target, report = read_weights(path), dict(model.state_dict()), LoadReport()
    if _depth(state) and _depth(state) != _depth(target):
        raise UserError(f"{path}: has {_depth(state)} blocks, the model {_depth(target)}; another --model_type?")
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, tensor in target.items():
        value = state.pop(name, None)
        if value is not None:
            check_tensor(path, name, value, tensor)
        same_shape = value is not None and value.shape == tensor.shape
        if value is None or (name.startswith("head.") and not (keep_head and same_shape)):
            report.reinitialised.append(name)
        elif same_shape:
            report.loaded.append(name)
            target[name] = value
        elif name in fixed:  # a table that follows from the sizes
            report.ignored.append(name)
        elif name == "pos_embed" and value.ndim == 3 and value.shape[::2] == tensor.shape[::2]:
            report.resized.append(name)
            try:
                target[name] = resize_pos_embed(value, model.grid, tensor.shape[1] - model.grid[0] * model.grid[1])
            except ValueError as error:
                raise UserError(f"{path}: {error}") from None
        else:
            shapes = f"{tuple(value.shape)} in the file, {tuple(tensor.shape)} in the model"
            raise UserError(f"{path}: {name} is {shapes}; another --model_type, --patch_size, --stem or size?")
    if any(name.startswith("head.") for name in report.reinitialised):
        _zero_head(target)
    report.ignored += state
    # Parameters only: a BatchNorm that starts fresh has more buffers than that.
    body = {name for name, _ in model.named_parameters() if not name.startswith("head.")}
    found = len(body.intersection(report.loaded + report.resized))
    if found < len(body) / 2:
        raise UserError(f"{path}: only {found} of {len(body)} tensors have names of this model; another kind of file?")
    model.load_state_dict(target)
    return report


def read_last(path: Path, previous: Path) -> tuple[dict | None, Path]:
    """Read the newer of two files of `save` that is whole.

    Returns:
        What it held, and which it was; None if neither file is there.

    Raises:
        UserError: one or both are there, and none is whole.
    """
    there = [file for file in (path, previous) if file.exists()]
    for file in there:
        try:
            return read_file(file, own=True), file
        except UserError:
            continue
    if there:
        shown = " and ".join(map(str, there))
        raise UserError(f"{shown}: damaged, so the run cannot go on; --overwrite starts it anew")
    return None, path


class _Summing:
    """A file to write to, which adds up what was written; `error` is why that failed, which torch.save hides."""

    def __init__(self, file):
        self.file, self.crc, self.error = file, 0, None
        self.flush = file.flush

    def write(self, data) -> int:
        self.crc = zlib.crc32(data, self.crc)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def save(path: str | os.PathLike, obj: dict, previous: str | os.PathLike | None = None) -> None:
    """Write `obj` so that `path` always holds a whole file: to a temporary one, flushed, then renamed.

    Args:
        previous: where what `path` held so far is kept. Between the two renames there is nothing at `path`.

    Raises:
        UserError: the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            summing = _Summing(file)
            try:
                torch.save(obj, summing)
            except RuntimeError as error:
                raise summing.error or error from None
            file.write(b"crc32 %08x\n" % summing.crc)
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
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: cannot be written ({reason}); free some space or choose another --output_dir"
        ) from None
