"""Runs the command line: finds the command, and turns an error into one clear message and an exit code."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from types import MappingProxyType

from delock import __version__
from delock.cli.interrupts import interruptible
from delock.cli.loading import start_server
from delock.cli.ranks import is_rank_zero
from delock.cli.rescue import advice
from delock.errors import DelockError, UsageError

COMMANDS = MappingProxyType(
    {
        "train": "train a network with one method",
        "compare": "train it with several methods, and lay the results side by side",
        "plan": "show what a method does, without training",
        "cuts": "list the places where a model can be cut, and the cuts that make stages even",
        "bench": "run a benchmark of this checkout, or list them",
        "replay": "do a free-running run again in one process, and compare the weights",
        "sample": "print text from a language model that was trained",
        "checkpoints": "list the checkpoints of a run, and say how to go on",
        "export": "write the weights of a run or a checkpoint as safetensors",
        "eval": "evaluate the weights of a run or a checkpoint",
    }
)
TRAINING = ("train", "compare")
USAGE, FAILED, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 for a run that failed, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.

    A note on an error (add_note) says where something was kept, and is printed with the error. Without `argv` the command is the whole
    program, which should end with this code.
    """
    if argv is not None:
        try:
            return _run(argv, whole_program=False)
        finally:
            gc.unfreeze()  # what the command has loaded is again as all else is in this program
    done: list[int] = []
    atexit.register(_leave, done)  # before all others, so it is called after them
    done.append(_run(sys.argv[1:], whole_program=True))
    return done[0]


def _leave(done: Sequence[int]) -> None:
    """Ends the process at once.

    Otherwise Python would take apart all that torch has loaded, for half a second, and torch's threads have been seen to abort a process in
    that time.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader is gone
            if stream is not None:  # the program was started without it
                stream.flush()
    if done:
        os._exit(done[0])


def _run(words: Sequence[str], whole_program: bool) -> int:
    with interruptible(whole_program=whole_program):
        try:
            return _command(words)
        except UsageError as error:
            _say(f"error: {' '.join(str(error).split())}", error, "; ")
            return USAGE
        except DelockError as error:
            _say(f"error: {error}", error, "\n")
            return FAILED
        except KeyboardInterrupt as error:
            if is_rank_zero():
                _say("interrupted", error, "; ")
            return getattr(error, "code", INTERRUPTED)
        except BrokenPipeError:  # `delock plan | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except OSError as error:  # a full disk, a folder that may not be written
            _say(f"error: {error}{advice(error)}", error, "; ")
            return FAILED
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                raise
            _say("error: there is not enough memory for this network, or for a batch of this size: use smaller ones", error, "; ")
            return FAILED
        except SystemExit as leave:  # the parser, after --help; a rank of torchrun, after its failure
            return leave.code if isinstance(leave.code, int) else int(leave.code is not None)


def _command(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if words[0] == "--version":
        print(f"delock {__version__}")
        return 0
    if words[0] not in COMMANDS:
        near = get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UsageError(f"delock has no command {words[0]!r}: {hint}")
    if words[0] in TRAINING:
        start_server(words[1:])  # before the import, which takes a while, too
    code: int = import_module(f"delock.cli.{words[0]}").run(words[1:])
    return code


def _say(text: str, error: BaseException, joint: str) -> None:
    print(joint.join([text, *getattr(error, "__notes__", ())]), file=sys.stderr)


def help_text() -> str:
    """Returns the help of `delock` itself."""
    commands = "\n".join(f"  {name:<12} {what}" for name, what in COMMANDS.items())
    return f"""usage: delock COMMAND [OPTIONS]

Train one deep network on several workers depth-wise, without the locks of
backpropagation.

commands:
{commands}

delock COMMAND --help shows the options of a command; --version the version.

examples:
  delock train
  delock train --method adl --accumulate 4 --stages 4 --model cnn
  delock compare --methods bp,ddg,fdg,adl --epochs 5
  delock plan --method fdg --stages 3
  delock cuts --model torchvision/resnet18 --data synthetic --stages 4
  delock train --data text --out runs/manual
  delock sample runs/manual
  delock checkpoints runs/manual
  delock eval runs/manual
  delock export runs/manual --out model.safetensors"""
