"""`python -m llm.generate`: continue a prompt, a file of prompts, or a conversation with a run's model."""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from tqdm import tqdm

from llm import cli, models
from llm.compression.packing import pack_params
from llm.data import cache
from llm.data.preparation import specials
from llm.errors import InputError, Stopped
from llm.generation import SamplingSpec, complete
from llm.generation.beam import beam_search
from llm.generation.constrained import Constraint, Vocabulary, json_schema_grammar, regex_grammar
from llm.generation.engine import check_lengths
from llm.generation.prompt_file import FEW_SHOT_STOP, AnswerFile, few_shot, read_lines
from llm.generation.prompts import opening, put
from llm.generation.speculative import Draft, Lookup, speculate
from llm.generation.stream import TextStream
from llm.nn import native
from llm.nn.packed import GROUP
from llm.run_folder import Run, open_run
from llm.stop import stop_signal
from llm.tokenization import StreamDecoder, Tokenizer

DESCRIPTION = """\
Continues a prompt with a run's newest checkpoint, printing the text as it comes. A model with an encoder reads the
prompt and writes what belongs to it. The same seed gives the same text. What is on acts in the order repetition,
presence, frequency penalty, bias, min-tokens, n-gram ban, regex or JSON schema, temperature, top-k, top-p, min-p.
"""
USAGE = "python -m llm.generate --workdir=FOLDER (--prompt=TEXT | --prompts=FILE --output=FILE | --chat) [flags]"
ANSWER_FIELDS = ("completion", "ended", "score", "tokens", "log_probabilities")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("generate", DESCRIPTION)
    parser.usage = USAGE
    parser.formatter_class = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=120)  # pyright: ignore
    add = parser.add_argument
    add("--workdir", required=True, metavar="FOLDER", help="a run's folder")
    add("--prompt", metavar="TEXT", help="the text to continue")
    add("--prompts", metavar="FILE", help='lines {"prompt": ...}; further fields come back with the answer')
    add("--output", metavar="FILE", help="of the answers to --prompts; a stopped command goes on when given again")
    add("--batch-size", type=int, metavar="N", help="prompts of --prompts at a time; default 16")
    add("--chat", action="store_true", help="a conversation by the tokenizer's template: a line of stdin is a turn")
    add(
        "--few-shot",
        metavar="FILE",
        help='lines {"input": ..., "output": ...} put before each prompt; one line is written',
    )
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="new tokens at most; else the run's own number, cut to what its context leaves",
    )
    add("--temperature", type=float, metavar="T", help="0 is greedy; default 0.8, and 0 with --beams")
    add("--top-k", type=int, default=0, metavar="K", help="only the K likeliest; 0, the default, is off")
    add("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest of mass P; 1 is off")
    add("--min-p", type=float, default=0.0, metavar="P", help="only those P times as likely as the likeliest; 0 is off")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="makes less likely what stood before; 1 is off",
    )
    add(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="R",
        help="taken from logits of what was written; 0 is off",
    )
    add("--frequency-penalty", type=float, default=0.0, metavar="R", help="the same each time it was written; 0 is off")
    add("--no-repeat-ngram", type=int, default=0, metavar="N", help="no N tokens stand twice; 0 is off")
    add("--logit-bias", action="append", default=[], metavar="ID:X", help="adds X to a token's logit; may be repeated")
    add("--min-tokens", type=int, default=0, metavar="N", help="the text does not end before")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends before this text; may be repeated")
    add("--regex", metavar="TEXT", help="what the new text matches whole, unless --max-tokens or --stop cuts it")
    add("--json-schema", metavar="FILE", help="the same by a JSON schema: JSON on one line")
    add("--seed", type=int, default=0, metavar="N", help="of the draws; line n of --prompts, from 0, has seed N + n")
    add("--beams", type=int, metavar="K", help="the best of a beam search instead of draws")
    add("--length-penalty", type=float, metavar="A", help="beams compare log-probability / length^A; default 1")
    add("--log-probabilities", action="store_true", help="of each token, before penalties, temperature and filters")
    add("--draft", metavar="FOLDER", help="a smaller run guesses tokens ahead: faster, the same distribution")
    add("--lookup", action="store_true", help="the same by looking back in the text")
    add("--weights", choices=("int8", "int4"), help="keeps matrices rounded to 8 or 4 bits a weight: smaller, faster")
    cli.add_which(parser)
    add("--no-cache", action="store_true", help="compute every step from all tokens, for comparison")
    return parser


