"""Colour and geometric operations on batches of uint8 images, every image its own operation and strength.

They equal the Pillow functions that timm's RandAugment and torchvision's ColorJitter call, to within one of 256 levels
(hue: torchvision's on tensors). A batch is grouped by operation, each group one vectorised pass; the groups are formed
on the CPU, where the operations were drawn, so a GPU is never waited for.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torchvision.transforms.v2.functional import equalize

# images (n, 3, h, w) uint8, value (n, 1, 1, 1) float32 -> (n, 3, h, w) uint8
# A CPU multiplies by a mask several times faster than torch.where chooses.


def levels(x: torch.Tensor) -> torch.Tensor:
    """Floats in 0..255 -> uint8, fractions cut off; by way of int32 in half the time on a CPU."""
    return x.int().byte()


def luma(images: torch.Tensor) -> torch.Tensor:
    """ITU-R 601 luma, (n, 1, h, w) float32 whole numbers, by Pillow's 16-bit weights; exact, as sums are below 2^24."""
    red, green, blue = images.float().split(1, dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor_()


def blend(base: torch.Tensor | float, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`base` at factor 0, the image at 1, beyond it at more; Pillow cuts fractions off rather than rounding."""
    return levels(((images.float() - base).mul_(factor) + base).clamp_(0, 255))


def auto_contrast(images: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    low = images.amin(dim=(2, 3), keepdim=True).float()
    spread = images.amax(dim=(2, 3), keepdim=True) - low
    stretched = (images - low).mul_(255).div_(spread.clamp(min=1))
    return torch.where(spread > 0, levels(stretched), images)


def sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    x = images.float()
    smooth, inner = x.clone(), x[..., 1:-1, 1:-1]  # 3x3, centre 5, all else 1; the border stays
    around = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    around = around[..., :-2] + around[..., 1:-1] + around[..., 2:]
    smooth[..., 1:-1, 1:-1] = ((around + 4 * inner) / 13 + 0.5).floor_()
    return blend(smooth, x, factor)


def hue(images: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn the hue by `turn` of a circle. Each channel is a function of hue, largest and smallest channel alone."""
    red, green, blue = images.float().split(1, dim=1)
    high, low = images.amax(dim=1, keepdim=True).float(), images.amin(dim=1, keepdim=True).float()
    chroma = high - low
    part = chroma.clamp(min=1)
    angle = torch.where(green == high, 2 + (blue - red) / part, 4 + (red - green) / part)
    angle = torch.where(red == high, (green - blue) / part, angle) + 6 * turn  # in sixths of a circle
    k = torch.cat([(angle + offset) % 6 for offset in (5, 3, 1)], dim=1)
    return levels(high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1) + 0.5)


COLOUR = {
    "Hue": hue,
    "AutoContrast": auto_contrast,
    "Equalize": lambda x, value: equalize(x),
    "Invert": lambda x, value: 255 - x,
    "Posterize": lambda x, bits: x & torch.bitwise_left_shift(255, 8 - bits.int()).to(torch.uint8),  # black at 0 bits
    "Solarize": lambda x, threshold: x ^ (x >= threshold).byte().neg_(),  # minus one is 255, and x ^ 255 is 255 - x
    "SolarizeAdd": lambda x, amount: x + (x < 128).byte().mul_(amount.byte()),  # at most 127 + 110, no overflow
    "Color": lambda x, factor: blend(luma(x), x, factor),
    "Contrast": lambda x, factor: blend((luma(x).mean(dim=(2, 3), keepdim=True) + 0.5).floor(), x, factor),
    "Brightness": lambda x, factor: blend(0, x, factor),
    "Sharpness": sharpness,
}

# images (n, c, s, s) uint8; bicubic, edges repeated; what comes in from outside has the colour `fill`, (c,) uint8


def cubic_weights(t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Weights of the four pixels around a place, t in 0..1 behind the second; a = -1, as in Pillow's transforms."""
    u = 1 - t
    outer, inner = -t * u, 1 + t * u
    return outer * u, inner * u, inner * t, outer * t


def weighted_sum(pixels: Iterable[torch.Tensor], weights: Iterable[torch.Tensor]) -> torch.Tensor:
    (first, weight), *others = zip(pixels, weights, strict=True)
    out = first * weight
    for each, weight in others:
        out.addcmul_(each, weight)
    return out


def filled(x: torch.Tensor, inside: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """The image in uint8 where `inside`, (n, h, w), and the colour `fill` elsewhere."""
    inside = inside[:, None]
    images = levels(x.add_(1e-3).clamp_(0, 255))  # cut off as in Pillow, but not what float32 left just below a level
    return images * inside + fill[:, None, None] * ~inside


def slide(images: torch.Tensor, slope: torch.Tensor, offset: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Move rows along themselves: what is now at (x, y) was at (x + slope * y + offset, y); slope, offset (n,)."""
    c, h, w = images.shape[1:]
    column = torch.arange(-1, w + 2, device=images.device)
    moved = slope[:, None] * (torch.arange(h, device=images.device) + 0.5) + offset[:, None]  # (n, h)
    whole = moved.floor()
    pixels = (column + whole[..., None].long()).clamp_(0, w - 1)
    taken = images.gather(3, pixels[:, None].expand(-1, c, -1, -1)).float()
    out = weighted_sum((taken[..., k : k + w] for k in range(4)), cubic_weights((moved - whole)[:, None, :, None]))
    place = column[1:-2] + 0.5 + moved[..., None]
    inside = (place >= 0) & (place < w)
    return filled(out, inside, fill)


def rotate(images: torch.Tensor, degrees: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Turn images counter-clockwise around their centres by degrees (n,)."""
    n, c, s, _ = images.shape
    x = torch.arange(s, device=images.device) + (0.5 - s / 2)
    y = x[:, None]
    angle = torch.deg2rad(degrees)[:, None, None]
    cos, sin = angle.cos(), angle.sin()
    place = torch.stack([cos * x - sin * y, sin * x + cos * y]).add_(s / 2)  # (2, n, s, s), x first
    inside = ((place >= 0) & (place < s)).all(dim=0)
    place = place.clamp_(0, s).sub_(0.5)
    left, top = corner = place.floor()
    weights = cubic_weights(rearrange(place - corner, "xy n h w -> xy n 1 (h w)"))
    across, down = zip(*weights, strict=True)

    # with a border of 2, the 4 x 4 pixels around any place lie at the same distances from the first of them
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="replicate").flatten(2)
    first = rearrange((top + 1) * (s + 4) + left + 1, "n h w -> n 1 (h w)").long().expand(-1, c, -1)
    rows = (padded[..., i * (s + 4) :] for i in range(4))
    lines = (weighted_sum((row[..., j:].gather(2, first) for j in range(4)), across) for row in rows)
    out = weighted_sum(lines, down)
    return filled(out.view_as(images), inside, fill)


PLACE = {
    "Rotate": rotate,
    "ShearX": lambda x, slope, fill: slide(x, slope, 0 * slope, fill),
    "TranslateX": lambda x, part, fill: slide(x, 0 * part, x.shape[-1] * part, fill),
    # columns move as rows of the mirrored image
    "ShearY": lambda x, slope, fill: slide(x.mT, slope, 0 * slope, fill).mT,
    "TranslateY": lambda x, part, fill: slide(x.mT, 0 * part, x.shape[-2] * part, fill).mT,
}
OPERATIONS = (*COLOUR, *PLACE)  # in the order of their numbers
NUMBER = {name: number for number, name in enumerate(OPERATIONS)}


def operate(images: torch.Tensor, operation: torch.Tensor, value: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Apply each image's operations, one after the other.

    Images (b, 3, s, s) uint8 are left as they are. `operation` (b, layers) are places in OPERATIONS, or -1 for none,
    `value` what their functions take (of translations a part of the side), both on the CPU; `fill` (3,) uint8 is the
    colour of what geometric operations bring in from outside.
    """
    for number, amount in zip(operation.unbind(1), value.unbind(1), strict=True):
        order = number.argsort(stable=True)
        counts = (number + 1).bincount(minlength=len(OPERATIONS) + 1).tolist()
        drawn = order, order.argsort(), amount[order]
        order, inverse, amount = (each.to(images.device, non_blocking=True) for each in drawn)
        grouped = images.index_select(0, order)
        groups = zip(OPERATIONS, grouped.split(counts)[1:], amount.split(counts)[1:], strict=True)  # without 'none'
        for name, part, strength in groups:
            if not len(part):
                continue
            if name in COLOUR:
                part.copy_(COLOUR[name](part, strength[:, None, None, None]))
            else:
                part.copy_(PLACE[name](part, strength, fill))
        images = grouped.index_select(0, inverse)
    return images


# What timm's functions take at a level (0..1 of the highest magnitude) and a sign (-1 or 1), 'increasing' variants.
ARGUMENTS = {
    "Posterize": lambda level, sign: 4 - (level * 4).floor(),
    "Solarize": lambda level, sign: 256 - (level * 256).floor(),
    "SolarizeAdd": lambda level, sign: (level * 110).floor(),
    "Rotate": lambda level, sign: sign * 30 * level,
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), lambda level, sign: 1 + sign * 0.9 * level),
    **dict.fromkeys(("ShearX", "ShearY"), lambda level, sign: sign * 0.3 * level),
    **dict.fromkeys(("TranslateX", "TranslateY"), lambda level, sign: sign * 0.45 * level),
}


def draw_randaugment(b: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """RandAugment (arXiv 1909.13719) as timm's `rand-m9-mstd0.5-inc1` chooses it: operations and values (b, 2).

    For each image two of 15 operations, drawn with replacement; each is left out with probability 1/2; magnitude
    normal(9, 0.5), cut to 0..10. The generator is on the CPU.
    """
    operation = torch.randint(1, len(OPERATIONS), (b, 2), generator=generator)  # any but Hue
    left_out = torch.rand(b, 2, generator=generator) < 0.5
    level = torch.randn(b, 2, generator=generator).mul_(0.5).add_(9).clamp_(0, 10) / 10
    sign = torch.where(torch.rand(b, 2, generator=generator) < 0.5, -1.0, 1.0)
    value = torch.zeros(b, 2)
    for name, argument in ARGUMENTS.items():
        value = torch.where(operation == NUMBER[name], argument(level, sign), value)
    return operation.masked_fill_(left_out, -1), value


def draw_jitter(b: int, probability: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """DEMS-ViT's colours: jitter (0.4, 0.4, 0.2, 0.1) in random order, as torchvision's; grayscale; solarise at 128.

    Each of the three with its `probability`; operations and values (b, 6) for `operate`.
    """
    number = torch.tensor([NUMBER[name] for name in ("Brightness", "Contrast", "Color", "Hue")])
    unchanged, reach = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.4, 0.4, 0.2, 0.1])
    value = unchanged + reach * (2 * torch.rand(b, 4, generator=generator) - 1)
    order = torch.rand(b, 4, generator=generator).argsort(dim=1)
    more = torch.tensor([[NUMBER["Color"], NUMBER["Solarize"]]])
    operation = torch.cat([number[order], more.expand(b, 2)], dim=1)
    value = torch.cat([value.gather(1, order), torch.tensor([[0.0, 128.0]]).expand(b, 2)], dim=1)
    left_out = torch.rand(b, 3, generator=generator) >= probability
    return operation.masked_fill_(left_out[:, [0, 0, 0, 0, 1, 2]], -1), value
