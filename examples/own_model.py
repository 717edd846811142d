"""An own model, data set and augmentation under train.py's loop and flags; no file of the kit is edited.

    python examples/own_model.py --name mine                             # a minute on a CPU
    python examples/own_model.py --name wide --width 32 --num_steps 500  # your own flags beside train.py's
    python plot.py                                                       # its curves, among those of other runs

Everything of train.py works as there: the same command continues, torchrun and --bf16, -v. The checkpoint is read by
eval.py's functions, once the model's row is in MODELS, as below.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of train.py

import torch
from torch import nn

import eval
import train
from models import MODELS
from utils import cli, dist_util, options
from utils.augment import Augment
from utils.presets import AUGS, DATASETS
from utils.run_files import RunFiles


class ConvNet(nn.Module):
    """All that a model owes: two words of the constructor, and images (b, 3, h, w) -> logits (b, classes)."""

    def __init__(self, image_size: int, num_classes: int, width: int = 16):
        super().__init__()
        layers = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


def stripes(data_dir: Path) -> tuple[dict, list[str]]:
    """Noisy stripes across, down or aslant: uint8 images (n, 1, 32, 32) and labels (n,) of each split."""
    splits, place = {}, torch.arange(32.0)
    for seed, (split, n) in enumerate({"train": 3000, "test": 600}.items()):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(3, (n,), generator=generator)
        phase, period = 6.3 * torch.rand(n, 1, 1, generator=generator), 4 + 4 * torch.rand(n, 1, 1, generator=generator)
        x, y = place, place[:, None]
        along = torch.stack([(0 * x + y), (x + 0 * y), (x + y) / 2**0.5])[labels]
        waves = torch.sin(6.3 * along / period + phase) + 4 * torch.randn(n, 32, 32, generator=generator)
        splits[split] = (128 + 50 * waves).clamp(0, 255).byte()[:, None], labels
    return splits, ["across", "down", "aslant"]


class Faded(Augment):
    """What `Augment` does, then each image at a contrast of its own."""

    def draw(self, sizes: torch.Tensor, generator: torch.Generator | None = None, progress: float = 0.0) -> dict:
        contrast = 0.5 + 0.5 * torch.rand(len(sizes), generator=generator)
        return super().draw(sizes, generator, progress) | {"contrast": contrast}

    def __call__(self, images: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        contrast = params["contrast"].to(images.device, non_blocking=True)
        return super().__call__(images, params) * contrast[:, None, None, None]


def main(words: list[str]) -> int:
    own = cli.Parser(add_help=False)
    own.add_argument("--width", type=int, default=16)
    mine, words = own.parse_known_args(words)

    MODELS["ConvNet"] = dict(cls=ConvNet, width=mine.width)
    DATASETS["stripes"] = dict(read=stripes)
    AUGS["faded"] = dict(cls=Faded, flip=True)
    defaults = "--model_type ConvNet --dataset stripes --aug faded --img_size 32 --opt adamw --lr 3e-3".split()
    defaults += "--train_batch_size 64 --num_steps 200 --eval_every 50".split()
    args = options.parse_train_args([*defaults, *words])
    args.width = mine.width  # a setting of the run, which another one makes another run
    status = train.main(args)

    if status == 0 and not (args.validate or args.dry_run) and os.environ.get("RANK", "0") == "0":  # of torchrun's one
        run = eval.load_run(RunFiles.of(args).best, "cpu")
        images, labels = stripes(Path())[0]["test"]
        for label, answer in zip(labels[:3].tolist(), run.predict(images[:3], top=2), strict=True):
            print(f"{run.classes[label]}: " + ", ".join(f"{name} {100 * p:.0f} %" for name, p in answer))
    return status


if __name__ == "__main__":
    cli.run_main(main, sys.argv[1:], dist_util.explain, dist_util.stop)
