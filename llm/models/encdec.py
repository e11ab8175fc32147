"""The Transformer as published: an encoder and a decoder (Vaswani et al. 2017)."""

import dataclasses

from llm.errors import InputError
from llm.models import checks
from llm.models.encoder_decoder import Wiring
from llm.nn.block import BlockSettings
from llm.nn.multi_head_attention import AttentionSettings


@dataclasses.dataclass(frozen=True)
class EncDecSpec:
    """The settings of an encoder-decoder; as published, source, target and unembedding have one token table.

    Attributes:
        vocab_size: entries of the token table; None takes the tokenizer's.
        layers, decoder_layers: of the encoder and of the decoder; None is the encoder's.
        width, heads, ff_width: D, N and F; None is 4 D.
        position: "sinusoid" or "sinusoid_halves" (all sines first, as in Marian), of any length, or "learned", of
            `context` places.
        context: the longest row with learned positions; None with sinusoids.
        pre_norm: normalises before each part instead of after its residual, and what leaves a stack.
        norm, norm_epsilon, activation, bias: of all blocks.
        shared: the encoder reads by the decoder's tables of tokens and positions; otherwise it has its own.
        tied: the unembedding is the decoder's token table.
        logit_bias: adds a learned number to the logits of each token.
        dropout, attention_dropout: on embeddings and the output of each part; on attention weights.
        attention, dtype, unroll, remat: as in `llm.models.gpt.GPTSpec`.
    """

    vocab_size: int | None = None
    layers: int = 6
    decoder_layers: int | None = None
    width: int = 512
    heads: int = 8
    ff_width: int | None = None
    position: str = "sinusoid"
    context: int | None = None
    pre_norm: bool = False
    norm: str = "layer"
    norm_epsilon: float = 1e-6
    activation: str = "relu"
    bias: bool = True
    shared: bool = True
    tied: bool = True
    logit_bias: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.0
    attention: str = "auto"
    dtype: str = "float32"
    unroll: int = 1
    remat: str = ""

    def __post_init__(self):
        checks.at_least_one(self, "vocab_size", "layers", "decoder_layers", "width", "heads", "ff_width", "context",
                            "unroll")  # fmt: skip
        checks.divides(self, "heads", "width")
        checks.divides(self, "unroll", "layers")
        if self.decoder_layers is not None:
            checks.divides(self, "unroll", "decoder_layers")
        checks.among(self, position=("sinusoid", "sinusoid_halves", "learned"))
        checks.rates(self, "dropout", "attention_dropout")
        if (self.position == "learned") != (self.context is not None):
            raise InputError(
                f"model.position={self.position!r}, model.context={self.context}: learned positions need a context, "
                "sinusoids have none"
            )

    def wiring(self) -> Wiring:
        """How it is put together."""
        attention = AttentionSettings.plain(self.width, self.heads, self.bias, self.attention_dropout, self.attention)
        block = BlockSettings(
            attention=attention,
            ff_width=4 * self.width if self.ff_width is None else self.ff_width,
            activation=self.activation,
            norm=self.norm,
            epsilon=self.norm_epsilon,
            pre_norm=self.pre_norm,
            bias=self.bias,
            dropout=self.dropout,
        )
        return Wiring.of(
            self,
            block=block,
            position=self.position,
            context=self.context,
            scale_embedding=True,
            shared=self.shared,
            tied=self.tied,
            logit_bias=self.logit_bias,
            embedding_stddev=self.width**-0.5,  # so that scaled vectors have variance 1, like the sinusoids about
            final_norm=self.pre_norm,
        )
