"""BERT with each of its heads, and sentence encoders: their configs and names, and ours."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm.errors import InputError
from llm.models import BertSpec
from llm.weights.layout import Row, Table, linear, norm
from llm.weights.settings import Settings

# The objective that a head belongs to, by the start of its tensors' names; without a head it makes sentence vectors.
_HEADS = {"cls.predictions": "masked", "classifier": "classification", "qa_outputs": "span_qa"}
_ARCHITECTURES = {
    "masked": "BertForPreTraining", "classification": "BertForSequenceClassification",
    "span_qa": "BertForQuestionAnswering", "contrastive": "BertModel",
}  # fmt: skip


def objective(names: Iterable[str]) -> str:
    """What a checkpoint was trained for, by the head that its tensors are of.

    Raises:
        InputError: it has several heads.
    """
    names = list(names)
    found = [kind for start, kind in _HEADS.items() if any(name.startswith(start + ".") for name in names)]
    if len(found) > 1:
        raise InputError(f"the checkpoint has heads for {' and '.join(found)}: one of them makes a model")
    return found[0] if found else "contrastive"


def check_architecture(config: Mapping[str, Any], kind: str) -> None:
    """Raises InputError when the config names a head that is not the objective's, one for each token say."""
    named = (config.get("architectures") or [None])[0]
    masked = ("BertForMaskedLM",) if kind == "masked" else ()
    if named is not None and named not in (_ARCHITECTURES[kind], *masked):
        raise InputError(
            f"config.json, architectures: {named} has no place here; there are {', '.join(_ARCHITECTURES.values())}, "
            "BertForMaskedLM"
        )


def spec_of(config: Mapping[str, Any], kind: str) -> BertSpec:
    """The settings of a BERT whose head is that of an objective.

    Raises:
        InputError: something that this family does not compute.
    """
    s = Settings(config, "bert")
    s.expect(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False, pruned_heads={})
    if kind == "classification":
        s.expect(problem_type="single_label_classification")
    return BertSpec(
        vocab_size=s.count("vocab_size"),
        context=s.count("max_position_embeddings"),
        types=s.count("type_vocab_size", 2),
        layers=s.count("num_hidden_layers"),
        width=s.count("hidden_size"),
        heads=s.count("num_attention_heads"),
        ff_width=s.count("intermediate_size"),
        norm_epsilon=s.number("layer_norm_eps", 1e-12),
        activation=s.activation("hidden_act", "gelu"),
        dropout=s.number("hidden_dropout_prob", 0.1),
        attention_dropout=s.number("attention_probs_dropout_prob", 0.1),
        classes=len(labels(config)) if kind == "classification" else None,
    )


def labels(config: Mapping[str, Any]) -> list[str]:
    """The names of the classes.

    Raises:
        InputError: there are fewer than two.
    """
    named = config.get("id2label") or {}
    count = len(named) or int(config.get("num_labels", 2))
    if count < 2:
        raise InputError(f"config.json, num_labels={count}: a regression has no place here")
    return [str(named.get(str(i), f"LABEL_{i}")) for i in range(count)]


def check_pooling(folder: pathlib.Path) -> None:
    """Raises InputError when a sentence encoder's folder says that vectors are more than the mean, of length 1."""
    path = folder / "modules.json"
    if path.is_file():
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = [str(module["type"]).split(".")[-1] for module in modules]
        others = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
        if others:
            raise InputError(f"{path}: the module {', '.join(others)} has no place here")
    path = folder / "1_Pooling" / "config.json"
    if path.is_file():
        said = json.loads(path.read_text(encoding="utf-8"))
        chosen = [name for name, on in said.items() if name.startswith("pooling_mode_") and on is True]
        if chosen != ["pooling_mode_mean_tokens"]:
            raise InputError(f"{path}: {', '.join(chosen) or 'no pooling'}; sentence vectors here are means")


def sentence_files(spec: BertSpec) -> dict[str, Any]:
    """What sentence-transformers reads of a sentence encoder, by path: vectors are the mean, of length 1."""
    parts = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(parts.items())
    ]
    others = dict.fromkeys(("cls_token", "max_tokens", "mean_sqrt_len_tokens"), False)
    chosen = {f"pooling_mode_{name}": on for name, on in {"mean_tokens": True, **others}.items()}
    return {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": spec.context, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": spec.width, **chosen},
        "2_Normalize/config.json": {},
    }


def config_of(spec: BertSpec, kind: str, names: Sequence[str], missing_heads: Sequence[str]) -> dict[str, Any]:
    """The config.json of a BERT; `names` are those of its classes, `missing_heads` those that are not written.

    Raises:
        InputError: theirs does not compute what it does.
    """
    if spec.pre_norm or spec.bag or (kind == "classification" and spec.pooling != "first"):
        raise InputError(
            f"model.pre_norm={spec.pre_norm}, bag={spec.bag}, pooling={spec.pooling!r}: BERT as published has none of "
            "these; it cannot be written"
        )
    config: dict[str, Any] = {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM" if missing_heads else _ARCHITECTURES[kind]],
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context,
        "type_vocab_size": spec.types,
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.width,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.block_settings().ff_width,
        "layer_norm_eps": spec.norm_epsilon,
        "hidden_act": Settings.activation_name(spec.activation, gated=False),
        "hidden_dropout_prob": spec.dropout,
        "attention_probs_dropout_prob": spec.attention_dropout,
    }
    if kind == "classification":
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def table(kind: str) -> Table:
    """The names of the checkpoints of a BERT for an objective."""
    layer, ours = "bert.encoder.layer.{i}", "stack/layers"
    rows = [
        Row("bert.embeddings.word_embeddings.weight", ("embed/table",)),
        Row("bert.embeddings.position_embeddings.weight", ("embed_position/table",)),
        Row("bert.embeddings.token_type_embeddings.weight", ("embed_type/table",)),
        *norm("bert.embeddings.LayerNorm", "embedding_norm"),
        *(r for n in ("query", "key", "value")
          for r in linear(f"{layer}.attention.self.{n}", f"{ours}/attention/{n}")),
        *linear(f"{layer}.attention.output.dense", f"{ours}/attention/output", inputs=2),
        *norm(f"{layer}.attention.output.LayerNorm", f"{ours}/attention_norm"),
        *linear(f"{layer}.intermediate.dense", f"{ours}/mlp/up"),
        *linear(f"{layer}.output.dense", f"{ours}/mlp/down"),
        *norm(f"{layer}.output.LayerNorm", f"{ours}/mlp_norm"),
        *linear("bert.pooler.dense", "pooler", head="pooler" if kind == "masked" else ""),
        *linear("cls.predictions.transform.dense", "mask_head/transform"),
        *norm("cls.predictions.transform.LayerNorm", "mask_head/norm"),
        Row("cls.predictions.bias", ("mask_head/bias",), inputs=None),
        # Their class 0 says that the second part goes on, ours 1.
        *linear("cls.seq_relationship", "next_sentence_head", order=(1, 0), head="next sentence"),
        *linear("classifier", "class_head/output"),
        *linear("qa_outputs", "span_head"),
    ]  # fmt: skip
    unread = {
        "masked": (),
        "classification": ("cls.*",),
        "span_qa": ("bert.pooler.*", "cls.*"),
        "contrastive": ("bert.pooler.*",),
    }
    return Table(
        rows,
        prefix="bert.",
        same={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        computed=("*.position_ids",),
        unread=unread[kind],
        renamed={".gamma": ".weight", ".beta": ".bias"},  # as Google's first conversions call a norm's
    )
