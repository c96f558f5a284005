"""What others send is shown as text at sites and server: it moves no cursor, forges no line."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from fedss.distributed import Ranks
from fedss.errors import RankError
from fedss.flower import client_app as site_module
from fedss.flower.client_app import app as site_app
from fedss.flower.messages import log_line, pack, unpack
from fedss.text import printable
from tests.flower_grid import ProcessGrid, through_the_wire
from tests.sites import federate, nodes, settings, write_photos

HOSTILE = "\x1b]0;title\x07\x1b[2J\r\nfedss: round 9/9  loss 0.000\u202e\u2028\x9b31m\ud800 ü 猫"


def shown_as_text(said: str, begins: tuple[str, ...] = ("fedss: ", "  | ")) -> bool:
    """Lines that are all ours, without what a terminal obeys."""
    return all(line.startswith(begins) and line.isprintable() for line in said.split("\n")[:-1])


def test_what_is_printable_stays_and_nothing_else():
    text = printable(HOSTILE)
    assert text.isprintable()
    assert text.endswith("\\u202e\\u2028\\x9b31m\\ud800 ü 猫")
    assert text.startswith(r"\x1b]0;title\x07\x1b[2J\r\nfedss: round 9/9")
    assert printable(text) == text


def answered(metadata: dict[str, Any], kind: str = "query.register") -> dict[str, Any]:
    ProcessGrid({})
    message = through_the_wire(Message(pack(metadata), 3, kind))
    reply = site_app(message, Context(1, 3, {"data": "/nowhere"}, RecordDict(), {}))
    return unpack(through_the_wire(reply))[0]


@pytest.mark.parametrize("kind", ["query.register", "query.classes", "train", "evaluate"])
@pytest.mark.parametrize(
    "metadata",
    [
        {"refused": HOSTILE},
        {"version": HOSTILE},
        {"config": {HOSTILE: 1}},
        {"config": {"method": HOSTILE}},
        {"config": {"data": HOSTILE, "data_path": HOSTILE}},
        {"config": HOSTILE},
        {"round": HOSTILE},
        {HOSTILE: HOSTILE},
    ],
    ids=str,
)
def test_a_servers_text_at_a_site(metadata, kind, capfd):
    answered({"version": version("fedss"), "round": 0, "config": {}, **metadata}, kind)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err
    assert shown_as_text(said.err), said.err


def test_an_error_at_a_site_is_shown_there_and_marked(capfd, monkeypatch):
    def fail(*arguments: Any) -> None:
        raise ValueError(HOSTILE)

    monkeypatch.setattr(site_module, "config_from_dict", fail)
    told = answered({"version": version("fedss"), "round": 0, "config": {}})
    assert told == {"error": "raised", "detail": "ValueError"}
    said = capfd.readouterr().err
    assert shown_as_text(said), said
    assert "ValueError: " + printable("\x1b]0;title") in said
    assert "client_app.py" in said


@pytest.mark.report
def test_a_sites_text_at_the_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Names of its clients, and its errors: in the log and in what is written down."""
    folder = tmp_path / "photos"
    folder.mkdir()
    write_photos(folder)
    hostile = HOSTILE.replace("\ud800", "")

    def spoil(node: int, message: Message, reply: Message) -> list[Message]:
        kind, round = message.metadata.message_type, message.metadata.group_id
        if node == 10 and kind == "query.register":
            metadata, _ = unpack(reply)
            count = len(metadata["clients"])
            metadata["clients"] = [f"{number}{hostile}" for number in range(count)]
            return [Message(pack(metadata), reply_to=message)]
        if node == 10 and kind in ("train", "query.classes"):
            told = {"round": int(round), "error": "version", "detail": hostile}
            return [Message(pack(told), reply_to=message)]
        if node == 10 and kind == "evaluate":
            return [Message(pack({"round": int(round), "metrics": hostile}), reply_to=message)]
        return [reply]

    grid, config = ProcessGrid(nodes(folder), spoil), settings(folder, clients_per_round=6)
    run = federate(grid, config, tmp_path / "run", **{"quorum": 0.0, "evaluate-at": "sites"})
    said = capfd.readouterr()
    assert said.out == ""
    assert shown_as_text(said.err), said.err
    assert printable(hostile) in said.err
    lines = (run.folder / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["clients"] for line in lines] == [3] * 3
    assert all(line.isprintable() for line in lines)
    page = (run.folder / "report.html").read_text()
    assert "\x1b" not in page
    assert "\x9b" not in page


def test_a_line_is_one_line(capsys):
    log_line("one\ntwo")
    assert capsys.readouterr().err == "fedss: one\\ntwo\n"


def test_what_another_rank_says_is_one_line(monkeypatch):
    def told(found: list[Any], value: Any) -> None:
        found[:] = [(None, None), (None, HOSTILE)]

    monkeypatch.setattr("torch.distributed.all_gather_object", told)
    with pytest.raises(RankError) as raised:
        Ranks(0, 2, 0, 2).gather(None)
    assert str(raised.value) == f"rank 1: {printable(HOSTILE)}"
