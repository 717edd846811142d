"""Read weight files of this and other projects into a model.

`load_weights(model, path)` reads any of: Google's `.npz`, this project's and jeonsworld/ViT-pytorch's `.bin`, timm's
and DeiT's `.pth`, `.safetensors`. Files are data: nothing in them is ever executed.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from utils import checkpoint
from utils.cli import UserError, one_line, refuse, refusing

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


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Tensors of a weight file of any supported kind, under this project's parameter names.

    UserError if it is missing, damaged, unsafe, or without weights.
    """
    path = Path(path)
    if path.suffix == ".npz":
        with refusing(f"{path}: no readable .npz of Google's", "download it again"):
            with np.load(path, allow_pickle=False) as file:
                state = _from_google(dict(file))
    elif path.suffix == ".safetensors":
        with refusing(f"{path}: not read", "get it again, or pip install safetensors"):
            from safetensors.torch import load_file

            state = _state_dict(load_file(path))
    else:
        tensors = _state_dict(checkpoint.read_file(path))
        state = {_rename(name, JEONSWORLD_NAMES): tensor for name, tensor in tensors.items()}
    refuse(not state, f"{path}: holds no weights")
    with refusing(f"{path}: query, key and value of an attention don't belong together", "get the whole file"):
        return _fuse_qkv(state)


def _state_dict(obj) -> dict[str, torch.Tensor]:
    """Find the tensors in what a torch file held: bare, or under `model` or `state_dict`; drop wrappers' prefixes."""
    if isinstance(obj, dict) and isinstance(obj.get("average"), dict):
        obj = checkpoint.kept_weights(obj)
    for key in ("model", "state_dict"):
        if isinstance(obj, dict) and isinstance(obj.get(key), dict):
            obj = obj[key]
    if not isinstance(obj, dict):
        return {}
    tensors = {str(name): value for name, value in obj.items() if isinstance(value, torch.Tensor)}
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in tensors.items()}


def resize_pos_embed(pos: torch.Tensor, grid: tuple[int, int], prefix: int = 1) -> torch.Tensor:
    """Resample a position embedding to another grid: bilinear, corners aligned, the class token's row kept.

    `pos` (1, p + n, d) is of a square grid with p = 0, 1 or 2 rows for class tokens in front, of which the first
    `prefix` are taken, or zeros -> (1, prefix + rows * columns, d). ValueError where it does not belong to a square
    grid.
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


def _check_tensor(path: str | os.PathLike, name: str, value: torch.Tensor, target: torch.Tensor) -> None:
    """Refuse what does not belong where `target` is: other kinds of numbers, or values that are not finite."""
    refuse(value.layout != torch.strided, f"{path}: {name} is no dense tensor; save the weights again")
    if value.is_floating_point() != target.is_floating_point() or value.is_complex():
        raise UserError(f"{path}: {name} is of {value.dtype}, the model's of {target.dtype}; another kind of file?")
    if value.shape == target.shape and not value.to(target.dtype).isfinite().all():
        raise UserError(f"{path}: {name} has values that are not finite; take an earlier checkpoint")


def load_weights(model: nn.Module, path: str | os.PathLike, keep_head: bool = True) -> LoadReport:
    """Copy a weight file's tensors into a model of the same sizes, and say what became of each.

    The position embedding is resampled to the model's grid; a head of another number of classes starts anew, at zero
    (and any head, with `keep_head` False, as for other classes of the same number); what the file lacks keeps its fresh
    values. UserError at an unreadable file, one of another model, or one that matches next to nothing.
    """
    state, target, report = read_weights(path), dict(model.state_dict()), LoadReport()
    theirs, ours = _depth(state), _depth(target)
    refuse(theirs and theirs != ours, f"{path}: has {theirs} blocks, the model {ours}; another --model_type?")
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, tensor in target.items():
        value = state.pop(name, None)
        if value is not None:
            _check_tensor(path, name, value, tensor)
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
            with refusing(f"{path}: pos_embed does not fit", "another kind of file?", ValueError):
                target[name] = resize_pos_embed(value, model.grid, tensor.shape[1] - model.grid[0] * model.grid[1])
        else:
            shapes = f"{tuple(value.shape)} in the file, {tuple(tensor.shape)} in the model"
            raise UserError(f"{path}: {name} is {shapes}; another --model_type, --patch_size, --stem or size?")
    heads = [name for name in target if name.startswith("head.")]
    if set(heads) & set(report.reinitialised):
        target |= {name: torch.zeros_like(target[name]) for name in heads}
    report.ignored += state
    # Parameters only: a BatchNorm that starts fresh has more buffers than that.
    body = {name for name, _ in model.named_parameters() if not name.startswith("head.")}
    found = len(body.intersection(report.loaded + report.resized))
    if found < len(body) / 2:
        raise UserError(f"{path}: only {found} of {len(body)} tensors have names of this model; another kind of file?")
    model.load_state_dict(target)
    return report


def load_start(model: nn.Module, pretrained: str | None, continued: str | None, keep_head: bool) -> str:
    """Put the weights that --pretrained_dir or --load_model_dir names into a model; a line for the log.

    UserError as `load_weights`, or where `continued` lacks some of the model's weights.
    """
    path = pretrained or continued
    if not path:
        return "from scratch"
    report = load_weights(model, path, keep_head)
    if continued and report.reinitialised:
        missing = ", ".join(report.reinitialised[:4])
        raise UserError(f"{path}: lacks {missing} at this size; --pretrained_dir would start those anew")
    return f"{path}: {report}"
