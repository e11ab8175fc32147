"""`python -m llm.convert`: weights of others in as a run, and a run out as theirs."""

import dataclasses
import json
import math
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from llm import cli, config, models, sharding, weights
from llm.data.preparation import TOKENIZER, specials
from llm.errors import InputError
from llm.evaluation.probe import PARAGRAPH, Texts, probe
from llm.generation.prompts import opening
from llm.run_folder import IMPORTED, Run, open_run, origin
from llm.tokenization import Tokenizer
from llm.tokenization.loading import tokenizer_from
from llm.training import metrics, state
from llm.training.checkpoint import Checkpoints, Later
from llm.training.loop import recipe
from llm.training.roles import path_name

DESCRIPTION = """\
--from takes a checkpoint of others in: a folder of Hugging Face's (safetensors or torch pickles, whole or in parts;
GPT-2, Llama, Mistral, Mixtral, Qwen 2 and 3, BERT with each of its heads, sentence encoders, T5, Marian), or a GGUF of
the Llama family. --workdir becomes a run that generates, evaluates (--data) and is fine-tuned like any other:

    python -m llm.train --config=runs/x/config.json --config.data.train=... --workdir=runs/tuned

--to writes the run in --workdir as a folder of Hugging Face's: model.safetensors in float32 (in parts above 5 GB),
config.json, tokenizer.
"""


def main(argv: list[str]) -> None:
    """Parses and converts."""
    parser = cli.parser("convert", DESCRIPTION)
    parser.add_argument("--workdir", required=True, metavar="FOLDER", help="the run's folder")
    parser.add_argument("--from", dest="source", metavar="PATH", help="a checkpoint of others, file or folder")
    parser.add_argument("--to", dest="target", metavar="FOLDER", help="an empty folder to write the run to")
    parser.add_argument("--tokenizer", metavar="PATH", help="the checkpoint's tokenizer, where it is not beside it")
    parser.add_argument("--prompt", default="The capital of France is", metavar="TEXT", help="what is tried afterwards")
    cli.add_which(parser)
    flags = parser.parse_args(argv)
    if flags.source is not None and (flags.average > 1 or flags.checkpoint):
        which = f"--checkpoint={flags.checkpoint}" if flags.checkpoint else f"--average={flags.average}"
        parser.error(f"{which} goes with --to: what --from takes in has one checkpoint")
    if (flags.source is None) == (flags.target is None):
        parser.error("give one of --from=PATH and --to=FOLDER")
    if not flags.prompt:
        raise InputError("--prompt is empty: give a text to try the model with")
    if flags.source is not None:
        take_in(flags.source, flags.workdir, flags.tokenizer)
        _try(open_run(flags.workdir), flags.prompt)
    else:
        write(
            open_run(flags.workdir, values=False, average=flags.average, checkpoint=flags.checkpoint),
            pathlib.Path(flags.target),
        )


# --- in ---------------------------------------------------------------------------------------------------------------


