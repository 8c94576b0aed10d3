"""Commands on what a run has kept: its checkpoints listed, its weights exported and evaluated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import delock.api
from delock.checkpoints.whole_model import read_model
from delock.cli import main
from delock.cli.eval import loaded, measured
from delock.cli.kept_run import read_config, weights
from delock.cli.workload import load_data
from delock.records import CheckpointRecord

from commands import SMALL, refused

pytestmark = pytest.mark.usefixtures("own_random")

RUN = ["train", *SMALL, "--epochs", "2", "--checkpoint-every", "3", "--checkpoint-keep", "9", "--out", "a"]  # 8 batches


def heard(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    capsys.readouterr()
    assert main(words) == code
    return capsys.readouterr().out


def kept(name: str = "batch-00000006", run: str = "a") -> Path:
    return Path(run, "checkpoints", name)


def damage(file: Path, *, cut: bool = False) -> None:
    """Cuts a file, or changes its last bit."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data[:-1] if cut else data)


def interrupted(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """A run that is interrupted after its second evaluation."""
    whole = delock.api.fit

    def fit(*given: Any, **options: Any) -> None:
        whole(*given, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("delock.api.fit", fit)
    assert main(words) == 130
    monkeypatch.setattr("delock.api.fit", whole)


def test_a_run_killed_after_its_first_checkpoint_has_a_config(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first record may come much later."""
    seen: list[tuple[bool, bool, bool]] = []
    whole = delock.api.fit

    def fit(*given: Any, callbacks: Any, **options: Any) -> Any:
        def hear(event: Any) -> None:
            callbacks[0](event)
            if isinstance(event, CheckpointRecord):
                seen.append((Path("a/config.toml").exists(), Path("a/metrics.jsonl").exists(), kept("batch-00000003").exists()))

        return whole(*given, callbacks=[hear], **options)

    monkeypatch.setattr("delock.api.fit", fit)
    long = ["--batches", "150", "--batch-size", "8", "--log-every", "150", "--eval-every", "150"]
    words = [word for word in RUN if word not in ("--epochs", "2")]
    assert main([*words, *long, "--checkpoint-keep", "99", "--method", "fdg"]) == 0
    assert seen[0] == (True, False, True)
    assert kept("batch-00000003").exists()


# -- eval


@pytest.mark.parametrize(
    "words",
    [
        "--method fdg --stages 3 --model cnn",
        "--method dgl --stages 2 --model cnn --layout channels-last --amp bf16",
        "--method adl --accumulate 3 --stages 3 --data text --text t.txt --depth 2 --width 16 --context 16 --attention-heads 2 --batches 8",
    ],
)
def test_an_evaluation_is_that_of_the_run(here: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    (here / "t.txt").write_text("the cat sat on the mat, and the dog did not. " * 40)
    text = "--data text" in words
    small = ["--workers", "inline", "--batch-size", "8"] if text else [*SMALL, "--epochs", "2"]
    out = heard(["train", *small, *words.split(), "--no-checkpoint", "--out", "a"], capsys)
    config, last = read_config(Path("a")), json.loads(Path("a/metrics.jsonl").read_text().splitlines()[-1])
    data, end = load_data(config), weights(Path("a"), None)
    found = measured(config, data, loaded(config, data, end), end)
    assert {f"test_{name or 'loss'}": value for name, value in found.items()} == {
        name: value for name, value in last.items() if name.startswith("test_")
    }
    said = heard(["eval", "a"], capsys)
    parts = said.removeprefix("a/model.safetensors: ").rstrip().split("  ")
    assert len(parts) == 3
    line = next(line for line in reversed(out.splitlines()) if line.startswith("epoch"))
    assert all(part in line.split("  ") for part in parts)


def test_the_weights_of_a_checkpoint_are_evaluated(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--method", "dgl", "--model", "cnn"]) == 0
    config = read_config(Path("a"))
    data = load_data(config)
    model = loaded(config, data, weights(Path("a"), None)).eval()
    model.load_state_dict(read_model(kept()))
    with torch.no_grad():
        (images, labels), *rest = data.test.epoch(0)
        right = (model(images).argmax(1) == labels).double().mean()
    assert rest == []
    expected = rf"a/checkpoints/batch-00000006: epoch 1\.5  test loss [\d.]+  test accuracy {100 * right:.2f} %\n"
    for words in (["a", "--checkpoint", kept().name], [str(kept())]):
        assert re.fullmatch(expected, heard(["eval", *words], capsys))


# -- which weights


def test_the_latest_weights_are_taken(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, [*RUN, "--method", "fdg"])
    assert not Path("a/model.safetensors").exists()
    assert weights(Path("a"), None).path == kept()
    damage(kept() / "weights-1.safetensors")
    out = heard(["export", "a"], capsys)
    assert "passed over: a/checkpoints/batch-00000006 is damaged: weights-1.safetensors is not as it was written" in out
    assert "the weights of a/checkpoints/batch-00000003 after 3 batches are in\n  a/export/model.safetensors (" in out
    exported = load_file("a/export/model.safetensors")
    assert all(exported[name].equal(tensor) for name, tensor in read_model(kept("batch-00000003")).items())

    assert main(["train", "--resume", "a"]) == 0
    assert weights(Path("a"), None).path == Path("a/model.safetensors")
    out = heard(["export", "a", "--out", "m.safetensors"], capsys)
    assert "the weights of a/model.safetensors after 8 batches are in\n  m.safetensors (" in out
    assert all(load_file("m.safetensors")[name].equal(tensor) for name, tensor in load_file("a/model.safetensors").items())
    assert "exists: give another --out" in refused(["export", "a", "--out", "m.safetensors"], here, capsys)

    first_end = Path("a/summary.json").read_text()
    interrupted(monkeypatch, ["train", "--resume", "a", "--epochs", "4"])
    assert weights(Path("a"), None).batches == 15, "longer than at its first end"
    Path("a/summary.json").write_text(first_end)  # as if it had been killed
    assert weights(Path("a"), None).batches == 15
    assert weights(Path("a"), "final").path == Path("a/model.safetensors")


def test_text_comes_from_a_run_that_was_cut_off(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "t.txt").write_text("abcdefgh" * 200)
    model = ["--depth", "1", "--width", "16", "--context", "16", "--attention-heads", "2"]
    size = ["--data", "text", "--text", "t.txt", *model, "--batches", "60", "--batch-size", "8", "--lr", "0.01"]
    interrupted(monkeypatch, ["train", "--workers", "inline", *size, "--checkpoint-every", "29", "--out", "a"])
    assert re.fullmatch("a[a-h]{8}\n", heard(["sample", "a", "--prompt", "a", "--tokens", "8"], capsys))
    late, early = (heard(["sample", "a", "--checkpoint", f"batch-000000{at}", "--tokens", "50"], capsys) for at in (58, 29))
    assert late != early


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("export", "say first which run: delock export RUN"),
        ("checkpoints", "say first which run: delock checkpoints RUN"),
        ("eval nowhere", "there is no run nowhere"),
        ("export c", "it holds several, such as c/bp"),
        ("eval a --checkpoint batch-00000007", "a has no checkpoint 'batch-00000007': it has batch-00000006, batch-00000003"),
        ("export a --checkpoint batch-00000003", "batch-00000003 is damaged: optimizer-0.safetensors is missing"),
        ("eval a --device cuda:99", "torch sees no GPU here|the GPUs here are numbered"),
        ("checkpoints a --all", "there is no option --all"),
        ("eval e", "e has no model.safetensors: it did not run to its end; it has no checkpoint"),
    ],
)
def test_a_command_that_is_refused(here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    if " a" in words:
        assert main([*RUN, "--method", "fdg"]) == 0
        (kept("batch-00000003") / "optimizer-0.safetensors").unlink()
    if " c" in words:
        assert main(["compare", *SMALL, "--batches", "1", "--methods", "bp", "--no-plain", "--out", "c"]) == 0
    if " e" in words:
        assert main(["train", *SMALL, "--batches", "2", "--emulate", "1:2", "--out", "e"]) == 0
    assert re.search(expected, refused(words.split(), here, capsys))


def test_weights_of_another_network_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--method", "fdg"]) == 0
    config = Path("a/config.toml")
    config.write_text(config.read_text().replace('model = "mlp"', 'model = "cnn"').replace("cuts", "# cuts"))
    assert "does not hold the model that config.toml describes" in refused(["eval", "a"], here, capsys)


# -- checkpoints


def test_checkpoints_are_listed(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, [*RUN, "--method", "fdg"])
    out = heard(["checkpoints", "a"], capsys)
    rows = [line.split() for line in out.splitlines() if line.startswith("batch-")]
    assert [(row[0], row[1], row[2], row[-1]) for row in rows] == [
        ("batch-00000006", "6", "1.5", "good"),
        ("batch-00000003", "3", "0.75", "good"),
    ]
    assert rows[0][3] == "4/5"
    told = [json.loads(line) for line in Path("a/metrics.jsonl").read_text().splitlines()]
    first = next(line for line in told if line["event"] == "evaluation")
    assert rows[0][4:6] == [f"{first['test_accuracy']:.4g}", f"{first['test_loss']:.4g}"]
    assert rows[1][4:6] == ["-", "-"]
    assert out.endswith("\ndelock train --resume a goes on from batch-00000006\n")


def test_damaged_checkpoints_are_listed_and_named(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, [*RUN, "--method", "fdg"])
    damage(kept() / "in-flight-0.safetensors")
    assert "damaged" not in heard(["checkpoints", "a"], capsys), "its size is right"
    out = heard(["checkpoints", "a", "--verify"], capsys, code=1)
    assert "\nbatch-00000006 is damaged: in-flight-0.safetensors is not as it was written\n" in out
    assert out.endswith("delock train --resume a goes on from batch-00000003\n")
    damage(kept() / "in-flight-0.safetensors", cut=True)
    (kept("batch-00000003") / "manifest.json").write_text("{")
    out = heard(["checkpoints", "a"], capsys, code=1)
    assert re.search(r"\nbatch-00000003( +-){6} .* damaged\n", out)
    assert "\nbatch-00000003 is damaged: the manifest is no JSON" in out
    assert out.endswith("none of them is whole: begin the run again\n")


def test_what_to_do_with_a_run_without_checkpoints_or_at_its_end(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--no-checkpoint"]) == 0
    assert heard(["checkpoints", "a"], capsys) == "a has no checkpoints: delock train --checkpoint-every 500, or 10m, keeps some\n"
    assert main([*RUN, "--overwrite"]) == 0
    assert "\nthe run has come to its end; delock train --resume a --epochs N makes it longer\n" in heard(["checkpoints", "a"], capsys)
