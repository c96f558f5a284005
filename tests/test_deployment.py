"""A federation of processes on loopback: TLS, node keys, three sites, and nothing left of it."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from examples.federation import (
    follow,
    place,
    register,
    site,
    status,
    submit,
    superexec,
    superlink,
)

ECHO = {
    "pyproject.toml": """
        [project]
        name = "echo"
        version = "1.0.0"
        description = "Asks every site for its name"
        license = "Apache-2.0"
        dependencies = []

        [tool.flwr.app]
        publisher = "fedss"

        [tool.flwr.app.components]
        serverapp = "echo.server:app"
        clientapp = "echo.client:app"

        [tool.flwr.app.config]
        sites = 1
        """,
    "echo/__init__.py": "",
    "echo/server.py": """
        import time

        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.serverapp import ServerApp

        app = ServerApp()


        @app.main()
        def main(grid, context):
            sites = context.run_config["sites"]
            while len(nodes := list(grid.get_node_ids())) < sites:
                time.sleep(0.2)
            content = RecordDict({"ask": ConfigRecord({"add": "!"})})
            asked = [Message(content, node, "query.name") for node in nodes]
            replies = grid.send_and_receive(asked, timeout=60)
            print("heard", *sorted(reply.content["told"]["name"] for reply in replies), flush=True)
        """,
    "echo/client.py": """
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.clientapp import ClientApp

        app = ClientApp()


        @app.query("name")
        def name(message, context):
            told = context.node_config["site"] + message.content["ask"]["add"]
            return Message(RecordDict({"told": ConfigRecord({"name": told})}), reply_to=message)
        """,
}


@pytest.fixture
def app(tmp_path) -> Path:
    folder = tmp_path / "app"
    for name, text in ECHO.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    return folder


def living(groups: list[int]) -> list[str]:
    """What still runs in these process groups; what is dead and not yet buried is not counted."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pgid=,stat=,args="], stdout=subprocess.PIPE, text=True, check=True
    )
    lines = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return [line[2] for line in lines if int(line[0]) in groups and line[1][0] != "Z"]


def wait_for(condition, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_three_sites_with_tls_and_node_keys(tmp_path, app):
    with place(tmp_path / "federation", sites=4) as here:
        superlink(here)
        superexec(here)
        stranger = 3  # a key that nobody registered
        for number in range(4):
            if number != stranger:
                register(here, number)
            site(here, number, {"site": f"shop {number}", "data": "/data/my photos"})
        run = submit(here, app, {"sites": 3})
        lines = list(follow(here, run))
        assert "heard shop 0! shop 1! shop 2!" in lines, lines
        assert status(here, run) == "finished:completed"
        log = (here.folder / "logs" / f"site-{stranger}.log").read_text()
        assert "Failed to activate SuperNode" in log
        assert "SuperNode ID" not in log
        groups = [process.pid for process in here.processes]
        assert living(groups)
    assert not living(groups)
    assert os.stat(here.folder / "keys" / "site-1").st_mode & 0o077 == 0


LEFT_ALONE = """
import sys, time
from examples.federation import place, superexec, superlink
with place(sys.argv[1], sites=0) as here:
    superlink(here)
    superexec(here)
    print(*[process.pid for process in here.processes], flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_a_program_that_is_killed(tmp_path):
    program = subprocess.Popen(
        [sys.executable, "-c", LEFT_ALONE, tmp_path], stdout=subprocess.PIPE, text=True
    )
    with program:
        groups = [int(word) for word in program.stdout.readline().split()]
        assert len(living(groups)) == 2
        program.send_signal(signal.SIGKILL)
    wait_for(lambda: not living(groups), 10)
