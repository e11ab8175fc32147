"""The recurrent language model and classifier: LSTM, GRU or vanilla layers (Mikolov 2010; Zaremba et al. 2014)."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from llm.errors import InputError
from llm.models import checks, flops
from llm.models.contract import Output
from llm.models.rows import segments_of
from llm.nn.embed import Embed
from llm.nn.pool import POOLINGS, ClassHead, pool
from llm.nn.projection import Projection
from llm.nn.recurrent import CELLS, Recurrent
from llm.nn.remat import rematerialised
from llm.sharding import constrain


@dataclasses.dataclass(frozen=True)
class RNNSpec:
    """The settings of a recurrent network.

    Attributes:
        vocab_size: entries of the token table; None takes the tokenizer's.
        cell: "lstm", "gru" or "vanilla".
        layers, width: L and D, of the embeddings and of every layer's state.
        bidirectional: half of each layer reads backwards; for classification alone.
        carry: the state at the end of a training batch begins the next (truncated back-propagation through time).
            Wants data.order="stream", in which a row goes on where the same row of the batch before ended.
        tied: the unembedding is the token table.
        classes: of the classification head; None takes the data's.
        pooling: "mean", "max", "first" or "last" over the text's real tokens.
        bag: above 0, the classification head also reads the bag of the text's tokens (`llm.nn.pool.BagOfWords`), in
            features of that length.
        bag_pairs: entries of the bag for pairs of neighbouring tokens; 0 has single tokens alone.
        dropout: of every layer's input and of the output, one mask a row for all times.
        recurrent_dropout: of the state that the recurrent map reads, likewise.
        dtype: compute dtype of all products but the recurrent one; states are float32.
        unroll, remat: layers that one round of the loop over them holds, and as in `llm.nn.remat`.
    """

    vocab_size: int | None = None
    cell: str = "lstm"
    layers: int = 2
    width: int = 256
    bidirectional: bool = False
    carry: bool = False
    tied: bool = True
    classes: int | None = None
    pooling: str = "mean"
    bag: float = 0.0
    bag_pairs: int = 0
    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    dtype: str = "float32"
    unroll: int = 1
    remat: str = ""

    def __post_init__(self):
        checks.at_least_one(self, "vocab_size", "layers", "width", "classes", "unroll")
        checks.divides(self, "unroll", "layers")
        checks.among(self, cell=tuple(CELLS), pooling=POOLINGS)
        checks.rates(self, "dropout", "recurrent_dropout")
        checks.bag(self)
        if self.bidirectional and self.width % 2:
            raise InputError(f"model.width={self.width}: two directions share it, so it must be even")
        if self.bidirectional and self.carry:
            raise InputError("model.carry=True: a bidirectional network has no state to hand on; set it to False")

    @property
    def context(self) -> None:
        """A state has no end."""
        return None


@flax.struct.dataclass
class RecurrentState:
    """The state of all layers: arrays of shape (L, B, D), the outputs first; tokens seen by each row, lengths_B."""

    layers: tuple[jax.Array, ...]
    lengths_B: jax.Array


class _Layer(nn.Module):
    """`Recurrent` as nn.scan wants it: the row is carried, the rest broadcast."""

    settings: dict[str, Any]

    @nn.compact
    def __call__(self, x_BTD, start_BT, real_BT, state):
        return Recurrent(**self.settings, name="cell")(x_BTD, start_BT, real_BT, state)


class RNN(nn.Module):
    """Recurrent layers over batch["tokens"].

    A document of a packed row begins from a zero state. Padding leaves the state as it is and gives zeros.
    """

    spec: RNNSpec

    def setup(self):
        s = self.spec
        if s.vocab_size is None:
            raise ValueError("RNNSpec.vocab_size is None: take it from the tokenizer before building the model")
        dtype = jnp.dtype(s.dtype)
        self.embed = Embed(s.vocab_size, s.width, stddev=0.1, dtype=dtype)
        if not s.tied:
            self.unembedding_projection = Projection((s.width,), (s.vocab_size,), ("embed", "vocab"), dtype=dtype)
        if s.classes is not None:
            self.class_head = ClassHead(s.classes, s.dropout, s.vocab_size, s.bag, s.bag_pairs, dtype)

    @property
    def unembedding(self) -> tuple[str, ...]:
        """Names of the top-level parameters that `unembed` reads."""
        return ("embed",) if self.spec.tied else ("unembedding_projection",)

    @property
    def carries(self) -> bool:
        """Whether training hands the state of one batch to the next."""
        return self.spec.carry

    @property
    def reads_source(self) -> bool:
        """It continues a row."""
        return False

    @nn.compact
    def __call__(self, batch: dict, cache: RecurrentState | None = None, train: bool = False) -> Output:
        """The outputs of the last layer for batch["tokens"] (B, T), from the state in `cache`, or from zero.

        A state goes on into the row's first document unless batch["continues"] (B,) is 0 for the row; without that
        key it always does.
        """
        s = self.spec
        tokens_BT = batch["tokens"]
        B = tokens_BT.shape[0]
        segments_BT = segments_of(batch)
        real_BT = segments_BT != 0
        state = self.init_cache(B, 0) if cache is None else cache
        begins_B = jnp.zeros((B,), bool) if "continues" not in batch else batch["continues"] == 0
        start_BT = jnp.concatenate([begins_B[:, None], segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)
        # The row's first token, which padding may stand before, goes on from the state.
        first_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) == 1
        start_BT = jnp.where(first_BT, begins_B[:, None], start_BT) & real_BT  # padding keeps the state of what it ends
        x_BTD = constrain(self.embed(tokens_BT), "batch", "length", "activation")
        settings = dict(
            cell=s.cell, width=s.width, reverse_too=s.bidirectional, dropout=s.dropout,
            recurrent_dropout=s.recurrent_dropout, train=train, dtype=jnp.dtype(s.dtype),
        )  # fmt: skip
        body = rematerialised(_Layer, s.remat)
        scanned: Any = nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            out_axes=0,
            length=s.layers,
            unroll=s.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BTD, layers = scanned(settings, name="layers")(x_BTD, start_BT, real_BT, state.layers)
        x_BTD = nn.Dropout(s.dropout, broadcast_dims=(1,), deterministic=not train)(x_BTD)
        lengths_B = state.lengths_B + real_BT.sum(-1, dtype=jnp.int32)
        return Output(x_BTD, None if cache is None else RecurrentState(layers, lengths_B))

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 logits_BTV of hidden states."""
        if self.spec.tied:
            return self.embed.logits(hidden_BTD)
        return self.unembedding_projection(hidden_BTD).astype(jnp.float32)

    def classify(self, hidden_BTD: jax.Array, batch: dict, train: bool = False) -> jax.Array:
        """float32 logits_BC of the pooled rows."""
        assert self.spec.classes is not None, "the classes are taken from the data before the model is built"
        real_BT = segments_of(batch) != 0
        return self.class_head(pool(hidden_BTD, real_BT, self.spec.pooling), batch["tokens"], real_BT, train)

    def init_cache(self, batch: int, length: int, source_length: int = 0, chunk: int | None = None) -> RecurrentState:
        """The zero state of `batch` rows: it has one size whatever the lengths, and there is no source."""
        del length, source_length, chunk
        s = self.spec
        arrays = tuple(jnp.zeros((s.layers, batch, s.width), jnp.float32) for _ in range(CELLS[s.cell].states))
        return RecurrentState(arrays, jnp.zeros((batch,), jnp.int32))

    def flops_per_token(self, params, length: int) -> float:
        """Floating-point operations of the forward pass a token; rows of any `length` cost alike."""
        del length
        return flops.products(params, () if self.spec.tied else ("embed",))
