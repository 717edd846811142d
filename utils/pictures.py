"""What `eval.py --plot` shows: attention, position embeddings, patch filters and mistakes of a trained model.

Here is computed what `utils.vis_utils` draws, for every model: tokens of several scales are told apart by `scales_of`.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils import dist_util, vis_utils
from utils.cli import UserError
from utils.options import MAX_IMAGES, run_id

GRAY = ("fashionmnist", "fashionmnist-mini", "emnist")
MAX_HEADS = 12  # columns that stay legible
FILTERS = 28  # principal components, as Dosovitskiy 2020, fig. 7, shows; up to 64 filters are shown themselves


class Album:
    """Pictures of a checkpoint: PNGs in a folder, and the same in the run's TensorBoard folder where that exists.

    Args:
        folder: for the PNGs, made where missing.
        name: of the run, in file names and titles.
        run: the checkpoint's entries.
    """

    def __init__(self, folder: Path, name: str, run: dict):
        self.folder, self.name, self.step, self.paths = folder, name, run["step"], {}
        self.board_dir = Path(run["args"]["log_dir"]) / run_id(Namespace(**run["args"]))

    def add(self, kind: str, title: str, plot: Callable, *values) -> None:
        """Draw `plot(*values, path, title)`.

        Raises:
            UserError: the file cannot be written.
        """
        path = self.folder / f"{self.name}_{kind}.png"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            plot(*values, path, f"{self.name}, step {self.step}\n{title}")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output_dir") from None
        self.paths[kind] = path

    def to_board(self) -> None:
        """Show the pictures in TensorBoard, under the tags pictures/KIND."""
        if not self.board_dir.is_dir() or not os.access(self.board_dir, os.W_OK):
            return
        from PIL import Image
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.board_dir)) as board:
            for kind, path in self.paths.items():
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                board.add_image(f"pictures/{kind}", pixels, self.step, dataformats="HWC")


def draw(album: Album, args: Namespace, model: nn.Module, run: dict, precision: str, images, batches) -> None:
    """Draw what --plot asks for.

    Args:
        album: takes the pictures.
        args: plot and blocks are read.
        model: in eval mode.
        run: the checkpoint's entries.
        precision: of the predictions.
        images: () -> images (b, 3, h, w), normalised, and their names (b); called for attention.
        batches: () -> batches of the test set; called for errors.

    Raises:
        UserError: a block that the model doesn't have, or a file that cannot be written.
    """
    scales, _ = scales_of(model)
    if "attention" in args.plot:
        blocks = _blocks(args.blocks, len(model.blocks))
        _draw_attention(album, model, run, precision, blocks, *images())
    if "position" in args.plot:
        pairs = zip(scales, positions(model), strict=True)
        tables = [(scale.name, similarity(table), scale.grid) for scale, table in pairs]
        album.add("position", "similarity of position embeddings", vis_utils.plot_similarity, tables)
    if "patches" in args.plot:
        gray = run["args"]["dataset"] in GRAY
        groups = [shown_filters(name, kernels, gray) for name, kernels in patch_kernels(model, scales)]
        album.add("patches", "filters of the patch embedding", vis_utils.plot_filters, groups)
    if "errors" in args.plot:
        _draw_errors(album, model, run, precision, batches())
    album.to_board()


def first_of_each(labels: torch.Tensor, limit: int = MAX_IMAGES) -> torch.Tensor:
    """Places of the first image of each class, in their order; the first `limit` of them."""
    _, first = np.unique(labels.numpy(), return_index=True)
    return torch.from_numpy(first).sort().values[:limit]


# ---------------------------------------------------------------- attention


@dataclass(frozen=True)
class Scale:
    """The patches of one size, or of one resolution, in the sequence of `attention_maps`.

    Attributes:
        name: for people.
        grid: rows and columns of patches.
        first: first token in the sequence, class token included where the scale has its own.
        start: first patch.
    """

    name: str
    grid: tuple[int, int]
    first: int
    start: int

    @property
    def end(self) -> int:
        return self.start + self.grid[0] * self.grid[1]


def scales_of(model: nn.Module) -> tuple[list[Scale], int]:
    """The scales of a model's `attention_maps`, and the place of the class token that reads them out.

    ViT and its relatives have one scale. DEMS has four after its one class token. MViT has a class token in front of
    each; that of the finest counts, which is the one that the pooling before its head sees.
    """
    if hasattr(model, "regions"):
        scales, start = [], 1
        for side in model.scales:
            grid = (model.regions[0] * side, model.regions[1] * side)
            scales.append(Scale(f"{model.image_size[0] // grid[0]} px patches", grid, start, start))
            start = scales[-1].end
        return scales, 0
    if hasattr(model, "lengths"):
        scales, first = [], 0
        for (height, width), length in zip(model.image_sizes, model.lengths, strict=True):
            rows = model.grid[0] * height // model.image_size[0]
            grid = (rows, (length - 1) // rows)
            scales.append(Scale(f"{width} px image", grid, first, first + 1))
            first += length
        return scales, scales[-1].first
    return [Scale("patches", model.grid, 0, 1)], 0


def finest(scales: list[Scale]) -> Scale:
    return max(scales, key=lambda scale: scale.grid[0] * scale.grid[1])


def rollout(maps: torch.Tensor) -> torch.Tensor:
    """Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928): what reaches a token through all blocks so far.

    Heads are averaged, half of each token is taken to go past the attention along the residual connection, and the
    blocks are multiplied up. In DEMS, where merged tokens count as their parts, the residual half stays
    with each part.

    Args:
        maps: (depth, heads, n, n), rows sum to 1.

    Returns:
        (depth, n, n), after each block; rows sum to 1.
    """
    steps = (maps.mean(dim=1) + torch.eye(maps.shape[-1], device=maps.device)) / 2
    rolled = [steps[0]]
    for step in steps[1:]:
        rolled.append(step @ rolled[-1])
    return torch.stack(rolled)


def centres(scales: list[Scale], image_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of all patches in the sequence (m), and their centres in pixels of the whole image (m, 2)."""
    places, points = [], []
    for scale in scales:
        lines = [(torch.arange(n) + 0.5) * side / n for n, side in zip(scale.grid, image_size, strict=True)]
        points.append(torch.cartesian_prod(*lines).view(-1, 2))
        places.append(torch.arange(scale.start, scale.end))
    return torch.cat(places), torch.cat(points)


