"""The objectives on rows: next tokens, prefix, masked, span corruption. The keys are those of `llm.data.objectives`."""

from collections.abc import Sequence

import numpy as np

from llm.data import masking
from llm.data.spec import ObjectiveSpec
from llm.data.specials import Specials, check_ids
from llm.errors import InputError

Batch = dict[str, np.ndarray]
Rngs = Sequence[np.random.Generator]


def causal(
    tokens_BT: np.ndarray, targets_BT: np.ndarray, segments_BT: np.ndarray, positions_BT: np.ndarray | None = None
) -> Batch:
    """Next-token prediction within each document of the packed rows; positions are counted where none are given."""
    return {
        "tokens": tokens_BT.astype(np.int32, copy=False),
        "targets": targets_BT.astype(np.int32, copy=False),
        "weights": (segments_BT != 0).astype(np.float32),
        "segments": segments_BT.astype(np.int32, copy=False),
        "positions": restarted(segments_BT) if positions_BT is None else positions_BT,
    }


def continuation(rows: Batch, before_tokens_BT: np.ndarray, before_segments_BT: np.ndarray) -> Batch:
    """Next-token prediction by an encoder-decoder: the source is what the row's first document said before the row.

    Args:
        rows: of `causal`.
        before_tokens_BT: the rows before.
        before_segments_BT: 1 where they belong to the document that goes on, 0 elsewhere (`Dataset.before`).
    """
    return rows | as_source(before_tokens_BT, before_segments_BT)


def with_context(rows: Batch, before_tokens_BT: np.ndarray, before_segments_BT: np.ndarray) -> Batch:
    """Rows of twice the length: what their first document said before, of no weight, then the rows themselves."""
    before = {
        "tokens": before_tokens_BT,
        "targets": np.zeros_like(before_tokens_BT),
        "weights": np.zeros(before_tokens_BT.shape, np.float32),
        "segments": before_segments_BT,
    }
    joined = {key: np.concatenate([value, rows[key]], axis=1) for key, value in before.items()}
    return joined | {"positions": restarted(joined["segments"])}


