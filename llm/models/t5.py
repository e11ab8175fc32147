"""T5, text to text (Raffel et al. 2020): versions 1.0 and 1.1 by settings."""

import dataclasses

from llm.models import checks
from llm.models.encoder_decoder import Wiring
from llm.nn.block import BlockSettings
from llm.nn.multi_head_attention import AttentionSettings


@dataclasses.dataclass(frozen=True)
class T5Spec:
    """The settings of a T5: pre-norm with RMS norms, no biases, no position but a relative bias.

    Attributes:
        vocab_size: entries of the token table; None takes the tokenizer's.
        layers, decoder_layers: of the encoder and of the decoder; None is the encoder's.
        width, heads, head_width, ff_width: D, N, H and F; N H need not be D. None is D / N and 4 D.
        buckets, max_distance: of the relative bias, a table for the encoder and one for the decoder.
        activation, gated: "relu", plain, in version 1.0; "gelu_tanh", gated, in 1.1.
        tied: the unembedding is the token table, its logits scaled by D^-0.5 (1.0); otherwise its own matrix (1.1).
        norm_epsilon: of the norms.
        dropout: on embeddings, attention weights, the MLP's hidden layer, the output of each part and of each stack.
        attention, dtype, unroll, remat: as in `llm.models.gpt.GPTSpec`.
    """

    vocab_size: int | None = None
    layers: int = 6
    decoder_layers: int | None = None
    width: int = 512
    heads: int = 8
    head_width: int | None = None
    ff_width: int | None = None
    buckets: int = 32
    max_distance: int = 128
    activation: str = "relu"
    gated: bool = False
    tied: bool = True
    norm_epsilon: float = 1e-6
    dropout: float = 0.1
    attention: str = "auto"
    dtype: str = "float32"
    unroll: int = 1
    remat: str = ""

    def __post_init__(self):
        checks.at_least_one(self, "vocab_size", "layers", "decoder_layers", "width", "heads", "head_width", "ff_width",
                            "buckets", "max_distance", "unroll")  # fmt: skip
        if self.head_width is None:
            checks.divides(self, "heads", "width", "; set model.head_width")
        checks.divides(self, "unroll", "layers")
        if self.decoder_layers is not None:
            checks.divides(self, "unroll", "decoder_layers")
        checks.among(self)
        checks.rates(self, "dropout")
        checks.buckets(self)

    @property
    def context(self) -> None:
        """Relative positions have no end."""
        return None

    def wiring(self) -> Wiring:
        """How it is put together."""
        attention = AttentionSettings(
            heads=self.heads,
            kv_heads=self.heads,
            head_width=self.width // self.heads if self.head_width is None else self.head_width,
            scaled=False,  # T5 folds the division by sqrt(H) into the initial queries
            dropout=self.dropout,
            implementation=self.attention,
        )
        block = BlockSettings(
            attention=attention,
            ff_width=4 * self.width if self.ff_width is None else self.ff_width,
            activation=self.activation,
            gated=self.gated,
            norm="rms",
            epsilon=self.norm_epsilon,
            dropout=self.dropout,
            ff_dropout=self.dropout,
        )
        return Wiring.of(
            self,
            block=block,
            position="relative",
            buckets=self.buckets,
            max_distance=self.max_distance,
            tied=self.tied,
            logit_scale=self.width**-0.5 if self.tied else 1.0,
            embedding_stddev=1.0,
            final_norm=True,
            output_dropout=True,
        )
