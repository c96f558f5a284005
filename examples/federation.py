"""A whole federation on this machine: TLS, node keys, a SuperLink, sites, one run, and its end.

docs/deploy.md says what to type on several machines; these are the same commands, started and
stopped by a program. Each function does one of its steps, so tests and benchmarks use them too:

    with place(folder, sites=3) as federation:
        superlink(federation), superexec(federation)
        for number in range(3):
            register(federation, number)
            site(federation, number, {"data": f"/data/{number}", "secret-file": secret(federation)})
        run = submit(federation, "app")
        for line in follow(federation, run):
            print(line)
        print(status(federation, run))

All that is written lies in the folder: ``keys/``, ``state.db``, a log of each process in ``logs/``,
and Flower's own files (``FLWR_HOME``) of the user, the server and each site. Ports are free ones,
so several federations can run side by side. When the block ends, or this program does, even by
SIGKILL, no process is left.

    python examples/federation.py            # three sites, glyphs, a dozen rounds
"""

import argparse
import datetime
import ipaddress
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image

import fedss
from fedss.secret import make_secret

Process = subprocess.Popen[bytes]
Value = str | int | float | bool

# Kills the process groups that it was told of when its standard input ends without a word: in
# whatever way the program dies that holds the other end, the federation does not outlive it.
GUARD = """
import os, signal, sys
groups = []
for line in sys.stdin:
    if line == "done\\n":
        sys.exit()
    groups.append(int(line))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""

# What a service manager does with a site: start it again until it ends by itself in peace. The
# SuperLink turns away a SuperNode whose key it believes to be online, for up to a minute after one
# that could not say goodbye. A SIGTERM to the group ends it with its child.
AGAIN = 'trap "exit 0" TERM; until "$@"; do sleep 3; done'


class FederationError(Exception):
    """A process of the federation, or a command to it, failed."""


@dataclass(frozen=True)
class Place:
    """Where a federation lives: its folder, its ports, and the processes started so far."""

    folder: Path
    port: int
    site_ports: tuple[int, ...]
    processes: list[Process]
    guard: Process

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextmanager
def place(folder: str | Path, sites: int) -> Iterator[Place]:
    """Certificates, keys and ports for a SuperLink and sites; stops all processes at the end.

    A folder that an earlier federation left is used again: its keys, database and log files.
    """
    folder = Path(folder).resolve()
    port, *site_ports = free_ports(1 + sites)
    write_certificates(folder / "keys")
    if not (shared := folder / "keys" / "superexec.secret").exists():
        write_private(shared, secrets.token_bytes(32))
    for number in range(sites):
        write_node_key(folder / "keys" / f"site-{number}")
    if not (folder / "keys" / "secret").exists():
        make_secret(folder / "keys" / "secret")
    for name in ("user", "server", *(f"site-{number}" for number in range(sites))):
        (folder / "flwr" / name).mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "flwr" / "user" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        f"root-certificates = {json.dumps(str(folder / 'keys' / 'ca.pem'))}\n"
    )
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD], stdin=subprocess.PIPE, start_new_session=True
    )
    federation = Place(folder, port, tuple(site_ports), [], guard)
    try:
        yield federation
    finally:
        stop_all(federation)
        tell_guard(federation, "done")
        guard.wait()
        assert guard.stdin is not None
        guard.stdin.close()


def tell_guard(federation: Place, word: str | int) -> None:
    assert federation.guard.stdin is not None
    federation.guard.stdin.write(f"{word}\n".encode())
    federation.guard.stdin.flush()


def free_ports(count: int) -> list[int]:
    """Free ports below those that the system hands out by itself, which may go at any moment."""
    sockets: dict[int, socket.socket] = {}
    try:
        while len(sockets) < count:
            port = random.SystemRandom().randrange(20_000, 32_000)
            held = socket.socket()
            try:
                held.bind(("127.0.0.1", port))
            except OSError:
                held.close()
            else:
                sockets[port] = held
    finally:
        for held in sockets.values():
            held.close()
    return list(sockets)


def write_certificates(folder: Path) -> None:
    """``ca.pem``, and ``server.pem`` with ``server.key`` for 127.0.0.1 and localhost."""
    if (folder / "server.key").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Federation on one machine")])
    server_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())

    def certificate(
        name: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_ca: bool
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=365))
            .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=not is_ca,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=is_ca,
                    crl_sign=is_ca,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id),
                critical=False,
            )
        )

    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    ca = certificate(ca_name, ca_key, is_ca=True).sign(ca_key, hashes.SHA384())
    server = (
        certificate(server_name, server_key, is_ca=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    (folder / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    write_private(folder / "server.key", private(server_key, serialization.PrivateFormat.PKCS8))
    # No key of the authority is kept: it signs this one certificate.


def write_node_key(path: Path) -> None:
    """A site's private key, in OpenSSH's format, and ``.pub`` beside it."""
    if path.exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.with_suffix(".pub").write_bytes(public + b"\n")
    write_private(path, private(key, serialization.PrivateFormat.OpenSSH))


def private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def write_private(path: Path, content: bytes) -> None:
    """A file that its owner alone may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)


