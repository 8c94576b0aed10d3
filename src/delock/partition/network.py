"""The network of a run as layers: a chain is taken apart as it is, any other module is traced on a first batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from delock.data.call import Call
from delock.errors import UsageError
from delock.nets.cut_point import cut_points
from delock.partition.graph.cutter import ENOUGH
from delock.partition.graph.examples import Examples
from delock.partition.graph.outputs import OnOutput, by_count, own_loss
from delock.partition.graph.split import Split
from delock.partition.graph.structure import Structure
from delock.partition.layers import Layer, around, is_chain, layers
from delock.partition.traces.kept_split import kept_split

DETECTION = "torchvision.models.detection"
ONE: Structure = ("t", 0)
FORWARD = "forward()"  # no path of a module


class Network:
    """Holds a model, and its layers once they are known.

    call: the way in which the model is called with the tensors of a batch, if not with one argument.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        self.model = model
        self.chain = is_chain(model)  # it is taken apart without tracing
        self.found: list[Layer] | None = None
        self.split: Split | None = None
        self.kept: list[str] = []  # cuts of a checkpoint, by name: the layers of its stages must be found again
        self.opened = ""  # of a chain that is traced nevertheless: the layer to be cut inside

    def layers(self) -> list[Layer]:
        """Returns the layers, after `trace` if the model is no chain."""
        if self.found is None and self.chain:
            self.found = layers(self.model)
        assert self.found is not None
        return self.found

    @property
    def whole(self) -> nn.Module:
        """Returns the model as one module, also where it is given as a list."""
        return self.model if isinstance(self.model, nn.Module) else nn.ModuleList(self.model)

    def marks(self) -> list[str]:
        """Returns the paths of the CutPoints in the model."""
        return cut_points(self.whole)

    def wanted(self, cuts: Sequence[int | str] | None, stages: int) -> list[str]:
        """Returns the names in front of which there must be a cut: those of the cuts, or without cuts all CutPoints."""
        own = [cut for cut in cuts if isinstance(cut, str)] if cuts is not None else self.marks() if stages > 1 else []
        return list(dict.fromkeys([*own, *self.kept]))

    def open(self, wanted: Sequence[str], *, everywhere: bool = False) -> None:
        """Lets a chain be traced as any other model if a wanted cut lies inside one of its layers. A list of modules has no forward.

        everywhere: all places inside its layers are wanted.
        """
        if self.chain and isinstance(self.model, nn.Module):
            inside = (whole for name in wanted if (whole := around(self.layers(), name)))
            self.opened = "its layers" if everywhere else next(inside, "")
            self.chain = not self.opened
            self.found = self.found if self.chain else None

    def named(self, cuts: Sequence[int | str] | None) -> Sequence[int | str] | None:
        """Returns cuts, those of a traced model by name. A number is one if a module is called so, as the layers of an nn.Sequential are.

        Raises UsageError for another number: the pieces are others for another number of stages, or other names.
        """
        if self.chain or cuts is None:
            return cuts
        assert isinstance(self.model, nn.Module)
        names = [path for path, _ in self.model.named_modules() if path]
        example = next((path for path in names if path.rpartition(".")[2] == "1"), names[-1] if names else "NAME")
        for cut in cuts:
            if str(cut) not in names and (isinstance(cut, int) or cut.strip().removeprefix("-").isdecimal()):
                raise UsageError(
                    f"cut {cut!r} is a number, but a {type(self.model).__name__} is traced, and its pieces are numbered anew for every "
                    f"number of stages: give the name of the module that the stage begins with, as cuts=[{example!r}]; "
                    "`delock cuts` lists them"
                )
        return [*map(str, cuts)]

    def trace(self, call: Call, examples: Examples, stages: int, wanted: Sequence[str] = (), enough: float = ENOUGH) -> None:
        """Traces a model that is no chain. Raises UsageError if it cannot be cut.

        wanted: modules in front of which there must be a cut; enough: the number of cuts for which no finer places are looked for.
        """
        if self.chain or self.found is not None:
            return
        assert isinstance(self.model, nn.Module)
        if any(base.__module__.startswith(DETECTION) for base in type(self.model).__mro__):
            raise UsageError(f"a {type(self.model).__name__} detects objects: boxes, whose number follows from values, are out of scope")
        try:
            self.split = kept_split(self.model, call, examples, stages, wanted, enough)
        except UsageError as error:
            if not self.opened:
                raise
            raise UsageError(f"a cut inside {self.opened} needs the whole chain to be traced, which failed: {error}") from error
        self.found = [Layer("", one.module, self.model.training, one.begins, one.also, one.ties) for one in self.split.pieces]

    def traced(self) -> str:
        """Describes the tracing of a model that is no chain."""
        if self.split is None:
            return ""
        but = " but for rounding, as it masks attention otherwise when it is traced" if self.split.told else ""
        kept = "; they were kept by an earlier run" if self.split.kept else ""
        return f"traced by {self.split.how} in {len(self.split.pieces)} pieces, which are equal to the model{but}{kept}"

    def outline(self) -> dict[str, str]:
        """Returns the class of every module by its path, with options of torch's own, and a checksum of what a traced model computes."""
        modules = self.whole.named_modules()
        found = {path: f"{type(one).__name__}({one.extra_repr() if _of_torch(one) else ''})" for path, one in modules}
        return {**found, **({FORWARD: f"{self.split.how} {self.split.checksum:08x}"} if self.split else {})}

    def on_output(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Returns a loss or metric as the last stage calls it."""
        if self.split is None or self.split.structures[True] == self.split.structures[False] == ONE:
            return function
        return OnOutput(function, by_count(self.split.structures))

    def loss(self, given: Callable[[Any, Any], Tensor] | None) -> Callable[[Any, Any], Tensor] | None:
        """Returns the loss as the last stage calls it: the one that is given, or a traced model's own. A chain has none."""
        return self.on_output(given or own_loss) if given or self.split else None


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules")
