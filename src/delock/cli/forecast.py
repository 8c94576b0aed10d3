"""Says what a method's staleness and a link's delay mean for training: computed where that is possible, else from our own runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean

from delock.cli.config import UpdateOptions
from delock.cli.config.update import HORIZONS
from delock.cli.measured import Figure, figure
from delock.cli.tables import milliseconds
from delock.methods import FDG, Method, spelled
from delock.timeline import Costs, Prediction, longest_step, predict, warm_ages

LATENCY = 0.05  # share of a batch from which it is spoken of
WHOLE = 8  # parts whose staleness is written out one by one


@dataclass(frozen=True, slots=True)
class Latency:
    """Holds what a link's delay adds to a batch where activations have no lag, so that the parts of a batch wait for each other."""

    parts: int
    delay: float  # of a message
    share: float  # parts x delay, of a batch's period
    period: float
    without_delay: float  # the period then
    with_fdg: float  # the period with lags on both ways, and the same parts


@dataclass(frozen=True, slots=True)
class Stability:
    """Holds the longest stable steps of Adam on a quadratic, with the staleness of the stage that has most of it."""

    stage: int
    staleness: float  # mean age of its Forwards' weights
    beta1: float
    spike: bool  # the optimizer has spike compensation
    step: float  # the longest
    without_delay: float
    other: float  # with spike compensation if the optimizer has none, else without


@dataclass(frozen=True, slots=True)
class Forecast:
    """Holds what can be said beforehand; None for what need not or cannot be said."""

    latency: Latency | None
    stability: Stability | None
    measured: Figure | None


def forecast(method: Method, update: UpdateOptions, costs: Costs, speed: Prediction) -> Forecast:
    """Returns the forecast of a method that is fitted to the stages of the costs, with the defaults of its optimizer filled in."""
    found = figure(spelled(method), costs.K, update)
    return Forecast(latency(method, costs, speed.period), stability(method, costs.K, update), found)


def latency(method: Method, costs: Costs, period: float) -> Latency | None:
    """Returns what links cost if they take over a twentieth of a batch, nothing hides it, and only errors have lags, as with ddg."""
    K, M, delay = costs.K, method.micro_batches, max((*costs.up, *costs.down), default=0.0)
    share = M * delay / period
    if method.offset(K - 1, K) or not method.delay(0, K) or share <= LATENCY:
        return None
    without = predict(method, K, replace(costs, up=(), down=())).period
    return Latency(M, delay, share, period, without, predict(FDG(micro_batches=M), K, costs).period) if period > 1.01 * without else None


def stability(method: Method, K: int, update: UpdateOptions) -> Stability | None:
    """Returns how long Adam's steps may be; None for other optimizers, and if nothing is late."""
    if update.optimizer not in ("adam", "adamw") or update.beta1 is None:
        return None
    stage = max(range(K), key=lambda k: method.delay(k, K))
    [ages] = warm_ages(method, K, [stage])
    tau, b, spike = fmean(ages), update.beta1, "spike" in update.correct
    if not tau:
        return None
    shares = {age: n / len(ages) for age, n in Counter(ages).items()}
    r = HORIZONS["adamw"] if update.horizon is None else update.horizon
    plain, compensated = longest_step(shares, b), longest_step(shares, b, r * tau)
    step, other = (compensated, plain) if spike else (plain, compensated)
    return Stability(stage, tau, b, spike, step, longest_step({0: 1.0}, b), other)


def sentences(of: Forecast, method: Method, update: UpdateOptions, *, measured: bool) -> list[str]:
    """Returns the forecast as lines of text; measured: times are in seconds."""
    lines = [_latency(of.latency, measured)] if of.latency else []
    lines += [_stability(of.stability, method, update)] if of.stability else []
    if (one := of.measured) is not None:
        lines.append(f"measured on {one.work}, {one.spelled}: {one.lost:.3g} {one.unit} above bp, each at its best rate ({one.path})")
    return lines


def _latency(one: Latency, measured: bool) -> str:
    numbers = (one.delay, one.period, one.without_delay, one.with_fdg)
    delay, period, without, fdg = (milliseconds(x) if measured else f"{x:.3g}" for x in numbers)
    times = f"{one.parts} parts x a link delay of {delay} are" if one.parts > 1 else f"a link delay of {delay} is"
    takes = f"it takes {period}, without delay {without}; fdg, whose lags on both ways hide delays, {fdg}"
    return f"latency: {times} {100 * one.share:.0f} % of a batch: {takes}"


def _stability(one: Stability, method: Method, update: UpdateOptions) -> str:
    spike = f"with spike, horizon {update.horizon:g}" if one.spike else "without spike"
    head = f"{update.optimizer} {spike}, beta1 {one.beta1:g}, {one.staleness:.3g} updates late (stage {one.stage})"
    percent = 100 * one.step / one.without_delay
    shown = f"{percent:.0f}" if percent >= 10 else f"{percent:.2g}"
    share = f"{one.step:.3g}, {shown} % of the {one.without_delay:.3g} without delay"
    other = f"; {'without' if one.spike else 'with'} spike {one.other:.3g}" if update.optimizer == "adamw" else ""
    left = [name for name, on in (("feedback", "feedback" in update.correct), ("ahead", getattr(method, "ahead", None))) if on]
    return f"{head}: on a quadratic, steps are stable up to {share}{other}" + (f" ({', '.join(left)} not counted)" if left else "")


def written(ages: Sequence[int]) -> str:
    """Returns the staleness of every part of a group: 1 1 1 0; of a long one by how many have it: 12 x 1, 4 x 0."""
    if len(ages) <= WHOLE:
        return " ".join(map(str, ages))
    return ", ".join(f"{len(list(same))} x {age}" for age, same in groupby(ages))
