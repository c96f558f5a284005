"""Scripts with which shells complete ``fedss``, as shtab makes them."""

import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("shtab")


def script(shell: str) -> str:
    words = [sys.executable, "-m", "shtab", "-s", shell, "fedss.cli.completion.completion_parser"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sea"], {"search"}),
        (["train", "--roun"], {"--rounds"}),
        (["train", "--server-opt"], {"--server-optimizer"}),
        (["train", "--method", "fed"], {"fedss", "fedss-published", "fedss-uncorrected", "fedaws"}),
        (["compare", "--methods", "full", "mom"], {"moments"}),
        (["info", "--sampler", "s"], {"sticky"}),
        (["info", "--data-path", "ph"], {"photos.csv"}),
        (["search", "ru"], {"runs"}),
    ],
)
def test_bash_completes(words, expected, tmp_path):
    (tmp_path / "photos.csv").touch()
    (tmp_path / "runs").mkdir()
    line = ["fedss", *words]
    code = script("bash") + (
        f"\nCOMP_WORDS=({' '.join(line)}); COMP_CWORD={len(words)}\n"
        f"_shtab_fedss fedss '{line[-1]}' '{line[-2]}'\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert {*done.stdout.split()} == expected, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_zsh_and_fish_have_every_command_option_and_choice(shell):
    text = script(shell)
    names = ["enrol", "class-row-lr", "max-upload-mb", "fedss-uncorrected", "help-all"]
    assert not [name for name in names if not re.search(rf"\b{name}(?![\w-])", text)]
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=text, text=True).returncode == 0
