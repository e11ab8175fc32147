"""A first look at a model whose weights came from elsewhere: what it says to a prompt, how well it reads, how fast."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm.generation import GenerationSpec, SamplingSpec, generate
from llm.models import WRITING, Model
from llm.training import losses

# How Pride and Prejudice begins.
PARAGRAPH = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want "
    "of a wife. However little known the feelings or views of such a man may be on his first entering a "
    "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered "
    "the rightful property of some one or other of their daughters."
)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Ids of what a probe reads.

    Attributes:
        prompt, paragraph: without special tokens.
        opening: before a text that goes on.
        end_of_text, start: close a source, open a decoder's row.
        cls, sep, mask: of an encoder's row; None where the tokenizer has none.
    """

    prompt: Sequence[int]
    paragraph: Sequence[int]
    opening: Sequence[int]
    end_of_text: int
    start: int
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None


def probe(
    model: Model,
    params: Any,
    kind: str,
    texts: Texts,
    generation: GenerationSpec,
    vocab_size: int,
    decode: Callable[[Sequence[int]], str],
) -> list[tuple[str, str]]:
    """(name, value) rows to print.

    Args:
        model, params: of the run.
        kind: its objective.
        texts: what it reads; those beyond its context are cut.
        generation: what is never written, and what ends a text.
        vocab_size: ids that the tokenizer knows.
        decode: ids -> text.
    """
    if kind in WRITING:
        return _writing(model, params, texts, generation, vocab_size, decode)
    row = [i for i in (texts.cls, *texts.paragraph[: (model.spec.context or 512) - 2], texts.sep) if i is not None]
    if kind == "masked" and texts.mask is not None:
        return _masked(model, params, texts.mask, row, vocab_size, decode)
    forward = jax.jit(lambda p, tokens: model.apply({"params": p}, {"tokens": tokens}).hidden_BTD)
    _, seconds = _timed(lambda: forward(params, jnp.asarray([row])))
    return [("tokens/s", f"{len(row) / seconds:,.0f} reading {len(row)}")]


def _writing(model, params, texts: Texts, generation: GenerationSpec, vocab_size: int, decode) -> list[tuple[str, str]]:
    context, new, asked = model.spec.context, 32, texts.prompt
    if context is not None:
        new = min(new, context // 2)
        asked = asked[: max(context - new - len(texts.opening), 1)]
    source = [[*asked, texts.end_of_text]] if model.reads_source else None
    prompt = [texts.start] if model.reads_source else [*texts.opening, *asked]

    def write(tokens: int) -> list[int]:
        return generate(
            model, params, [prompt], tokens, generation.allowing(SamplingSpec(0.0)), context=context,
            vocab_size=vocab_size, end_of_text=generation.all_ends(texts.end_of_text), sources=source,
        )[0]  # fmt: skip

    written, whole = _timed(lambda: write(new))
    _, first = _timed(lambda: write(1))
    rate = (len(written) - 1) / max(whole - first, 1e-9) if len(written) > 1 else 0.0
    nats, count = _nats(model, params, texts)
    return [
        ("writes", repr(decode(written))),
        ("tokens/s", f"{rate:,.1f} writing {len(written)} after {len(prompt)}"),
        ("perplexity", f"{np.exp(nats / count):.2f} of a paragraph of {count} predicted tokens"),
    ]


def _nats(model, params, texts: Texts) -> tuple[float, int]:
    """The paragraph's nats and predicted tokens; a model that reads a source is given the paragraph as its source."""
    context = model.spec.context
    ids = list(texts.paragraph)
    row = [texts.start, *ids, texts.end_of_text] if model.reads_source else [*texts.opening, *ids]
    row = row if context is None else row[:context]
    batch = {"tokens": jnp.asarray([row[:-1]])}
    if model.reads_source:
        source = [*ids, texts.end_of_text]
        batch["source_tokens"] = jnp.asarray([source if context is None else source[:context]])

    def nats(params, batch, targets_T):
        hidden_TD = model.apply({"params": params}, batch).hidden_BTD[0]
        logits_TV = model.apply({"params": params}, hidden_TD, method="unembed")
        return losses.cross_entropy(logits_TV, targets_T).sum()

    return float(jax.jit(nats)(params, batch, jnp.asarray(row[1:]))), len(row) - 1


def _masked(model, params, mask: int, row: list[int], vocab_size: int, decode) -> list[tuple[str, str]]:
    """Masks each place but the ends by itself, all of them as one batch."""
    places = np.arange(1, len(row) - 1)
    tokens_BT = np.tile(np.asarray(row, np.int32), (len(places), 1))
    tokens_BT[np.arange(len(places)), places] = mask

    @jax.jit
    def fill(params, tokens_BT, places_B):
        hidden_BTD = model.apply({"params": params}, {"tokens": tokens_BT}).hidden_BTD
        at_BD = hidden_BTD[jnp.arange(len(places_B)), places_B]
        return model.apply({"params": params}, at_BD, method="unembed")[:, :vocab_size]

    logits_BV, seconds = _timed(lambda: fill(params, jnp.asarray(tokens_BT), jnp.asarray(places)))
    truth_B = np.asarray(row)[places]
    found_B = np.asarray(logits_BV).argmax(-1)
    nats = float(losses.cross_entropy(logits_BV, jnp.asarray(truth_B)).mean())
    return [
        ("fills", f"{int((found_B == truth_B).sum())} of {len(places)} masked tokens: {decode(found_B.tolist())!r}"),
        ("tokens/s", f"{tokens_BT.size / seconds:,.0f} reading {tokens_BT.shape[0]} rows of {tokens_BT.shape[1]}"),
        ("perplexity", f"{np.exp(nats):.2f} a masked token"),
    ]


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the seconds of a second call: the first compiles."""
    jax.block_until_ready(function())
    began = time.perf_counter()
    found = jax.block_until_ready(function())
    return found, time.perf_counter() - began
