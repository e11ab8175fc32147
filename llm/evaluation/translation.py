"""Scores of translations: BLEU and chrF as sacrebleu counts them (Post 2018, arXiv:1804.08771)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llm.errors import InputError
from llm.evaluation.bootstrap import interval

# 13a splits at spaces and punctuation. Where words stand without spaces between them, sacrebleu's own splitter of
# Chinese, or characters, which need no dictionary.
TOKENIZE = {"zh": "zh", "ja": "char", "th": "char", "lo": "char", "km": "char", "my": "char"}
# Of sacrebleu's, those that neither download a model nor need another package.
OFFLINE = ("13a", "intl", "zh", "char", "none")


@dataclasses.dataclass(frozen=True)
class TranslationScores:
    """All scores lie between 0 and 100. Two BLEU compare only where their signatures agree.

    Attributes:
        bleu: of the whole corpus (Papineni et al. 2002), up to 4-grams. A corpus without any 4-gram scores 0.
        chrf: of the whole corpus (Popović 2015), character 6-grams, beta 2.
        sentence_bleu: of each example, over the orders that it is long enough for: two right words score 100. Their
            mean is not the BLEU of the corpus.
        bleu_interval, chrf_interval: 95% bootstrap intervals over the examples (Koehn 2004), drawn by `interval` and
            not by sacrebleu, so the signatures do not mention them.
    """

    examples: int
    bleu: float
    bleu_interval: tuple[float, float]
    bleu_signature: str
    chrf: float
    chrf_interval: tuple[float, float]
    chrf_signature: str
    sentence_bleu: tuple[float, ...]
    sentence_bleu_signature: str


def translation_scores(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    language: str = "de",
    tokenize: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> TranslationScores:
    """Scores translations against one reference each, cased, as plain text: not tokenized, not lower-cased.

    An empty hypothesis scores 0, also against an empty reference; in the corpus it makes the text shorter, which BLEU's
    brevity penalty and chrF's recall charge. Against an empty reference every word of a hypothesis is wrong for BLEU,
    while chrF skips the example. A corpus without a single match scores 0.

    Args:
        language: of the references, as "de" or "zh-Hant"; decides how BLEU splits words, which the signature says.
        tokenize: one of `OFFLINE`, in place of the language's; "none" for text that is tokenized already.

    Raises:
        InputError: there is no example, or the tokenizer is unknown.
        ValueError: as many hypotheses as references are needed.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references: one each is needed")
    if not len(hypotheses):
        raise InputError("no translations to score: the test set is empty")
    tokenize = tokenize or TOKENIZE.get(language.lower().replace("_", "-").split("-")[0], "13a")
    if tokenize not in OFFLINE:
        raise InputError(f"tokenize={tokenize!r}: must be one of {', '.join(OFFLINE)}")
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu, chrf, sentence = BLEU(tokenize=tokenize), CHRF(), BLEU(tokenize=tokenize, effective_order=True)
    bleu_score, bleu_interval = _corpus_score(bleu, hypotheses, references, resamples, seed)
    chrf_score, chrf_interval = _corpus_score(chrf, hypotheses, references, resamples, seed)
    sentence_bleu = tuple(
        float(sentence.sentence_score(hypothesis, [reference]).score)
        for hypothesis, reference in zip(hypotheses, references)
    )
    return TranslationScores(
        examples=len(hypotheses),
        bleu=bleu_score,
        bleu_interval=bleu_interval,
        bleu_signature=str(bleu.get_signature()),
        chrf=chrf_score,
        chrf_interval=chrf_interval,
        chrf_signature=str(chrf.get_signature()),
        sentence_bleu=sentence_bleu,
        sentence_bleu_signature=str(sentence.get_signature()),
    )


def _corpus_score(metric, hypotheses, references, resamples: int, seed: int) -> tuple[float, tuple[float, float]]:
    """The score of the corpus by one of sacrebleu's metrics, and its bootstrap interval."""
    # Sums of these n-gram counts are all that a score needs, so the text is read once for all resamples. The two
    # methods are what corpus_score is made of; itself it returns half the width of an interval, not its ends.
    counts_EN = np.asarray(metric._extract_corpus_statistics(hypotheses, [references]))
    # In an order of their own: that of the examples must not change the draws.
    counts_EN = counts_EN[np.lexsort(counts_EN.T)]

    def score(drawn_E) -> float:
        return float(metric._compute_score_from_stats(counts_EN[drawn_E].sum(axis=0).tolist()).score)

    examples = len(counts_EN)
    return score(np.arange(examples)), interval(score, examples, resamples=resamples, seed=seed)