def main(argv: list[str]) -> None:
    """Parses, generates and prints."""
    flags = _parser().parse_args(argv)
    sampling = _sampling(flags)
    _check(flags)
    grammar = _grammar(flags)
    examples = None
    if flags.few_shot is not None:
        examples = read_lines(flags.few_shot, "--few-shot", ("input", "output"))[1]
    asked = None
    if flags.prompts is not None:
        asked = read_lines(flags.prompts, "--prompts", ("prompt",), ANSWER_FIELDS)
    cli.keep_compiled(cache.folder() / "compiled")
    writer = Writer(
        _for_reading(open_run(flags.workdir, average=flags.average, checkpoint=flags.checkpoint), flags.weights),
        flags,
        sampling,
        examples,
        grammar,
    )
    with jax.set_mesh(writer.run.mesh):
        if flags.chat:
            _chat(writer)
        elif asked is not None:
            _answer_file(writer, *asked)
        else:
            _continue(writer)


def _for_reading(run: Run, weights: str | None = None) -> Run:
    """The run with its model and parameters in the form that generating reads fastest."""
    model, params = run.model, run.params
    if weights is not None:
        if run.mesh.size > 1:
            raise InputError(f"--weights={weights} is of one device; {run.workdir} has a mesh of {run.mesh.size}")
        bits = int(weights.removeprefix("int"))
        missing = native.load(cache.folder() / "kernels")
        packing = pack_params(model, params, bits, native=missing is None)
        if packing.after == packing.before:
            raise InputError(f"--weights={weights}: no matrix of {run.workdir} has inputs that {GROUP} divides")
        how = "the compiled kernel" if missing is None else f"XLA, as {missing}"
        kept = f"; {len(packing.kept)} matrices stay float32" if packing.kept else ""
        size = f"{packing.after / 1e6:.1f} MB in place of {packing.before / 1e6:.1f}"
        cli.say_error(f"weights: {weights}, {size}, read by {how}{kept}")
        params = packing.params
    if run.mesh.size == 1 and jax.default_backend() == "cpu":
        model, params = models.unrolled(model, params)
    return dataclasses.replace(run, model=model, params=params)


def _sampling(flags: argparse.Namespace) -> SamplingSpec:
    biases = []
    for word in flags.logit_bias:
        token, _, value = word.partition(":")
        try:
            biases.append((int(token), float(value)))
        except ValueError:
            raise InputError(f"--logit-bias={word}: expected ID:X, a token's id and a number") from None
    if flags.beams is not None and (flags.temperature or flags.top_k or flags.top_p != 1 or flags.min_p):
        raise InputError("--beams draws nothing: leave out --temperature, --top-k, --top-p and --min-p")
    default = 0.8 if flags.beams is None else 0.0
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
             "no_repeat_ngram", "min_tokens")  # fmt: skip
    return SamplingSpec(
        temperature=default if flags.temperature is None else flags.temperature,
        logit_bias=tuple(biases),
        **{name: getattr(flags, name) for name in names},
    )


def _grammar(flags: argparse.Namespace) -> str | None:
    """What the text has to match, or None."""
    path, said = flags.json_schema, f"--json-schema={flags.json_schema}"
    try:
        if flags.regex is not None:
            said = f"--regex={flags.regex}"
            return regex_grammar(flags.regex)
        return None if path is None else json_schema_grammar(pathlib.Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"{said}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{said}: not UTF-8 at byte {error.start}") from None
    except InputError as error:
        raise InputError(f"{said}: {error}") from None


def _check(flags: argparse.Namespace) -> None:
    """Raises InputError where flags contradict each other."""
    modes = [name for name in ("--prompt", "--prompts", "--chat") if getattr(flags, name[2:]) not in (None, False)]
    if len(modes) != 1:
        raise InputError(f"expected one of --prompt, --prompts and --chat, got {' and '.join(modes) or 'none'}")
    if flags.prompt is not None and not flags.prompt:
        raise InputError("--prompt is empty: give the text to continue")
    if (flags.output is None) != (flags.prompts is None):
        raise InputError("--prompts and --output go together: the answers to the one are written to the other")
    if flags.batch_size is not None and flags.prompts is None:
        raise InputError("--batch-size is of --prompts")
    for name in ("max_tokens", "batch_size", "beams"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}={value} must be at least 1")
    if flags.max_tokens is not None and flags.min_tokens > flags.max_tokens:
        raise InputError(f"--min-tokens={flags.min_tokens} is more than --max-tokens={flags.max_tokens}")
    if not 0 <= flags.seed < 2**32:
        raise InputError(f"--seed={flags.seed} must lie in 0..2^32-1")
    if any(not stop for stop in flags.stop):
        raise InputError("--stop is empty: give the text to end before")
    if flags.length_penalty is not None and flags.beams is None:
        raise InputError("--length-penalty is of --beams")
    given = {
        "--beams": flags.beams is not None, "--draft": flags.draft is not None, "--lookup": flags.lookup,
        "--chat": flags.chat, "--few-shot": flags.few_shot is not None, "--stop": bool(flags.stop),
        "--log-probabilities": flags.log_probabilities, "--no-cache": flags.no_cache,
        "--regex": flags.regex is not None, "--json-schema": flags.json_schema is not None,
    }  # fmt: skip
    apart = [("--beams", tuple(name for name in given if name not in ("--beams", "--regex", "--json-schema"))),
             ("--draft", ("--lookup", "--log-probabilities", "--no-cache")),
             ("--lookup", ("--log-probabilities", "--no-cache")),
             ("--chat", ("--few-shot", "--log-probabilities")),
             ("--regex", ("--json-schema",))]  # fmt: skip
    for one, others in apart:
        for other in others:
            if given[one] and given[other]:
                raise InputError(f"{one} and {other} do not go together")


