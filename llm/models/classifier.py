"""The text classifier of the worked program: an encoder and a decoder read the text, a softmax names its class."""

import dataclasses

from llm.models import checks
from llm.models.encoder_decoder import Wiring
from llm.nn.block import BlockSettings
from llm.nn.multi_head_attention import AttentionSettings
from llm.nn.pool import POOLINGS


@dataclasses.dataclass(frozen=True)
class ClassifierSpec:
    """The settings of the classifier; the defaults are the worked program's.

    The encoder reads the tokens with learned positions; the decoder reads them again, sees all of them, and attends to
    the encoder's output; its hidden states are pooled and mapped to the classes.

    Attributes:
        vocab_size: entries of the token table; None takes the tokenizer's.
        context: the longest text.
        classes: of the output; None takes the data's.
        layers, decoder_layers: of the encoder and of the decoder; None is the encoder's.
        width, heads, ff_width: D, N and F.
        pre_norm: normalises before each part instead of after its residual.
        pooling: "mean", "max", "first" or "last" over the text's real tokens.
        dropout: on embeddings, the output of each part, and the pooled vector.
        norm_epsilon, activation, attention, dtype, unroll, remat: as in `llm.models.gpt.GPTSpec`.
    """

    vocab_size: int | None = None
    context: int = 100
    classes: int | None = None
    layers: int = 2
    decoder_layers: int | None = None
    width: int = 512
    heads: int = 8
    ff_width: int = 2048
    pre_norm: bool = False
    pooling: str = "mean"
    dropout: float = 0.1
    norm_epsilon: float = 1e-6
    activation: str = "relu"
    attention: str = "auto"
    dtype: str = "float32"
    unroll: int = 1
    remat: str = ""

    def __post_init__(self):
        checks.at_least_one(self, "vocab_size", "context", "classes", "layers", "decoder_layers", "width", "heads",
                            "ff_width", "unroll")  # fmt: skip
        checks.divides(self, "heads", "width")
        checks.divides(self, "unroll", "layers")
        if self.decoder_layers is not None:
            checks.divides(self, "unroll", "decoder_layers")
        checks.among(self, pooling=POOLINGS)
        checks.rates(self, "dropout")

    def wiring(self) -> Wiring:
        """How it is put together."""
        attention = AttentionSettings.plain(self.width, self.heads, True, 0.0, self.attention)
        block = BlockSettings(
            attention=attention,
            ff_width=self.ff_width,
            activation=self.activation,
            norm="layer",
            epsilon=self.norm_epsilon,
            pre_norm=self.pre_norm,
            bias=True,
            dropout=self.dropout,
        )
        return Wiring.of(
            self,
            block=block,
            position="learned",
            context=self.context,
            scale_embedding=True,
            embedding_stddev=self.width**-0.5,
            final_norm=self.pre_norm,
            classes=self.classes,
            source_is_row=True,
            pooling=self.pooling,
        )
