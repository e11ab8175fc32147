"""T5, versions 1.0 and 1.1: their configs and names, and ours."""

from collections.abc import Container, Mapping
from typing import Any

from llm.errors import InputError
from llm.models import T5Spec
from llm.weights.layout import Row, Table, linear, norm
from llm.weights.settings import Settings


def spec_of(config: Mapping[str, Any], names: Container[str]) -> T5Spec:
    """The settings of a T5; `names` are those of its tensors.

    Raises:
        InputError: something that this family does not compute.
    """
    s = Settings(config, "t5")
    said = s.config.get("feed_forward_proj", "relu")
    # Since its version 5, transformers says that all are tied, and of those that are not that they are not scaled.
    tied = s.flag("tie_word_embeddings", True) and s.flag("scale_decoder_outputs", True)
    if not tied and "lm_head.weight" not in names:
        raise InputError("the checkpoint lacks lm_head.weight, and its config says that logits are not scaled")
    layers, gated = s.count("num_layers"), str(said).startswith("gated-")
    name = str(said).removeprefix("gated-")
    # "gated-gelu" is the one of version 1.1, whose GELU is the approximate one.
    activation = "gelu_tanh" if said == "gated-gelu" else Settings({"a": name}, "t5").activation("a", "relu")
    return T5Spec(
        vocab_size=s.count("vocab_size"),
        layers=layers,
        decoder_layers=s.count("num_decoder_layers", layers),
        width=s.count("d_model"),
        heads=s.count("num_heads"),
        head_width=s.count("d_kv"),
        ff_width=s.count("d_ff"),
        buckets=s.count("relative_attention_num_buckets", 32),
        max_distance=s.count("relative_attention_max_distance", 128),
        activation=activation,
        gated=gated,
        tied=tied,
        norm_epsilon=s.number("layer_norm_epsilon", 1e-6),
        dropout=s.number("dropout_rate", 0.1),
    )


def config_of(spec: T5Spec) -> dict[str, Any]:
    """The config.json of a T5.

    Raises:
        InputError: theirs does not compute what it does.
    """
    if spec.gated and spec.activation == "gelu":
        raise InputError("model.activation='gelu' with model.gated=True: a T5's gated GELU is the approximate one")
    if spec.gated and spec.activation == "gelu_tanh":
        activation = "gated-gelu"
    else:
        activation = Settings.activation_name(spec.activation, spec.gated)
    block = spec.wiring().block
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": spec.vocab_size,
        "num_layers": spec.layers,
        "num_decoder_layers": spec.layers if spec.decoder_layers is None else spec.decoder_layers,
        "d_model": spec.width,
        "num_heads": spec.heads,
        "d_kv": block.attention.head_width,
        "d_ff": block.ff_width,
        "relative_attention_num_buckets": spec.buckets,
        "relative_attention_max_distance": spec.max_distance,
        "feed_forward_proj": activation,
        "tie_word_embeddings": spec.tied,
        "scale_decoder_outputs": spec.tied,
        "layer_norm_epsilon": spec.norm_epsilon,
        "dropout_rate": spec.dropout,
    }


def table(spec: T5Spec) -> Table:
    """The names of the checkpoints of a T5."""

    def stack(side: str) -> list[Row]:
        layer, ours = f"{side}.block.{{i}}.layer", f"{side}/layers"
        parts = [("SelfAttention", "attention")] + ([("EncDecAttention", "cross_attention")] * (side == "decoder"))
        rows = []
        for place, (theirs, mine) in enumerate(parts):
            for one, other in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
                inputs = 2 if one == "o" else 1
                rows += linear(f"{layer}.{place}.{theirs}.{one}", f"{ours}/{mine}/{other}", bias=False, inputs=inputs)
            rows += norm(f"{layer}.{place}.layer_norm", f"{ours}/{mine}_norm", bias=False)
        last = f"{layer}.{len(parts)}"
        names = (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")) if spec.gated else (("wi", "up"), ("wo", "down"))
        for one, other in names:
            rows += linear(f"{last}.DenseReluDense.{one}", f"{ours}/mlp/{other}", bias=False)
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return [
            Row(bias, (f"{side}_bias/table",)),
            *rows,
            *norm(f"{last}.layer_norm", f"{ours}/mlp_norm", bias=False),
            *norm(f"{side}.final_layer_norm", f"{side}_norm", bias=False),
        ]

    same = {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}
    if spec.tied:
        same["lm_head.weight"] = "shared.weight"
    rows = [Row("shared.weight", ("embed/table",)), *stack("encoder"), *stack("decoder")]
    rows += linear("lm_head", "unembedding_projection", bias=False)
    # A bias that old releases made for the cross-attention and never used.
    unused = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
    return Table(rows, same=same, computed=unused)
