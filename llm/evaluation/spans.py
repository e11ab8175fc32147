"""Question answering by spans of a text: SQuAD's scores, and the best span of a row of logits."""

import dataclasses
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from llm.errors import InputError
from llm.evaluation.bootstrap import mean_interval

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
# A letter of a script that puts no spaces between words, or a run of anything else: Thai, Lao, Tibetan, Burmese, Khmer;
# then Japanese and Chinese, with the signs 々 〆 〇 that stand among their punctuation.
_PIECE = re.compile(
    "[{0}]|[^{0}]+".format(
        "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"
        "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
        "\U00020000-\U000323af"
    )
)


@dataclasses.dataclass(frozen=True)
class AnswerScores:
    """Means over the examples and their 95% bootstrap intervals; between 0 and 1, where SQuAD prints percent.

    Attributes:
        exact_match_each, f1_each: the scores of each example.
    """

    examples: int
    exact_match: float
    exact_match_interval: tuple[float, float]
    f1: float
    f1_interval: tuple[float, float]
    exact_match_each: tuple[float, ...]
    f1_each: tuple[float, ...]


def normalize_answer(text: str) -> str:
    """The form in which SQuAD compares answers (Rajpurkar et al. 2016): "The U.S.  Army" is "us army".

    Lower case, no punctuation, no English articles, single spaces. Punctuation is ASCII's, as in SQuAD's script, and
    that of Chinese and Japanese; other marks, as a dash or a curly quote, stay.
    """
    kept = "".join(character for character in text.lower() if not _is_punctuation(character))
    return " ".join(_ARTICLE.sub(" ", kept).split())


def answer_tokens(text: str) -> list[str]:
    """What F1 counts: the words of the normalized answer.

    Each letter is one of its own in a script that writes no spaces between words: "iPhone手机" is iphone, 手, 机.
    """
    return [piece for word in normalize_answer(text).split() for piece in _PIECE.findall(word)]


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the normalized prediction is one of the normalized references, else 0; no answer as in `answer_f1`."""
    return float(normalize_answer(prediction) in map(normalize_answer, _answers(references)))


def answer_f1(prediction: str, references: Sequence[str]) -> float:
    """The F1 of the tokens that prediction and reference share, each as often as both have it; the best reference's.

    No answer (SQuAD 2.0, Rajpurkar et al. 2018): references that are empty once normalized do not count. Where none is
    left the question has no answer, and the score is 1 if the normalized prediction is empty too, else 0.
    """
    return max(_f1(answer_tokens(prediction), answer_tokens(reference)) for reference in _answers(references))


def answer_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, resamples: int = 1000, seed: int = 0
) -> AnswerScores:
    """Exact match and F1 over all examples.

    Args:
        predictions: one answer an example, "" for none.
        references: the right answers of each example, [] for a question without one.

    Raises:
        InputError: there is no example.
        ValueError: as many predictions as lists of references are needed, and each must be a list.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} lists of references")
    if not len(predictions):
        raise InputError("no answers to score: the test set is empty")
    for example, answers in enumerate(references):
        if isinstance(answers, str):
            raise ValueError(f"references of example {example}: {answers!r} must be a list of answers, not one text")
    exact_E = [exact_match(*pair) for pair in zip(predictions, references)]
    f1_E = [answer_f1(*pair) for pair in zip(predictions, references)]
    return AnswerScores(
        examples=len(predictions),
        # fsum: the same to the last bit in any order.
        exact_match=math.fsum(exact_E) / len(exact_E),
        exact_match_interval=mean_interval(exact_E, resamples=resamples, seed=seed),
        f1=math.fsum(f1_E) / len(f1_E),
        f1_interval=mean_interval(f1_E, resamples=resamples, seed=seed),
        exact_match_each=tuple(exact_E),
        f1_each=tuple(f1_E),
    )


@dataclasses.dataclass(frozen=True)
class Span:
    """The tokens from `start` to `end`, both included, as positions in the row.

    Attributes:
        score: by how much the two logits together beat those of no answer; above 0. Of the windows of one long text,
            the best has the highest.
    """

    start: int
    end: int
    score: float


def best_span(
    start_logits_BS: np.ndarray,
    end_logits_BS: np.ndarray,
    offsets_B: Sequence[int] | np.ndarray,
    context_lengths_B: Sequence[int] | np.ndarray,
    max_length: int,
) -> list[Span | None]:
    """The best span of each row, or None where no answer, place 0, scores at least as high (BERT, section 4.3).

    The score of a span is the logit of its start plus that of its end. A span lies in the context, does not end before
    it starts, and has at most `max_length` tokens; of equal ones the first, then the shortest. To force an answer, set
    a start logit of place 0 to -inf.

    Args:
        offsets_B: where the context begins in each row, at least 1.
        context_lengths_B: its tokens; 0 gives None.

    Raises:
        ValueError: shapes that differ, a context outside the row, NaN or infinity in the logits, or a limit below 1.
    """
    starts_BS, ends_BS = np.asarray(start_logits_BS, np.float64), np.asarray(end_logits_BS, np.float64)
    offsets_B, lengths_B = np.asarray(offsets_B, int), np.asarray(context_lengths_B, int)
    if starts_BS.ndim != 2 or starts_BS.shape != ends_BS.shape:
        raise ValueError(f"start logits {starts_BS.shape} and end logits {ends_BS.shape}: expected the same (B, S)")
    if not offsets_B.shape == lengths_B.shape == starts_BS.shape[:1]:
        raise ValueError(f"{len(starts_BS)} rows have offsets {offsets_B.shape} and context lengths {lengths_B.shape}")
    if ((offsets_B < 1) | (lengths_B < 0) | (offsets_B + lengths_B > starts_BS.shape[1])).any():
        raise ValueError(f"a context lies outside places 1 to {starts_BS.shape[1] - 1} of its row")
    if max_length < 1:
        raise ValueError(f"max_length={max_length}: must be at least 1 token")
    if not ((starts_BS < np.inf) & (ends_BS < np.inf)).all():
        raise ValueError("the logits hold NaN or infinity")
    return [
        _best_of_row(start_S, end_S, int(offset), int(length), max_length)
        for start_S, end_S, offset, length in zip(starts_BS, ends_BS, offsets_B, lengths_B)
    ]


def _best_of_row(start_S, end_S, offset: int, length: int, max_length: int) -> Span | None:
    if not length:
        return None
    width = min(max_length, length)
    # The ends that each start may have, (length, width): never all pairs, which a long context has too many of.
    after = np.concatenate([end_S[offset : offset + length], np.full(width - 1, -np.inf)])
    scores = start_S[offset : offset + length, None] + np.lib.stride_tricks.sliding_window_view(after, width)
    start, extra = divmod(int(scores.argmax()), width)
    best, null = float(scores[start, extra]), float(start_S[0] + end_S[0])
    return Span(offset + start, offset + start + extra, best - null) if best > null else None


def _answers(references: Sequence[str]) -> list[str]:
    """The references that say something, or one empty text for a question without an answer."""
    return [reference for reference in references if normalize_answer(reference)] or [""]


def _f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    shared = (Counter(prediction) & Counter(reference)).total()
    # 2PR / (P + R) with P = shared / predicted and R = shared / wanted, without its 0/0.
    return 2.0 * shared / (len(prediction) + len(reference))


def _is_punctuation(character: str) -> bool:
    # The two blocks of Chinese and Japanese marks hold letters and digits too; their categories tell them apart.
    cjk = "\u3000" <= character <= "\u303f" or "\uff00" <= character <= "\uffef"
    return character in string.punctuation or (cjk and unicodedata.category(character)[0] in "PS")
