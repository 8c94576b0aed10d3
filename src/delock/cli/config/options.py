"""Defines the options of `delock train` and `delock compare`, in groups; on the command line and in a file they are flat.

The groups that `fit` takes too are those of `delock.options`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from delock.cli.config.defaults import IMAGES, TEXT, either, shown, text
from delock.cli.config.update import UpdateOptions
from delock.methods import METHODS, options
from delock.options import Compression, Execution, Placement, Report, Simulation

OWN = "(default: the method's own)"


def own(option: str, what: str, values: str | None = None) -> Any:
    """Describes for --help an option of methods, beginning with the methods that have it."""
    having = ", ".join(name for name, method in METHODS.items() if option in options(method))
    return arg(help=f"{having}: {what}", help_behavior_hint=OWN, metavar=values)


@dataclass(frozen=True)
class AlgorithmOptions:
    """The method and its own options; an option of another method is refused."""

    method: Annotated[
        str | None, arg(help=f"{', '.join(METHODS)}.", help_behavior_hint=f"(default: {IMAGES['method']}; text: {TEXT['method']} in parts)")
    ] = None
    accumulate: Annotated[int | None, own("accumulate", "batches per update; of bp, micro-batches per batch.")] = None
    micro_batches: Annotated[int | None, own("micro_batches", "micro-batches per batch; of text without --method, as many as stages.")] = (
        None
    )
    beta: Annotated[float | None, own("beta", "factor of every error received, in (0, 1].")] = None
    at: Annotated[Literal["stash", "replay", "mixed"] | None, own("at", "the weights at which the derivative is taken.")] = None
    ahead: Annotated[
        Literal["part", "mean"] | None,
        own("ahead", "forward at predicted weights, ahead by the part's own staleness, or by the stage's mean (see --correct)."),
    ] = None
    behind: Annotated[int | None, own("behind", "forward and backward at weights of this many updates ago, to measure delay.")] = None
    order: Annotated[
        Literal["forward-first", "backward-first", "free", "sampled", "round-robin"] | None,
        arg(help_behavior_hint=OWN),
    ] = None
    """fdg, adl: order of work inside a tick, forward-first or backward-first; dgl-async: a process per stage at its own pace (free), or
    one process in which the next stage to act is drawn (sampled), or all act in turn (round-robin)."""
    reduce: Annotated[Literal["sum", "mean"] | None, own("reduce", "reduction of the accumulated gradients.")] = None
    p: Annotated[tuple[int, ...] | None, own("p", "lag of activations in ticks, one per link or one for all.", "TICKS ...")] = None
    q: Annotated[tuple[int, ...] | None, own("q", "lag of errors in ticks, one per link or one for all.", "TICKS ...")] = None
    n_wise: Annotated[
        int | None,
        own("n_wise", "stages that a loss's gradient reaches; 1 is local learning, the number of stages is backpropagation."),
    ] = None
    combine: Annotated[Literal["furthest", "sum", "mean"] | None, own("combine", "the losses within reach that train a stage.")] = None
    send: Annotated[
        Literal["early", "late"] | None,
        own("send", "send an error before the weight gradient is computed (early), or after it."),
    ] = None
    buffer: Annotated[int | None, own("buffer", "mini-batches in the replay buffer in front of every stage but the first.")] = None
    max_reuse: Annotated[int | None, own("max_reuse", "times that a batch in the buffer may be read; 0 sets no limit.")] = None
    slow_stage: Annotated[int | None, own("slow_stage", "the stage that --noise slows down.")] = None
    noise: Annotated[float | None, own("noise", "slows that stage S = 1 / (1 - noise) times, in [0, 1).")] = None


@dataclass(frozen=True)
class NetworkOptions:
    """The network and its cuts."""

    model: Annotated[str | None, either("model")] = None
    """resnet8, resnet20, wrn-16-4, cnn, mlp, ...; for text gpt. Of elsewhere: torchvision/NAME, timm/NAME, hf/CONFIG (a config.json of
    transformers, a folder with one, or ORG/NAME on the hub), FILE.py:FUNCTION, which returns a module."""
    dropout: float = 0.0
    """Dropout rate, for models that have dropout."""
    head: Annotated[str | None, shown("by the shape of the output")] = None
    """dgl, dgl-async, interlocking: auxiliary head of stages with a loss of their own: mlp-sr, cnn, conv128-bn-conv64-bn-pool-fc, ..."""
    stages: Annotated[int | None, shown("2")] = None
    """Number of stages; the cuts make them even, see --balance."""
    cuts: Annotated[tuple[int | str, ...] | None, shown("even stages", "LAYER ...")] = None
    """First layers of stages 1, 2, ..., in place of --stages: by number (5 9) or name (layer2 layer3.1)."""


@dataclass(frozen=True)
class DatasetOptions:
    """The data. Order and augmentation are the same for every method and number of stages."""

    data: str = "digits"
    """digits, cifar10, cifar100, mnist, fashion-mnist, folder (DIR/train/CLASS/*.jpg) or synthetic images, or text; or
    FILE.py:FUNCTION, which returns (train, test, loss) as fit takes them."""
    data_dir: Annotated[Path | None, shown("the cache")] = None
    """Directory of the images."""
    download: bool = False
    """Fetch the data set if it is not there."""
    augment: bool = True
    """Crop and flip training images at random."""
    image_size: Annotated[int | None, shown("as they are")] = None
    """folder, synthetic: side of the images in pixels."""
    limit: Annotated[int | None, shown("all")] = None
    """Train on this number of images only."""
    batch_size: Annotated[int | None, either("batch_size")] = None
    """Images, or windows of text, per batch."""
    test_batch_size: int = 256
    """The same in an evaluation."""


@dataclass(frozen=True)
class BatchOptions:
    """The batch that layers are measured on, where nothing is trained."""

    data: str = "digits"
    """Data set that the batch is taken from; synthetic needs no files; text for gpt; all names of train's --data."""
    data_dir: Annotated[Path | None, shown("the cache")] = None
    """Folder of the images."""
    image_size: Annotated[int | None, shown("as they are")] = None
    """folder, synthetic: side of the images in pixels."""
    batch_size: Annotated[int | None, either("batch_size")] = None
    """Images, or windows of text, in the batch."""
    threads: int = 1
    """Threads while measuring."""
    stage_memory: Annotated[tuple[int | str, ...] | None, shown("none", "VALUE ...")] = None
    """Most bytes that a stage may need, as 16G or 900Mi, for all or one per stage; method and optimizer count."""


@dataclass(frozen=True)
class LanguageOptions:
    """The text that --data text reads, and the size of the model gpt. Every character, or byte, is predicted from those before it."""

    text: Annotated[Path | None, shown("the reference manual inside Python")] = None
    """Text file; its last tenth is for testing."""
    level: Annotated[Literal["char", "byte"] | None, text("level")] = None
    """A token is a character (of a UTF-8 file) or a byte (of any file)."""
    context: Annotated[int | None, text("context")] = None
    """Tokens in a window: the model sees no tokens before it."""
    depth: Annotated[int | None, text("depth")] = None
    """Blocks."""
    width: Annotated[int | None, text("width")] = None
    """Features of every token between the blocks."""
    attention_heads: Annotated[int | None, text("attention_heads")] = None
    """Heads of every block's attention; they share the width."""


@dataclass(frozen=True)
class TrainingOptions:
    """The length of the run, and the course of the learning rate."""

    epochs: Annotated[int | None, either("epochs")] = None
    """Passes over the training data; of text, windows with as many tokens as it has."""
    batches: Annotated[int | None, shown("--epochs")] = None
    """Batches to train, in place of --epochs."""
    eval_every: Annotated[int | None, shown("once an epoch")] = None
    """Batches between two evaluations."""
    clip: Annotated[float | None, shown("none")] = None
    """Largest norm of a gradient: of the whole network's for bp, gpipe, 1f1b and zb1p, of each stage's for the other methods."""
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: Annotated[int | None, either("warmup")] = None
    """Batches in which the learning rate rises to --lr."""
    milestones: Annotated[tuple[float, ...], shown("none", "EPOCH ...")] = ()
    """steps: epochs at which the learning rate is multiplied by --gamma."""
    gamma: float = 0.1
    """steps: the factor of a milestone."""
    floor: float = 0.0
    """cosine: the share of --lr that is left at the end."""
    seed: int = 0
    """Seed of initial weights, order, augmentation and dropout."""


@dataclass(frozen=True)
class MachineOptions:
    """The processes and the devices. Under torchrun the ranks it gives are used, one per stage."""

    workers: Literal["processes", "inline"] = "processes"
    """A process per stage, or all stages in this one: with the same cuts the numbers are the same."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class OutputOptions:
    """The files to keep."""

    out: Annotated[Path | None, shown("a new folder in runs")] = None
    """Folder of the run."""
    overwrite: bool = False
    """Replace the run in --out."""
    tensorboard: bool = False
    """Write event files for TensorBoard, too."""
    config: Annotated[Path | None, shown("no file")] = None
    """TOML file with these options; the command line wins."""


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints, in the run's folder: a run that was killed, stopped or cut off goes on from the newest as if nothing had happened."""

    checkpoint: bool = True
    """Keep checkpoints, and save the run when a signal ends it (Ctrl-C, SIGTERM, SIGUSR1)."""
    checkpoint_every: str = "10m"
    """Batches (500) or time (30s, 10m, 2h) between two of them."""
    checkpoint_keep: int = 2
    """Newest ones that are kept."""
    checkpoint_best: Annotated[str | None, shown("none")] = None
    """min:NAME or max:NAME: also keep the one that follows the best evaluation, by a metric or by loss."""
    resume: Annotated[str | None, arg(help_behavior_hint="(default: a new run)", metavar="[RUN|CHECKPOINT]")] = None
    """Go on with a run: the folder of the run or of one of its checkpoints. Without a value, with the newest checkpoint in --out."""
    grace: float = 30.0
    """Seconds in which a signal's checkpoint must be written."""
    max_restarts: int = 0
    """Times that a run may go on by itself after a stage has died, hung or failed; torchrun has an option of its own."""


@dataclass(frozen=True)
class Conditions:
    """Holds the groups of options that `delock train` and `delock compare` share: all but the methods."""

    network: NetworkOptions = field(default_factory=NetworkOptions)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    language: LanguageOptions = field(default_factory=LanguageOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    update: UpdateOptions = field(default_factory=UpdateOptions)
    machine: MachineOptions = field(default_factory=MachineOptions)
    placement: Placement = field(default_factory=Placement)
    execution: Execution = field(default_factory=Execution)
    compression: Compression = field(default_factory=Compression)
    simulation: Simulation = field(default_factory=Simulation)
    report: Report = field(default_factory=Report)
    output: OutputOptions = field(default_factory=OutputOptions)


@dataclass(frozen=True)
class OneMethod:
    """Holds the groups of options that `delock train` has beside the conditions."""

    algorithm: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    survival: CheckpointOptions = field(default_factory=CheckpointOptions)


@dataclass(frozen=True)
class TrainConfig(Conditions, OneMethod):  # in a dataclass the fields of the last base come first
    """Holds the options of one run, for `delock train`."""


@dataclass(frozen=True)
class ComparisonOptions:
    """The rows of the table."""

    methods: Annotated[tuple[str, ...], shown("bp,ddg,fr,fdg,adl,dsp", "METHOD,... ...")] = ("bp", "ddg", "fr", "fdg", "adl", "dsp")
    """Methods, with settings of their own after colons: adl:accumulate=2:lr=0.2, dsp:p=2+1+3, ddg:optimizer=adamw:correct=spike."""
    plain: bool = True
    """Plain PyTorch first: the uncut network in one process, with the threads of all stages, or as many as there are cores."""


@dataclass(frozen=True)
class SeveralMethods:
    """Holds the group of options that `delock compare` has beside the conditions."""

    comparison: ComparisonOptions = field(default_factory=ComparisonOptions)


@dataclass(frozen=True)
class CompareConfig(Conditions, SeveralMethods):
    """Holds the options of several runs side by side, for `delock compare`."""
