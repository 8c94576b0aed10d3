"""Sparse tensors in batches and between layers are refused in the user's words, and what the refusals advise works."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.data import Batches
from delock.errors import UsageError

pytestmark = pytest.mark.usefixtures("own_random")


class Graphs(nn.Module):
    """Two layers over the edges of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.out((adjacency @ self.high((adjacency @ self.low(x)).relu())).relu())


class Edges(Graphs):
    """The same from indices and values."""

    def forward(self, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:  # type: ignore[override]
        def summed(h: Tensor) -> Tensor:
            return torch.zeros_like(h).index_add(0, indices[0], h[indices[1]] * values[:, None])

        return self.out(summed(self.high(summed(self.low(x)).relu())).relu())


class Sparse(nn.Module):
    """Returns a sparse tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to_sparse()


def batches(layout: torch.layout = torch.sparse_coo) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [
        {"x": torch.randn(n, 6), "adjacency": torch.rand(n, n).gt(0.5).float().to_sparse(layout=layout), "labels": torch.randint(3, (n,))}
        for n in (8, 8, 5)
    ]


def fit(model: nn.Module, train: Any, test: Any = None, **options: Any) -> Any:
    given = {"stages": 2, "workers": "inline", "method": "bp", "epochs": 1, **options}
    return delock.fit(model, train, test, loss=cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1), **given)


def dense(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"x": batch["x"], "adjacency": batch["adjacency"].to_dense()}


def edges(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"x": batch["x"], "indices": batch["adjacency"].indices(), "values": batch["adjacency"].values()}


def nodes(batch: dict[str, Tensor]) -> int:
    return len(batch["x"])


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("workers", ["inline", "processes"])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_sparse_input_is_refused_by_its_name(layout: torch.layout, workers: str) -> None:
    with pytest.raises(UsageError, match=rf"batch 0 of epoch 0 of the data: the input 'adjacency' holds a sparse tensor \({layout}\)"):
        fit(Graphs(), batches(layout), workers=workers)


def test_sparse_targets_and_inputs_by_place_are_refused() -> None:
    x = torch.randn(4, 6)
    chain = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    for data, says in (
        ([(x, torch.eye(4, 3).to_sparse())], "the targets hold a sparse"),
        ([(x.to_sparse(), torch.zeros(4).long())], "input 0 holds a sparse"),
    ):
        with pytest.raises(UsageError, match=says):
            fit(chain, data)


def test_test_data_and_a_later_batch_are_refused_too() -> None:
    plain = [{**batch, "adjacency": batch["adjacency"].to_dense()} for batch in batches()]
    with pytest.raises(UsageError, match="the input 'adjacency' holds a sparse tensor"):
        fit(Graphs(), Batches(plain, samples=nodes), Batches(batches(), samples=nodes))
    with pytest.raises(UsageError, match="batch 2 of epoch 0 of the data: the input 'adjacency' holds a sparse tensor"):
        fit(Graphs(), Batches([*plain[:2], batches()[2]], samples=nodes))


class OwnLoader:
    """Has the form of a Loader, which is read without a rule."""

    def __len__(self) -> int:
        return 1

    def sizes(self) -> list[int]:
        return [4]

    def epoch(self, e: int) -> Any:
        yield torch.randn(4, 6).to_sparse(), torch.zeros(4).long()


def test_a_loader_of_the_users_own_is_refused_too() -> None:
    with pytest.raises(UsageError, match="a sparse tensor"):
        fit(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), OwnLoader())


def test_what_the_refusal_advises_works_and_gives_the_same_losses() -> None:
    found = []
    for cls, inputs in ((Graphs, dense), (Edges, edges)):
        torch.manual_seed(1)
        found.append(fit(cls(), Batches(batches(), inputs=inputs, samples=nodes)).losses)
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_layer_that_returns_a_sparse_tensor_is_refused() -> None:
    layers = [nn.Linear(6, 8), Sparse(), nn.Flatten(), nn.Linear(8, 3)]
    with pytest.raises(UsageError, match=r"layer 1 \(1, Sparse\) returns a sparse tensor \(torch.sparse_coo\), and only dense"):
        fit(nn.Sequential(*layers), [(torch.randn(4, 6), torch.zeros(4).long())])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_whatever_their_layout(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)], layout=layout)
    with pytest.raises(UsageError, match=r"input 0 holds a nested tensor \(torch\.\w+\), and only dense tensors go through stages"):
        fit(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), [(nested, torch.zeros(2, dtype=torch.long))])
