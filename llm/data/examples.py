"""The objectives on examples that are rows of their own. The keys are those of `llm.data.objectives`.

Every objective is called as f(examples, labels, length, spec, specials, rngs): B examples, an array of ids a field;
labels (B, n); the padded length, which also bounds the source; a generator for each example.
"""

from collections.abc import Sequence

import numpy as np

from llm.data import packed
from llm.data.packed import Batch, Rngs
from llm.data.spec import ObjectiveSpec
from llm.data.specials import Specials
from llm.errors import InputError

Example = Sequence[np.ndarray]


def longest(spec: ObjectiveSpec, lengths: np.ndarray, specials: Specials) -> np.ndarray:
    """The padded length that holds each example whole, int64 (N,).

    Args:
        spec: the objective.
        lengths: (N, fields) tokens of each field. A next sentence from elsewhere does not count: it is cut to fit.
        specials: says which special tokens are added.
    """
    lengths = np.asarray(lengths, np.int64)
    fields = lengths.shape[1]
    if spec.kind == "seq2seq":
        return lengths.max(axis=1) + 1
    if spec.kind == "preference":
        return 2 * (lengths[:, 0] - 1) + lengths[:, 1] + lengths[:, 2]
    if spec.kind == "contrastive":
        return lengths.max(axis=1) + _added(1, specials)
    if spec.kind in ("causal", "prefix", "span_corruption"):
        return lengths.sum(axis=1) + fields
    if spec.kind == "masked" and spec.next_sentence:
        fields = 2
    return lengths.sum(axis=1) + _added(fields, specials)


# --- rows of fields ---------------------------------------------------------------------------------------------------


def _added(fields: int, specials: Specials) -> int:
    """Special tokens that `_joined` adds."""
    return 1 + (fields if specials.sep is not None else fields - 1)


