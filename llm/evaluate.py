"""`python -m llm.evaluate`: the scores of a run over its whole validation set."""

import jax
import numpy as np
from tqdm import tqdm

from llm import cli
from llm.errors import InputError
from llm.evaluation import report
from llm.evaluation.preferences import REFERENCE, read_reference, with_reference
from llm.evaluation.scores import Scorer, Scores
from llm.run_folder import Run, open_run
from llm.sharding import hosts
from llm.training import metrics

DESCRIPTION = """\
The scores of a run's newest checkpoint, or of the mean of its newest ones (--average), over its whole validation set,
each example once.

Language models: loss, perplexity, bits per byte. Classifiers: accuracy, precision, recall, F1, confusion.png.
Translation: BLEU and chrF. Questions: exact match and F1. Pairs of texts: recall. Chats: loss and exact match of the
assistant's answers. Preferences: accuracy, margin and rewards, on the data that the run was made with.

The batch size changes speed, not the result (to 1e-5). The scores also go to evaluation.json in the run's folder, and
the examples to validation.jsonl.
"""


def main(argv: list[str]) -> None:
    """Parses and evaluates."""
    parser = cli.parser("evaluate", DESCRIPTION)
    parser.add_argument("--workdir", required=True, metavar="FOLDER", help="a run's folder")
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows at a time; the run's own by default")
    parser.add_argument(
        "--ensemble",
        action="append",
        default=[],
        metavar="FOLDER,FOLDER",
        help="other classifiers of the same data, whose probabilities are averaged with this run's; may stand twice",
    )
    parser.add_argument(
        "--data",
        default="",
        metavar="FOLDER",
        help="a folder that llm.prepare made with this run's tokenizer, to be scored in place of the run's own data",
    )
    cli.add_which(parser)
    flags = parser.parse_args(argv)
    if flags.batch_size is not None and flags.batch_size < 1:
        parser.error(f"--batch-size={flags.batch_size} must be at least 1")
    hosts.join()
    runs = [
        open_run(name, data=flags.data, average=flags.average, checkpoint=flags.checkpoint)
        for name in (flags.workdir, *filter(None, ",".join(flags.ensemble).split(",")))
    ]
    _check(runs)
    run, kind = runs[0], runs[0].experiment.objective.kind
    scores = _ensemble(runs, flags.batch_size) if len(runs) > 1 else _scores(run, flags.batch_size)
    members = [("runs averaged", f"{len(runs)}")] if len(runs) > 1 else []
    if not hosts.first():
        return
    print(cli.table([("step", f"{run.step:,}"), *members, *report.rows(kind, scores.numbers)]))
    found = {
        "step": run.step,
        "averaged": flags.average,
        "runs": [str(r.workdir) for r in runs],
        "validation": scores.numbers,
    }
    metrics.write_json(run.workdir / ("ensemble.json" if members else "evaluation.json"), found)
    if not members:
        report.write_records(scores, run.workdir)


def _scorer(run: Run, batch_size: int | None, progress) -> Scorer:
    spec, prepared = run.experiment.evaluation, run.prepared
    if run.experiment.objective.kind == "preference":
        found = read_reference(run.workdir, prepared)
        if found is None:
            raise InputError(f"{run.workdir / REFERENCE} is missing, which the run was learned against: put it back")
        prepared = with_reference(prepared, found[0])
    progress.total = len(run.prepared.validation)
    return Scorer(
        run.model,
        run.experiment.objective.kind,
        prepared,
        spec if batch_size is None else spec.with_batch_size(batch_size),
        run.experiment.training.loss_chunk,
        run.mesh,
        run.experiment.generation,
        run.experiment.training.preference_beta,
    )


def _scores(run: Run, batch_size: int | None) -> Scores:
    with jax.set_mesh(run.mesh), tqdm(desc="validating", unit="row", disable=not hosts.first()) as bar:
        return _scorer(run, batch_size, bar).scores(run.params, bar.update)


def _check(runs: list[Run]) -> None:
    """Raises InputError unless all runs have data and several are classifiers with one set of classes and examples."""
    first, counts = runs[0], [len(run.prepared.validation) for run in runs]
    for run, count in zip(runs[1:], counts[1:]):
        if run.experiment.objective.kind != "classification" or first.experiment.objective.kind != "classification":
            raise InputError("--ensemble averages the probabilities of classifiers; give runs of that objective")
        if run.labels != first.labels or count != counts[0]:
            raise InputError(f"--ensemble: {run.workdir} was validated on other data than {first.workdir}")


def _ensemble(runs: list[Run], batch_size: int | None) -> Scores:
    """The scores of the mean of the runs' probabilities."""
    total, labels = -np.inf, None
    for run in runs:
        with jax.set_mesh(run.mesh), tqdm(desc=str(run.workdir), unit="row", disable=not hosts.first()) as bar:
            scorer = _scorer(run, batch_size, bar)
            logits_EC, found = scorer.logits(run.params, bar.update)
        if labels is not None and not np.array_equal(found, labels):
            raise InputError(f"--ensemble: {run.workdir} has the examples in another order")
        total, labels = np.logaddexp(total, logits_EC), found
    assert labels is not None
    return scorer.of_logits(total - np.log(len(runs)), labels)


if __name__ == "__main__":
    cli.run(main, hosts.leave)
