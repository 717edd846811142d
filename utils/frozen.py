"""--freeze: the head alone is trained, on what the rest of the model makes of the images.

That is computed once where nothing about the images is random, and in every step where something is.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from utils.augment import Augment
from utils.cli import UserError
from utils.datasets import ImageSet, Uniform


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
    """In the place of an `Augment` for what `features_of` gives: there is nothing to draw and to change."""

    size = 0

    def draw(self, sizes: torch.Tensor, generator=None, progress: float = 0.0) -> dict:
        return {}

    def __call__(self, images: torch.Tensor, params: dict) -> torch.Tensor:
        return images


@contextmanager
def _inputs_of(layer: nn.Module):
    """A list that fills with what the layer is given."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def features_of(model: nn.Module, images: ImageSet, batches: Iterable, autocast) -> ImageSet:
    """The same images as what the head of the model is given for them, (n, dim) float32 on its device.

    `batches` are all of them in order, as `data_utils.eval_batches` gives them.
    """
    found = []
    model.eval()
    with _inputs_of(model.head) as seen:
        for x, _ in batches:
            with autocast():
                model(x)
            found.append(seen.pop().float())
    return replace(images, source=Uniform(torch.cat(found)), ids=torch.arange(len(images)))


def is_random(augment: Augment) -> bool:
    """Whether an augmentation gives an image another way each time; one of a class of its own may."""
    a = augment
    return type(a) is not Augment or bool(a.scale or a.flip or a.pad or a.rotation or a.operations or a.reprob)
