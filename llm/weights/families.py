"""Which family a checkpoint of others belongs to, and which of their kinds a model of ours is written as."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from llm.errors import InputError
from llm.models import BertSpec, EncDecSpec, GPTSpec, ModelSpec, T5Spec
from llm.weights import bert, encdec, gpt, t5
from llm.weights.layout import Table
from llm.weights.sources import Source

KINDS = ("gpt2", *gpt.LLAMAS, "bert", "t5", "marian")


class Imported(NamedTuple):
    """What a checkpoint is here.

    Attributes:
        family: a key of `llm.models.FAMILIES`.
        spec: its settings.
        objective: what it was trained for.
        opens: the id that opens a decoder's row; None where the tokenizer says it.
        ends: ids that end what it writes, the first of them what its tokenizer calls the end; () where that says it.
        labels: names of the classes.
        banned: ids that are never written.
    """

    family: str
    spec: ModelSpec
    objective: str
    opens: int | None = None
    ends: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    banned: tuple[int, ...] = ()


def identify(source: Source) -> Imported:
    """What a checkpoint is, by its config and the names of its tensors.

    Raises:
        InputError: a kind that has no place here, a setting of it that has none, or one that cannot be read.
    """
    try:
        return _identify(source)
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source.path}: its config cannot be read: {type(error).__name__} {error}") from None


def _identify(source: Source) -> Imported:
    config = source.config
    kind = _kind(source)
    said = config.get("eos_token_id")
    ends = tuple(map(int, said)) if isinstance(said, list) else () if said is None else (int(said),)
    pad = config.get("pad_token_id")
    start = config.get("decoder_start_token_id", pad)
    if kind == "gpt2":
        return Imported("gpt", gpt.gpt2_spec(config), "causal", ends=ends)
    if kind in gpt.LLAMAS:
        return Imported("gpt", gpt.llama_spec(config), "causal", ends=ends)
    if kind == "bert":
        objective = bert.objective(source.tensors)
        bert.check_architecture(config, objective)
        labels = tuple(bert.labels(config)) if objective == "classification" else ()
        if objective == "contrastive":
            bert.check_pooling(source.folder)
        return Imported("bert", bert.spec_of(config, objective), objective, labels=labels)
    if kind == "t5":
        return Imported("t5", t5.spec_of(config, source.tensors), "seq2seq", 0 if start is None else start, ends)
    if kind == "marian":
        # The padding's logit is 0 whatever was read; theirs never write it.
        banned = () if pad is None else (int(pad),)
        return Imported("encdec", encdec.spec_of(config), "seq2seq", start, ends, banned=banned)
    raise InputError(f"{source.path}: model_type {kind!r}; there are {', '.join(KINDS)}")


def _kind(source: Source) -> Any:
    """The model_type; old configs lack it, and the names of the tensors tell."""
    if "model_type" in source.config:
        return source.config["model_type"]
    marks = {"word_embeddings.weight": "bert", "wte.weight": "gpt2"}
    return next((kind for mark, kind in marks.items() if any(name.endswith(mark) for name in source.tensors)), None)


def table_of(spec: ModelSpec, objective: str, interleaved: bool = False) -> Table:
    """The names of the checkpoints that a model is read from and written to.

    Args:
        spec: its settings.
        objective: what it was trained for, which says the head of a BERT.
        interleaved: as in `llm.weights.sources.Source`.

    Raises:
        InputError: its family has no checkpoints of others.
    """
    if isinstance(spec, GPTSpec):
        return gpt.table(spec, interleaved)
    if isinstance(spec, BertSpec):
        return bert.table(objective)
    if isinstance(spec, T5Spec):
        return t5.table(spec)
    if isinstance(spec, EncDecSpec):
        return encdec.table()
    raise InputError(f"a model of {type(spec).__name__} has no checkpoints of others; there are {', '.join(KINDS)}")


def their_config(
    spec: ModelSpec, objective: str, labels: Sequence[str], pad: int, ends: Sequence[int],
    missing_heads: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The config.json that a model of ours is written with.

    Args:
        spec, objective: of the model.
        labels: names of its classes.
        pad: the id that stands at padding, and opens what a decoder writes.
        ends: ids that end what it writes.
        missing_heads: heads of the objective that are not written.

    Raises:
        InputError: none of their kinds computes what it does.
    """
    end = {"eos_token_id": ends[0] if len(ends) == 1 else list(ends)}
    if isinstance(spec, GPTSpec):
        made = gpt.config_of(spec) | end
        return made | ({"bos_token_id": ends[0]} if made["model_type"] == "gpt2" else {})  # one token is both
    if isinstance(spec, BertSpec):
        return bert.config_of(spec, objective, labels, missing_heads) | {"pad_token_id": pad}
    if isinstance(spec, T5Spec):
        return t5.config_of(spec) | {"pad_token_id": pad, "decoder_start_token_id": pad} | end
    if isinstance(spec, EncDecSpec):
        return encdec.config_of(spec, pad, ends[0]) | end
    raise InputError(f"a model of {type(spec).__name__} has no checkpoints of others; there are {', '.join(KINDS)}")


def beside(spec: ModelSpec, objective: str) -> dict[str, Any]:
    """The JSON files, by path, that their readers want of a model beside its config.json and its tokenizer's."""
    return bert.sentence_files(spec) if isinstance(spec, BertSpec) and objective == "contrastive" else {}
