"""What is learned from rows and examples: the batch dict that models and losses see.

Its keys; B rows, T places of the row, S places of the source. An objective gives those that it names below.

    tokens            (B, T) int32    inputs
    targets           (B, T) int32    the id to predict at each place
    weights           float32         how much each place, (B, T), or each row, (B,), counts in the loss
    segments          (B, T) int32    1, 2, ... for the documents of a row, 0 for padding
    positions         (B, T) int32    0, 1, ... within each document's part of the row
    types             (B, T) int32    the field that a token belongs to, 0, 1, ...; 0 at padding
    prefix_lengths    (B,) int32      `Mask.prefix_lengths_B`: places of the row before this one are visible to all
    source_tokens     (B, S) int32    inputs of the encoder (contrastive: of the other text)
    source_segments   (B, S) int32    as segments; a document's source and target have the same number
    source_positions  (B, S) int32    as positions
    labels            (B,) int32      the class of a row
    label_weights     (B,) float32    how much each label counts, where `weights` are those of places
    starts, ends      (B,) int32      the first and the last place of the answer
    offsets           (B,) int32      the place of the context's first token
    windows           (B,) int32      0 where a question begins, 1, 2, ... at further windows over its context
    continues         (B,) int32      1 where a row goes on from the same row of the batch before, else 0
    reference         (B, 2) float32  log-probabilities of the chosen and the rejected answer by the run of the start

Which of them each objective gives:

    causal            tokens targets weights segments positions; of a stream also continues
    prefix            these and prefix_lengths
    masked            tokens targets weights segments positions types; of pairs also labels label_weights
    span_corruption   tokens targets weights segments positions, source_*
    seq2seq           the same
    continuation      the same
    classification    tokens segments positions types labels weights (B,)
    span_qa           tokens segments positions types starts ends offsets windows weights (B,)
    contrastive       tokens segments positions, source_*, weights (B,)
    chat              tokens targets weights segments positions, of whole conversations; weights are the assistant's
    preference        the same, segment 1 with the chosen answer and 2 with the rejected one; reference once it is known

What does not count has weight 0, and a target or label that is an id all the same (0 but where a packed row has its
end of text), never -100. Weights come from lengths and places, never from ids: a text may hold the id of the padding or
of the end of text. Two look at ids: "masked" chooses no special token, wherever it stands, and "span_corruption" does
not count an end of text that opens a document. A row of zeros counts nowhere. `prefix_lengths` counts places of the
row, as a mask does that is given no positions.

Packed rows have tokens, targets one place ahead, and segments (`llm.data.pack`). Examples have an array of ids a field,
without special tokens; they become `[CLS] a [SEP] b [SEP]`, without [CLS] starting with the end of text, and without
[SEP] as `end-of-text a end-of-text b`. An example that is too long loses tails, those of its longest fields first.
Everything random is drawn by a generator of its row.
"""

from collections.abc import Callable, Sequence

import numpy as np

from llm.data import examples, masking, messages, packed
from llm.data.examples import longest
from llm.data.packed import Batch, causal, enough_sentinels
from llm.data.spec import ObjectiveSpec
from llm.data.specials import Specials, check_ids
from llm.errors import InputError

KEYS = ("tokens", "targets", "weights", "segments", "positions")

# f(tokens_BT, targets_BT, segments_BT, spec, specials, rngs) of packed rows; a generator a row, none for "causal".
PACKED: dict[str, Callable[..., Batch]] = {
    "causal": lambda tokens, targets, segments, spec, specials, rngs: causal(tokens, targets, segments),
    "prefix": lambda tokens, targets, segments, spec, specials, rngs: packed.prefix(tokens, targets, segments, rngs),
    "masked": lambda tokens, targets, segments, spec, specials, rngs: packed.masked(
        tokens, segments, np.zeros_like(segments), spec, specials, rngs
    ),
    "span_corruption": lambda tokens, targets, segments, spec, specials, rngs: packed.span_corruption(
        tokens, segments, spec, specials, rngs
    ),
}
# Of packed rows and the rows before them (`llm.data.loader.Dataset.rows`).
FOLLOWING = ("continuation",)

# f(examples, labels, length, spec, specials, rngs) of examples; "masked" takes `others` for pairs of sentences.
UNPACKED: dict[str, Callable[..., Batch]] = {
    "causal": examples.causal,
    "prefix": examples.prefix,
    "masked": examples.masked,
    "span_corruption": examples.span_corruption,
    "seq2seq": examples.seq2seq,
    "classification": examples.classification,
    "span_qa": examples.span_qa,
    "contrastive": examples.contrastive,
    "preference": examples.preference,
}


