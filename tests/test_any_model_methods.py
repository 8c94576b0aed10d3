"""Models of transformers from configuration files under every global method, in parts: trained, resumed, exported, read by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from delock.cli import main
from delock.cli.config import TrainConfig, build, resolve
from delock.cli.workload import load_data

pytestmark = [pytest.mark.usefixtures("own_random"), pytest.mark.slow]

NONE = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 16, **NONE},
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
    },
}
METHODS = ("bp", "gpipe", "1f1b", "zb1p", "ddg", "fr", "fdg", "dsp", "adl", "pipedream", "2bw", "paci")
WORDS = ["--data", "text", "--text", "t.txt", "--context", "8", "--batch-size", "8", "--lr", "0.01", "--optimizer", "adamw"]


def loss_in_transformers(folder: Path) -> float:
    """The mean loss over the test windows, by transformers' own loss."""
    transformers = pytest.importorskip("transformers")
    data = load_data(resolve(build(TrainConfig, {"data": "text", "text": "t.txt", "context": 8, "batch_size": 8}, "test")))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    sums = [(len(x), model(w, labels=w).loss.item()) for x, y in data.test.epoch(0) for w in [torch.cat([x, y[:, -1:]], 1)]]
    return sum(n * loss for n, loss in sums) / sum(n for n, _ in sums)


@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_transformers_under_a_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, method: str, K: int
) -> None:
    """A resumed run is the whole one; what is exported has the run's loss in transformers. Every third is run in processes."""
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("a cat, a rat and a bat sat.\n" * 20)
    Path("model.json").write_text(json.dumps(CONFIGS[name]))
    workers = "processes" if METHODS.index(method) % 3 == 1 else "inline"
    parts = [] if method == "bp" else ["--micro-batches", "4"]
    words = [*WORDS, "--model", "hf/model.json", "--method", method, *parts, "--stages", str(K), "--workers", workers]
    assert main(["train", *words, "--batches", "12", "--checkpoint-every", "5", "--out", "whole"]) == 0
    assert main(["train", *words, "--batches", "9", "--checkpoint-every", "5", "--out", "resumed"]) == 0
    for later in sorted(Path("resumed/checkpoints").glob("batch-*"))[1:]:
        shutil.rmtree(later)
    assert main(["train", "--resume", "resumed", "--batches", "12"]) == 0
    assert (Path("resumed") / "model.safetensors").read_bytes() == (Path("whole") / "model.safetensors").read_bytes()
    assert main(["export", "whole", "--hf", "out"]) == 0
    told = json.loads((Path("whole") / "summary.json").read_text())["test_loss"]
    assert loss_in_transformers(Path("out")) == pytest.approx(told, rel=1e-6)
