"""Models of transformers on the command line: from a config, from a folder, and back into one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from delock.checkpoints.whole_model import dumps, read_model
from delock.cli import main
from delock.cli.config import TrainConfig, build, resolve
from delock.cli.kept_run import with_ties
from delock.cli.models.facts import Facts
from delock.cli.models.hugging_face import build_hf, save
from delock.cli.workload import goals, load_data
from delock.errors import UsageError
from delock.nets import OfLogits, generate, nats

pytestmark = pytest.mark.usefixtures("own_random")

GPT2 = {
    "model_type": "gpt2",
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
TEXT = Facts(vocabulary=11, context=16)
IMAGES = Facts(classes=5, channels=1, image_size=32)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a text and a config of transformers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("a cat, a rat and a bat sat.\n" * 20)
    (tmp_path / "gpt2.json").write_text(json.dumps(GPT2))
    return tmp_path


def config(**values: object) -> TrainConfig:
    return resolve(build(TrainConfig, values, "test"))


def equal(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_from_a_config_file_is_fitted_to_the_text(here: Path) -> None:
    model = build_hf("hf/gpt2.json", TEXT, 0, "text")
    tied = model.get_submodule("transformer.wte").weight
    assert tied.shape == (11, 8)
    assert model.get_submodule("lm_head").weight is tied
    assert model.training
    assert equal(model, build_hf("hf/gpt2.json", TEXT, 0, "text"))
    assert not equal(model, build_hf("hf/gpt2.json", TEXT, 1, "text"))


def test_the_loss_of_text_is_that_of_transformers(here: Path) -> None:
    """Their loss moves the labels by one itself; Delock's data has moved targets. Over one window both are the same mean."""
    model = build_hf("hf/gpt2.json", TEXT, 0, "text").eval()
    window = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))  # (B, T + 1)
    theirs = model(window, labels=window).loss
    loss, metrics = goals(config(data="text", model="hf/gpt2.json"), load_data(config(data="text", text="t.txt", context=8)))
    ours = loss(model(window[:, :-1]), window[:, 1:])
    assert loss == OfLogits(nats)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    assert metrics["bits_per_character"](model(window[:, :-1]), window[:, 1:]) == pytest.approx(ours.item() / 0.6931471805599453)


