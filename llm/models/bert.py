"""BERT: a bidirectional encoder, pre-trained on masked tokens and pairs, then fine-tuned (Devlin et al. 2019)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.attention import Mask
from llm.errors import InputError
from llm.models import checks, flops
from llm.models.contract import Output
from llm.models.rows import positions_of, segments_of
from llm.nn.block import BlockSettings, Surroundings
from llm.nn.embed import Embed
from llm.nn.mlp import ACTIVATIONS
from llm.nn.multi_head_attention import AttentionSettings
from llm.nn.norm import Norm
from llm.nn.parameter import parameter
from llm.nn.pool import POOLINGS, ClassHead, pool
from llm.nn.projection import Projection
from llm.nn.stack import Stack
from llm.sharding import constrain


@dataclasses.dataclass(frozen=True)
class BertSpec:
    """The settings of a BERT.

    Attributes:
        vocab_size: entries of the token table; None takes the tokenizer's.
        context: the longest row; positions are learned. With a `bag`, what is read of a longer one.
        types: entries of the segment table: fields of an example ("types" of a batch).
        layers, width, heads, ff_width: L, D, N and F; None is 4 D.
        pre_norm: normalises before each part, and the output, instead of after each part's residual.
        norm_epsilon, activation: of all blocks; the norms are layer norms.
        dropout, attention_dropout: on embeddings, the output of each part and the pooled vector; on attention weights.
        classes: of the classification head; None takes the data's.
        pooling: what the classification head reads: "first", the [CLS] token, "mean", "max" or "last"; the pooled
            vector goes through a tanh layer, BERT's pooler.
        bag: above 0, the classification head also reads the bag of the text's tokens (`llm.nn.pool.BagOfWords`), in
            features of that length: of the whole text, also where it is longer than the context.
        bag_pairs: entries of the bag for pairs of neighbouring tokens; 0 has single tokens alone.
        attention, dtype, unroll, remat: as in `llm.models.gpt.GPTSpec`.
    """

    vocab_size: int | None = None
    context: int = 512
    types: int = 2
    layers: int = 12
    width: int = 768
    heads: int = 12
    ff_width: int | None = None
    pre_norm: bool = False
    norm_epsilon: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    classes: int | None = None
    pooling: str = "first"
    bag: float = 0.0
    bag_pairs: int = 0
    attention: str = "auto"
    dtype: str = "float32"
    unroll: int = 1
    remat: str = ""

    def __post_init__(self):
        checks.at_least_one(self, "vocab_size", "context", "types", "layers", "width", "heads", "ff_width", "classes",
                            "unroll")  # fmt: skip
        checks.divides(self, "heads", "width")
        checks.divides(self, "unroll", "layers")
        checks.among(self, pooling=POOLINGS)
        checks.rates(self, "dropout", "attention_dropout")
        checks.bag(self)
        if self.norm_epsilon <= 0:
            raise InputError(f"model.norm_epsilon={self.norm_epsilon}: must be above 0")

    def block_settings(self) -> BlockSettings:
        """The settings of each block."""
        attention = AttentionSettings.plain(self.width, self.heads, True, self.attention_dropout, self.attention)
        return BlockSettings(
            attention=attention,
            ff_width=4 * self.width if self.ff_width is None else self.ff_width,
            activation=self.activation,
            norm="layer",
            epsilon=self.norm_epsilon,
            pre_norm=self.pre_norm,
            bias=True,
            dropout=self.dropout,
        )


class MaskHead(nn.Module):
    """What stood at a masked place: a layer, a norm, the products with the token table, and a bias for each token."""

    vocab_size: int
    activation: str
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array, logits: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """float32 logits_BTV; `logits` are the products with the table."""
        width = hidden_BTD.shape[-1]
        transform = Projection((width,), (width,), ("embed", "mlp"), bias=True, dtype=self.dtype, name="transform")
        h_BTD = ACTIVATIONS[self.activation](transform(hidden_BTD))
        logits_BTV = logits(Norm("layer", self.epsilon, self.dtype, name="norm")(h_BTD))
        return logits_BTV + parameter(self, "bias", nn.initializers.zeros, ("vocab",), (self.vocab_size,))


class Bert(nn.Module):
    """An encoder over batch["tokens"], with "types" for the fields; every place sees its whole document."""

    spec: BertSpec

    def setup(self):
        s = self.spec
        if s.vocab_size is None:
            raise ValueError("BertSpec.vocab_size is None: take it from the tokenizer before building the model")
        dtype = jnp.dtype(s.dtype)
        self.embed = Embed(s.vocab_size, s.width, dtype=dtype)
        self.embed_position = Embed(s.context, s.width, axes=("position", "embed"), dtype=dtype)
        self.embed_type = Embed(s.types, s.width, axes=("position", "embed"), dtype=dtype)
        self.embedding_norm = Norm("layer", s.norm_epsilon, dtype)
        if s.pre_norm:
            self.final_norm = Norm("layer", s.norm_epsilon, dtype)

        def map_to(outputs: int, axis: str) -> Projection:
            return Projection((s.width,), (outputs,), ("embed", axis), bias=True, dtype=dtype)

        self.mask_head = MaskHead(s.vocab_size, s.activation, s.norm_epsilon, dtype)
        self.pooler = map_to(s.width, "mlp")
        self.next_sentence_head = map_to(2, "classes")
        self.span_head = map_to(2, "classes")
        if s.classes is not None:
            self.class_head = ClassHead(s.classes, s.dropout, s.vocab_size, s.bag, s.bag_pairs, dtype)

    @property
    def unembedding(self) -> tuple[str, ...]:
        """Names of the top-level parameters that `unembed` reads."""
        return ("embed", "mask_head")

    @property
    def carries(self) -> bool:
        """Batches are independent."""
        return False

    @property
    def reads_source(self) -> bool:
        """It generates nothing."""
        return False

    @nn.compact
    def __call__(self, batch: dict, cache: None = None, train: bool = False) -> Output:
        """The hidden states of batch["tokens"] (B, T); there is no cache."""
        s = self.spec
        assert cache is None, "BERT reads a row at once"
        if s.bag and batch["tokens"].shape[1] > s.context:
            batch = {name: x[:, : s.context] if x.ndim == 2 else x for name, x in batch.items()}
        segments_BT, positions_BT = segments_of(batch), positions_of(batch)
        types_BT = batch["types"] if "types" in batch else jnp.zeros_like(segments_BT)
        x_BTD = self.embed(batch["tokens"]) + self.embed_position(positions_BT) + self.embed_type(types_BT)
        x_BTD = nn.Dropout(s.dropout, deterministic=not train)(self.embedding_norm(x_BTD))
        x_BTD = constrain(x_BTD, "batch", "length", "activation")
        around = Surroundings(Mask(q_segments_BT=segments_BT, kv_segments_BS=segments_BT), positions_BT)
        stack = Stack(
            s.block_settings(), s.layers, train, s.unroll, s.remat, dtype=jnp.dtype(s.dtype), name="stack"
        )  # fmt: skip
        x_BTD, _, aux = stack(x_BTD, around)
        return Output(self.final_norm(x_BTD) if s.pre_norm else x_BTD, None, aux)

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 logits_BTV of what stood at a masked place."""
        return self.mask_head(hidden_BTD, self.embed.logits)

    def next_sentence(self, hidden_BTD: jax.Array, batch: dict) -> jax.Array:
        """float32 logits_B2 of whether the second part follows the first (1) or not (0), read at the first token."""
        first_BD = pool(hidden_BTD, segments_of(batch) != 0, "first")
        return self.next_sentence_head(jnp.tanh(self.pooler(first_BD))).astype(jnp.float32)

    def classify(self, hidden_BTD: jax.Array, batch: dict, train: bool = False) -> jax.Array:
        """float32 logits_BC of the rows' classes."""
        assert self.spec.classes is not None, "the classes are taken from the data before the model is built"
        real_BT = segments_of(batch) != 0
        read_BT = real_BT[:, : hidden_BTD.shape[1]]
        pooled_BD = jnp.tanh(self.pooler(pool(hidden_BTD, read_BT, self.spec.pooling)))
        return self.class_head(pooled_BD, batch["tokens"], real_BT, train)

    def spans(self, hidden_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32 logits (starts_BT, ends_BT) of the answer's first and last place; place 0 says that there is none.

        Rows begin there: those of `llm.data` have their padding on the right.
        """
        logits_BT2 = self.span_head(hidden_BTD).astype(jnp.float32)
        return logits_BT2[..., 0], logits_BT2[..., 1]

    def sentence(self, hidden_BTD: jax.Array, batch: dict) -> jax.Array:
        """float32 vectors_BD of length 1: the mean over the text's real places (Reimers and Gurevych 2019)."""
        mean_BD = pool(hidden_BTD.astype(jnp.float32), segments_of(batch) != 0, "mean")
        return mean_BD / jnp.maximum(jnp.linalg.norm(mean_BD, axis=-1, keepdims=True), 1e-12)

    def init_cache(self, batch: int, length: int, source_length: int = 0, chunk: int | None = None) -> None:
        """There is none: BERT does not generate."""
        del batch, length, source_length, chunk
        raise NotImplementedError("the bert family reads whole rows and generates nothing")

    def flops_per_token(self, params, length: int) -> float:
        """Floating-point operations of the forward pass a token, in rows of `length` (`llm.models.flops`).

        The head over the vocabulary is counted for every place, though only the masked ones need it.
        """
        s = self.spec
        looked_up = ("embed_position", "embed_type") + (() if "mask_head" in params else ("embed",))
        return flops.products(params, looked_up) + flops.attention(s.layers, s.heads, s.width // s.heads, length)
