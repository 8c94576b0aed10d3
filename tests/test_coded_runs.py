"""Runs with codecs: the same in one process and in many, resumed, from the command line, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.cli import main
from delock.cli.config import CompareConfig, TrainConfig, build, flat, resolve
from delock.cli.rows import rows
from delock.codecs import BF16, INT8, VQ, decode, parse
from delock.errors import UsageError
from delock.keys import key
from delock.links import Message
from delock.links.coded import CodedLink
from delock.links.mailbox import Mailbox
from delock.methods import BP, DDG, DGL, FDG, GPipe, Method
from delock.run.job import StageJob, StageResult

from harness import assert_equal, in_the_same_processes, inline, jobs, same_tree, whole_and_resumed
from messages import activation
from workloads import drawn

pytestmark = pytest.mark.usefixtures("own_random")

SMALL_VQ = "vq:codes=8:dim=2:every=2"


# -- runs --------------------------------------------------------------------------------------------------------------------------


def coded(work: str, K: int, method: Method, codec: str, error_codec: str = "none", **options: Any) -> list[StageJob]:
    made = jobs(work, K, method, **options)
    for job in made:
        job.compression = delock.Compression(codec, error_codec)
    return made


CASES: list[tuple[str, Method, str, str]] = [
    *(("conv", method, codec, "none") for method in (BP(), FDG(), DGL()) for codec in ("bf16", "int8", SMALL_VQ)),
    ("conv", FDG(), "bf16", "bf16"),
    ("conv", GPipe(3), SMALL_VQ, "int8"),
    ("tuple", FDG(), "vq:codes=4:dim=1:every=2", "int8"),
]


@pytest.fixture(scope="module")
def in_three_processes() -> dict[Any, list[StageResult]]:
    return in_the_same_processes({case: coded(case[0], 3, *case[1:]) for case in CASES})


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_processes_equal_one_process(case: tuple[str, Method, str, str], in_three_processes: dict[Any, list[StageResult]]) -> None:
    there, here = in_three_processes[case], inline(coded(case[0], 3, *case[1:]))
    assert_equal(there, here)
    for a, b in zip(there, here, strict=True):
        assert (a.report.sent_up, a.report.sent_down) == (b.report.sent_up, b.report.sent_down)
        assert (a.report.sent_up.raw > 2 * a.report.sent_up.encoded * 0.99) == (a.report.stage < 2)


def test_none_changes_nothing() -> None:
    made = coded("conv", 3, FDG(), "none")
    plain = inline(jobs("conv", 3, FDG()))
    assert_equal(inline(made), plain)
    assert plain[0].report.sent_up.raw == plain[0].report.sent_up.encoded > 0
    assert plain[2].report.sent_up.total == 0


def test_evaluation_does_not_touch_training() -> None:
    for method in (BP(), DGL()):
        with_it, without = (inline(coded("conv", 3, method, SMALL_VQ, evaluate=evaluate)) for evaluate in (True, False))
        assert with_it[-1].losses == without[-1].losses
        for a, b in zip(with_it, without, strict=True):
            same_tree(a.state, b.state)


class Tied(nn.Module):
    """A model whose embedding is its head, too; all its positions share a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)  # (B, T, C)
        near = torch.arange(5.0)[:, None] - torch.arange(5.0)  # (T, T)
        logits: Tensor = self.head(torch.tanh(near @ self.middle(h)))
        return logits.movedim(2, 1)


@pytest.mark.parametrize("codec", ["none", "bf16", "int8", "vq:codes=4:dim=1:every=50"])
@pytest.mark.parametrize("parts", [3, 12])
def test_the_bytes_predicted_are_those_sent_of_parts_that_share_a_weight(codec: str, parts: int) -> None:
    """Parts of 8 samples are not equally large, and of 12 parts 4 are empty."""
    x, y = torch.arange(40).view(8, 5) % 11, torch.arange(40).view(8, 5) % 7
    given: dict[str, Any] = {"method": DDG(micro_batches=parts), "cuts": ["middle"], "optimizer": delock.recipes.SGD(lr=0.01)}
    result = delock.fit(
        Tied(), [(x, y)] * 3, loss=cross_entropy, epochs=1, workers="inline", compression=delock.Compression(codec), **given
    )
    sent = result.stages[0].sent_up
    assert sent.raw == pytest.approx(result.started.messages[0] * sent.messages, abs=sent.messages)
    if codec != "none":
        assert sent.encoded == pytest.approx(result.started.encoded[0][0] * sent.messages)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("codec", ["bf16", "int8", "vq:codes=4:dim=2:every=1"])
