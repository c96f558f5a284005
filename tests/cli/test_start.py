"""What a command does before its work: help and mistakes need no torch; Ctrl-C ends it anywhere."""

import subprocess
import sys
from collections.abc import Sequence

import pytest
from PIL import Image

from fedss.cli import main
from tests.cli.test_cli import GLYPHS

# What takes long to import, torch above all.
HEAVY = {"torch", "numpy", "PIL", "safetensors", "jinja2", "matplotlib"}


def python(code: str, words: Sequence[object] = ()) -> subprocess.CompletedProcess[str]:
    """What a process of its own does, which has these words after its name."""
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["app", "--help"], 0),
        (["audit", "--help"], 0),
        (["trian"], 2),
        (["train", "--roundz", "3"], 2),
        (["info", "--method", "fedsss"], 2),
        (["info", "--data-path", "none.csv", "--rounds", "0"], 2),
        (["compare", "--methods", "full", "fed", "--out", "none"], 2),
        (["train", "--config", "none.json", "--out", "none"], 2),
    ],
)
def test_help_and_mistakes_need_none_of_what_trains(words, code):
    done = python(
        "import sys, fedss.cli\n"
        "try: code = fedss.cli.main()\n"
        "except SystemExit as end: code = end.code\n"
        "print(code or 0, *sys.modules)",
        words,
    )
    *_, line = done.stdout.splitlines()
    ended, *modules = line.split()
    assert (int(ended), done.stderr.count("\n")) == (code, 1 if code else 0)
    assert not HEAVY & {*modules}


def test_search_loads_no_more_of_torch_than_torch_does(tmp_path):
    run, image = tmp_path / "run", tmp_path / "image.png"
    Image.new("RGB", (20, 20)).save(image)
    assert main(["train", *GLYPHS, "--out", str(run)]) == 0
    assert main(["index", str(run), str(tmp_path)]) == 0
    code = "import sys, fedss.cli; fedss.cli.main(); print(*sys.modules)"
    done = python(code, ["search", run, image])
    assert "image.png" in done.stdout
    # Its compiler takes longer to import than all the rest; a page is written with --show alone.
    assert not {"torch._dynamo", "sympy", "jinja2"} & {*done.stdout.split()}


# Ctrl-C, when a module is looked for, a file is written, or the process ends.
INTERRUPTED = """
import atexit, os, signal, sys
from contextlib import suppress
from importlib.abc import MetaPathFinder

place, handler, *sys.argv[1:] = sys.argv[1:]

def interrupt_at(name):
    if name == place:
        os.kill(os.getpid(), signal.SIGINT)

class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        # An import has callbacks, and modules of C, in which it is lost.
        with suppress(KeyboardInterrupt):
            interrupt_at(name)

sys.meta_path.insert(0, Finder())
sys.addaudithook(lambda event, args: interrupt_at(str(args[0])[-13:]) if event == "open" else None)
atexit.register(interrupt_at, "exit")
signal.signal(signal.SIGINT, getattr(signal, handler))
from fedss.cli import main
sys.exit(main())
"""


def interrupted(
    place: str, *words: object, handler: str = "default_int_handler"
) -> tuple[int, str]:
    done = python(INTERRUPTED, [place, handler, *words])
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "place",
    [
        "argparse",
        "fedss.cli.use",
        "fedss.config",
        "rich",
        "numpy",
        "torch",
        "torch.nn.functional",
        "fedss.training.build",
        "exit",
    ],
)
def test_ctrl_c_is_one_line_while_modules_are_imported_and_at_the_end(place):
    assert interrupted(place, "info", *GLYPHS) == (130, "\nfedss: interrupted\n")


def test_ctrl_c_during_work_says_how_to_go_on(tmp_path):
    code, said = interrupted("records.jsonl", "train", *GLYPHS, "--out", tmp_path / "run")
    assert code == 130
    assert said.endswith("\nfedss: interrupted; start the same command again to go on\n")
    assert "Traceback" not in said


def test_ctrl_c_that_is_ignored_stays_so():
    assert interrupted("torch", "info", *GLYPHS, handler="SIG_IGN") == (0, "")


def test_a_program_that_calls_a_command_keeps_its_handler():
    code = "import signal\nfrom fedss.cli import main\nmain(['info', '--rounds', '0'])\n"
    code += "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    assert python(code).returncode == 0
