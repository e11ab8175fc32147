"""Objectives: masks, spans, prefixes, pairs and labels against plain Python; what counts comes from lengths."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from llm.attention.mask import Mask, visible
from llm.data import examples as unpacked
from llm.data import masking
from llm.data.augment import augment
from llm.data.objectives import KEYS, PACKED, UNPACKED, Specials, causal, check, longest, require
from llm.data.spec import ObjectiveSpec
from llm.errors import InputError

END, PAD, CLS, SEP, MASK = 0, 1, 2, 3, 4
SENTINELS = tuple(range(90, 100))
BERT = Specials(100, END, pad=PAD, cls=CLS, sep=SEP, mask=MASK, sentinels=SENTINELS)
GPT = Specials(100, END)


def generators(count, seed=0):
    return [np.random.default_rng([seed, row]) for row in range(count)]


def packed(kind, rows, segments, spec=None, specials=BERT, seed=0, targets=None):
    tokens = np.array(rows)
    targets = np.roll(tokens, -1, axis=1) if targets is None else np.array(targets)
    spec = spec or ObjectiveSpec(kind=kind)
    return PACKED[kind](tokens, targets, np.array(segments), spec, specials, generators(len(tokens), seed))


def unpack(kind, examples, labels=None, length=12, specials=BERT, seed=0, others=None, **spec):
    examples = [tuple(np.array(field, np.uint16) for field in example) for example in examples]
    labels = np.zeros((len(examples), 0), np.int64) if labels is None else np.array(labels)
    more = {} if others is None else {"others": [tuple(np.array(f, np.uint16) for f in other) for other in others]}
    batch = UNPACKED[kind](
        examples, labels, length, ObjectiveSpec(kind=kind, **spec), specials, generators(len(examples), seed), **more
    )
    assert all(value.dtype in (np.int32, np.float32) for value in batch.values())
    assert {len(value) for value in batch.values()} == {len(examples)}
    check(batch, specials.vocab_size, classes=5)
    return batch


# --- masked -----------------------------------------------------------------------------------------------------------


def test_masked_language_modelling_in_numbers():
    """[CLS] a b c [SEP] [PAD] by 2000 generators: specials never, 15 %, of them 80/10/10, labels where chosen."""
    row, segments = [CLS, 10, 11, 12, SEP, PAD], [1, 1, 1, 1, 1, 0]
    n = 2000
    batch = packed("masked", [row] * n, [segments] * n)
    chosen = batch["weights"] == 1
    assert not (~chosen & (batch["weights"] != 0)).any()
    assert not chosen[:, [0, 4, 5]].any()
    share = chosen[:, 1:4].mean(axis=0)
    assert np.abs(share - 0.15).max() < 3 * math.sqrt(0.15 * 0.85 / n)
    assert (batch["tokens"][~chosen] == np.array([row] * n)[~chosen]).all() and (batch["targets"][~chosen] == 0).all()
    assert (batch["targets"][chosen] == np.array([row] * n)[chosen]).all()
    before, after = np.array([row] * n)[chosen], batch["tokens"][chosen]
    assert abs((after == MASK).mean() - 0.8) < 0.03 and abs((after == before).mean() - 0.1) < 0.03
    # About 0.61 of rows have nothing chosen; they weigh nothing.
    empty = batch["weights"].sum(axis=1) == 0
    assert abs(empty.mean() - 0.85**3) < 0.04
    assert np.isfinite(batch["weights"]).all()


def test_random_replacements_are_ordinary_and_uniform():
    batch = packed("masked", np.full((300, 200), 50), np.ones((300, 200), int), ObjectiveSpec("masked", mask_rate=0.9))
    drawn = batch["tokens"][(batch["tokens"] != MASK) & (batch["weights"] > 0)]
    counts = np.bincount(drawn[drawn != 50], minlength=100)
    ordinary = [i for i in range(100) if i not in (END, PAD, CLS, SEP, MASK, *SENTINELS, 50)]
    assert counts.sum() == counts[ordinary].sum()
    expected = counts.sum() / len(ordinary)
    assert (np.abs(counts[ordinary] - expected) < 5 * math.sqrt(expected)).all()


def test_whole_words_are_chosen_together():
    starts = np.zeros(100, bool)
    starts[20:40] = True  # 20..39 begin a word, 40..89 go on with one
    specials = Specials(100, END, mask=MASK, starts_word=starts)
    row = [END, 20, 40, 41, 21, END, 42, 22, 43, 44]
    segments = [1, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    words = [[1, 2, 3], [4], [6], [7, 8], [9]]
    n = 3000
    batch = packed("masked", [row] * n, [segments] * n, ObjectiveSpec("masked", whole_words=True), specials)
    chosen = batch["weights"] > 0
    assert not chosen[:, [0, 5]].any()
    for word in words:
        assert (chosen[:, word] == chosen[:, word[:1]]).all()
        assert abs(chosen[:, word[0]].mean() - 0.15) < 0.025
    for one, other in itertools.combinations(words, 2):
        assert (chosen[:, one[0]] != chosen[:, other[0]]).any()
    # Without the option the pieces are chosen one by one.
    alone = packed("masked", [row] * n, [segments] * n, ObjectiveSpec("masked"), specials)["weights"]
    assert (alone[:, 1] != alone[:, 2]).any()


def test_a_row_depends_on_its_generator_alone():
    rows, segments = np.arange(20, 80).reshape(3, 20), np.ones((3, 20), int)
    for kind in ("masked", "span_corruption", "prefix"):
        whole = packed(kind, rows, segments)
        spec = ObjectiveSpec(kind)
        last = PACKED[kind](rows[2:], rows[2:], segments[2:], spec, BERT, generators(3)[2:])
        # The targets of "prefix" are those it was given.
        assert all((whole[key][2:] == last[key]).all() for key in last if (kind, key) != ("prefix", "targets"))


# --- span corruption --------------------------------------------------------------------------------------------------


def rebuild(source, target, sentinels):
    """The text of a source and a target without padding or end of text: each sentinel replaced by its span."""
    spans, current = {}, []
    for token in target:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in source for t in (spans[token] if token in sentinels else [token])]


def test_t5_lengths():
    assert masking.span_lengths(568, 0.15, 3.0) == (512, 114)  # T5's own numbers
    assert masking.span_counts(20, 0.15, 3.0) == (3, 1)
    assert masking.span_counts(20, 0.55, 1.0) == (11, 10)  # 11 spans need 10 tokens between them, 9 are kept
    assert [masking.span_counts(n, 0.15, 3.0) for n in (0, 1, 2, 3)] == [(0, 0), (0, 0), (1, 1), (1, 1)]
    for density, mean in ((0.15, 3.0), (0.5, 3.0), (0.55, 1.0), (0.9, 2.0)):
        lengths = np.array([masking.span_lengths(n, density, mean) for n in range(1, 200)])
        assert (np.diff(lengths, axis=0) >= 0).all()


def test_every_mask_is_equally_likely():
    """All masks of 6 tokens with 3 hidden in 2 spans, listed by brute force."""
    assert masking.span_counts(6, 0.5, 1.5) == (3, 2)
    masks = [m for m in itertools.product((0, 1), repeat=6) if sum(m) == 3]
    masks = [m for m in masks if sum(b > a for a, b in zip((0, *m), m)) == 2]
    rng = np.random.default_rng(0)
    n = 600 * len(masks)
    seen = {m: 0 for m in masks}
    for _ in range(n):
        seen[tuple(masking.span_mask(6, 0.5, 1.5, rng).astype(int).tolist())] += 1
    assert all(abs(count - 600) < 5 * math.sqrt(600) for count in seen.values())


def test_every_place_is_hidden_sometimes():
    rng = np.random.default_rng(0)
    for length, density, mean in ((20, 0.15, 3.0), (20, 0.55, 1.0), (2, 0.15, 3.0)):
        frequency = np.mean([masking.span_mask(length, density, mean, rng) for _ in range(400)], axis=0)
        assert frequency.min() > 0.02


@pytest.mark.parametrize("length", [1, 2, 3, 7, 19, 20])
@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.55, 1.0)])
def test_spans_rebuild_the_row(length, density, mean):
    n, T = 40, 20
    tokens = np.random.default_rng(1).integers(10, 80, (n, T))
    tokens[:, length:] = END
    # Text that holds the ids of padding and end of text is text.
    tokens[:, : min(length, 2)] = [[PAD, END][: min(length, 2)]] * n
    segments = np.broadcast_to((np.arange(T) < length).astype(int), (n, T))
    spec = ObjectiveSpec("span_corruption", mask_rate=density, mean_span=mean)
    batch = packed("span_corruption", tokens, segments, spec)
    shapes = masking.span_lengths(T, density, mean)
    assert batch["source_tokens"].shape == (n, shapes[0]) and batch["targets"].shape == (n, shapes[1])
    descending = sorted(SENTINELS, reverse=True)
    for row in range(n):
        source = batch["source_tokens"][row][batch["source_segments"][row] > 0].tolist()
        real = batch["segments"][row] > 0
        target = batch["targets"][row][real].tolist()
        assert source.pop() == END
        assert (batch["weights"][row] == real).all() and (batch["targets"][row][~real] == 0).all()
        if length < 2:
            assert not target and source == tokens[row, :length].tolist()
            continue
        assert target.pop() == END
        used = [t for t in source if t in SENTINELS]
        assert used == descending[: len(used)] == [t for t in target if t in SENTINELS]
        assert rebuild(source, target, SENTINELS) == tokens[row, :length].tolist()
        assert len(target) - len(used) == masking.span_counts(length, density, mean)[0]
        assert batch["tokens"][row][real].tolist() == [END, *target]


def test_spans_of_a_packed_row_keep_documents_apart():
    row = [END, 10, 11, 12, 13, END, 20, 21, 22, END, 30, 31]
    segments = [1] * 5 + [2] * 4 + [3] * 3
    n = 300
    batch = packed("span_corruption", [row] * n, [segments] * n, ObjectiveSpec("span_corruption", mask_rate=0.4))
    crossing = 0
    for r in range(n):
        source, home = batch["source_tokens"][r], batch["source_segments"][r]
        target, document, weights = batch["targets"][r], batch["segments"][r], batch["weights"][r]
        live = home > 0
        assert rebuild(source[live][:-1].tolist(), target[document > 0][:-1].tolist(), SENTINELS) == row
        where = {t: s for t, s in zip(source.tolist(), home.tolist()) if s}
        assert (np.diff(home[live]) >= 0).all() and (np.diff(document[document > 0]) >= 0).all()
        current, place = None, 0
        for t in range(int((document > 0).sum()) - 1):
            token = int(target[t])
            if token in SENTINELS:
                current, place = token, 0
                assert weights[t] == 1 and document[t] == where[token]
                # The span's place in the row: what of the row stands before the sentinel in the source.
                before = source[: source.tolist().index(token)].tolist()
                start = len(rebuild(before, target[:t].tolist(), SENTINELS))
                assert segments[start] == document[t]
            else:
                inside = segments[start + place] == where[current]
                opens = row[start + place] == END
                assert row[start + place] == token and document[t] == where[current]
                assert weights[t] == (inside and not opens)
                crossing += not inside
                place += 1
            opens = t == 0 or document[t] != document[t - 1]
            assert batch["tokens"][r, t] == (END if opens else target[t - 1])
            assert batch["positions"][r, t] == (0 if opens else batch["positions"][r, t - 1] + 1)
    assert crossing > 20


def test_too_few_sentinels():
    spec = ObjectiveSpec("span_corruption", mean_span=1.0)
    with pytest.raises(InputError, match=r"may have 15 spans.*has 10 sentinels.*tokenizer.sentinels to 15"):
        packed("span_corruption", np.full((1, 100), 20), np.ones((1, 100), int), spec)
    with pytest.raises(InputError, match="may have 15 spans"):
        require(spec, BERT, packed=True, row_length=100)
    with pytest.raises(InputError, match="has 0 sentinels"):
        require(spec, GPT, packed=True)


# --- prefix and causal ------------------------------------------------------------------------------------------------


def test_prefix_counts_what_is_not_seen():
    """Two documents of 4 and 3 places and padding. A target that the mask shows never counts, all others do."""
    row, segments = [END, 10, 11, 12, END, 20, 21, END], [1, 1, 1, 1, 2, 2, 2, 0]
    targets = [10, 11, 12, END, 20, 21, END, END]
    n = 600
    batch = packed("prefix", [row] * n, [segments] * n, targets=[targets] * n)
    lengths = batch["prefix_lengths"]
    assert set(lengths.tolist()) == {1, 2, 3, 4, 5, 6}
    mask = Mask(causal=True, prefix_lengths_B=jnp.array(lengths))
    places, ids = jnp.arange(8)[None], jnp.array([segments])
    shown = np.array(visible(mask, places, places, ids, ids))
    for r in range(n):
        # The target of place t is the token at t + 1, where that is of the same document.
        leaks = [t < 7 and bool(shown[r, t, t + 1]) for t in range(8)]
        assert not batch["weights"][r][leaks].any()
        # From the place before the border on, everything real counts.
        assert batch["weights"][r].tolist() == [float(lengths[r] - 1 <= t < 7) for t in range(8)]
    short = packed("prefix", [[END, END], [END, END]], [[1, 0], [0, 0]])
    assert short["prefix_lengths"].tolist() == [0, 0] and short["weights"].tolist() == [[1, 0], [0, 0]]


def test_causal_has_no_loss_at_padding_and_restarts():
    batch = packed("causal", [[0, 1, 0, 0, 7, 0, 0, 0]], [[1, 1, 1, 2, 2, 2, 0, 0]])
    assert tuple(batch) == KEYS
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]
    assert (causal(np.array([[5, 6]], np.uint16), np.array([[6, 0]]), np.array([[1, 1]]))["targets"] == [[6, 0]]).all()


def test_examples_for_language_models():
    batch = unpack("causal", [([10, 11],), ([12, 13, 14, 15],)], length=4, specials=GPT)
    assert batch["tokens"].tolist() == [[0, 10, 11, 0], [0, 12, 13, 14]]
    assert batch["targets"].tolist() == [[10, 11, 0, 0], [12, 13, 14, 15]]  # cut: the next token, no end
    assert batch["weights"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    two = unpack("prefix", [([10, 11], [20, 21])], length=7, specials=GPT)
    assert two["tokens"].tolist() == [[0, 10, 11, 0, 20, 21, 0]]
    assert two["targets"].tolist() == [[10, 11, 0, 20, 21, 0, 0]]
    assert two["prefix_lengths"].tolist() == [4] and two["weights"].tolist() == [[0, 0, 0, 1, 1, 1, 0]]
    one = unpack("prefix", [([10, 11, 12],)] * 50, length=5, specials=GPT)
    assert set(one["prefix_lengths"].tolist()) == {1, 2, 3}
    spans = unpack("span_corruption", [([10] * 9,), ([11],)], length=10)
    assert spans["source_tokens"].shape == (2, 10) and spans["targets"].shape == (2, 4)


# --- examples ---------------------------------------------------------------------------------------------------------


def test_targets_count_by_length_where_padding_is_the_end():
    """C17: ids [5, 6, 2] padded to 5 where padding and end share id 2: both 6 and the first 2 count."""
    specials = Specials(10, end_of_text=2, pad=2)
    batch = unpack("seq2seq", [([7], [5, 6]), ([2, 7, 2], [2, 2])], length=5, specials=specials)
    assert batch["tokens"][0].tolist() == [2, 5, 6, 2, 2] and batch["targets"][0].tolist() == [5, 6, 2, 0, 0]
    assert batch["weights"].tolist() == [[1, 1, 1, 0, 0]] * 2
    assert batch["targets"][1].tolist() == [2, 2, 2, 0, 0]
    assert batch["source_tokens"].tolist() == [[7, 2, 2, 2, 2], [2, 7, 2, 2, 2]]
    assert batch["source_segments"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]


def test_sequence_to_sequence():
    specials = Specials(100, END, pad=PAD, bos=7)
    batch = unpack("seq2seq", [([10, 11], [20]), ([10] * 9, [21, 22, 23, 24]), ([], [])], length=4, specials=specials)
    assert batch["tokens"].tolist() == [[7, 20, PAD, PAD], [7, 21, 22, 23], [7, PAD, PAD, PAD]]
    assert batch["targets"].tolist() == [[20, END, 0, 0], [21, 22, 23, 24], [END, 0, 0, 0]]
    assert batch["source_tokens"].tolist() == [[10, 11, END, PAD], [10, 10, 10, END], [END, PAD, PAD, PAD]]
    assert batch["positions"][0].tolist()[:2] == [0, 1]


def test_classification():
    one = unpack("classification", [([10, 11],), ([12] * 9,)], labels=[[3], [4]], length=5)
    assert one["tokens"].tolist() == [[CLS, 10, 11, SEP, PAD], [CLS, 12, 12, 12, SEP]]
    assert one["segments"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert one["labels"].tolist() == [3, 4] and one["weights"].tolist() == [1, 1]
    two = unpack("classification", [([10, 11, 12], [20])], labels=[[0]], length=8)
    assert two["tokens"].tolist() == [[CLS, 10, 11, 12, SEP, 20, SEP, PAD]]
    assert two["types"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 0]]
    plain = unpack("classification", [([10, 11], [20])], labels=[[0]], length=6, specials=GPT)
    assert plain["tokens"].tolist() == [[END, 10, 11, END, 20, END]]
    assert plain["segments"].tolist() == [[1, 1, 1, 1, 1, 0]]
    with pytest.raises(InputError, match="do not hold the 3 special tokens"):
        unpack("classification", [([10], [11])], labels=[[0]], length=2)


def test_the_longest_field_gives_way_first():
    for lengths in itertools.product(range(6), repeat=3):
        for room in range(12):
            left = list(lengths)
            while sum(left) > room:  # one token of the longest at a time, the first of equals
                left[left.index(max(left))] -= 1
            kept = unpacked.shares(lengths, room)
            assert sorted(kept) == sorted(left) and all(k <= n for k, n in zip(kept, lengths))


def test_pairs_of_sentences():
    n = 400
    texts = [([10, 11, 12, 13],)] * n
    others = [([20, 21, 22],)] * n
    batch = unpack("masked", texts, others=others, length=10, next_sentence=True)
    assert abs(batch["labels"].mean() - 0.5) < 0.1 and (batch["label_weights"] == 1).all()
    cuts = set()
    for r in range(n):
        tokens = np.where(batch["weights"][r] > 0, batch["targets"][r], batch["tokens"][r])
        tokens = tokens[batch["segments"][r] > 0].tolist()
        types = batch["types"][r].tolist()
        assert tokens[0] == CLS and tokens[-1] == SEP and tokens.count(SEP) == 2
        middle = tokens.index(SEP)
        first, second = tokens[1:middle], tokens[middle + 1 : -1]
        assert types == [0] * (middle + 1) + [1] * (len(second) + 1) + [0] * (10 - len(tokens))
        assert first == [10, 11, 12, 13][: len(first)] and 1 <= len(first) <= 3
        assert first + second == [10, 11, 12, 13] if batch["labels"][r] else second in ([21, 22], [22])
        cuts.add(len(first))
    assert cuts == {1, 2, 3}
    short = unpack("masked", [([10],)] * 40, others=others[:40], length=10, next_sentence=True)
    assert (short["labels"] == 0).all()
    given = unpack("masked", [([10], [11])] * 40, others=[([20], [21])] * 40, next_sentence=True, mask_rate=0.01)
    assert {(int(s), int(label)) for s, label in zip(given["tokens"][:, 3], given["labels"])} == {(11, 1), (21, 0)}
    with pytest.raises(ValueError, match="another example"):
        unpack("masked", texts, next_sentence=True)


def test_answers_in_contexts():
    question, context = [10, 11], [20, 21, 22, 23]
    labels = [[1, 2, 0], [0, 3, 1], [-1, -1, 0], [0, 0, 0]]
    batch = unpack("span_qa", [(question, context)] * 4, labels=labels, length=8)
    # [CLS] 10 11 [SEP] 20 21 22 [SEP]: the last token of the context is cut.
    assert batch["tokens"][0].tolist() == [CLS, 10, 11, SEP, 20, 21, 22, SEP]
    assert batch["starts"].tolist() == [5, 0, 0, 4] and batch["ends"].tolist() == [6, 0, 0, 4]
    assert batch["weights"].tolist() == [1, 0, 1, 1] and batch["offsets"].tolist() == [4] * 4
    assert batch["tokens"][0, 5:7].tolist() == context[1:3] and batch["windows"].tolist() == [0, 1, 0, 0]
    plain = unpack("span_qa", [(question, context)], labels=[[3, 3, 0]], length=9, specials=GPT)
    assert plain["tokens"][0, plain["starts"][0]] == 23
    for wrong in ([2, 1], [0, 4], [-1, 2]):
        with pytest.raises(InputError, match="starts, row 0.*no span of a context of 4"):
            unpack("span_qa", [(question, context)], labels=[[*wrong, 0]])


def test_contrastive_pairs():
    batch = unpack("contrastive", [([10], [20, 21]), ([11] * 5, [22])], length=4)
    assert batch["source_tokens"].tolist() == [[CLS, 10, SEP, PAD], [CLS, 11, 11, SEP]]
    assert batch["tokens"].tolist() == [[CLS, 20, 21, SEP], [CLS, 22, SEP, PAD]]
    assert batch["weights"].tolist() == [1, 1] and batch["segments"].sum(axis=1).tolist() == [4, 3]


@pytest.mark.parametrize("specials", [BERT, GPT, Specials(100, END, sep=SEP, mask=MASK)])
def test_longest_is_the_shortest_length_that_cuts_nothing(specials):
    specials = dataclasses.replace(specials, mask=MASK, sentinels=SENTINELS)
    lengths = [(3, 5), (4, 1)]
    fields = {"seq2seq": 2, "contrastive": 2, "span_qa": 2, "span_corruption": 1}
    # Of a pair the prompt stands twice, less the last id of each row's piece; what is longer is dropped, not cut.
    assert longest(ObjectiveSpec("preference"), np.array([[5, 3, 2]]), specials) == 2 * 4 + 3 + 2
    for kind in sorted(set(UNPACKED) - {"preference"}):
        for count in {fields.get(kind, 1), fields.get(kind, 2)}:
            sizes = np.array([n[:count] for n in lengths])
            needed = longest(ObjectiveSpec(kind), sizes, specials)
            for row, size in enumerate(sizes):
                example = [tuple(np.full(n, 10 + i) for i, n in enumerate(size))]
                labels = [[0, 0, 0]]

                def places(length, kind=kind, example=example, labels=labels):
                    if kind == "span_corruption":  # draws spans, of no matter for what is read
                        return unpacked.causal(example, None, length, ObjectiveSpec(), specials, [])["segments"].sum()
                    batch = unpack(kind, example, labels, length, specials)
                    return sum(batch[key].sum() for key in ("segments", "source_segments") if key in batch)

                assert places(needed[row]) == places(needed[row] + 3) > places(needed[row] - 1)


def test_a_host_without_examples_has_the_same_keys():
    for kind in UNPACKED:
        pairs = dict(next_sentence=True) if kind == "masked" else {}
        example = ([10, 11],) if kind in ("span_corruption", "classification") else ([10, 11], [12, 13])
        some = unpack(kind, [example], [[0, 0, 0]], others=[example] if pairs else None, **pairs)
        none = unpack(kind, [], np.zeros((0, 3), int), others=[] if pairs else None, **pairs)
        assert {k: v.shape[1:] for k, v in some.items()} == {k: v.shape[1:] for k, v in none.items()}


# --- checks -----------------------------------------------------------------------------------------------------------


def test_ids_outside_the_vocabulary_are_named():
    batch = packed("causal", [[1, 2, 3], [4, 5, 99]], np.ones((2, 3), int))
    check(batch, 100)
    with pytest.raises(InputError, match=r"^tokens, row 1, place 2: 99 lies outside 0\.\.98; "):
        check(batch, 99)
    batch["targets"][0, 1] = -100
    with pytest.raises(InputError, match=r"^targets, row 0, place 1: -100 "):
        check(batch, 100)
    batch = unpack("classification", [([10],), ([11],)], labels=[[0], [4]])
    with pytest.raises(InputError, match=r"^labels, row 1: 4 lies outside 0\.\.3"):
        check(batch, 100, classes=4)
    check({key: np.zeros_like(value) for key, value in batch.items()}, 100, classes=4)
    with pytest.raises(InputError, match="tokens, row 0, place 1: 700"):
        packed("masked", [[5, 700]], [[1, 1]])


@pytest.mark.parametrize(
    "spec, specials, data, message",
    [
        (dict(kind="masked"), GPT, {}, "no mask token; add it by tokenizer.special_tokens"),
        (dict(kind="masked", next_sentence=True), GPT, dict(packed=False), "no cls token"),
        (dict(kind="masked", next_sentence=True), BERT, {}, "data.packing='whole'"),
        (dict(kind="masked", whole_words=True), BERT, {}, "where words begin"),
        (dict(kind="classification"), BERT, {}, "data.packing='whole'"),
        (dict(kind="classification"), BERT, dict(packed=False, classes=1), "data.label"),
        (dict(kind="seq2seq"), BERT, dict(packed=False), "two fields"),
        (
            dict(kind="span_qa", augment=("swap",)),
            BERT,
            dict(packed=False, fields=("q", "text")),
            "would change the answers of",
        ),
        (dict(augment=("swap",)), BERT, {}, "whole examples"),
    ],
)
def test_what_an_objective_requires(spec, specials, data, message):
    with pytest.raises(InputError, match=message):
        require(ObjectiveSpec(**spec), specials, **{"packed": True, **data})


def test_what_suffices():
    require(ObjectiveSpec(), GPT, packed=True)
    require(ObjectiveSpec("masked", next_sentence=True), BERT, packed=False)
    require(ObjectiveSpec("classification"), GPT, packed=False, classes=2)
    require(ObjectiveSpec("seq2seq"), GPT, packed=False, fields=("text", "target"))
    require(ObjectiveSpec("span_corruption"), BERT, packed=True, row_length=128)


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_augmentation_of_words():
    starts = np.zeros(100, bool)
    starts[[10, 20, 30, 40, 50]] = True
    text = np.array([10, 11, 12, 20, 30, 31, 40, 50, 51], np.uint16)
    words = [(10, 11, 12), (20,), (30, 31), (40,), (50, 51)]

    def split(ids):
        found = []
        for token in ids.tolist():
            found = [*found, (token,)] if starts[token] else [*found[:-1], (*found[-1], token)]
        return found

    def draw(operation, rate, seed):
        changed = augment(text, (operation,), rate, np.random.default_rng(seed), starts)
        assert changed.dtype == text.dtype
        return split(changed)

    swapped = [draw("swap", 0.1, seed) for seed in range(50)]
    assert all(sorted(s) == sorted(words) and sum(a != b for a, b in zip(s, words)) == 2 for s in swapped)
    deleted = [draw("delete", 0.3, seed) for seed in range(400)]
    assert all(set(d) <= set(words) and d for d in deleted)
    assert abs(np.mean([len(d) for d in deleted]) - 3.5) < 0.2
    repeated = [draw("repeat", 0.4, seed) for seed in range(50)]
    for found in repeated:
        assert len(found) == 7 and set(found) == set(words)
        rest = iter(found)
        assert all(word in rest for word in words)  # the text stands in it, in order
    assert len({tuple(r) for r in repeated}) > 20


def test_augmentation_is_seeded_and_never_empties():
    every = ("swap", "delete", "repeat")
    text = np.arange(10, 30)
    one, same, other = (augment(text, every, 0.2, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.tolist() == same.tolist() != other.tolist()
    assert len(augment(text[:0], every, 0.5, np.random.default_rng(0))) == 0
    for seed in range(30):
        assert len(augment(text[:1], every, 0.99, np.random.default_rng(seed))) >= 1
        assert len(augment(text, ("delete",), 0.99, np.random.default_rng(seed))) >= 1
    assert augment(text, every, 0.0, np.random.default_rng(0)).tolist() == text.tolist()
    assert text.tolist() == list(range(10, 30))


def test_the_end_of_text_that_opens_a_document_is_never_told():
    sentinels = tuple(range(199, 149, -1))
    specials = Specials(vocab_size=200, end_of_text=0, pad=1, cls=2, sep=3, mask=4, bos=5, sentinels=sentinels)
    tokens = np.tile(np.array([0, 9, 9, 9, 9]), (30, 6))
    segments = np.tile(np.repeat(np.arange(1, 7), 5), (30, 1))
    spec = ObjectiveSpec(kind="span_corruption", mask_rate=0.3, mean_span=2)
    rngs = [np.random.default_rng(row) for row in range(30)]
    batch = PACKED["span_corruption"](tokens, tokens, segments, spec, specials, rngs)
    inside = (batch["targets"] == 0) & (batch["segments"] > 0)
    last = np.cumsum(inside[:, ::-1], axis=1)[:, ::-1] == 1  # the one that closes the row
    assert (inside & ~last).sum() > 10
    assert not batch["weights"][inside & ~last].any() and batch["weights"][inside & last].all()
