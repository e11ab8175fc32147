"""What every family of models looks like from outside."""

from typing import Any, Protocol

import flax.struct
import jax


@flax.struct.dataclass
class Output:
    """hidden_BTD, the last hidden states; the advanced cache (None without one); `aux`, named extra losses."""

    hidden_BTD: jax.Array
    cache: Any = None
    aux: dict[str, tuple[jax.Array, jax.Array]] = flax.struct.field(default_factory=dict)


class Model(Protocol):
    """A linen module of a family.

    apply({"params": p}, batch, cache=None, train=False, rngs={"dropout": key}) -> Output, where batch is a dict with
    the keys of `llm.data.objectives`. Its heads are methods of their own, apply({"params": p}, ..., method=name), of
    which a family has those that its objectives (`llm.models.FAMILIES`) need:

        unembed(hidden) -> float32 logits over the vocabulary, for any shape (..., D)
        classify(hidden_BTD, batch, train=False) -> float32 logits_BC
        next_sentence(hidden_BTD, batch) -> float32 logits_B2; 1 is "goes on"
        spans(hidden_BTD) -> float32 (starts_BT, ends_BT), logits of the answer's first and last place
        sentence(hidden_BTD, batch) -> float32 vectors_BD of length 1
    """

    @property
    def spec(self) -> Any:
        """The family's settings; `spec.context` is the longest row, None where there is no limit."""
        ...

    @property
    def unembedding(self) -> tuple[str, ...]:
        """Names of the top-level parameters that `unembed` reads."""
        ...

    @property
    def carries(self) -> bool:
        """Whether training hands the cache of one batch to the next (truncated back-propagation)."""
        ...

    @property
    def reads_source(self) -> bool:
        """Whether it generates from a source (source_tokens) rather than by continuing a row."""
        ...

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's init."""
        ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's apply."""
        ...

    def init_cache(self, batch: int, length: int, source_length: int = 0, chunk: int | None = None) -> Any:
        """An empty cache for `batch` rows of at most `length` tokens, and sources of `source_length`.

        A call adds at most `chunk` tokens to a row, all `length` where it is None: the fewer, the less a layer with a
        window has to keep. `lengths_B` counts the tokens of each row so far, without padding, which may stand before or
        after those of a call. The arrays of `layers` have the rows at axis 1, all others at axis 0; a `KVCache` is
        taken back into the last call by smaller lengths alone. The first call after it gives the source, later ones do
        not.
        """
        ...

    def flops_per_token(self, params: Any, length: int) -> float:
        """Floating-point operations of the forward pass a token, in rows of `length`."""
        ...
