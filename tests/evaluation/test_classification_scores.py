"""Scores of a classifier against the textbook's formulas, and what stands in the picture."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from llm.errors import InputError
from llm.evaluation.classification import Average, ClassScore, classification_scores, confusion_picture
from tests.helpers import ROOT

CLASSES = ("a", "b", "c", "d", "e")
PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12)


def scores_of(pairs, classes=CLASSES, **options):
    return classification_scores([t for t, _ in pairs], [p for _, p in pairs], classes, resamples=50, **options)


def ratio(part, whole):
    return part / whole if whole else 0.0


def counted(pairs, one):
    """Precision, recall and F1 of one class by counting pairs."""
    hits = sum(t == p == one for t, p in pairs)
    predicted, support = sum(p == one for _, p in pairs), sum(t == one for t, _ in pairs)
    return ratio(hits, predicted), ratio(hits, support), ratio(2 * hits, predicted + support)


def numbers(average):
    return average.precision, average.recall, average.f1


def test_three_classes():
    # By hand: class 0 has P 2/3, R 2/3; class 1 P 1/2, R 1; class 2 is never predicted.
    scores = classification_scores([0, 0, 0, 1, 2], [0, 0, 1, 1, 0], ["x", "y", "z"])
    assert scores.examples == 5 and scores.accuracy == 0.6
    np.testing.assert_allclose(numbers(scores.macro), [7 / 18, 5 / 9, 4 / 9])
    np.testing.assert_allclose(numbers(scores.micro), [0.6, 0.6, 0.6])
    np.testing.assert_allclose(numbers(scores.weighted), [0.5, 0.6, 8 / 15])
    assert list(scores.per_class) == ["x", "y", "z"]
    np.testing.assert_allclose(numbers(scores.per_class["y"]), [1 / 2, 1, 2 / 3])
    assert scores.per_class["z"] == ClassScore(0.0, 0.0, 0.0, support=1)
    assert scores.confusion == ((2, 1, 0), (0, 1, 0), (1, 0, 0))


@pytest.mark.parametrize("absent, macro", [(None, 1.0), (0, 0.5), (1, 1.0)])
def test_a_class_that_occurs_nowhere(absent, macro):
    scores = classification_scores([0, 0, 0], [0, 0, 0], ["here", "nowhere"], absent=absent)
    assert scores.macro == Average(macro, macro, macro)
    assert scores.micro == scores.weighted == Average(1.0, 1.0, 1.0)
    assert scores.per_class["nowhere"] == ClassScore(None, None, None, support=0)
    assert scores.per_class["here"] == ClassScore(1.0, 1.0, 1.0, support=3)


@pytest.mark.parametrize("absent", [None, 0, 1])
def test_a_class_that_is_never_right_scores_zero_whatever_absent_ones_do(absent):
    scores = classification_scores([1, 0, 0], [0, 1, 0], ["x", "y"], absent=absent)
    assert scores.per_class["y"] == ClassScore(0.0, 0.0, 0.0, support=1)
    assert numbers(scores.macro) == (0.25, 0.25, 0.25)
    # Predicted but no label, and the other way round.
    scores = classification_scores([0, 2], [1, 2], ["x", "y", "z"], absent=absent)
    assert scores.per_class["x"] == ClassScore(0.0, 0.0, 0.0, support=1)
    assert scores.per_class["y"] == ClassScore(0.0, 0.0, 0.0, support=0)
    np.testing.assert_allclose(scores.macro.f1, 1 / 3)


@settings(deadline=None, max_examples=60)
@given(PAIRS)
def test_against_the_formulas(pairs):
    scores = scores_of(pairs)
    present = sorted({index for pair in pairs for index in pair})
    table = np.array([counted(pairs, index) for index in present])
    support = np.array([sum(t == index for t, _ in pairs) for index in present])
    np.testing.assert_allclose(numbers(scores.macro), table.mean(0))
    np.testing.assert_allclose(numbers(scores.weighted), support @ table / len(pairs))
    accuracy = sum(t == p for t, p in pairs) / len(pairs)
    np.testing.assert_allclose([scores.accuracy, *numbers(scores.micro), scores.weighted.recall], [accuracy] * 5)
    for index, name in enumerate(CLASSES):
        got = scores.per_class[name]
        assert got.support == sum(t == index for t, _ in pairs)
        if index in present:
            np.testing.assert_allclose(numbers(got), counted(pairs, index))
        else:
            assert numbers(got) == (None, None, None)
    assert scores.confusion == tuple(tuple(pairs.count((t, p)) for p in range(5)) for t in range(5))


def test_small_types_do_not_overflow():
    labels = np.array([99, 0], np.uint8)
    scores = classification_scores(labels, labels, [str(index) for index in range(100)])
    assert scores.confusion[99][99] == scores.per_class["99"].support == 1


@settings(deadline=None, max_examples=30)
@given(PAIRS, st.randoms(), st.permutations(range(5)))
def test_neither_the_order_of_examples_nor_of_classes_matters(pairs, random, order):
    scores = scores_of(pairs)
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert scores_of(shuffled) == scores
    renamed = scores_of([(order.index(t), order.index(p)) for t, p in pairs], [CLASSES[index] for index in order])
    assert renamed.per_class == scores.per_class
    np.testing.assert_allclose(numbers(renamed.macro), numbers(scores.macro))


def test_the_interval_is_that_of_a_rate():
    labels, predictions = np.zeros(400, int), (np.arange(400) >= 300).astype(int)
    scores = classification_scores(labels, predictions, ["x", "y"], resamples=5000)
    np.testing.assert_allclose(scores.accuracy_interval, binom.ppf([0.025, 0.975], 400, 0.75) / 400, atol=1.01 / 400)
    assert classification_scores([0], [0], ["x"]).accuracy_interval == (1.0, 1.0)

    # One resample each, so that both ends are its score.
    once = [classification_scores(labels, predictions, ["x", "y"], resamples=1, seed=seed) for seed in (0, 0, 1)]
    assert once[0].accuracy_interval[0] == once[0].accuracy_interval[1] != once[2].accuracy_interval[0]
    assert once[0] == once[1]


@pytest.mark.parametrize("absent", [None, 0.0])
def test_the_interval_of_macro_f1_is_that_of_the_scores_of_resamples(absent):
    """Each resample is scored by itself, classes that it lacks included."""
    rng = np.random.default_rng(4)
    labels = np.repeat([0, 1, 2, 3], [20, 6, 3, 1])
    guesses = np.where(rng.random(30) < 0.7, labels, rng.integers(0, 4, 30))
    got = classification_scores(labels, guesses, CLASSES[:4], absent=absent, resamples=40, seed=5)
    order, draw = np.lexsort((guesses, labels)), np.random.default_rng(5)
    resampled = []
    for _ in range(40):
        drawn = order[draw.integers(30, size=30)]
        once = classification_scores(labels[drawn], guesses[drawn], CLASSES[:4], absent=absent, resamples=1)
        resampled.append(once.macro.f1)
    np.testing.assert_allclose(got.macro_f1_interval, np.quantile(resampled, [0.025, 0.975]))
    assert got.macro_f1_interval[0] < got.macro.f1 < got.macro_f1_interval[1]


@pytest.mark.parametrize(
    "labels, predictions, classes, error, message",
    [
        ([], [], ["x"], InputError, "no examples"),
        ([0, 2], [0, 0], ["x", "y"], InputError, "label 2 of example 1 is not one of the 2 classes 0 to 1"),
        ([0, 0], [-1, 0], ["x", "y"], InputError, "prediction -1 of example 0"),
        ([0, 1], [0, 1], ["x", "x"], InputError, "each name"),
        ([0, 1], [0], ["x", "y"], ValueError, r"labels \(2,\) and predictions \(1,\)"),
        ([[0, 1]], [[0, 1]], ["x", "y"], ValueError, "one index an example"),
        ([0.0, 1.0], [0, 1], ["x", "y"], ValueError, "labels of type float64"),
        (["x"], ["x"], ["x", "y"], ValueError, "labels of type <U1"),
    ],
)
def test_refuses(labels, predictions, classes, error, message):
    with pytest.raises(error, match=message):
        classification_scores(labels, predictions, classes)


def test_importing_it_loads_neither_sklearn_nor_matplotlib():
    code = "import sys, llm.evaluation.classification; print({'sklearn', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "set()", result.stderr


@pytest.fixture
def figures(monkeypatch):
    """The figures that the test draws, kept open to look into."""
    import matplotlib.pyplot as plt

    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", kept.append)
        yield kept
    for figure in kept:
        plt.close(figure)


@pytest.mark.parametrize("count", [1, 2, 8, 20, 21, 52])
def test_the_picture(figures, tmp_path, count):
    counts = np.arange(count * count).reshape(count, count) * 3 % 7
    counts[-1] = 0
    names = [f"class_number_{index}" for index in range(count)]
    confusion_picture(counts, names, tmp_path / "confusion.png", title="costs $5, not $6")
    figure = figures[0]
    axes = figure.axes[0]
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    # Each row is a share of its label; a label without examples stays empty.
    shares = np.array(axes.images[0].get_array())
    np.testing.assert_allclose(shares.sum(1), counts.any(1))
    np.testing.assert_allclose(shares * counts.sum(1, keepdims=True), counts)
    assert axes.images[0].get_clim() == (0.0, 1.0)
    written = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    if count <= 20:
        assert written == {(t, p): str(counts[t, p]) for t, p in zip(*counts.nonzero())}
    else:
        assert not written
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("label", "predicted")
    assert figure.get_suptitle() == r"costs \$5, not \$6"
    # No name or number lies upon the next one, and all lie on the paper.
    renderer = figure.canvas.get_renderer()
    down = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
    along = [label.get_window_extent(renderer) for label in axes.get_xticklabels()]
    assert all(upper.y0 > lower.y1 for upper, lower in zip(down, down[1:]))
    assert all(left.x1 < right.x0 for left, right in zip(along, along[1:]))
    paper = figure.bbox
    for box in down + along + [axes.xaxis.label.get_window_extent(renderer)]:
        assert paper.x0 <= box.x0 and box.x1 <= paper.x1 and paper.y0 <= box.y0 and box.y1 <= paper.y1


def test_names_that_are_long_or_look_like_formulas(figures, tmp_path):
    confusion_picture([[1, 2], [12345, 4]], ["$x_$", "n" * 90 + "end"], tmp_path / "confusion.png")
    first, second = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert first == r"\$x_\$" and len(second) == 32 and second.endswith("end")


@pytest.mark.parametrize(
    "confusion, classes", [([[1, 2], [3, 4]], ["x"]), ([[1, 2]], ["x", "y"]), (np.zeros((0, 0)), [])]
)
def test_the_picture_refuses_other_shapes(tmp_path, confusion, classes):
    with pytest.raises(ValueError, match="does not fit"):
        confusion_picture(confusion, classes, tmp_path / "confusion.png")
    assert not list(tmp_path.iterdir())
