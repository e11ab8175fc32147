"""`python -m llm.train`: from an experiment config and raw text to a trained, evaluated, sampled model."""

import json
import logging
import pathlib
import time

import jax
import numpy as np
from tqdm import tqdm

from llm import cli, config, models, sharding
from llm.data import Dataset, Prepared, prepare
from llm.data.preparation import specials
from llm.errors import InputError
from llm.evaluation import report
from llm.evaluation.scores import Scorer
from llm.generation import generate
from llm.generation.engine import check_lengths
from llm.generation.prompts import opening, put
from llm.run_folder import Run, matching, open_run, refuse_imported, shared
from llm.training import metrics, state
from llm.training.checkpoint import Checkpoints
from llm.training.loop import Trained, check_batch, recipe, train, trained_by
from llm.training.optimizer import check_rates, factor_of
from llm.training.roles import path_name
from llm.training.spec import OptimizerSpec

Prompt = tuple[list[int], list[int] | None]  # what opens the row, and what an encoder reads

DESCRIPTION = """\
Runs an experiment: prepares its data, trains, validates, samples.

Everything goes to --workdir, which holds the run: config.json, tokenizer.json, data/, checkpoints/, metrics.jsonl,
tensorboard/, summary.json, curves.png. A run that was stopped or killed goes on when the same command is given again.

Every field of the config can be set: --config.optimizer.learning_rate=3e-4
"""


def main(argv: list[str]) -> None:
    """Parses, resolves the config, and runs it."""
    parser = cli.parser("train", DESCRIPTION)
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="experiments/quickstart.py:smoke")
    parser.add_argument("--workdir", metavar="FOLDER", help="the run's folder, runs/quickstart")
    parser.add_argument(
        "--show-parameters",
        action="store_true",
        help="print every parameter's role, factor on the rate, decay and place, and the rules; train nothing",
    )
    flags, rest = parser.parse_known_args(argv)
    experiment = config.resolve(config.override(config.load(flags.config), cli.overrides(rest)))
    if flags.show_parameters:
        # Where the data have not been looked at, a classification head is shown with two classes.
        model = models.build(experiment.model, experiment.tokenizer.entries)
        if getattr(model.spec, "classes", 2) is None:
            model = models.build(experiment.model, experiment.tokenizer.entries, classes=2)
        made_of = recipe(model, experiment.training, experiment.optimizer, experiment.objective, 0)
        optimizer = trained_by(experiment.training, experiment.optimizer)
        check_rates(optimizer, made_of.boxed().params)
        print(state.parameter_table(made_of, optimizer))
        print(f"\n{state.rule_table(made_of)}")
        return
    if flags.workdir is None:
        parser.error("the following arguments are required: --workdir")
    workdir = cli.writable_workdir(flags.workdir)
    refuse_imported(workdir)
    run(experiment, workdir)


