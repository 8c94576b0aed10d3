"""Input that the command line refuses: one clear line, the right exit code, nothing written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from delock.cli import main

from commands import SMALL, refused

pytestmark = pytest.mark.usefixtures("own_random")


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # methods and their options
        ("--method adl --at replay", "at is 'replay', but it must be one of stash, mixed"),
        ("--method adl --accumulate 0", "accumulate is 0"),
        ("--method fr --accumulate 0", "accumulate is 0"),
        ("--method ddg --accumulate 2 --reduce max", "max"),
        ("--method fdg --accumulate 2", "fdg has no option 'accumulate': adl is fdg with the gradients of several batches"),
        ("--method 2bw --accumulate 2", "2bw has no option 'accumulate': it adds the gradients of the parts of a batch"),
        ("--method paci --accumulate 2", "so use larger batches in more micro_batches"),
        ("--method gpipe --micro-batches 0", "micro_batches is 0"),
        ("--method gpipe --micro-batches 33", "33 parts, but batch-size is 32: use fewer parts, or larger batches"),
        ("--method bp --accumulate 40", "40 parts, but batch-size is 32"),
        ("--method fdg --beta 0", "beta is 0.0, but it must lie in (0, 1]"),
        ("--method fdg --beta -0.5", "beta is -0.5"),
        ("--method fdg --beta nan", "beta is nan"),
        ("--method dsp --p 1 2", "2 lags p = (1, 2) for 2 stages: there is 1 link"),
        ("--method dsp --q 1 2 --stages 4", "there are 3 links, so give 3, or one for all"),
        ("--method dsp --p 0", "every lag must be at least 1"),
        # cuts
        ("--stages 6", "5 layers into 6 stages: use at most 5"),
        ("--stages 0", "stages is 0, but it must be at least 1"),
        ("--cuts 3 1", "out of order"),
        ("--cuts 2 2", "out of order"),
        ("--cuts 0", "cut 0 is out of range: a later stage starts at one of the layers 1 .. 4"),
        ("--cuts 9", "cut 9 is out of range"),
        ("--cuts hiden2", "no layer is called 'hiden2': did you mean 'hidden2'?"),
        ("--cuts 2 --stages 3", "1 cuts make 2 stages, not 3"),
        # numbers
        ("--epochs 0", "epochs is 0, but it must be at least 1"),
        ("--epochs -1", "epochs is -1"),
        ("--batches 0", "batches is 0"),
        ("--epochs 1 --batches 1", "use --epochs or --batches"),
        ("--batch-size 0", "batch-size is 0"),
        ("--test-batch-size -1", "test-batch-size is -1"),
        ("--threads 0", "threads is 0"),
        ("--warmup -1", "warmup is -1"),
        ("--lr nan", "lr is nan"),
        ("--lr -0.1", "lr is -0.1"),
        ("--schedule steps --milestones 2 -1", "milestones are 2 -1"),
        ("--eval-every 0", "eval-every is 0"),
        ("--log-every 0", "log-every is 0"),
        ("--limit 0", "limit is 0"),
        ("--limit 1438", "between 1 and the 1437 training images"),
        ("--patience -1", "patience is -1"),
        ("--link shared --method dgl-async --order sampled", "dgl-async drops messages that come too late, which only gloo can do"),
        # a batch of one in front of batch norm
        ("--model cnn --limit 129", "a batch of one sample would put a single sample in front of BatchNorm"),
        ("--model cnn --method gpipe --micro-batches 20", "split into 20 micro-batches, would put a single sample in front of BatchNorm"),
        # data and device
        ("--data digit", "did you mean 'digits'?"),
        ("--data folder", "--data-dir"),
        ("--data folder --data-dir nowhere", "data directory nowhere does not exist"),
        ("--data cifar10 --data-dir nowhere", "Pass --download to fetch it"),
        ("--model resnet9", "did you mean 'resnet8'"),
        ("--device tpu", "device is 'tpu', but it must be cpu, cuda or cuda:N"),
        # where to put it
        (f"--out {'a' * 300}", "File name too long; give another --out"),
        ("--config nowhere.toml", "cannot read the config file nowhere.toml: No such file"),
    ],
)
def test_bad_input(here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    assert expected in refused(["train", *SMALL, *words.split(" ")], here, capsys)


@pytest.mark.usefixtures("own_random")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("workers", ["inline", "processes"])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_no_gpu(here: Path, capsys: pytest.CaptureFixture[str], command: str, workers: str) -> None:
    assert "torch sees no GPU here; use device" in refused([command, *SMALL, "--workers", workers, "--device", "cuda"], here, capsys)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epohcs = 3", "there is no option 'epohcs'; did you mean 'epochs'?"),
        ("epochs = 3.5", "epochs is 3.5, but it must be a whole number"),
        ("epochs = true", "epochs is True, but it must be a whole number"),
        ("p = 1", "p is 1, but it must be a list, each entry a whole number"),
        ('at = "stsh"', "at is 'stsh', but it must be one of 'stash', 'replay', 'mixed'"),
        ("epochs = ", "is not a TOML file"),
        ("[training]\nepochs = 3", "[training] begins a table, but all options stand at the top level"),
        ('config = "other.toml"', "a config file cannot name another one"),
        ("batch_size = 0", "batch-size is 0"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_bad_config_files(here: Path, capsys: pytest.CaptureFixture[str], command: str, text: str, expected: str) -> None:
    (here / "c.toml").write_text(text)
    words = [command, "--config", "c.toml"] + (["--methods", "dsp"] if command == "compare" else [])
    if command == "compare" and text.startswith(("p ", "at ")):
        expected = "there is no option"  # of the whole comparison: rows have them
    assert expected in refused(words, here, capsys)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--methods bp fdg:bta=0.5", "did you mean 'beta'?"),
        ("--methods bp --stages 6", "5 layers into 6 stages"),
        ("--methods bp --cuts 3 1", "out of order"),
        ("--methods bp gpipe:micro_batches=32 --model cnn", "in front of BatchNorm"),
        ("--methods bp --limit 129 --model cnn", "in front of BatchNorm"),
        ("--methods bp --batches 0", "batches is 0"),
        ("--methods bp --data folder --data-dir nowhere", "nowhere does not exist"),
    ],
)
def test_a_comparison_refuses_a_bad_row_before_it_trains_the_first(
    here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str
) -> None:
    assert expected in refused(["compare", *SMALL, *words.split()], here, capsys)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--stages 0", "stages is 0"),
        ("--slots 0", "slots is 0"),
        ("--forward -1", "forward is -1, but it must be at least 0"),
        ("--link-delay nan", "link-delay is nan"),
        ("--profile mlp --threads 0", "threads is 0"),
        ("--profile mlp --batch-size 0", "batch-size is 0"),
        ("--profile mlp --stages 9", "cannot cut a network of 5 layers into 9 stages"),
        ("--picture nowhere/p.png", "there is no folder nowhere"),
        ("--method ddg --beta 0.5", "ddg has no option 'beta'"),
        ("--method dgl-async --noise 0.5", "noise slows one of several free-running stages"),
    ],
)
def test_a_plan_that_is_refused(here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    assert expected in refused(["plan", *words.split()], here, capsys)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("broken", [b"", b"no image", b"\xff\xd8\xff\xe0\x00\x10JFIF"])
def test_a_broken_image_is_named(here: Path, capsys: pytest.CaptureFixture[str], broken: bytes) -> None:
    from PIL import Image

    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (here / "d" / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), name and "red").save(here / "d" / part / name / "1.png")
    (here / "d" / "train" / "dog" / "2.jpg").write_bytes(broken)
    error = refused(["train", *SMALL, "--limit", "2", "--data", "folder", "--data-dir", "d"], here, capsys)
    assert "cannot read the image d/train/dog/2.jpg" in error
    assert "Repair or remove it" in error


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_run_folder_is_not_written_over(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    rows = ["--methods", "bp", "--no-plain"] if command == "compare" else []
    words = [command, *SMALL, *rows, "--batches", "1", "--out", "a"]
    assert main(words) == 0
    assert "give another --out, or --overwrite to replace the run" in refused(words, here, capsys)
    assert "--overwrite" in refused([*words, "--seed", "1"], here, capsys)
    assert "at most 5" in refused([*words, "--overwrite", "--stages", "6"], here, capsys)
    file = next(path for path in Path("a").iterdir() if path.is_file())
    assert f"cannot use the run folder {file}/b: {file} is a file" in refused([*words[:-1], f"{file}/b"], here, capsys)


@pytest.mark.usefixtures("own_random")
def test_a_loss_that_is_no_number(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *SMALL, "--lr", "1e6", "--log-every", "1", "--out", "a"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: the loss of batch \d+ became (nan|inf) at stage 1, after \d+ updates?; lower .*recorded is in a\n", error)
    told = json.loads(Path("a/summary.json").read_text())
    assert told["status"] == "failed"
    assert told["error"] in error
    assert len(Path("a/metrics.jsonl").read_text().splitlines()) == told["batches"] > 0


@pytest.mark.usefixtures("own_random")
def test_a_loss_that_is_no_number_in_processes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(["train", *SMALL, "--workers", "processes", "--lr", "1e30"], here, capsys)
    assert re.search(r"the loss of batch \d became nan at stage 1", error)
