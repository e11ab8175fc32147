"""`python -m llm.train`: from an experiment config and raw text to a trained, evaluated, sampled model."""

import dataclasses
import json
import logging
import pathlib
import time

import jax
import numpy as np
import optax
from tqdm import tqdm

from llm import cli, config, models, sharding
from llm.data import Dataset, Prepared, cache, prepare
from llm.data.preparation import open_prepared, specials
from llm.errors import InputError
from llm.evaluation import report
from llm.evaluation.preferences import (
    REFERENCE,
    compile_pairs,
    log_probabilities,
    read_reference,
    with_reference,
    write_reference,
)
from llm.evaluation.scores import Scorer
from llm.generation import generate
from llm.generation.engine import check_lengths
from llm.generation.prompts import opening, put
from llm.run_folder import Run, matching, open_run, refuse_imported, shared
from llm.sharding import hosts
from llm.training import metrics, state
from llm.training.adapters import without
from llm.training.checkpoint import Checkpoints
from llm.training.inspection import inspect
from llm.training.loop import Trained, check_batch, recipe, train, trained_by
from llm.training.optimizer import check_rates, factor_of
from llm.training.replay import replay
from llm.training.roles import path_name
from llm.training.spec import OptimizerSpec
from llm.training.watch import Profile

Prompt = tuple[list[int], list[int] | None]  # what opens the row, and what an encoder reads

DESCRIPTION = """\
Runs an experiment: prepares its data, trains, validates, samples.

Everything goes to --workdir, which holds the run: config.json, tokenizer.json, data/, checkpoints/, metrics.jsonl,
tensorboard/, summary.json, validation.jsonl, curves.png; profile/ of --profile, diagnostics/ of steps that were not
finite. A run that was stopped or killed goes on when the same command is given again.

Every field of the config can be set: --config.optimizer.learning_rate=3e-4
"""


def main(argv: list[str]) -> None:
    """Parses, resolves the config, and runs it."""
    parser = cli.parser("train", DESCRIPTION)
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="experiments/quickstart.py:smoke")
    parser.add_argument("--workdir", metavar="FOLDER", help="the run's folder, runs/quickstart")
    parser.add_argument(
        "--show-parameters",
        action="store_true",
        help="print every parameter's role, factor on the rate, decay and place, and the rules; train nothing",
    )
    parser.add_argument("--profile", metavar="START:COUNT", help="trace COUNT steps from step START, for xprof")
    parser.add_argument(
        "--debug-nans",
        nargs="?",
        const=0,
        type=int,
        metavar="STEP",
        help="name the first tensor that was not finite in a step that was skipped, the latest or STEP; train nothing",
    )
    parser.add_argument(
        "--inspect",
        action="store_true",
        help="list what --workdir has saved: steps, sizes, faults, arrays, metrics; touches no device",
    )
    flags, rest = parser.parse_known_args(argv)
    asked = {"--show-parameters": flags.show_parameters, "--inspect": flags.inspect, "--profile": flags.profile,
             "--debug-nans": flags.debug_nans is not None}  # fmt: skip
    if len(given := [name for name, value in asked.items() if value]) > 1:
        parser.error(f"{' and '.join(given)} do not go together: each is a command of its own")
    if flags.inspect:
        if not flags.workdir or flags.config is not None or rest:
            parser.error("--inspect goes with --workdir alone")
        print(inspect(cli.existing_workdir(flags.workdir)))
        return
    if flags.config is None:
        parser.error("the following arguments are required: --config")
    if not flags.show_parameters:
        hosts.join()
    profile = None if flags.profile is None else Profile(flags.profile)
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
    cli.keep_compiled(cache.folder() / "compiled")
    run(experiment, workdir, profile, flags.debug_nans)