def require(
    spec: ObjectiveSpec,
    specials: Specials,
    *,
    packed: bool,
    fields: Sequence[str] = ("text",),
    classes: int = 0,
    row_length: int = 0,
) -> None:
    """Raises InputError when an objective cannot be learned from such data or with such a tokenizer.

    Args:
        spec: the objective.
        specials: the tokenizer's special tokens.
        packed: whether the data are packed rows, or examples.
        fields: names of an example's fields.
        classes: how many classes the labels name.
        row_length: the longest row, for the sentinels that it needs; 0 does not look.
    """
    kind = f"objective.kind={spec.kind!r}"
    if spec.kind in FOLLOWING and not packed:
        raise InputError(f"{kind} reads the row before: prepare the data with data.packing='concatenate'")
    if packed and spec.kind not in (*PACKED, *FOLLOWING, messages.CHAT):
        raise InputError(f"{kind} learns from whole examples: prepare them with data.packing='whole'")
    if packed and spec.next_sentence and spec.kind == "masked":
        raise InputError(
            "objective.next_sentence makes pairs of whole examples: prepare them with data.packing='whole'"
        )
    if packed and spec.augment:
        raise InputError(
            f"objective.augment={spec.augment} changes whole examples: set data.packing='whole', or take none"
        )
    forms = {messages.CHAT: messages.FIELDS[messages.CHAT], messages.PREFERENCE: messages.FIELDS[messages.PREFERENCE]}
    if any((spec.kind == form) != (tuple(fields) == names) for form, names in forms.items()):
        have = next((form for form, names in forms.items() if tuple(fields) == names), messages.TEXT)
        need = spec.kind if spec.kind in forms else messages.TEXT
        raise InputError(f"{kind} learns from data.form={need!r}, the data are of {have!r}")
    if spec.augment and spec.kind in ("span_qa", *forms):
        raise InputError(f"objective.augment={spec.augment} would change the answers of {kind}: take none")
    if spec.kind in ("seq2seq", "span_qa", "contrastive") and len(fields) != 2:
        raise InputError(f"{kind} needs examples of two fields, data.fields={tuple(fields)} has {len(fields)}")
    pairs = spec.kind == "masked" and spec.next_sentence
    if pairs and len(fields) > 2:
        raise InputError(f"objective.next_sentence makes pairs: data.fields={tuple(fields)} has more than two")
    if spec.kind == "classification" and classes < 2:
        raise InputError(f"{kind} needs labels of two classes or more, there are {classes}: name them by data.label")
    for name in {"masked": ("cls", "sep", "mask") if pairs else ("mask",)}.get(spec.kind, ()):
        if getattr(specials, name) is None:
            raise InputError(f"{kind}: the tokenizer has no {name} token; add it by tokenizer.special_tokens")
    if spec.kind == "masked" and spec.whole_words and specials.starts_word is None:
        raise InputError("objective.whole_words: the tokenizer does not say where words begin; set it to False")
    if spec.kind == "span_corruption":
        _, spans = masking.span_counts(row_length or 2, spec.mask_rate, spec.mean_span)
        enough_sentinels(spans, specials)


def check(batch: Batch, vocab_size: int, classes: int = 0) -> None:
    """Raises InputError, naming key, row, place and id, when an id, a label or a place is out of range.

    On a device such an id would silently be another one.

    Args:
        batch: of any objective.
        vocab_size: ids lie below.
        classes: labels lie below; those of pairs of sentences below 2.
    """
    for key in ("tokens", "targets", "source_tokens"):
        if key in batch:
            check_ids(key, batch[key], vocab_size)
    if "labels" in batch:
        size = 2 if "label_weights" in batch else classes
        check_ids("labels", batch["labels"], size, "prepare the data again, so that labels are counted")
    for key, last in (("starts", 1), ("ends", 1), ("offsets", 0), ("prefix_lengths", 0)):
        if key in batch:
            check_ids(key, batch[key], batch["tokens"].shape[1] + 1 - last, "the row does not hold it")


__all__ = ["FOLLOWING", "KEYS", "PACKED", "UNPACKED", "Batch", "Specials", "causal", "check", "longest", "require"]