def test_a_folder_is_written_for_transformers_and_read_again(here: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = build_hf("hf/gpt2.json", TEXT, 0, "text")
    files = save(model, "hf/gpt2.json", here / "out")
    assert {"config.json", "model.safetensors"} <= {file.name for file in files}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(here / "out", local_files_only=True)
    assert equal(model, theirs)
    assert theirs.config.use_cache
    assert equal(model, build_hf("hf/out", TEXT, 1, "text"))
    with pytest.raises(UsageError, match="the weights of hf/out are for a vocab_size of 11, and the data has 12"):
        build_hf("hf/out", Facts(vocabulary=12, context=16), 0, "text")
    with pytest.raises(UsageError, match="exists: give another --hf"):
        save(model, "hf/gpt2.json", here / "out")


def test_a_state_of_stages_names_tied_weights_once(here: Path) -> None:
    model = build_hf("hf/gpt2.json", TEXT, 0, "text")
    state = {name: one for name, one in model.state_dict().items() if name != "lm_head.weight"}
    other = build_hf("hf/gpt2.json", TEXT, 1, "text")
    other.load_state_dict(with_ties(other, state))
    assert equal(model, other)


@pytest.mark.parametrize(
    ("model", "of", "kind", "expected"),
    [
        ("hf/none.json", TEXT, "text", "hf/none.json names no file or folder here, nor a model of the hub, hf/ORG/NAME"),
        ("hf/gpt2", TEXT, "text", "hf/gpt2 names no file or folder here"),
        ("hf/a/b/c", TEXT, "text", "hf/a/b/c names no file or folder here"),
        ("hf/x/none.json", TEXT, "text", "hf/x/none.json names no file or folder here"),
        ("hf/empty", TEXT, "text", "hf/empty is a folder without a config.json"),
        ("hf/pickled", TEXT, "text", "hf/pickled has its weights as pickled files alone"),
        ("hf/odd.json", TEXT, "text", "hf/odd.json cannot be made by transformers: ValueError"),
        ("hf/bert.json", TEXT, "text", "hf/bert.json sees the tokens that it is to predict"),
        ("hf/gpt2.json", Facts(vocabulary=11, context=17), "text", "context is 17, but hf/gpt2.json has 16 positions: give --context 16"),
        ("hf/gpt2.json", IMAGES, "images", "hf/gpt2.json cannot be made by transformers: ValueError: Unrecognized configuration class"),
        ("hf/gpt2.json", Facts(), "own", "the config of hf/gpt2.json does not name the class of transformers"),
        ("hf/org/name", TEXT, "text", "hf/org/name is no file or folder here, and cannot be fetched from the hub: "),
    ],
)
def test_what_is_refused_of_transformers(
    here: Path, monkeypatch: pytest.MonkeyPatch, model: str, of: Facts, kind: str, expected: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, values in {
        "odd.json": {"model_type": "odd"},
        "bert.json": {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
        "pickled/config.json": GPT2,
    }.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(json.dumps(values))
    (here / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (here / "empty").mkdir()
    with pytest.raises(UsageError) as caught:
        build_hf(model, of, 0, kind)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_a_config_names_the_class_for_data_of_the_users(here: Path) -> None:
    values = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    (here / "config.json").write_text(json.dumps({**values, "architectures": ["BertForSequenceClassification"], "vocab_size": 20}))
    model = build_hf("hf/.", Facts(classes=4), 0, "own")
    assert (type(model).__name__, model.get_submodule("classifier").weight.shape) == ("BertForSequenceClassification", (4, 8))


def test_an_image_model_of_transformers_is_fitted_to_the_images(here: Path) -> None:
    values = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "patch_size": 8}
    (here / "vit.json").write_text(json.dumps({"model_type": "vit", **values}))
    model = build_hf("hf/vit.json", IMAGES, 0, "images")
    assert model(torch.zeros(2, 1, 32, 32)).logits.shape == (2, 5)


def test_a_model_of_transformers_writes_tokens(here: Path) -> None:
    model = build_hf("hf/gpt2.json", TEXT, 0, "text")
    prompt = torch.tensor([[1, 2, 3]])
    written = generate(model, prompt, 4, generator=torch.Generator(), temperature=0, context=3)
    model.eval()
    for i in range(4):
        assert written[0, 3 + i] == model(written[:, i : i + 3]).logits[0, -1].argmax()


def test_the_weights_of_a_run_are_written_under_all_names(here: Path) -> None:
    model = build_hf("hf/gpt2.json", TEXT, 0, "text")
    (here / "model.safetensors").write_bytes(dumps(model.state_dict()))
    state = read_model(here / "model.safetensors")
    assert list(state) == sorted(model.state_dict())
    assert all(torch.equal(state[name], one) for name, one in model.state_dict().items())


# -- trained ---------------------------------------------------------------------------------------------------------------------------


SMALL = ["--data", "text", "--text", "t.txt", "--context", "8", "--batch-size", "4", "--lr", "0.01", "--method", "bp", "--stages", "2"]


def test_a_run_is_evaluated_sampled_and_read_by_transformers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder that is exported has in transformers, by its own loss, the loss that the run had; its weights are tied."""
    transformers = pytest.importorskip("transformers")
    words = ["train", "--model", "hf/gpt2.json", *SMALL, "--workers", "inline", "--checkpoint-every", "4", "--out", "run"]
    assert main([*words, "--batches", "8"]) == 0
    told = json.loads((here / "run" / "summary.json").read_text())
    assert list(json.loads((here / "run" / "files.json").read_text())) == ["gpt2.json", "t.txt"]
    capsys.readouterr()
    assert main(["eval", "run"]) == 0
    assert (
        f"test loss {told['test_loss']:.4f} nats  test bits per character {told['test_bits_per_character']:.3f}" in capsys.readouterr().out
    )
    assert main(["sample", "run", "--tokens", "5", "--checkpoint", "batch-00000004"]) == 0
    assert main(["export", "run", "--hf", "last"]) == 0
    assert main(["export", "run", "--hf", "middle", "--checkpoint", "batch-00000004"]) == 0
    data = load_data(config(data="text", text="t.txt", context=8, batch_size=4))
    means, total = 0.0, 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(here / "last", local_files_only=True)
    for inputs, targets in data.test.epoch(0):
        window = torch.cat([inputs, targets[:, -1:]], 1)
        means += len(inputs) * theirs(window, labels=window).loss.item()
        total += len(inputs)
    assert means / total == pytest.approx(told["test_loss"], rel=1e-6)
    middle = transformers.AutoModelForCausalLM.from_pretrained(here / "middle", local_files_only=True)
    assert middle.lm_head.weight is middle.transformer.wte.weight
    assert not equal(middle, theirs)


def test_a_model_of_transformers_is_planned(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["plan", "--profile", "hf/gpt2.json", "--data", "text", "--text", "t.txt", "--context", "8", "--stages", "3", "--json"]) == 0
    )
    profile = json.loads(capsys.readouterr().out)["profile"]
    assert (profile["model"], len(profile["parameters"])) == ("hf/gpt2.json", 3)
    assert sum(profile["parameters"]) == sum(
        p.numel() for p in build_hf("hf/gpt2.json", Facts(vocabulary=12, context=8), 0, "text").parameters()
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bp", "ddg", "fdg", "adl"])
def test_processes_have_the_numbers_of_one(here: Path, method: str) -> None:
    for workers in ("inline", "processes"):
        words = ["train", "--model", "hf/gpt2.json", *SMALL, "--stages", "4", "--method", method, "--batches", "6", "--workers", workers]
        assert main([*words, "--out", workers, "--checkpoint-every", "4"]) == 0
    shutil.rmtree(here / "processes" / "checkpoints" / "batch-00000006", ignore_errors=True)
    shutil.copytree(here / "processes", here / "resumed")
    assert main(["train", "--resume", "resumed", "--batches", "9"]) == 0
    assert main([*words, "--batches", "9", "--out", "whole"]) == 0
    assert (here / "resumed" / "model.safetensors").read_bytes() == (here / "whole" / "model.safetensors").read_bytes()
    one, many = ((here / name / "model.safetensors").read_bytes() for name in ("inline", "processes"))
    assert one == many