def take_in(name: str, workdir_name: str, tokenizer_name: str | None = None) -> None:
    """Makes a run of a checkpoint of others.

    Raises:
        InputError: nothing that can be read, a tensor too many, too few or of another shape, no tokenizer or one with
            more entries than the model, or a folder that holds a run already.
    """
    source = weights.open_source(name)
    imported = weights.identify(source)
    tokenizer = _tokenizer(source, imported, tokenizer_name)
    workdir = cli.writable_workdir(workdir_name)
    if any((workdir / one).exists() for one in ("config.json", "checkpoints", "data", TOKENIZER)):
        what = "a run" if (workdir / "config.json").exists() else "part of a run, of an import that was stopped say,"
        raise InputError(f"--workdir={workdir} holds {what} already; name another, or remove it")
    begins = imported.objective == "causal" and _begins(source, tokenizer_name)
    if begins:
        if tokenizer.bos is None:
            raise InputError("the tokenizer's files put a token before every text and do not say which (bos_token)")
        tokenizer = tokenizer.with_roles(opens=tokenizer.bos)
    experiment = _experiment(imported, tokenizer, workdir, begins)
    model = models.build(experiment.model, tokenizer.vocab_size, len(imported.labels))
    sharding.request_cpu_devices(experiment.mesh)
    mesh = sharding.make_mesh(experiment.mesh)
    made_of = recipe(model, experiment.training, experiment.optimizer, experiment.objective, experiment.seed)
    target = state.abstract(made_of, mesh).params
    shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(target)}
    table = weights.table_of(experiment.model, imported.objective, source.interleaved)
    try:
        loaded = weights.load(table, source.tensors, shapes)
    except InputError as error:
        raise InputError(f"--from={name}: {error}") from None
    fresh = _fresh(made_of, [path for path in shapes if path not in loaded.arrays])

    def later(path, x) -> Later:
        name = path_name(path)
        return Later(x.shape, lambda: fresh[name] if name in fresh else loaded.arrays[name])

    tokenizer.save(workdir / TOKENIZER)
    # Read once more, as every preparation by it will read it: its fingerprint is then the same.
    tokenizer = tokenizer_from(workdir / TOKENIZER)
    tokenizer.save(workdir / TOKENIZER)
    checkpoints = Checkpoints(workdir / "checkpoints", 1, cli.say_error)
    params = jax.tree_util.tree_map_with_path(later, target)
    fingerprints = {"data": "", "tokenizer": tokenizer.fingerprint}
    try:
        checkpoints.save_one_by_one(0, {"params": params}, fingerprints=fingerprints, seconds=0.0, tokens=0)
    except InputError as error:  # numbers that cannot be read
        shutil.rmtree(workdir / "checkpoints")
        (workdir / TOKENIZER).unlink()
        raise InputError(f"--from={name}: {error}") from None
    said = {
        "from": str(source.path),
        "model_type": source.config.get("model_type", imported.family),
        "labels": list(imported.labels),
        "missing_heads": list(loaded.missing_heads),
    }
    metrics.write_json(workdir / IMPORTED, said)
    config.save(experiment, workdir / "config.json")
    print(cli.table([
        ("model", f"{said['model_type']}, as the {imported.family} family learns {imported.objective!r}"),
        ("parameters", f"{sum(map(math.prod, shapes.values())):,} in {len(source.tensors):,} tensors"),
        *[("made anew", f"the {head} head, which the checkpoint lacks") for head in loaded.missing_heads],
        *[("left out", f"{one}, which {imported.objective!r} does not read") for one in loaded.unread],
        ("tokenizer", f"{tokenizer.kind}, {tokenizer.vocab_size:,} entries"),
        ("run", str(workdir)),
    ]))  # fmt: skip


def _tokenizer(source: weights.Source, imported: weights.Imported, name: str | None) -> Tokenizer:
    """The checkpoint's tokenizer, with the ids that its config names."""
    where = name or (None if source.tokenizer is None else str(source.tokenizer))
    try:
        if where is None:
            raise InputError("no tokenizer beside it")
        tokenizer = tokenizer_from(where)
    except InputError as error:
        hint = "" if name else "; name one by --tokenizer=PATH"
        raise InputError(f"{error}{hint}") from None
    roles = {} if imported.opens is None else {"bos": imported.opens}
    if imported.ends:
        roles["end_of_text"] = imported.ends[0]
    beyond = {role: i for role, i in roles.items() if i >= tokenizer.vocab_size}
    if beyond:
        raise InputError(f"{where} has {tokenizer.vocab_size} entries, the checkpoint's config names {beyond}: it is "
                         "another model's tokenizer")  # fmt: skip
    return tokenizer.with_roles(**roles)


def _experiment(
    imported: weights.Imported, tokenizer: Tokenizer, workdir: pathlib.Path, begins: bool
) -> config.Experiment:
    """The config of the run, which also is one to fine-tune it by; `begins` puts the tokenizer's first token first."""
    made = config.default_config(imported.family)
    for field in dataclasses.fields(imported.spec):
        made.model[field.name] = getattr(imported.spec, field.name)
    context = imported.spec.context
    made.objective.kind = imported.objective
    made.data.row_length = made.data.row_length if context is None else min(made.data.row_length, context)
    made.tokenizer.path = str(workdir / TOKENIZER)
    made.training.start_from = str(workdir)
    made.optimizer.learning_rate = 2e-5
    made.generation.opening = "bos" if begins else ""
    made.generation.banned = imported.banned
    made.generation.ends = imported.ends[1:]
    made.generation.max_tokens = 256
    return config.resolve(made)


def _begins(source: weights.Source, tokenizer_name: str | None) -> bool:
    """Whether the checkpoint's tokenizer puts its first token before every text."""
    path = pathlib.Path(tokenizer_name) if tokenizer_name else source.tokenizer
    assert path is not None, "a tokenizer was found"
    if path.suffix == ".gguf":
        import gguf

        fields = gguf.GGUFReader(path).fields
        said = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("add_bos_token", "model", "pre")
                if f"tokenizer.ggml.{name}" in fields}  # fmt: skip
        # Where a file does not say it, llama.cpp goes by the kind.
        by_kind = said.get("model") == "llama" or said.get("pre") in ("llama-bpe", "llama3", "llama-v3")
        return bool(said.get("add_bos_token", by_kind))
    folder = path if path.is_dir() else path.parent
    for name, key in (("tokenizer_config.json", "add_bos_token"), ("tokenizer.json", "post_processor")):
        if (folder / name).is_file():
            said = json.loads((folder / name).read_text(encoding="utf-8")).get(key)
            if isinstance(said, bool):
                return said
            if said is not None:
                return _template_begins(said)
    # Without either, a SentencePiece model of Llama's begins its texts; T5's and Marian's have no such token.
    return (folder / "tokenizer.model").is_file() and source.config.get("model_type") in ("llama", "mistral", "mixtral")