def run(
    experiment: config.Experiment, workdir: pathlib.Path, profile: Profile | None = None, debug_nans: int | None = None
) -> None:
    """Runs an experiment in its folder, or what is left of it.

    Args:
        profile: of which steps to write a trace.
        debug_nans: looks at this step that was skipped, 0 at the latest, and trains nothing; None trains.
    """
    began = time.perf_counter()
    _refuse_other_config(experiment, workdir)
    if debug_nans is not None and not (workdir / "config.json").is_file():
        raise InputError(f"--debug-nans: {workdir} holds no config.json: it is not a run's folder")
    if debug_nans is not None and hosts.several():
        raise InputError(
            "--debug-nans: one process looks at a step for all; run it without the launcher, and with a --config.mesh "
            "that this machine's devices fit"
        )
    wandb = metrics.wandb_package(experiment.training.wandb)
    _check_best(experiment)
    sharding.request_cpu_devices(experiment.mesh)
    mesh = sharding.make_mesh(experiment.mesh)
    check_batch(experiment.training, mesh)
    sharding.check_length(experiment.data.row_length, mesh)

    start = _start(experiment, workdir)
    prepared = _prepare(experiment, workdir)
    _check_classes(prepared)
    if start is not None and start.tokenizer.ids_fingerprint != prepared.tokenizer.ids_fingerprint:
        raise InputError(
            f"training.start_from={start.workdir}: its tokenizer is another one; set "
            f"tokenizer.path={start.workdir / 'tokenizer.json'}"
        )
    model = models.build(experiment.model, prepared.tokenizer.vocab_size, len(prepared.labels))
    prompts = _prompts(experiment, prepared, model)
    if hosts.first():
        logging.getLogger("llm").setLevel(logging.INFO)  # which attention "auto" is, and why
    made_of = recipe(model, experiment.training, experiment.optimizer, experiment.objective, 0)
    state.check_mesh(made_of, mesh)
    optimizer = trained_by(experiment.training, experiment.optimizer)
    params = state.abstract(made_of, mesh).params
    check_rates(optimizer, params)
    if start is not None:
        _check_fresh(params, matching(params, start, prepared.labels), optimizer, start)
    if debug_nans is not None:
        with jax.set_mesh(mesh):
            step = debug_nans or None
            training, objective = experiment.training, experiment.objective
            replay(model, training, experiment.optimizer, objective, experiment.seed, mesh, workdir, step)
        return
    reference = None
    if experiment.objective.kind == "preference":
        reference = _kept_reference(prepared, params, start, workdir)
    # All that can be refused has been: only now the folder becomes this experiment's.
    summary_file = workdir / "summary.json"
    if hosts.from_first(lambda: _take_over(experiment, workdir) or summary_file.is_file()):
        if profile is not None:
            profile.check(experiment.training.steps, experiment.training.steps)
        hosts.say(f"{workdir} is finished; another workdir starts anew")
        _report(json.loads(summary_file.read_text(encoding="utf-8")), workdir)
        return

    with jax.set_mesh(mesh):
        if experiment.objective.kind == "preference":
            if reference is None:
                assert start is not None, "see `_kept_reference`"
                reference = _reference(experiment, prepared, model, mesh, workdir, start)
            prepared = with_reference(prepared, reference)
        chunk = experiment.training.loss_chunk
        kind, generation = experiment.objective.kind, experiment.generation
        beta = experiment.training.preference_beta
        scorer = Scorer(model, kind, prepared, experiment.evaluation, chunk, mesh, generation, beta)
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
            initial=lambda params: (
                params if start is None else shared(params, open_run(str(start.workdir)), prepared.labels, hosts.say)
            ),
            say=hosts.say,
            profile=profile,
            open_tracker=lambda: (
                wandb and metrics.open_wandb(wandb, experiment.training.wandb, workdir, dataclasses.asdict(experiment))
            ),
        )
        summary = _finish(experiment, prepared, prompts, model, scorer, trained, workdir)
    if not hosts.first():
        return
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


def _made_of(prepared: Prepared, start: Run) -> dict[str, str]:
    return {"data": prepared.fingerprint, "start": str(start.workdir.resolve()), "step": str(start.step)}


def _kept_reference(
    prepared: Prepared, params, start: Run | None, workdir: pathlib.Path
) -> dict[str, np.ndarray] | None:
    """The log-probabilities of the start, where an earlier command has left them; None where they are to be computed.

    Raises:
        InputError: they are of other data, or are gone from a run that has begun; or the start lacks a parameter of the
            model, so that there is nothing to compare with.
    """
    found = read_reference(workdir, prepared)
    if start is None:  # the run has begun, and goes on with what it was begun with
        if found is None:
            raise InputError(
                f"{workdir / REFERENCE} is missing, which the run was begun with: put it back, or begin a new folder"
            )
        return found[0]
    has = matching(params, start)
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(without(params))]
    lacking = [name for name in names if name not in has]
    if lacking:
        raise InputError(
            f"training.start_from={start.workdir} lacks {', '.join(lacking)}: a preference is learned against all of it"
        )
    return found[0] if found is not None and found[1] == _made_of(prepared, start) else None


