"""Reading the tokenizer files of others. Each becomes one tokenizer.json."""

import base64
import json
import pathlib
from typing import Any

from llm.errors import InputError
from llm.tokenization import byte_pairs, special, training
from llm.tokenization.backends import CONTROL, MARIAN, SENTENCEPIECE, read_proto
from llm.tokenization.spec import TokenizerSpec
from llm.tokenization.tokenizer import META, Tokenizer

READABLE = (
    "tokenizer.json, vocab.txt (BERT), encoder.json with vocab.bpe or vocab.json with merges.txt (GPT-2), spiece.model "
    "or another SentencePiece .model, Marian's source.spm with target.spm and vocab.json, .tiktoken, .gguf"
)
# What a folder is read by; the first that it has.
_IN_FOLDER = (
    "tokenizer.json", "spiece.model", "tokenizer.model", "source.spm", "encoder.json", "vocab.json", "vocab.txt",
    "*.tiktoken", "*.gguf",
)  # fmt: skip
_SIDES = ("source", "target")  # of Marian
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")
_CONFIG_ROLES = {"eos_token": "end_of_text", "pad_token": "pad", "unk_token": "unk", "cls_token": "cls",
                 "sep_token": "sep", "mask_token": "mask", "bos_token": "bos"}  # fmt: skip


def load(spec: TokenizerSpec) -> Tokenizer:
    """Loads the tokenizer that `spec.path` names, and adds the special tokens and sentinels that it lacks.

    Reads tokenizer.json, BERT's vocab.txt, GPT-2's encoder.json and vocab.bpe (or vocab.json and merges.txt),
    SentencePiece models, Marian's pairs of them, tiktoken's ranks (r50k, p50k, cl100k, o200k, by file name), and the
    tokens inside a GGUF; or a folder with one of these. tokenizer_config.json, special_tokens_map.json and
    chat_template.jinja beside it are read too. A vocab.txt without them is uncased when no entry has a capital; uncased
    BERT removes accents as well, as its authors' code does (`spec.lowercase` and `spec.strip_accents` ask for it in any
    case).

    Raises:
        InputError: nothing there, a format that is not known, or a damaged file.
    """
    path = pathlib.Path(spec.path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise InputError(f"tokenizer.path={spec.path}: there is no such file")
    try:
        made = _read(path, spec)
        _beside(made, path, spec)
        _add(made, spec, str(path))
        loaded = Tokenizer(training.to_text(made))
        return loaded.with_chat_template(spec.chat_template or loaded.chat_template)
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path} is not a tokenizer: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a tokenizer: {type(error).__name__} {error}") from None


def tokenizer_from(path: str | pathlib.Path) -> Tokenizer:
    """Loads a tokenizer as it stands in a file or folder."""
    return load(TokenizerSpec(path=str(path)))


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
    for name in _IN_FOLDER:
        found = sorted(folder.glob(name))
        if len(found) > 1:
            raise InputError(f"tokenizer.path={folder}: it has {found[0].name} and {found[1].name}; name one of them")
        if found:
            return found[0]
    raise InputError(f"tokenizer.path={folder}: no tokenizer in this folder; what can be read: {READABLE}")


def _read(path: pathlib.Path, spec: TokenizerSpec) -> dict[str, Any]:
    name = path.name
    if name.endswith(".gguf"):
        from llm.tokenization.gguf_file import read

        return read(path)
    if name.endswith(".model"):
        data = path.read_bytes()
        # Llama 3 calls its ranks tokenizer.model.
        if all(len(line.split()) == 2 for line in data[:200].splitlines()[:2]):
            return byte_pairs.tiktoken(path)
        return sentencepiece_document(data)
    if name == "source.spm":
        return _marian(path)
    if name.endswith(".tiktoken"):
        return byte_pairs.tiktoken(path)
    if name in ("encoder.json", "vocab.bpe"):
        return byte_pairs.gpt2(path.with_name("encoder.json"), path.with_name("vocab.bpe"))
    if name in ("vocab.json", "merges.txt"):
        return byte_pairs.gpt2(path.with_name("vocab.json"), path.with_name("merges.txt"))
    if name.endswith(".json"):
        document = json.loads(path.read_bytes().decode())
        if isinstance(document, dict) and isinstance(document.get("model"), dict):
            return _with_chinese(document)
    if name.endswith(".txt"):
        return _bert(path, spec)
    raise InputError(f"{path}: a format that is not known; what can be read: {READABLE}")


def sentencepiece_document(data: bytes, **meta: Any) -> dict[str, Any]:
    """A tokenizer.json that holds a SentencePiece model whole."""
    model = read_proto(data)
    roles = {"unk": model.pieces[max(0, model.trainer_spec.unk_id)].piece}
    for role, i in (("end_of_text", model.trainer_spec.eos_id), ("bos", model.trainer_spec.bos_id),
                    ("pad", model.trainer_spec.pad_id)):  # fmt: skip
        if 0 <= i < len(model.pieces) and model.pieces[i].type == CONTROL:
            roles[role] = model.pieces[i].piece
    said = {"roles": roles, **meta, SENTENCEPIECE: base64.b64encode(data).decode()}
    return {"version": "1.0", "model": {"type": "SentencePiece", META: said}}