def _template_begins(processor: dict[str, Any]) -> bool:
    """Whether a post-processor of Hugging Face's tokenizers puts a special token first."""
    parts = processor.get("processors", [processor])
    return any("SpecialToken" in part.get("single", [{}])[0] for part in parts if part.get("single"))


def _fresh(made_of: state.Recipe, paths: list[str]) -> dict[str, np.ndarray]:
    """The initial values of some parameters, those of heads that a checkpoint lacks."""
    if not paths:
        return {}
    import flax.linen as nn

    def make() -> dict[str, jax.Array]:
        leaves = jax.tree_util.tree_leaves_with_path(made_of.create(unbox=nn.unbox).params)
        return {path_name(path): x for path, x in leaves if path_name(path) in paths}

    return {path: np.asarray(x) for path, x in jax.jit(make)().items()}


def _try(run: Run, prompt: str) -> None:
    """Prints what the model does with a prompt and a paragraph."""
    tokenizer, found = run.tokenizer, specials(run.tokenizer)
    texts = Texts(
        prompt=tokenizer.encode(prompt),
        paragraph=tokenizer.encode(PARAGRAPH),
        opening=opening(run.experiment.generation.opening, tokenizer.end_of_text, tokenizer.bos),
        end_of_text=tokenizer.end_of_text,
        start=found.start,
        cls=tokenizer.cls,
        sep=tokenizer.sep,
        mask=tokenizer.mask,
    )
    with jax.set_mesh(run.mesh):
        kind, generation = run.experiment.objective.kind, run.experiment.generation
        rows = probe(run.model, run.params, kind, texts, generation, tokenizer.vocab_size, tokenizer.decode)
    print(cli.table([("prompt", repr(prompt)), *rows] if rows and rows[0][0] == "writes" else rows))


# --- out --------------------------------------------------------------------------------------------------------------


def write(run: Run, folder: pathlib.Path) -> None:
    """Writes a run as a folder of Hugging Face's, whole or not at all: an import of it is bit-equal.

    Args:
        run: opened without values; its parameters are read one after the other.
        folder: new, or empty.

    Raises:
        InputError: none of their models computes what this one does, or the folder is not empty.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--to={folder} is not empty; name a new folder")
    tokenizer, kind, spec = run.tokenizer, run.experiment.objective.kind, run.model.spec
    pad = specials(tokenizer).start if run.model.reads_source else specials(tokenizer).fill
    missing = (origin(run.workdir) or {}).get("missing_heads", ())
    ends = run.experiment.generation.all_ends(tokenizer.end_of_text)
    made = weights.their_config(spec, kind, run.labels, pad, ends, missing)
    table = weights.table_of(spec, kind).without(missing)
    shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(run.params)}
    tensors = weights.tensors_of(table, shapes, run.weights.read_array, bare=kind == "contrastive")
    partial = folder.with_name(folder.name + ".partial")
    cli.writable_workdir(str(partial))
    weights.write_checkpoint(partial, tensors)
    for path, said in weights.beside(spec, kind).items():
        (partial / path).parent.mkdir(exist_ok=True)
        (partial / path).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    metrics.write_json(partial / "config.json", made | {"torch_dtype": "float32"})
    said = {"tokenizer_class": tokenizer.export(partial)} | _tokenizer_config(run)
    metrics.write_json(partial / "tokenizer_config.json", said)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    print(cli.table([
        ("model", made["architectures"][0]),
        ("parameters", f"{sum(math.prod(x.shape) for x in tensors.values()):,} in {len(tensors):,} tensors, float32"),
        ("folder", str(folder)),
    ]))  # fmt: skip


def _tokenizer_config(run: Run) -> dict[str, Any]:
    """tokenizer_config.json: what the special tokens are for, the chat template, what begins a text."""
    tokenizer, before = run.tokenizer, run.experiment.generation.opening
    roles = {"bos": tokenizer.bos, "eos": tokenizer.end_of_text, "pad": tokenizer.pad, "unk": tokenizer.unk,
             "cls": tokenizer.cls, "sep": tokenizer.sep, "mask": tokenizer.mask}  # fmt: skip
    if before == "end_of_text":  # ours, which open every text with it
        roles["bos"] = tokenizer.end_of_text
    found: dict[str, Any] = {f"{role}_token": tokenizer.token(i) for role, i in roles.items() if i is not None}
    found["add_bos_token"] = before != "" and not run.model.reads_source
    return found | ({} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template})


if __name__ == "__main__":
    cli.run(main)
