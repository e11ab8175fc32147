"""Reading the tokenizers that others wrote, each with the ids that its own library gives."""

import json
import pathlib

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from llm.errors import InputError
from llm.tokenization import gguf
from llm.tokenization.backends import Backend, HuggingFace, SentencePiece, Tiktoken
from llm.tokenization.spec import BERT_TOKENS, END_OF_TEXT, TokenizerSpec
from llm.tokenization.tokenizer import FORMAT, ROLES, Tokenizer

READABLE = (
    "tokenizer.json, vocab.txt of BERT, encoder.json with vocab.bpe, vocab.json with merges.txt, a SentencePiece .model, "
    ".tiktoken ranks, .gguf, or a folder with one of them"
)
# In a folder the first of these that is there is the tokenizer: a tokenizer.json says most.
_IN_FOLDERS = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "encoder.json", "vocab.json",
    "vocab.txt", "*.tiktoken", "*.gguf",
)  # fmt: skip
_MERGES = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt"}
# Tokenizers of vocab.json and merges.txt that split text the way GPT-2 does.
_LIKE_GPT2 = ("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer")
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The encodings of tiktoken: pattern and special tokens.
TIKTOKEN = {
    "r50k_base": (_GPT2, {END_OF_TEXT: 50256}),
    "p50k_base": (_GPT2, {END_OF_TEXT: 50256}),
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
         "<|endofprompt|>": 100276},
    ),
    "o200k_base": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'(?:[stmd]|re|ve|ll))?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'(?:[stmd]|re|ve|ll))?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
    ),
}  # fmt: skip


def tokenizer_from(path: str | pathlib.Path, spec: TokenizerSpec | None = None) -> Tokenizer:
    """Loads a tokenizer, whatever wrote it: the format goes by the file's name and content.

    tokenizer_config.json, special_tokens_map.json and chat_template.jinja beside the file say what its special tokens
    are for, and how it writes conversations.

    Args:
        path: a file or a folder.
        spec: `lowercase` and `strip_accents` for a vocab.txt that no tokenizer_config.json speaks of, `pattern` for
            ranks of tiktoken, and `special_tokens` and `sentinels` to be added where they are missing.

    Raises:
        InputError: there is no such file, or it is none of the kinds that can be read.
    """
    spec = spec or TokenizerSpec()
    path = pathlib.Path(path).expanduser()
    file = _in_folder(path) if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no tokenizer at {path}")
    try:
        tokenizer = _read(file, spec)
    except InputError as error:
        named = str(error) if str(file) in str(error) else f"{file}: {error}"
        raise InputError(named) from None
    except OSError as error:
        raise InputError(f"{file} can not be read: {error}") from None
    except Exception as error:  # the libraries raise whatever they like on broken files
        raise InputError(f"{file} is not a tokenizer that can be read: {type(error).__name__} {error}") from None
    return tokenizer.with_special(spec.special_tokens, spec.sentinels)


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
    for name in _IN_FOLDERS:
        found = sorted(folder.glob(name))
        if len(found) > 1:
            raise InputError(f"{folder} has {len(found)} files {name}: name one of them, such as {found[0]}")
        if found:
            return found[0]
    raise InputError(f"{folder} has no tokenizer; what can be read: {READABLE}")


def _read(file: pathlib.Path, spec: TokenizerSpec) -> Tokenizer:
    with file.open("rb") as opened:
        head = opened.read(4096)
    if head[:4] == b"GGUF":
        return Tokenizer(*gguf.read(file))
    if file.name in ("vocab.bpe", "merges.txt"):
        file = file.with_name(next(names for names, merges in _MERGES.items() if merges == file.name))
        head = b"{"
    config = _config(file)
    if head.lstrip()[:1] == b"{":
        return _json(file, config)
    if _is_ranks(head):
        return _with_config(_tiktoken(file, spec.pattern), config)
    if b"[UNK]\n" in head or b"[UNK]\r" in head:
        return _with_config(_bert(file, config, spec), config)
    if file.suffix in (".model", ".spm") or head[:1] == b"\n":  # a ModelProto opens with field 1, its first piece
        return _with_config(SentencePiece(file.read_bytes()), config)
    raise InputError(f"{file} is no tokenizer; what can be read: {READABLE}")


