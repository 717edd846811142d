"""Accuracy of a short run with this project's batched augmentation, and with timm's on one Pillow image after another.

    python benchmarks/accuracy.py                          # fashionmnist-mini, a small ViT, three seeds each
    python benchmarks/accuracy.py --bf16 --num_steps 500   # other flags go to train.py

Both see the same images in the same order, under `--aug strong` with random erasing; model, optimizer and steps are
train.py's own. What is random in the augmentation is drawn by each side itself, so they agree within the spread of the
seeds, not to the digit.
"""

import random
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from common import parser_of, report, set_up, spread
from PIL import Image
from pipeline import TIMM_STRONG, timm_transform

from train import Trainer
from utils import data_utils

MODEL = "--model_type ViT-Ti_16 --img_size 28 --patch_size 4 --dim 64 --depth 4 --heads 4 --mlp_dim 256 --dropout 0"
TRAINING = "--opt adamw --lr 2e-3 --weight_decay 0.05 --train_batch_size 128 --num_steps 1000 --warmup_steps 100"
WORDS = f"--name accuracy --dataset fashionmnist-mini --aug strong --reprob 0.25 {MODEL} {TRAINING}".split()


def pillow_batches(trainer: Trainer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The images that train.py would take in each step, through timm's transform."""
    args, data = trainer.args, trainer.data.train
    random.seed(args.seed)
    np.random.seed(args.seed)  # torch's is seeded in each step
    transform = timm_transform(args.img_size, args.mean, args.std, **TIMM_STRONG, re_prob=args.reprob)
    for step in range(args.num_steps):
        index = data_utils.batch_index(step, args.train_batch_size, len(data), args.seed)
        arrays = data.source.take(data.ids[index]).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        images = torch.stack([transform(Image.fromarray(array)) for array in arrays])
        yield images.to(trainer.device), data.labels[index].to(trainer.device)


def score(words: list[str], by_timm: bool) -> tuple[Trainer, float]:
    """Train with one side's images; the run, and its accuracy on the test images in percent."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = set_up([*words, "--memory_limit", "8"], folder)
        batches = pillow_batches(trainer) if by_timm else trainer.batches()
        trainer.model.train()
        while trainer.progress.step < trainer.args.num_steps:
            trainer.update(batches)
        model = trainer.average.module if trainer.average else trainer.model
        return trainer, 100 * trainer.score(model, trainer.data.test)["accuracy"]


def main() -> None:
    parser = parser_of(__doc__, threads=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    own, rest = parser.parse_known_args()
    torch.set_num_threads(own.threads)
    scores = {"this project, in batches": [], "timm, image by image": []}
    for seed in own.seeds:
        for name, found in scores.items():
            trainer, accuracy = score([*WORDS, *rest, "--seed", str(seed)], by_timm=name.startswith("timm"))
            found.append(accuracy)
            print(f"{name}, seed {seed}: {accuracy:.2f}", flush=True)
    args = trainer.args
    rows = []
    for name, found in scores.items():
        each = ", ".join(f"{score:.2f}" for score in found)
        rows.append({"augmentation": name, "accuracy, %": spread(found), "each seed": each})
    flags = f"--aug {args.aug} --reprob {args.reprob}, {trainer.precision}"
    title = f"{args.dataset}, {args.num_steps} steps of {args.train_batch_size}, {flags}"
    report(title, rows, trainer.device, own.json)


if __name__ == "__main__":
    main()