def environment(federation: Place, name: str) -> dict[str, str]:
    """What a command of Flower is told by its environment: here, no news from or for its makers."""
    scripts = sysconfig.get_path("scripts")  # where flower-superexec finds flwr-serverapp
    return os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str(federation.folder / "flwr" / name),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def start(
    federation: Place,
    name: str,
    log: str,
    command: str,
    *args: str | Path | int,
    again: bool = False,
) -> Process:
    """Start a process, and what it starts later, in a process group of its own."""
    words = [str(Path(sysconfig.get_path("scripts")) / command), *map(str, args)]
    with open(federation.folder / "logs" / f"{log}.log", "ab") as file:
        process = subprocess.Popen(
            ["sh", "-c", AGAIN, "sh", *words] if again else words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(federation, name),
            cwd=federation.folder,
            start_new_session=True,
        )
    federation.processes.append(process)
    tell_guard(federation, process.pid)
    return process


def superlink(federation: Place, *, timeout: float = 60) -> Process:
    """The server that all others talk to; comes back when it answers. Restarted, it goes on."""
    keys = federation.folder / "keys"
    process = start(
        federation, "server", "superlink", "flower-superlink",
        "--host", "127.0.0.1", "--port", federation.port,
        "--ssl-ca-certfile", keys / "ca.pem",
        "--ssl-certfile", keys / "server.pem",
        "--ssl-keyfile", keys / "server.key",
        "--enable-supernode-auth",
        "--database", federation.folder / "state.db",
        "--isolation", "process",
        "--superexec-auth-secret-file", keys / "superexec.secret",
        "--disable-runtime-dependency-installation",
    )  # fmt: skip
    until = time.monotonic() + timeout
    while not answers(federation.port):
        if process.poll() is not None or time.monotonic() > until:
            kill(process)
            raise FederationError(
                f"flower-superlink does not answer at {federation.address} "
                f"(exit status {process.poll()}); "
                f"see {federation.folder / 'logs' / 'superlink.log'}"
            )
        time.sleep(0.1)
    return process


def answers(port: int) -> bool:
    """Whether anything listens at the port."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def superexec(federation: Place) -> Process:
    """What starts the ServerApp of each run beside the SuperLink."""
    return start(
        federation, "server", "superexec", "flower-superexec",
        "--runtime-api-address", federation.address,
        "--root-certificates", federation.folder / "keys" / "ca.pem",
        "--superexec-auth-secret-file", federation.folder / "keys" / "superexec.secret",
    )  # fmt: skip


def site(federation: Place, number: int, node_config: Mapping[str, Value]) -> Process:
    """The SuperNode of a site, which starts a ClientApp for each message.

    Started over if it ends, or is not let in yet: so also right after a ``kill``.
    """
    return start(
        federation, f"site-{number}", f"site-{number}", "flower-supernode",
        "--superlink", federation.address,
        "--root-certificates", federation.folder / "keys" / "ca.pem",
        "--auth-supernode-private-key", federation.folder / "keys" / f"site-{number}",
        "--port", federation.site_ports[number],
        "--node-config", pairs(node_config), again=True,
    )  # fmt: skip


def secret(federation: Place) -> str:
    """The file that all sites have and the server has not, as ``fedss secret`` makes it."""
    return str(federation.folder / "keys" / "secret")


def pairs(values: Mapping[str, Value]) -> str:
    """Settings as Flower's commands read them: ``name="text" other=1``."""
    return " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())


