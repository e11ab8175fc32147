"""Decoder-only Transformers: GPT-2, GPT-3, Llama, Qwen, Mistral, Mixtral and what lies between, by settings."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.errors import InputError
from llm.models import checks, flops
from llm.models.contract import Model, Output
from llm.models.rows import causal_rows
from llm.nn.block import BlockSettings, Surroundings
from llm.nn.cache import KVCache
from llm.nn.embed import Embed
from llm.nn.mixture_of_experts import ExpertSettings
from llm.nn.multi_head_attention import AttentionSettings
from llm.nn.norm import Norm
from llm.nn.position import SCALINGS, Rope
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
        rope_scaling, rope_factor, rope_original_context, rope_low_frequency, rope_high_frequency: how they are
            stretched, as in `llm.nn.position.Rope`.
        norm, norm_epsilon: "rms" or "layer", and its epsilon.
        activation, gated: the MLP's; "silu" gated is Llama's SwiGLU.
        bias: biases in all projections.
        qkv_bias: biases in those of queries, keys and values alone, as in Qwen 2.
        qk_norm: normalises queries and keys.
        windows: keys before the query that it sees, of the layers in turn; 0 is all. (4095,) is Mistral's window of
            4,096 with the query itself, (0, 256) alternates dense and banded layers as GPT-3 does, () is all.
        experts, experts_chosen: a mixture of experts in place of the MLP, and how many of them a token goes through;
            0 has the MLP.
        tied: the unembedding is the token table.
        scale_embedding: multiplies token vectors by sqrt(D), as a tied table is small.
        width_base: the width whose learning rate a model of another one keeps, by the maximal update parametrisation
            (muP; Yang et al. 2022, "Tensor Programs V", table 8): logits are multiplied by width_base / D, scores by
            the like for heads that widen, `scale_embedding` takes width_base for D, and the optimizer gives the hidden
            matrices that share of the rate. F must grow with D; where head_width is None heads widen with D, else there
            are more of them. None has the standard parametrisation, in which the best rate falls as D grows.
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
    rope_scaling: str = ""
    rope_factor: float = 1.0
    rope_original_context: int = 8192
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    activation: str = "gelu_tanh"
    gated: bool = False
    bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    experts: int = 0
    experts_chosen: int = 2
    tied: bool = True
    scale_embedding: bool = False
    width_base: int | None = None
    dropout: float = 0.0
    attention: str = "auto"
    dtype: str = "float32"
    unroll: int = 1
    remat: str = ""

    def __post_init__(self):
        checks.at_least_one(self, "vocab_size", "context", "layers", "width", "heads", "kv_heads", "head_width",
                            "ff_width", "unroll", "rope_original_context", "width_base")  # fmt: skip
        if self.head_width is None:
            checks.divides(self, "heads", "width", "; set model.head_width")
        if self.kv_heads is not None:
            checks.divides(self, "kv_heads", "heads")
        checks.among(self, position=("rope", "learned"), rope_scaling=("", *SCALINGS))
        if self.position == "rope" and self.attention_settings().head_width % 2:
            raise InputError(f"model.head_width={self.attention_settings().head_width}: rotary positions need pairs")
        if self.rope_factor < 1:
            raise InputError(f"model.rope_factor={self.rope_factor}: must be at least 1")
        if not 0 < self.rope_low_frequency < self.rope_high_frequency:
            raise InputError(
                f"model.rope_low_frequency={self.rope_low_frequency} must be above 0 and below "
                f"model.rope_high_frequency={self.rope_high_frequency}"
            )
        checks.rates(self, "dropout")
        if any(window < 0 for window in self.windows):
            raise InputError(f"model.windows={self.windows}: must not be negative (0 sees all)")
        pattern = len(self.windows) or 1
        if self.layers % pattern:
            raise InputError(f"model.windows={self.windows}: {pattern} do not divide model.layers={self.layers}")
        if self.layers // pattern % self.unroll:
            of = (
                "model.layers"
                if pattern == 1
                else f"the {self.layers // pattern} rounds of model.windows in model.layers"
            )
            raise InputError(f"model.unroll={self.unroll} does not divide {of}={self.layers}")
        if self.experts < 0 or (self.experts and not 1 <= self.experts_chosen <= self.experts):
            raise InputError(
                f"model.experts={self.experts}, model.experts_chosen={self.experts_chosen}: choose 1 to all of them"
            )
        if self.experts and self.bias:
            raise InputError("model.bias=True: the experts have no biases; set it to False, or model.experts to 0")

    @property
    def width_share(self) -> float:
        """width_base / D, which muP scales by; 1 without it."""
        return 1.0 if self.width_base is None else self.width_base / self.width

    def attention_settings(self) -> AttentionSettings:
        """The settings of each attention layer."""
        rope = Rope(
            self.rope_base, self.rope_scaling, self.rope_factor, self.rope_original_context, self.rope_low_frequency,
            self.rope_high_frequency,
        )  # fmt: skip
        return AttentionSettings(
            heads=self.heads,
            kv_heads=self.heads if self.kv_heads is None else self.kv_heads,
            head_width=self.width // self.heads if self.head_width is None else self.head_width,
            bias=self.bias or self.qkv_bias,
            output_bias=self.bias,
            qk_norm=self.qk_norm,
            norm_epsilon=self.norm_epsilon,
            rope=rope if self.position == "rope" else None,
            dropout=self.dropout,
            output_scale=(2 * self.layers) ** -0.5,  # GPT-2: keeps the residual stream's variance flat in depth
            # Trained queries and keys are alike, and their product grows as H, not as sqrt(H).
            score_scale=self.width_share**0.5 if self.head_width is None else 1.0,
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
            experts=ExpertSettings(self.experts, self.experts_chosen) if self.experts else None,
        )

    def windows_in_turn(self) -> tuple[int | None, ...]:
        """The windows of the layers in turn; None sees all."""
        return tuple(window or None for window in self.windows) or (None,)


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
            self.unembedding_projection = Projection(
                (s.width,), (s.vocab_size,), ("embed", "vocab"), stddev_scale=s.width_share**-0.5, dtype=dtype
            )

    @property
    def unembedding(self) -> tuple[str, ...]:
        """Names of the top-level parameters that `unembed` reads."""
        return ("embed",) if self.spec.tied else ("unembedding_projection",)

    @property
    def carries(self) -> bool:
        """Batches are independent."""
        return False

    @property
    def reads_source(self) -> bool:
        """It continues a row."""
        return False

    @nn.compact
    def __call__(self, batch: dict, cache: KVCache | None = None, train: bool = False) -> Output:
        """The hidden states of batch["tokens"] (B, T), after the cached tokens if a cache is given.

        With a cache, batch["segments"] says which tokens are real (`llm.models.rows.causal_rows`).
        """
        s = self.spec
        positions_BT, mask, cache = causal_rows(batch, cache)
        x_BTD = self.embed(batch["tokens"])
        if s.scale_embedding:
            x_BTD *= (s.width if s.width_base is None else s.width_base) ** 0.5
        if s.position == "learned":
            x_BTD += self.embed_position(positions_BT)
        x_BTD = nn.Dropout(s.dropout, deterministic=not train)(x_BTD)
        x_BTD = constrain(x_BTD, "batch", "length", "activation")
        real_BT = batch["segments"] != 0 if "segments" in batch else None
        around = Surroundings(mask, positions_BT, real_BT=real_BT)
        stack = Stack(
            s.block_settings(), s.layers, train, s.unroll, s.remat, s.windows_in_turn(), jnp.dtype(s.dtype),
            name="stack",
        )  # fmt: skip
        x_BTD, layers, aux = stack(x_BTD, around, None if cache is None else cache.layers)
        if cache is not None:
            cache = dataclasses.replace(cache, layers=layers)
        return Output(self.final_norm(x_BTD), cache, aux)

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 logits_BTV of hidden states."""
        if self.spec.tied:
            logits_BTV = self.embed.logits(hidden_BTD)
        else:
            logits_BTV = self.unembedding_projection(hidden_BTD).astype(jnp.float32)
        return logits_BTV if self.spec.width_base is None else logits_BTV * self.spec.width_share

    def init_cache(self, batch: int, length: int, source_length: int = 0, chunk: int | None = None) -> KVCache:
        """An empty cache for `batch` rows of at most `length` tokens, `chunk` of them at once; there is no source."""
        del source_length
        s, a = self.spec, self.spec.attention_settings()
        return KVCache.empty(
            s.layers, batch, length, a.kv_heads, a.head_width, jnp.dtype(s.dtype), chunk=chunk,
            windows=s.windows_in_turn(),
        )  # fmt: skip

    def flops_per_token(self, params, length: int) -> float:
        """Floating-point operations of the forward pass a token, in rows of `length` (`llm.models.flops`)."""
        s, a = self.spec, self.spec.attention_settings()
        share = {"moe": s.experts_chosen / s.experts} if s.experts else {}
        looked_up = ("embed_position",) if s.tied else ("embed_position", "embed")
        return flops.products(params, looked_up, share) + flops.attention(s.layers, a.heads, a.head_width, length)


def unrolled(model: Model, params: Any) -> tuple[Model, Any]:
    """The same model as a straight program, with an array of its own for every layer's parameters and cache.

    A decoding step reads them where they lie: a loop over stacked layers first copies each one's slice of the stack.
    It compiles longer. Each parameter is copied, packed ones (`llm.nn.packed`) too. A model of another family, or of
    one layer, is returned as it is.
    """
    if not isinstance(model, GPT) or model.spec.layers == 1:
        return model, params
    spec = model.spec
    windows = spec.windows or (0,)
    stacked, pattern = params["stack"]["layers"], len(windows)
    layers = {}
    for i in range(spec.layers):
        block = stacked if pattern == 1 else stacked[f"block_{i % pattern}"]
        # The pattern of windows is now as long as the stack: its only round stays as a leading axis.
        layers[f"block_{i}"] = jax.tree.map(lambda x, i=i: x[i // pattern][None], block)
    apart = dataclasses.replace(spec, windows=windows * (spec.layers // pattern), unroll=1)
    return GPT(apart), {**params, "stack": {**params["stack"], "layers": layers}}
