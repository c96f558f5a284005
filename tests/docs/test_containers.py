"""compose.yaml, Dockerfile and docs/containers.md fit together; no Docker is needed.

Every command is read by the parser of the program that it starts, as installed.
"""

import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from flwr.supercore.cli import flower_superexec
from flwr.superlink.cli import flower_superlink
from flwr.supernode.cli import flower_supernode

from fedss.cli.parser import make_parser
from fedss.flower.client_app import _NODE_CONFIG
from tests.docs.test_deploy import UNITS, settings

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    # It uses what typer will no longer have.
    from flwr.cli.app import app as flwr

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "containers.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SITES = [name for name in SERVICES if name.startswith("site-")]


def parse_of(module: Any, name: str) -> Any:
    """Flower's own parser. It has no public name; the version is held by the extra ``flower``."""
    return getattr(sys.modules[module.__module__], name)()


PARSERS = {
    "flower-superlink": parse_of(flower_superlink, "_parse_args_run_superlink"),
    "flower-superexec": parse_of(flower_superexec, "_parse_args"),
    "flower-supernode": parse_of(flower_supernode, "_parse_args_run_supernode"),
    "fedss": make_parser(),
}


def read(words: list[str]) -> None:
    """A command as its program reads it; SystemExit or an error of click if it does not."""
    program, *rest = words
    if program in PARSERS:
        PARSERS[program].parse_args(rest)
        return
    assert program == "flwr"
    command, context = typer.main.get_command(flwr), None
    while hasattr(command, "commands"):
        context = typer.Context(command, parent=context, info_name=program)
        program, *rest = rest
        command = command.commands[program]
    command.make_context(program, rest, parent=context)


def commands(service: dict[str, Any]) -> list[list[str]]:
    words = service["command"]
    if words[0] != "sh":
        return [words]
    lines = re.findall(r"\b(?:flwr|fedss) (?!:).*?(?=$| \|\|)", words[2].replace("$$", ""), re.M)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("name", SERVICES)
def test_each_command_is_one_that_its_program_takes(name):
    found = commands(SERVICES[name])
    assert len(found) == (3 if name == "run" else 1)
    for words in found:
        read(words)


@pytest.mark.parametrize(
    "words", ["flower-superlink --nix", "flower-supernode --nix", "flwr run --nix", "flwr nix"]
)
def test_a_command_that_its_program_does_not_take_is_seen(words):
    with pytest.raises((SystemExit, Exception)):
        read(words.split())


def options(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@pytest.mark.parametrize(
    "unit, name", [("SuperLink", "superlink"), ("SuperExec", "superexec"), ("site", "site-2")]
)
def test_the_options_are_those_that_were_tried(unit, name):
    (command,) = settings(UNITS[unit], "ExecStart")
    tried = shlex.split(command.replace("\\\n", " "))
    assert Path(tried[0]).name == SERVICES[name]["command"][0]
    assert options(tried) == options(SERVICES[name]["command"])


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_the_secrets_that_its_command_names_and_no_others(name):
    service = SERVICES[name]
    named = set(re.findall(r"/run/secrets/([\w.-]+)", " ".join(service["command"])))
    # That of flwr is named in its configuration.
    named |= {"ca.pem"} if name == "run" else set()
    assert named == set(service["secrets"]) <= COMPOSE["secrets"].keys()
    assert ("sites.secret" in named) == (name in SITES)
    assert not {"ports", "privileged"} & service.keys()


def test_sites_differ_in_their_names_alone():
    first, *others = (str(SERVICES[name]).replace(name, "site") for name in SITES)
    assert len(others) == 2
    assert {*others} == {first}
    words = SERVICES["site-1"]["command"][-1].partition("=")[2]
    assert {pair.partition("=")[0] for pair in shlex.split(words)} <= set(_NODE_CONFIG)


def test_what_is_mounted_is_made_by_the_commands_of_the_page(tmp_path):
    for program in ("bash", "openssl", "ssh-keygen"):
        if shutil.which(program) is None:
            # Of the machine that containers run on; a newcomer's need not have them.
            pytest.skip(f"no {program} on this machine")
    (script,) = (block for block in BLOCKS if "openssl req" in block)
    script = re.sub(r"^fedss ", f"{sys.executable} -m fedss ", script, flags=re.M)
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    volumes = [v.split(":")[0] for service in SERVICES.values() for v in service["volumes"]]
    files = [secret["file"] for secret in COMPOSE["secrets"].values()]
    assert all((tmp_path / folder).is_dir() for folder in volumes)
    for file in files:
        assert (tmp_path / file).stat().st_mode & 0o077 == 0, file
    keys = tmp_path / "federation" / "keys"
    assert sorted(f"{p.stem}" for p in (keys / "public").iterdir()) == SITES
    verify = ["openssl", "verify", "-CAfile", keys / "ca.pem", "-verify_hostname", "superlink"]
    subprocess.run([*verify, keys / "server.pem"], check=True, capture_output=True)
    config = (tmp_path / "federation/user/flwr/config.toml").read_text()
    (command,) = commands(SERVICES["superexec"])
    assert f'address = "{command[1].partition("=")[2]}"' in config


def test_the_image_copies_what_there_is_and_runs_as_nobody_in_particular():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [w for line in lines if line.startswith("COPY") for w in line.split()[1:-1]]
    here = {word for word in copied if not word.startswith(("--from", "/wheels"))}
    sent = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.M))
    assert here == sent
    assert all((ROOT / name).exists() for name in here)
    assert [line.split()[1] for line in lines if line.startswith("USER")] == ["fedss"]
    assert "TORCH_INDEX_URL" in COMPOSE["x-fedss"]["build"]["args"]
    assert "ARG TORCH_INDEX_URL" in "\n".join(lines)
