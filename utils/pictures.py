"""What `eval.py` shows of a trained model: attention, position embeddings, patch filters, mistakes, confusion.

Here is computed what `utils.vis_utils` draws. Where the tokens of a model stand, it says itself in `token_layout()`,
see models/__init__.py; `run` is what `eval.load_run` gives.
"""

import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils import vis_utils
from utils.augment import denormalize
from utils.cli import refuse, refusing
from utils.datasets import ImageSet
from utils.presets import MAX_IMAGES
from utils.run_files import run_id

GRAY = ("fashionmnist", "fashionmnist-mini", "emnist")
MAX_HEADS = 12  # columns that stay legible
FILTERS = 28  # principal components, as Dosovitskiy 2020, fig. 7, shows; up to 64 filters are shown themselves


def _save(run, folder: Path, kind: str, plot: Callable, *values, title: str) -> Path:
    """Draw `plot(*values, title)` as NAME_KIND.png; a folder that can't be written is a UserError."""
    path = folder / f"{run.name}_{kind}.png"
    with refusing(f"{path}: cannot be written", "choose another --output_dir", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        plot(*values, title).savefig(path, dpi=150)
    return path


def draw_confusion(run, result: dict, folder: Path) -> Path:
    """Draw the confusion matrix of what `eval.evaluate` returned."""
    title = f"{run.name}\n{run.args.dataset}: {100 * result['accuracy']:.2f} % of {result['seen']}"
    path = _save(run, folder, "confusion", vis_utils.plot_confusion, result["confusion"], run.classes, title=title)
    _to_tensorboard(run, [path])
    return path


def draw_all(
    run, kinds: list[str], folder: Path, files: list[str] | None = None, blocks: list[int] | None = None,
    heads: list[int] | None = None, split: str = "test",
) -> dict[str, str]:  # fmt: skip
    """Draw what --plot asks for, into a folder and the run's TensorBoard folder, where that exists; the PNGs by kinds.

    Attention is that of `files`, or of the first image of each class in `split`, in `blocks`, counted from 0, or in
    four, and of `heads`, or the first ones. UserError: a block or head that the model doesn't have, a model without
    attention, or a file that can't be written.
    """
    paths = {}

    def add(kind: str, title: str, plot: Callable, *values) -> None:
        title = f"{run.name}, step {run.step}\n{title}"
        paths[kind] = str(_save(run, folder, kind, plot, *values, title=title))

    scales = layout_of(run.model)[0] if {*kinds} - {"errors"} else []
    known = None if files or not {"attention", "errors"} & {*kinds} else run.images_of(split)
    if "attention" in kinds:
        _draw_attention(add, run, scales, blocks, heads, *_shown_images(run, files, known))
    if "position" in kinds:
        tables = [(scale.name, similarity(scale.positions), scale.grid) for scale in scales]
        add("position", "similarity of position embeddings", vis_utils.plot_similarity, tables)
    if "patches" in kinds:
        filters = [scale.filters for scale in scales if scale.filters]
        groups = [shown_filters(name, kernels, run.args.dataset in GRAY) for name, kernels in filters]
        add("patches", "filters of the patch embedding", vis_utils.plot_filters, groups)
    if "errors" in kinds:
        _draw_errors(add, run, known, split)
    _to_tensorboard(run, paths.values())
    return paths


def _shown_images(run, files: list[str] | None, known: ImageSet | None) -> tuple[torch.Tensor, list[str]]:
    """Of files, or the first image of each class: images (b, 3, h, w), normalised, in float32, and their names."""
    if files:
        return torch.cat(list(run.inputs(files))).float(), [Path(file).name for file in files]
    index = first_of_each(known.labels)
    images = [batch for batch, _ in run.batches(known.part(index))]
    return torch.cat(images).float(), [run.classes[i] for i in known.labels[index].tolist()]


def _to_tensorboard(run, paths: Iterable[str | Path]) -> None:
    """Show pictures under visual/, after the curves in test/ and train/, by their files' names without the run's id."""
    folder = Path(run.args.log_dir) / run_id(run.args)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as board:
        for path in map(Path, paths):
            kind = path.stem.removeprefix(f"{run_id(run.args)}_")
            with Image.open(path) as image:
                board.add_image(f"visual/{kind}", np.asarray(image.convert("RGB")), run.step, dataformats="HWC")


def first_of_each(labels: torch.Tensor, limit: int = MAX_IMAGES) -> torch.Tensor:
    """Places of the first image of each class, in their order; the first `limit` of them."""
    _, first = np.unique(labels.numpy(), return_index=True)
    return torch.from_numpy(first).sort().values[:limit]


@dataclass(frozen=True)
class Scale:
    """Patches of one size, or of one resolution; see `token_layout` in models/__init__.py."""

    name: str
    grid: tuple[int, int]
    first: int
    start: int
    positions: torch.Tensor
    filters: tuple[str, torch.Tensor] | None

    @property
    def end(self) -> int:
        return self.start + self.grid[0] * self.grid[1]


def layout_of(model: nn.Module) -> tuple[list[Scale], int]:
    """The scales of a model's `attention_maps`, and the place of the class token that is read out."""
    silent = not hasattr(model, "token_layout")
    refuse(silent, f"--plot: {type(model).__name__} has no token_layout(), so only errors can be drawn")
    layout = model.token_layout()
    return [Scale(**scale) for scale in layout["scales"]], layout["class_token"]


def rollout(maps: torch.Tensor) -> torch.Tensor:
    """Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928): what reaches a token through all blocks so far.

    Heads are averaged, half of each token goes past the attention along the residual connection (in DEMS, where merged
    tokens count as their parts, with each part), and blocks are multiplied up. (depth, heads, n, n) -> (depth, n, n).
    """
    steps = (maps.mean(dim=1) + torch.eye(maps.shape[-1], device=maps.device)) / 2
    return torch.stack(list(accumulate(steps, lambda rolled, step: step @ rolled)))


def centres(scales: list[Scale], image_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of all patches in the sequence (m), and their centres in pixels of the whole image (m, 2)."""
    places, points = [], []
    for scale in scales:
        lines = [(torch.arange(n) + 0.5) * side / n for n, side in zip(scale.grid, image_size, strict=True)]
        points.append(torch.cartesian_prod(*lines).view(-1, 2))
        places.append(torch.arange(scale.start, scale.end))
    return torch.cat(places), torch.cat(points)


def attention_distance(maps: torch.Tensor, places: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """How far patches look (Dosovitskiy 2020, fig. 7): the distance between centres in pixels, averaged by attention.

    Between patches it is scaled to sum to 1. Maps (..., n, n) and `centres` -> (...), the mean over attending patches.
    """
    places, points = places.to(maps.device), points.to(maps.device)
    weights = F.normalize(maps[..., places, :][..., places], p=1, dim=-1)
    return (weights * torch.cdist(points, points)).sum(dim=-1).mean(dim=-1)


def on_grid(received: torch.Tensor, scale: Scale) -> torch.Tensor:
    """What each token receives (..., n) -> what a scale's patches receive (..., rows, columns); 1 is an even share."""
    patches = received[..., scale.start : scale.end]
    share = patches / patches.mean(dim=-1, keepdim=True).clamp(min=1e-12)
    return share.unflatten(-1, scale.grid)


def all_scales(received: torch.Tensor, scales: list[Scale]) -> torch.Tensor:
    """What each token receives (b, n) -> (b, rows, columns) of the finest grid; coarse patches fill their area."""
    grid, total = max((scale.grid for scale in scales), key=math.prod), 0
    for scale in scales:
        patches = received[:, scale.start : scale.end].unflatten(-1, scale.grid)
        area = scale.grid[0] * scale.grid[1] / (grid[0] * grid[1])
        total = total + area * F.interpolate(patches[:, None], size=grid, mode="nearest")[:, 0]
    return total / total.mean(dim=(1, 2), keepdim=True)


@torch.no_grad()
def look(model: nn.Module, images: torch.Tensor, blocks: list[int] | None) -> Namespace:
    """Collect attention of b images, one by one: all maps of a large model at once would fill the memory.

    `heads` (blocks, heads, n, n) are the first image's in `blocks`, or in four; `last` (b, n) what the class token pays
    in the last block, mean over heads; `rolled` (b, depth, n) its rollout after each block; `distances` (depth, heads)
    mean attention distances in pixels, over images; `even` that of a token that attends to all it sees alike.
    """
    scales, class_token = layout_of(model)
    places, points = centres(scales, model.image_size)
    last, rolled, distances = [], [], []
    for image in images.split(1):
        maps = model.attention_maps(image)[0].float()
        if not last:
            depth = len(maps)
            blocks = blocks or sorted({i * depth // 4 for i in range(4)})
            refuse(max(blocks) >= depth, f"--blocks {max(blocks)}: the model has blocks 0 to {depth - 1}")
            heads = maps[blocks].cpu()
            even = attention_distance((maps > 0).any(dim=0).any(dim=0).float(), places, points).item()
        last.append(maps[-1, :, class_token].mean(dim=0).cpu())
        rolled.append(rollout(maps)[:, class_token].cpu())
        distances.append(attention_distance(maps, places, points).cpu())
    last, rolled, distances = torch.stack(last), torch.stack(rolled), torch.stack(distances).mean(dim=0)
    return Namespace(blocks=blocks, heads=heads, last=last, rolled=rolled, distances=distances, even=even)


def _by_scale(label: str, received: torch.Tensor, scales: list[Scale]) -> list[tuple[str, torch.Tensor]]:
    """Rows of `plot_overlays`, one a scale."""
    if len(scales) == 1:
        return [(label, on_grid(received, scales[0]))]
    shares = [received[:, scale.start : scale.end].sum(dim=1).mean().item() for scale in scales]
    return [
        (f"{label}\n{scale.name}\n({100 * share / sum(shares):.0f} % of it)", on_grid(received, scale))
        for scale, share in zip(scales, shares, strict=True)
    ]


def _draw_attention(
    add: Callable, run, scales: list[Scale], blocks: list[int] | None, chosen: list[int] | None, images: torch.Tensor,
    names: list[str],
) -> None:  # fmt: skip
    """Heads as matrices, the class token's attention and rollout over the images, and attention distance by depth."""
    seen = look(run.model, images, blocks)
    probability, label = run.probabilities(images).max(dim=1)
    pixels = denormalize(images, run.args.mean, run.args.std)
    shown = [vis_utils.shorten(text) for text in vis_utils.legible([*run.classes, *names])]
    names = shown[len(run.classes) :]
    answers = zip(names, label.tolist(), probability.tolist(), strict=True)
    columns = [f"{name}\n→ {shown[i]} {100 * p:.0f} %" for name, i, p in answers]
    heads, depth = len(seen.distances[0]), len(seen.distances)
    part = f", the first {MAX_HEADS} of {heads} heads" if heads > MAX_HEADS and not chosen else ""
    chosen = chosen or list(range(min(heads, MAX_HEADS)))
    refuse(max(chosen) >= heads, f"--heads {max(chosen)}: the model has heads 0 to {heads - 1}")
    parts = [(scale.name, scale.first, scale.end) for scale in scales]
    merged = [i for i in seen.blocks if i >= min(getattr(run.model, "merges", [depth]))]
    values = (seen.heads[:, chosen], seen.blocks, chosen, parts, pixels[0], merged)
    add("attention_heads", f"attention in {names[0]}{part}", vis_utils.plot_heads, *values)
    rows = _by_scale("last block,\nmean of heads", seen.last, scales) + _by_scale("rollout", seen.rolled[:, -1], scales)
    title = "where the class token looks: in the last block, and through all blocks (rollout)"
    add("attention_class", title, vis_utils.plot_overlays, pixels, columns, rows)
    stages = sorted({*seen.blocks, depth - 1})
    rows = [(f"after block {i}", all_scales(seen.rolled[:, i], scales)) for i in stages]
    title = "attention rollout of the class token by depth" + (", all scales together" if len(scales) > 1 else "")
    add("attention_rollout", title, vis_utils.plot_overlays, pixels, columns, rows)
    title = f"mean attention distance by depth, {len(images)} images of {run.model.image_size[1]} px"
    add("attention_distance", title, vis_utils.plot_distances, seen.distances, seen.even)


def similarity(table: torch.Tensor) -> torch.Tensor:
    """Vectors (n, d) -> cosines of all pairs (n, n)."""
    unit = F.normalize(table.detach().float().cpu(), dim=1)
    return unit @ unit.T


def principal_components(kernels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Principal components of filters (d, c, h, w): (n, c, h, w), n at most FILTERS; and their share of variance."""
    flat = kernels.double().flatten(1)
    flat = flat - flat.mean(dim=0)
    values, vectors = torch.linalg.svd(flat, full_matrices=False)[1:]
    n = min(FILTERS, max(1, int((values > 1e-5 * values[0]).sum())))
    share = (values[:n].square().sum() / values.square().sum().clamp(min=1e-300)).item()
    return vectors[:n].float().unflatten(1, kernels.shape[1:]), share


def shown_filters(name: str, kernels: torch.Tensor, gray: bool) -> tuple[str, torch.Tensor]:
    """Title and filters of a panel: all of them up to 64, else their first principal components.

    Models of `gray` images see the sum over a filter's channels only.
    """
    kernels = kernels.detach().float().cpu()
    if gray:
        kernels = kernels.sum(dim=1, keepdim=True)
    if len(kernels) <= 64:
        return f"{name}: all {len(kernels)} filters", kernels
    components, share = principal_components(kernels)
    title = f"{name}: principal components 1-{len(components)} of {len(kernels)} filters"
    return f"{title} ({100 * share:.0f} % of variance)", components


def most_confident_mistakes(run, batches: Iterable, limit: int = 25) -> dict:
    """Score images (b, 3, h, w) with labels (b) on the device, and keep the wrong answers of highest probability.

    Returns images (n, 3, h, w), true, predicted (n), probability (n), falling, and index (n) among all, with n at most
    `limit`; wrong and seen, numbers of images.
    """
    kept, wrong, seen = {}, 0, 0
    for images, labels in batches:
        probability, predicted = run.probabilities(images).max(dim=1)
        miss = predicted != labels
        index = seen + torch.arange(len(labels), device=labels.device)
        wrong, seen = wrong + int(miss.sum()), seen + len(labels)
        found = dict(images=images, true=labels, predicted=predicted, probability=probability, index=index)
        kept = {name: torch.cat([kept.get(name, values[:0]), values[miss]]) for name, values in found.items()}
        order = kept["probability"].argsort(descending=True, stable=True)[:limit]
        kept = {name: values[order] for name, values in kept.items()}
    return kept | {"wrong": wrong, "seen": seen}


def _draw_errors(add: Callable, run, known: ImageSet, split: str) -> None:
    found = Namespace(**most_confident_mistakes(run, run.batches(known)))
    if not found.wrong:
        print(f"No mistakes in {found.seen} images, so no picture of them", file=sys.stderr)
        return
    ids = known.ids[found.index.cpu()].tolist()
    names = [Path(known.paths[i]).name if known.paths else f"{split} image {i}" for i in ids]
    shown = vis_utils.legible([*run.classes, *names])
    true, predicted = ([shown[i] for i in labels.tolist()] for labels in (found.true, found.predicted))
    names, probability = shown[len(run.classes) :], found.probability.tolist()
    images = denormalize(found.images, run.args.mean, run.args.std)
    title = f"the {len(images)} most confident of {found.wrong} mistakes in {found.seen} {split} images"
    add("errors", title, vis_utils.plot_mistakes, images, true, predicted, probability, names)
