"""What docs/deploy.md tells an administrator to type fits together, and does what it says."""

import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fedss.flower.settings import DEPLOYMENT_FIELDS

TEXT = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
UNITS = {
    name: next(b for b in BLOCKS if b.startswith("[Unit]") and f"Description=fedss: {name}" in b)
    for name in ("SuperLink", "SuperExec", "site")
}
SHELL = "\n".join(block for block in BLOCKS if block not in UNITS.values())

OF_SERVICES = ("flwr", "systemctl", "mkdir /srv")


def settings(unit: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=((?:.*\\\n)*.*)", unit, re.MULTILINE)


def test_the_user_is_made_before_it_is_needed():
    assert {user for unit in UNITS.values() for user in settings(unit, "User")} == {"fedss"}
    homes = re.findall(r"^useradd .*--home-dir (\S+) .* fedss\b", SHELL, re.MULTILINE)
    assert homes == [settings(UNITS[name], "WorkingDirectory")[0] for name in ("SuperLink", "site")]
    assert TEXT.index("useradd") < TEXT.index("install -d")


@pytest.mark.parametrize("name", UNITS)
def test_each_file_of_a_unit_is_made_for_its_user(name):
    """Whatever its command names is made by a command here that gives it to the user's group."""
    unit = UNITS[name]
    (command,) = settings(unit, "ExecStart")
    (folder,) = settings(unit, "WorkingDirectory")
    made = "install -d -o fedss" in SHELL and f"{folder}\n" in SHELL
    assert made or settings(unit, "StateDirectory") == [Path(folder).name]
    keys = {Path(word).name for word in re.findall(r"(?:keys|/etc/fedss)/([\w.-]+)", command)}
    assert keys
    given = re.findall(
        r"^install -o root -g fedss -m 640 (.*) \S+$|^chown root:fedss (.*) && chmod 640 \2$",
        SHELL,
        re.MULTILINE,
    )
    readable = {Path(word).name for pair in given for part in pair for word in part.split()}
    assert keys <= readable


def test_keys_are_made_and_can_be_read_by_the_group_alone(tmp_path):
    """The commands themselves, under the umask of a careful administrator; owners stay ours."""
    for program in ("bash", "openssl", "ssh-keygen", "install"):
        if shutil.which(program) is None:
            # A server's programs: a newcomer's machine need not have them.
            pytest.skip(f"no {program} on this machine")
    server = next(block for block in BLOCKS if "openssl req" in block)
    key = next(block for block in BLOCKS if "ssh-keygen" in block)
    secret = next(block for block in BLOCKS if "fedss secret" in block)
    script = "\n".join(["umask 077", server, "cp ca.pem /etc/fedss", key, secret])
    script = script.replace(
        "cp ca.pem /etc/fedss\n", "install -d /etc/fedss; cp ca.pem /etc/fedss\n"
    )
    script = script.replace("/opt/fedss/bin/fedss", f"{sys.executable} -m fedss")
    script = re.sub(r"-o \w+ -g fedss |chown root:fedss .*? && ", "", script)
    for place in ("/srv", "/etc"):
        script = script.replace(f"{place}/fedss", f"{tmp_path}{place}/fedss")
        (tmp_path / place[1:]).mkdir()
    subprocess.run(["bash", "-ec", script], check=True, capture_output=True)
    keys, site = tmp_path / "srv/fedss/keys", tmp_path / "etc/fedss"
    found = {path.name: path for path in (*keys.iterdir(), *site.iterdir())}
    assert found.keys() == {
        *("ca.pem", "server.pem", "server.key", "superexec.secret"),
        *("shop-a", "shop-a.pub", "secret"),
    }
    for name, path in found.items():
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if name == "shop-a.pub" else 0o640)
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o750 for folder in (keys, site))
    assert stat.S_IMODE((tmp_path / "etc/fedss-ca").stat().st_mode) == 0o700
    verify = ["openssl", "verify", "-CAfile", keys / "ca.pem", keys / "server.pem"]
    subprocess.run(verify, check=True, capture_output=True)


@pytest.mark.parametrize("step", ["python3 -m venv", "in a newer clone"])
def test_what_is_installed_can_be_run_by_the_user(step, tmp_path):
    """Under the umask of a careful administrator; pip is one that writes a file."""
    if shutil.which("bash") is None:
        # A server has it; a newcomer's machine need not.
        pytest.skip("no bash on this machine")
    (block,) = (block for block in BLOCKS if step in block)
    script = "\n".join(line for line in block.splitlines() if not line.startswith(OF_SERVICES))
    # Without pip, which takes seconds to put there.
    script = script.replace("python3 -m venv", f"{sys.executable} -m venv --without-pip")
    script = script.replace("/opt/fedss", f"{tmp_path}/fedss")
    pip = f'pip() {{ mkdir -p "{tmp_path}/fedss" && echo > "{tmp_path}/fedss/installed"; }}'
    subprocess.run(["bash", "-ec", f"umask 077\n{pip}\n{script}"], check=True, capture_output=True)
    made = [tmp_path / "fedss", *(tmp_path / "fedss").rglob("*")]
    assert tmp_path / "fedss/installed" in made
    for path in made:
        mode = path.stat().st_mode
        assert mode & stat.S_IROTH, path
        assert mode & stat.S_IXOTH or not (path.is_dir() or mode & stat.S_IXUSR), path


def test_systemd_accepts_the_units(tmp_path):
    if shutil.which("systemd-analyze") is None:
        # It alone can tell whether a unit is right, and containers have none.
        pytest.skip("no systemd on this machine")
    for name, unit in UNITS.items():
        # It looks whether the command is there.
        here = unit.replace("/opt/fedss/bin", sysconfig.get_path("scripts"))
        (tmp_path / f"fedss-{name.lower()}.service").write_text(here)
    command = ["systemd-analyze", "verify", *tmp_path.glob("*.service")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_setting_of_a_federation_is_explained_with_its_default():
    rows = dict(re.findall(r"^\| (`[^|]*) \| ([^|]*)\|", TEXT[TEXT.index("## 7.") :], re.MULTILINE))
    told = {
        name: default.strip("` ")
        for names, defaults in rows.items()
        for name, default in zip(names.split(", "), defaults.split(","), strict=False)
    }
    for item in DEPLOYMENT_FIELDS:
        name = f"`{item.name.replace('_', '-')}`"
        default = f"{item.default:g}" if isinstance(item.default, float) else str(item.default)
        assert told[name] == default
