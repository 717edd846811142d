"""Learning-rate schedules as pure functions of the step."""

import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial


def learning_rate(
    step: int, *, base_lr: float, num_steps: int, warmup_steps: int, decay_type: str = "cosine", min_lr: float = 0.0,
    warmup_lr: float = 0.0, steps_per_epoch: float | None = None,
) -> float:  # fmt: skip
    """Learning rate of update number `step`, counted from 1: linear warm-up, then decay.

    It rises from `warmup_lr` to `base_lr` at step `warmup_steps`, which is less than `num_steps`, and falls to `min_lr`
    at step `num_steps`, as the updates of jeonsworld/ViT-pytorch have it, whose scheduler steps before its optimizer.
    'timm' is the cosine of timm's scheduler: counted from 0, and from the start of the run, so that the warm-up ends
    on a cosine that has begun to fall. With `steps_per_epoch` all steps of an epoch have one rate, as DEMS has them:
    the warm-up reaches `base_lr` in its last epoch, the cosine starts in the one after it. ValueError: unknown decay.
    """
    if steps_per_epoch:
        epoch, warmup = int((step - 1) / steps_per_epoch + 1e-9), round(warmup_steps / steps_per_epoch, 2)
        if epoch < warmup:
            return warmup_lr + (base_lr - warmup_lr) * (min(1.0, epoch / (warmup - 1)) if warmup > 1 else 1.0)
        step = max(warmup_steps, epoch * steps_per_epoch)
    elif decay_type == "timm":
        step -= 1
    if step < warmup_steps:
        return warmup_lr + (base_lr - warmup_lr) * step / warmup_steps
    start = 0 if decay_type == "timm" else warmup_steps
    progress = min(1.0, (step - start) / (num_steps - start))
    if decay_type in ("cosine", "timm"):
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif decay_type == "linear":
        factor = 1.0 - progress
    else:
        raise ValueError(f"unknown decay type {decay_type!r}, one of cosine linear timm")
    return min_lr + (base_lr - min_lr) * factor


def from_flags(args: Namespace) -> Callable[[int], float]:
    """The learning rate of each step, as the resolved flags of train.py have it."""
    per_epoch = args.num_steps / args.epochs if args.decay_by == "epoch" else None
    return partial(
        learning_rate, base_lr=args.learning_rate, num_steps=args.num_steps, warmup_steps=args.warmup_steps,
        decay_type=args.decay_type, min_lr=args.min_lr, warmup_lr=args.warmup_lr, steps_per_epoch=per_epoch,
    )  # fmt: skip
