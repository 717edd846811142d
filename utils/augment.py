"""Batched augmentation on the device: uint8 images in, normalised float images out, every image its own parameters.

What is random is drawn on the CPU from a generator that the caller seeds with (seed, step), so that the same images
come out on any device and for any number of processes. A crop, a flip and the resize are one pair of matrix products
an image: `rows @ image @ columns^T`, where a row of `rows` holds the antialiased weights of one output line; for small
images the weights of every possible box are looked up.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from utils import randaugment

CACHE = 2**22  # bytes of results that a CPU works on at a time
TABLE = 2**25  # bytes of a table of weights at most: 32 -> 224 px takes 15 MB in bfloat16
RATIO = (3 / 4, 4 / 3)  # width / height of random crops
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's RandomErasing


def _draw_boxes(
    sizes: torch.Tensor, scale: tuple[float, float], ratio: tuple[float, float], room: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes of random area and ratio at a random place: the first of ten tries that leaves `room` pixels in each side.

    Returns:
        (b, 4) float64 top, left, height, width, and (b, 1) bool, whether a try did fit.
    """
    height, width = (side.double()[:, None] for side in sizes.unbind(1))
    b, tries = len(sizes), 10
    area = height * width * torch.empty(b, tries, dtype=torch.float64).uniform_(*scale, generator=generator)
    log_ratio = torch.empty(b, tries, dtype=torch.float64).uniform_(*map(math.log, ratio), generator=generator)
    drawn = log_ratio.exp_()
    corner = torch.rand(b, 2, dtype=torch.float64, generator=generator)
    w = (area * drawn).sqrt_().round_()
    h = (area / drawn).sqrt_().round_()
    fits = (w > 0) & (w <= width - room) & (h > 0) & (h <= height - room)
    first = fits.int().argmax(dim=1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)
    top, left = (corner[:, :1] * (height - h + 1)).floor(), (corner[:, 1:] * (width - w + 1)).floor()
    return torch.cat([top, left, h, w], dim=1), fits.any(dim=1, keepdim=True)


