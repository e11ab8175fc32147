"""The settings of data preparation, a room for each: data, clean, dedup, objective."""

import dataclasses
import os

from llm.data import messages
from llm.errors import InputError


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}={value!r}: there are {', '.join(choices)}")


def _among(name: str, values: tuple[str, ...], choices: tuple[str, ...]) -> None:
    for value in values:
        _one_of(name, value, choices)


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Where the text comes from, what is held out, and how it is packed.

    Attributes:
        train: a packaged corpus by name ("austen", "r8/train"), or a path: a file, a folder, a glob; an http(s)
            address of a file; "hf:<dataset>[:<config>[:<split>]]", a Hugging Face dataset.
        more: further such sources of training documents, read after it.
        prefixes: what is written before the first field of each document, one text for `train` and one for each of
            `more`: "translate English to German: ", as T5 tells tasks apart; () for nothing.
        validation: where validation documents come from, named like `train`; "" takes them out of `train`.
        holdout: ids of the documents of `train` that are held out; only used when `validation` is "".
        split_by: how documents are held out when neither of the two above says it: "hash" keeps out whole documents
            by the hash of their text, "tail" the last part of every document.
        validation_fraction: the share that `split_by` holds out.
        form: what a record is: "text"; "chat", a conversation; "preference", two answers to one, of which the first is
            better (`llm.data.messages` has the keys). Rows hold whole conversations (`llm.data.conversations`).
        text: the name of the text in records (a JSON key, a column of csv or parquet).
        id: the name of the id in records; "" or absent gives "file:line".
        txt: what a document is in a .txt file: "file", a "line", or a "paragraph" (between blank lines).
        fields: what an example is made of: "text" alone, or names of record keys in order, ("text", "target") or
            ("question", "text").
        label: the record key of an example's class; "" for none.
        answer: for questions, the record key of the answer in the text: {"text": ..., "start": character}, or null
            where there is none. A text longer than a row is cut into overlapping windows, each an example; the best
            scored of them gives the answer.
        on_error: what to do with a record that cannot be read: "stop", or "skip", which counts it and keeps it aside.
        unit_bytes: input that is one piece of work and makes one shard a split; smaller ones occupy more workers, and
            corpora beyond 100 GB want larger ones, since every shard is mapped into memory.
        max_documents: read no more than that many documents of each source; None reads all.
        row_length: tokens in a packed row; the longest example where nothing is packed.
        packing: "concatenate" joins documents and splits the stream into rows; "best_fit" keeps documents whole where
            they fit; "whole" makes each example a row of its own, for tasks with labels or targets.
        buckets: lengths that unpacked batches are padded to, ascending, the last being `row_length`; () has that one.
        prepared: folders that llm.prepare made, in place of `train`; several are a mixture.
        weights: how often each of `prepared` is drawn from, in proportion; () by their rows.
    """

    train: str = "austen"
    more: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    validation: str = ""
    holdout: tuple[str, ...] = ()
    split_by: str = "hash"
    validation_fraction: float = 0.1
    form: str = "text"
    text: str = "text"
    id: str = "id"
    txt: str = "file"
    fields: tuple[str, ...] = ("text",)
    label: str = ""
    answer: str = ""
    on_error: str = "stop"
    unit_bytes: int = 8 * 2**20
    max_documents: int | None = None
    row_length: int = 128
    packing: str = "concatenate"
    buckets: tuple[int, ...] = ()
    prepared: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        if not self.train and not self.prepared:
            raise InputError("data.train is empty: name a packaged corpus ('austen') or a path")
        if "" in self.more or len({self.train, *self.more}) != 1 + len(self.more):
            raise InputError(f"data.more={self.more}: names of sources, each once, beside data.train={self.train!r}")
        if self.prefixes and len(self.prefixes) != 1 + len(self.more):
            raise InputError(
                f"data.prefixes={self.prefixes}: {len(self.prefixes)} texts for {1 + len(self.more)} sources; one for "
                "each of data.train and data.more, or none"
            )
        if self.prefixes and (self.validation or self.answer):
            raise InputError(
                "data.prefixes are written before documents of data.train and data.more, of which some are held out, "
                "and would move answers: leave data.validation and data.answer empty"
            )
        if self.validation and self.holdout:
            raise InputError("data.validation and data.holdout are both set: one of them says what is held out")
        _one_of("data.split_by", self.split_by, ("hash", "tail"))
        _one_of("data.txt", self.txt, ("file", "line", "paragraph"))
        _one_of("data.on_error", self.on_error, ("stop", "skip"))
        _one_of("data.packing", self.packing, ("concatenate", "best_fit", "whole"))
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"data.validation_fraction={self.validation_fraction}: must lie between 0 and 1")
        if self.row_length < 2:
            raise InputError(f"data.row_length={self.row_length}: at least 2 tokens")
        if self.unit_bytes < 1:
            raise InputError(f"data.unit_bytes={self.unit_bytes}: at least 1")
        if self.max_documents is not None and self.max_documents < 1:
            raise InputError(f"data.max_documents={self.max_documents}: at least 1, or None for all")
        if not self.fields or len(set(self.fields)) != len(self.fields) or "" in self.fields:
            raise InputError(f"data.fields={self.fields}: names of record keys, each once")
        if "text" not in self.fields:
            raise InputError(f'data.fields={self.fields}: one of them must be "text", which data.text names in records')
        self._check_form()
        if self.packing != "whole" and (len(self.fields) > 1 or self.label):
            raise InputError(
                f"data.packing={self.packing!r} packs one text a document: with data.fields={self.fields} "
                f"and data.label={self.label!r} set data.packing='whole'"
            )
        if self.answer and (len(self.fields) != 2 or self.fields[1] != "text" or self.label):
            raise InputError(
                f"data.answer={self.answer!r} needs data.fields=('question', 'text') or another first field, "
                "and no label"
            )
        if self.split_by == "tail" and not self.validation and not self.holdout and self.packing == "whole":
            raise InputError("data.split_by='tail' cuts documents, which data.packing='whole' keeps whole; take 'hash'")
        if self.buckets:
            if self.packing != "whole":
                raise InputError("data.buckets are for data.packing='whole'; packed rows have one length")
            if list(self.buckets) != sorted(set(self.buckets)) or self.buckets[-1] != self.row_length:
                raise InputError(
                    f"data.buckets={self.buckets}: ascending lengths, "
                    f"the last equal to data.row_length={self.row_length}"
                )
        if self.weights and len(self.weights) != len(self.prepared):
            raise InputError(f"data.weights={self.weights}: one for each of data.prepared={self.prepared}")
        if any(weight <= 0 for weight in self.weights):
            raise InputError(f"data.weights={self.weights}: must be positive")

    def _check_form(self) -> None:
        """Refuses what conversations have no use for."""
        _one_of("data.form", self.form, tuple(messages.PARTS))
        if self.form == messages.TEXT:
            return
        packing = {messages.CHAT: "best_fit", messages.PREFERENCE: "whole"}[self.form]
        if self.packing != packing:
            raise InputError(
                f"data.packing={self.packing!r}: data.form={self.form!r} keeps conversations whole; set {packing!r}"
            )
        unread = {"fields": ("text",), "label": "", "answer": "", "prefixes": ()}
        for name, default in unread.items():
            if getattr(self, name) != default:
                raise InputError(
                    f"data.{name}={getattr(self, name)!r}: data.form={self.form!r} does not read it; leave it at "
                    f"{default!r}"
                )
        if self.split_by == "tail" and not self.validation and not self.holdout:
            raise InputError(
                f"data.split_by='tail' cuts documents, data.form={self.form!r} keeps them whole; take 'hash'"
            )

    @property
    def example_fields(self) -> tuple[str, ...]:
        """What an example consists of in token shards."""
        return messages.FIELDS.get(self.form, self.fields)


NORMALIZATIONS = ("NFC", "NFD", "NFKC", "NFKD", "as_is")
QUALITY_RULES = ("gopher_quality", "gopher_repetition", "c4", "fineweb")
PERSONAL_DATA = ("email", "ip", "phone", "card", "national_id")


@dataclasses.dataclass(frozen=True)
class CleanSpec:
    """What is done to each document by itself.

    Attributes:
        repair: undo mojibake, text decoded by the wrong encoding (ftfy).
        normalization: the Unicode form: NFC, NFD, NFKC, NFKD or "as_is".
        markup: strip markup and boilerplate (navigation, scripts) from texts that are HTML.
        languages: ISO 639-1 codes to keep, ("en", "zh"); () keeps all and does not look.
        language_confidence: the least probability of a kept language.
        quality: published rules to hold documents against: "gopher_quality", "gopher_repetition", "c4", "fineweb".
        personal_data: kinds replaced by placeholders: "email", "ip" (global addresses), "phone", "card", "national_id".
        words: a file of words, one a line; documents that contain one are dropped. "" for none.
        min_characters: documents shorter than that after cleaning are dropped; empty ones always are.
    """

    repair: bool = True
    normalization: str = "NFC"
    markup: bool = False
    languages: tuple[str, ...] = ()
    language_confidence: float = 0.5
    quality: tuple[str, ...] = ()
    personal_data: tuple[str, ...] = ()
    words: str = ""
    min_characters: int = 1

    def __post_init__(self):
        _one_of("clean.normalization", self.normalization, NORMALIZATIONS)
        _among("clean.quality", self.quality, QUALITY_RULES)
        _among("clean.personal_data", self.personal_data, PERSONAL_DATA)
        if not 0 <= self.language_confidence <= 1:
            raise InputError(f"clean.language_confidence={self.language_confidence}: must lie between 0 and 1")
        if self.min_characters < 1:
            raise InputError(f"clean.min_characters={self.min_characters}: at least 1")
        if self.words and not os.path.isfile(self.words):
            raise InputError(f"clean.words={self.words}: there is no such file")


@dataclasses.dataclass(frozen=True)
class DedupSpec:
    """What is taken out because it stands elsewhere.

    Attributes:
        exact: drop documents whose text equals another's but for case, punctuation and blank space.
        near: drop documents that share `threshold` of their shingles with a kept one: MinHash finds candidates, the
            true Jaccard similarity decides.
        threshold: the least Jaccard similarity of near duplicates.
        shingle: words in a shingle; texts without spaces between words are counted by character.
        bands: bands of the locality-sensitive hash; with `rows` in each, a pair of similarity s is a candidate with
            probability 1 - (1 - s^rows)^bands.
        rows: signature values in a band.
        document_lines: drop a line that already stood in the same document, when it is `line_characters` or longer.
        document_paragraphs: the same for paragraphs.
        corpus_lines: drop lines that stand in more than that many documents (boilerplate); 0 keeps them.
        corpus_paragraphs: the same for paragraphs.
        line_characters: shorter lines and paragraphs are never counted as repeated.
        contamination: sources of evaluation texts; training documents that share an n-gram with one are dropped.
        contamination_ngram: words (characters in scripts without spaces) of such an n-gram.
    """

    exact: bool = True
    near: bool = False
    threshold: float = 0.8
    shingle: int = 5
    bands: int = 14
    rows: int = 8
    document_lines: bool = False
    document_paragraphs: bool = False
    corpus_lines: int = 0
    corpus_paragraphs: int = 0
    line_characters: int = 20
    contamination: tuple[str, ...] = ()
    contamination_ngram: int = 13

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise InputError(f"dedup.threshold={self.threshold}: must lie above 0 and not above 1")
        for name in ("shingle", "bands", "rows", "contamination_ngram", "line_characters"):
            if getattr(self, name) < 1:
                raise InputError(f"dedup.{name}={getattr(self, name)}: at least 1")
        for name in ("corpus_lines", "corpus_paragraphs"):
            if getattr(self, name) < 0:
                raise InputError(f"dedup.{name}={getattr(self, name)}: 0 (keep all), or a number of documents")


OBJECTIVES = (
    "causal", "masked", "span_corruption", "prefix", "continuation", "seq2seq", "classification", "span_qa",
    "contrastive", "chat", "preference",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """What is learned from the rows.

    Attributes:
        kind: "causal", "masked", "span_corruption", "prefix", "continuation" (an encoder reads the row before),
            "seq2seq", "classification", "span_qa", "contrastive", "chat" (the assistant's tokens), "preference" (one
            answer before another, against the run that is started from: Rafailov et al. 2023).
        stream: training batches follow the text: each row goes on where the same row of the batch before ended, for
            models that carry a state. For "causal".
        mask_rate: the share of tokens chosen by "masked", and corrupted by "span_corruption".
        whole_words: "masked" chooses all pieces of a word together.
        next_sentence: "masked" makes pairs, half of them consecutive, half from two documents (BERT).
        mean_span: the mean length of corrupted spans.
        augment: EDA operations on the tokens of unpacked training examples, any of "swap", "delete", "repeat".
        augment_rate: the share of tokens each of them touches.
    """

    kind: str = "causal"
    stream: bool = False
    mask_rate: float = 0.15
    whole_words: bool = False
    next_sentence: bool = False
    mean_span: float = 3.0
    augment: tuple[str, ...] = ()
    augment_rate: float = 0.1

    def __post_init__(self):
        _one_of("objective.kind", self.kind, OBJECTIVES)
        if self.stream and self.kind != "causal":
            raise InputError(f"objective.stream=True is for 'causal', objective.kind={self.kind!r}; set it to False")
        _among("objective.augment", self.augment, ("swap", "delete", "repeat"))
        if not 0 < self.mask_rate < 1:
            raise InputError(f"objective.mask_rate={self.mask_rate}: must lie between 0 and 1")
        if not 0 <= self.augment_rate < 1:
            raise InputError(f"objective.augment_rate={self.augment_rate}: must lie in [0, 1)")
        if self.mean_span < 1:
            raise InputError(f"objective.mean_span={self.mean_span}: at least 1")
