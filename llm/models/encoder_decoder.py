"""Encoder-decoders over one wiring: Vaswani's, T5, and the text classifier of the worked program.

Each family's settings say how they are wired by a `Wiring`; the module knows nothing else of them.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.attention import BucketBias, Mask
from llm.models import flops
from llm.models.contract import Output
from llm.models.rows import causal_rows, positions_of, segments_of
from llm.nn.block import BlockSettings, Surroundings
from llm.nn.cache import KVCache
from llm.nn.embed import Embed
from llm.nn.norm import Norm
from llm.nn.parameter import parameter
from llm.nn.pool import ClassHead, pool
from llm.nn.position import sinusoids
from llm.nn.projection import Projection
from llm.nn.stack import Stack
from llm.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Wiring:
    """How an encoder-decoder is put together.

    Attributes:
        vocab_size, width: of the token table.
        shared: both sides read by one table of tokens, and of learned positions; otherwise the encoder has its own.
        encoder_layers, decoder_layers: of the two stacks.
        block: of the decoder; the encoder's is the same without the source.
        position: "sinusoid", "sinusoid_halves", "learned" (of `context` places), or "relative", a bias of `buckets`
            up to `max_distance`, one table a stack.
        scale_embedding: multiplies token vectors by sqrt(D).
        tied: the unembedding is the token table; its logits are then multiplied by `logit_scale`.
        logit_bias: adds a learned number to the logits of each token.
        embedding_stddev: of the initial token table.
        final_norm: normalises what leaves a stack, as pre-norm blocks need.
        output_dropout: dropout on what leaves a stack as well (T5).
        classes: of the classification head; None has none.
        source_is_row: the encoder reads the row itself, and the decoder sees all of it: a classifier.
        pooling: how the classifier pools.
    """

    vocab_size: int
    width: int
    encoder_layers: int
    decoder_layers: int
    block: BlockSettings
    position: str
    shared: bool = True
    context: int | None = None
    buckets: int = 32
    max_distance: int = 128
    scale_embedding: bool = False
    tied: bool = True
    logit_scale: float = 1.0
    logit_bias: bool = False
    embedding_stddev: float = 0.02
    final_norm: bool = False
    output_dropout: bool = False
    dropout: float = 0.0
    classes: int | None = None
    source_is_row: bool = False
    pooling: str = "mean"
    unroll: int = 1
    remat: str = ""
    dtype: str = "float32"

    @classmethod
    def of(cls, spec: Any, **more: Any) -> "Wiring":
        """The wiring of a family's settings: what all families name alike comes from them, `more` says the rest."""
        assert spec.vocab_size is not None, "taken from the tokenizer before the model is built"
        return cls(
            vocab_size=spec.vocab_size,
            width=spec.width,
            encoder_layers=spec.layers,
            decoder_layers=spec.layers if spec.decoder_layers is None else spec.decoder_layers,
            dropout=spec.dropout,
            unroll=spec.unroll,
            remat=spec.remat,
            dtype=spec.dtype,
            **more,
        )


class RelativeBias(nn.Module):
    """The bias of relative positions that all layers of a stack share, a value for each bucket and head (T5)."""

    heads: int
    buckets: int
    max_distance: int
    stddev: float

    @nn.compact
    def __call__(self, bidirectional: bool) -> BucketBias:
        """The bias as `llm.attention` takes it."""
        init = nn.initializers.normal(self.stddev)
        table_RN = parameter(self, "table", init, ("buckets", "heads"), (self.buckets, self.heads))
        return BucketBias(table_RN, bidirectional, self.max_distance)


