"""Images a second of each augmentation, from images in memory to a normalised batch, beside Pillow pipelines.

    python benchmarks/pipeline.py                          # one CPU thread, 256 images of 32 px (random pixels)
    python benchmarks/pipeline.py --device cuda --batch 1024

The peers are timm's `create_transform` and torchvision's transforms on PIL images, as their own training scripts use
them, one image after another in one process. A GPU is compared with one such process: multiply by your workers.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from common import rate, report, take_turns, times_faster
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision import transforms as T

from utils.augment import Augment
from utils.device import choose_device, keep_memory
from utils.presets import NORMALIZE

# timm asks for 0 bits now and then, which Pillow 13 refuses
posterize = ImageOps.posterize
ImageOps.posterize = lambda image, bits: posterize(image, max(1, bits))

MEAN, STD = NORMALIZE["cifar"]
BICUBIC = T.InterpolationMode.BICUBIC
TIMM_STRONG = dict(scale=(0.8, 1), auto_augment="rand-m9-mstd0.5-inc1")  # as --aug strong
TENSOR = [T.ToTensor(), T.Normalize(MEAN, STD)]


def timm_transform(size: int, mean: list[float] = MEAN, std: list[float] = STD, **words) -> T.Compose:
    return create_transform(
        size, is_training=True, interpolation="bicubic", mean=mean, std=std, color_jitter=None, re_mode="pixel", **words
    )


def cases() -> dict[str, tuple[int, dict, object]]:
    """title: (size, arguments of Augment, the peer's transform)."""
    weak, strong, erase = (
        dict(scale=scale, flip=True, interpolation="bicubic") for scale in ((1, 1), (0.8, 1), (0.8, 1))
    )
    jitter = [
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.6),
        T.RandomGrayscale(0.6),
        T.RandomSolarize(128, 0.6),
    ]
    return {
        "strong: crop, flip, RandAugment, normalise, erase; 32 px; timm": (
            32,
            strong | dict(operations="randaugment", reprob=0.1),
            timm_transform(32, **TIMM_STRONG, re_prob=0.1),
        ),
        "crop, flip, normalise, erase; 32 px; timm": (
            32,
            erase | dict(reprob=0.1),
            timm_transform(32, scale=(0.8, 1), re_prob=0.1),
        ),
        "weak: crop of the whole area, flip, normalise; 32 px; timm": (32, weak, timm_transform(32, scale=(1, 1))),
        "pad 4, crop, flip, normalise; 32 px; torchvision": (
            32,
            dict(pad=4, flip=True),
            T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *TENSOR]),
        ),
        "pad 4, crop, flip, normalise, erase; 32 px; torchvision": (
            32,
            dict(pad=4, flip=True, reprob=0.1),
            T.Compose(
                [
                    T.RandomCrop(32, padding=4),
                    T.RandomHorizontalFlip(),
                    *TENSOR,
                    RandomErasing(0.1, mode="pixel", device="cpu"),
                ]
            ),
        ),
        "dems: crop, flip, jitter, normalise; 32 px; torchvision": (
            32,
            dict(scale=(0.2, 1), flip=True, operations="jitter", aug_prob=0.6, interpolation="bicubic"),
            T.Compose(
                [T.RandomResizedCrop(32, (0.2, 1), interpolation=BICUBIC), T.RandomHorizontalFlip(), *jitter, *TENSOR]
            ),
        ),
        "random resized crop to 224 px, bicubic, normalise; torchvision": (
            224,
            dict(scale=(0.05, 1), interpolation="bicubic"),
            T.Compose([T.RandomResizedCrop(224, (0.05, 1), interpolation=BICUBIC), *TENSOR]),
        ),
        "crop: random resized crop to 224 px, bilinear, normalise; torchvision": (
            224,
            dict(scale=(0.05, 1)),
            T.Compose([T.RandomResizedCrop(224, (0.05, 1)), *TENSOR]),
        ),
        "evaluation: resize to 224 px, bilinear, normalise; torchvision": (
            224,
            dict(),
            T.Compose([T.Resize((224, 224)), *TENSOR]),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="each turn of each contestant [0.5]")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    keep_memory(device)
    images = torch.randint(
        0, 256, (args.batch, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    arrays = list(images.permute(0, 2, 3, 1).contiguous().numpy())
    held, sizes = images.to(device), torch.full((args.batch, 2), 32)
    rows = []

    def once(augment: Augment, held: torch.Tensor, sizes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return augment(held, augment.draw(sizes, generator))

    for title, (size, arguments, peer) in cases().items():
        generator = torch.Generator().manual_seed(0)
        precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
        augments = {
            name: Augment(size, MEAN, STD, device=device, dtype=dtype, **arguments)
            for name, dtype in precisions.items()
        }
        # both begin with images in memory: the peers with arrays, as torchvision's data sets hold them
        contestants = {name: partial(once, augment, held, sizes, generator) for name, augment in augments.items()}
        contestants["peer"] = lambda peer=peer: torch.stack([peer(Image.fromarray(array)) for array in arrays])
        taken = take_turns(contestants, device=device, rounds=args.rounds, seconds=args.seconds)
        rows.append(
            {
                "augmentation": title,
                "fp32, images/s": rate(args.batch, taken["fp32"]),
                "bf16, images/s": rate(args.batch, taken["bf16"]),
                "peer, images/s": rate(args.batch, taken["peer"]),
                "fp32 / peer": times_faster(taken["fp32"], taken["peer"]),
                "bf16 / peer": times_faster(taken["bf16"], taken["peer"]),
            }
        )
    report("Augmentation, median (lowest-highest)", rows, device, args.json)


if __name__ == "__main__":
    main()