def _reference(
    experiment: config.Experiment,
    prepared: Prepared,
    model: models.Model,
    mesh: jax.sharding.Mesh,
    workdir: pathlib.Path,
    start: Run,
) -> dict[str, np.ndarray]:
    """Computes the log-probabilities of the start on all pairs, and keeps them in the run's folder."""
    made_of = state.Recipe(model, optax.identity(), experiment.objective.kind)
    places = state.abstract(made_of, mesh).params
    opened = open_run(str(start.workdir))
    found = matching(places, opened)
    params = jax.tree_util.tree_map_with_path(lambda p, x: jax.device_put(found[path_name(p)], x.sharding), places)
    pairs = compile_pairs(model, experiment.training.loss_chunk)
    datasets = {"train": prepared.train, "validation": prepared.validation}
    tables = {}
    total, silent = sum(map(len, datasets.values())), not hosts.first()
    with tqdm(total=total, desc="reference", unit="pair", mininterval=0.5, disable=silent) as bar:
        for split, dataset in datasets.items():
            size = experiment.evaluation.batch_size
            tables[split] = log_probabilities(pairs, params, dataset, size, mesh, progress=bar.update)[0]
    if hosts.first():
        write_reference(workdir, tables, _made_of(prepared, opened))
    return tables


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
    """Raises InputError, naming the differences, when the workdir belongs to another experiment.

    Another mesh is no other experiment: a run may go on on other hardware.
    """
    path = workdir / "config.json"
    if path.is_file():
        changed = config.differences(config.read(path), experiment)
        if changed and all(line.startswith("mesh.") for line in changed):
            hosts.say(f"{workdir} goes on on another mesh ({'; '.join(changed)})")
        elif changed:
            raise InputError(
                f"{workdir} belongs to another config ({'; '.join(changed)}); name another --workdir, or give the old "
                "config"
            )


def _take_over(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    path = workdir / "config.json"
    if not path.is_file() or config.read(path) != experiment:
        config.save(experiment, path)


def _check_best(experiment: config.Experiment) -> None:
    """Raises InputError when the best checkpoint is looked for by a number that the run does not have."""
    training, kind = experiment.training, experiment.objective.kind
    if training.keep_best == "accuracy" and kind != "classification":
        raise InputError(f"training.keep_best='accuracy': objective.kind={kind!r} has none; set 'loss'")
    if training.keep_best and training.validate_every >= training.steps:
        raise InputError(
            f"training.keep_best={training.keep_best!r}: there is no validation on the way, as "
            f"training.validate_every={training.validate_every} with training.steps={training.steps}; lower it"
        )


def _prepare(experiment: config.Experiment, workdir: pathlib.Path) -> Prepared:
    """The data, which process 0 prepares; the others wait for them."""
    found: list[Prepared | None] = []

    def make() -> None:
        found.append(prepare(experiment.preparation, workdir))

    hosts.from_first(make)
    prepared = found[0] if found else open_prepared(workdir, experiment.objective)
    assert prepared is not None, "only llm.prepare leaves it to others"
    return prepared


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
    if kind in models.CHATTING:
        prompts: list[Prompt] = [(tokenizer.chat([{"role": "user", "content": text}]), None) for text in texts]
    else:
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
    silent = not hosts.first()
    with tqdm(total=scorer.rows, desc="validating", unit="row", mininterval=0.5, disable=silent) as bar:
        scores = scorer.scores(params, bar.update)
    if hosts.first():
        report.write_records(scores, workdir)
    return {
        "parameters": state.count_parameters(params),
        "steps": int(trained.state.step),
        "skipped_steps": int(trained.state.skipped),
        "train_tokens": trained.tokens,
        "train_seconds": trained.seconds,
        "train_flops": trained.flops,
        "tokens_per_second": trained.tokens_per_second,
        "mfu": trained.mfu,
        "mfu_of": trained.mfu_of,
        "first_step_seconds": trained.first_step_seconds,
        "first_step_cached": trained.first_step_cached,
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
    ends = generation.all_ends(tokenizer.end_of_text)
    if experiment.objective.kind in models.CHATTING and tokenizer.end_of_turn is not None:
        ends = (*ends, tokenizer.end_of_turn)
    written = generate(
        model,
        params,
        rows,
        generation.max_tokens if context is None else min(generation.max_tokens, context - longest),
        generation.sampling(),
        context=context,
        vocab_size=tokenizer.vocab_size,
        end_of_text=ends,
        sources=sources or None,
        seed=experiment.seed,
    )
    return [
        {"prompt": prompt, "continuation": tokenizer.decode(ids)} for prompt, ids in zip(generation.prompts, written)
    ]


def _report(summary: dict, workdir: pathlib.Path) -> None:
    if not hosts.first():
        return
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
    cli.run(main, hosts.leave)
