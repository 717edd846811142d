"""Read weight files of this and other projects into a model.

`load_weights(model, path)` reads Google's `.npz`, and `.bin`, `.pth`, `.pt` and `.safetensors` of this project and of
those in `utils.weight_names`. What it loads computes what it computed where it comes from; a file with a tensor that
the model has no place for is refused. Files are data: nothing in them is ever executed.
"""

import argparse
import contextlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from utils import checkpoint, weight_names
from utils.cli import UserError, one_line, refuse, refusing
from utils.presets import NORMALIZE

State = dict[str, torch.Tensor]
Pixels = tuple[list[float], list[float]]  # mean and std of the three channels


@dataclass
class WeightFile:
    """What a file holds: its tensors under this project's names, and what it says of its model.

    `origin` is the project it comes from, None for one unknown; `own` has `args`, `classes`, `config` and `files`
    of a checkpoint of train.py, or some of them of an export, {} of others; `normalize` is how pixels were normalised,
    `heads` the number of attention heads, None where the file does not say it; `labels` are names of classes in the
    head's order, [] if unknown; `likely` is a key of presets.NORMALIZE that names suggest; `notes` are for people.
    """

    path: Path
    state: State
    origin: str | None = None
    own: dict = field(default_factory=dict)
    normalize: Pixels | None = None
    heads: int | None = None
    labels: list[str] = field(default_factory=list)
    likely: str | None = None
    notes: list[str] = field(default_factory=list)


def read_weights(path: str | os.PathLike) -> WeightFile:
    """Read a weight file of any supported kind. UserError: missing, damaged, unsafe, or without weights."""
    path = Path(path)
    checkpoint.check_kind(path)
    file, named, told = WeightFile(path, {}), [path.name], {}
    if path.suffix == ".npz":
        with refusing(f"{path}: no readable .npz of Google's", "download it again"):
            with np.load(path, allow_pickle=False) as arrays:
                file.state = _from_google(dict(arrays), file)
    elif path.suffix == ".safetensors":
        with refusing(f"{path}: not read", "get it again, or pip install safetensors"):
            from safetensors.torch import load_file

            file.state = load_file(path)
    else:
        held = checkpoint.read_file(path)
        held = held if isinstance(held, dict) else {}
        if {"model", "args", "classes", "config", "precision"} <= held.keys():  # others have some of them, too
            file.own = {name: held.get(name) for name in ("args", "classes", "config", "files")}
            file.state = checkpoint.kept_weights(held)
        else:
            file.state = _find_tensors(held, file.notes)
            strange = "" if file.state else _few([*map(str, held)])
            refuse(strange, f"{path}: holds no weights under the usual keys, but {strange}; save them under model")
            flags = held.get("args")  # of timm's train.py
            told[path] = {"arch": held.get("arch"), **(vars(flags) if isinstance(flags, argparse.Namespace) else {})}
    wrappers = r"(?<![^.])(module|_orig_mod)\."  # of the whole model, or of blocks that are compiled one by one
    file.state = {re.sub(wrappers, "", str(name)): v for name, v in file.state.items() if torch.is_tensor(v)}
    refuse(not file.state, f"{path}: holds no weights")
    if file.own:
        file.origin = "this project"
        args, file.heads = file.own["args"], file.own["config"].get("heads")
        file.normalize = (args["mean"], args["std"]) if args.get("mean") and args.get("std") else None
    else:
        _rename(file)
        told |= _read_beside(path) if path.suffix != ".npz" else {}  # Google's files say it all themselves
        for where, facts in told.items():
            with refusing(f"{where}: not understood", "mend it, or move it away from the weights"):
                named += _take_facts(file, where, facts)
        rotary = [name for name in named if re.search(r"(?<![a-z])rope", name.lower())]  # some files hold nothing of it
        refuse(rotary, f"{path}: {', '.join(rotary)}: rotary positions, which no model here has")
    words = " ".join(named).lower()
    file.likely = next((name for pattern, name in weight_names.FILE_NAMES if re.search(pattern, words)), None)
    with refusing(f"{path}: query, key and value of an attention don't belong together", "get the whole file"):
        file.state = _join_qkv(file.state)
    return file


