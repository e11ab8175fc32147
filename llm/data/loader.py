"""Batches from prepared data. `batch = f(seed, step)`: the loader holds no state that a checkpoint would need.

Rows come in a fresh pseudo-random order every epoch, none dropped where epochs meet. What an objective draws at random
is keyed by seed, epoch and row, so any number of hosts sees the same global batch.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from llm.data import answers, conversations, messages, objectives, pack, packed
from llm.data.augment import augment
from llm.data.objectives import Specials
from llm.data.permutation import permute
from llm.data.shards import Shards
from llm.data.spec import ObjectiveSpec
from llm.errors import InputError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Rows of token shards as an objective sees them.

    Attributes:
        plan: the packed rows; None makes each document an example of its own.
        lengths: (examples,) the padded length that each example needs; empty where rows are packed.
        buckets: lengths that unpacked batches are padded to, ascending.
        classes: how many classes labels name.
        training: whether examples are augmented.
        reference: (examples, 2) what the "preference" objective compares with, once it is known.
    """

    shards: Shards
    plan: pack.Plan | None
    objective: ObjectiveSpec
    specials: Specials
    row_length: int
    buckets: tuple[int, ...]
    classes: int
    training: bool
    lengths: np.ndarray
    reference: np.ndarray | None = None

    @classmethod
    def open(
        cls,
        shards: Shards,
        plan: pathlib.Path | None,
        objective: ObjectiveSpec,
        specials: Specials,
        *,
        row_length: int,
        buckets: tuple[int, ...] = (),
        classes: int = 0,
        training: bool = True,
    ) -> "Dataset":
        """The rows that a plan's file packs, or every document as an example.

        Raises:
            InputError: the objective needs a special token that the tokenizer lacks, or data packed another way.
        """
        objectives.require(
            objective,
            specials,
            packed=plan is not None,
            fields=shards.fields,
            classes=classes,
            row_length=row_length,
        )
        if objective.kind == "masked" and objective.next_sentence and len(shards) < 2:
            raise InputError(
                "objective.next_sentence takes every other sentence from another example: there is only one"
            )
        if objective.kind == "span_qa" and shards.label_names != answers.LABELS:
            raise InputError(
                f"objective.kind='span_qa' needs the labels {', '.join(answers.LABELS)}, the data have "
                f"{', '.join(shards.label_names) or 'none'}: prepare them anew, with data.answer"
            )
        lengths = np.zeros(0, np.int64)
        if plan is None:
            lengths = np.minimum(objectives.longest(objective, shards.lengths(), specials), row_length)
        loaded = None if plan is None else pack.Plan.load(plan)
        return cls(
            shards, loaded, objective, specials, row_length, buckets or (row_length,), classes, training, lengths
        )

    def __len__(self) -> int:
        return len(self.shards) if self.plan is None else len(self.plan)

    @property
    def tokens(self) -> int:
        """Targets of all packed rows, or tokens of all examples."""
        return self.shards.tokens if self.plan is None else self.plan.tokens

    @property
    def text_bytes(self) -> int:
        """Bytes of the text that the rows encode."""
        return self.shards.text_bytes

    def bucket(self, rows: np.ndarray) -> int:
        """The shortest bucket that holds these examples."""
        longest = int(self.lengths[rows].max(initial=1))
        return next(bucket for bucket in self.buckets if bucket >= longest)

    def rows(
        self,
        indices: np.ndarray,
        seed: int,
        epochs: np.ndarray | np.integer,
        length: int | None = None,
        context: bool = False,
    ) -> Batch:
        """The batch of these rows, each drawn by (seed, its epoch, itself).

        Args:
            indices: (B,) rows.
            seed: of everything random.
            epochs: (B,) or one number.
            length: padded length of unpacked examples; their bucket by default.
            context: puts what each packed row's first document said before it in front of "causal" rows.
        """
        kind, spec, specials = self.objective.kind, self.objective, self.specials
        epochs = np.broadcast_to(epochs, np.shape(indices))
        # Nothing is drawn for next-token prediction of packed rows, so no generator is made.
        still = kind in ("causal", messages.CHAT, *objectives.FOLLOWING) and self.plan is not None
        rngs = [] if still else [_generator(seed, int(e), int(i)) for e, i in zip(epochs, indices)]
        if self.plan is not None and kind == messages.CHAT:
            batch = conversations.rows(self.plan, self.shards, indices, specials.fill)
        elif self.plan is not None:
            rows = pack.rows(self.plan, self.shards, indices, specials.end_of_text, specials.opening)
            if still:
                batch = objectives.causal(rows["tokens"], rows["targets"], rows["segments"], rows["positions"])
                if kind == "continuation":
                    batch = packed.continuation(batch, *self.before(indices))
                elif context:
                    batch = packed.with_context(batch, *self.before(indices))
            else:
                batch = objectives.PACKED[kind](rows["tokens"], rows["targets"], rows["segments"], spec, specials, rngs)
        else:
            examples = [self._example(int(i), rng) for i, rng in zip(indices, rngs)]
            labels = self.shards.labels(np.asarray(indices))
            length = self.bucket(np.asarray(indices)) if length is None else length
            more = {}
            if spec.next_sentence and kind == "masked":
                more = {"others": [self._other(int(i), rng) for i, rng in zip(indices, rngs)]}
            batch = objectives.UNPACKED[kind](examples, labels, length, spec, specials, rngs, **more)
        if self.reference is not None:
            batch["reference"] = self.reference[np.asarray(indices)]
        objectives.check(batch, specials.vocab_size, self.classes)
        return batch

    def with_reference(self, reference: np.ndarray) -> "Dataset":
        """The same rows, each with its reference, (examples, 2)."""
        return dataclasses.replace(self, reference=np.asarray(reference, np.float32))

    def _other(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Any example but this one, from the whole split, so that it does not depend on the batch."""
        other = int(rng.integers(len(self) - 1))
        return self._example(other + (other >= index), rng)

    def _example(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        found = tuple(self.shards.sequence(index, field) for field in range(len(self.shards.fields)))
        spec = self.objective
        if not self.training or not spec.augment:
            return found
        # The source is augmented, never the target that is learned.
        kept = found[1:] if spec.kind == "seq2seq" else ()
        changed = found[:1] if spec.kind == "seq2seq" else found
        starts = self.specials.starts_word
        return (*(augment(ids, spec.augment, spec.augment_rate, rng, starts) for ids in changed), *kept)

    def batch(self, seed: int, step: int, batch_size: int, mine: np.ndarray) -> Batch:
        """As `batch_at`."""
        if self.objective.stream:
            return self._stream(seed, step, batch_size, mine)
        if self.plan is not None:
            indices, epochs = self.walk(step * batch_size + mine, seed)
            return self.rows(indices, seed, epochs)
        epoch, number = divmod(step, -(-len(self) // batch_size))
        members, length = bucket_plan(self, seed, epoch, batch_size).batch(number)
        there = members[mine[mine < len(members)]]
        return filled(self.rows(there, seed, np.int64(epoch), length), len(mine))

    def _stream(self, seed: int, step: int, batch_size: int, mine: np.ndarray) -> Batch:
        """Each row of the batch walks its own stretch of the text; the shorter ones end an epoch with an empty row."""
        starts = np.arange(batch_size + 1) * len(self) // batch_size
        epoch, within = divmod(step, -(-len(self) // batch_size))
        indices = (starts[:-1] + within)[mine]
        there = indices < starts[1:][mine]
        indices = np.where(there, indices, 0)
        batch = self.rows(indices, seed, np.int64(epoch))
        batch = {key: value * there[:, None].astype(value.dtype) for key, value in batch.items()}
        return batch | {"continues": (there & (within > 0) & self._goes_on(indices)).astype(np.int32)}

    def _goes_on(self, indices: np.ndarray) -> np.ndarray:
        """Whether a packed row begins within a document, bool."""
        assert self.plan is not None
        return self.plan.start[self.plan.splits[indices]] > 0

    def before(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, segments) of the rows before these: segment 1 where they tell the document that goes on."""
        assert self.plan is not None
        goes_on = self._goes_on(indices)
        rows = pack.rows(
            self.plan, self.shards, np.maximum(indices - 1, 0), self.specials.end_of_text, self.specials.opening
        )
        segments = rows["segments"]
        same = (segments == segments.max(axis=1, keepdims=True)) & (segments != 0) & goes_on[:, None]
        return rows["tokens"], same.astype(np.int32)

    def walk(self, places: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, epochs) at these places of the endless sequence of epochs."""
        epochs, within = np.divmod(places, len(self))
        indices = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _ordered(within[here], len(self), seed, int(epoch))
        return indices, epochs


@dataclasses.dataclass(frozen=True, eq=False)
class BucketPlan:
    """The batches of one epoch of unpacked examples: each example once, one padded length a batch."""

    order: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray

    def batch(self, number: int) -> tuple[np.ndarray, int]:
        """(the examples, the padded length) of a batch; only one batch of an epoch has fewer than the others."""
        return self.order[self.starts[number] : self.ends[number]], int(self.lengths[number])


@functools.lru_cache(maxsize=4)
def bucket_plan(dataset: Dataset, seed: int, epoch: int, batch_size: int) -> BucketPlan:
    """The batches of an epoch, a pure function of its arguments.

    Each bucket's examples, in a random order, are cut into batches; what is left over joins the next longer bucket, so
    an epoch has ceil(examples / batch_size) batches, in a random order.
    """
    count = len(dataset)
    shuffled = permute(np.arange(count), count, seed, epoch)
    bucket_of = np.searchsorted(dataset.buckets, dataset.lengths[shuffled])
    order, lengths = [], []
    left = np.zeros(0, np.int64)
    for number, length in enumerate(dataset.buckets):
        pool = np.concatenate([left, shuffled[bucket_of == number]])
        whole = len(pool) // batch_size * batch_size
        order.append(pool[:whole])
        lengths += [length] * (whole // batch_size)
        left = pool[whole:]
    if len(left):
        order.append(left)
        lengths.append(int(dataset.bucket(left)))
    starts = np.arange(len(lengths)) * batch_size
    ends = np.minimum(starts + batch_size, count)
    mixed = permute(np.arange(len(lengths)), len(lengths), seed + 1, epoch)
    return BucketPlan(np.concatenate(order), starts[mixed], ends[mixed], np.array(lengths)[mixed])


def _ordered(places: np.ndarray, rows: int, seed: int, epoch: int) -> np.ndarray:
    """permute(), a block of places at a time: neighbours in time are asked for one after another."""
    found = np.empty(len(places), np.int64)
    blocks = places // _BLOCK
    for block in np.unique(blocks):
        here = blocks == block
        found[here] = _order_block(rows, seed, epoch, int(block))[places[here] - block * _BLOCK]
    return found


_BLOCK = 4096


@functools.lru_cache(maxsize=32)
def _order_block(rows: int, seed: int, epoch: int, block: int) -> np.ndarray:
    return permute(np.arange(block * _BLOCK, min((block + 1) * _BLOCK, rows)), rows, seed, epoch)


def _generator(seed: int, epoch: int, row: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, row])))


def filled(batch: Batch, size: int) -> Batch:
    """The batch with rows of zeros, of weight 0 then, up to `size`."""
    short = size - len(next(iter(batch.values())))
    if not short:
        return batch
    return {key: np.pad(value, ((0, short), *((0, 0),) * (value.ndim - 1))) for key, value in batch.items()}


def batch_at(dataset, seed: int, step: int, batch_size: int, mine: np.ndarray | None = None) -> Batch:
    """The batch of one step, or some rows of it: any number of hosts shares the same global batch.

    Args:
        dataset: a Dataset or a Mixture.
        seed: of order and objective.
        step: from 0.
        batch_size: rows of the global batch.
        mine: the rows that one host has of it, ascending; None has all.
    """
    return dataset.batch(seed, step, batch_size, np.arange(batch_size) if mine is None else mine)


def sequential(dataset, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """All rows once, in order, or `limit` of them evenly spaced; the last batch is filled up with rows of weight 0.

    What an objective draws at random is drawn by seed 0, so that every evaluation sees the same.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    rows = np.linspace(0, len(dataset) - 1, count).round().astype(np.int64)
    # A model that carries a state is judged row by row all the same, each behind the row before: the result then does
    # not depend on the batch size.
    more = {"context": True} if isinstance(dataset, Dataset) and dataset.objective.stream else {}
    for start in range(0, count, batch_size):
        yield filled(dataset.rows(rows[start : start + batch_size], 0, np.int64(0), **more), batch_size)


def prefetch(make: Callable[[int], dict], steps: Iterable[int], depth: int = 2) -> Iterator[dict]:
    """make(step) for each step in order, the next `depth` under way in a thread while the caller works on this one."""
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for step in steps:
            waiting.append(pool.submit(make, step))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # A caller that stops early waits for the one under way, not for all.
        pool.shutdown(cancel_futures=True)