@dataclasses.dataclass
class Answer:
    """What was written to a prompt; log-probabilities and score are None where there are none."""

    text: str
    tokens: list[int]
    ended: str
    log_probabilities: list[float] | None = None
    score: float | None = None


class Writer:
    """A run's model with everything that the flags say."""

    def __init__(
        self,
        run: Run,
        flags: argparse.Namespace,
        sampling: SamplingSpec,
        examples: list[dict] | None,
        grammar: str | None,
    ):
        sampling = run.experiment.generation.allowing(sampling)
        self.run, self.flags, self.sampling, self.examples, self.grammar = run, flags, sampling, examples, grammar
        self.kind: str = run.experiment.objective.kind
        if self.kind not in models.WRITING:
            raise InputError(f"{run.workdir} was trained for objective.kind={self.kind!r}: it writes nothing")
        self.tokenizer: Tokenizer = run.tokenizer
        self.context: int | None = run.model.spec.context
        for flag in ("few_shot", "chat"):
            if getattr(flags, flag) and run.model.reads_source:
                name = flag.replace("_", "-")
                raise InputError(f"--{name} needs a model that continues a text; this one reads a source")
        self.ends: list[int] = [*run.experiment.generation.all_ends(self.tokenizer.end_of_text)]
        if flags.chat:
            self.ends += [] if self.tokenizer.end_of_turn is None else [self.tokenizer.end_of_turn]
        self.stops = [*flags.stop, *([FEW_SHOT_STOP] if examples is not None else [])]
        self._guesser = self._open_guesser()
        self._constraint: Constraint | None = None
        if grammar is not None:
            self._constraint = Constraint(Vocabulary(*self.tokenizer.text_bytes(), self.ends), grammar)

    def _open_guesser(self) -> Draft | Lookup | None:
        if self.flags.lookup:
            return Lookup()
        if self.flags.draft is None:
            return None
        draft = _for_reading(open_run(self.flags.draft))
        if draft.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise InputError(f"--draft={self.flags.draft} has another tokenizer than {self.run.workdir}")
        everywhere = jax.sharding.NamedSharding(self.run.mesh, jax.sharding.PartitionSpec())
        return Draft(draft.model, jax.device_put(jax.device_get(draft.params), everywhere))

    def put(self, text: str) -> tuple[list[int], list[int] | None]:
        """(what opens the row, what the encoder reads or None) for a prompt, after the examples if there are some."""
        text = text if self.examples is None else few_shot(self.examples, text)
        ids, start, end = self.tokenizer.encode(text), specials(self.tokenizer).start, self.tokenizer.end_of_text
        before = opening(self.run.experiment.generation.opening, end, self.tokenizer.bos)
        return put(self.kind, self.run.model.reads_source, ids, before, end, start)

    def room(self, prompt: Sequence[int]) -> int:
        """Tokens that a prompt may be continued by; raises InputError where there is no room."""
        check_lengths(len(prompt), self.flags.max_tokens or 1, self.context)
        own = self.run.experiment.generation.max_tokens
        own = own if self.context is None else min(own, self.context - len(prompt))
        return self.flags.max_tokens or own

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sources: Sequence[Sequence[int]] | None,
        limits: Sequence[int],
        seeds: Sequence[int],
        show: Callable[[str], None] = lambda text: None,
    ) -> list[Answer]:
        """Continues each prompt; `show` gets the text piece by piece, where there is one prompt."""
        model, params, flags = self.run.model, self.run.params, self.flags
        how: dict[str, Any] = dict(
            context=self.context, vocab_size=self.tokenizer.vocab_size, end_of_text=self.ends, sources=sources
        )
        if flags.beams is not None:
            penalty = 1.0 if flags.length_penalty is None else flags.length_penalty
            found = beam_search(model, params, prompts, limits, flags.beams, sampling=self.sampling,
                                length_penalty=penalty, constraint=self._constraint, **how)  # fmt: skip
            best = [hypotheses[0] for hypotheses in found]
            answers = [Answer(self.tokenizer.decode(h.tokens), list(h.tokens), h.ended, score=h.score) for h in best]
            show(answers[0].text)
            return answers
        streams = [TextStream(StreamDecoder(self.tokenizer), self.stops) for _ in prompts]

        def on_token(row: int, token: int) -> bool:
            show(streams[row].push(token))
            return streams[row].stopped

        how |= {"seed": seeds, "on_token": on_token, "constraint": self._constraint}
        if self._guesser is not None:
            completions = speculate(model, params, self._guesser, prompts, limits, self.sampling, **how)
        else:
            completions = complete(
                model, params, prompts, limits, self.sampling, use_cache=not flags.no_cache,
                log_probabilities=flags.log_probabilities, **how,
            )  # fmt: skip
        for stream in streams:
            show(stream.flush())
        # What follows "Output:" begins with a space.
        texts = [stream.text if self.examples is None else stream.text.strip() for stream in streams]
        return [
            Answer(text, one.tokens, one.ended, one.log_probabilities if flags.log_probabilities else None)
            for text, one in zip(texts, completions)
        ]


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _continue(writer: Writer) -> None:
    prompt, source = writer.put(writer.flags.prompt)
    limit = writer.room(prompt)
    if writer.kind not in ("seq2seq", "span_corruption") and writer.examples is None:  # else it does not go on from it
        _show(writer.flags.prompt)
    sources = None if source is None else [source]
    (answer,) = writer.write([prompt], sources, [limit], [writer.flags.seed], _show)
    print()
    if answer.log_probabilities is not None:
        for token, value in zip(answer.tokens, answer.log_probabilities):
            print(f"{value:10.4f}  {writer.tokenizer.token(token)!r}")


