"""Constrained text: all of it matches, by Python's own `re` and `json`, and nothing else that could match is lost."""

import functools
import json
import re

import jax
import numpy as np
import pytest

from llm.errors import InputError
from llm.generation import SamplingSpec, complete
from llm.generation.constrained import Constraint, Vocabulary, json_schema_grammar, regex_grammar
from llm.generation.continuous import ContinuousBatch, Request
from llm.models.gpt import GPTSpec
from llm.tokenization import TokenizerSpec, train
from tests.generation import families
from tests.models.test_gpt import make

TEXT = ['The year 1815 was a good one: 12 + 30 = 42, and true or false, "yes" and {"no": [1, 2]} are words. ' * 9]
KINDS = {"bytes": 257, "bpe": 320, "wordpiece": 90, "unigram": 320}
PROMPTS = [[1 + n, 2, 3] if n % 2 else [4 + n, 5, 6, 7, 8, 9, 10] for n in range(24)]
V, END = max(KINDS.values()), 0  # <|endoftext|>, and wordpiece's [PAD]
REGEX = r"(19|20)\d\d-(0[1-9]|1[0-2])( (?:yes|no|[äöü€]{2,3}))?"
HOT = SamplingSpec(5.0)


@functools.cache
def tokenizer(kind):
    return train(TokenizerSpec(kind=kind, vocab_size=KINDS[kind]), TEXT)


@functools.cache
def vocabulary(kind):
    """Of one size for all, as what is beyond a vocabulary is no text, so that the kinds share their programs."""
    own = tokenizer(kind)
    return Vocabulary(*(ids + [None] * (V - len(ids)) for ids in own.text_bytes()), [END])


@functools.cache
def model():
    built, params = make(GPTSpec(vocab_size=V, context=160, layers=1, width=16, heads=2, ff_width=16))
    return built, jax.tree.map(lambda x: 8 * x, params)


def write(kind, constraint, sampling=HOT, prompts=PROMPTS, max_tokens=120, **how):
    """Rows of unlike prompts, each with its own seed."""
    how = dict(context=160, vocab_size=V, end_of_text=END, seed=list(range(len(prompts)))) | how
    return complete(*model(), prompts, max_tokens, sampling, constraint=constraint, **how)


def by_regex(kind, pattern):
    return Constraint(vocabulary(kind), regex_grammar(pattern))


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_matches(kind):
    """Of wordpiece, which writes spaces between words, and unigram, which has one before the first, as it is read."""
    pattern = {"wordpiece": r"[a-z]{2,9}( (year|good|one|[0-9]{2})){0,5}"}.get(kind, REGEX)
    rows = write(kind, by_regex(kind, pattern))
    texts = [tokenizer(kind).decode(row.tokens) for row in rows]
    for row, text in zip(rows, texts):
        assert row.ended == "end" and re.fullmatch(pattern, text), (text, row)
    assert len(set(texts)) > 18, texts


