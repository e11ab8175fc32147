"""A search by optuna over ranges of fields; its study is kept in a file of the sweep's folder and goes on there."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from llm import config
from llm.errors import InputError
from llm.sweeps.report import loss_of
from llm.sweeps.runs import Sweep
from llm.sweeps.settings import Range, Setting

STUDY = "study.log"
Space = Mapping[str, Range | tuple]


def space_of(sweep: Sweep) -> Space:
    """The ranges, or tuples of choices, that the experiment's search() gives fields.

    Raises:
        InputError: there is no search(), it gives no field, or a range that is none or has values that the field takes
            not.
    """
    found = config.stated(sweep.location, "search")
    where = f"--config={sweep.location}: search()"
    if not isinstance(found, Mapping) or not found:
        raise InputError(f"{where} returned {found!r}, expected fields and their llm.sweeps.Range or tuple of choices")
    for path, values in found.items():
        if isinstance(values, Range):
            if not values.low < values.high or (values.log and values.low <= 0):
                above = ", above 0 as it is searched by its logarithm" if values.log else ""
                raise InputError(f"{where}, {path}={values}: low must be below high{above}")
            ends: tuple = (values.low, values.high)
        elif isinstance(values, tuple) and values and all(_plain(one) for one in values):
            ends = values
        else:
            raise InputError(f"{where}, {path}={values!r}: expected a llm.sweeps.Range or a tuple of numbers or texts")
        for end in ends:
            sweep.resolve(Setting(f"{path}={end}", {path: end}))
    return found


def search(
    sweep: Sweep,
    space: Space,
    trials: int,
    launch: Callable[[Setting], str],
    row: Callable[[Setting, str], dict[str, Any]],
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Runs trials until the study has `trials` of them; returns a row for each, in their order.

    The study minimises the validation loss, by optuna's tree-structured Parzen estimator (Bergstra et al. 2011). Trials
    that an earlier command left unfinished are run first, with their own values.

    Args:
        launch: runs a setting; returns why it failed, or "".
        row: its row, given that.

    Raises:
        InputError: optuna is not installed, or the study searched something else.
        Stopped: from `launch`.
    """
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = sweep.workdir / STUDY
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    # A sampler that starts anew with the seed of the last one would draw that one's first values again.
    known = [s for s in optuna.get_all_study_summaries(storage) if s.study_name == "sweep"]
    seed = config.load(sweep.location).seed + (known[0].n_trials if known else 0)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(
        storage=storage, study_name="sweep", direction="minimize", sampler=sampler, load_if_exists=True
    )
    about = json.dumps({"space": {path: repr(values) for path, values in space.items()}, "shared": list(sweep.shared)})
    before = study.user_attrs.setdefault("about", about) if study.trials else about
    if before != about:
        raise InputError(f"{path} searched {before}, this command {about}; name another --workdir")
    study.set_user_attr("about", about)

    def setting(trial) -> Setting:
        return Setting(f"trial-{trial.number:03d}", {name: trial.params[name] for name in space})

    states = optuna.trial.TrialState
    distributions = {name: _distribution(optuna, values) for name, values in space.items()}
    failed: dict[str, str] = {}
    left = [trial for trial in study.trials if trial.state == states.RUNNING]
    while left or len(study.trials) < trials:
        trial = left.pop(0) if left else study.ask(distributions)
        one = setting(trial)
        say(f"{one.name} of {trials}: " + ", ".join(f"{name}={value}" for name, value in one.fields.items()))
        why = launch(one)
        loss = loss_of(row(one, why))
        if why or loss is None or not math.isfinite(loss):
            failed[one.name] = why or "it has no validation loss"
            study.tell(trial.number, state=states.FAIL)
            say(f"{one.name} failed: {failed[one.name]}")
        else:
            study.tell(trial.number, loss)
    earlier = "failed before; another --workdir searches anew"
    return [
        row(setting(trial), failed.get(setting(trial).name, earlier if trial.state == states.FAIL else ""))
        for trial in study.trials
    ]


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _distribution(optuna: Any, values: Range | tuple) -> Any:
    if isinstance(values, tuple):
        return optuna.distributions.CategoricalDistribution(values)
    whole = isinstance(values.low, int) and isinstance(values.high, int)
    kind = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
    return kind(values.low, values.high, log=values.log)


def _optuna() -> Any:
    try:
        import optuna  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "--optuna needs the package optuna, which is not installed: pip install optuna==5.0.0"
        ) from None
    return optuna


def check_installed() -> None:
    """Raises InputError when there is no optuna."""
    _optuna()