def _find_tensors(held: dict, notes: list[str]) -> State:
    """The tensors in what a torch file held: bare, or under one of the usual keys."""
    keys = (*weight_names.AVERAGED, *weight_names.PLAIN)
    found = [key for key in keys if isinstance(held.get(key), dict) and _find_tensors(held[key], [])]
    if found:
        if found[0] in weight_names.AVERAGED and len(found) > 1:
            notes.append(f"of {' and '.join(found)} the averaged weights, {found[0]}")
        return _find_tensors(held[found[0]], notes)
    return {name: value for name, value in held.items() if torch.is_tensor(value)}


def _from_google(arrays: dict[str, np.ndarray], file: WeightFile) -> State:
    """Turn Google's (in, out) kernels into torch's (out, in), and take layers apart that stand in one array."""
    state = {}
    for key, array in arrays.items():
        brain = array.dtype.kind == "V" and array.dtype.itemsize == 2  # bfloat16, which numpy doesn't know
        tensor = torch.from_numpy(np.ascontiguousarray(array.view(np.uint16) if brain else array))
        tensor = tensor.view(torch.bfloat16).float() if brain else tensor
        name = key.replace("/", ".")
        if ".encoderblock." in name:  # big_vision's scan over layers
            for i, layer in enumerate(tensor):
                state[name.replace(".encoderblock.", f".encoderblock_{i}.")] = layer
        else:
            state[name] = tensor
    for name, tensor in state.items():
        if re.search(r"\.(query|key|value)\.kernel$", name):
            file.heads = tensor.shape[1]
            state[name] = rearrange(tensor, "d h dh -> (h dh) d")
        elif name.endswith(".kernel"):
            layout = {2: "i o -> o i", 3: "h dh d -> d (h dh)", 4: "h w i o -> o i h w"}[tensor.ndim]
            state[name] = rearrange(tensor, layout)
        elif name.endswith((".scale", ".bias")):
            state[name] = tensor.flatten()
    return state


def _rename(file: WeightFile) -> None:
    """Find the project by its names, and give the tensors those of this one."""
    for origin in weight_names.ORIGINS:
        roots = [name.removesuffix(origin.mark) for name in file.state if f".{name}".endswith(f".{origin.mark}")]
        if roots:
            break
    else:
        return
    root = min(roots, key=lambda root: ("momentum" in root, "student" in root, len(root)))  # of several networks
    parts = root.split(".")[:-1]
    cuts = [".".join(parts[:n]) + "." for n in range(len(parts), 0, -1)]  # a head may stand beside the rest
    state = {}
    for its, tensor in file.state.items():
        name = its.removeprefix(next((cut for cut in cuts if its.startswith(cut)), ""))
        for pattern, replacement in origin.names:
            name = re.sub(pattern, replacement, name)
        second = f"{file.path}: {its} is a second {name}: no place for layers around a model; save the model's alone"
        refuse(name in state, second)
        state[name] = tensor
    file.origin, normalize = origin.project, origin.normalize
    if not origin.names:
        kinds = [kind for kind in weight_names.PRETRAINED if any(kind[0] in name for name in file.state)]
        _, file.origin, normalize = kinds[0] if kinds else ("", file.origin, None)
        if file.origin == "MoCo-v3" and len(state.get("norm.weight", ())) == 384:
            file.heads = 12  # of its ViT-S, where DeiT's has 6
    file.state = state
    if normalize:
        file.normalize = tuple(map(list, NORMALIZE[normalize]))


def _read_beside(path: Path) -> dict[Path, dict]:
    """What JSON files of timm, Hugging Face and `eval.py --export` say beside weights, the nearest last."""
    found = {}
    for file in (path.with_name("preprocessor_config.json"), path.with_name("config.json"), path.with_suffix(".json")):
        with contextlib.suppress(OSError), refusing(f"{file}: no JSON", "mend it, or move it away", ValueError):
            found[file] = json.loads(file.read_text(encoding="utf-8-sig"))  # Windows' editors write a mark in front
    return {file: facts for file, facts in found.items() if isinstance(facts, dict)}


