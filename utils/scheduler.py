"""Learning-rate schedules as pure functions of the step."""

import math


def learning_rate(
    step: int,
    *,
    base_lr: float,
    num_steps: int,
    warmup_steps: int,
    decay_type: str = "cosine",
    min_lr: float = 0.0,
    warmup_lr: float = 0.0,
    steps_per_epoch: float | None = None,
) -> float:
    """Learning rate of update number `step`, counted from 1: linear warm-up, then cosine or linear decay.

    It is `base_lr` at step `warmup_steps` and `min_lr` at step `num_steps`, as the updates of jeonsworld/ViT-pytorch
    have it, whose scheduler steps before its optimizer.

    Args:
        step: 1..num_steps.
        base_lr: the highest rate.
        num_steps: length of the run.
        warmup_steps: length of the warm-up, less than num_steps.
        decay_type: 'cosine' or 'linear'.
        min_lr: rate of the last step.
        warmup_lr: rate that the warm-up rises from.
        steps_per_epoch: where given, all steps of an epoch have the rate that is due at its beginning.

    Raises:
        ValueError: an unknown decay type.
    """
    if steps_per_epoch:
        step = int((step - 1) / steps_per_epoch) * steps_per_epoch
    if step < warmup_steps:
        return warmup_lr + (base_lr - warmup_lr) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (num_steps - warmup_steps))
    if decay_type == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif decay_type == "linear":
        factor = 1.0 - progress
    else:
        raise ValueError(f"unknown decay type {decay_type!r}, one of cosine linear")
    return min_lr + (base_lr - min_lr) * factor
