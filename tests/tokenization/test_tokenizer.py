"""Byte-level tokenizers: round trips, streaming, special text, determinism."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import InputError
from llm.tokenization import StreamDecoder, Tokenizer, TokenizerSpec, train

TEXTS = ["It is a truth universally acknowledged, that a single man in possession of a good fortune\n" * 20]
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: train(TokenizerSpec(kind, 300), TEXTS) for kind in ("bpe", "bytes")}


@pytest.mark.parametrize("kind, size", [("bpe", 300), ("bytes", 257)])
def test_sizes_and_merges(tokenizers, kind, size):
    tokenizer = tokenizers[kind]
    assert tokenizer.vocab_size == size
    ids = tokenizer.encode("a good fortune")
    assert len(ids) == 14 if kind == "bytes" else len(ids) < 10
    assert all(0 <= i < size for i in ids)


HARD = ["", " ", "\t\n  \r\n", "\u00a0", "\x00", FAMILY + " e\u0301", "日本語 ばで", "a\U0002b820b", "<|endoftext|>"]


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_hard_texts_come_back(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode(text)] + [stream.flush()]
    assert "".join(pieces) == text and not any("\ufffd" in p for p in pieces)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_comes_back(text):
    tokenizer = _shared()
    assert tokenizer.decode(tokenizer.encode(text)) == text


_CACHE: list[Tokenizer] = []


def _shared():
    if not _CACHE:
        _CACHE.append(train(TokenizerSpec("bpe", 300), TEXTS))
    return _CACHE[0]


def test_the_text_of_a_special_token_gets_ordinary_ids(tokenizers):
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode("x<|endoftext|>y")
        assert tokenizer.end_of_text not in ids and len(ids) > 3


def test_a_lone_surrogate_is_refused(tokenizers):
    with pytest.raises(InputError, match=r"lone surrogate U\+D800 at character 3"):
        tokenizers["bpe"].encode("abc\ud800")


def test_unfinished_characters_are_held_back_and_flushed(tokenizers):
    tokenizer = tokenizers["bytes"]
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode("é")
    assert [stream.push(ids[0]), stream.push(ids[1]), stream.flush()] == ["", "é", ""]
    stream.push(ids[0])
    assert stream.flush() == "\ufffd"


def test_batch_equals_single(tokenizers):
    tokenizer = tokenizers["bpe"]
    assert tokenizer.encode_batch(HARD) == [tokenizer.encode(t) for t in HARD]


def test_training_and_saving_are_deterministic(tokenizers, tmp_path):
    tokenizer = tokenizers["bpe"]
    assert train(TokenizerSpec("bpe", 300), TEXTS).fingerprint == tokenizer.fingerprint
    assert train(TokenizerSpec("bpe", 299), TEXTS).fingerprint != tokenizer.fingerprint
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode_batch(HARD) == tokenizer.encode_batch(HARD)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="outside the vocabulary"):
        _shared().decode([300])
    with pytest.raises(InputError, match="token id -1 is outside"):
        _shared().decode([-1])


def test_roles_that_a_models_config_names(tokenizers):
    plain = tokenizers["bytes"]
    assert plain.with_roles(end_of_text=plain.end_of_text) is plain
    changed = plain.with_roles(end_of_text=65, bos=66)
    assert (changed.end_of_text, changed.bos) == (65, 66) and changed.fingerprint != plain.fingerprint
    assert changed.encode("A good one") == plain.encode("A good one")
    with pytest.raises(InputError, match="outside the vocabulary"):
        plain.with_roles(bos=257)
