"""Refusals: each function here raises UsageError for one thing that does not fit, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from delock.data.iterable import weigher
from delock.data.loader import LoadedBatch, call_of, loaded
from delock.data.named_sets import NamedSets, sets_of
from delock.errors import UsageError, users_own
from delock.links import meeting
from delock.links.connect import refuse_link
from delock.memory.sizes import Outputs
from delock.methods import Method
from delock.optim.factories import refuse_class
from delock.optim.rates import monitor_of
from delock.options import EMA, Acts, Checkpoint, Compression, Execution, check_types
from delock.partition.layers import Layer, has_batch_norm, resolve_cuts
from delock.partition.measure import LayerCost
from delock.plan import check, sends_errors, unroll
from delock.recomputation import refuse_with_mixed
from delock.run.request import Request

PLAIN = ("stages", "epochs", "batches", "eval_every", "clip", "seed", "device")
GROUPS = ("execution", "placement", "compression", "simulation", "report", "checkpoint")


def refuse_wrong_types(request: Request) -> None:
    """Raises UsageError for a number, a text, a group of options, a method or a factory that is something else."""
    check_types(request, (*PLAIN, *GROUPS))
    if not isinstance(request.method, Method):
        raise UsageError(f"method is {request.method!r}, but it must be a method of delock.methods, as delock.FDG(), or its name")
    if not isinstance(request.model, torch.nn.Module | list | tuple):
        request.network.layers()  # raises UsageError
    cuts = request.cuts
    if cuts is not None and (isinstance(cuts, str) or not all(type(cut) is int or isinstance(cut, str) for cut in cuts)):
        raise UsageError(f"cuts is {cuts!r}, but it must be a list of the layers that stages begin with, as numbers or names")
    if isinstance(request.loss, type):
        raise UsageError(f"loss is the class {request.loss.__name__}: give {request.loss.__name__}(), not {request.loss.__name__}")
    _refuse_metrics(request)
    refuse_class("optimizer", request.optimizer)
    refuse_class("schedule", request.schedule)
    if not callable(request.optimizer):
        raise UsageError(
            f"optimizer is {request.optimizer!r}, but it must be a torch.optim.Optimizer of the model's parameters, or a function of every "
            "stage's, as functools.partial(torch.optim.SGD, lr=0.1)"
        )
    if request.schedule is not None and not callable(request.schedule):
        raise UsageError(
            f"schedule is {request.schedule!r}, but it must be one of torch.optim.lr_scheduler for the optimizer that is given, or a "
            "function of every stage's optimizer"
        )


def _refuse_metrics(request: Request) -> None:
    """Raises UsageError for metrics that are no functions by name, or would have the names of losses."""
    metrics = request.metrics
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) and callable(one) for name, one in metrics.items()):
        raise UsageError(f"metrics is {metrics!r}, but it must be a dict with a function metric(outputs, targets) for every name")
    if isinstance(request.test, NamedSets) and "loss" in metrics:
        raise UsageError("a metric is called loss, as the loss of each of the several test sets is: give it another name")


def refuse_wrong_callbacks(callbacks: object) -> None:
    """Raises UsageError unless it is a list of functions and of callbacks that act."""
    if isinstance(callbacks, Sequence) and (kinds := [one for one in callbacks if isinstance(one, type)]):
        raise UsageError(f"callbacks holds the class {kinds[0].__name__}: give {kinds[0].__name__}(...), not {kinds[0].__name__}")
    if not isinstance(callbacks, Sequence) or not all(callable(one) or isinstance(one, Acts) for one in callbacks):
        raise UsageError(
            f"callbacks is {callbacks!r}, but it must be a list of functions of an event, as [print], or of EarlyStopping and others"
        )


def refuse_wrong_link(method: Method, link: str, device: str) -> None:
    """Raises UsageError for a link between processes that the method or the device cannot use."""
    refuse_link(link, device)
    if link == "shared" and not method.planned:
        raise UsageError(f'{method.name} drops messages that come too late, which only gloo can do: use link "auto" or "gloo"')


def refuse_replay(request: Request) -> None:
    """Raises UsageError if recorded visits are to be done again in several processes."""
    if request.workers != "inline":
        raise UsageError('recorded visits are done again in one process: use workers="inline"')


def refuse_sessionless(request: Request) -> None:
    """Raises UsageError for a run that cannot be handed its batches one by one."""
    if request.workers == "torchrun":
        raise UsageError("a session runs on one host, with processes of its own: under torchrun use fit")
    if isinstance(request.method, Method) and not request.method.planned:
        raise UsageError(f"the stages of {request.method.name} run freely, so no loop can hand them batches in step: use fit")
    for what, given in {"captured": request.execution.captured, "replay": request.simulation.replay is not None}.items():
        if given:
            raise UsageError(f"a session does not go with {what}: leave it out, or use fit")
    for name in ("every", "best", "restarts"):
        if isinstance(request.checkpoint, Checkpoint) and getattr(request.checkpoint, name):
            raise UsageError(f"{name} of the checkpoint is given, but a session is saved when its loop calls save(): leave it out")
    for one in request.callbacks:
        if not isinstance(one, EMA):
            name = type(one).__name__ if isinstance(one, Acts) else getattr(one, "__name__", repr(one))
            raise UsageError(f"callbacks of a session holds {name}, but its loop has all results and can act by them: leave it out")
    if monitor_of(request.schedule):
        raise UsageError("a session evaluates when its loop says, so no schedule goes by that: leave it out, and set lr in the loop")
    if request.workers == "processes" and meeting.here() is None:
        raise UsageError('a session hands batches over in shared memory, which this system lacks (Linux has it): use workers="inline"')


def refuse_unsavable(request: Request) -> None:
    """Raises UsageError for a run that cannot be saved in checkpoints."""
    for what, given in {
        "captured": request.execution.captured,
        "emulate": request.simulation.emulate,
        "replay, which begins where resume says and writes none": _writes(request) and request.simulation.replay is not None,
    }.items():
        if given:
            raise UsageError(f"checkpoint does not go with {what}: leave one of them out")
    if request.checkpoint and request.checkpoint.judged:
        if request.test is None:
            raise UsageError("best asks for the best evaluation, but there is no test data: give it, or leave best out")
        refuse_unknown_measure(request, request.checkpoint.judged[0], "best goes by")
    if not request.method.planned and not request.method.free_running:
        raise UsageError("turns that are drawn for a whole run cannot be saved in checkpoints: use order free, or leave checkpoint out")


def refuse_unknown_measure(request: Request, name: str, what: str) -> None:
    """Raises UsageError for a measure that evaluations do not have."""
    known = ["loss", *request.metrics]
    known += [f"{one}/{measure}" for one in sets_of(request.test) if one for measure in known] if request.test is not None else []
    if name not in known:
        raise UsageError(f"{what} {name!r}, but evaluations have {', '.join(known)}: use one of them")


def _writes(request: Request) -> bool:
    """Returns True for options that ask for more than to begin at a checkpoint."""
    options = request.checkpoint
    return options is not None and (options.resume is None or options.every is not None or options.best is not None)


def refuse_uncapturable(request: Request) -> None:
    """Raises UsageError if the request alone shows that ticks cannot be CUDA graphs."""
    if torch.device(request.device).type != "cuda":
        raise UsageError(f'captured ticks need a GPU, but device is "{request.device}": use device "cuda", or leave captured out')
    if request.workers != "inline":
        raise UsageError(f"captured ticks run all stages in one process, but workers is {request.workers}: use workers inline")
    codecs, simulation = request.compression.activations or request.compression.errors, request.simulation
    beside = {"codecs": codecs, "slow": simulation.slow, "emulate": simulation.emulate, "trace": request.report.trace}
    beside |= {"compile": request.execution.compile}
    for name, given in beside.items():
        if given:
            raise UsageError(f"captured does not go with {name}: leave one of them out")
    if weigher(request.train):
        raise UsageError("captured ticks take every batch to weigh the same, but the data has weights: leave Batches or captured out")
    if len(sizes := sorted(set(request.train.sizes() or []), reverse=True)) > 1:
        raise UsageError(
            f"captured ticks have memory for batches of one size, but here they have {' and '.join(map(str, sizes))} samples: "
            "use a batch size that divides the samples, or drop the last batch"
        )


def refuse_unfit(layers: list[Layer], K: int, cuts: Sequence[int | str] | None, method: Method, sizes: list[int] | None) -> None:
    """Raises UsageError if network, cuts, method and the sizes of the batches (if known) do not fit each other. It computes nothing."""
    if len(layers) < K:
        raise UsageError(f"cannot cut a network of {len(layers)} layers into {K} stages: use at most {len(layers)}")
    if cuts is not None:
        resolve_cuts(layers, cuts)
    check(unroll(method, K, 2 * method.batches_per_update + 2))
    if sizes is not None and has_batch_norm(layers):
        refuse_single_samples(sizes, method.micro_batches)


def refuse_untrainable(layers: list[Layer]) -> None:
    """Raises UsageError for a network in which nothing learns; a single stage may be frozen."""
    if not any(weight.requires_grad for layer in layers for weight in layer.module.parameters()):
        raise UsageError(
            "the model has no parameter that learns, so training would change nothing: let some with requires_grad_(True), or give it a "
            "layer that has parameters"
        )


def first_of_test(request: Request) -> dict[str, LoadedBatch]:
    """Returns the first batch with samples of each test set, by what an error calls the set.

    Raises UsageError for test data without a sample, or that calls the model otherwise than the training data.
    """
    found = {}
    for name, test in sets_of(request.test).items() if request.test is not None else ():
        which, sizes = f"test data {name!r}" if name else "test data", test.sizes()
        with users_own("the test data"):
            first = next((one for one in loaded(test, 0) if one.samples), None) if sizes is None or any(sizes) else None
        if first is None:
            raise UsageError(f"the {which} has no samples, so an evaluation has no mean: give it some, or leave test out")
        call, other = call_of(request.train), call_of(test)
        if call is not None and other is not None and other != call:
            raise UsageError(
                f"the {which} gives the model {other.words()}, but the training data gives it {call.words()}: let both give it the same"
            )
        found[which] = first
    return found


def refuse_other_rows(execution: Execution, inputs: Sequence[Outputs], n: int) -> None:
    """Raises UsageError where the first of a layer's inputs, whose rows are cut into chunks, has no row for each of `n` samples."""
    for i, own in enumerate(inputs if execution.chunks > 1 else ()):
        shape = own[0][0]
        if not shape or shape[0] != n:
            raise UsageError(
                f"chunks cut the rows of the first tensor that a layer takes, but that of layer {i} has shape {shape} in a batch of {n} "
                "samples: put one with a row per sample first, or leave chunks out"
            )