def _answer_file(writer: Writer, places: list[str], lines: list[dict[str, Any]]) -> None:
    """Answers a file of prompts, a batch at a time, going on where the same command was stopped."""
    flags, size = writer.flags, writer.flags.batch_size or 16
    rows = []
    for number, (place, line) in enumerate(zip(places, lines)):
        try:
            prompt, source = writer.put(line["prompt"])
            rows.append((prompt, source, writer.room(prompt), (flags.seed + number) % 2**32))
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    ignored = ("prompts", "output", "workdir", "prompt", "few_shot", "json_schema")
    settings = {name: value for name, value in vars(flags).items() if name not in ignored}
    settings["grammar"] = writer.grammar  # what stood in the schema's file
    run = str(writer.run.workdir.resolve()), writer.run.step
    made_of = [lines, writer.examples, settings | {"batch_size": size}, run]
    file = AnswerFile(flags.output, made_of, size)
    bar = tqdm(total=len(lines), initial=file.done, desc="answering", unit="prompt", file=sys.stderr)
    with stop_signal.deferred(), bar:
        for start in range(file.done, len(rows), size):
            batch = rows[start : start + size]
            # The last batch is filled up with rows of nothing, so that it needs no program of its own.
            full = batch + [(*batch[0][:2], 0, 0)] * (size - len(batch))
            prompts, sources, limits, seeds = map(list, zip(*full))
            answers = writer.write(prompts, sources if writer.run.model.reads_source else None, limits, seeds)
            file.add(line | _fields(answer) for line, answer in zip(lines[start : start + size], answers))
            bar.update(len(batch))
            if stop_signal.requested and start + size < len(rows):
                raise Stopped(f"answered {start + len(batch)} of {len(rows)} prompts; the same command goes on")
        file.finish()
    print(f"{flags.output}: {len(lines)} answers")


def _fields(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = {"completion": answer.text, "ended": answer.ended}
    if answer.score is not None:
        found["score"] = answer.score
    if answer.log_probabilities is not None:
        found |= {"tokens": answer.tokens, "log_probabilities": answer.log_probabilities}
    return found


def _chat(writer: Writer) -> None:
    """Answers each line of stdin, the conversation so far before it."""
    messages: list[dict[str, str]] = []
    asking = sys.stdin.isatty()
    for turn, line in enumerate(_turns(asking)):
        messages.append({"role": "user", "content": line})
        prompt = writer.tokenizer.chat(messages)
        try:
            limit = writer.room(prompt)
        except InputError as error:
            raise InputError(f"the conversation has grown too long, begin a new one: {error}") from None
        (answer,) = writer.write([prompt], None, [limit], [(writer.flags.seed + turn) % 2**32], _show)
        print(flush=True)
        messages.append({"role": "assistant", "content": answer.text})


def _turns(asking: bool):
    """Lines of stdin that are not blank."""
    while True:
        if asking:
            _show("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


if __name__ == "__main__":
    cli.run(main)
