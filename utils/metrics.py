"""Scores of a confusion matrix: by class, their means, and what is taken for what."""

import torch


def class_scores(confusion: torch.Tensor) -> dict[str, torch.Tensor]:
    """Precision, recall and F1 of each class, (classes,) float64, and images of it (support), of a confusion matrix
    (classes, classes) whose rows are the true classes.

    A share of nothing is 0, as scikit-learn has it: the precision of a class that is never answered.
    """
    right, true, answered = (part.double() for part in (confusion.diag(), confusion.sum(1), confusion.sum(0)))
    precision, recall = right / answered.clamp(min=1), right / true.clamp(min=1)
    return dict(precision=precision, recall=recall, f1=2 * right / (true + answered).clamp(min=1), support=true.long())


def mean_scores(confusion: torch.Tensor) -> dict[str, float]:
    """Macro means over classes that occur, as truth or answer; balanced accuracy, the mean recall of true classes."""
    scores, occurs = class_scores(confusion), (confusion.sum(0) + confusion.sum(1)) > 0
    means = {f"macro_{name}": scores[name][occurs].mean().item() for name in ("precision", "recall", "f1")}
    return means | dict(balanced_accuracy=scores["recall"][scores["support"] > 0].mean().item())


def worst_confusions(confusion: torch.Tensor, classes: list[str], limit: int = 5) -> list[tuple[str, str, int, int]]:
    """The most frequent mistakes: the true class, what it was taken for, how often, and images of the true class."""
    wrong = confusion - confusion.diag().diag()
    counts, places = wrong.flatten().sort(descending=True, stable=True)
    found = zip(counts[:limit].tolist(), places[:limit].tolist(), strict=True)
    pairs = [(n, *divmod(place, len(classes))) for n, place in found if n]
    return [(classes[i], classes[j], n, int(confusion[i].sum())) for n, i, j in pairs]
