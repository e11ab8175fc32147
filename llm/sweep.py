"""`python -m llm.sweep`: runs of llm.train over the settings that an experiment file names, and what they found."""

import pathlib
from typing import Any

from llm import cli
from llm.errors import InputError, RunFailed, Stopped
from llm.sweeps import Setting, report, runs, search

DESCRIPTION = """\
Runs an experiment once for every setting that its sweep() names, one after the other, each in a folder of its own.

The same command goes on where it was stopped: finished runs are skipped, an interrupted one resumes. A run that fails
is named and the others go on. At the end a table, sweep.json and sweep.png in --workdir.

  --print-jobs prints the commands of the runs that are not finished instead, one a line:
    python -m llm.sweep --config=FILE --workdir=FOLDER --print-jobs | xargs -P 4 -d '\\n' -I{} sh -c '{}'
    sbatch --array=1-8 --wrap 'sh -c "$(sed -n ${SLURM_ARRAY_TASK_ID}p jobs.txt)"'
  The command without it then makes the table.

Fields are set for all runs alike: --config.training.steps=200
"""


def main(argv: list[str]) -> None:
    """Parses, checks every setting, and runs them."""
    parser = cli.parser("sweep", DESCRIPTION)
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="experiments/gpt/ladder.py:rates")
    parser.add_argument("--workdir", required=True, metavar="FOLDER", help="the sweep's folder, runs/rates")
    parser.add_argument("--print-jobs", action="store_true", help="print the commands of the runs, one a line")
    parser.add_argument(
        "--optuna",
        type=int,
        metavar="N",
        help="N trials over the ranges of the experiment's search()",
    )
    flags, rest = parser.parse_known_args(argv)
    if flags.optuna is not None and flags.optuna < 1:
        raise InputError(f"--optuna={flags.optuna}: expected at least 1 trial")
    if flags.optuna is not None and flags.print_jobs:
        raise InputError("--print-jobs and --optuna: trials are chosen by those before them; give one of the two")
    sweep = runs.Sweep(flags.config, pathlib.Path(flags.workdir), tuple(cli.overrides(rest)))
    if flags.optuna is not None:
        search.check_installed()
        space = search.space_of(sweep)
        cli.writable_workdir(flags.workdir)
        _finish(sweep, search.search(sweep, space, flags.optuna, lambda s: runs.launch(sweep, s), _row(sweep)))
        return
    settings = runs.listed(flags.config)
    sweep.check(settings)
    if flags.print_jobs:
        for setting in settings:
            if runs.summary_of(sweep.folder(setting)) is None:
                print(sweep.job(setting))
        return
    cli.writable_workdir(flags.workdir)
    _finish(sweep, _run_all(sweep, settings))


def _row(sweep: runs.Sweep):
    return lambda setting, why: runs.row(sweep, setting, why)


def _run_all(sweep: runs.Sweep, settings: list[Setting]) -> list[dict[str, Any]]:
    """A row for each setting; those so far are written where the sweep is stopped."""
    rows = [runs.row(sweep, setting) for setting in settings]
    for i, setting in enumerate(settings):
        place = f"{i + 1} of {len(settings)}, {setting.name}"
        if rows[i]["state"] == "finished":
            print(f"{place}: finished before", flush=True)
            continue
        print(f"{place}: training, {sweep.folder(setting) / 'train.log'}", flush=True)
        try:
            why = runs.launch(sweep, setting)
        except Stopped:
            report.write(sweep.workdir, sweep.location, rows)
            raise
        rows[i] = runs.row(sweep, setting, why)
        if why:
            cli.say_error(f"{setting.name} failed, {why}")
    return rows


def _finish(sweep: runs.Sweep, rows: list[dict[str, Any]]) -> None:
    """Writes and prints what was found.

    Raises:
        RunFailed: some run failed.
    """
    report.write(sweep.workdir, sweep.location, rows)
    print(f"\n{report.table(rows)}\n\n{cli.table([('all numbers', str(sweep.workdir / 'sweep.json'))])}")
    failed = [row["name"] for row in rows if row["state"] == "failed"]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(rows)} runs failed: {', '.join(failed)}; their train.log says why, and the same "
            "command tries them again"
        )


if __name__ == "__main__":
    cli.run(main)
