"""A scaling ladder: GPTs of growing width on Jane Austen's bytes, tokens in proportion to parameters, one rate for all.

One learning rate is carried from width to width by muP (`model.width_base`; Yang et al. 2022). A law, loss =
E + A C^-alpha, is fitted to all rungs but the largest, by compute and by parameters, and judged by the largest.

Command:   python -m llm.sweep --config=experiments/gpt/ladder.py --workdir=runs/ladder
           python -m llm.sweep --config=experiments/gpt/ladder.py:rates --workdir=runs/rates
           python -m experiments.gpt.ladder --ladder=runs/ladder --rates=runs/rates
           python -m llm.train --config=experiments/gpt/ladder.py --workdir=runs/base, the rung of the base width alone
Hardware:  one CPU core
Time:      six rungs 9 min, 25 rates about 25 min, both beside much other work, data prepared before
Score:     1.705 nats a byte (2.459 bits) by the largest, 98,304 parameters and 491,479 tokens, one seed. The law of
           the other five says 1.806, 5.9% too much, and its refits anything from 1.753 to 1.957: these sizes tell no
           floor (0 to 1.80) and no exponent (0.07 to 0.34).
           Of the rates 2^-8 to 2^-4, the best by muP is 2^-5 at width 32, 2^-5 at 64 and 2^-6 at 128, where 2^-5 is
           0.003 nats worse; by the standard parametrisation it falls from 2^-5 to 2^-6 and 2^-8. At width 128 the
           base's best rate costs 0.362 nats there and 0.003 by muP. At their best rates muP has 2.190 and 2.094 nats
           at widths 64 and 128, the standard parametrisation 2.154 and 2.124. The rungs have 2^-6: by 2^-5 the longer
           trainings of widths 48 and 64 are worse, 1.966 and 1.754 (--config.optimizer.learning_rate=0.03125)

The models have a head of their own. With one table for both ends (`:rates --config.model.tied=True`) the best of the
rates was by muP 2^-6, 2^-8 and 2^-6, and at widths 64 and 128 it was 0.3 nats behind the standard parametrisation's.
The variant `long` has widths from 40 to 352, 38 thousand to 3 million parameters; it has not been run.
"""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from llm import cli
from llm.config import Config, default_config, with_variant
from llm.errors import InputError
from llm.evaluation.scaling import Fit, fit
from llm.sweeps import Setting, grid
from llm.training.metrics import write_json

BASE, LAYERS, LENGTH, RATE = 32, 2, 128, 2.0**-6
WIDTHS = (16, 24, 32, 40, 48, 64)
LONG_WIDTHS = (40, 56, 80, 128, 208, 352)
TOKENS_A_PARAMETER = 5
RATES = tuple(2.0**-n for n in (8, 7, 6, 5, 4))


def parameters(width: int) -> int:
    """Those of the blocks' matrices, without the table: 12 D^2 a layer."""
    return 12 * LAYERS * width**2


def get_config(variant: str = "") -> Config:
    """The model of the base width."""
    config = default_config("gpt")
    config.data.train = "austen"
    config.data.split_by = "tail"
    config.data.validation_fraction = 0.01
    config.data.row_length = LENGTH
    config.tokenizer.kind = "bytes"
    config.tokenizer.vocab_size = 257

    config.model.context = LENGTH
    config.model.layers = LAYERS
    config.model.width = BASE
    config.model.width_base = BASE
    config.model.heads = 4
    config.model.scale_embedding = True
    config.model.tied = False  # with one table for both ends muP does not keep the best rate
    config.model.unroll = LAYERS

    config.training.steps = 240
    config.training.batch_size = 4
    config.training.log_every = 10
    config.training.validate_every = 100_000
    config.training.checkpoint_every = 100_000
    config.training.keep_checkpoints = 1
    config.optimizer.learning_rate = RATE
    config.optimizer.warmup_steps = 24
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.evaluation.batch_size = 64
    return with_variant(
        config,
        variant,
        long={},
        rates={"training.batch_size": 8, "training.steps": 150, "optimizer.warmup_steps": 15},
        smoke={"training.steps": 10, "optimizer.warmup_steps": 2},
    )