def test_errors_are_those_at_the_decoded_activation(codec: str) -> None:
    """One step of backpropagation over two linear maps, against plain PyTorch with a decoded, detached activation between them."""
    torch.manual_seed(0)
    lower, upper = nn.Linear(3, 4), nn.Linear(4, 2)
    x, y = drawn(8, 3), torch.arange(8) % 2

    def encode(h: Tensor, place: tuple[int, int]) -> Tensor:
        return decode((parse(codec) or BF16()).encoder(key(0, "codec", *place, 0)).encode(h, True) or {})

    h = lower(x)
    leaf = encode(h, (0, 1)).requires_grad_()
    loss = cross_entropy(upper(leaf), y)
    (error,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    back = decode(INT8().encoder(0).encode(error, True) or {})
    want = [*torch.autograd.grad(h, lower.parameters(), back), *torch.autograd.grad(loss, upper.parameters())]
    before = [p.detach().clone() for p in (*lower.parameters(), *upper.parameters())]
    sgd = torch.optim.SGD
    delock.fit(
        [lower, upper],
        [(x, y)],
        loss=cross_entropy,
        method="bp",
        optimizer=lambda named: sgd([p for _, p in named], lr=1.0),
        batches=1,
        workers="inline",
        compression=delock.Compression(codec, INT8()),
    )
    for now, old, gradient in zip((*lower.parameters(), *upper.parameters()), before, want, strict=True):
        assert torch.equal(now, old - gradient)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(("method", "stop"), [(FDG(), 1), (FDG(), 3), (DGL(), 3)], ids=str)
@pytest.mark.parametrize("codec", ["int8", "vq:codes=8:dim=2:every=3"])
def test_a_resumed_run_equals_an_uninterrupted_one(method: Method, stop: int, codec: str) -> None:
    whole, second, losses = whole_and_resumed(lambda: coded("conv", 3, method, codec, "int8"), stop)
    for a, b in zip(second.engines, whole.engines, strict=True):
        same_tree(a.stage.module.state_dict(), b.stage.module.state_dict())
        same_tree(a.link.state(), b.link.state())
    assert losses == whole.losses


def test_both_ends_resume_with_the_codebook_that_was_sent() -> None:
    """It came with a message before the checkpoint, or lies in one that is under way; one of the stages is in a new process."""
    for taken in (1, 2):
        ends, again = coded_ends(), coded_ends()
        for b in range(2):
            ends[0].send(1, activation(b), Message(drawn(6, 4, seed=b)))
        for b in range(taken):
            ends[1].receive(0, activation(b))
        under_way = ends[1].pull(0, 2 - taken)
        states = pickle.loads(pickle.dumps([end.state() for end in ends]))
        again[0].load(states[0])
        again[1].load(states[1])
        again[1].push(0, pickle.loads(pickle.dumps(under_way)))
        for end in (ends, again):
            end[0].send(1, activation(2), Message(drawn(6, 4, seed=2)))
        for b in range(taken, 3):
            a, c = (end[1].receive(0, activation(b)).values for end in (ends, again))
            assert torch.equal(a, c)
            assert not torch.equal(a, drawn(6, 4, seed=b))
        assert ends[0].sent.to[1].codebooks == 4 * 4 * 4, "it was sent twice"
        assert again[0].sent.to[1].codebooks == 0, "it was sent again"


def coded_ends() -> list[CodedLink]:
    """Two neighbours that encode, a codebook in nine batches."""
    box = Mailbox()
    return [CodedLink(box.end(k), k, VQ(codes=4, dim=2, every=9), None, seed=0) for k in range(2)]


def test_decoding_is_work_and_not_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, seconds = coded_ends(), iter([1.0, 6.0, 10.0, 10.5])
    monkeypatch.setattr("delock.links.coded.perf_counter", lambda: next(seconds))
    for b in range(2):
        ends[0].send(1, activation(b), Message(drawn(6, 4)))
        ends[1].receive(0, activation(b))
    assert [end.decoding for end in ends] == [0, 5.5]


# -- bad input ---------------------------------------------------------------------------------------------------------------------


class Round(nn.Module):
    """Floats to integers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.long().clamp(0, 9)


def fit(modules: list[nn.Module], x: Tensor, **options: Any) -> None:
    delock.fit(
        modules,
        [(x, torch.zeros(len(x), dtype=torch.long))],
        loss=lambda out, y: cross_entropy(out.flatten(1), y),
        optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.1),
        batches=1,
        workers="inline",
        **{"method": "bp", **options},
    )


@pytest.mark.usefixtures("own_random")
def test_bad_input_is_refused_before_the_start() -> None:
    whole: list[nn.Module] = [Round(), nn.Embedding(10, 4)]
    for codec in ("bf16", "int8", "vq"):
        with pytest.raises(UsageError, match="stage 0 sends int64, and a codec is for floating point numbers"):
            fit(whole, drawn(4, 3), compression=delock.Compression(codec))
    linear = [nn.Linear(3, 12), nn.Linear(12, 2)]
    with pytest.raises(UsageError, match=r"stage 0 sends \(4, 12\): vq cannot divide 12 channels into groups of 16: .* 1, 2, 3, 4, 6, 12$"):
        fit(linear, drawn(4, 3), compression=delock.Compression("vq"))
    with pytest.raises(UsageError, match="vq cannot divide 12 channels into 5 groups"):
        fit(linear, drawn(4, 3), compression=delock.Compression(VQ(groups=5)))
    with pytest.raises(UsageError, match="interlocking sends no errors down, so there is none for an error codec"):
        fit(linear, drawn(4, 3), method=delock.Interlocking(n_wise=1), heads=[nn.Linear(12, 2)],
            compression=delock.Compression(error_codec="bf16"))  # fmt: skip
    with pytest.raises(UsageError, match="errors travel as"):
        fit(linear, drawn(4, 3), compression=delock.Compression(error_codec="vq"))


def test_the_page_on_codecs() -> None:
    """Its example of ratios, and its code."""
    page = (Path(__file__).parent.parent / "docs" / "codecs.md").read_text(encoding="utf-8")
    for samples, ratio in ((128, 63.8), (1, 48.5)):
        payload, books = VQ().predicted((samples, 128, 32, 32), torch.float32)
        assert round(4 * samples * 128 * 32 * 32 / (payload + books), 1) == ratio
        assert f"{ratio} : 1" in page
    names = {"activation": drawn(6, 8, 3, 3)}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["again"].shape == (6, 8, 3, 3)
    assert (names["raw"], names["encoded"], names["codebook"]) == (6 * 8 * 9 * 4, 6 * 9 * 2 // 2, 16 * 8 * 4)


# -- command line ------------------------------------------------------------------------------------------------------------------

QUICK = ["--model", "mlp", "--workers", "inline", "--limit", "128", "--batch-size", "32", "--test-batch-size", "512", "--epochs", "2"]


def test_options() -> None:
    assert flat(resolve(TrainConfig()))["codec"] == "none"
    made = resolve(build(TrainConfig, {"codec": "vq:every=50:dim=8", "error_codec": "int8"}, "test"))
    assert (made.compression.codec, made.compression.error_codec) == ("vq:dim=8", "int8")
    found = rows(build(CompareConfig, {"methods": ["dgl:codec=vq:dim=8:codes=16:lr=0.2", "bp:error_codec=bf16"], "codec": "int8"}, "test"))
    assert [(row.config.compression.codec, row.config.compression.error_codec) for row in found] == [
        ("none", "none"),
        ("vq:codes=16:dim=8", "none"),
        ("int8", "bf16"),
    ]
    assert found[1].config.update.lr == 0.2
    with pytest.raises(UsageError, match="'dim' does not exist"):
        rows(build(CompareConfig, {"methods": ["dgl:dim=8"]}, "test"))


@pytest.mark.usefixtures("own_random")
def test_train_tells_what_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", *QUICK, "--codec", "vq:codes=16:dim=8:every=4", "--error-codec", "bf16", "--out", "run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("compression") == 3  # predicted; measured up and down
    told = json.loads(Path("run/summary.json").read_text())
    assert (told["codec"], told["error_codec"]) == ("vq:codes=16:dim=8:every=4", "bf16")
    up, down = told["stages"][0]["sent_up"], told["stages"][1]["sent_down"]
    assert (up["compression"], down["compression"]) == (8 * 4 / 0.5, 2)
    assert up["messages"] == 8 + 2 * 1
    assert up["compression_with_codebooks"] == up["raw"] / (up["encoded"] + up["codebooks"]) < 64
    assert up["total"] == up["encoded"] + up["codebooks"] + up["rest"]


@pytest.mark.usefixtures("own_random")
def test_compare_shows_compression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *QUICK, "--methods", "dgl,dgl:codec=int8", "--no-plain", "--out", "both"]) == 0
    lines = Path("both/compare.md").read_text().splitlines()
    assert [line.split("|")[-2].strip() for line in (lines[0], *lines[2:])] == ["compression", "-", "3.8"]


@pytest.mark.usefixtures("own_random")
def test_a_free_running_run_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--method", "dgl-async", "--workers", "processes", "--codec", "vq:codes=16:dim=8:every=3", "--stages", "3", "--out", "free"]
    assert main(["train", *QUICK, *words]) == 0
    assert main(["replay", "free"]) == 0
    assert "the weights equal those of the run, to the last bit" in capsys.readouterr().out
