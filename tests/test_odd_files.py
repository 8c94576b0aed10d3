"""Files of options, and files in the folder of a run, that are damaged or no files: refused by their name, in one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from delock.cli import main
from delock.cli.replay import differences
from delock.cli.run_folder import load_visits
from delock.errors import UsageError

from commands import SMALL, refused

pytestmark = pytest.mark.usefixtures("own_random")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"seed = " + b"9" * 5000, "c.toml is not a TOML file: "),
        (b"seed = 99999999999999999999999999999999999", "seed is a number of more than 30 digits, but it must be at most"),
        (b"cuts = " + b"[" * 2000 + b"]" * 2000, "c.toml is not a TOML file of options: its lists are nested too deeply"),
        (b"seed = 1\0", "c.toml is not a TOML file: "),
        (b'model = "\xff"', "c.toml is not a TOML file: "),
        (b"# " + b"x" * 2**20, "c.toml is not a TOML file: it has 1,048,578 bytes, and at most 1,048,576 are read"),
        (b"seed = [" + b"1," * 10000 + b"]", "seed is [1, 1, 1"),
        (b"x" * 10000 + b" = 1", "there is no option 'xxx"),
        (b'data_dir = "a\\u0000b"\ndata = "folder"', "data_dir is 'a\\x00b', but no text of an option has a NUL"),
    ],
)
def test_a_file_of_options_that_nobody_would_write(here: Path, capsys: pytest.CaptureFixture[str], content: bytes, expected: str) -> None:
    (here / "c.toml").write_bytes(content)
    error = refused(["train", *SMALL, "--config", "c.toml"], here, capsys)
    assert expected in error
    assert len(error) < 400


@pytest.mark.parametrize(
    ("name", "expected"), [("folder", "Is a directory"), ("fifo", "no regular file"), ("/dev/zero", "no regular file")]
)
def test_options_come_from_a_file_alone(here: Path, capsys: pytest.CaptureFixture[str], name: str, expected: str) -> None:
    (here / "folder").mkdir()
    os.mkfifo(here / "fifo")
    for command in ("train", "compare"):
        capsys.readouterr()
        assert main([command, "--config", name]) == 2
        error = capsys.readouterr().err
        assert name in error
        assert expected in error


def damaged(name: str, content: bytes) -> None:
    """A copy of the run `whole` with another file of that name."""
    shutil.rmtree("x", ignore_errors=True)
    shutil.copytree("whole", "x")
    if content == b"FIFO":
        Path("x", name).unlink()
        os.mkfifo(Path("x", name))
    else:
        Path("x", name).write_bytes(content)


ODD = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"[" * 100000,
    b"\xff\xfe",
    b'{"characters": ' + b"9" * 5000 + b"}",
    b"\0" * 100,
    b'{"characters": ["a"]}',
]


def test_damaged_files_of_a_run_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "the quick brown fox jumps over the lazy dog\n" * 60
    (here / "a.txt").write_text(text)
    size = "--depth 1 --width 8 --attention-heads 1 --context 8 --batch-size 2 --batches 1 --workers inline"
    assert main(["train", "--data", "text", "--text", "a.txt", *size.split(), "--out", "whole"]) == 0
    for odd in [*ODD, b'{"characters": "ba"}', b'{"characters": "a"}', b"FIFO"]:
        damaged("alphabet.json", odd)
        assert "x/" in refused(["sample", "x"], here, capsys)
    for odd in ODD:
        damaged("model.safetensors", odd)
        for words in (["sample", "x"], ["eval", "x"], ["export", "x"]):
            assert "x/model.safetensors" in refused(words, here, capsys)
        damaged("summary.json", odd)
        assert main(["sample", "x", "--tokens", "1"]) == 0
        assert main(["checkpoints", "x"]) == 0
    config = Path("whole/config.toml").read_text()
    for old, new, says in [
        ("depth = 1", "depth = 1000000", "x/config.toml: depth is 1000000, but it must be at most 1,000"),
        ("depth = 1", "depth = 1000", "x/model.safetensors does not hold the model that config.toml describes"),
        ("width = 8", "width = 100000", "x/model.safetensors does not hold the model that config.toml describes: it is smaller"),
        ("seed = 0", "seed = " + "9" * 5000, "x/config.toml is not a TOML file"),
        ("seed = 0", "seed = \0", "x/config.toml is not a TOML file"),
    ]:
        assert old in config
        damaged("config.toml", config.replace(old, new).encode())
        assert says in refused(["sample", "x"], here, capsys)
        assert says in refused(["eval", "x"], here, capsys)


@pytest.mark.parametrize("odd", [b"[" * 100000 + b"\n{}\n", b"\xff\n{}\n", b'{"stage": ' + b"9" * 5000 + b"}", b"null\n{}\n"])
def test_a_damaged_trace_is_named(tmp_path: Path, odd: bytes) -> None:
    (tmp_path / "trace.jsonl").write_bytes(odd)
    with pytest.raises(UsageError, match=r"trace\.jsonl"):
        load_visits(tmp_path, 2)


def test_weights_that_a_replay_cannot_read_are_named(tmp_path: Path) -> None:
    for odd in ODD:
        (tmp_path / "model.safetensors").write_bytes(odd)
        with pytest.raises(UsageError, match=r"model\.safetensors cannot be read"):
            differences({}, tmp_path / "model.safetensors")
