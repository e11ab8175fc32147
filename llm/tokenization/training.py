"""Training tokenizers on text."""

import collections
import io
import json
import re
from collections.abc import Iterable
from typing import Any

from llm.errors import InputError
from llm.tokenization import special
from llm.tokenization.pieces import SPACE
from llm.tokenization.spec import TokenizerSpec
from llm.tokenization.special import BERT, END_OF_TEXT
from llm.tokenization.tokenizer import Tokenizer


def train(spec: TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    """Trains a tokenizer.

    The same texts in the same order give the same tokenizer, in every process and on any number of cores. Ids: the end
    of text is 0 and further special tokens follow, after [PAD], [UNK], [CLS], [SEP], [MASK] for wordpiece; sentinels
    are the highest. The texts are read once.

    Raises:
        InputError: the vocabulary is too small for the texts, or `spec.path` says to load one.
    """
    if spec.path:
        raise InputError(f"tokenizer.path={spec.path} names a tokenizer to load; leave it empty to train one")
    first = BERT if spec.kind == "wordpiece" else ()
    ordered = list(dict.fromkeys([*first, END_OF_TEXT, *spec.special_tokens]))
    maker = {"bpe": _bpe, "bytes": _bpe, "chars": _chars, "wordpiece": _wordpiece, "unigram": _unigram}[spec.kind]
    return Tokenizer(maker(spec, texts, ordered)).with_chat_template(spec.chat_template or None)


def document(model: dict[str, Any], added: list[str], ids: dict[str, int], normalizer=None, pre_tokenizer=None,
             decoder=None) -> dict[str, Any]:  # fmt: skip
    """A tokenizer.json whose added tokens are all special."""
    tokens = [
        {"id": ids[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for token in sorted(added, key=ids.__getitem__)
    ]  # fmt: skip
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model}  # fmt: skip


def bpe_model(vocab: dict[str, int], merges: list, **settings: Any) -> dict[str, Any]:
    """The model of a tokenizer.json for byte-pair encoding."""
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges, **settings}  # fmt: skip


def byte_level_step(use_regex: bool = True) -> dict[str, Any]:
    """Bytes as characters; with `use_regex` after GPT-2's split into words."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def to_text(made: dict[str, Any]) -> str:
    """A tokenizer.json as text, the same for the same tokenizer."""
    return json.dumps(made, ensure_ascii=False, indent=1)


def _with_sentinels(vocab: dict[str, int], count: int) -> list[str]:
    names = special.sentinel_tokens(count)
    for name in names:
        vocab[name] = len(vocab)
    return names


def _bpe(spec: TokenizerSpec, texts: Iterable[str], specials: list[str]) -> str:
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    entries = spec.vocab_size - spec.sentinels if spec.kind == "bpe" else len(specials) + 256
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # One token a byte has nothing to learn.
    backend.train_from_iterator(texts if spec.kind == "bpe" else [], trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = model["vocab"]
    added = specials + _with_sentinels(vocab, spec.sentinels)
    made = bpe_model(vocab, model["merges"])
    return to_text(document(made, added, vocab, pre_tokenizer=byte_level_step(), decoder=byte_level_step()))


def _most_frequent(counts: collections.Counter) -> list[str]:
    return sorted(counts, key=lambda item: (-counts[item], item))


def _bytes_after(specials: list[str]) -> dict[str, int]:
    vocab = {token: i for i, token in enumerate(specials)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    return vocab


def _chars(spec: TokenizerSpec, texts: Iterable[str], specials: list[str]) -> str:
    """The most frequent characters; the others are their bytes."""
    counts: collections.Counter = collections.Counter()
    for text in texts:
        counts.update(text)
    vocab = _bytes_after(specials)
    kept = _most_frequent(counts)[: spec.vocab_size - spec.sentinels - len(vocab)]
    for character in sorted(kept):
        vocab[character] = len(vocab)
    added = specials + _with_sentinels(vocab, spec.sentinels)
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    return to_text(document(bpe_model(vocab, [], byte_fallback=True), added, vocab, decoder=decoder))


# --- wordpiece --------------------------------------------------------------------------------------------------------


def bert_normalizer(lowercase: bool, strip_accents: bool) -> dict[str, Any]:
    """BERT's: control characters go, Chinese characters stand alone."""
    return {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
            "strip_accents": strip_accents, "lowercase": lowercase}  # fmt: skip


def wordpiece_document(vocab: dict[str, int], added: list[str], unk: str, normalizer: dict) -> dict[str, Any]:
    """The tokenizer.json of a BERT vocabulary."""
    model = {"type": "WordPiece", "unk_token": unk, "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
             "vocab": vocab}  # fmt: skip
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    return document(model, added, vocab, normalizer, bert_pre_tokenizer(), decoder)


def bert_pre_tokenizer() -> dict[str, Any]:
    """BERT's cut into words and punctuation.

    Its authors' code puts U+2B820 to U+2CEAF among the Chinese characters, which stand alone; the library begins at
    U+2B920, so that the first 256 of them take their neighbours into an unknown word.
    """
    missed = {"type": "Split", "pattern": {"Regex": "[\U0002b820-\U0002b91f]"}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [missed, {"type": "BertPreTokenizer"}]}


def _wordpiece(spec: TokenizerSpec, texts: Iterable[str], specials: list[str]) -> str:
    """Merges as byte-pair encoding does, over characters that begin a word and characters that do not.

    The library's own trainer numbers the latter in the order of a hash table, differently in every run. Here they are
    other characters while training, and its plain trainer, which sorts, sees no difference between the two sorts.
    """
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=spec.strip_accents, lowercase=spec.lowercase
    )
    chinese = pre_tokenizers.Split(tokenizers.Regex("[\U0002b820-\U0002b91f]"), "isolated")
    splitter = pre_tokenizers.Sequence([chinese, pre_tokenizers.BertPreTokenizer()])
    words: collections.Counter = collections.Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters: collections.Counter = collections.Counter()
    for word, count in words.items():
        for place, character in enumerate(word):
            characters[("##" if place else "") + character] += count
    room = spec.vocab_size - spec.sentinels - len(specials)
    # Rare characters are [UNK], so that merges find place.
    alphabet = set(_most_frequent(characters)[: max(1, room // 2)])

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=room, show_progress=False)
    backend.train_from_iterator(_repeated(words, alphabet), trainer)
    pieces = sorted(json.loads(backend.to_str())["model"]["vocab"].items(), key=lambda item: item[1])
    vocab = {token: i for i, token in enumerate(specials)}
    for piece, _ in pieces:
        vocab.setdefault(_unshifted(piece), len(vocab))
    added = specials + _with_sentinels(vocab, spec.sentinels)
    return to_text(wordpiece_document(vocab, added, "[UNK]", bert_normalizer(spec.lowercase, spec.strip_accents)))


# Planes 4 to 13 of Unicode hold no characters: 0 to 3 and 14 to 16 find place there.
_SHIFT = {**{plane: plane + 4 for plane in range(4)}, 14: 8, 15: 9, 16: 10}
_BACK = {there: here for here, there in _SHIFT.items()}


def _moved(character: str, planes: dict[int, int]) -> str | None:
    plane, rest = divmod(ord(character), 0x10000)
    return chr(planes[plane] * 0x10000 + rest) if plane in planes else None


def _repeated(words: collections.Counter, alphabet: set[str]) -> Iterable[str]:
    """Each word as often as it was counted, without characters outside the alphabet, which cut it."""
    for word in sorted(words):
        parts = [""]
        for place, character in enumerate(word):
            inner = _moved(character, _SHIFT)
            if inner is not None and ("##" if place else "") + character in alphabet:
                parts[-1] += inner if place else character
            elif parts[-1]:
                parts.append("")
        line = " ".join(filter(None, parts))
        for begin in range(0, words[word], 10_000) if line else ():
            yield " ".join([line] * min(10_000, words[word] - begin))


def _unshifted(piece: str) -> str:
    continues = _moved(piece[0], _BACK) is not None
    return ("##" if continues else "") + "".join(_moved(c, _BACK) or c for c in piece)


# --- unigram ----------------------------------------------------------------------------------------------------------

_LINE = re.compile(r"[\n\r\t\x0b\x0c\x85\u2028\u2029\x00]+")
_WORD = re.compile(rf"{SPACE}[^{SPACE}]*|[^{SPACE}]+")
_BYTE_CHARACTERS = "<>0123456789ABCDEFx"


def _unigram(spec: TokenizerSpec, texts: Iterable[str], specials: list[str]) -> str:
    """SentencePiece's unigram model (Kudo 2018) over words with their space, in the form of Hugging Face's library.

    SentencePiece trains it, on a fixed number of threads: the trainer of the other library gives another model in each
    run. Special tokens and byte tokens get scores so low that spelling them in characters always wins: their text
    never becomes them.
    """
    words: collections.Counter = collections.Counter()
    for text in texts:
        for line in _LINE.split(text.replace(" ", SPACE)):
            words.update(_WORD.findall(line))
    unk = next((token for token in specials if token == "<unk>"), None)
    if unk is None:
        specials = [*specials, "<unk>"]
    names = special.sentinel_tokens(spec.sentinels)
    needed = "".join(sorted(set("".join([*specials, *names, _BYTE_CHARACTERS])) - {SPACE}))
    room = spec.vocab_size - spec.sentinels - len(specials) - 256
    pieces = _sentencepiece_pieces(words, room, needed)

    low = (2 + max(map(len, [*specials, *names, "<0x00>"]))) * min(score for _, score in pieces) - 100.0
    entries = [(token, low) for token in [*_bytes_after(specials)]] + pieces + [(name, low) for name in names]
    vocab = {piece: i for i, (piece, _) in enumerate(entries)}
    model = {"type": "Unigram", "unk_id": vocab["<unk>"], "vocab": [list(entry) for entry in entries],
             "byte_fallback": True}  # fmt: skip
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": True}
    steps = [{"type": "ByteFallback"}, {"type": "Metaspace", **metaspace}, {"type": "Fuse"}]
    made = document(model, specials + names, vocab, pre_tokenizer=metaspace,
                    decoder={"type": "Sequence", "decoders": steps})  # fmt: skip
    return to_text(made)


def _sentencepiece_pieces(words: collections.Counter, room: int, needed: str) -> list[tuple[str, float]]:
    import sentencepiece

    from llm.tokenization.backends import NORMAL, read_proto

    least = len(needed) + 1
    if not words or room < least:
        raise InputError(
            "the unigram vocabulary has no place for pieces: "
            + ("there is no text to train on" if not words else f"add {least - room} to tokenizer.vocab_size")
        )
    made = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{words[word]}" for word in sorted(words)), input_format="tsv",
            model_writer=made, model_type="unigram", vocab_size=room + 1, hard_vocab_limit=False,
            required_chars=needed, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, split_by_unicode_script=False, split_by_number=True,
            max_sentence_length=1 << 20, num_threads=4, bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        raise InputError(f"the unigram vocabulary of {room} pieces cannot be learned from this text: {error}") from None
    model = read_proto(made.getvalue())
    return [(piece.piece, piece.score) for piece in model.pieces if piece.type == NORMAL][:room]