def _take_facts(file: WeightFile, path: Path, facts: dict) -> list[str]:
    """Take what `path` says of a model in words of timm, Hugging Face or `eval.py --export`; names of that model."""
    for part in ("pretrained_cfg", "model_args", "model_kwargs"):
        facts = facts | facts[part] if isinstance(facts.get(part), dict) else facts
    pooling = facts.get("global_pool") or facts.get("gp") or "token"
    refuse(pooling != "token", f"{path}: pooled by {pooling!r}, which no model here does")
    activation = facts.get("act_layer") or facts.get("hidden_act") or "gelu"
    refuse(activation != "gelu", f"{path}: activation {activation!r}, where models here have GELU")
    pixels = [facts.get(f"image_{word}", facts.get(word)) for word in ("mean", "std")]
    pixels = pixels if facts.get("do_normalize", True) else [[0.0], [1.0]]
    if all(isinstance(part, (list, tuple)) and len(part) in (1, 3) for part in pixels):
        scale = 255 * (facts.get("rescale_factor") or 1 / 255)
        file.normalize = tuple([value / scale for value in part] * (3 // len(part)) for part in pixels)
    file.heads = facts.get("num_heads") or facts.get("num_attention_heads") or file.heads
    if names := facts.get("id2label") or facts.get("label_names"):  # of Hugging Face, of timm
        file.labels = [names[i] for i in sorted(names, key=int)] if isinstance(names, dict) else [*names]
    config, classes = facts.get("model"), facts.get("classes")
    if isinstance(config, dict) and "model_type" in config and isinstance(classes, list):  # by eval.py --export
        file.own, file.heads = dict(config=config, classes=classes, args=facts), config.get("heads")
    named = (facts.get(word) for word in ("architecture", "arch", "model_type", "model"))
    return [name for name in named if isinstance(name, str)]


def _join_qkv(state: State) -> State:
    """Join attn.q, attn.k and attn.v into attn.qkv, where all are there."""
    joined = dict(state)
    for name in state:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if ".attn.q." in name and all(part in state for part in parts):
            joined[name.replace(".q.", ".qkv.")] = torch.cat([joined.pop(part) for part in parts])
    return joined


def _fold_layer_scale(state: State, target: State) -> State:
    """Multiply LayerScale, where the model has none, into the linear layer before it: the same function."""
    state = dict(state)
    for name in [name for name in state if name not in target]:
        match = re.match(weight_names.LAYER_SCALE, name)
        linear = match and f"{match[1]}.{'attn.proj' if '1' in match.groups() else 'mlp.fc2'}"
        if match and f"{linear}.weight" in state and state[name].shape == state[f"{linear}.weight"].shape[:1]:
            scale = state.pop(name).float()
            for part in state.keys() & {f"{linear}.weight", f"{linear}.bias"}:
                state[part] = torch.einsum("o,o...->o...", scale, state[part].float())
    return state


def _complete(state: State, target: State, notes: list[str]) -> None:
    """Zeros for a bias that the file's layers have not; norms without may be RMSNorm, and get none."""
    layers = {name.removesuffix("weight") for name, value in state.items() if value.ndim > 1}
    bare = [name for name in target if name not in state and name.removesuffix("bias") in layers]
    for name in bare:
        state[name] = torch.zeros_like(target[name])
    if bare:
        notes.append(f"no biases in the file, so zeros: {_few(bare)}")


def resize_pos_embed(pos: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Resample a position embedding from one grid to another: bilinear, corners aligned.

    `pos` (1, p + rows * columns, d), of which the p rows in front are kept -> (1, p + new rows * new columns, d).
    """
    p = pos.shape[1] - old[0] * old[1]
    patches = rearrange(pos[:, p:], "1 (h w) d -> 1 d h w", h=old[0])
    patches = F.interpolate(patches.float(), size=new, mode="bilinear", align_corners=True).to(pos.dtype)
    return torch.cat([pos[:, :p], rearrange(patches, "1 d h w -> 1 (h w) d")], dim=1)


def _fit_positions(file: WeightFile, pos: torch.Tensor, rows: int, new: tuple[int, int], bare: bool) -> torch.Tensor:
    """Give a file's position embedding the `rows` of a model whose patches are a grid `new`.

    `bare` says that the class token may have no row in it: then it has added nothing, and gets zeros. ValueError where
    the grid is not known: other projects' files don't tell it, so it must be square.
    """
    count, front = pos.shape[1], rows - new[0] * new[1]
    config = file.own.get("config") or {}
    if config.get("image_size") and config.get("patch_size"):
        size = config["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        old = (height // config["patch_size"], width // config["patch_size"])
    elif count == rows or bare and count == rows - front:
        old = new
    else:
        patches = [count - extra for extra in ((front, 0) if bare else (front,))]
        sides = [math.isqrt(n) for n in patches if n > 0 and math.isqrt(n) ** 2 == n]
        if not sides:
            raise ValueError(f"its {count} rows are no square grid{' and a class token' if front else ''}")
        old = (sides[0], sides[0])
    missing = front + old[0] * old[1] - count
    pos = torch.cat([pos.new_zeros(1, missing, pos.shape[2]), pos], dim=1) if missing > 0 else pos
    return pos if old == new else resize_pos_embed(pos, old, new)


@dataclass
class LoadReport:
    """Parameter names by what became of them, and notes for people."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded", *map(one_line, self.notes)]
        for word in ("resized", "reinitialised", "ignored"):
            if names := getattr(self, word):
                parts.append(f"{word.replace('reinit', 're-init')}: {_few(names)}")
        return "; ".join(parts)


def _few(names: list[str]) -> str:
    return one_line(", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else ""))


def _check_model(file: WeightFile, model: nn.Module) -> None:
    """Refuse a file whose tensors would fit, though its model computes something else."""
    path, config = file.path, file.own.get("config") or {}
    block = next(iter(getattr(model, "blocks", [])), None)
    heads = getattr(getattr(block, "attn", None), "heads", file.heads)
    wrong = file.heads not in (None, heads)
    refuse(wrong, f"{path}: has {file.heads} attention heads, the model {heads}; another --model_type or --heads?")
    if merges := config.get("merge_layer"):
        ours = [index + 1 for index in getattr(model, "merges", ())]  # a ViT has none
        wrong = [*merges] != ours
        refuse(wrong, f"{path}: merges tokens before blocks {merges}, the model before {ours}; another --merge_layer?")


def _check_tensor(path: Path, name: str, value: torch.Tensor, target: torch.Tensor) -> None:
    """Refuse what does not belong where `target` is: other kinds of numbers, or values that are not finite."""
    if value.is_floating_point() != target.is_floating_point():
        raise UserError(f"{path}: {name} is of {value.dtype}, the model's of {target.dtype}; another kind of file?")
    if value.shape == target.shape and not value.to(target.dtype).isfinite().all():
        raise UserError(f"{path}: {name} has values that are not finite; take an earlier checkpoint")


def _check_names(
    file: WeightFile, state: State, target: State, model: nn.Module, keep_head: bool, exact: bool
) -> tuple[list[str], list[str]]:
    """Names that the file has beyond the model, and those that start anew; refuse what would compute something else."""
    path, way_out = file.path, "another --model_type, --norm_type or kind of model?"
    norms = {name for name in {*state, *target} if re.search(weight_names.NORMS, name)}
    others = any(name not in target or name not in state and ".running_" in name for name in norms)
    renewed = norms if others and not exact else set()  # all of them, as BN's and GN's have names in common
    left = [name for name in state if name not in target or name in renewed]
    missing = [name for name in target if name not in state or name in renewed]
    harmless = weight_names.HARMLESS + weight_names.HARMLESS_AT_FINE_TUNING * (not (exact and keep_head))
    harmless = harmless if keep_head else (*harmless, r"^head\.")  # that of a pretraining
    strange = [name for name in left if name not in renewed and not any(re.search(each, name) for each in harmless)]
    refuse(strange, f"{path}: {_few(strange)}: no place for it in {type(model).__name__}; {way_out}")
    absent = [name for name in missing if name not in renewed and (exact or not name.startswith("head."))]
    refuse(absent, f"{path}: lacks {_few(absent)}; {way_out}")
    head = target.get("head.weight")  # a head may be of several layers
    if exact and not keep_head and head is not None and state["head.weight"].shape[1:] == head.shape[1:]:
        raise UserError(f"{path}: its head is of {len(state['head.weight'])} classes, the data has {len(head)}")
    return left, missing


def load_weights(
    model: nn.Module, source: str | os.PathLike | WeightFile, keep_head: bool = True, exact: bool = False
) -> LoadReport:
    """Copy a weight file's tensors into a model of the same sizes, and say what became of each.

    The position embedding is resampled to the model's grid. A head of another number of classes starts anew, at zero
    (and any head, with `keep_head` False, as for other classes of the same number), and so do norms where the file has
    others; with `exact` both are refused, as for evaluation. LayerScale is folded into the layer before it.
    UserError: unreadable, or not a file of this model.
    """
    file = source if isinstance(source, WeightFile) else read_weights(source)
    model = getattr(model, "_orig_mod", getattr(model, "module", model))  # torch.compile's and DataParallel's
    path, target, report = file.path, dict(model.state_dict()), LoadReport(notes=[*file.notes])
    state = _fold_layer_scale(file.state, target)
    folded = len(state) < len(file.state)
    report.notes += ["LayerScale folded into attn.proj and mlp.fc2"] * folded
    bare = file.origin == "Google" or folded  # big_vision, DeiT-III: no position of the class token
    _check_model(file, model)
    _complete(state, target, report.notes)
    heads = [name for name in target if name.startswith("head.")]
    keep_head = keep_head and all(name in state and state[name].shape == target[name].shape for name in heads)
    report.ignored, report.reinitialised = _check_names(file, state, target, model, keep_head, exact)
    fixed = getattr(model, "fixed", ())
    for name, tensor in target.items():
        if name in report.reinitialised:
            continue
        value = state[name]
        fits = value.ndim == 3 and value.shape[::2] == tensor.shape[::2] and hasattr(model, "grid")
        with refusing(f"{path}: {name} does not fit", "another kind of file?"):
            if name == "pos_embed" and fits and name not in fixed:  # as many rows may be another grid
                value = _fit_positions(file, value, tensor.shape[1], model.grid, bare)
            _check_tensor(path, name, value, tensor)
        if name in heads and not keep_head and not exact:
            report.reinitialised.append(name)
        elif value.shape == tensor.shape:
            (report.loaded if value is state[name] else report.resized).append(name)
            target[name] = value
        elif name in fixed:  # a table that follows from the sizes
            report.ignored.append(name)
        else:
            shapes = f"{tuple(value.shape)} in the file, {tuple(tensor.shape)} in the model"
            raise UserError(f"{path}: {name} is {shapes}; another --model_type, --patch_size, --stem or size?")
    if not keep_head:
        target |= {name: torch.zeros_like(target[name]) for name in {*heads} & {"head.weight", "head.bias"}}
    model.load_state_dict(target)
    return report


def check_pixels(file: WeightFile, mean: list[float], std: list[float]) -> list[str]:
    """A line where pixels are normalised in another way than for the file's training, as far as that is known."""
    theirs = file.normalize or NORMALIZE.get(file.likely)
    if theirs is None or np.allclose(theirs, (mean, std), atol=1e-3):
        return []
    names = [name for name, pixels in NORMALIZE.items() if np.allclose(pixels, theirs, atol=1e-3)]
    how = f"--normalize {names[0]}" if names else f"mean {theirs[0]}, std {theirs[1]}"
    source = "what it comes from" if file.normalize else "its name"
    return [f"{file.path}: by {source}, trained with {how}; this run normalises in another way"]