def refuse_recomputation(method: Method, execution: Execution, what: str) -> None:
    """Raises UsageError if `what`, which computes again in a backward, does not go with the method or with captured ticks."""
    if method.mixed:
        refuse_with_mixed(what)
    if execution.captured:
        raise UsageError(
            f"captured does not go with activation checkpointing, but {what} computes again in the backward (torch.utils.checkpoint): "
            "leave one of them out"
        )


def refuse_single_samples(sizes: list[int], micro_batches: int) -> None:
    """Raises UsageError for a single sample before BatchNorm, which has no variance; torch would stop in the middle of an epoch."""
    for n in sorted(set(sizes)):
        if 1 in (len(part) for part in torch.empty(n, device="meta").tensor_split(micro_batches)):
            count = f"{n} samples" if n > 1 else "one sample"
            split = f", split into {micro_batches} micro-batches," if micro_batches > 1 else ""
            raise UsageError(
                f"a batch of {count}{split} would put a single sample in front of BatchNorm, which needs at least two: "
                "use another batch size, fewer micro-batches, or a number of samples that leaves no such rest"
            )


def refuse_unfit_codecs(request: Request, cut: Sequence[LayerCost]) -> None:
    """Raises UsageError if a codec cannot take what a stage sends, or if nothing is sent that it could take."""
    K, codec = len(cut) + 1, request.compression.activations
    for k, cost in enumerate(cut):
        if codec:
            codec.check(cost.outputs, f"stage {k}")
    refuse_error_codec(request.compression, request.method, K)


def refuse_error_codec(compression: Compression, method: Method, K: int) -> None:
    """Raises UsageError for a codec of errors where none are sent."""
    if compression.errors and K > 1 and not sends_errors(method, K):
        raise UsageError(f"{method.name} sends no errors down, so there is none for an error codec: leave it out")
