"""Marian's encoder-decoders (Opus-MT): their configs and names, and ours."""

from collections.abc import Mapping
from typing import Any

from llm.errors import InputError
from llm.models import EncDecSpec
from llm.weights.layout import Row, Table, linear, norm
from llm.weights.settings import Settings


def spec_of(config: Mapping[str, Any]) -> EncDecSpec:
    """The settings of a Marian model.

    Raises:
        InputError: something that this family does not compute.
    """
    s = Settings(config, "marian")
    vocab = s.count("vocab_size")
    heads, ff_width = s.count("encoder_attention_heads"), s.count("encoder_ffn_dim")
    s.expect(
        scale_embedding=True, share_encoder_decoder_embeddings=True, tie_word_embeddings=True, decoder_vocab_size=vocab,
        decoder_attention_heads=heads, decoder_ffn_dim=ff_width, normalize_before=False, normalize_embedding=False,
        add_final_layer_norm=False, static_position_embeddings=True,
    )  # fmt: skip
    return EncDecSpec(
        vocab_size=vocab,
        layers=s.count("encoder_layers"),
        decoder_layers=s.count("decoder_layers"),
        width=s.count("d_model"),
        heads=heads,
        ff_width=ff_width,
        position="sinusoid_halves",
        norm_epsilon=1e-5,
        activation=s.activation("activation_function", "gelu"),
        dropout=s.number("dropout", 0.1),
        attention_dropout=s.number("attention_dropout", 0.0),
        logit_bias=True,
    )


def config_of(spec: EncDecSpec, pad: int, end_of_text: int) -> dict[str, Any]:
    """The config.json of a Marian model, which begins what it writes with `pad`.

    Raises:
        InputError: theirs does not compute what it does.
    """
    for name, wanted in (("position", "sinusoid_halves"), ("norm", "layer"), ("norm_epsilon", 1e-5), ("bias", True),
                         ("pre_norm", False), ("tied", True), ("shared", True), ("logit_bias", True)):  # fmt: skip
        if getattr(spec, name) != wanted:
            raise InputError(
                f"model.{name}={getattr(spec, name)!r}: a Marian model has {wanted!r}; it cannot be written"
            )
    ff_width = spec.wiring().block.ff_width
    return {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "is_encoder_decoder": True,
        "vocab_size": spec.vocab_size,
        "decoder_vocab_size": spec.vocab_size,
        "encoder_layers": spec.layers,
        "decoder_layers": spec.layers if spec.decoder_layers is None else spec.decoder_layers,
        "d_model": spec.width,
        "encoder_attention_heads": spec.heads,
        "decoder_attention_heads": spec.heads,
        "encoder_ffn_dim": ff_width,
        "decoder_ffn_dim": ff_width,
        "activation_function": Settings.activation_name(spec.activation, gated=False),
        "dropout": spec.dropout,
        "attention_dropout": spec.attention_dropout,
        "scale_embedding": True,
        "static_position_embeddings": True,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
        "pad_token_id": pad,
        "decoder_start_token_id": pad,
        "eos_token_id": end_of_text,
        "forced_eos_token_id": end_of_text,
        "max_position_embeddings": 512,
    }


def table() -> Table:
    """The names of Marian's checkpoints."""

    def side(name: str) -> list[Row]:
        layer, ours = f"model.{name}.layers.{{i}}", f"{name}/layers"
        attentions = [("self_attn", "attention")] + [("encoder_attn", "cross_attention")] * (name == "decoder")
        rows = []
        for theirs, mine in attentions:
            for one, other in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "output")):
                rows += linear(f"{layer}.{theirs}.{one}", f"{ours}/{mine}/{other}", inputs=2 if "out" in one else 1)
            rows += norm(f"{layer}.{theirs}_layer_norm", f"{ours}/{mine}_norm")
        return [
            *rows,
            *linear(f"{layer}.fc1", f"{ours}/mlp/up"),
            *linear(f"{layer}.fc2", f"{ours}/mlp/down"),
            *norm(f"{layer}.final_layer_norm", f"{ours}/mlp_norm"),
        ]

    same = {f"model.{name}.embed_tokens.weight": "model.shared.weight" for name in ("encoder", "decoder")}
    same["lm_head.weight"] = "model.shared.weight"
    return Table(
        [
            Row("model.shared.weight", ("embed/table",)),
            *side("encoder"),
            *side("decoder"),
            Row("final_logits_bias", ("logit_bias",), inputs=0),
        ],
        same=same,
        computed=("model.*.embed_positions.weight",),
    )
