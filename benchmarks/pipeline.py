"""Images a second of each augmentation, from images in memory to a normalised batch, beside Pillow pipelines.

    python benchmarks/pipeline.py                          # one CPU thread, 256 images of 32 px (random pixels)
    python benchmarks/pipeline.py --device cuda --batch 1024

The peers are timm's `create_transform` and torchvision's transforms on PIL images, as their own training scripts use
them, one image after another in one process. A GPU is compared with one such process: multiply by your workers.
"""

from functools import partial

import torch
from common import parser_of, rate, report, take_turns, times_faster
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision import transforms as T

from utils.augment import Augment
from utils.device import DTYPES, choose_device, keep_memory
from utils.presets import NORMALIZE

# timm asks for 0 bits now and then, which Pillow 13 refuses
posterize = ImageOps.posterize
ImageOps.posterize = lambda image, bits: posterize(image, max(1, bits))

MEAN, STD = NORMALIZE["cifar"]
TIMM_STRONG = dict(scale=(0.8, 1), auto_augment="rand-m9-mstd0.5-inc1")  # as --aug strong


def timm_transform(size: int, mean: list[float] = MEAN, std: list[float] = STD, **words) -> T.Compose:
    words |= dict(interpolation="bicubic", mean=mean, std=std, color_jitter=None, re_mode="pixel")
    return create_transform(size, is_training=True, **words)


def torchvision(*transforms) -> T.Compose:
    return T.Compose([*transforms, T.ToTensor(), T.Normalize(MEAN, STD)])


def cases() -> dict[str, tuple[int, dict, object]]:
    """title: (size, arguments of Augment, the peer's transform)."""
    weak, strong, dems = (dict(scale=(low, 1), flip=True, interpolation="bicubic") for low in (1, 0.8, 0.2))
    flip, crop = T.RandomHorizontalFlip(), partial(T.RandomResizedCrop, interpolation=T.InterpolationMode.BICUBIC)
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.6), T.RandomGrayscale(0.6), T.RandomSolarize(128, 0.6)
    pad, padded = dict(pad=4, flip=True), torchvision(T.RandomCrop(32, padding=4), flip)
    return {
        "strong: crop, flip, RandAugment, normalise, erase; 32 px; timm":
            (32, strong | dict(operations="randaugment", reprob=0.1), timm_transform(32, **TIMM_STRONG, re_prob=0.1)),
        "crop, flip, normalise, erase; 32 px; timm":
            (32, strong | dict(reprob=0.1), timm_transform(32, scale=(0.8, 1), re_prob=0.1)),
        "weak: crop of the whole area, flip, normalise; 32 px; timm": (32, weak, timm_transform(32, scale=(1, 1))),
        "pad 4, crop, flip, normalise; 32 px; torchvision": (32, pad, padded),
        "pad 4, crop, flip, normalise, erase; 32 px; torchvision":
            (32, pad | dict(reprob=0.1), T.Compose([padded, RandomErasing(0.1, mode="pixel", device="cpu")])),
        "dems: crop, flip, jitter, normalise; 32 px; torchvision":
            (32, dems | dict(operations="jitter", aug_prob=0.6), torchvision(crop(32, (0.2, 1)), flip, *jitter)),
        "random resized crop to 224 px, bicubic, normalise; torchvision":
            (224, dict(scale=(0.05, 1), interpolation="bicubic"), torchvision(crop(224, (0.05, 1)))),
        "crop: random resized crop to 224 px, bilinear, normalise; torchvision":
            (224, dict(scale=(0.05, 1)), torchvision(T.RandomResizedCrop(224, (0.05, 1)))),
        "evaluation: resize to 224 px, bilinear, normalise; torchvision": (224, {}, torchvision(T.Resize((224, 224)))),
    }  # fmt: skip


def main() -> None:
    parser = parser_of(__doc__, batch=256, threads=1, rounds=7, seconds=0.5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    keep_memory(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.batch, 3, 32, 32), dtype=torch.uint8, generator=generator)
    arrays = list(images.permute(0, 2, 3, 1).contiguous().numpy())
    held, sizes = images.to(device), torch.full((args.batch, 2), 32)
    rows = []

    def once(augment: Augment, generator: torch.Generator) -> torch.Tensor:
        return augment(held, augment.draw(sizes, generator))

    for title, (size, arguments, peer) in cases().items():
        generator, words = torch.Generator().manual_seed(0), dict(device=device, **arguments)
        ours = {name: Augment(size, MEAN, STD, dtype=DTYPES[name], **words) for name in ("fp32", "bf16")}
        # both begin with images in memory: the peers with arrays, as torchvision's data sets hold them
        contestants = {name: partial(once, augment, generator) for name, augment in ours.items()}
        contestants["peer"] = lambda peer=peer: torch.stack([peer(Image.fromarray(array)) for array in arrays])
        taken = take_turns(contestants, device=device, rounds=args.rounds, seconds=args.seconds)
        rates = {f"{name}, images/s": rate(args.batch, seconds) for name, seconds in taken.items()}
        faster = {f"{name} / peer": times_faster(taken[name], taken["peer"]) for name in ours}
        rows.append({"augmentation": title} | rates | faster)
    report("Augmentation, median (lowest-highest)", rows, device, args.json)


if __name__ == "__main__":
    main()
