"""`python -m llm.generate`: continue a prompt with a run's model."""

import sys

import jax

from llm import cli, models
from llm.data.preparation import specials
from llm.errors import InputError
from llm.generation import SamplingSpec, generate
from llm.generation.engine import check_lengths
from llm.generation.prompts import opening, put
from llm.run_folder import open_run
from llm.tokenization import StreamDecoder

DESCRIPTION = """\
Continues a prompt with a run's newest checkpoint, printing the text as it comes. A model with an encoder reads the
prompt and writes what belongs to it: a translation, an answer.

Filters act in the order temperature, top-k, top-p. The same seed gives the same text.
"""


def main(argv: list[str]) -> None:
    """Parses, generates and prints."""
    parser = cli.parser("generate", DESCRIPTION)
    parser.add_argument("--workdir", required=True, metavar="FOLDER", help="a run's folder")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="new tokens at most; what the context leaves, or the run's own number",
    )
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy; default 0.8")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="only the K likeliest; 0, the default, is off"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest of mass P; 1 is off")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws; default 0")
    parser.add_argument("--no-cache", action="store_true", help="compute every step from all tokens, for comparison")
    flags = parser.parse_args(argv)
    sampling = SamplingSpec(flags.temperature, flags.top_k, flags.top_p)
    if not flags.prompt:
        raise InputError("--prompt is empty: give the text to continue")
    if flags.max_tokens is not None and flags.max_tokens < 1:
        raise InputError(f"--max-tokens={flags.max_tokens} must be at least 1")
    if not 0 <= flags.seed < 2**32:
        raise InputError(f"--seed={flags.seed} must lie in 0..2^32-1")

    run = open_run(flags.workdir)
    kind = run.experiment.objective.kind
    if kind not in models.WRITING:
        raise InputError(f"{run.workdir} was trained for objective.kind={kind!r}: it writes nothing")
    tokenizer, context = run.tokenizer, run.model.spec.context
    ids, start, end = tokenizer.encode(flags.prompt), specials(tokenizer).start, tokenizer.end_of_text
    before = opening(run.experiment.generation.opening, end, tokenizer.bos)
    prompt, source = put(kind, run.model.reads_source, ids, before, end, start)
    check_lengths(len(prompt), 1, context)
    room = run.experiment.generation.max_tokens if context is None else context - len(prompt)
    stream = StreamDecoder(tokenizer)

    def show(row: int, token: int) -> None:
        del row
        sys.stdout.write(stream.push(token))
        sys.stdout.flush()

    if kind not in ("seq2seq", "span_corruption"):  # whose output does not go on from the prompt
        sys.stdout.write(flags.prompt)
    with jax.set_mesh(run.mesh):
        generate(
            run.model,
            run.params,
            [prompt],
            flags.max_tokens or room,
            sampling,
            context=context,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            sources=None if source is None else [source],
            seed=flags.seed,
            use_cache=not flags.no_cache,
            on_token=show,
        )
    print(stream.flush())


if __name__ == "__main__":
    cli.run(main)
