"""The loss of training, and its accuracy."""

import torch
import torch.nn.functional as F


def loss_of(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross-entropy of logits (b, classes) and labels (b,) or targets (b, classes), each class's by its weight."""
    if class_weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    weight = class_weights[labels] if labels.ndim == 1 else labels @ class_weights
    if labels.ndim == 2:  # a mixed image counts for each of its classes by that one's weight
        labels = labels * class_weights / weight[:, None]
    return (F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none") * weight).mean()


def balanced_weights(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Weights (num_classes,) by which each class that occurs counts alike in a sum over all labels (n,), of mean 1."""
    counts = labels.bincount(minlength=num_classes)
    return len(labels) / counts.count_nonzero() / counts.clamp(min=1)


def accuracy_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of images that are right, of labels (b,), or of targets (b, classes) by the class that counts most."""
    return (logits.argmax(dim=1) == (labels if labels.ndim == 1 else labels.argmax(dim=1))).float().mean()
