"""Batches of images cut, mirrored, resized, moved, turned and normalised, every image its own way, without a loop.

A crop, a flip and the resize are one pair of matrix products an image: `rows @ image @ columns^T`, where a row of
`rows` holds the antialiased weights of one output line; for small images the weights of every box are looked up.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange

CACHE = 2**22  # bytes of results that a CPU works on at a time
TABLE = 2**25  # bytes of a table of weights at most: 32 -> 224 px takes 15 MB in bfloat16


def _filter(x: torch.Tensor, interpolation: str) -> torch.Tensor:
    """The triangle (bilinear), or Keys' cubic with a = -1/2 that Pillow and torchvision's antialiased resize use."""
    x = x.abs()
    near = (1 - x).clamp_(min=0)
    if interpolation == "bilinear":
        return near
    far = (2 - x).clamp_(min=0)  # the cubic as a spline with knots at 1 and 2: no branches
    return (0.5 * far - 0.5).mul_(far).mul_(far) + (1 - 2 * near).mul_(near).mul_(near)


def resize_weights(
    start: torch.Tensor, length: torch.Tensor, in_size: int, out_size: int, interpolation: str,
    window: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Weights that resample the interval [start, start + length) of a line to `out_size` pixels, antialiased.

    `start` and `length` (b,) in pixels, inside the line of `in_size`, need not be whole -> (b, out_size, in_size)
    float32, rows that sum to 1 and are zero outside the interval. With `window`, first and total (b,), the interval is
    resampled to `total` pixels, of which `out_size` are computed, from number `first` on.
    """
    start, length = start[:, None, None], length[:, None, None]
    first, total = (part[:, None, None] for part in window) if window else (0, out_size)
    scale = length.float() / total
    stretch = scale.clamp(min=1)
    reach = 1 if interpolation == "bilinear" else 2
    centre = start + (first + torch.arange(out_size, device=start.device)[:, None] + 0.5) * scale  # (b, out, 1)
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
    start, length = torch.tensor(intervals).to(device, non_blocking=True).unbind(1)
    weights = resize_weights(start, length, in_size, out_size, interpolation).to(dtype)
    return torch.cat([weights, weights.flip(1)])


def line_weights(
    start: torch.Tensor, length: torch.Tensor, mirrored: torch.Tensor | None, in_size: int, out_size: int,
    interpolation: str, dtype: torch.dtype, window: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """`resize_weights`, (b, out_size, in_size) of `dtype`, in reverse where `mirrored`; looked up for whole pixels."""
    side = -(-in_size // 16) * 16  # few tables do for batches of many sizes
    intervals = side * (side + 1) // 2
    if window or start.is_floating_point() or 2 * intervals * out_size * side * dtype.itemsize > TABLE:
        weights = resize_weights(start, length, in_size, out_size, interpolation, window).to(dtype)
        return weights if mirrored is None else torch.where(mirrored[:, None, None], weights.flip(1), weights)
    place = (length - 1) * (2 * side + 2 - length) // 2 + start
    if mirrored is not None:
        place = place + intervals * mirrored
    return _weight_table(side, out_size, interpolation, dtype, start.device).index_select(0, place)[..., :in_size]


def crop_flip_resize(
    images: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor | None, size: int, interpolation: str, *,
    factor: Sequence[float] = (), bias: Sequence[float] = (), dtype: torch.dtype = torch.float32,
    windows: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Cut each image's box, mirror it where `flips`, resize it to `size` x `size`, antialiased, and normalise it.

    Images (b, 1 or c, h, w), 0..255, and boxes (b, 4) of top, left, height, width, not always whole -> (b, c, size,
    size) of `dtype`, which the products are of, too. A level becomes level * factor + bias of its channel, without them
    it stays; bicubic overshoots beyond levels 0 and 255 are cut off. With `windows` (b, 4) of top, left, height, width
    each box is resized to that height and width, and `size` x `size` are cut out of it at top and left.
    """
    top, left, height, width = boxes.unbind(1)
    above, beside = (windows[:, 0::2].unbind(1), windows[:, 1::2].unbind(1)) if windows is not None else (None, None)
    rows = line_weights(top, height, None, images.shape[2], size, interpolation, dtype, above)
    columns = line_weights(left, width, flips, images.shape[3], size, interpolation, dtype, beside)
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


def shift(images: torch.Tensor, offsets: torch.Tensor, pad: int) -> torch.Tensor:
    """Pad with black by `pad` pixels, and cut the native size back out at each image's (row, column)."""
    b, c, h, w = images.shape
    padded = F.pad(images, (pad, pad, pad, pad)).contiguous()
    high, wide = padded.shape[2:]
    channel = torch.arange(b * c, device=images.device).view(b, c, 1) * (high * wide)
    line = (offsets[:, :1] + torch.arange(h, device=images.device)) * wide + offsets[:, 1:]  # (b, h)
    runs = padded.view(-1).unfold(0, w, 1)  # of w pixels from each one on, a view; 3 times as fast as pixel by pixel
    return runs.index_select(0, (channel + line[:, None]).flatten()).view(images.shape)


def rotate_reflected(images: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Turn square images (b, c, s, s) float around their centres, bilinear; what comes in from outside is mirrored."""
    place = (torch.arange(images.shape[-1], device=images.device) * 2 + 1) / images.shape[-1] - 1
    cos, sin = (each[:, None, None] for each in (torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()))
    x, y = place, place[:, None]
    grid = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
