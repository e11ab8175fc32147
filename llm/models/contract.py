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
    the keys of `llm.data.objectives`; apply({"params": p}, hidden_BTD, method="unembed") -> float32 logits_BTV.
    """

    @property
    def spec(self) -> Any:
        """The family's settings."""
        ...

    @property
    def unembedding(self) -> tuple[str, ...]:
        """Names of the top-level parameters that `unembed` reads."""
        ...

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's init."""
        ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's apply."""
        ...

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty cache for `batch` rows of at most `length` tokens."""
        ...

    def flops_per_token(self, params: Any, length: int) -> float:
        """Floating-point operations of the forward pass a token, in rows of `length`."""
        ...
