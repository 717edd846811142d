"""Colour and geometric operations on batches of uint8 images, every image its own operation and strength.

They equal the Pillow functions that timm's RandAugment and torchvision's ColorJitter call, to within one of the 256
levels (hue: torchvision's on tensors). The images of a batch are grouped by operation, and each group is one vectorised
pass; the groups are formed on the CPU, where the operations were drawn, so a GPU is never waited for.
"""


import torch
import torch.nn.functional as F
from einops import rearrange

# ---------------------------------------------------------------- operations on colours
# images (n, 3, h, w) uint8, value (n, 1, 1, 1) float32 -> (n, 3, h, w) uint8


def luma(images: torch.Tensor) -> torch.Tensor:
    """ITU-R 601 luma, (n, 1, h, w) float32 whole numbers, by Pillow's 16-bit weights; exact, as sums are below 2^24."""
    red, green, blue = images.float().split(1, dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor_()


def blend(base: torch.Tensor | float, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`base` at factor 0, the image at 1, beyond it at more; Pillow cuts fractions off rather than rounding."""
    return ((images.float() - base).mul_(factor) + base).clamp_(0, 255).byte()


def auto_contrast(images: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    low, high = images.flatten(2).float().aminmax(dim=2)
    low, spread = low[..., None, None], (high - low)[..., None, None]
    stretched = (images - low).mul_(255).div_(spread.clamp(min=1)).byte()
    return torch.where(spread > 0, stretched, images)


def equalize(images: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    pixels = images.flatten(2).long()
    histogram = pixels.new_zeros(*pixels.shape[:2], 256).scatter_add_(2, pixels, torch.ones_like(pixels))
    brightest = histogram.gather(2, pixels.amax(dim=2, keepdim=True))
    step = (pixels.shape[2] - brightest) // 255
    darker = histogram.cumsum(dim=2) - histogram
    table = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=255).byte()
    return torch.where(step[..., None] > 0, table.gather(2, pixels).view_as(images), images)


def invert(images: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return 255 - images


def posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    return images & torch.bitwise_left_shift(255, 8 - bits.int()).to(torch.uint8)  # 0 bits make a black image


def solarize(images: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return torch.where(images < threshold, images, 255 - images)


def solarize_add(images: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    return torch.where(images < 128, (images + amount).clamp_(max=255).byte(), images)


def color(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(luma(images), images, factor)


def contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend((luma(images).mean(dim=(2, 3), keepdim=True) + 0.5).floor(), images, factor)


def brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(0, images, factor)


def sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    x = images.float()
    smooth, inner = x.clone(), x[..., 1:-1, 1:-1]  # 3x3, centre 5, all else 1; the border stays
    around = F.avg_pool2d(x, 3, stride=1, divisor_override=1)
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
    return (high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1) + 0.5).byte()


COLOUR = {
    "Hue": hue,
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
}
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
OPERATIONS = (*COLOUR, *GEOMETRIC)  # an operation's number is its place here; -1 stands for none

# ---------------------------------------------------------------- operations on places


def affine_matrices(operation: torch.Tensor, value: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(n, 2, 3) matrices from output to input places in pixels, for the geometric operations with their values.

    Rotate turns counter-clockwise around the centre by degrees; shears keep the first row or column; translations are
    parts of the side.

    Args:
        operation: (n,) places in OPERATIONS.
        value: (n,) float.
        size: height and width.
    """
    height, width = size
    rotate, shear_x, shear_y, translate_x, translate_y = (
        torch.where(operation == OPERATIONS.index(name), value, 0.0) for name in GEOMETRIC
    )
    cos, sin = torch.deg2rad(rotate).cos(), torch.deg2rad(rotate).sin()
    x = [cos, shear_x - sin, (width - cos * width + sin * height) / 2 + translate_x * width]
    y = [shear_y + sin, cos, (height - cos * height - sin * width) / 2 + translate_y * height]
    return rearrange(x + y, "(row column) n -> n row column", row=2)


def cubic_weights(t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Weights of the four pixels around a place, t in 0..1 behind the second; a = -1, as in Pillow's transforms."""
    return t * (t * (2 - t) - 1), t * t * (t - 2) + 1, t * (t * (1 - t) + 1), t * t * (t - 1)


def affine(images: torch.Tensor, matrices: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Resample (bicubic, edges repeated) what `matrices` point to; what lies outside the image becomes `fill`.

    Args:
        images: (n, c, h, w) uint8.
        matrices: (n, 2, 3), as of `affine_matrices`.
        fill: (c,) uint8.
    """
    n, c, h, w = images.shape
    column = torch.arange(w, device=images.device) + 0.5
    row = torch.arange(h, device=images.device)[:, None] + 0.5
    a, b, c0, d, e, f0 = rearrange(matrices, "n row column -> (row column) n 1 1")
    x, y = a * column + b * row + c0, d * column + e * row + f0  # (n, h, w)
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    x, y = x.clamp(0, w) - 0.5, y.clamp(0, h) - 0.5
    left, top = x.floor(), y.floor()
    across, down = cubic_weights((x - left).flatten(1)[:, None]), cubic_weights((y - top).flatten(1)[:, None])

    # in an image with a border of 2, the 16 pixels around every place lie at the same 16 distances from the first
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="replicate").flatten(2)
    first = ((top + 1) * (w + 4) + left + 1).long().flatten(1)[:, None].expand(-1, c, -1)
    total = 0
    for i, vertical in enumerate(down):
        start = i * (w + 4)
        line = sum(padded[..., start + j :].gather(2, first) * horizontal for j, horizontal in enumerate(across))
        total = total + line * vertical
    total = (total + 1e-3).clamp_(0, 255).byte().view_as(images)  # cut off, but not what rounding left below a level
    return torch.where(inside[:, None], total, fill[:, None, None])


# ---------------------------------------------------------------- groups


def operate(images: torch.Tensor, operation: torch.Tensor, value: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Apply each image's operations, one after the other.

    Args:
        images: (b, 3, h, w) uint8; left as they are.
        operation: (b, layers) places in OPERATIONS, or -1 for none; on the CPU, as is `value`.
        value: (b, layers) float32, what the operation's function takes.
        fill: (3,) uint8, colour of what geometric operations bring in from outside.
    """
    images = images.clone()
    for number, amount in zip(operation.unbind(1), value.unbind(1), strict=True):
        group = number.clamp(max=len(COLOUR)) + 1  # none, one for each colour operation, one for all geometric ones
        order = group.argsort(stable=True)
        counts = group.bincount(minlength=len(COLOUR) + 2).tolist()
        geometric = order[len(order) - counts[-1] :]
        matrices = affine_matrices(number[geometric], amount[geometric], images.shape[2:])
        index, amount = (each.to(images.device, non_blocking=True) for each in (order, amount[order]))
        _, *parts, last = zip(index.split(counts), amount[:, None, None, None].split(counts), strict=True)
        for function, (part, factor) in zip(COLOUR.values(), parts, strict=True):
            if len(part):
                images[part] = function(images[part], factor)
        if len(geometric):
            images[last[0]] = affine(images[last[0]], matrices.to(images.device, non_blocking=True), fill)
    return images


# ---------------------------------------------------------------- what is drawn

# What timm's functions take at a level (0..1 of the highest magnitude) and a sign (-1 or 1), 'increasing' variants.
ARGUMENTS = {
    "Posterize": lambda level, sign: 4 - (level * 4).floor(),
    "Solarize": lambda level, sign: 256 - (level * 256).floor(),
    "SolarizeAdd": lambda level, sign: (level * 110).floor(),
    "Color": lambda level, sign: 1 + sign * 0.9 * level,
    "Contrast": lambda level, sign: 1 + sign * 0.9 * level,
    "Brightness": lambda level, sign: 1 + sign * 0.9 * level,
    "Sharpness": lambda level, sign: 1 + sign * 0.9 * level,
    "Rotate": lambda level, sign: sign * 30 * level,
    "ShearX": lambda level, sign: sign * 0.3 * level,
    "ShearY": lambda level, sign: sign * 0.3 * level,
    "TranslateX": lambda level, sign: sign * 0.45 * level,
    "TranslateY": lambda level, sign: sign * 0.45 * level,
}


def draw_randaugment(b: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """RandAugment (arXiv 1909.13719) as timm's `rand-m9-mstd0.5-inc1` chooses it.

    For each image two of 15 operations, drawn with replacement; each is left out with probability 1/2; magnitude
    normal(9, 0.5), cut to 0..10.

    Args:
        b: images.
        generator: on the CPU.

    Returns:
        (b, 2) int64 and (b, 2) float32, operations and values for `operate`.
    """
    operation = torch.randint(1, len(OPERATIONS), (b, 2), generator=generator)  # any but Hue
    left_out = torch.rand(b, 2, generator=generator) < 0.5
    level = torch.randn(b, 2, generator=generator).mul_(0.5).add_(9).clamp_(0, 10) / 10
    sign = torch.where(torch.rand(b, 2, generator=generator) < 0.5, -1.0, 1.0)
    value = torch.zeros(b, 2)
    for name, argument in ARGUMENTS.items():
        value = torch.where(operation == OPERATIONS.index(name), argument(level, sign), value)
    return operation.masked_fill_(left_out, -1), value


def draw_jitter(b: int, probability: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """DEMS-ViT's colours: jitter (0.4, 0.4, 0.2, 0.1) in random order, as torchvision's; grayscale; solarise at 128.

    Args:
        b: images.
        probability: of each of the three.
        generator: on the CPU.

    Returns:
        (b, 6) int64 and (b, 6) float32, operations and values for `operate`.
    """
    number = torch.tensor([OPERATIONS.index(name) for name in ("Brightness", "Contrast", "Color", "Hue")])
    unchanged, reach = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.4, 0.4, 0.2, 0.1])
    value = unchanged + reach * (2 * torch.rand(b, 4, generator=generator) - 1)
    order = torch.rand(b, 4, generator=generator).argsort(dim=1)
    grayscale, solarised = OPERATIONS.index("Color"), OPERATIONS.index("Solarize")
    operation = torch.cat([number[order], torch.tensor([[grayscale, solarised]]).expand(b, 2)], dim=1)
    value = torch.cat([value.gather(1, order), torch.tensor([[0.0, 128.0]]).expand(b, 2)], dim=1)
    left_out = torch.rand(b, 3, generator=generator) >= probability
    return operation.masked_fill_(left_out[:, [0, 0, 0, 0, 1, 2]], -1), value