def sweep(variant: str = "") -> list[Setting]:
    """The rungs; of `rates`, learning rates at three widths with muP and without; of `smoke`, three tiny rungs."""
    if variant == "rates":
        widths = (BASE, 2 * BASE, 4 * BASE)
        carried = grid({"model.width": widths, "optimizer.learning_rate": RATES})
        # At the base width both are the same model.
        other = grid({"model.width": widths[1:], "optimizer.learning_rate": RATES})
        return carried + [Setting(f"standard,{s.name}", s.fields | {"model.width_base": None}) for s in other]
    if variant == "smoke":
        return grid({"model.width": (16, 24, 32)})
    return [_rung(width) for width in (LONG_WIDTHS if variant == "long" else WIDTHS)]


def _rung(width: int) -> Setting:
    steps = round(TOKENS_A_PARAMETER * parameters(width) / (4 * LENGTH))
    fields = {"model.width": width, "training.steps": steps, "optimizer.warmup_steps": steps // 10}
    return Setting(f"width={width}", fields)


# --- what the ladder says ---------------------------------------------------------------------------------------------


class Rung(NamedTuple):
    """A trained size: parameters of its blocks, FLOPs and tokens of its training, validation loss in nats a byte."""

    width: int
    parameters: int
    flops: float
    tokens: int
    loss: float


def finished(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The finished runs of a sweep's folder, as sweep.json has them.

    Raises:
        InputError: there is no sweep.json.
    """
    path = folder / "sweep.json"
    if not path.is_file():
        raise InputError(f"{path} is not there: run python -m llm.sweep with --workdir={folder} first")
    return [row for row in json.loads(path.read_text(encoding="utf-8"))["runs"] if row["state"] == "finished"]


def rungs(folder: pathlib.Path) -> list[Rung]:
    """The finished rungs of a ladder, smallest first.

    Raises:
        InputError: there is no sweep.json in the folder, or it is of something else.
    """
    rows = finished(folder)
    if any("model.width" not in row["fields"] for row in rows):
        raise InputError(f"{folder / 'sweep.json'}: its settings have no model.width; expected a ladder")
    found = [
        Rung(width, parameters(width), row["train_flops"], row["train_tokens"], row["validation"]["loss"])
        for row in rows
        if (width := row["fields"]["model.width"])
    ]
    return sorted(found, key=lambda rung: rung.flops)


def judged(xs: list[float], losses: list[float]) -> tuple[Fit, dict[str, Any]]:
    """The law of all sizes but the largest, and its figures: what it says of the largest, and what that has."""
    found = fit(xs[:-1], losses[:-1])
    said, low_high = float(found.law(xs[-1])), found.interval(lambda law: float(law(xs[-1])))
    return found, {
        "floor": found.law.floor,
        "floor_95": found.interval(lambda law: law.floor),
        "scale": found.law.scale,
        "exponent": found.law.exponent,
        "exponent_95": found.interval(lambda law: law.exponent),
        "largest_said": said,
        "largest_said_95": low_high,
        "largest_measured": losses[-1],
        "error": said / losses[-1] - 1,
    }


def best_rates(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float, list[tuple[float, float]]]]]:
    """Of a sweep of rates, with muP and without: width, best rate, and (rate, loss) of each, by width."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {"muP": {}, "standard": {}}
    for row in rows:
        fields, width = row["fields"], row["fields"]["model.width"]
        point = (fields["optimizer.learning_rate"], row["validation"]["loss"])
        kinds = ["standard"] if "model.width_base" in fields else ["muP", *(["standard"] if width == BASE else [])]
        for kind in kinds:
            found[kind].setdefault(width, []).append(point)
    return {
        kind: [(w, min(ps, key=lambda p: p[1])[0], sorted(ps)) for w, ps in sorted(widths.items())]
        for kind, widths in found.items()
    }


def picture(path: pathlib.Path, ladder: list[Rung], laws: dict[str, Fit], rates: dict | None) -> None:
    """Loss by compute and by parameters, with the laws and their intervals, and by rate where that was swept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    panels = 2 + (0 if rates is None else 2)
    figure, axes = plt.subplots(panels // 2, 2, figsize=(11, 4.5 * panels // 2), squeeze=False, layout="constrained")
    names = {"flops": "training compute (FLOPs)", "parameters": "parameters of the blocks"}
    for place, (name, label) in zip(axes[0], names.items(), strict=True):
        xs, losses, law = [getattr(rung, name) for rung in ladder], [rung.loss for rung in ladder], laws[name]
        line = np.geomspace(xs[0], xs[-1] * 1.5, 60)
        low, high = np.percentile([other(line) for other in law.others], (2.5, 97.5), axis=0)
        place.fill_between(line, low, high, color="tab:blue", alpha=0.15, label="middle 95% of refits")
        best = law.law
        place.plot(
            line, best(line), color="tab:blue", label=f"{best.floor:.2f} + {best.scale:.3g} x^-{best.exponent:.3f}"
        )
        place.plot(xs[:-1], losses[:-1], "o", color="tab:blue", markersize=4, label="fitted to")
        place.plot(xs[-1:], losses[-1:], "*", color="tab:orange", markersize=12, label="held out")
        place.set_xscale("log")
        place.set_yscale("log")
        place.yaxis.set_major_formatter(ticker.FormatStrFormatter("%.2f"))
        place.yaxis.set_minor_formatter(ticker.FormatStrFormatter("%.2f"))
        place.set_xlabel(label)
        place.set_ylabel("validation loss (nats per byte)")
        place.grid(alpha=0.3, which="both")
        place.legend()
    if rates is not None:
        top = max(loss for lines in rates.values() for _, _, points in lines for _, loss in points)
        bottom = min(loss for lines in rates.values() for _, _, points in lines for _, loss in points)
        for place, (kind, lines) in zip(axes[1], rates.items(), strict=True):
            for width, best, points in lines:
                place.plot(*zip(*points), "o-", markersize=4, label=f"width {width}, best {best:.4g}")
            place.set_xscale("log", base=2)
            place.set_ylim(bottom - 0.05, top + 0.05)
            place.set_xlabel("learning rate")
            place.set_ylabel("validation loss (nats per byte)")
            place.set_title("carried by muP" if kind == "muP" else "standard parametrisation")
            place.grid(alpha=0.3)
            place.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Fits laws to a finished ladder, judges them by its largest rung, prints, and writes figures and a picture."""
    parser = cli.parser("", __doc__ or "")
    parser.prog = "python -m experiments.gpt.ladder"
    parser.add_argument("--ladder", default="runs/ladder", metavar="FOLDER", help="of the sweep, %(default)s")
    parser.add_argument("--rates", metavar="FOLDER", help="of the sweep of rates, drawn beside it")
    parser.add_argument("--out", metavar="FOLDER", help="for ladder.json and ladder.png; the ladder's if not given")
    flags = parser.parse_args(argv)
    ladder = rungs(pathlib.Path(flags.ladder))
    losses = [rung.loss for rung in ladder]
    laws, figures = {}, {}
    for name in ("flops", "parameters"):
        laws[name], figures[name] = judged([getattr(rung, name) for rung in ladder], losses)
    rates = None if flags.rates is None else best_rates(finished(pathlib.Path(flags.rates)))
    out = cli.writable_workdir(flags.out or flags.ladder)
    shown = (
        None
        if rates is None
        else {k: [{"width": w, "best": b, "losses": ps} for w, b, ps in v] for k, v in rates.items()}
    )
    write_json(out / "ladder.json", {"rungs": [rung._asdict() for rung in ladder], "laws": figures, "rates": shown})
    picture(out / "ladder.png", ladder, laws, rates)

    print("  width  parameters      FLOPs      tokens    loss")
    for r in ladder:
        print(f"  {r.width:>5}  {r.parameters:>10,}  {r.flops:>9.3g}  {r.tokens:>10,}  {r.loss:.4f}")
    print()
    for name, f in figures.items():
        exponent, floor, said = (
            "{:.4g} to {:.4g}".format(*f[key]) for key in ("exponent_95", "floor_95", "largest_said_95")
        )
        print(
            f"  loss by {name} of all but the largest: {f['floor']:.3f} + {f['scale']:.4g} x^-{f['exponent']:.4f} "
            f"(exponent {exponent}, floor {floor})\n    of the largest it says {f['largest_said']:.4f} ({said}); "
            f"measured is {f['largest_measured']:.4f}: {f['error']:+.1%}"
        )
    for kind, lines in (rates or {}).items():
        print(f"  best rate, {kind}: " + ", ".join(f"{best:.4g} at width {width}" for width, best, _ in lines))
    print(f"\n  {out / 'ladder.png'}")


if __name__ == "__main__":
    cli.run(main)
