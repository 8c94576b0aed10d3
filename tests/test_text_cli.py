"""Language models on the command line: train, compare, plan and sample, and everything about text that is refused."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import delock
from delock.cli import main
from delock.cli.config import TrainConfig, build, flat, make_method, resolve
from delock.cli.config.defaults import IMAGES
from delock.cli.config.defaults import TEXT as TEXT_DEFAULTS
from delock.cli.sample import decoder
from delock.data import Alphabet, load_text
from delock.draw.curves import Run, _metric_name
from delock.errors import UsageError
from delock.methods import DDG
from delock.nets import generate, gpt, nats
from delock.optim.factories import AdamW, decays
from delock.records import EvaluationRecord, Started

pytestmark = pytest.mark.usefixtures("own_random")

TEXT = "the cat sat on the mat; the rat ate the hat.\n" * 60
SIZE = ["--depth", "2", "--width", "16", "--attention-heads", "2", "--context", "16"]
HERE = ["--batch-size", "8", "--workers", "inline", "--warmup", "2", "--optimizer", "adamw", "--lr", "0.01"]
SMALL = ["--data", "text", "--text", "t.txt", *SIZE, *HERE]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a text in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(TEXT)
    return tmp_path


def read(path: str) -> Any:
    return json.loads(Path(path).read_text())


def config(**values: object) -> TrainConfig:
    return resolve(build(TrainConfig, values, "test"))


# -- options


def test_text_has_defaults_of_its_own() -> None:
    values = flat(config(data="text"))
    assert {name: values[name] for name in ("model", "level", "context", "depth", "width", "attention_heads")} == {
        **{"model": "gpt", "level": "char", "context": 128, "depth": 4, "width": 128, "attention_heads": 4}
    }
    assert (values["optimizer"], values["lr"], values["weight_decay"], values["warmup"]) == ("muon", 0.02, 0.1, 100)
    assert (values["method"], values["micro_batches"]) == ("ddg", 2)
    assert (values["batch_size"], values["epochs"]) == (16, 10)
    images = flat(config())
    assert {"level", "context", "depth", "width", "attention_heads", "text"}.isdisjoint(images)
    assert (images["method"], images["model"], images["optimizer"], images["weight_decay"]) == ("ddg", "resnet8", "sgd", 5e-4)
    assert images["warmup"] == 0


@pytest.mark.parametrize(
    ("given", "parts"),
    [({"stages": 4}, 4), ({"cuts": [1, 2]}, 3), ({"stages": 8, "batch_size": 5}, 5), ({"micro_batches": 3}, 3), ({"method": "ddg"}, 1)],
)
def test_a_batch_of_text_goes_in_as_many_parts_as_stages(given: dict[str, object], parts: int) -> None:
    assert make_method(config(data="text", **given).algorithm) == DDG(micro_batches=parts)


def test_what_is_given_wins_over_the_defaults_of_text() -> None:
    values = flat(config(data="text", optimizer="sgd", warmup=0, batches=7, batch_size=3, depth=1))
    assert (values["optimizer"], values["lr"], values["momentum"], values["weight_decay"]) == ("sgd", 0.1, 0.9, 5e-4)
    assert (values["warmup"], values["batches"], values["batch_size"], values["depth"]) == (0, 7, 3, 1)
    assert "epochs" not in values
    assert flat(config(data="text", weight_decay=0.0))["weight_decay"] == 0.0
    assert flat(config(optimizer="adamw"))["weight_decay"] == 5e-4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"data": "text", "model": "resnet8"}, "model is resnet8, but the data is text"),
        ({"model": "gpt"}, "the model gpt reads text, but the data is digits: use --data text"),
        ({"data": "text", "limit": 100}, "limit is an option of images, and the data is text"),
        ({"data": "text", "augment": False}, "augment is an option of images"),
        ({"data": "text", "image_size": 32}, "image-size is an option of images"),
        ({"data": "text", "download": True}, "download is an option of images"),
        ({"data": "text", "data_dir": "d"}, "data-dir is an option of images"),
        ({"text": "t.txt"}, "text is an option of language models, and the data is digits: use --data text"),
        ({"level": "byte"}, "level is an option of language models"),
        ({"model": "cnn", "attention_heads": 2}, "attention-heads is an option of language models"),
        ({"data": "text", "context": 0}, "context is 0, but it must be at least 1"),
        ({"data": "text", "depth": 0}, "depth is 0"),
        ({"data": "text", "method": "gpipe", "micro_batches": 17}, "17 parts, but batch-size is 16"),
    ],
)
def test_images_and_text_are_not_mixed(values: dict[str, object], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        config(**values)
    assert str(caught.value).startswith(expected) or expected in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words", "expected"),
    [
        (b"", [], "t.txt is empty"),
        (b"caf\xe9 " * 99, [], "t.txt is not UTF-8: its byte 0xe9 at offset 3"),
        (b"short " * 9, [], "a context of 16 is too long for t.txt"),
        (TEXT.encode(), ["--context", "5000"], "a context of 5000 is too long for t.txt"),
        (TEXT.encode(), ["--text", "none.txt"], "text file none.txt does not exist"),
        (TEXT.encode(), ["--width", "15"], "2 heads cannot share a width of 15"),
        (TEXT.encode(), ["--stages", "9"], "cannot cut a network of 5 layers into 9 stages"),
        (TEXT.encode(), ["--method", "dgl", "--head", "cnn"], "head cnn takes images (C, H, W) and does not fit"),
        (TEXT.encode(), ["--level", "word"], "--level is 'word', but it must be one of 'char', 'byte'"),
    ],
)
def test_a_text_that_cannot_be_trained_on(
    here: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: list[str], expected: str
) -> None:
    (here / "t.txt").write_bytes(content)
    for command in ("train", "compare --methods fdg --no-plain"):
        if command == "train" or "--method" not in words:
            assert main([*command.split(), *SMALL, *words]) == 2
            error = capsys.readouterr().err
            assert expected in error
            assert error.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["t.txt"]


def test_an_embedding_shared_by_two_stages_is_refused() -> None:
    model = gpt(11, depth=1, width=8, heads=2, context=4)
    model.head.weight = model.embed.token.weight
    batches = [(torch.zeros(2, 4, dtype=torch.int64),) * 2]
    with pytest.raises(UsageError, match=r"embed\.token\.weight \(stage 0\) and head\.weight \(stage 1\) are the same tensor"):
        delock.fit(model, batches, loss=nats, optimizer=AdamW(1e-3), stages=2, batches=1, workers="inline")


# -- AdamW


def test_adamw_decays_matrices_alone() -> None:
    model = gpt(11, depth=1, width=8, heads=2, context=4)
    named = [*model.named_parameters(), ("heads.0.fc.weight", torch.nn.Parameter(torch.ones(3, 2)))]
    before = {name: p.detach().clone() for name, p in named}
    optimizer = AdamW(lr=0.5, weight_decay=0.1)(named)
    for _, p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    with torch.no_grad():
        shrunk = {name for name, p in named if not torch.equal(p, before[name])}
        assert all(torch.allclose(p, 0.95 * before[name]) for name, p in named if name in shrunk)
    matrices = {f"block0.{name}.weight" for name in ("qkv", "out", "up", "down")}
    assert shrunk == {*matrices, "head.weight", "heads.0.fc.weight"}
    assert decays("layer1.0.conv1.weight", torch.ones(2, 2, 3, 3))
    assert not decays("0.embedding.weight", torch.ones(2, 2))
    assert AdamW(0.1, 0.1)([("norm.weight", torch.nn.Parameter(torch.ones(2)))]).param_groups[0]["weight_decay"] == 0.0


# -- a run


def test_a_run_reports_nats_and_bits_and_can_be_repeated(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--method", "adl", "--accumulate", "3", "--stages", "3", "--batches", "12", "--eval-every", "6", "--dropout", "0.1"]
    assert main(["train", *SMALL, *words, "--out", "a"]) == 0
    out = capsys.readouterr().out
    assert "adl(accumulate=3): gpt on text, 3 stages" in out
    assert out.count(" nats  test bits per character ") == 2
    assert "accuracy" not in out
    assert "samples/s" not in out
    assert {path.name for path in Path("a").iterdir()} == {
        *("config.toml", "metrics.jsonl", "summary.json", "model.safetensors", "alphabet.json", "files.json")
    }
    told = read("a/summary.json")
    assert told["test_bits_per_character"] == pytest.approx(told["test_loss"] / math.log(2), rel=1e-4)
    assert told["tokens_per_second"] == pytest.approx(16 * told["samples_per_second"])
    assert read("a/alphabet.json") == {"characters": "".join(sorted(set(TEXT)))}
    values = tomllib.loads(Path("a/config.toml").read_text())
    assert (values["text"], values["level"], values["depth"], values["optimizer"]) == ("t.txt", "char", 2, "adamw")
    assert {"limit", "augment", "image_size", "download", "data_dir"}.isdisjoint(values)

    assert main(["train", "--config", "a/config.toml", "--out", "b"]) == 0
    assert main(["train", "--config", "a/config.toml", "--out", "c", "--workers", "processes"]) == 0
    once = load_file("a/model.safetensors")
    for other in ("b", "c"):
        again = load_file(f"{other}/model.safetensors")
        assert all(torch.equal(once[name], again[name]) for name in once)
    assert Path("b/config.toml").read_text() == Path("a/config.toml").read_text()


def test_images_keep_no_option_of_text(here: Path) -> None:
    assert main(["train", "--model", "mlp", "--limit", "64", "--batches", "1", "--workers", "inline", "--out", "a"]) == 0
    values = tomllib.loads(Path("a/config.toml").read_text())
    assert {"text", "level", "context", "depth", "width", "attention_heads"}.isdisjoint(values)
    assert values["augment"] is True
    assert not Path("a/alphabet.json").exists()


def test_bytes_are_counted_in_bits_per_byte(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "t.txt").write_bytes(bytes(range(256)) * 20)
    assert main(["train", *SMALL, "--level", "byte", "--batches", "2", "--out", "a"]) == 0
    assert "test bits per byte" in capsys.readouterr().out
    assert 0 < read("a/summary.json")["test_bits_per_byte"] < 10
    assert read("a/alphabet.json") == {"characters": None}
    assert main(["sample", "a", "--prompt", "ü", "--tokens", "9"]) == 0
    assert capsys.readouterr().out.startswith("ü")


# -- compare and plan


def test_a_comparison_of_language_models(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *SMALL, "--batches", "6", "--methods", "bp,dgl", "--out", "c"]) == 0
    out = capsys.readouterr().out
    assert "test bits per" in out
    plain, bp, dgl = (row["summary"] for row in read("c/compare.json")["rows"])
    assert plain["test_bits_per_character"] == pytest.approx(bp["test_bits_per_character"], rel=1e-5)
    assert dgl["test_bits_per_character"] > 0
    head, _, first, *_ = Path("c/compare.md").read_text().splitlines()
    assert head.startswith("| method | test bits per character | train loss | tokens/s |")
    assert first.startswith(f"| plain | {plain['test_bits_per_character']:.3f} |")
    assert Path("c/compare.png").stat().st_size > 1000
    assert main(["sample", "c/dgl", "--tokens", "5"]) == 0
    assert main(["sample", "c"]) == 2
    assert "c is not the folder of a run: it holds several, such as c/bp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [({"bits_per_byte": 2.0}, "bits_per_byte"), ({"x": 1.0, "bits_per_character": 2.0}, "bits_per_character"), ({"x": 1.0}, None)],
)
def test_the_metric_that_is_drawn(metrics: dict[str, float], shown: str | None) -> None:
    assert _metric_name([Run("a", ()), Run("b", [EvaluationRecord(1, 1.0, 1.0, 1.0, metrics, 1.0, 1)])]) == shown


def test_a_head_is_compared_with_its_stage(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Any] = []
    T, C, V = 16, 32, 11
    model = gpt(V, depth=2, width=C, heads=2, context=T)
    batches = [(torch.zeros(4, T, dtype=torch.int64),) * 2]
    options = {"loss": nats, "optimizer": AdamW(1e-3), "cuts": [2], "batches": 1, "workers": "inline", "callbacks": [events.append]}
    delock.fit(model, batches, method="dgl", **options)  # type: ignore[arg-type]
    first, last = next(event for event in events if isinstance(event, Started)).stages
    assert first.head_flops == pytest.approx(T * C * V / (12 * T * C**2 + 2 * T**2 * C))
    assert first.head_parameters == pytest.approx((2 * C + C * V) / ((V + T) * C + 12 * C**2 + 13 * C))
    assert last.head_flops is None
    for method, seen in (("dgl", True), ("fdg", False)):
        assert main(["train", *SMALL, "--method", method, "--batches", "1", "--out", method]) == 0
        assert ("(parameters)" in capsys.readouterr().out) == seen


def test_a_plan_measures_a_language_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--profile", "gpt", "--data", "text", "--text", "t.txt", *SIZE, "--batch-size", "4"]
    assert main(["plan", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["profile"]["model"], told["profile"]["samples"], told["profile"]["tokens"]) == ("gpt", 4, 16)
    assert sum(told["profile"]["layers"]) == 5
    assert told["profile"]["messages"] == [4 * 16 * 16 * 4]
    assert main(["plan", *words]) == 0
    assert " tokens/s" in capsys.readouterr().out
    assert main(["plan", "--profile", "gpt"]) == 2
    assert "the model gpt reads text, but the data is digits" in capsys.readouterr().err


# -- sample


def test_a_model_that_has_learned_writes_its_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "t.txt").write_text("abcdefgh" * 200)
    assert main(["train", *SMALL, "--stages", "1", "--method", "bp", "--batches", "80", "--out", "a"]) == 0
    assert read("a/summary.json")["test_bits_per_character"] < 0.1
    assert "delock sample a prints text from it" in capsys.readouterr().out
    assert main(["sample", "a", "--prompt", "cdef", "--tokens", "40", "--temperature", "0.1"]) == 0
    assert capsys.readouterr().out == "cdef" + "ghabcdef" * 5 + "\n"
    assert main(["sample", "a", "--tokens", "4", "--temperature", "0.1"]) == 0
    assert capsys.readouterr().out == "bcde\n"  # there is no line break to go on from, so the first character is


def test_a_sample_follows_from_its_options(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--batches", "3", "--out", "a"]) == 0
    capsys.readouterr()

    def sample(*words: str) -> str:
        assert main(["sample", "a", "--tokens", "30", *words]) == 0
        return capsys.readouterr().out

    assert len(sample()) == 31
    assert sample("--seed", "1") == sample("--seed", "1") != sample("--seed", "2")
    assert sample("--top-k", "1", "--seed", "1") == sample("--top-k", "1", "--seed", "2") != sample()
    assert sample("--prompt", "the cat").startswith("the cat")

    data = load_text("t.txt", context=16, batch_size=1)
    model = gpt(data.vocabulary, depth=2, width=16, heads=2, context=16)
    model.load_state_dict(load_file("a/model.safetensors"))
    generator = torch.Generator().manual_seed(3)
    tokens = generate(model, data.encode("\n")[None], 30, generator=generator, temperature=1.5, top_k=5)
    assert sample("--temperature", "1.5", "--top-k", "5", "--seed", "3") == data.decode(tokens[0, 1:]) + "\n"


def test_bytes_become_text_as_they_come() -> None:
    text = decoder(Alphabet(None))
    assert [text(byte) for byte in "a€".encode()] == ["a", "", "", "€"]
    assert text(0xE2) + text(ord("b")) == "\ufffdb"
    assert text(0xE2) + text(None) == "\ufffd"
    assert decoder(Alphabet("ab"))(1) == "b"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "say first which run: delock sample RUN"),
        (["--tokens", "5"], "say first which run"),
        (["nowhere"], "there is no run nowhere"),
        (["."], "it has no config.toml"),
        (["run", "--temperature", "0"], "temperature is 0, but it must be above 0; --top-k 1"),
        (["run", "--temperature", "nan"], "temperature is nan"),
        (["run", "--top-k", "0"], "top-k is 0"),
        (["run", "--tokens", "0"], "tokens is 0"),
        (["run", "--prompt", "the dog?"], "the character 'd' does not occur in the training text"),
        (["run", "--token", "5"], "there is no option --token: did you mean --tokens?"),
        (["run", "more"], "'more' belongs to no option"),
        (["images"], "images trained mlp on digits, and only a language model writes text"),
        (["cut-off"], "cut-off has no model.safetensors: it did not run to its end"),
        (["other"], "does not hold the model that config.toml describes"),
        (["broken"], "broken/model.safetensors cannot be read"),
        (["lost"], "cannot read the alphabet of the run"),
    ],
)
def test_a_sample_that_is_refused(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    if words and words[0] in ("run", "cut-off", "other", "broken", "lost"):
        made_run(Path(words[0]))
    if words == ["images"]:
        Path("images").mkdir()
        Path("images/config.toml").write_text('model = "mlp"\n')
    assert main(["sample", *words]) == 2
    heard = capsys.readouterr()
    assert expected in heard.err
    assert heard.err.count("\n") == 1
    assert heard.out == ""


def made_run(path: Path) -> None:
    """A run's folder without the run; its name says what is wrong with it."""
    from safetensors.torch import save_file

    path.mkdir()
    (path / "config.toml").write_text('data = "text"\ndepth = 1\nwidth = 8\nattention_heads = 2\ncontext = 4\n')
    if path.name != "lost":
        (path / "alphabet.json").write_text(json.dumps({"characters": "".join(sorted(set("the cat")))}))
    width = 16 if path.name == "other" else 8
    if path.name == "broken":
        (path / "model.safetensors").write_bytes(b"half of it")
    elif path.name != "cut-off":
        save_file(gpt(6, depth=1, width=width, heads=2, context=4).state_dict(), path / "model.safetensors")


