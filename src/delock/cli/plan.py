"""`delock plan`: what a method does on K stages, in text, numbers or a picture; nothing is trained, and torch stays out unless measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Any

from delock.cli.arguments import parse
from delock.cli.config import (
    AlgorithmOptions,
    BatchOptions,
    DatasetOptions,
    LanguageOptions,
    NetworkOptions,
    TrainConfig,
    UpdateOptions,
    check_ranges,
    chosen,
    flat,
    make_method,
    resolve,
    shown,
)
from delock.cli.forecast import Forecast, forecast, sentences, written
from delock.cli.profile import Profile, measure_model
from delock.cli.run_folder import dumps
from delock.cli.tables import IDLE, LAYERWISE, STALENESS, Cells, megabytes, memory, milliseconds, per_second, percent
from delock.errors import UsageError
from delock.methods import Method, options, spelled
from delock.options import MOST_THREADS, Placement
from delock.plan import chart, unroll
from delock.timeline import Costs, Prediction, capacities, predict, simulate, speedup

ABOUT = """Show a method's schedule, staleness, memory and speed; nothing is trained.

examples:
  delock plan
  delock plan --method adl --accumulate 2 --stages 4
  delock plan --method dsp --p 2 1 --q 1 3 --stages 3 --link-delay 0.5
  delock plan --method ddg --stages 4 --picture ddg.svg
  delock plan --method ddg --micro-batches 4 --stages 4 --optimizer adamw --correct spike
  delock plan --method fdg --profile resnet20 --data synthetic
  delock plan --method fdg --profile gpt --data text --depth 8
  delock plan --method fdg --profile hf/config.json --data text
  delock plan --method fdg --profile own.py:network --data own.py:batches"""


HALVES = ", b backward to the input alone, w to the weights"
LEAST_COST = 1e-9
CELL = 7  # columns of a cell in most charts
MOST_STAGES = 500
MOST_OPS = 50_000  # are worked out in about a second


@dataclass(frozen=True)
class PlanOptions:
    """The number of stages, and what to show."""

    stages: int = 2
    """Number of stages."""
    slots: Annotated[int | None, shown("what fits")] = None
    """Time slots in the chart."""
    picture: Annotated[Path | None, shown("none")] = None
    """Draw the schedule on the clock, as PNG and as SVG."""
    json: bool = False
    """Print everything as JSON instead."""


@dataclass(frozen=True)
class CostOptions:
    """The cost of an op, in any unit. Where a method splits a batch, a micro-batch costs its share."""

    forward: float = 1.0
    """A forward of a batch on one stage."""
    backward: float = 2.0
    """A backward of a batch on one stage."""
    replay: float = 1.0
    """A recomputation of a batch on one stage."""
    update: float = 0.0
    """An update on one stage; with --profile in seconds."""
    link_delay: float = 0.0
    """A message on its way to the next stage; with --profile in seconds."""


@dataclass(frozen=True)
class ProfiledModel:
    """Holds the model whose costs are measured."""

    profile: Annotated[str | None, shown("none")] = None
    """Model whose layers are measured, and cut so that the stages' times are even; all names of train's --model."""


@dataclass(frozen=True)
class ProfileOptions(BatchOptions, ProfiledModel):  # in a dataclass the fields of the last base come first
    """Costs measured instead, in seconds, on one batch."""


@dataclass(frozen=True)
class PlanConfig:
    """The options of `delock plan`."""

    algorithm: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    costs: CostOptions = field(default_factory=CostOptions)
    profile: ProfileOptions = field(default_factory=ProfileOptions)
    language: LanguageOptions = field(default_factory=LanguageOptions)
    update: UpdateOptions = field(default_factory=UpdateOptions)


@dataclass(frozen=True)
class Answer:
    """All that is known of a method on K stages: on the dataflow clock, where an op starts as soon as it can, and in lock-step."""

    config: PlanConfig
    method: Method
    costs: Costs
    profile: Profile | None
    chart: str
    dataflow: Prediction
    lockstep: float  # speedup
    forecast: Forecast


def run(words: Sequence[str]) -> int:
    """Parse, plan, show; returns the exit code."""
    config = parse(PlanConfig, words, "plan", ABOUT)
    answer = find(config)
    files = draw(answer, config.plan.picture) if config.plan.picture else []
    if config.plan.json:
        print(dumps(as_values(answer), indent=2))
    else:
        show(answer, files)
    return 0


def find(config: PlanConfig) -> Answer:
    """Unroll, measure if asked to, and time on both clocks. Raises UsageError for what does not fit."""
    check_ranges({"stages": (config.plan.stages, 1, MOST_STAGES)})
    _refuse_idle(config)
    workload, K = chosen(_workload(config)), config.plan.stages
    config = replace(config, algorithm=workload.algorithm, update=workload.update)
    method = make_method(config.algorithm).fitted(K)
    _check(config, method)
    slots = config.plan.slots if config.plan.slots is not None else max(8, (get_terminal_size((180, 24)).columns - 12) // CELL)
    picture = chart(unroll(method, K, -(-slots // method.micro_batches)), slots)  # a slot for every forward: later batches are out of sight
    asked = config.profile
    placement = Placement(threads=asked.threads, stage_memory=asked.stage_memory)
    measured = measure_model(resolve(workload), method, K, placement) if asked.profile else None
    costs = cost_model(config.costs, method, K, measured)
    lockstep = speedup(method, K, replace(costs, barrier=True))
    speed = predict(method, K, costs)
    return Answer(config, method, costs, measured, picture, speed, lockstep, forecast(method, config.update, costs, speed))


def _workload(config: PlanConfig) -> TrainConfig:
    """Returns the options as those of a run, which has the same defaults and refusals."""
    asked, network = config.profile, NetworkOptions(model=config.profile.profile, stages=config.plan.stages)
    dataset = DatasetOptions(data=asked.data, data_dir=asked.data_dir, image_size=asked.image_size, batch_size=asked.batch_size)
    return TrainConfig(algorithm=config.algorithm, network=network, dataset=dataset, language=config.language, update=config.update)


def _check(config: PlanConfig, method: Method) -> None:
    if any(method.slowdown(k) > 1 for k in range(config.plan.stages)):
        raise UsageError("noise slows one of several free-running stages, but a plan is of equal ones: leave it out; train counts it")
    costs = {name.replace("_", "-"): (value, 0) for name, value in asdict(config.costs).items()}
    check_ranges({"slots": (config.plan.slots, 1), "threads": (config.profile.threads, 1, MOST_THREADS), **costs})
    if config.costs.forward + config.costs.backward < LEAST_COST:
        raise UsageError(f"forward and backward together are below {LEAST_COST:g}, so a batch takes no time: give larger costs")
    _refuse_endless(method, config.plan.stages, config.plan.slots or 0, config.algorithm.behind or 0)
    if (picture := config.plan.picture) and not picture.parent.is_dir():
        raise UsageError(f"cannot draw {picture}: there is no folder {picture.parent}; make it first")


def _refuse_idle(config: PlanConfig) -> None:
    """Raises UsageError for options without effect: of a measurement without one, and costs in place of which others are measured."""
    given, usual = flat(config), flat(PlanConfig())
    changed = {name for name in {*given, *usual} if given.get(name) != usual.get(name)}
    measuring = [*LanguageOptions.__dataclass_fields__, *ProfileOptions.__dataclass_fields__]
    idle = ("forward", "backward", "replay") if config.profile.profile else measuring
    if found := next((name for name in idle if name in changed), None):
        flag = f"--{found.replace('_', '-')}"
        why = "is measured with --profile" if config.profile.profile else "counts only with --profile, which measures a model"
        raise UsageError(f"{flag} {why}: leave it out{'' if config.profile.profile else ', or give --profile'}")


def _refuse_endless(method: Method, K: int, slots: int, behind: int) -> None:
    """Raises UsageError for a plan with more ops than can be worked out at once."""
    ops = sum(1 for _ in islice(chain.from_iterable(method.tick(0, k, K) for k in range(K)), MOST_OPS + 1))  # of one tick
    ticks = method.span(K) + 8 * method.batches_per_update + behind + slots // method.micro_batches
    if ops * ticks > MOST_OPS:
        raise UsageError(
            f"{spelled(method)} in {K} stages makes a plan of more than {MOST_OPS:,} ops, too many to work out one by one: "
            "use fewer stages, micro-batches, batches per update or slots, or shorter lags"
        )


def cost_model(options: CostOptions, method: Method, K: int, measured: Profile | None) -> Costs:
    """Costs of one op. A method that does a batch in parts has ops that are so much cheaper."""
    share = 1 / method.micro_batches
    forward, backward = (measured.forward, measured.backward) if measured else ((options.forward,) * K, (options.backward,) * K)
    replay = forward if measured else (options.replay,) * K
    return Costs(
        forward=tuple(share * cost for cost in forward),
        backward=tuple(share * cost for cost in backward),
        replay=tuple(share * cost for cost in replay),
        update=(options.update,) * K,
        up=(options.link_delay,) * (K - 1),
        down=(options.link_delay,) * (K - 1),
    )


def draw(answer: Answer, stem: Path) -> list[Path]:
    """The schedule from its start into the steady state, on both clocks."""
    from delock.draw import gantt

    method, K = answer.method, answer.costs.K
    plan = unroll(method, K, method.span(K) + max(2, 12 // method.micro_batches))
    costs = replace(answer.costs, capacity=capacities(method, K))
    clocks = {"dataflow": simulate(plan, costs), "lock-step": simulate(plan, replace(costs, barrier=True))}
    return gantt(clocks, stem, unit="seconds" if answer.profile else "time units")


def as_values(answer: Answer) -> dict[str, Any]:
    """The answer for --json; times in the unit of the costs, seconds with a profile."""
    method, speed = answer.method, answer.dataflow
    return {
        "method": method.name,
        "options": {name: getattr(method, name) for name in options(type(method))},
        "K": answer.costs.K,
        "chart": answer.chart.splitlines(),
        "stages": [
            {"stage": k, **{name: value for name, value in asdict(stage).items() if name != "held"}, **asdict(stage.held)}
            for k, stage in enumerate(speed.stages)
        ],
        "messages": [{"activations": up, "errors": down} for up, down in speed.messages],
        "seconds_per_batch" if answer.profile else "time_per_batch": speed.period,
        "speedup_over_bp": {"dataflow": speed.speedup, "lockstep": answer.lockstep},
        **asdict(answer.forecast),
        "samples_per_second": answer.profile.samples / speed.period if answer.profile else None,
        "profile": asdict(answer.profile) if answer.profile else None,
    }


def show(answer: Answer, files: Sequence[Path]) -> None:
    """The answer as text."""
    from delock.cli.terminal import Terminal

    screen, K, speed, costs = Terminal(), answer.costs.K, answer.dataflow, answer.config.costs
    name = spelled(answer.method)
    halves = HALVES if " b" in answer.chart else ""
    screen.line(f"{name}, K = {K}; a cell is op, batch . version of the weights; F forward, B backward{halves}\n")
    screen.line(f"{answer.chart}\n")
    screen.table(*stage_rows(speed, answer.method))
    for sentence in sentences(answer.forecast, answer.method, answer.config.update, measured=answer.profile is not None):
        screen.line(f"\n{sentence}")
    if measured := answer.profile:
        screen.line(f"\n{measured.model}, cuts {' '.join(map(str, measured.cuts)) or 'none'}, a batch of {measured.samples}:")
        screen.table(*profile_rows(measured))
        for k, tied in enumerate(measured.tied):
            if tied:
                names, size = ", ".join(tied), megabytes(sum(tied.values()))
                screen.line(
                    f"of what stage {k} sends up, {size} are weights that later stages use too ({names}); as much comes down for them"
                )
        screen.line(f"\npredicted: {milliseconds(speed.period)} per batch, {per_second(measured.samples / speed.period, measured.tokens)}")
    unit = "costs as measured" if answer.profile else f"forward {costs.forward:g}, backward {costs.backward:g}, replay {costs.replay:g}"
    unit += f", update {costs.update:g}" if costs.update else ""
    screen.line(f"\nthroughput over bp in {K} stages, {unit}, link delay {costs.link_delay:g}:")
    screen.line(f"  {speed.speedup:.2f} with dataflow (an op starts as soon as it can), {answer.lockstep:.2f} in lock-step")
    if files:
        screen.line(f"picture: {' '.join(map(str, files))}")


def stage_rows(speed: Prediction, method: Method) -> tuple[Cells, list[Cells]]:
    """Head and rows of what every stage has to live with, and to hold; staleness is the mean, with that of every part where they differ."""
    unit = "part" if method.micro_batches > 1 else "batch"
    parted = any(len(set(s.staleness_per_part)) > 1 for s in speed.stages)
    head = ["stage", STALENESS, *([f"of each\n{unit}"] * parted), LAYERWISE if unit == "part" else LAYERWISE.replace("parts", "batches")]
    return [*head, "graphs", "stored\ninputs", "weight\nversions", IDLE], [
        [
            *(f"{k}", f"{s.staleness:.2f}", *([written(s.staleness_per_part)] * parted)),
            *map(str, (s.layer_staleness, s.held.graphs, s.held.inputs, s.held.versions)),
            percent(s.idle),
        ]
        for k, s in enumerate(speed.stages)
    ]


def profile_rows(measured: Profile) -> tuple[Cells, list[Cells]]:
    """Head and rows of what was measured, and the memory that a stage's process will grow by in training."""
    head = ["stage", "layers", "parameters", "forward", "backward", "sends up", "memory"]
    sends = [*(f"{size / 1e6:.2f} MB" for size in measured.messages), "-"]
    columns = zip(measured.layers, measured.parameters, measured.forward, measured.backward, sends, measured.memory, strict=True)
    return head, [
        [f"{k}", f"{layers}", f"{parameters:,}", milliseconds(forward), milliseconds(backward), sent, memory(held)]
        for k, (layers, parameters, forward, backward, sent, held) in enumerate(columns)
    ]