def _json(file: pathlib.Path, config: dict) -> Tokenizer:
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("format") == FORMAT:
        return Tokenizer.load(file)
    if isinstance(content.get("model"), dict):
        return _with_config(HuggingFace(tokenizers.Tokenizer.from_str(json.dumps(content))), config)
    merges = file.with_name(_MERGES.get(file.name, ""))
    if content and all(isinstance(i, int) for i in content.values()):
        if file.name not in _MERGES:
            raise InputError(f"{file} is a vocabulary: name it encoder.json beside vocab.bpe, or vocab.json beside "
                             "merges.txt")  # fmt: skip
        if not merges.is_file():
            raise InputError(f"{file} needs {merges.name} beside it")
        return _with_config(_gpt2(content, merges, config), config)
    raise InputError(f"{file} is no tokenizer; what can be read: {READABLE}")


def _gpt2(vocabulary: dict[str, int], file: pathlib.Path, config: dict) -> Backend:
    kind = config.get("tokenizer_class", _LIKE_GPT2[0]).removesuffix("Fast")
    if kind not in _LIKE_GPT2:
        raise InputError(f"its tokenizer_class {kind} does not split text like GPT-2: take its tokenizer.json")
    lines = file.read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    library.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocabulary:
        library.add_special_tokens([END_OF_TEXT])
    for _, token in sorted((int(i), token) for i, token in config.get("added_tokens_decoder", {}).items()):
        flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        library.add_tokens([AddedToken(token["content"], **flags)])
    return HuggingFace(library)


def bert(
    vocabulary: dict[str, int], lowercase: bool, strip_accents: bool, chinese: bool = True
) -> tokenizers.Tokenizer:
    """BERT's tokenizer with a vocabulary: words split at blanks, punctuation and Chinese characters, then WordPiece."""
    library = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese, strip_accents=strip_accents, lowercase=lowercase
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return library


def _bert(file: pathlib.Path, config: dict, spec: TokenizerSpec) -> Backend:
    lines = file.read_text(encoding="utf-8").split("\n")
    lines = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    if len(set(lines)) != len(lines):
        raise InputError(f"{file} has the same token on two lines")
    lowercase = config.get("do_lower_case", spec.lowercase)
    # BERT strips accents where it lowers the case, unless it is told.
    accents = config.get("strip_accents", lowercase if "do_lower_case" in config else spec.strip_accents)
    accents = lowercase if accents is None else accents
    library = bert({t: i for i, t in enumerate(lines)}, lowercase, accents, config.get("tokenize_chinese_chars", True))
    library.add_special_tokens([token for token in BERT_TOKENS if token in lines])
    return HuggingFace(library)


def _is_ranks(head: bytes) -> bool:
    fields = head.split(b"\n")[0].split()
    return len(fields) == 2 and fields[1].isdigit() and len(fields[0]) % 4 == 0


def _tiktoken(file: pathlib.Path, pattern: str) -> Backend:
    name = pattern or file.stem
    ranks = file.read_text(encoding="ascii")
    numbers = {int(line.split()[1]) for line in ranks.splitlines() if line}
    if name in TIKTOKEN:
        regex, special = TIKTOKEN[name]
        if not numbers.isdisjoint(special.values()):
            raise InputError(f"{file} has tokens where {name} has special ones: these ranks are of another encoding")
        return Tiktoken(ranks, regex, special)
    if not pattern:
        raise InputError(f"how do the ranks {file} split text? Set tokenizer.pattern to {', '.join(TIKTOKEN)}, or to a "
                         "regular expression")  # fmt: skip
    return Tiktoken(ranks, pattern, {END_OF_TEXT: max(numbers) + 1})


def _config(file: pathlib.Path) -> dict:
    """What the files beside a tokenizer say; the later ones go first."""
    config: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json", "chat_template.json"):
        beside = file.with_name(name)
        if beside.is_file():
            config |= json.loads(beside.read_text(encoding="utf-8"))
    template = file.with_name("chat_template.jinja")
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config


def _with_config(backend: Backend, config: dict) -> Tokenizer:
    roles = {}
    for role in ROLES:
        token = config.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            roles[role] = token
    known = backend.pieces().special
    backend = backend.with_special([token for token in dict.fromkeys(roles.values()) if token not in known])
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((named["template"] for named in template if named["name"] == "default"), None)
    return Tokenizer(backend, roles, template)