def attention_distance(maps: torch.Tensor, places: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """How far patches look (Dosovitskiy 2020, fig. 7): the distance between centres, averaged by attention.

    Class tokens are left out, and the attention between patches is scaled to sum to 1.

    Args:
        maps: (..., n, n) after the softmax.
        places, points: (m), (m, 2), from `centres`.

    Returns:
        (...) in pixels, the mean over attending patches.
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
    """What each token receives (b, n) -> (b, rows, columns) of the finest grid; 1 is an even share.

    A coarse patch's attention is spread evenly over its area.
    """
    grid = finest(scales).grid
    total = 0
    for scale in scales:
        patches = received[:, scale.start : scale.end].unflatten(-1, scale.grid)
        area = scale.grid[0] * scale.grid[1] / (grid[0] * grid[1])
        total = total + area * F.interpolate(patches[:, None], size=grid, mode="nearest")[:, 0]
    return total / total.mean(dim=(1, 2), keepdim=True)


@dataclass
class Look:
    """Attention of b images.

    Attributes:
        heads: (blocks, heads, n, n), chosen blocks of the first image.
        last: (b, n), what the class token pays in the last block, mean over heads.
        rolled: (b, depth, n), its rollout after each block.
        distances: (depth, heads), mean attention distance in pixels, mean over images.
        even: the distance if every token attended to all it sees alike.
    """

    heads: torch.Tensor
    last: torch.Tensor
    rolled: torch.Tensor
    distances: torch.Tensor
    even: float


@torch.no_grad()
def look(model: nn.Module, images: torch.Tensor, blocks: list[int]) -> Look:
    """Collect attention image by image: all maps of a large model at once would fill the memory."""
    scales, cls = scales_of(model)
    places, points = centres(scales, model.image_size)
    last, rolled, distances = [], [], []
    for image in images.split(1):
        maps = model.attention_maps(image)[0].float()
        if not last:
            heads = maps[blocks, :MAX_HEADS].cpu()
            even = attention_distance((maps > 0).any(dim=0).any(dim=0).float(), places, points).item()
        last.append(maps[-1, :, cls].mean(dim=0).cpu())
        rolled.append(rollout(maps)[:, cls].cpu())
        distances.append(attention_distance(maps, places, points).cpu())
    return Look(heads, torch.stack(last), torch.stack(rolled), torch.stack(distances).mean(dim=0), even)


def _blocks(wanted: list[int] | None, depth: int) -> list[int]:
    if wanted is None:
        return sorted({i * depth // 4 for i in range(4)})
    if max(wanted) >= depth:
        raise UserError(f"--blocks {max(wanted)}: the model has blocks 0 to {depth - 1}")
    return wanted


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
    album: Album, model: nn.Module, run: dict, precision: str, blocks: list[int], images: torch.Tensor, names: list[str]
) -> None:
    """Heads as matrices, the class token's attention and rollout over the images, and attention distance by depth."""
    scales, _ = scales_of(model)
    seen = look(model, images, blocks)
    with torch.no_grad(), dist_util.autocast(images.device, precision):
        logits = model(images)
    probability, label = logits.float().softmax(dim=1).max(dim=1)
    pixels = vis_utils.denormalize(images, run["args"]["mean"], run["args"]["std"])
    names = [vis_utils.shorten(name) for name in names]
    columns = [
        f"{name}\n→ {vis_utils.shorten(run['classes'][i])} {100 * p:.0f} %"
        for name, i, p in zip(names, label.tolist(), probability.tolist(), strict=True)
    ]
    heads, depth = len(seen.distances[0]), len(seen.distances)
    shown = f", the first {MAX_HEADS} of {heads} heads" if heads > MAX_HEADS else ""
    parts = [(scale.name, scale.first, scale.end) for scale in scales]
    album.add("attention_heads", f"attention in {names[0]}{shown}", vis_utils.plot_heads, seen.heads, blocks, parts)
    rows = _by_scale("last block,\nmean of heads", seen.last, scales) + _by_scale("rollout", seen.rolled[:, -1], scales)
    title = "where the class token looks: in the last block, and through all blocks (rollout)"
    album.add("attention_class", title, vis_utils.plot_overlays, pixels, columns, rows)
    stages = sorted({*blocks, depth - 1})
    rows = [(f"after block {i}", all_scales(seen.rolled[:, i], scales)) for i in stages]
    title = "attention rollout of the class token by depth" + (", all scales together" if len(scales) > 1 else "")
    album.add("attention_rollout", title, vis_utils.plot_overlays, pixels, columns, rows)
    title = f"mean attention distance by depth, {len(images)} images of {model.image_size[1]} px"
    album.add("attention_distance", title, vis_utils.plot_distances, seen.distances, seen.even)


# ---------------------------------------------------------------- position embeddings and patches


def similarity(table: torch.Tensor) -> torch.Tensor:
    """Vectors (n, d) -> cosines of all pairs (n, n)."""
    unit = F.normalize(table.detach().float().cpu(), dim=1)
    return unit @ unit.T


def positions(model: nn.Module) -> list[torch.Tensor]:
    """The position embedding of each scale's patches, (n, d) each, in the order of `scales_of`."""
    if hasattr(model, "regions"):
        return [table[0] for table in (model.pos_embed, model.pos_embed_2, model.pos_embed_4, model.pos_embed_8)]
    if hasattr(model, "lengths"):
        coarse = [model.get_buffer(f"to_grid_{i}") @ model.pos_embed[0] for i in range(len(model.lengths) - 1)]
        return [*coarse, model.pos_embed[0]]
    return [model.pos_embed[0, 1:]]


def kernel_of(projection: nn.Conv2d | nn.Sequential) -> torch.Tensor:
    """The kernel (d, c, p, p) of a patch convolution, or of the one that DEMS's three in a row amount to."""
    if isinstance(projection, nn.Conv2d):
        return projection.weight
    fine, coarse, mix = (module.weight for module in projection)  # (c, 1, s, s), (c, 1, 4, 4), (d, c, 1, 1)
    both = torch.stack([torch.kron(outer[0], inner[0]) for outer, inner in zip(coarse, fine, strict=True)])
    return mix * both


def patch_kernels(model: nn.Module, scales: list[Scale]) -> list[tuple[str, torch.Tensor]]:
    """Name and kernels (d, c, p, p) of each patch embedding; of the first convolution where a stem comes first."""
    embeds, names = [model.patch_embed], ["patch embedding"]
    if hasattr(model, "regions"):
        embeds += [model.patch_embed_2, model.patch_embed_4, model.patch_embed_8]
        names = [scale.name for scale in scales]
    found = []
    for name, embed in zip(names, embeds, strict=True):
        stem = getattr(embed, "stem", nn.Identity())
        first = next((module for module in stem.modules() if isinstance(module, nn.Conv2d)), None)
        found.append((name, kernel_of(embed.proj)) if first is None else (f"{name}, first convolution", first.weight))
    return found


def principal_components(kernels: torch.Tensor, limit: int = FILTERS) -> tuple[torch.Tensor, float]:
    """Principal components of filters (d, c, h, w): (n, c, h, w), n at most `limit`; and their share of variance."""
    flat = kernels.double().flatten(1)
    flat = flat - flat.mean(dim=0)
    values, vectors = torch.linalg.svd(flat, full_matrices=False)[1:]
    n = min(limit, max(1, int((values > 1e-5 * values[0]).sum())))
    share = (values[:n].square().sum() / values.square().sum().clamp(min=1e-300)).item()
    return vectors[:n].float().unflatten(1, kernels.shape[1:]), share


def shown_filters(name: str, kernels: torch.Tensor, gray: bool) -> tuple[str, torch.Tensor]:
    """Title and filters of a panel: all of them up to 64, else their first principal components.

    Args:
        gray: trained on gray images, which see the sum over a filter's channels only.
    """
    kernels = kernels.detach().float().cpu()
    if gray:
        kernels = kernels.sum(dim=1, keepdim=True)
    if len(kernels) <= 64:
        return f"{name}: all {len(kernels)} filters", kernels
    components, share = principal_components(kernels)
    title = f"{name}: principal components 1-{len(components)} of {len(kernels)} filters"
    return f"{title} ({100 * share:.0f} % of variance)", components


# ---------------------------------------------------------------- mistakes


@torch.no_grad()
def most_confident_mistakes(
    model: nn.Module, batches: Iterable, device: torch.device, precision: str, limit: int = 25
) -> dict:
    """Score images one by one, and keep the wrong answers of highest probability.

    Args:
        model: in eval mode.
        batches: images (b, 3, h, w) and labels (b) on the device.

    Returns:
        images (n, 3, h, w), true, predicted (n) and probability (n), falling, with n at most `limit`;
        wrong and seen, numbers of images.
    """
    kept, wrong, seen = None, 0, 0
    for images, labels in batches:
        with dist_util.autocast(device, precision):
            logits = model(images)
        probability, predicted = logits.float().softmax(dim=1).max(dim=1)
        miss = predicted != labels
        wrong, seen = wrong + int(miss.sum()), seen + len(labels)
        found = [images[miss], labels[miss], predicted[miss], probability[miss]]
        if kept is not None:
            found = [torch.cat(pair) for pair in zip(kept, found, strict=True)]
        order = found[3].argsort(descending=True, stable=True)[:limit]
        kept = [values[order] for values in found]
    names = ("images", "true", "predicted", "probability")
    return dict(zip(names, kept, strict=True)) | {"wrong": wrong, "seen": seen}


def _draw_errors(album: Album, model: nn.Module, run: dict, precision: str, batches: Iterable) -> None:
    device = next(model.parameters()).device
    found = most_confident_mistakes(model, batches, device, precision)
    if not found["wrong"]:
        print(f"No mistakes in {found['seen']} images, so no picture of them", file=sys.stderr)
        return
    true, predicted = ([run["classes"][i] for i in found[name].tolist()] for name in ("true", "predicted"))
    images = vis_utils.denormalize(found["images"], run["args"]["mean"], run["args"]["std"])
    probability = found["probability"].tolist()
    title = f"the {len(images)} most confident of {found['wrong']} mistakes in {found['seen']} test images"
    album.add("errors", title, vis_utils.plot_mistakes, images, true, predicted, probability)