def matches(value):
    """Whether a value is valid by SCHEMA."""
    name, rest = value["name"], value.get("tags", [])
    return (
        list(value) in (["name", "age", "kind"], ["name", "age", "kind", "tags"])
        and isinstance(name, str) and len(name) <= 4 and type(value["age"]) is int and 0 <= value["age"] <= 150
        and value["kind"] in ("x", "yes", None) and len(rest) <= 2 and all(type(tag) is bool for tag in rest)
    )  # fmt: skip


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["x", "yes", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_json_is_valid_by_its_schema(kind):
    rows = write(kind, Constraint(vocabulary(kind), json_schema_grammar(json.dumps(SCHEMA))))
    texts = [tokenizer(kind).decode(row.tokens) for row in rows]
    for row, text in zip(rows, texts):
        assert row.ended == "end" and matches(json.loads(text)), text
        assert "\n" not in text and "  " not in re.sub(r'"name" ?: ?"(\\.|[^"])*"', '"name":"s"', text)
    assert len(set(texts)) > 18 and any("tags" in text for text in texts)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_the_mask_allows_what_can_still_match_and_no_more(kind):
    """The language is finite: an id is allowed exactly where the text with it begins one of its words."""
    words = ["the year", "the yes", "one", "on", "é1", "è"]
    constraint, own, rng = by_regex(kind, "the (year|yes)|one?|é1|è"), tokenizer(kind), np.random.default_rng(0)
    first, later = own.text_bytes()
    for _ in range(20):
        matcher, tokens, ended = constraint.begin(), [], False
        while not ended:
            so_far = own.bytes(tokens)
            adds = later if tokens else first
            fits = [bool(add) and any(w.encode().startswith(so_far + add) for w in words) for add in adds]
            fits += [False] * (V - len(fits))
            fits[END] = so_far.decode(errors="replace") in words
            np.testing.assert_array_equal(matcher.allowed_V, fits)
            assert matcher.complete == fits[END]
            assert matcher.finished == (fits[END] and sum(fits) == 1)
            token = int(rng.choice(np.flatnonzero(fits)))
            ended = token == END
            if not ended:
                matcher.advance(token)
                tokens.append(token)
    with pytest.raises(ValueError, match="not allowed"):
        constraint.begin().advance(END)


@pytest.mark.parametrize("kind", KINDS)
def test_what_ids_write_is_what_decoding_joins(kind):
    own = tokenizer(kind)
    first, later = own.text_bytes()
    assert first[own.end_of_text] is None and later[own.end_of_text] is None
    text_ids = [i for i, data in enumerate(first) if data is not None]
    assert len(text_ids) > 0.8 * own.vocab_size
    for ids in np.random.default_rng(0).choice(text_ids, (50, 4)):
        assert own.bytes(ids) == (first[ids[0]] or b"") + b"".join(later[i] or b"" for i in ids[1:])


def test_greedy_is_plain_greedy_where_all_of_it_is_allowed():
    ascii_only: list[bytes | None] = [None] + [bytes([n]) for n in range(99)]
    constraint = Constraint(Vocabulary(ascii_only, ascii_only, [END]), regex_grammar("(?s:.)*"))
    how = dict(prompts=PROMPTS[:3], max_tokens=20, vocab_size=100)
    plain = write("bytes", None, SamplingSpec(0.0), **how)
    assert len({str(row.tokens) for row in plain}) > 1
    assert write("bytes", constraint, SamplingSpec(0.0), **how) == plain


def test_batch_equals_single_rows_and_steps_share_one_program():
    from llm.generation.engine import _cached_step

    batch = write("bpe", by_regex("bpe", REGEX))
    sizes = []
    for row in (3, 6, 8):
        (alone,) = write("bpe", by_regex("bpe", REGEX), prompts=[PROMPTS[row]], seed=[row])
        assert alone == batch[row]
        sizes.append(_cached_step._cache_size())
    assert len({str(row.tokens) for row in batch}) > 18 and sizes[0] == sizes[2]


@pytest.mark.long
def test_in_a_continuous_batch_each_request_has_its_own():
    """As alone; one is free, one matches the empty text alone, and one the vocabulary cannot end."""
    no_b = [b"a" if i == 97 else None for i in range(V)]
    asked = [
        *((PROMPTS[n], by_regex("bytes", pattern)) for n, pattern in enumerate([REGEX, "[x-z]{4}"])),
        (PROMPTS[2], None), (PROMPTS[3], by_regex("bytes", "")),
        (PROMPTS[4], Constraint(Vocabulary(no_b, no_b, [END]), regex_grammar("ab"))),
    ]  # fmt: skip
    requests = [Request(prompt, 30, seed=n, constraint=rule) for n, (prompt, rule) in enumerate(asked)]
    batch = ContinuousBatch(*model(), HOT, slots=2, room=64, vocab_size=V, end_of_text=END)
    got = dict(batch.run(requests))
    for n, (prompt, rule) in enumerate(asked[:4]):
        assert [got[n]] == write("bytes", rule, prompts=[prompt], max_tokens=30, seed=[n]), n
    assert got[3].ended == "end" and got[4].ended == "stuck" and got[4].tokens == [97]
    with pytest.raises(InputError, match="vocabulary has 1 ids, the batch's"):
        batch.submit(Request([1], 1, constraint=Constraint(Vocabulary([b"a"], [b"a"]), regex_grammar("a"))))


def test_another_family():
    built, params, context = families.model("rnn lstm")
    spelled: list[bytes | None] = [bytes([97 + n % 26]) if n else None for n in range(families.V)]
    constraint = Constraint(Vocabulary(spelled, spelled, [0]), regex_grammar("(ab?c){2}[d-z]{3}"))
    how = dict(context=context, vocab_size=families.V, end_of_text=0, constraint=constraint)
    for row in complete(built, params, [[3], [4, 5]], 12, HOT, **how):
        text = b"".join(spelled[i] or b"" for i in row.tokens).decode()
        assert row.ended == "end" and re.fullmatch("(ab?c){2}[d-z]{3}", text), text


def test_where_a_row_ends():
    """At a match that cannot go on, at the limit's last token too, with no end of text at all, and before any token."""
    for how in ({}, {"end_of_text": None}):
        rows = write("bytes", by_regex("bytes", "ab{3}"), max_tokens=[4, 3, 120] * 8, **how)
        assert [tokenizer("bytes").decode(row.tokens) for row in rows] == ["abbb", "abb", "abbb"] * 8
        assert [row.ended for row in rows] == ["end", "length", "end"] * 8
    empty = write("bytes", by_regex("bytes", ""))
    assert [(row.tokens, row.ended) for row in empty] == [([], "end")] * 24


def test_the_match_goes_before_bans():
    a, b = (tokenizer("bytes").encode(c)[0] for c in "ab")
    banned = SamplingSpec(1.0, logit_bias=((a, -np.inf),), no_repeat_ngram=1, min_tokens=9)
    (row,) = write("bytes", by_regex("bytes", "aa[ab]"), banned, [[1]], use_cache=False)
    assert row.tokens == [a, a, b] and row.ended == "end"  # a is drawn where nothing else matches, and only there


def test_a_vocabulary_without_the_tokens():
    few: list[bytes | None] = [b"a", b"b", None]
    few_only = Vocabulary(few, few, [2])
    with pytest.raises(InputError, match="no token of the vocabulary can begin a match"):
        Constraint(few_only, regex_grammar("c"))
    matcher = Constraint(few_only, regex_grammar("abc")).begin()
    matcher.advance(0)
    with pytest.raises(InputError, match="can go on with 'ab'"):
        matcher.advance(1)


@pytest.mark.parametrize(
    "make, text, message",
    [
        (regex_grammar, "(", "unclosed group"),
        (regex_grammar, "a\\", "backslash"),
        (regex_grammar, r"\bx", "lookarounds not supported"),
        (regex_grammar, r"(a)\1", "backreferences are not supported"),
        (regex_grammar, "\ud800", "not valid Unicode"),
        (json_schema_grammar, "{", "not JSON"),
        (json_schema_grammar, "3", "must be an object or boolean"),
        (json_schema_grammar, '{"type": "nonsense"}', "Invalid type: nonsense"),
        (json_schema_grammar, '{"not": {}}', "Unimplemented keys"),
        (json_schema_grammar, '{"type": "integer", "minimum": 5, "maximum": 2}', "minimum .* greater than maximum"),
        (json_schema_grammar, '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
    ],
)
def test_what_is_no_grammar_is_refused_in_one_line(make, text, message):
    with pytest.raises(InputError, match=message) as caught:
        make(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 120
