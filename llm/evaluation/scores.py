"""The scores of a run over its validation set: what they are depends on its objective.

Every example counts once, whatever the batch size and the number of devices, and has a record of its own; of what is
scored by its loss alone an example is a row, and its record the row's loss and tokens.

    causal, continuation              loss, perplexity, bits per byte
    masked, prefix, span_corruption   loss, perplexity
    seq2seq                           these, and BLEU, chrF and exact match of what greedy decoding writes
    classification                    loss, accuracy, precision, recall and F1, the confusion matrix
    span_qa                           loss, exact match and F1 of the answers
    chat                              loss and perplexity of the assistant's tokens; greedy answers that match exactly
    preference                        loss, accuracy, margin and rewards
    contrastive                       recall of a text's own source among all sources, and the mean reciprocal rank
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llm.data import Dataset, Prepared, conversations
from llm.data.preparation import specials
from llm.evaluation import perplexity as perplexities
from llm.evaluation import preferences
from llm.evaluation.bootstrap import mean_interval
from llm.evaluation.classification import classification_scores
from llm.evaluation.spans import answer_scores, best_span
from llm.evaluation.spec import EvaluationSpec
from llm.evaluation.translation import translation_scores
from llm.generation import GenerationSpec, SamplingSpec, generate
from llm.models import Model
from llm.sharding import hosts
from llm.training.step import put_batch

Progress = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Scores:
    """numbers: by name, as they stand in summary.json; records: one an example, in order; classes: their names."""

    numbers: dict[str, Any]
    records: list[dict[str, Any]]
    classes: tuple[str, ...] = ()


class Scorer:
    """Scores of one model on one validation set, compiled once.

    Args:
        model: of the run.
        objective: its kind.
        prepared: its data.
        spec: how to evaluate.
        loss_chunk: as in training.
        mesh: to evaluate on.
        generation: which ids end what is written, which are never written, and the longest answer in a chat.
        beta: of preferences.
    """

    def __init__(
        self,
        model: Model,
        objective: str,
        prepared: Prepared,
        spec: EvaluationSpec,
        loss_chunk: int | None,
        mesh: jax.sharding.Mesh,
        generation: GenerationSpec = GenerationSpec(),
        beta: float = 0.1,
    ):
        self._generation, self._beta = generation, beta
        self._pairs = preferences.compile_pairs(model, loss_chunk)
        self._model, self._objective, self._prepared, self._spec, self._mesh = model, objective, prepared, spec, mesh
        self._rows = perplexities.compile_row_losses(model, loss_chunk, objective)
        self._heads = {
            name: jax.jit(lambda params, batch, name=name, row=row: self._head(params, batch, name, row))
            for name, row in (("classify", True), ("spans", False), ("sentence", True))
        }

    @property
    def rows(self) -> int:
        """Rows of the validation set."""
        return len(self._prepared.validation)

    def loss(self, params, limit: int | None, progress: Progress = lambda rows: None) -> dict[str, float]:
        """What is looked at along a run, over `limit` rows: the loss, and the accuracy where there is one."""
        if self._objective == "classification":
            logits_EC, labels_E = self._logits(params, limit, progress)
            return {"loss": _nats(logits_EC, labels_E).mean(), "accuracy": _right(logits_EC, labels_E).mean()}
        if self._objective == "preference":
            found = self._preferred(params, limit, progress).numbers
            return {name: found[name] for name in ("loss", "accuracy", "margin")}
        return {"loss": perplexities.mean_loss(*self._row_sums(params, limit, progress))}

    def scores(self, params, progress: Progress = lambda rows: None) -> Scores:
        """All scores over all rows."""
        kind = self._objective
        if kind == "classification":
            return self.of_logits(*self._logits(params, None, progress))
        if kind == "contrastive":
            return self._retrieval(params, progress)
        if kind == "preference":
            return self._preferred(params, None, progress)
        sums = self._row_sums(params, None, progress)
        found = dataclasses.asdict(perplexities.perplexity(*sums, self._prepared.validation.text_bytes))
        if kind not in ("causal", "continuation"):
            # Only these two predict all of the text once.
            found = {name: value for name, value in found.items() if name not in ("bits_per_byte", "bytes")}
        if kind == "seq2seq":
            written = self._written(params)
            return Scores(found | written.numbers, written.records)
        if kind == "chat":
            answered = self._answered(params)
            return Scores(found | answered.numbers, answered.records)
        if kind == "span_qa":
            answers = self._answers(params)
            return Scores({"loss": found["loss"]} | answers.numbers, answers.records)
        return Scores(found, perplexities.records(*sums))

    def logits(self, params, progress: Progress = lambda rows: None) -> tuple[np.ndarray, np.ndarray]:
        """(float64 log-probabilities_EC, labels_E) of every example of a classification."""
        return self._logits(params, None, progress)

    def of_logits(self, logits_EC: np.ndarray, labels_E: np.ndarray) -> Scores:
        """The scores of log-probabilities, of one model or the mean of several."""
        classes = tuple(self._prepared.labels)
        predictions_E = logits_EC.argmax(-1)
        found = classification_scores(labels_E, predictions_E, classes)
        records = [
            {
                "example": number,
                "label": classes[label],
                "prediction": classes[predicted],
                "log_probabilities": [round(float(x), 5) for x in row],
            }
            for number, (label, predicted, row) in enumerate(zip(labels_E, predictions_E, logits_EC))
        ]
        numbers = {"loss": float(_nats(logits_EC, labels_E).mean())} | dataclasses.asdict(found)
        return Scores(numbers, records, classes)

    def _row_sums(self, params, limit: int | None, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        batch_size = self._spec.batch_size
        return perplexities.row_sums(
            self._rows, params, self._prepared.validation, batch_size, self._mesh, limit, progress
        )

    def _head(self, params, batch: dict, name: str, reads_batch: bool):
        hidden_BTD = self._model.apply({"params": params}, batch).hidden_BTD
        arguments = (hidden_BTD, batch) if reads_batch else (hidden_BTD,)
        return self._model.apply({"params": params}, *arguments, method=name)

    def _batches(self, limit: int | None = None):
        return perplexities.batches(self._prepared.validation, self._spec.batch_size, self._mesh, limit)

    def _logits(self, params, limit: int | None, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        logits, labels = [], []
        for batch, real in self._batches(limit):
            found = hosts.fetch(self._heads["classify"](params, put_batch(self._mesh, batch)))[:real]
            logits.append(found.astype(np.float64))
            labels.append(batch["labels"][:real])
            progress(real)
        logits_EC = np.concatenate(logits)
        logits_EC -= np.logaddexp.reduce(logits_EC, axis=-1, keepdims=True)
        return logits_EC, np.concatenate(labels)

    def _written(self, params) -> Scores:
        """Greedy decoding of every source, held against its target as the tokenizer writes it."""
        tokenizer = self._prepared.tokenizer
        special = specials(tokenizer)
        records = []
        for batch, real in self._batches():
            sources = [row[seen != 0].tolist() for row, seen in zip(batch["source_tokens"], batch["source_segments"])]
            targets = [row[seen != 0].tolist() for row, seen in zip(batch["targets"], batch["segments"])]
            length = self._prepared.validation.row_length
            written = self._greedy(params, [[special.start]] * real, length, sources=sources[:real])
            for source, target, ids in zip(sources, targets, written):
                closed = target[:-1] if target and target[-1] == tokenizer.end_of_text else target
                texts = (tokenizer.decode(ids) for ids in (source[:-1], closed, ids))
                records.append(dict(zip(("source", "reference", "hypothesis"), texts), example=len(records)))
        hypotheses = [record["hypothesis"] for record in records]
        references = [record["reference"] for record in records]
        found = dataclasses.asdict(translation_scores(hypotheses, references, language=self._spec.language))
        each = found.pop("sentence_bleu")
        exact = [float(h == r) for h, r in zip(hypotheses, references)]
        for record, bleu, same in zip(records, each, exact):
            record.update(sentence_bleu=round(bleu, 3), exact_match=same)
        return Scores(found | {"exact_match": float(np.mean(exact))}, records)

    def _greedy(self, params, prompts, limits, ends: tuple[int, ...] = (), sources=None) -> list[list[int]]:
        """What greedy decoding writes after each prompt, up to the tokenizer's own end or one of `ends`."""
        tokenizer = self._prepared.tokenizer
        return generate(
            self._model,
            params,
            prompts,
            limits,
            self._generation.allowing(SamplingSpec(temperature=0.0)),
            context=self._model.spec.context,
            vocab_size=tokenizer.vocab_size,
            end_of_text=(*self._generation.all_ends(tokenizer.end_of_text), *ends),
            sources=sources,
        )

    def _preferred(self, params, limit: int | None, progress: Progress) -> Scores:
        """Every pair of answers, against the log-probabilities of the run that was started from."""
        found_N2, reference_N2 = preferences.log_probabilities(
            self._pairs, params, self._prepared.validation, self._spec.batch_size, self._mesh, limit, progress
        )
        assert reference_N2 is not None, "the data have no reference (preferences.with_reference)"
        rewards_N2 = self._beta * (found_N2.astype(np.float64) - reference_N2)
        records = [
            {"example": n, "chosen_reward": round(float(chosen), 5), "rejected_reward": round(float(rejected), 5)}
            for n, (chosen, rejected) in enumerate(rewards_N2)
        ]
        return Scores(preferences.scores(found_N2, reference_N2, self._beta), records)

    def _answered(self, params) -> Scores:
        """What greedy decoding answers to every turn of a user, after all that the conversation says before it."""
        tokenizer, context = self._prepared.tokenizer, self._model.spec.context
        validation = self._prepared.validation
        datasets = [validation] if isinstance(validation, Dataset) else validation.datasets
        records, asked = [], []
        conversations_ = (data.shards for data in datasets)
        numbered = enumerate((shards, n) for shards in conversations_ for n in range(len(shards)))
        for conversation, (shards, n) in numbered:
            for turn, (prompt, answer) in enumerate(conversations.answers(shards, n)):
                asked.append(prompt)
                records.append({"conversation": conversation, "turn": turn, "prompt": tokenizer.decode(prompt),
                                "reference": tokenizer.decode(answer)})  # fmt: skip
        ends = () if tokenizer.end_of_turn is None else (tokenizer.end_of_turn,)
        # Prompts of similar length together: they share a compilation, and none waits for a longer one.
        order = sorted(range(len(asked)), key=lambda place: len(asked[place]))
        for start in range(0, len(order), self._spec.batch_size):
            places = order[start : start + self._spec.batch_size]
            filled = places + places[:1] * (self._spec.batch_size - len(places))
            longest = self._generation.max_tokens
            limits = [longest if context is None else min(longest, context - len(asked[place])) for place in filled]
            written = self._greedy(params, [asked[place] for place in filled], limits, ends)
            for place, ids in zip(places, written):
                records[place]["answer"] = tokenizer.decode(ids)
        exact = [float(record["answer"].strip() == record["reference"].strip()) for record in records]
        for record, same in zip(records, exact):
            record["exact_match"] = same
        numbers = {"answers": len(exact), "exact_match": float(np.mean(exact)),
                   "exact_match_interval": mean_interval(exact)}  # fmt: skip
        return Scores(numbers, records)

    def _answers(self, params) -> Scores:
        """The best span of every question, of all windows over its text, held against the right one.

        Both as the tokenizer writes them; a question has no answer where no window has one.
        """
        tokenizer = self._prepared.tokenizer
        records: list[dict[str, Any]] = []
        best = 0.0
        for batch, real in self._batches():
            starts, ends = hosts.fetch(self._heads["spans"](params, put_batch(self._mesh, batch)))
            names = ("tokens", "segments", "types", "offsets", "starts", "ends", "windows")
            fields = (batch[name][:real] for name in names)
            for row, (tokens, segments, types, offset, first, last, window) in enumerate(zip(*fields)):
                # The context's tokens are of the second field; what closes it is no part of an answer.
                length = int(((types == 1) & (segments != 0)).sum()) - (tokenizer.sep is not None)
                span = best_span(
                    starts[row : row + 1], ends[row : row + 1], [offset], [length], self._spec.answer_tokens
                )[0]
                if window == 0:
                    records.append({"example": len(records), "answer": "", "prediction": "", "windows": 0})
                    best = 0.0
                record = records[-1]
                record["windows"] += 1
                if first:
                    record["answer"] = tokenizer.decode(tokens[first : last + 1].tolist())
                if span is not None and span.score > best:
                    best = span.score
                    record["prediction"] = tokenizer.decode(tokens[span.start : span.end + 1].tolist())
        found = dataclasses.asdict(answer_scores([r["prediction"] for r in records], [[r["answer"]] for r in records]))
        for record, exact, f1 in zip(records, found.pop("exact_match_each"), found.pop("f1_each")):
            record.update(exact_match=exact, f1=f1)
        return Scores(found, records)

    def _retrieval(self, params, progress: Progress) -> Scores:
        """The rank of every text's own source among all sources, by cosine."""
        sides: tuple[list, list] = [], []
        for batch, real in self._batches():
            source = {name.removeprefix("source_"): x for name, x in batch.items() if name.startswith("source_")}
            for side, part in zip(sides, (batch, source)):
                side.append(hosts.fetch(self._heads["sentence"](params, put_batch(self._mesh, part)))[:real])
            progress(real)
        texts_ED, sources_ED = (np.concatenate(side).astype(np.float64) for side in sides)
        cosines_EE = texts_ED @ sources_ED.T
        own_E = np.diag(cosines_EE)
        # Ties count against it: a model that gives all texts one vector finds nothing.
        ranks_E = (cosines_EE >= own_E[:, None]).sum(-1)
        numbers: dict[str, Any] = {"examples": len(ranks_E)}
        for k in (1, 5, 20):
            numbers[f"recall_at_{k}"] = float((ranks_E <= k).mean())
        numbers["recall_at_1_interval"] = mean_interval((ranks_E <= 1).astype(float))
        numbers["mean_reciprocal_rank"] = float((1 / ranks_E).mean())
        return Scores(numbers, [{"example": e, "rank": int(rank)} for e, rank in enumerate(ranks_E)])


def _nats(log_probabilities_EC: np.ndarray, labels_E: np.ndarray) -> np.ndarray:
    return -log_probabilities_EC[np.arange(len(labels_E)), labels_E]


def _right(log_probabilities_EC: np.ndarray, labels_E: np.ndarray) -> np.ndarray:
    return (log_probabilities_EC.argmax(-1) == labels_E).astype(np.float64)
