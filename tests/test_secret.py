"""Secrets: what is made can be read, what is none is refused, and no purpose tells of another."""

import hashlib
import hmac
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

import fedss
from fedss.cli import main
from fedss.errors import ConfigError, RunFolderError
from fedss.flower.registry import token
from fedss.models import fingerprint
from fedss.secret import derive, draw_key, make_secret, proof, read_secret
from tests.pins import SMALL
from tests.reference import tiny_backbone, tiny_dataset
from tests.sites import write_secret


def test_a_secret_is_new_random_and_its_owners(tmp_path, capsys):
    before = os.umask(0)
    try:
        assert main(["secret", str(tmp_path / "one")]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600
    make_secret(tmp_path / "other")
    one, other = (read_secret(tmp_path / name, "secret_file") for name in ("one", "other"))
    assert re.fullmatch(rb"[0-9a-f]{64}", one)
    assert one != other
    said = capsys.readouterr().out
    assert str(tmp_path / "one") in said
    assert one.decode() not in said


def test_a_secret_is_never_written_over(tmp_path, capsys):
    make_secret(tmp_path / "secret")
    before = (tmp_path / "secret").read_bytes()
    assert main(["secret", str(tmp_path / "secret")]) == 2
    assert main(["secret", str(tmp_path / "nowhere" / "secret")]) == 2
    assert (tmp_path / "secret").read_bytes() == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "is there already" in lines[0]
    assert "cannot write it: No such file" in lines[1]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "got 0 hexadecimal digits"),
        (b"correct horse battery staple", "got 28 bytes of something else"),
        (
            b"a passphrase of many words is a passphrase all the same, however long it gets",
            "64 hex",
        ),
        (b"0123456789abcdef" * 3, "got 48 hexadecimal digits"),
        (b"ab" * 31 + b"a", "got 63 bytes of something else"),
        (hashlib.sha256(b"").digest(), "bytes of something else"),
        (b"00" * 32, "got a pattern"),
        (b"0123456789abcdef" * 8, "got a pattern"),
        (bytes(range(7, 71)).hex().encode(), "got a pattern"),
        (bytes(range(0, 256, 5)).hex().encode(), "got a pattern"),
    ],
)
def test_what_is_no_secret_is_refused_in_a_line(content, why, tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(content + b"\n")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=why) as raised:
        read_secret(path, "secret_file")
    text = str(raised.value)
    assert text.startswith(f"secret_file {path}: expected ")
    assert text.endswith("make one with: fedss secret FILE")
    assert "\n" not in text
    assert not content or content.decode("latin-1") not in text


def test_a_random_secret_is_none_of_those(tmp_path):
    for number in range(300):
        path = write_secret(tmp_path / "secret", str(number))
        assert len(read_secret(path, "secret_file")) == 64


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o666, 0o601])
def test_a_file_that_others_can_read_is_refused(mode, tmp_path):
    path = write_secret(tmp_path / "secret")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"others cannot read or write, got mode {mode:o}"):
        read_secret(path, "secret_file")
    for fine in (0o400, 0o600, 0o640):
        path.chmod(fine)
        read_secret(path, "secret_file")


def test_a_file_that_is_not_there(tmp_path, capsys):
    options = ["train", "--secret-file", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    assert main([*options, "--glyphs-classes", "40", "--glyphs-clients", "8"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "secret_file" in line]
    assert "cannot read it: No such file or directory; make one with: fedss secret FILE" in line
    assert not (tmp_path / "run").exists()


def test_each_purpose_has_a_derivation_of_its_own():
    """Against HMAC-SHA256 as the standard library has it; names of tokens are what they were."""
    secret = b"0f" * 32

    def expected(text: bytes) -> bytes:
        return hmac.new(secret, text, hashlib.sha256).digest()

    assert draw_key(secret) == expected(b"draws\0")
    assert proof(secret) == expected(b"proof\0").hex()[:32] == token(secret, "proof", "")
    assert token(secret, "class", "cat") == expected(b"class\0cat").hex()[:32]
    labels = ("draws", "proof", "class", "client")
    assert len({derive(secret, label, text) for label in labels for text in ("", "a")}) == 8


def test_a_secret_is_not_shown(tmp_path: Path):
    from fedss.config import Config
    from fedss.settings import resolve
    from fedss.training.build import round_plan

    plan = round_plan(resolve(Config(sample_size=4), None)[0], 9, 0, secret=b"0f" * 16)
    assert "0f0f" not in repr(plan)


def train(folder: Path, name: str, secret_file: Path | None, **changes: Any) -> fedss.Run:
    quiet = {"data": tiny_dataset(), "backbone": tiny_backbone(), "on_round": lambda record: None}
    told = {
        **SMALL,
        "lr_schedule": "constant",
        "rows_up": "int8",
        "secret_file": secret_file and str(secret_file),
        **changes,
    }
    return fedss.train(fedss.Config(**told), folder / name, **quiet)


def test_a_simulation_with_a_secret_is_another_draw_and_has_the_same_bits_again(tmp_path):
    one, other = (write_secret(tmp_path / name, name) for name in ("one", "other"))
    bits = {
        name: fingerprint(train(tmp_path, name, secret).embedder)
        for name, secret in (("a", None), ("b", one), ("c", one), ("d", other))
    }
    assert bits["b"] == bits["c"]
    assert len({bits[name] for name in "abd"}) == 3
    stored = (tmp_path / "b" / "config.json").read_text()
    assert one.read_text().strip() not in stored
    assert json.loads(stored)["model"]["secret"] == proof(one.read_bytes().strip())


def test_a_run_goes_on_with_its_secret_alone(tmp_path):
    secret, moved = write_secret(tmp_path / "secret"), tmp_path / "moved"
    whole = train(tmp_path, "whole", secret, rounds=4)
    train(tmp_path, "run", secret, rounds=2)
    for wrong in (None, write_secret(tmp_path / "wrong", "wrong")):
        with pytest.raises(RunFolderError, match=r"other settings \(secret: "):
            train(tmp_path, "run", wrong, rounds=4)
    secret.rename(moved)
    longer = train(tmp_path, "run", moved, rounds=4)
    assert fingerprint(longer.embedder) == fingerprint(whole.embedder)