def run(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Runs an experiment in its folder, or what is left of it."""
    began = time.perf_counter()
    _refuse_other_config(experiment, workdir)
    sharding.request_cpu_devices(experiment.mesh)
    mesh = sharding.make_mesh(experiment.mesh)
    check_batch(experiment.training, mesh)
    sharding.check_length(experiment.data.row_length, mesh)

    start = _start(experiment, workdir)
    prepared = prepare(experiment.preparation, workdir)
    assert prepared is not None
    _check_classes(prepared)
    if start is not None and start.tokenizer.fingerprint != prepared.tokenizer.fingerprint:
        raise InputError(
            f"training.start_from={start.workdir}: its tokenizer is another one; set "
            f"tokenizer.path={start.workdir / 'tokenizer.json'}"
        )
    model = models.build(experiment.model, prepared.tokenizer.vocab_size, len(prepared.labels))
    prompts = _prompts(experiment, prepared, model)
    logging.getLogger("llm").setLevel(logging.INFO)  # which attention "auto" is, and why
    made_of = recipe(model, experiment.training, experiment.optimizer, experiment.objective, 0)
    state.check_mesh(made_of, mesh)
    optimizer = trained_by(experiment.training, experiment.optimizer)
    params = state.abstract(made_of, mesh).params
    check_rates(optimizer, params)
    if start is not None:
        _check_fresh(params, matching(params, start), optimizer, start)
    # All that can be refused has been: only now the folder becomes this experiment's.
    if not (workdir / "config.json").is_file():
        config.save(experiment, workdir / "config.json")
    summary_file = workdir / "summary.json"
    if summary_file.is_file():
        print(f"{workdir} is finished; another workdir starts anew")
        _report(json.loads(summary_file.read_text(encoding="utf-8")), workdir)
        return

    with jax.set_mesh(mesh):
        chunk = experiment.training.loss_chunk
        kind, generation = experiment.objective.kind, experiment.generation
        scorer = Scorer(model, kind, prepared, experiment.evaluation, chunk, mesh, generation)
        trained = train(
            model,
            experiment.training,
            experiment.optimizer,
            experiment.objective,
            prepared,
            experiment.seed,
            mesh,
            workdir,
            validate=lambda params: scorer.loss(params, experiment.training.validation_rows),
            initial=lambda params: params if start is None else shared(params, open_run(str(start.workdir))),
        )
        summary = _finish(experiment, prepared, prompts, model, scorer, trained, workdir)
    shown = ("loss", "accuracy")  # looked at along the run too
    metrics.plot_curves(workdir, {name: x for name, x in summary["validation"].items() if name in shown})
    summary["total_seconds"] = time.perf_counter() - began
    metrics.write_json(summary_file, summary)
    _report(summary, workdir)


def _start(experiment: config.Experiment, workdir: pathlib.Path) -> Run | None:
    """The run that a new one starts from, without its parameters' values; None where none is named, or needed any more.

    Raises:
        InputError: there is no such folder, or no trained run in it.
    """
    name = experiment.training.start_from
    if not name or Checkpoints(workdir / "checkpoints", 1, lambda _: None).latest() is not None:
        return None
    if not pathlib.Path(name).is_dir():
        raise InputError(f"training.start_from={name}: there is no such folder; train that run first")
    return open_run(name, values=False)


def _check_fresh(params, found: dict, optimizer: OptimizerSpec, start: Run) -> None:
    """Raises InputError when a parameter that starts anew is frozen: it would stay random."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    stuck = [name for name in names if name not in found and factor_of(name, optimizer) == 0]
    if stuck:
        raise InputError(
            f"training.start_from={start.workdir} lacks {', '.join(stuck)}, which would be frozen as it was drawn: "
            f"train it by optimizer.rates='{stuck[0].split('/')[0]}/*=1'"
        )


def _refuse_other_config(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Raises InputError, naming the differences, when the workdir belongs to another experiment."""
    path = workdir / "config.json"
    if path.is_file():
        changed = config.differences(config.read(path), experiment)
        if changed:
            raise InputError(
                f"{workdir} belongs to another config ({'; '.join(changed)}); name another --workdir, or give the old "
                "config"
            )


def _check_classes(prepared: Prepared) -> None:
    """Raises InputError when a class has no training example: nothing could be learned of it."""
    if prepared.labels:
        train = prepared.train
        assert isinstance(train, Dataset), "a mixture has no labels"
        counts = np.bincount(train.shards.labels(np.arange(len(train)))[:, 0], minlength=len(prepared.labels))
        missing = [name for name, count in zip(prepared.labels, counts) if not count]
        if missing:
            raise InputError(
                f"data: no training example is left with the label {', '.join(map(repr, missing))}: give more of it, "
                "or take the label out"
            )


def _prompts(experiment: config.Experiment, prepared: Prepared, model: models.Model) -> list[Prompt]:
    """The prompts that the run will show continuations of, as the model takes them (`llm.generation.prompts`)."""
    tokenizer, texts = prepared.tokenizer, experiment.generation.prompts
    start, kind, end = specials(tokenizer).start, experiment.objective.kind, tokenizer.end_of_text
    before = opening(experiment.generation.opening, end, tokenizer.bos)
    prompts = [put(kind, model.reads_source, ids, before, end, start) for ids in tokenizer.encode_batch(texts)]
    for text, (row, _) in zip(texts, prompts):
        try:
            check_lengths(len(row), 1, experiment.model.context)
        except InputError as error:
            raise InputError(f"generation.prompts, {text[:40]!r}: {error}") from None
    return prompts


def _finish(
    experiment: config.Experiment,
    prepared: Prepared,
    prompts: list[Prompt],
    model: models.Model,
    scorer: Scorer,
    trained: Trained,
    workdir: pathlib.Path,
) -> dict:
    """The summary: scores over the whole validation set, samples, and what the run cost."""
    params = trained.params
    with tqdm(total=scorer.rows, desc="validating", unit="row", mininterval=0.5) as bar:
        scores = scorer.scores(params, bar.update)
    report.write_records(scores, workdir)
    flops = 3 * model.flops_per_token(params, experiment.data.row_length)  # the backward pass costs two forward ones
    rate = trained.tokens_per_second
    peak, peak_of = metrics.peak_flops()
    return {
        "parameters": state.count_parameters(params),
        "steps": int(trained.state.step),
        "skipped_steps": int(trained.state.skipped),
        "train_tokens": trained.tokens,
        "train_seconds": trained.seconds,
        "train_flops": flops * trained.tokens,
        "tokens_per_second": rate,
        "mfu": flops * rate / (peak * jax.device_count()),
        "mfu_of": peak_of,
        "objective": experiment.objective.kind,
        "validation": scores.numbers,
        "samples": _samples(experiment, prepared, prompts, model, params),
    }


def _samples(experiment: config.Experiment, prepared: Prepared, prompts, model: models.Model, params) -> list[dict]:
    """What the model writes to the prompts: continuations, or what an encoder-decoder says of them."""
    if not prompts:
        return []
    generation, tokenizer, context = experiment.generation, prepared.tokenizer, model.spec.context
    rows = [row for row, _ in prompts]
    sources = [source for _, source in prompts if source is not None]
    longest = max(map(len, rows))
    written = generate(
        model,
        params,
        rows,
        generation.max_tokens if context is None else min(generation.max_tokens, context - longest),
        generation.sampling(),
        context=context,
        vocab_size=tokenizer.vocab_size,
        end_of_text=generation.all_ends(tokenizer.end_of_text),
        sources=sources or None,
        seed=experiment.seed,
    )
    return [
        {"prompt": prompt, "continuation": tokenizer.decode(ids)} for prompt, ids in zip(generation.prompts, written)
    ]


def _report(summary: dict, workdir: pathlib.Path) -> None:
    for sample in summary["samples"]:
        print(f"\n--- {sample['prompt']!r} continues:\n{sample['prompt']}{sample['continuation']}")
    print()
    print(
        cli.table(
            [
                ("parameters", f"{summary['parameters']:,}"),
                ("tokens trained on", f"{summary['train_tokens']:,} in {summary['steps']:,} steps"),
                ("time", f"{summary['total_seconds']:.0f} s, of it {summary['train_seconds']:.0f} s training"),
                ("tokens/s", f"{summary['tokens_per_second']:,.0f}"),
                ("share of peak (MFU)", f"{summary['mfu']:.0%} of {summary.get('mfu_of', metrics.MEASURED)}"),
                *report.rows(summary["objective"], summary["validation"]),
                ("curves", str(workdir / "curves.png")),
            ]
        )
    )


if __name__ == "__main__":
    cli.run(main)
