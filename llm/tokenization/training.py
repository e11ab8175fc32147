"""Training tokenizers. The same texts in the same order give the same tokenizer, on any machine."""

import collections
import contextlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm.errors import InputError
from llm.tokenization.backends import Backend, HuggingFace, SentencePiece
from llm.tokenization.loading import bert, tokenizer_from
from llm.tokenization.spec import TokenizerSpec
from llm.tokenization.tokenizer import Tokenizer, check

# A sentence is what the unigram trainer reads at once, in characters; longer lines come in parts.
_SENTENCE = 4096


def train(spec: TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    """Trains a tokenizer, or loads the one that the spec names; then the texts are not read.

    `texts` are gone through once; those kinds that need them again keep them in a temporary file meanwhile.

    Raises:
        InputError: a text holds a lone surrogate, there is no text, or the file can not be loaded.
    """
    if spec.path:
        return tokenizer_from(spec.path, spec)
    checked = _checked(texts)
    if spec.kind in ("bpe", "bytes"):
        backend = _byte_level(spec, checked)
    else:
        with _repeatable(checked) as again:
            backend = {"wordpiece": _wordpiece, "unigram": _unigram, "chars": _characters}[spec.kind](spec, again)
    return Tokenizer(backend).with_special(spec.specials, spec.sentinels)


def _byte_level(spec: TokenizerSpec, texts: Iterable[str]) -> Backend:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.entries - spec.sentinels,
        special_tokens=list(spec.specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return HuggingFace(library)


def _wordpiece(spec: TokenizerSpec, texts: Iterable[str]) -> Backend:
    """WordPiece by the merges of BPE, the way `tokenizers` does it.

    The library numbers the pieces of one character ("##a") in the order of a hash table, which differs from run to run
    and decides between merges of equal count. So a first pass, without merges, finds these pieces, and the second is
    given them in order. At most half of the vocabulary is characters, the most frequent ones.
    """
    library = bert({}, spec.lowercase, spec.strip_accents)
    specials = list(spec.specials)
    size = spec.vocab_size - spec.sentinels
    library.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=0, show_progress=False))
    pieces = sorted(library.get_vocab())
    alphabet = [piece for piece in pieces if len(piece) == 1]
    limit = (size - len(specials)) // 2
    if len(alphabet) > limit:
        normalize = library.normalizer.normalize_str  # type: ignore[union-attr]
        alphabet = sorted(_most_frequent((normalize(text) for text in texts), limit, set(alphabet)))
    known = set(alphabet)
    inner = [piece for piece in pieces if len(piece) == 3 and piece.startswith("##") and piece[2] in known]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=specials + alphabet + inner,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    trained = bert(library.get_vocab(), spec.lowercase, spec.strip_accents)
    trained.add_special_tokens(specials)
    return HuggingFace(trained)


def _unigram(spec: TokenizerSpec, texts: Iterable[str]) -> Backend:
    """A unigram model (Kudo 2018) by SentencePiece, with bytes for what it does not know.

    Characters that are not among the most frequent, at most half of the pieces, only ever come as bytes; so do ends of
    lines.
    """
    import sentencepiece

    size = spec.vocab_size - len(spec.specials) - spec.sentinels
    # What SentencePiece uses itself: tab, its marks for spaces and unknowns, the ends of lines.
    alphabet = _most_frequent(texts, (size - 257) // 2, without="\x00\t\n\r\x0b\x0c\x85\u2028\u2029\u2581\u2585 ")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, set(alphabet) | {" "}),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,  # the backend puts the space
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * _SENTENCE + 8,
            num_threads=16,  # sums depend on it, so not the number of cores
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"no unigram tokenizer of {spec.vocab_size} entries comes out of these texts: {error}"
        ) from None
    return SentencePiece(model.getvalue(), {}, lossless=True)


def _characters(spec: TokenizerSpec, texts: Iterable[str]) -> Backend:
    room = spec.vocab_size - len(spec.specials) - spec.sentinels - 256
    names = [*spec.specials, *(f"<0x{byte:02X}>" for byte in range(256)), *_most_frequent(texts, room)]
    library = tokenizers.Tokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True)
    )
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(list(spec.specials))
    return HuggingFace(library)


def _most_frequent(texts: Iterable[str], limit: int, only: set[str] | None = None, without: str = "") -> list[str]:
    """At most `limit` characters, by their count and then their code."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(text)
    found = [c for c in counts if (only is None or c in only) and c not in without]
    return sorted(found, key=lambda c: (-counts[c], c))[:limit]


def _sentences(texts: Iterable[str], alphabet: set[str]) -> Iterator[str]:
    """The stretches of texts that are written in an alphabet, a space before each text."""
    for text in texts:
        line: list[str] = [" "]
        for character in text:
            if character in alphabet and len(line) < _SENTENCE:
                line.append(character)
                continue
            if line and line != [" "]:
                yield "".join(line)
            line = [character] if character in alphabet else []
        if line and line != [" "]:
            yield "".join(line)


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        check(text)
        yield text


@contextlib.contextmanager
def _repeatable(texts: Iterable[str]) -> Iterator["_Spooled"]:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps(text) + "\n")
        yield _Spooled(file)


class _Spooled:
    """Texts in a file, to be gone through again and again."""

    def __init__(self, file):
        self._file = file

    def __iter__(self) -> Iterator[str]:
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)
