"""Batched augmentation on the device: uint8 images in, normalised float images out, every image its own parameters.

What is random is drawn on the CPU from a generator that the caller seeds with (seed, step), so the same images come out
on any device and number of processes. Pixels are changed in resample.py and randaugment.py. An augmentation of your own
is a row of `utils.presets.AUGS`, or a subclass of `Augment` that the row names as `cls`.
"""

import math
import pkgutil
from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from utils import randaugment
from utils.device import DTYPES
from utils.presets import AUGS
from utils.resample import crop_flip_resize, normalise, rotate_reflected, shift

RATIO = (3 / 4, 4 / 3)  # width / height of random crops
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's RandomErasing


def _draw_boxes(
    sizes: torch.Tensor, scale: tuple[float, float], ratio: tuple[float, float], room: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes of random area and ratio at a random place: the first of ten tries that leaves `room` pixels in each side.

    (b, 4) float64 top, left, height, width, and (b, 1) bool, whether a try did fit.
    """
    height, width = (side.double()[:, None] for side in sizes.unbind(1))
    b, tries = len(sizes), 10
    area = height * width * torch.empty(b, tries, dtype=torch.float64).uniform_(*scale, generator=generator)
    drawn = torch.empty(b, tries, dtype=torch.float64).uniform_(*map(math.log, ratio), generator=generator).exp_()
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

    `sizes` (b, 2) heights and widths, `scale` the range of the area, as a fraction -> (b, 4) top, left, height, width.
    """
    boxes, found = _draw_boxes(sizes, scale, RATIO, 0, generator)
    height, width = (side.double() for side in sizes.unbind(1))
    h = torch.minimum(height, (width / RATIO[0]).round())
    w = torch.minimum(width, (height * RATIO[1]).round())
    central = torch.stack([((height - h) / 2).floor(), ((width - w) / 2).floor(), h, w], dim=1)
    return torch.where(found, boxes, central).long()


def central_windows(sizes: torch.Tensor, size: int, crop_pct: float) -> torch.Tensor:
    """Where evaluation cuts the resized image, (b, 4) of top, left, height, width, as timm's and torchvision's do.

    The short side becomes size / crop_pct pixels, the long one in proportion, and the centre is cut out of it.
    """
    whole = sizes * math.floor(size / crop_pct) // sizes.min(dim=1, keepdim=True).values
    return torch.cat([((whole - size) / 2).round().long(), whole], dim=1)


class Augment:
    """One --aug pipeline: `draw` the parameters of a batch, then call it with images and parameters.

    Args:
        size, interpolation: side of the output in pixels; 'bilinear' or 'bicubic'.
        mean, std: three numbers each, of pixels in 0..1.
        scale: area range of a random resized crop, or None.
        flip, pad: mirror every other image at random; border of a random integer crop at native size, or 0.
        rotation: images are turned by up to so many degrees either way, after the crop; 0 for none.
        operations: 'randaugment' or 'jitter' (see utils/randaugment.py), or None; after the crop, on whole levels.
        aug_prob: of 'jitter', when training begins; it falls to 0 as half a cosine.
        reprob: of random erasing, one box filled with normal noise after normalisation (arXiv 1708.04896).
        crop_pct: without a random crop, part of the resized image's short side that its central cut takes; 1 for all.
        device, dtype: of the result. bfloat16 resizes faster, to within 3 of 256 levels, 0.3 on average.
    """

    def __init__(
        self, size: int, mean: list[float], std: list[float], *, interpolation: str = "bilinear",
        scale: tuple[float, float] | None = None, flip: bool = False, pad: int = 0, rotation: float = 0.0,
        operations: str | None = None, aug_prob: float = 0.0, reprob: float = 0.0, crop_pct: float = 1.0,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        self.size, self.interpolation, self.crop_pct, self.dtype = size, interpolation, crop_pct, dtype
        self.scale, self.flip, self.pad = scale, flip, pad
        self.rotation, self.operations, self.aug_prob, self.reprob = rotation, operations, aug_prob, reprob
        if operations not in (None, "randaugment", "jitter"):
            raise ValueError(f"operations {operations!r} is neither 'randaugment' nor 'jitter'")
        fill = [min(255, round(255 * value)) for value in mean]  # as timm's create_transform does
        self.fill = torch.tensor(fill, dtype=torch.uint8).to(device, non_blocking=True)
        if reprob:
            count = max(2**20, 4 * 3 * size**2)
            noise = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            self.noise = noise.unfold(0, 3 * size**2, 1)  # one image's noise from each place on, a view
        self.factor = [1 / (255 * s) for s in std]
        self.bias = [-m / s for m, s in zip(mean, std, strict=True)]

    def draw(
        self, sizes: torch.Tensor, generator: torch.Generator | None = None, progress: float = 0.0
    ) -> dict[str, torch.Tensor]:
        """Parameters of a batch, on the CPU; each entry has the batch as first dimension.

        `sizes` are (b, 2) heights and widths of the images, `generator` is on the CPU, not needed where nothing is
        random; `progress` is the part of the training that is done, 0..1: 'jitter' grows rarer with it.
        """
        params, b = {}, len(sizes)
        if self.scale:
            params["box"] = random_resized_boxes(sizes, self.scale, generator)
        elif self.crop_pct != 1.0 or (sizes != self.size).any():
            params["box"] = torch.cat([torch.zeros_like(sizes), sizes], dim=1)
        if self.crop_pct != 1.0 and not self.scale:
            params["window"] = central_windows(sizes, self.size, self.crop_pct)
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

        `params` are from `draw`, for these images; without 'box' they must be size x size already.
        """
        chosen, params = params, {name: value.to(images.device, non_blocking=True) for name, value in params.items()}
        x, boxes, flips, words = images, params.get("box"), params.get("flip"), dict(windows=params.get("window"))
        at_once = boxes is not None and not self.rotation and not self.operations  # the resize normalises, too
        if at_once:
            words |= dict(factor=self.factor, bias=self.bias, dtype=self.dtype)
        if "offset" in params:
            x = shift(x, params["offset"], self.pad)
        if boxes is not None:
            x = crop_flip_resize(x, boxes, flips, self.size, self.interpolation, **words)
        elif flips is not None:
            x = torch.where(flips[:, None, None, None], x.flip(-1), x)
        if self.rotation:
            x = rotate_reflected(x.float(), params["angle"])
        if self.operations:  # grouped by what is chosen on the CPU, so that a GPU need not be asked
            x = (x if x.dtype == torch.uint8 else randaugment.levels(x.round())).expand(-1, 3, -1, -1)
            x = randaugment.operate(x, chosen["operation"], chosen["value"], self.fill)
        if not at_once:
            x = normalise(x, self.factor, self.bias, self.dtype)
        if "erase" in params:
            index = chosen["erase"][:, 2].nonzero()[:, 0].to(x.device, non_blocking=True)
            noise = self.noise[params["noise"][index]].view(-1, *x.shape[1:])
            top, left, height, width = params["erase"][index].unsqueeze(2).unbind(1)  # (b, 1)
            place = torch.arange(self.size, device=x.device)
            rows, columns = ((place >= a) & (place < a + n) for a, n in ((top, height), (left, width)))
            x[index] = torch.where(rows[:, None, :, None] & columns[:, None, None, :], noise, x[index])
        return x


def train_augment(args: Namespace, device: torch.device, precision: str) -> Augment:
    """What --aug and the flags beside it ask for, in the precision of training."""
    flags = {name: getattr(args, name) for name in ("interpolation", "scale", "aug_prob", "reprob")}
    words = AUGS[args.aug] | flags | dict(device=device, dtype=DTYPES[precision])
    cls = words.pop("cls", Augment)
    return (pkgutil.resolve_name(cls) if isinstance(cls, str) else cls)(args.img_size, args.mean, args.std, **words)


def eval_augment(args: Namespace, device: torch.device, precision: str) -> Augment:
    """Resize, centre crop and normalisation of evaluation, from the flags of a run."""
    return Augment(
        args.img_size, args.mean, args.std, interpolation=args.interpolation, crop_pct=args.crop_pct,
        device=device, dtype=DTYPES[precision],
    )  # fmt: skip


def short_side(args: Namespace) -> int:
    """Pixels that the shorter side of an image is kept at: the smallest crop, were it square, then has img_size."""
    smallest = min(args.scale[0] ** 0.5 if args.scale else 1.0, args.crop_pct)
    return math.ceil(args.img_size / smallest)


def denormalize(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Normalised images (b, 3, h, w) -> pixels in 0..1 on the CPU."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (images.float().cpu() * std + mean).clamp(0, 1)


class Mix:
    """Mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899), at most one of them a batch, the same for all its images.

    Images are mixed with their neighbours, 0 with 1, 2 with 3 and so on (a batch is in random order), so that any even
    part of a batch comes out as it would within the whole.

    Args:
        num_classes: length of the targets.
        mixup, cutmix: both parameters of the Beta distribution of an image's own share; 0 turns one of them off.
        prob, switch_prob: of mixing a batch at all; of cutmix, where both are on.

    Targets are not smoothed: the loss does that, which is the same.
    """

    def __init__(
        self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, prob: float = 1.0, switch_prob: float = 0.5
    ):
        self.num_classes, self.mixup, self.cutmix = num_classes, mixup, cutmix
        self.prob, self.switch_prob = prob, switch_prob

    def draw(self, size: tuple[int, int], generator: torch.Generator) -> tuple[float, tuple[int, int, int, int] | None]:
        """An image's own share, and for cutmix the box (top, left, bottom, right) that its neighbour fills.

        `size` is height and width of the images; the generator is on the CPU.
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
        """An even number of images (b, c, h, w) and labels (b,) mixed as drawn; targets (b, num_classes) sum to 1."""
        targets = F.one_hot(labels, self.num_classes).float()
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


def make_mix(args: Namespace, num_classes: int) -> Mix | None:
    """What --mixup and --cutmix ask for."""
    if not args.mixup and not args.cutmix:
        return None
    odds = dict(prob=args.mixup_prob, switch_prob=args.mixup_switch_prob)
    return Mix(num_classes, mixup=args.mixup, cutmix=args.cutmix, **odds)