def _marian(path: pathlib.Path) -> dict[str, Any]:
    """The tokenizer.json of Marian's three files."""
    if _json(path.with_name("tokenizer_config.json")).get("separate_vocabs"):
        raise InputError(f"{path}: a vocabulary for each side; one for both can be read")
    for name in ("target.spm", "vocab.json"):
        if not path.with_name(name).is_file():
            raise InputError(f"{path} needs {name} beside it")
    vocab = json.loads(path.with_name("vocab.json").read_bytes())
    if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise InputError(f"{path.with_name('vocab.json')}: expected an object of pieces and their ids")
    roles = {"end_of_text": "</s>", "unk": "<unk>", "pad": "<pad>"}
    lacking = sorted({*roles.values()} - vocab.keys())
    if lacking:
        raise InputError(f"{path.with_name('vocab.json')} has no {lacking[0]}: it is not Marian's vocabulary")
    models = {name: base64.b64encode(path.with_name(f"{name}.spm").read_bytes()).decode() for name in _SIDES}
    return {"version": "1.0", "model": {"type": "Marian", "vocab": vocab, META: {"roles": roles, MARIAN: models}}}


# --- BERT -------------------------------------------------------------------------------------------------------------


def _bert(path: pathlib.Path, spec: TokenizerSpec) -> dict[str, Any]:
    lines = path.read_bytes().decode().split("\n")
    if lines and not lines[-1]:
        lines.pop()
    entries = [line.rstrip("\r") for line in lines]
    vocab: dict[str, int] = {}
    for i, entry in enumerate(entries):
        if entry in vocab:
            raise InputError(f"{path}:{i + 1}: the entry {entry!r} stands twice")
        vocab[entry] = i
    if "[UNK]" not in vocab:
        raise InputError(f"{path}: no entry [UNK]: it is not BERT's vocabulary")
    config = _json(path.with_name("tokenizer_config.json"))
    lower = config.get("do_lower_case")
    if lower is None:
        lower = not any(c.isupper() for e in entries if not e.startswith("[") for c in e)
    lower = spec.lowercase or bool(lower)
    accents = config.get("strip_accents")
    strip = spec.strip_accents or (lower if accents is None else bool(accents))
    normalizer = training.bert_normalizer(lower, strip)
    normalizer["handle_chinese_chars"] = config.get("tokenize_chinese_chars") is not False
    return training.wordpiece_document(vocab, [t for t in special.BERT if t in vocab], "[UNK]", normalizer)


def _with_chinese(document: dict[str, Any]) -> dict[str, Any]:
    """BERT's cut, with the Chinese characters of its authors' code where the library leaves some out."""
    normalizer, pre = document.get("normalizer") or {}, document.get("pre_tokenizer") or {}
    if normalizer.get("type") == "BertNormalizer" and normalizer.get("handle_chinese_chars", True):
        if pre.get("type") == "BertPreTokenizer":
            return {**document, "pre_tokenizer": training.bert_pre_tokenizer()}
    return document


# --- beside -----------------------------------------------------------------------------------------------------------


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes().decode())
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _beside(made: dict[str, Any], path: pathlib.Path, spec: TokenizerSpec) -> None:
    """Roles and chat template from the files beside a tokenizer; what its own file says stands first."""
    meta = dict(made["model"].get(META) or {})
    roles: dict[str, str] = {}
    for name in reversed(_BESIDE):
        config = _json(path.with_name(name))
        for key, role in _CONFIG_ROLES.items():
            token = config.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                roles[role] = token
        template = config.get("chat_template")
        if isinstance(template, list):  # several by name
            template = next((one["template"] for one in template if one.get("name") == "default"), None)
        if isinstance(template, str):
            meta.setdefault("chat_template", template)
    jinja = path.with_name("chat_template.jinja")
    if jinja.is_file():
        meta.setdefault("chat_template", jinja.read_bytes().decode())
    # What it goes by anyway is left out: written with its files and read again, a tokenizer is the same to the bit.
    own = meta.get("roles") or {}
    marked = {*spec.special_tokens, *(t["content"] for t in made.get("added_tokens") or [] if t.get("special"))}
    by_name = {role: next((name for name in special.NAMES[role] if name in marked), None) for role in roles}
    roles = {**own, **{role: token for role, token in roles.items() if role not in own and token != by_name[role]}}
    if roles:
        meta["roles"] = roles
    if meta:
        made["model"] = {**made["model"], META: meta}


def _add(made: dict[str, Any], spec: TokenizerSpec, where: str) -> None:
    """Special tokens and sentinels that the spec asks for and the file lacks, on the highest ids."""
    meta = made["model"].get(META) or {}
    if SENTENCEPIECE in meta:
        model = read_proto(base64.b64decode(meta[SENTENCEPIECE]))
        ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
        for token in spec.special_tokens:
            if token in ids and model.pieces[ids[token]].type != CONTROL:
                raise InputError(f"tokenizer.special_tokens: {token!r} is an ordinary word of {where}")
        new = special.additions(ids, spec.special_tokens, spec.sentinels, where)
        for token in new:
            model.pieces.add(piece=token, score=0.0, type=CONTROL)
        if new:
            meta[SENTENCEPIECE] = base64.b64encode(model.SerializeToString()).decode()
        return
    vocab = made["model"]["vocab"]
    pairs = enumerate(piece for piece, _ in vocab) if isinstance(vocab, list) else ((i, p) for p, i in vocab.items())
    ids = {piece: i for i, piece in pairs} | {token["content"]: token["id"] for token in made.get("added_tokens") or []}
    new = special.additions(ids, spec.special_tokens, spec.sentinels, where)
    first = max(ids.values(), default=-1) + 1
    fresh = {token: first + n for n, token in enumerate(new)}
    listed = {token["content"]: token for token in made.get("added_tokens") or []}
    roles = (meta.get("roles") or {}).values()
    for token in [*new, *(t for t in (*spec.special_tokens, *roles) if t in ids)]:
        entry = training.document({}, [token], {**ids, **fresh})["added_tokens"][0]
        listed[token] = {**entry, **listed.get(token, {}), "special": True}
    made["added_tokens"] = sorted(listed.values(), key=lambda token: token["id"])
