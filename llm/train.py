"""`python -m llm.train`: from an experiment config and raw text to a trained, evaluated, sampled model."""

import dataclasses
import json
import logging
import pathlib
import time

import jax
from tqdm import tqdm

from llm import cli, config, models, sharding
from llm.data import Prepared, prepare
from llm.errors import InputError
from llm.evaluation.perplexity import compile_row_losses, perplexity
from llm.generation import generate
from llm.generation.engine import check_lengths
from llm.training import metrics, state
from llm.training.loop import Trained, check_batch, train

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
        "--show-parameters", action="store_true", help="print every parameter's role, decay and place, train nothing"
    )
    flags, rest = parser.parse_known_args(argv)
    experiment = config.resolve(config.override(config.load(flags.config), cli.overrides(rest)))
    if flags.show_parameters:
        print(state.parameter_table(models.build(experiment.model, experiment.tokenizer.entries)))
        return
    if flags.workdir is None:
        parser.error("the following arguments are required: --workdir")
    run(experiment, cli.writable_workdir(flags.workdir))


def run(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Runs an experiment in its folder, or what is left of it."""
    began = time.perf_counter()
    _refuse_other_config(experiment, workdir)
    sharding.request_cpu_devices(experiment.mesh)
    mesh = sharding.make_mesh(experiment.mesh)
    check_batch(experiment.training, mesh)

    prepared = prepare(experiment.preparation, workdir)
    assert prepared is not None
    model = models.build(experiment.model, prepared.tokenizer.vocab_size)
    prompts = _prompts(experiment, prepared)
    logging.getLogger("llm").setLevel(logging.INFO)  # which attention "auto" is, and why
    state.check_mesh(model, mesh)
    # All that can be refused has been: only now the folder becomes this experiment's.
    if not (workdir / "config.json").is_file():
        config.save(experiment, workdir / "config.json")
    summary_file = workdir / "summary.json"
    if summary_file.is_file():
        print(f"{workdir} is finished; another workdir starts anew")
        _report(json.loads(summary_file.read_text(encoding="utf-8")), workdir)
        return

    with jax.set_mesh(mesh):
        row_losses = compile_row_losses(model, experiment.training.loss_chunk)

        def validate(params) -> dict[str, float]:
            rows = experiment.training.validation_rows
            result = perplexity(row_losses, params, prepared.validation, experiment.evaluation.batch_size, mesh, rows)
            return {"loss": result.loss}

        trained = train(
            model, experiment.training, experiment.optimizer, prepared, experiment.seed, mesh, workdir, validate
        )
        summary = _finish(experiment, prepared, prompts, model, mesh, row_losses, trained)
    metrics.plot_curves(workdir, summary["validation"]["loss"])
    summary["total_seconds"] = time.perf_counter() - began
    metrics.write_json(summary_file, summary)
    _report(summary, workdir)


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


def _prompts(experiment: config.Experiment, prepared: Prepared) -> list[list[int]]:
    """The ids of the prompts that the run will show continuations of, each opened by the end of text."""
    tokenizer = prepared.tokenizer
    prompts = [[tokenizer.end_of_text, *ids] for ids in tokenizer.encode_batch(experiment.generation.prompts)]
    for text, ids in zip(experiment.generation.prompts, prompts):
        try:
            check_lengths(len(ids), 1, experiment.model.context)
        except InputError as error:
            raise InputError(f"generation.prompts, {text[:40]!r}: {error}") from None
    return prompts


def _finish(
    experiment: config.Experiment, prepared: Prepared, prompts, model, mesh, row_losses, trained: Trained
) -> dict:
    """The summary: scores over the whole validation set, samples, and what the run cost."""
    params, rows = trained.state.params, len(prepared.validation)
    with tqdm(total=rows, desc="validating", unit="row", mininterval=0.5) as bar:
        result = perplexity(
            row_losses, params, prepared.validation, experiment.evaluation.batch_size, mesh, progress=bar.update
        )
    generation, tokenizer = experiment.generation, prepared.tokenizer
    longest = max((len(p) for p in prompts), default=0)
    continuations = generate(
        model,
        params,
        prompts,
        min(generation.max_tokens, model.spec.context - longest),
        generation.sampling(),
        context=model.spec.context,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        seed=experiment.seed,
    )
    flops = 3 * model.flops_per_token(params, experiment.data.row_length)  # the backward pass costs two forward ones
    rate = trained.tokens_per_second
    return {
        "parameters": state.count_parameters(params),
        "steps": int(trained.state.step),
        "skipped_steps": int(trained.state.skipped),
        "train_tokens": trained.tokens,
        "train_seconds": trained.seconds,
        "tokens_per_second": rate,
        "mfu": flops * rate / (metrics.measured_peak_flops() * jax.device_count()),
        "validation": dataclasses.asdict(result),
        "samples": [
            {"prompt": prompt, "continuation": tokenizer.decode(ids)}
            for prompt, ids in zip(generation.prompts, continuations)
        ],
    }


def _report(summary: dict, workdir: pathlib.Path) -> None:
    validation = summary["validation"]
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
                ("share of peak (MFU)", f"{summary['mfu']:.0%} of the measured float32 matrix product"),
                ("validation loss", f"{validation['loss']:.4f} nats/token over {validation['tokens']:,} tokens"),
                ("perplexity", f"{validation['perplexity']:.2f}"),
                ("bits per byte", f"{validation['bits_per_byte']:.4f}"),
                ("curves", str(workdir / "curves.png")),
            ]
        )
    )


if __name__ == "__main__":
    cli.run(main)
