"""What a layer's backward pass computes again instead of keeping it (Chen et al. 2016, arXiv 1604.06174)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

# What is kept of a layer beside its input, by name. Of a kernel nothing is: attention in one is computed again.
POLICIES: dict[str, Callable[..., bool]] = {
    "all": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
NAMES = ("", *POLICIES)


def rematerialised(layer: Any, name: str) -> Any:
    """A class of linen modules that computes again in the backward pass what `name` says.

    Args:
        layer: the class; it is scanned over.
        name: "" keeps everything; "all" computes everything again; "dots" keeps the results of matrix products,
            of attention that is no kernel its scores too; "dots_no_batch" those of projections, and no scores.
    """
    return nn.remat(layer, prevent_cse=False, policy=POLICIES[name]) if name else layer