def _joined(fields: Example, specials: Specials) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(ids, types, the place of each field's first token) of `[CLS] a [SEP] b [SEP]`, or what stands for it."""
    between = specials.end_of_text if specials.sep is None else specials.sep
    parts = [np.array([specials.end_of_text if specials.cls is None else specials.cls])]
    types, places, at = [np.zeros(1, np.int32)], [], 1
    for number, field in enumerate(fields):
        closed = specials.sep is not None or number < len(fields) - 1
        parts += [field, np.full(int(closed), between)]
        types.append(np.full(len(field) + closed, number, np.int32))
        places.append(at)
        at += len(field) + closed
    return np.concatenate(parts).astype(np.int32), np.concatenate(types), places


def shares(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each field is kept so that all fit: the longest give way first, down to a common length."""
    kept, left = [0] * len(lengths), room
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for done, i in enumerate(order):
        kept[i] = min(lengths[i], left // (len(order) - done))
        left -= kept[i]
    return kept


def _cut(fields: Example, added: int, length: int) -> Example:
    if length < added:
        raise InputError(f"rows of {length} tokens do not hold the {added} special tokens; raise data.row_length")
    return [field[:keep] for field, keep in zip(fields, shares([len(field) for field in fields], length - added))]


def _padded(rows: Sequence[np.ndarray], length: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, segments): each row followed by padding, int32 (B, length)."""
    ids, segments = np.full((len(rows), length), fill, np.int32), np.zeros((len(rows), length), np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)], segments[number, : len(row)] = row, 1
    return ids, segments


def _inputs(rows: Sequence[Example], length: int, specials: Specials) -> tuple[Batch, list[list[int]]]:
    """tokens, segments, positions, types of joined fields that fit, and the places of the fields."""
    joined = [_joined(fields, specials) for fields in rows]
    tokens, segments = _padded([ids for ids, _, _ in joined], length, specials.fill)
    types, _ = _padded([types for _, types, _ in joined], length, 0)
    batch = {"tokens": tokens, "segments": segments, "positions": packed.restarted(segments), "types": types}
    return batch, [places for _, _, places in joined]


# --- language modelling -----------------------------------------------------------------------------------------------


def _documents(
    examples: Sequence[Example], length: int, specials: Specials
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Tokens, targets, segments as of packed rows, a document each, and the place of each last field's first token.

    Where the last field is cut, its last target is its next token and not the end of text.
    """
    between = specials.end_of_text if specials.sep is None else specials.sep
    inputs, targets, places = [], [], []
    for example in examples:
        *first, last = _cut(example, len(example), length)
        head = [specials.opening]
        for field in first:
            head += [*field, between]
        following = example[-1][len(last)] if len(last) < len(example[-1]) else specials.end_of_text
        inputs.append(np.array([*head, *last], np.int32))
        targets.append(np.array([*head[1:], *last, following], np.int32))
        places.append(len(head))
    tokens_BT, segments_BT = _padded(inputs, length, specials.fill)
    return tokens_BT, _padded(targets, length, 0)[0], segments_BT, places


def causal(examples, labels, length: int, spec: ObjectiveSpec, specials: Specials, rngs: Rngs) -> Batch:
    """Next-token prediction of the fields, one behind the other, and the end of text."""
    return packed.causal(*_documents(examples, length, specials)[:3])


def prefix(examples, labels, length: int, spec: ObjectiveSpec, specials: Specials, rngs: Rngs) -> Batch:
    """Prefix language modelling: all but the last field is the prefix, of one field a random part."""
    tokens_BT, targets_BT, segments_BT, places = _documents(examples, length, specials)
    if all(len(example) == 1 for example in examples):
        return packed.prefix(tokens_BT, targets_BT, segments_BT, rngs)
    return packed.with_prefix(packed.causal(tokens_BT, targets_BT, segments_BT), np.array(places, np.int32))


def span_corruption(examples, labels, length: int, spec: ObjectiveSpec, specials: Specials, rngs: Rngs) -> Batch:
    """Span corruption of the end of text and the fields, one behind the other (`packed.span_corruption`)."""
    tokens_BT, _, segments_BT, _ = _documents(examples, length, specials)
    return packed.span_corruption(tokens_BT, segments_BT, spec, specials, rngs)


def masked(
    examples,
    labels,
    length: int,
    spec: ObjectiveSpec,
    specials: Specials,
    rngs: Rngs,
    others: Sequence[Example] | None = None,
) -> Batch:
    """Masked language modelling of the joined fields; with `next_sentence` of pairs, of which half are consecutive.

    A pair is an example's two fields, or its one field cut at a random place. Label 1 keeps it; label 0 takes the
    second part from another example, which `others` gives, so that a row does not depend on its neighbours in the
    batch. A text of fewer than two tokens has no second part: its pair is always a drawn one.
    """
    if not spec.next_sentence:
        rows = [_cut(example, _added(len(example), specials), length) for example in examples]
        batch, _ = _inputs(rows, length, specials)
        return packed.masked(batch["tokens"], batch["segments"], batch["types"], spec, specials, rngs)
    if others is None or len(others) != len(examples):
        raise ValueError("next_sentence needs another example for each: others")
    rows, consecutive = [], np.zeros(len(examples), np.int32)
    for number, (example, other, rng) in enumerate(zip(examples, others, rngs)):
        (first, second), (_, drawn) = _halves(example, rng), _halves(other, rng)
        whole = len(example) > 1 or len(example[0]) > 1
        consecutive[number] = whole and rng.random() < 0.5
        rows.append(_cut((first, second if consecutive[number] else drawn), _added(2, specials), length))
    batch, _ = _inputs(rows, length, specials)
    batch = packed.masked(batch["tokens"], batch["segments"], batch["types"], spec, specials, rngs)
    return batch | {"labels": consecutive, "label_weights": np.ones(len(examples), np.float32)}


def _halves(example: Example, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    if len(example) == 2:
        return example[0], example[1]
    (text,) = example
    at = rng.integers(1, len(text)) if len(text) > 1 else 0
    return (text[:at], text[at:]) if at else (text, text)


# --- tasks ------------------------------------------------------------------------------------------------------------


def seq2seq(examples, labels, length: int, spec: ObjectiveSpec, specials: Specials, rngs: Rngs) -> Batch:
    """The second field from the first. The end of text closes both; the decoder's input opens with `specials.start`.

    A source that is too long keeps its head; of such a target the head is learned, and no end.
    """
    source = [np.append(example[0][: length - 1], specials.end_of_text) for example in examples]
    targets_BT, segments_BT = _padded([np.append(e[1], specials.end_of_text)[:length] for e in examples], length, 0)
    return {
        "tokens": packed.shifted(targets_BT, segments_BT, specials),
        "targets": targets_BT,
        "weights": (segments_BT != 0).astype(np.float32),
        "segments": segments_BT,
        "positions": packed.restarted(segments_BT),
        **packed.as_source(*_padded(source, length, specials.fill)),
    }


def classification(examples, labels, length: int, spec: ObjectiveSpec, specials: Specials, rngs: Rngs) -> Batch:
    """The class of the joined fields: the first label."""
    rows = [_cut(example, _added(len(example), specials), length) for example in examples]
    return _inputs(rows, length, specials)[0] | {
        "labels": np.asarray(labels)[:, 0].astype(np.int32),
        "weights": np.ones(len(examples), np.float32),
    }


def span_qa(examples, labels, length: int, spec: ObjectiveSpec, specials: Specials, rngs: Rngs) -> Batch:
    """Where the answer to the question, the first field, stands in the context, the second.

    Labels are the first and the last token of the answer, counted in the context, and the number of the window over
    the context, which is an example of its own. (-1, -1) says that there is no answer, and becomes place 0. The
    question keeps up to half of the room, more where the context leaves it; the context keeps its head, and an answer
    that is cut off has weight 0.

    Raises:
        InputError: labels that are no span of the context.
    """
    labels = np.asarray(labels)
    rows, spans, weights = [], np.zeros((len(examples), 2), np.int32), np.ones(len(examples), np.float32)
    for number, example in enumerate(examples):
        question, context = example
        start, end = labels[number, :2].tolist()
        if (start, end) != (-1, -1) and not 0 <= start <= end < len(context):
            raise InputError(f"starts, row {number}: tokens {start}..{end} are no span of a context of {len(context)}")
        rows.append(_cut(example, _added(2, specials), length))
        weights[number] = end < len(rows[-1][1])
        spans[number] = start, end
    batch, places = _inputs(rows, length, specials)
    offsets = np.array([context for _, context in places], np.int32)
    found = (weights > 0) & (spans[:, 0] >= 0)
    spans = np.where(found[:, None], spans + offsets[:, None], 0).astype(np.int32)
    windows = labels[:, 2].astype(np.int32)
    places = {"starts": spans[:, 0], "ends": spans[:, 1], "offsets": offsets}
    return batch | places | {"windows": windows, "weights": weights}


def contrastive(examples, labels, length: int, spec: ObjectiveSpec, specials: Specials, rngs: Rngs) -> Batch:
    """Two texts that belong together: the first field is the source, row i of the one fits row i of the other."""
    added = _added(1, specials)
    source, other = (
        _inputs([_cut(example[side : side + 1], added, length) for example in examples], length, specials)[0]
        for side in (0, 1)
    )
    return {
        **{name: other[name] for name in ("tokens", "segments", "positions")},
        **packed.as_source(source["tokens"], source["segments"]),
        "weights": np.ones(len(examples), np.float32),
    }


def preference(examples, labels, length: int, spec: ObjectiveSpec, specials: Specials, rngs: Rngs) -> Batch:
    """A prompt with each of two answers, the chosen and the rejected one, as two documents of a row.

    The fields are prompt, chosen and rejected; nothing is put between them. The tokens of the answers weigh 1.
    """
    shape = (len(examples), length)
    tokens, targets = np.full(shape, specials.fill, np.int32), np.zeros(shape, np.int32)
    weights, segments = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for row, (prompt, *answers) in enumerate(examples):
        at = 0
        for number, answer in enumerate(answers, 1):
            ids = np.concatenate([prompt, answer])
            place = slice(at, at + len(ids) - 1)
            tokens[row, place], targets[row, place], segments[row, place] = ids[:-1], ids[1:], number
            weights[row, at + len(prompt) - 1 : place.stop] = 1
            at = place.stop
    positions = packed.restarted(segments)
    return {"tokens": tokens, "targets": targets, "weights": weights, "segments": segments, "positions": positions}
