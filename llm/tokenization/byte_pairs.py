"""Byte-pair vocabularies in files: GPT-2's two files, and tiktoken's ranks."""

import base64
import binascii
import json
import pathlib
from typing import Any

from llm.errors import InputError
from llm.tokenization import patterns
from llm.tokenization.pieces import BYTE_OF, byte_level
from llm.tokenization.special import END_OF_TEXT, NAMES
from llm.tokenization.training import bpe_model, byte_level_step, document


def gpt2(vocab_path: pathlib.Path, merges_path: pathlib.Path) -> dict[str, Any]:
    """The tokenizer.json of encoder.json and vocab.bpe, also called vocab.json and merges.txt (Radford et al. 2019).

    Raises:
        InputError: a file is missing or damaged, or they are of another kind.
    """
    for path, other in ((vocab_path, merges_path), (merges_path, vocab_path)):
        if not path.is_file():
            raise InputError(f"{other} needs {path.name} beside it")
    try:
        vocab = json.loads(vocab_path.read_text("utf-8"))
        lines = merges_path.read_text("utf-8").split("\n")
    except ValueError as error:
        raise InputError(f"{vocab_path} and {merges_path.name} are no byte-level vocabulary: {error}") from None
    merges = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    if not isinstance(vocab, dict) or any(len(pair) != 2 for pair in merges):
        raise InputError(f"{vocab_path} and {merges_path.name} are no byte-level vocabulary: a line is not two entries")
    return _byte_level_bpe(vocab, merges, patterns.gpt2(), str(vocab_path))


def _byte_level_bpe(vocab: dict[str, int], merges: list, pre: dict, where: str, special: list[str] | None = None,
                    user: list[str] | None = None, **settings: Any) -> dict[str, Any]:  # fmt: skip
    missing = [character for character in BYTE_OF if character not in vocab]
    if len(missing) > 128:
        raise InputError(f"{where}: it is no byte-level vocabulary: it has no entries for {len(missing)} of 256 bytes")
    for pair in merges:
        for piece in (*pair, "".join(pair)):
            if piece not in vocab:
                raise InputError(f"{where}: the merge {' '.join(pair)!r} needs an entry {piece!r}, which it lacks")
    if special is None:
        names = {name for role in NAMES.values() for name in role}
        special = [token for token in vocab if token in names or (token.startswith("<|") and token.endswith("|>"))]
    made = document(bpe_model(vocab, merges, **settings), special, vocab, pre_tokenizer=pre, decoder=byte_level_step())
    for token in user or []:
        made["added_tokens"].append({**document({}, [token], vocab)["added_tokens"][0], "special": False})
    made["added_tokens"].sort(key=lambda token: token["id"])
    return made


# The tokens that each encoding of tiktoken adds to its ranks, and how it cuts text.
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
TIKTOKEN = {
    "r50k": (patterns.gpt2, {END_OF_TEXT: 50256}),
    "p50k": (patterns.gpt2, {END_OF_TEXT: 50256}),
    "cl100k": (
        lambda: patterns.split(patterns.CL100K),
        {END_OF_TEXT: 100257, **{t: 100258 + n for n, t in enumerate(_FIM)}, "<|endofprompt|>": 100276},
    ),
    "o200k": (lambda: patterns.split(patterns.O200K), {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}


def read_ranks(path: pathlib.Path) -> dict[bytes, int]:
    """The entries of a .tiktoken file: a line each, base64 and rank.

    Raises:
        InputError: a line is something else.
    """
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{path}:{number} is no line of tiktoken's ranks: {line[:40]!r}") from None
    if sorted(ranks.values()) != sorted(set(ranks.values())) or not ranks:
        raise InputError(f"{path}: {'two entries have one rank' if ranks else 'there is no entry'}")
    return ranks


def tiktoken(path: pathlib.Path) -> dict[str, Any]:
    """The tokenizer.json of tiktoken's ranks; the encoding is known by the file's name.

    Raises:
        InputError: an encoding that is not known, or a damaged file.
    """
    name = next((name for name in TIKTOKEN if name in path.name), None)
    if name is None:
        raise InputError(
            f"{path}: ranks do not say how text is cut; name the file after its encoding, {', '.join(TIKTOKEN)}"
        )
    pre, added = TIKTOKEN[name]
    ranks = read_ranks(path)
    vocab = {byte_level(token): rank for token, rank in ranks.items()}
    added = dict(added)
    # A small file, made with the encoding's cut but not its ranks, has its end of text after them.
    if len(ranks) < 50_000:
        added = {token: max(ranks.values()) + 1 + n for n, token in enumerate(added)}
    taken = set(added.values()) & set(ranks.values())
    if taken:
        raise InputError(
            f"{path}: id {min(taken)} belongs to a special token of {name}; these are ranks of another encoding"
        )
    vocab.update(added)
    # Every id up to the highest stands for something: a model may give any of them.
    holes = sorted(set(range(max(vocab.values()))) - set(vocab.values()))
    reserved = {f"<|reserved_{i}|>": i for i in holes}
    vocab.update(reserved)
    return _byte_level_bpe(vocab, _merges(ranks), pre(), str(path), [*added, *reserved], ignore_merges=True)


def _merges(ranks: dict[bytes, int]) -> list[list[str]]:
    """Every pair of entries that makes an entry, in the order of what it makes: tiktoken merges by that alone."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += [
            [byte_level(one), byte_level(two)] for one, two in sorted(pairs, key=lambda p: (ranks[p[0]], ranks[p[1]]))
        ]
    return merges


def gguf_bpe(tokens: list[str], types: list[int], merges: list[str], pre: str, where: str) -> dict[str, Any]:
    """The tokenizer.json of a GGUF's byte-level tokens; `types` are SentencePiece's numbers.

    Raises:
        InputError: a cut that is not known, or entries that do not fit.
    """
    from llm.tokenization.backends import CONTROL, UNKNOWN, USER_DEFINED

    if pre not in patterns.GGUF:
        raise InputError(
            f"{where}: its pre-tokenizer {pre!r} is not known; known are {', '.join(sorted(patterns.GGUF))}"
        )
    cut, ignore_merges = patterns.GGUF[pre]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise InputError(f"{where}: two of its {len(tokens)} tokens have one text")
    special = [token for token, type_ in zip(tokens, types) if type_ in (CONTROL, UNKNOWN)]
    user = [token for token, type_ in zip(tokens, types) if type_ == USER_DEFINED]
    pairs = [merge.split(" ") for merge in merges]
    return _byte_level_bpe(vocab, pairs, cut(), where, special, user, ignore_merges=ignore_merges)
