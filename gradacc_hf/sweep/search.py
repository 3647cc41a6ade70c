"""The next point of a sweep with `--trials`, chosen by optuna from the results so far."""

from collections.abc import Sequence
from typing import Literal

from gradacc_hf.sweep.space import Point, Space
from gradacc_hf.utils.extras import require


def check_optuna() -> None:
    """Raise MissingExtraError unless optuna is installed."""
    require("gradacc sweep --trials", "sweep", "optuna")


def next_point(
    space: Space, results: Sequence[tuple[Point, float | None]], direction: str, seed: int
) -> Point:
    """Return a point to try.

    The choice depends on the arguments only, so that an interrupted sweep continues with the same points.

    Args:
        space: the settings that vary.
        results: each earlier point with its value; None for a point that failed.
        direction: whether a smaller value is better ("min") or a larger one ("max").
        seed: seed of the random choices.
    """
    import optuna  # of an extra
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces: dict[str, BaseDistribution] = {
        name: CategoricalDistribution([*values]) for name, values in space.choices.items()
    }
    for name, ends in space.ranges.items():
        if ends.is_integer:
            spaces[name] = IntDistribution(int(ends.low), int(ends.high), log=ends.is_log)
        else:
            spaces[name] = FloatDistribution(ends.low, ends.high, log=ends.is_log)
    sampler = optuna.samplers.TPESampler(seed=seed + len(results))
    better: Literal["minimize", "maximize"] = "minimize" if direction == "min" else "maximize"
    study = optuna.create_study(direction=better, sampler=sampler)
    for point, value in results:
        numbers = {n: (int if space.ranges[n].is_integer else float)(point[n]) for n in space.ranges}
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        study.add_trial(
            create_trial(state=state, value=value, params={**point, **numbers}, distributions=spaces)
        )
    chosen = study.ask(spaces).params
    return {n: space.ranges[n].text(chosen[n]) if n in space.ranges else str(chosen[n]) for n in space.names}
