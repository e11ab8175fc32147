"""`python -m llm.evaluate`: the scores of a run over its whole validation set."""

import dataclasses

import jax
from tqdm import tqdm

from llm import cli
from llm.evaluation.perplexity import compile_row_losses, perplexity
from llm.run_folder import open_run
from llm.training import metrics

DESCRIPTION = """\
Loss, perplexity and bits per byte of a run's newest checkpoint over its whole validation set.

The batch size changes speed, not the result (to 1e-5). The scores also go to evaluation.json in the run's folder.
"""


def main(argv: list[str]) -> None:
    """Parses and evaluates."""
    parser = cli.parser("evaluate", DESCRIPTION)
    parser.add_argument("--workdir", required=True, metavar="FOLDER", help="a run's folder")
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows at a time; the run's own by default")
    flags = parser.parse_args(argv)
    if flags.batch_size is not None and flags.batch_size < 1:
        parser.error(f"--batch-size={flags.batch_size} must be at least 1")
    run = open_run(flags.workdir)
    batch_size = flags.batch_size or run.experiment.evaluation.batch_size
    with jax.set_mesh(run.mesh), tqdm(total=len(run.prepared.validation), desc="validating", unit="row") as bar:
        result = perplexity(
            compile_row_losses(run.model, run.experiment.training.loss_chunk),
            run.params,
            run.prepared.validation,
            batch_size,
            run.mesh,
            progress=bar.update,
        )
    print(
        cli.table(
            [
                ("step", f"{run.step:,}"),
                ("validation tokens", f"{result.tokens:,} encoding {result.bytes:,} bytes"),
                ("loss", f"{result.loss:.5f} nats/token"),
                ("perplexity", f"{result.perplexity:.3f}"),
                ("bits per byte", f"{result.bits_per_byte:.5f}"),
            ]
        )
    )
    metrics.write_json(run.workdir / "evaluation.json", {"step": run.step, "validation": dataclasses.asdict(result)})


if __name__ == "__main__":
    cli.run(main)