def random_resized_boxes(sizes: torch.Tensor, scale: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    """Boxes of random resized crops, drawn as torchvision's RandomResizedCrop does: ten tries, then a central crop.

    Args:
        sizes: (b, 2) heights and widths.
        scale: range of the area, as a fraction of the image.
        generator: on the CPU.

    Returns:
        (b, 4) int64: top, left, height, width.
    """
    boxes, found = _draw_boxes(sizes, scale, RATIO, 0, generator)
    height, width = (side.double() for side in sizes.unbind(1))
    h = torch.minimum(height, (width / RATIO[0]).round())
    w = torch.minimum(width, (height * RATIO[1]).round())
    central = torch.stack([((height - h) / 2).floor(), ((width - w) / 2).floor(), h, w], dim=1)
    return torch.where(found, boxes, central).long()


def central_boxes(sizes: torch.Tensor, crop_pct: float) -> torch.Tensor:
    """Boxes of evaluation, (b, 4): the whole image for 1, else the central square of crop_pct x the short side."""
    whole = torch.cat([torch.zeros_like(sizes), sizes], dim=1)
    if crop_pct == 1.0:
        return whole
    side = (sizes.min(dim=1, keepdim=True).values * crop_pct).round().long().clamp(min=1).expand(-1, 2)
    return torch.cat([(sizes - side) // 2, side], dim=1)


def _filter(x: torch.Tensor, interpolation: str) -> torch.Tensor:
    """The triangle (bilinear), or Keys' cubic with a = -1/2 that Pillow and torchvision's antialiased resize use."""
    x = x.abs()
    near = (1 - x).clamp_(min=0)
    if interpolation == "bilinear":
        return near
    far = (2 - x).clamp_(min=0)  # the cubic as a spline with knots at 1 and 2: no branches
    return (0.5 * far - 0.5).mul_(far).mul_(far) + (1 - 2 * near).mul_(near).mul_(near)


def resize_weights(start: torch.Tensor, length: torch.Tensor, in_size: int, out_size: int, interpolation: str):
    """Weights that resample the interval [start, start + length) of a line to `out_size` pixels, antialiased.

    Args:
        start, length: (b,) in pixels, inside the line; not always whole.
        in_size: pixels of the line.
        out_size: pixels wanted.
        interpolation: 'bilinear' or 'bicubic'.

    Returns:
        (b, out_size, in_size) float32, rows that sum to 1 and are zero outside the interval.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length.float() / out_size
    stretch = scale.clamp(min=1)
    reach = 1 if interpolation == "bilinear" else 2
    centre = start + (torch.arange(out_size, device=start.device)[:, None] + 0.5) * scale  # (b, out, 1)
    count = math.ceil(2 * reach * max(1, in_size / out_size)) + 1  # pixels that a filter can touch, and more
    pixel = (centre - reach * stretch).floor() + torch.arange(count, device=start.device)
    weights = _filter((pixel + 0.5 - centre).div_(stretch), interpolation)
    weights *= (pixel >= start) & (pixel < start + length)
    weights.div_(weights.sum(dim=-1, keepdim=True))
    whole = weights.new_zeros(len(start), out_size, in_size)  # sums below are of one number and zeros, thus exact
    return whole.scatter_add_(2, pixel.clamp_(0, in_size - 1).long(), weights)


@lru_cache(maxsize=4)
def _weight_table(
    in_size: int, out_size: int, interpolation: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Weights of every interval of whole pixels, the shortest first, and then of the same mirrored."""
    intervals = [(start, length) for length in range(1, in_size + 1) for start in range(in_size + 1 - length)]
    start, length = torch.tensor(intervals, device=device).unbind(1)
    weights = resize_weights(start, length, in_size, out_size, interpolation).to(dtype)
    return torch.cat([weights, weights.flip(1)])


def line_weights(
    start: torch.Tensor,
    length: torch.Tensor,
    mirrored: torch.Tensor | None,
    in_size: int,
    out_size: int,
    interpolation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`resize_weights`, (b, out_size, in_size) of `dtype`, in reverse where `mirrored`; looked up for whole pixels."""
    side = -(-in_size // 16) * 16  # few tables do for batches of many sizes
    intervals = side * (side + 1) // 2
    if start.is_floating_point() or 2 * intervals * out_size * side * dtype.itemsize > TABLE:
        weights = resize_weights(start, length, in_size, out_size, interpolation).to(dtype)
        return weights if mirrored is None else torch.where(mirrored[:, None, None], weights.flip(1), weights)
    place = (length - 1) * (2 * side + 2 - length) // 2 + start
    if mirrored is not None:
        place = place + intervals * mirrored
    return _weight_table(side, out_size, interpolation, dtype, start.device).index_select(0, place)[..., :in_size]


def crop_flip_resize(
    images: torch.Tensor,
    boxes: torch.Tensor,
    flips: torch.Tensor | None,
    size: int,
    interpolation: str,
    *,
    factor: Sequence[float] = (),
    bias: Sequence[float] = (),
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Cut each image's box, mirror it where `flips`, resize it to `size` x `size`, antialiased, and normalise it.

    Args:
        images: (b, 1 or c, h, w), 0..255.
        boxes: (b, 4) top, left, height, width; not always whole.
        flips: (b,) bool, or None.
        factor, bias: c each: a level becomes level * factor + bias. Factors are positive. Without them levels stay.
        dtype: of the result, and of the products.

    Returns:
        (b, c, size, size) of `dtype`; bicubic overshoots beyond levels 0 and 255 are cut off.
    """
    top, left, height, width = boxes.unbind(1)
    rows = line_weights(top, height, None, images.shape[2], size, interpolation, dtype)
    columns = line_weights(left, width, flips, images.shape[3], size, interpolation, dtype)
    cut = interpolation == "bicubic"  # it overshoots; Pillow cuts off after each pass
    channels = len(factor) or images.shape[1]
    out = torch.empty(len(images), channels, size, size, dtype=dtype, device=images.device)
    for part in parts(out):
        x = rearrange(images[part].to(dtype), "b c h w -> b (c h) w") @ columns[part].mT
        if cut:
            x.clamp_(0, 255)
        x = rearrange(x, "b (c h) o -> b c h o", h=images.shape[2])
        if factor:  # between the two passes, where pixels are few: weights sum to 1, so it comes to the same
            x = normalise(x, factor, bias, dtype)
        each = rows[part, None].expand(-1, channels, -1, -1)
        torch.bmm(each.flatten(0, 1), x.flatten(0, 1), out=out[part].flatten(0, 1))
        if cut and not factor:
            out[part].clamp_(0, 255)
        elif cut:
            for channel, (scale, low) in enumerate(zip(factor, bias, strict=True)):
                out[part, channel].clamp_(low, 255 * scale + low)
    return out


def normalise(images: torch.Tensor, factor: Sequence[float], bias: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """level * factor + bias for each channel: (b, 1 or c, h, w) levels -> (b, c, h, w) of `dtype`."""
    out = torch.empty(len(images), len(factor), *images.shape[2:], dtype=dtype, device=images.device)
    images = images.expand_as(out)
    for part in parts(out):
        for channel, (scale, low) in enumerate(zip(factor, bias, strict=True)):
            torch.add(torch.tensor(low), images[part, channel], alpha=scale, out=out[part, channel])
    return out


def parts(images: torch.Tensor) -> list[slice]:
    """Slices of a batch: on a CPU, so many images as its cache holds (a fifth faster than 1,024 of 32 px at once)."""
    step = len(images)
    if images.device.type == "cpu":
        step = max(1, CACHE // (images.shape[1:].numel() * images.element_size()))
    return [slice(i, i + step) for i in range(0, len(images), max(1, step))]


def shift(images: torch.Tensor, offsets: torch.Tensor, pad: int, flips: torch.Tensor | None = None) -> torch.Tensor:
    """Pad with black by `pad` pixels, cut the native size back out at each image's (row, column), mirror where `flips`.

    A line of the result is a run of pixels in memory: of the padded images, or of these mirrored.
    """
    b, c, h, w = images.shape
    high, wide = h + 2 * pad, w + 2 * pad
    padded = F.pad(images, (pad, pad, pad, pad)).contiguous()
    row, column = offsets.unbind(1)
    start = torch.arange(b, device=images.device) * (c * high * wide) + row * wide
    if flips is not None:
        column = torch.where(flips, padded.numel() + 2 * pad - column, column)
        padded = torch.stack([padded, padded.flip(-1)])
    channel = torch.arange(c, device=images.device)[:, None] * (high * wide)
    line = torch.arange(h, device=images.device) * wide
    starts = (start + column)[:, None, None] + channel + line
    runs = padded.view(-1).unfold(0, w, 1)  # one from each pixel on, a view
    return runs.index_select(0, starts.flatten()).view(images.shape)


def rotate(images: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Turn square images (b, c, s, s) float around their centres, bilinear; what comes in from outside is mirrored."""
    place = (torch.arange(images.shape[-1], device=images.device) * 2 + 1) / images.shape[-1] - 1
    cos, sin = (each[:, None, None] for each in (torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()))
    x, y = place, place[:, None]
    grid = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def inside(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Which of size x size pixels lie in boxes (b, 4) of top, left, height, width: (b, 1, size, size) bool."""
    place = torch.arange(size, device=boxes.device)
    top, left, height, width = boxes[:, None].unbind(2)  # (b, 1)
    rows = (place >= top) & (place < top + height)
    columns = (place >= left) & (place < left + width)
    return rows[:, None, :, None] & columns[:, None, None, :]


class Augment:
    """One --aug pipeline: `draw` the parameters of a batch, then call it with images and parameters.

    Args:
        size: side of the output in pixels.
        mean, std: three numbers each, of pixels in 0..1.
        interpolation: 'bilinear' or 'bicubic'.
        scale: area range of a random resized crop, or None.
        flip: mirror every other image at random.
        pad: border of a random integer crop at native size, or 0.
        rotation: images are turned by up to so many degrees either way, after the crop; 0 for none.
        operations: 'randaugment' or 'jitter' (see utils/randaugment.py), or None; after the crop, on whole levels.
        aug_prob: of 'jitter', when training begins; it falls to 0 as half a cosine.
        reprob: of random erasing, one box filled with normal noise after normalisation (arXiv 1708.04896).
        crop_pct: central part of the short side to take where nothing is random, 1 for the whole image.
        device: of the images.
        dtype: of the result. bfloat16 resizes faster, to within 3 of 256 levels, 0.3 on average.
    """

    NOISE = 2**20  # numbers in the table that erased boxes are filled from

    def __init__(
        self,
        size: int,
        mean: list[float],
        std: list[float],
        *,
        interpolation: str = "bilinear",
        scale: tuple[float, float] | None = None,
        flip: bool = False,
        pad: int = 0,
        rotation: float = 0.0,
        operations: str | None = None,
        aug_prob: float = 0.0,
        reprob: float = 0.0,
        crop_pct: float = 1.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.size, self.interpolation, self.crop_pct = size, interpolation, crop_pct
        self.dtype = dtype
        self.scale, self.flip, self.pad = scale, flip, pad
        self.rotation, self.operations, self.aug_prob, self.reprob = rotation, operations, aug_prob, reprob
        if operations not in (None, "randaugment", "jitter"):
            raise ValueError(f"operations {operations!r} is neither 'randaugment' nor 'jitter'")
        fill = [min(255, round(255 * value)) for value in mean]  # as timm's create_transform does
        self.fill = torch.tensor(fill, dtype=torch.uint8, device=device)
        if reprob:
            count = max(self.NOISE, 4 * 3 * size**2)
            noise = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            self.noise = noise.unfold(0, 3 * size**2, 1)  # one image's noise from each place on, a view
        self.factor = [1 / (255 * s) for s in std]
        self.bias = [-m / s for m, s in zip(mean, std, strict=True)]

    def draw(
        self, sizes: torch.Tensor, generator: torch.Generator | None = None, progress: float = 0.0
    ) -> dict[str, torch.Tensor]:
        """Parameters of a batch, on the CPU; each entry has the batch as first dimension.

        Args:
            sizes: (b, 2) heights and widths of the images.
            generator: on the CPU; not needed where nothing is random.
            progress: part of the training that is done, 0..1; 'jitter' grows rarer with it.
        """
        params, b = {}, len(sizes)
        if self.scale:
            params["box"] = random_resized_boxes(sizes, self.scale, generator)
        elif self.crop_pct != 1.0 or (sizes != self.size).any():
            params["box"] = central_boxes(sizes, self.crop_pct)
        if self.pad:
            params["offset"] = torch.randint(0, 2 * self.pad + 1, (b, 2), generator=generator)
        if self.flip:
            params["flip"] = torch.rand(b, generator=generator) < 0.5
        if self.rotation:
            params["angle"] = torch.empty(b).uniform_(-self.rotation, self.rotation, generator=generator)
        if self.operations == "randaugment":
            params["operation"], params["value"] = randaugment.draw_randaugment(b, generator)
        elif self.operations == "jitter":
            probability = self.aug_prob * 0.5 * (1 + math.cos(math.pi * progress))
            params["operation"], params["value"] = randaugment.draw_jitter(b, probability, generator)
        if self.reprob:
            boxes, found = _draw_boxes(torch.full((b, 2), self.size), ERASED_AREA, ERASED_RATIO, 1, generator)
            found &= torch.rand(b, 1, generator=generator) < self.reprob
            params["erase"] = torch.where(found, boxes, 0.0).long()
            params["noise"] = torch.randint(len(self.noise), (b,), generator=generator)
        return params

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        """uint8 images (b, 1 or 3, h, w) -> normalised images (b, 3, size, size) of `dtype`.

        Args:
            params: from `draw`, for these images; without 'box' they must be size x size already.
        """
        chosen, params = params, {name: value.to(images.device, non_blocking=True) for name, value in params.items()}
        boxes, flips = params.get("box"), params.get("flip")
        if "offset" in params:
            images, flips = shift(images, params["offset"], self.pad, flips), None
        if boxes is not None and not self.rotation and not self.operations:
            normal = dict(factor=self.factor, bias=self.bias, dtype=self.dtype)
            x = crop_flip_resize(images, boxes, flips, self.size, self.interpolation, **normal)
        else:
            x = images
            if boxes is not None:
                x = crop_flip_resize(images, boxes, flips, self.size, self.interpolation)
            elif flips is not None:
                place = torch.arange(len(images), device=images.device) + len(images) * flips
                x = torch.cat([images, images.flip(-1)]).index_select(0, place)
            if self.rotation:
                x = rotate(x.float(), params["angle"])
            if self.operations:  # grouped by what is chosen on the CPU, so that a GPU need not be asked
                x = (x if x.dtype == torch.uint8 else randaugment.levels(x.round())).expand(-1, 3, -1, -1)
                x = randaugment.operate(x, chosen["operation"], chosen["value"], self.fill)
            x = normalise(x, self.factor, self.bias, self.dtype)
        if "erase" in params:
            index = chosen["erase"][:, 2].nonzero()[:, 0].to(x.device, non_blocking=True)
            noise = self.noise[params["noise"][index]].view(-1, *x.shape[1:])
            x[index] = torch.where(inside(params["erase"][index], self.size), noise, x[index])
        return x


class Mix:
    """Mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899), at most one of them a batch, the same for all its images.

    Images are mixed with their neighbours, 0 with 1, 2 with 3 and so on (a batch is in random order), so that any even
    part of a batch comes out as it would within the whole.

    Args:
        num_classes: length of the targets.
        mixup, cutmix: both parameters of the Beta distribution of an image's own share; 0 turns that kind off.
        prob: of mixing a batch at all.
        switch_prob: of cutmix, where both are on.
        smoothing: label smoothing of the targets; 0 where the loss smooths them, which is the same.

    Raises:
        ValueError: both kinds are off.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        smoothing: float = 0.0,
    ):
        if not mixup and not cutmix:
            raise ValueError("mixup and cutmix are both 0, there is nothing to mix by")
        self.num_classes, self.smoothing = num_classes, smoothing
        self.mixup, self.cutmix, self.prob, self.switch_prob = mixup, cutmix, prob, switch_prob

    def draw(self, size: tuple[int, int], generator: torch.Generator) -> tuple[float, tuple[int, int, int, int] | None]:
        """An image's own share, and for cutmix the box (top, left, bottom, right) that its neighbour fills.

        Args:
            size: height and width of the images.
            generator: on the CPU.
        """
        rng = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))  # torch has no seeded Beta
        if rng.random() >= self.prob:
            return 1.0, None
        if not self.cutmix or (self.mixup and rng.random() >= self.switch_prob):
            return rng.beta(self.mixup, self.mixup), None
        part = math.sqrt(1 - rng.beta(self.cutmix, self.cutmix))
        centre, side = rng.integers(size), (np.array(size) * part).astype(int)
        top, left = np.maximum(centre - side // 2, 0).tolist()
        bottom, right = np.minimum(centre + (side + 1) // 2, size).tolist()
        return 1 - (bottom - top) * (right - left) / (size[0] * size[1]), (top, left, bottom, right)

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, share: float, box: tuple[int, int, int, int] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed images, and targets (b, num_classes) float32 that sum to 1.

        Args:
            images: (b, c, h, w) float.
            labels: (b,) int64.
            share, box: from `draw`.

        Raises:
            ValueError: an odd number of images.
        """
        if len(images) % 2:
            raise ValueError(f"{len(images)} images don't make pairs; each process and pass needs an even number")
        targets = F.one_hot(labels, self.num_classes) * (1 - self.smoothing) + self.smoothing / self.num_classes
        targets = torch.lerp(_neighbours(targets), targets, share)
        if box:
            top, left, bottom, right = box
            images = images.clone()
            images[..., top:bottom, left:right] = _neighbours(images[..., top:bottom, left:right])
        elif share < 1:
            images = torch.lerp(_neighbours(images), images, share)
        return images, targets


def _neighbours(x: torch.Tensor) -> torch.Tensor:
    """Rows 1, 0, 3, 2, ..."""
    return rearrange(rearrange(x, "(n two) ... -> n two ...", two=2).flip(1), "n two ... -> (n two) ...")