def flwr(federation: Place, *args: str | Path | int) -> str:
    """What a ``flwr`` command prints."""
    done = subprocess.run(
        [Path(sysconfig.get_path("scripts")) / "flwr", *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(federation, "user"),
        cwd=federation.folder,
        text=True,
        check=False,
    )
    if done.returncode:
        raise FederationError(f"flwr {' '.join(map(str, args))} failed: {done.stdout.strip()}")
    return done.stdout


def register(federation: Place, number: int) -> None:
    """Let in a site's key, unless the database has it from an earlier time."""
    try:
        flwr(federation, "supernode", "register", federation.folder / "keys" / f"site-{number}.pub")
    except FederationError as error:
        if "already in use" not in str(error):
            raise


def submit(
    federation: Place, app: str | Path, run_config: Mapping[str, Value] | None = None
) -> int:
    """Start a run of an app folder, with other settings than those in it; its id."""
    changed = ["--run-config", pairs(run_config)] if run_config else []
    answer = json.loads(flwr(federation, "run", Path(app).resolve(), *changed, "--format", "json"))
    if not answer["success"]:  # its exit status is 0 all the same
        raise FederationError(f"flwr run {app}: {answer['error-message']}")
    return int(answer["run-id"])


def status(federation: Place, run: int) -> str:
    """``pending``, ``starting``, ``running``, or ``finished:`` with completed, failed, stopped."""
    (state,) = json.loads(flwr(federation, "list", "--run-id", run, "--format", "json"))["runs"]
    return str(state["status"])


def follow(federation: Place, run: int) -> Iterator[str]:
    """The lines of a run's log as they are written, until the run ends or the SuperLink does."""
    reader = subprocess.Popen(
        [Path(sysconfig.get_path("scripts")) / "flwr", "log", str(run), "--stream"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(federation, "user") | {"PYTHONUNBUFFERED": "1"},
        cwd=federation.folder,
        text=True,
    )
    assert reader.stdout is not None
    try:
        for line in reader.stdout:
            plain = re.sub(r"\x1b\[\d+m", "", line).rstrip()
            if text := re.sub(r"^(INFO|WARNING|ERROR) *: *", "", plain):
                yield text
    finally:
        reader.terminate()
        reader.stdout.close()
        reader.wait()


def stop(federation: Place, run: int) -> None:
    """End a run. The SuperLink and the sites wait for the next one."""
    flwr(federation, "stop", run)


def kill(process: Process) -> None:
    """SIGKILL to a process and all that it started, as when its machine loses power."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def children(process: Process, command: str) -> list[int]:
    """Ids of the living processes of a command, such as ``flwr-serverapp``, in a process group."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,pgid=,stat=,args="], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    pids = []
    for line in listed.splitlines():
        pid, group, state, *args = line.split()
        if int(group) == process.pid and state[0] != "Z" and command in " ".join(args):
            pids.append(int(pid))
    return pids


def stop_all(federation: Place, *, patience: float = 10) -> None:
    """SIGTERM to every process, the last started first; SIGKILL to those that do not end."""
    for process in reversed(federation.processes):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    until = time.monotonic() + patience
    for process in reversed(federation.processes):
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(until - time.monotonic(), 0))
        kill(process)
    federation.processes.clear()


def write_images(folder: Path, sites: int, clients: int = 24, classes: int = 160) -> list[Path]:
    """Glyphs as image files, ``site-1/drawer/class/image.png``; the folder of each site."""
    data = fedss.load_dataset("glyphs", glyphs_classes=classes, glyphs_clients=clients).train
    folders = [folder / f"site-{number + 1}" for number in range(sites)]
    for i, pixels_CHW in enumerate(data.pixels):
        client, label = int(data.clients[i]), int(data.labels[i])
        drawer = data.client_names[client].replace("/", "-")
        path = folders[client % sites] / drawer / data.class_names[label].replace("/", "-")
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_CHW[0]).save(path / f"{i}.png")
    return folders


def main(folder: Path, sites: int, rounds: int) -> bool:
    """Train on glyphs at so many sites, and say what happens; whether the run was completed."""
    if (folder / "run" / "summary.json").exists():
        print(f"done before: {folder / 'run' / 'report.html'}; --folder names another place")
        return True
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    images = write_images(folder / "images", sites)
    say(f"{sites} sites, 8 clients each: images in {folder / 'images'}")
    if not (folder / "app").exists():
        words = ["app", str(folder / "app"), "--out", str(folder.resolve() / "run")]
        words += ["--sites", str(sites), "--rounds", str(rounds), "--clients-per-round", "12"]
        words += ["--image-size", "28", "--channels", "1", "--eval-every", "4"]
        subprocess.run(
            [sys.executable, "-m", "fedss", *words], stdout=subprocess.DEVNULL, check=True
        )
    with place(folder, sites) as federation:
        superlink(federation)
        superexec(federation)
        say(f"SuperLink at https://{federation.address}: TLS, node keys, a database")
        for number, data in enumerate(images):
            register(federation, number)
            name = f"site-{number + 1}"
            site(
                federation,
                number,
                {"data": str(data.resolve()), "site": name, "secret-file": secret(federation)},
            )
            say(f"{name} has registered its key, and starts")
        run = submit(federation, folder / "app")
        say(f"submitted as run {run}; what its server part says:")
        for line in follow(federation, run):
            say(f"  {line}")
        ended = status(federation, run)
        say(f"run {run}: {ended}; stopping all processes")
    say("no process is left")
    print(
        f"\nWhere to look, in {folder}:\n"
        "  run/report.html     curves, bytes, seconds per phase\n"
        "  run/records.jsonl   a line per round\n"
        "  app/pyproject.toml  what was submitted, with every setting\n"
        "  logs/               what each process said; what clients said is in site-*.log\n"
        "  images/, keys/    what each site holds\n"
        "docs/deploy.md does the same by hand, on several machines."
    )
    return ended == "finished:completed"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/federation"))
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(not main(options.folder, options.sites, options.rounds))
    except FederationError as error:
        sys.exit(f"federation: {error}")
    except KeyboardInterrupt:
        sys.exit("\nfederation: stopped; the same command goes on from the last checkpoint")