class EncoderDecoder(nn.Module):
    """An encoder over source_tokens and a decoder over tokens that attends to it.

    The settings give `wiring()`. Packed rows give segments of both sides: a document of the row sees the source of the
    same number.
    """

    spec: Any

    def setup(self):
        w: Wiring = self.spec.wiring()
        dtype = jnp.dtype(w.dtype)

        def tokens() -> Embed:
            return Embed(w.vocab_size, w.width, stddev=w.embedding_stddev, dtype=dtype)

        def places() -> Embed:
            assert w.context is not None
            return Embed(w.context, w.width, axes=("position", "embed"), dtype=dtype)

        self.embed = tokens()
        if not w.shared:
            self.embed_source = tokens()
        if w.position == "learned":
            self.embed_position = places()
            if not w.shared:
                self.embed_source_position = places()
        if w.logit_bias:
            self.logit_bias_V = parameter(self, "logit_bias", nn.initializers.zeros, ("vocab",), (w.vocab_size,))
        if w.position == "relative":
            self.encoder_bias = RelativeBias(w.block.attention.heads, w.buckets, w.max_distance, w.width**-0.5)
            self.decoder_bias = RelativeBias(w.block.attention.heads, w.buckets, w.max_distance, w.width**-0.5)
        if w.final_norm:
            self.encoder_norm = Norm(w.block.norm, w.block.epsilon, dtype)
            self.decoder_norm = Norm(w.block.norm, w.block.epsilon, dtype)
        if w.classes is not None:
            self.class_head = ClassHead(w.classes, w.dropout, w.vocab_size, 0.0, dtype=dtype)
        if not w.tied:
            self.unembedding_projection = Projection((w.width,), (w.vocab_size,), ("embed", "vocab"), dtype=dtype)

    @property
    def unembedding(self) -> tuple[str, ...]:
        """Names of the top-level parameters that `unembed` reads."""
        w: Wiring = self.spec.wiring()
        table = "embed" if w.tied else "unembedding_projection"
        return (table, "logit_bias") if w.logit_bias else (table,)

    @property
    def carries(self) -> bool:
        """Batches are independent."""
        return False

    @property
    def reads_source(self) -> bool:
        """It tells what belongs to a source."""
        return not self.spec.wiring().source_is_row

    @nn.compact
    def __call__(self, batch: dict, cache: KVCache | None = None, train: bool = False) -> Output:
        """The decoder's hidden states of batch["tokens"] (B, T), after the cached tokens if a cache is given.

        With a cache the first call has source_tokens, whose keys and values it keeps; later calls have none.
        """
        w: Wiring = self.spec.wiring()
        row_segments_BT = segments_of(batch)
        if w.source_is_row:
            batch = batch | {"source_tokens": batch["tokens"], "source_segments": row_segments_BT}
            if "positions" in batch:
                batch |= {"source_positions": batch["positions"]}
            positions_BT = positions_of(batch)
            mask = Mask(q_segments_BT=row_segments_BT, kv_segments_BS=row_segments_BT)
        else:
            positions_BT, mask, cache = causal_rows(batch, cache)
        if "source_tokens" in batch:
            source_BSD, aux = self._encode(batch, train)
            source_segments_BS = segments_of(batch, "source_tokens")
            if cache is not None:
                cache = dataclasses.replace(cache, source_segments_BS=source_segments_BS)
        else:
            assert cache is not None, "an encoder-decoder needs source_tokens, or a cache that was given them"
            source_BSD, aux, source_segments_BS = None, {}, cache.source_segments_BS
        x_BTD = self._embed("decoder", batch["tokens"], positions_BT, train)
        around = Surroundings(
            mask,
            positions_BT,
            # The bias is of places in the row: documents that are packed together see only themselves anyway.
            bias=self._bias("decoder", bidirectional=w.source_is_row),
            source_BSD=source_BSD,
            source_mask=Mask(q_segments_BT=row_segments_BT, kv_segments_BS=source_segments_BS),
        )
        x_BTD, layers, more = self._stack("decoder", w.decoder_layers, True, train)(
            x_BTD, around, None if cache is None else cache.layers
        )
        if cache is not None:
            cache = dataclasses.replace(cache, layers=layers)
        return Output(self._leave("decoder", x_BTD, train), cache, aux | more)

    def _encode(self, batch: dict, train: bool):
        w: Wiring = self.spec.wiring()
        segments_BS, positions_BS = segments_of(batch, "source_tokens"), positions_of(batch, "source_tokens")
        x_BSD = self._embed("encoder", batch["source_tokens"], positions_BS, train)
        mask = Mask(q_segments_BT=segments_BS, kv_segments_BS=segments_BS)
        around = Surroundings(mask, positions_BS, bias=self._bias("encoder", bidirectional=True))
        x_BSD, _, aux = self._stack("encoder", w.encoder_layers, False, train)(x_BSD, around)
        return self._leave("encoder", x_BSD, train), aux

    def _embed(self, side: str, tokens_BT, positions_BT, train: bool):
        w: Wiring = self.spec.wiring()
        own = side == "encoder" and not w.shared
        x_BTD = (self.embed_source if own else self.embed)(tokens_BT)
        if w.scale_embedding:
            x_BTD *= w.width**0.5
        if w.position in ("sinusoid", "sinusoid_halves"):
            x_BTD += sinusoids(positions_BT, w.width, w.position == "sinusoid_halves").astype(x_BTD.dtype)
        elif w.position == "learned":
            x_BTD += (self.embed_source_position if own else self.embed_position)(positions_BT)
        return constrain(self._drop(x_BTD, train), "batch", "length", "activation")

    def _drop(self, x, train: bool):
        return nn.Dropout(self.spec.wiring().dropout, deterministic=not train)(x)

    def _bias(self, side: str, bidirectional: bool) -> BucketBias | None:
        w: Wiring = self.spec.wiring()
        if w.position != "relative":
            return None
        return self.encoder_bias(bidirectional) if side == "encoder" else self.decoder_bias(bidirectional)

    def _stack(self, side: str, layers: int, cross: bool, train: bool) -> Stack:
        w: Wiring = self.spec.wiring()
        settings = dataclasses.replace(w.block, cross=cross)
        return Stack(settings, layers, train, w.unroll, w.remat, dtype=jnp.dtype(w.dtype), name=side)

    def _leave(self, side: str, x, train: bool):
        w: Wiring = self.spec.wiring()
        if w.final_norm:
            x = self.encoder_norm(x) if side == "encoder" else self.decoder_norm(x)
        return self._drop(x, train) if w.output_dropout else x

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 logits_BTV of hidden states."""
        w: Wiring = self.spec.wiring()
        if w.tied:
            logits_BTV = self.embed.logits(hidden_BTD * jnp.asarray(w.logit_scale, hidden_BTD.dtype))
        else:
            logits_BTV = self.unembedding_projection(hidden_BTD).astype(jnp.float32)
        return logits_BTV + self.logit_bias_V if w.logit_bias else logits_BTV

    def classify(self, hidden_BTD: jax.Array, batch: dict, train: bool = False) -> jax.Array:
        """float32 logits_BC of the pooled rows."""
        w: Wiring = self.spec.wiring()
        assert w.classes is not None, "the classes are taken from the data before the model is built"
        real_BT = segments_of(batch) != 0
        return self.class_head(pool(hidden_BTD, real_BT, w.pooling), batch["tokens"], real_BT, train)

    def init_cache(self, batch: int, length: int, source_length: int = 0, chunk: int | None = None) -> KVCache:
        """An empty cache for `batch` rows of `length` tokens, `chunk` at once, and sources of `source_length`."""
        w: Wiring = self.spec.wiring()
        a = w.block.attention
        return KVCache.empty(
            w.decoder_layers, batch, length, a.kv_heads, a.head_width, jnp.dtype(w.dtype), source_length, chunk
        )

    def flops_per_token(self, params, length: int) -> float:
        """Floating-point operations of the forward pass a token that is read, in rows of `length`.

        Where a source is read too, half of the tokens are the encoder's and half the decoder's. The source's keys and
        values are counted among the decoder's.
        """
        w: Wiring = self.spec.wiring()
        looked_up = ("embed_position", "embed_source", "embed_source_position")
        looked_up += () if w.tied and not w.source_is_row else ("embed",)
        layers = w.encoder_layers + 2 * w.decoder_layers
        heads = w.block.attention
        a_pair = flops.products(params, looked_up) + flops.attention(layers, heads.heads, heads.head_width, length)
        return a_pair if w.source_is_row else a_pair / 2