# -- docs/text.md

PAGE = (Path(__file__).parent.parent / "docs" / "text.md").read_text(encoding="utf-8")


def test_the_programs_on_the_page_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As they are written, but in one process and for a few batches of a short test."""
    fit = delock.fit

    def short(model: Any, train: Any, test: Any = None, **options: Any) -> Any:
        few = [next(test.epoch(0))] if test else None
        return fit(model, train, few, **options | {"batches": 2, "epochs": None, "workers": "inline"})

    monkeypatch.setattr(delock, "fit", short, raising=False)
    programs = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(programs) == 2
    names = {"__name__": "__main__"}
    for program in programs:
        exec(compile(program, "text.md", "exec", dont_inherit=True), names)
    out = capsys.readouterr().out
    assert " bits per character\nThe " in out
    assert len(out) > 200


def test_the_defaults_on_the_page() -> None:
    [text] = re.findall(r"^## Defaults\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)
    rows = {cells[0].strip(" `"): cells[1:] for line in text.splitlines() if len(cells := line.strip("|").split("|")) == 3}
    for name in ("method", "model", "batch_size", "epochs", "optimizer", "warmup"):
        images, language = rows[name.replace("_", "-")]
        assert str(IMAGES[name]) in images
        assert str(TEXT_DEFAULTS[name]) in language
    for name in ("depth", "width", "attention_heads", "context"):
        assert f"`{name.replace('_', '-')}` {TEXT_DEFAULTS[name]}" in text
    assert [cell.strip().split()[0] for cell in rows["weight-decay"]] == ["0.0005", "0.1"]
