"""Scores of a classifier, and a picture of what it confuses with what."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from llm.errors import InputError
from llm.evaluation.bootstrap import interval, mean_interval


@dataclasses.dataclass(frozen=True)
class Average:
    """Precision, recall and F1 averaged over the classes in one of the three usual ways."""

    precision: float
    recall: float
    f1: float


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """The scores of one class, None where it occurs neither in the labels nor in the predictions.

    Attributes:
        support: how many examples have this label.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    support: int


@dataclasses.dataclass(frozen=True)
class ClassificationScores:
    """All scores lie between 0 and 1.

    Attributes:
        accuracy_interval: 95% bootstrap interval over the examples.
        macro: mean over the classes, each counts the same.
        macro_f1_interval: as `accuracy_interval`; a class that a resample lacks is like one that occurs nowhere.
        micro: over all decisions; with one label an example all three equal the accuracy.
        weighted: mean over the classes, each counts as often as it is a label. Its recall is the accuracy.
        confusion: counts, `confusion[label][prediction]`.
    """

    examples: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    macro: Average
    macro_f1_interval: tuple[float, float]
    micro: Average
    weighted: Average
    per_class: dict[str, ClassScore]
    confusion: tuple[tuple[int, ...], ...]


def classification_scores(
    labels: Sequence[int] | np.ndarray,
    predictions: Sequence[int] | np.ndarray,
    classes: Sequence[str],
    *,
    absent: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> ClassificationScores:
    """Accuracy, precision, recall, F1 and confusions of one predicted class an example.

    Division by zero: a class that is a label or a prediction somewhere, but never both at once, scores 0 in precision,
    recall and F1, also where one of them is 0/0. A class that occurs nowhere has no score and is left out of the macro
    mean, so that a part of the test set with fewer classes can still reach 1. The other two means never see it.

    Args:
        labels, predictions: indices into `classes`, one an example.
        classes: all names, whether they occur or not.
        absent: the score to count for a class that occurs nowhere, in place of leaving it out: 0 or 1, as other
            evaluators do.

    Raises:
        InputError: there is no example, two classes share a name, or an index is not one of a class.
        ValueError: the labels and predictions are not two equally long rows of integers.
    """
    truth_E, guess_E = np.asarray(labels), np.asarray(predictions)
    if truth_E.ndim != 1 or truth_E.shape != guess_E.shape:
        raise ValueError(f"labels {truth_E.shape} and predictions {guess_E.shape}: expected one index an example each")
    if not len(truth_E):
        raise InputError("no examples to score: the test set is empty")
    if len(set(classes)) < len(classes):
        raise InputError(f"classes {list(classes)}: each name must stand there once")
    for what, index_E in (("label", truth_E), ("prediction", guess_E)):
        if index_E.dtype.kind not in "iu":
            raise ValueError(f"{what}s of type {index_E.dtype}: expected indices of classes")
        outside_E = (index_E < 0) | (index_E >= len(classes))
        if outside_E.any():
            example = int(outside_E.argmax())
            raise InputError(
                f"{what} {index_E[example]} of example {example} is not one of the {len(classes)} classes 0 to"
                f" {len(classes) - 1}"
            )
    # Two seconds to import: only who scores a classifier pays for it.
    from sklearn.metrics import precision_recall_fscore_support

    truth_E, guess_E = truth_E.astype(int), guess_E.astype(int)
    present = np.union1d(truth_E, guess_E)

    def averaged(average: str | None):
        # Without the absent classes, 0/0 is left only where a class that occurs was never right.
        return precision_recall_fscore_support(
            truth_E,
            guess_E,
            labels=present,
            average=average,
            zero_division=0,  # pyright: ignore[reportArgumentType]
        )

    scores_3C = np.full((3, len(classes)), np.nan if absent is None else float(absent))
    scores_3C[:, present] = averaged(None)[:3]
    # Sorted, so that the order of the examples does not matter to the resamples.
    pairs_E = np.sort(truth_E * len(classes) + guess_E)

    def confusion_of(pairs_E: np.ndarray) -> np.ndarray:
        return np.bincount(pairs_E, minlength=len(classes) ** 2).reshape(len(classes), len(classes))

    def macro_f1(drawn_E: np.ndarray) -> float:
        counts_CC = confusion_of(pairs_E[drawn_E])
        seen_C = counts_CC.sum(0) + counts_CC.sum(1)
        f1_C = 2 * np.diag(counts_CC) / np.maximum(seen_C, 1)
        return float(f1_C[seen_C > 0].mean() if absent is None else np.where(seen_C > 0, f1_C, absent).mean())

    confusion_CC = confusion_of(pairs_E)
    per_class = {}
    for index, name in enumerate(classes):
        precision, recall, f1 = scores_3C[:, index].tolist() if index in present else (None, None, None)
        per_class[name] = ClassScore(precision, recall, f1, int(confusion_CC[index].sum()))
    correct_E = truth_E == guess_E
    return ClassificationScores(
        examples=len(truth_E),
        accuracy=float(correct_E.mean()),
        accuracy_interval=mean_interval(correct_E, resamples=resamples, seed=seed),
        macro=Average(*np.nanmean(scores_3C, axis=1).tolist()),
        macro_f1_interval=interval(macro_f1, len(truth_E), resamples=resamples, seed=seed),
        micro=Average(*map(float, averaged("micro")[:3])),
        weighted=Average(*map(float, averaged("weighted")[:3])),
        per_class=per_class,
        confusion=tuple(map(tuple, confusion_CC.tolist())),
    )


def confusion_picture(confusion, classes: Sequence[str], path: str | pathlib.Path, title: str = "") -> None:
    """Draws the confusions as a PNG: a row a label, a column a prediction, the colour the share of the row.

    Up to 20 classes each cell that is not empty has its count; beyond that the numbers would be too small to read.

    Args:
        confusion: counts, (C, C), `[label][prediction]`, as in `ClassificationScores`.
        classes: the C names.

    Raises:
        ValueError: the names do not fit the counts.
    """
    counts_CC = np.asarray(confusion)
    if counts_CC.shape != (len(classes), len(classes)) or not len(classes):
        raise ValueError(f"a confusion of shape {counts_CC.shape} does not fit {len(classes)} classes")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The middle of a long name says least. A dollar would start a formula.
    names = [name if len(name) <= 32 else f"{name[:20]}…{name[-11:]}" for name in classes]
    names = [name.replace("$", r"\$") for name in names]
    shares_CC = counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1)
    written = len(classes) <= 20
    # In inches: the cells, the longest name beside and below them, and the colour bar.
    cells = max(2.2, len(classes) * (0.5 if written else 0.21))
    margin = 0.6 + 0.08 * max(map(len, names))
    figure, axes = plt.subplots(figsize=(1.06 * cells + margin + 1.1, cells + margin + 0.4), layout="constrained")
    image = axes.imshow(shares_CC, cmap="Blues", vmin=0.0, vmax=1.0)
    size = 9 if written else 7
    axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(classes)), names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if written:
        for row, column in zip(*counts_CC.nonzero()):
            count, dark = counts_CC[row, column], shares_CC[row, column] > 0.55
            size = 9 if count < 1000 else 7
            axes.text(column, row, str(count), ha="center", va="center", size=size, color="white" if dark else "black")
    else:
        # Lines between the cells lead the eye to the names.
        axes.set_xticks(np.arange(len(classes) - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(classes) - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="0.9", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
    figure.colorbar(image, label="share of the label", fraction=0.05, pad=0.03, aspect=25)
    if title:
        figure.suptitle(title.replace("$", r"\$"), fontsize=10, wrap=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
