"""--freeze: the head alone is trained, on what the rest of the model makes of the images.

That is computed once where nothing about the images is random, and in every step where something is.
"""

from argparse import Namespace
from dataclasses import replace

import torch
from torch import nn

from utils.augment import Augment
from utils.cli import UserError
from utils.data_utils import eval_batches
from utils.datasets import Data, ImageSet
from utils.device import autocast
from utils.image_sources import Uniform


def freeze(model: nn.Module, name: str) -> None:
    """Train nothing but `model.head`. UserError where there is none."""
    if not isinstance(getattr(model, "head", None), nn.Linear):
        raise UserError(f"--freeze trains a model's head, a torch.nn.Linear; {name} has none")
    model.requires_grad_(False)
    model.head.requires_grad_(True)


def train_mode(model: nn.Module, frozen: bool) -> None:
    """Training mode; of a frozen model in the head alone, so that the rest drops nothing and counts no statistics."""
    model.train(not frozen)
    if frozen:
        model.head.train()


class Features:
    """In the place of an `Augment` for what `on_features` gives: there is nothing to draw and to change."""

    def draw(self, sizes: torch.Tensor, generator=None, progress: float = 0.0) -> dict:
        return {}

    def __call__(self, images: torch.Tensor, params: dict) -> torch.Tensor:
        return images


@torch.no_grad()
def on_features(
    model: nn.Module, data: Data, augment: Augment, eval_augment: Augment, args: Namespace, device: torch.device,
    precision: str,
) -> Data:  # fmt: skip
    """A data set with what the model's head is given in the place of its images, (n, dim) float32 on the device."""

    def compute(images: ImageSet, augment: Augment) -> ImageSet:
        found, words = [], dict(device=device, num_workers=args.num_workers, batch_size=args.eval_batch_size)
        hook = model.head.register_forward_pre_hook(lambda head, given: found.append(given[0].float()))
        for x, _ in eval_batches(images, augment, **words):
            with autocast(device, precision):
                model.forward(x)  # not what --compile has made of it: the hook would have it compiled at each batch
        hook.remove()
        return replace(images, source=Uniform(torch.cat(found)), ids=torch.arange(len(images)))

    model.eval()
    train, test = compute(data.train, augment), compute(data.test, eval_augment)
    valid = test if data.valid is data.test else compute(data.valid, eval_augment)
    return replace(data, train=train, valid=valid, test=test)


def is_random(a: Augment) -> bool:
    """Whether an augmentation gives an image another way each time; one of a class of its own may."""
    return type(a) is not Augment or bool(a.scale or a.flip or a.pad or a.rotation or a.operations or a.reprob)