def restarted(segments_BT: np.ndarray) -> np.ndarray:
    """Positions 0, 1, ... within each run of equal segments, int32."""
    index = np.broadcast_to(np.arange(segments_BT.shape[1], dtype=np.int32), segments_BT.shape)
    starts = np.ones(segments_BT.shape, bool)
    starts[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(np.int32)


def prefix(tokens_BT, targets_BT, segments_BT, rngs: Rngs) -> Batch:
    """Prefix language modelling (Raffel et al. 2020): what comes after a random place is predicted.

    The place is uniform over a row's 1..n-1 places before padding; a row of one place has no prefix. The document it
    falls into is seen both ways before it, documents after it are learned by `causal`, those before it are not. The
    last place of the prefix counts: it predicts the first token that it does not see.
    """
    real_B = (segments_BT != 0).sum(axis=1)
    lengths_B = np.array([rng.integers(1, n) if n > 1 else 0 for rng, n in zip(rngs, real_B)], np.int32)
    return with_prefix(causal(tokens_BT, targets_BT, segments_BT), lengths_B)


def with_prefix(batch: Batch, lengths_B: np.ndarray) -> Batch:
    suffix_BT = np.arange(batch["tokens"].shape[1]) >= lengths_B[:, None] - 1
    return batch | {"weights": batch["weights"] * suffix_BT.astype(np.float32), "prefix_lengths": lengths_B}


def masked(tokens_BT, segments_BT, types_BT, spec: ObjectiveSpec, specials: Specials, rngs: Rngs) -> Batch:
    """Masked language modelling (`llm.data.masking.mask_tokens`): the tokens at chosen places are the targets.

    Targets stand at their own place, not one ahead. Special tokens and padding are never chosen.
    """
    assert specials.mask is not None, "see `require`"
    tokens_BT = tokens_BT.astype(np.int32)
    check_ids("tokens", tokens_BT, specials.vocab_size)
    eligible_BT = (segments_BT != 0) & ~np.isin(tokens_BT, specials.ids)
    starts_BT = None
    if spec.whole_words:
        assert specials.starts_word is not None, "see `require`"
        begins_BT = masking.word_starts(tokens_BT, eligible_BT, specials.starts_word)
        # A document that goes on from another row, or has no opening token, begins a word.
        first_BT = np.arange(tokens_BT.shape[1]) - restarted(segments_BT)
        starts_BT = np.maximum(begins_BT, first_BT)
    corrupted_BT, chosen_BT = masking.mask_tokens(
        tokens_BT, eligible_BT, spec.mask_rate, specials.mask, specials.ordinary, rngs, starts_BT
    )
    return {
        "tokens": corrupted_BT,
        "targets": np.where(chosen_BT, tokens_BT, 0),
        "weights": chosen_BT.astype(np.float32),
        "segments": segments_BT.astype(np.int32),
        "positions": restarted(segments_BT),
        "types": types_BT.astype(np.int32),
    }


def span_corruption(tokens_BT, segments_BT, spec: ObjectiveSpec, specials: Specials, rngs: Rngs) -> Batch:
    """T5's span corruption: the encoder reads each row with spans replaced by sentinels, the decoder tells the spans.

    Spans are drawn over a row as one sequence, so that source and target have the lengths of T5's
    (`llm.data.masking.span_lengths`), whatever documents the row holds. Sentinels descend from the highest id, row by
    row, and the end of text closes both sides, in the row's last document. Documents keep apart: a span belongs to the
    one in which it begins (`llm.data.masking.corrupt_spans`), and the decoder's input opens anew with each. A row of
    fewer than two tokens has no span and no weight.
    """
    B, T = tokens_BT.shape
    source_length, target_length = masking.span_lengths(T, spec.mask_rate, spec.mean_span)
    enough_sentinels(masking.span_counts(T, spec.mask_rate, spec.mean_span)[1], specials)
    sentinels = np.array(sorted(specials.sentinels, reverse=True), np.int32)
    end = specials.end_of_text
    source, source_segments = np.full((B, source_length), specials.fill), np.zeros((B, source_length), np.int32)
    targets, segments = np.zeros((B, target_length), np.int32), np.zeros((B, target_length), np.int32)
    weights = np.zeros((B, target_length), np.float32)
    for row, rng in enumerate(rngs):
        real = segments_BT[row] != 0
        ids, documents = tokens_BT[row, real].astype(np.int32), segments_BT[row, real]
        if not len(ids):
            continue
        hidden = masking.span_mask(len(ids), spec.mask_rate, spec.mean_span, rng)
        # The end of text that opens a document is hidden like any token, but telling it would mean to stop.
        opens = (np.diff(documents, prepend=0) != 0) & (ids == end)
        parts = masking.corrupt_spans(ids, documents, hidden, sentinels, ~opens)
        n, m = len(parts.source), len(parts.target)
        source[row, : n + 1] = np.append(parts.source, end)
        source_segments[row, : n + 1] = np.append(parts.source_documents, documents[-1])
        if m:
            targets[row, : m + 1] = np.append(parts.target, end)
            segments[row, : m + 1] = np.append(parts.target_documents, documents[-1])
            weights[row, : m + 1] = np.append(parts.counts, 1)
    return {
        "tokens": shifted(targets, segments, specials),
        "targets": targets,
        "weights": weights,
        "segments": segments,
        "positions": restarted(segments),
        **as_source(source, source_segments),
    }


def shifted(targets_BT: np.ndarray, segments_BT: np.ndarray, specials: Specials) -> np.ndarray:
    """The decoder's input: each target one place later, a document's first behind the start."""
    tokens_BT = np.roll(targets_BT, 1, axis=1)
    tokens_BT[restarted(segments_BT) == 0] = specials.start
    return np.where(segments_BT != 0, tokens_BT, specials.fill).astype(np.int32)


def as_source(tokens_BS: np.ndarray, segments_BS: np.ndarray) -> Batch:
    """The keys of an encoder's input."""
    return {
        "source_tokens": tokens_BS.astype(np.int32),
        "source_segments": segments_BS.astype(np.int32),
        "source_positions": restarted(segments_BS),
    }


def enough_sentinels(spans: int, specials: Specials) -> None:
    """Raises InputError when the tokenizer has fewer sentinels than a row may have spans."""
    have = len(specials.sentinels)
    if spans > have:
        raise InputError(
            f"objective.kind='span_corruption': a row may have {spans} spans and the tokenizer has {have} sentinels; "
            f"set tokenizer.sentinels to {spans} or more, or raise objective.mean_span"
        )
