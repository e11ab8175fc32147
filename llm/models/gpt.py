"""Decoder-only Transformers: GPT-2, GPT-3, Llama and what lies between, by settings."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.attention import IMPLEMENTATIONS, Mask
from llm.errors import InputError
from llm.models.contract import Output
from llm.nn.block import BlockSettings
from llm.nn.cache import KVCache
from llm.nn.embed import Embed
from llm.nn.mlp import ACTIVATIONS
from llm.nn.multi_head_attention import AttentionSettings
from llm.nn.norm import Norm
from llm.nn.projection import Projection
from llm.nn.stack import Stack
from llm.sharding import constrain


@dataclasses.dataclass(frozen=True)
class GPTSpec:
    """The settings of a decoder-only Transformer.

    Attributes:
        vocab_size: entries of the token table; None takes the tokenizer's.
        context: the longest sequence.
        layers, width, heads: L, D and N.
        kv_heads: K; None is N.
        head_width: H; None is D / N.
        ff_width: F; None is 4 D.
        position: "rope" or "learned".
        rope_base: base of the rotary positions.
        norm, norm_epsilon: "rms" or "layer", and its epsilon.
        activation, gated: the MLP's; "silu" gated is Llama's SwiGLU.
        bias: biases in the projections.
        qk_norm: normalises queries and keys.
        window: keys before the query that it sees; None is all.
        tied: the unembedding is the token table.
        scale_embedding: multiplies token vectors by sqrt(D), as a tied table is small.
        dropout: on embeddings, attention weights and the output of each part.
        attention: the implementation, as in `llm.attention.attention`.
        dtype: compute dtype, "float32" or "bfloat16"; parameters are float32.
        unroll, remat: as in `llm.nn.stack.Stack`.
    """

    vocab_size: int | None = None
    context: int = 128
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int | None = None
    head_width: int | None = None
    ff_width: int | None = None
    position: str = "rope"
    rope_base: float = 10000.0
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    activation: str = "gelu_tanh"
    gated: bool = False
    bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    tied: bool = True
    scale_embedding: bool = False
    dropout: float = 0.0
    attention: str = "auto"
    dtype: str = "float32"
    unroll: int = 1
    remat: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "context", "layers", "width", "heads", "kv_heads", "head_width", "ff_width",
                     "unroll"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"model.{name}={value}: must be at least 1")
        if self.head_width is None and self.width % self.heads:
            raise InputError(f"model.heads={self.heads} does not divide model.width={self.width}; set model.head_width")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise InputError(f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}")
        choices = {
            "position": ("rope", "learned"),
            "norm": ("rms", "layer"),
            "activation": tuple(ACTIVATIONS),
            "attention": ("auto", *IMPLEMENTATIONS),
            "dtype": ("float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"model.{name}={getattr(self, name)!r}: there are {', '.join(allowed)}")
        if self.position == "rope" and self.attention_settings().head_width % 2:
            raise InputError(f"model.head_width={self.attention_settings().head_width}: rotary positions need pairs")
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.dropout={self.dropout}: must be at least 0 and below 1")
        if self.window is not None and self.window < 0:
            raise InputError(f"model.window={self.window}: must not be negative")
        if self.layers % self.unroll:
            raise InputError(f"model.unroll={self.unroll} does not divide model.layers={self.layers}")

    def attention_settings(self) -> AttentionSettings:
        """The settings of each attention layer."""
        return AttentionSettings(
            heads=self.heads,
            kv_heads=self.heads if self.kv_heads is None else self.kv_heads,
            head_width=self.width // self.heads if self.head_width is None else self.head_width,
            bias=self.bias,
            qk_norm=self.qk_norm,
            rope_base=self.rope_base if self.position == "rope" else None,
            window=self.window,
            dropout=self.dropout,
            output_scale=(2 * self.layers) ** -0.5,  # GPT-2: keeps the residual stream's variance flat in depth
            implementation=self.attention,
        )

    def block_settings(self) -> BlockSettings:
        """The settings of each block."""
        return BlockSettings(
            attention=self.attention_settings(),
            ff_width=4 * self.width if self.ff_width is None else self.ff_width,
            activation=self.activation,
            gated=self.gated,
            norm=self.norm,
            epsilon=self.norm_epsilon,
            bias=self.bias,
            dropout=self.dropout,
        )


class GPT(nn.Module):
    """A decoder-only Transformer over batch["tokens"].

    Packed rows give batch["segments"] (0 is padding) and batch["positions"]; both default to one document a row.
    """

    spec: GPTSpec

    def setup(self):
        s = self.spec
        if s.vocab_size is None:
            raise ValueError("GPTSpec.vocab_size is None: take it from the tokenizer before building the model")
        dtype = jnp.dtype(s.dtype)
        self.embed = Embed(s.vocab_size, s.width, dtype=dtype)
        if s.position == "learned":
            self.embed_position = Embed(s.context, s.width, axes=("position", "embed"), dtype=dtype)
        self.final_norm = Norm(s.norm, s.norm_epsilon, dtype)
        if not s.tied:
            self.unembedding_projection = Projection((s.width,), (s.vocab_size,), ("embed", "vocab"), dtype=dtype)

    @property
    def unembedding(self) -> tuple[str, ...]:
        """Names of the top-level parameters that `unembed` reads."""
        return ("embed",) if self.spec.tied else ("unembedding_projection",)

    @nn.compact
    def __call__(self, batch: dict, cache: KVCache | None = None, train: bool = False) -> Output:
        """The hidden states of batch["tokens"] (B, T), after the cached tokens if a cache is given.

        With a cache, batch["segments"] says which tokens are real: padding (0) stands at the end of a row, is not
        counted in the row's length, and is overwritten by the next call.
        """
        s = self.spec
        tokens_BT = batch["tokens"]
        B, T = tokens_BT.shape
        segments_BT = batch.get("segments")
        positions_BT = batch.get("positions")
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
            if cache is not None:
                positions_BT += cache.lengths_B[:, None]
        if cache is None:
            mask = Mask(causal=True, q_segments_BT=segments_BT, kv_segments_BS=segments_BT)
        else:
            real_B = T if segments_BT is None else (segments_BT != 0).sum(-1, dtype=jnp.int32)
            cache = dataclasses.replace(cache, lengths_B=cache.lengths_B + real_B)
            slots = jnp.arange(cache.k_LBSKH.shape[2], dtype=jnp.int32)
            mask = Mask(
                causal=True,
                q_positions_BT=positions_BT,
                kv_positions_BS=jnp.broadcast_to(slots, (B, slots.size)),
                kv_lengths_B=cache.lengths_B,
            )
        x_BTD = self.embed(tokens_BT)
        if s.scale_embedding:
            x_BTD *= s.width**0.5
        if s.position == "learned":
            x_BTD += self.embed_position(positions_BT)
        x_BTD = nn.Dropout(s.dropout, deterministic=not train)(x_BTD)
        x_BTD = constrain(x_BTD, "batch", "length", "activation")
        x_BTD, cache = Stack(s.block_settings(), s.layers, train, s.unroll, s.remat, jnp.dtype(s.dtype), name="stack")(
            x_BTD, mask, positions_BT, cache
        )
        return Output(self.final_norm(x_BTD), cache)

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 logits_BTV of hidden states."""
        if self.spec.tied:
            return self.embed.logits(hidden_BTD)
        return self.unembedding_projection(hidden_BTD).astype(jnp.float32)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of at most `length` tokens."""
        s, a = self.spec, self.spec.attention_settings()
        return KVCache.empty(s.layers, batch, length, a.kv_heads, a.head_width, jnp.dtype(s.dtype))

    def flops_per_token(self, params, length: int) -> float:
        """Floating-point operations of the forward pass a token, in rows of `length`.

        2 a parameter that is multiplied with, plus 4 N H length a layer for attention's two products, counted whole
        whatever is masked (Chowdhery et al. 2022, appendix B).
        """
        s, a = self.spec, self.spec.attention_settings()
        looked_up = ("embed_position",) if s.tied else ("embed_position", "embed")
        multiplied = sum(
            x.size for name, part in params.items() if name not in looked_up for x in jax.tree.leaves(part)
        )
        return 2.0 * multiplied + 4.0 * s.layers * a.heads * a.head_width * length
