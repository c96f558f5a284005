"""Sites that send too much, register too much, or leave."""

from collections import Counter
from pathlib import Path

import pytest
from flwr.app import Message

from fedss.errors import QuorumError
from fedss.flower.messages import REGISTER
from fedss.report.rounds import REASONS
from tests.flower.test_faults import (
    HOME,
    NODES,
    change_part,
    cohort,
    counted,
    put,
    records,
    run,
    twin,
)
from tests.flower_grid import ProcessGrid, digests
from tests.sites import CLIENTS, federate, flood, nodes, settings, site_of, write_photos

SOUTH = NODES["south"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


@pytest.mark.parametrize("name", ["backbone.values", "class_rows.values"])
def test_one_huge_number_is_not_added_up(name, photos, tmp_path):
    """A finite one. The rest trains as a local run does without that client."""
    bad, grid = cohort(1)[1], ProcessGrid(nodes(photos))

    def spoil(node: int, message: Message, reply: Message) -> list[Message]:
        where = (node, message.metadata.message_type, message.metadata.group_id)
        if where == (HOME[bad], "train", "1"):
            reply = change_part(bad, message, reply, put(name, 1e38))
        return [reply]

    grid.spoil = spoil
    found = run(photos, tmp_path / "run", grid)
    assert found == twin(settings(photos, eval_every=0), tmp_path / "local", {1: [bad]})
    told = [counted(record) for record in records(tmp_path / "run")]
    assert told == [Counter(), Counter({(bad, "norm"): 1}), Counter()]
    assert REASONS["norm"] == "a change far larger than those of others"


# Registration.


def silent(node: int, message: Message, reply: Message) -> list[Message]:
    return [] if node == 99 and message.metadata.message_type != REGISTER else [reply]


def flooded(photos: Path, out: Path, **deployment: object) -> list[str]:
    grid = ProcessGrid({**nodes(photos), 99: flood(photos, 60)}, silent)
    config = settings(photos, eval_every=0)
    told = {"deadline": 1.0, "aside": 0, "attempts": 1, **deployment}
    return digests(lambda: federate(grid, config, out, **told))


def test_a_site_that_registers_too_many_clients_takes_no_part(photos, tmp_path, caplog):
    with pytest.raises(QuorumError):
        flooded(photos, tmp_path / "open")
    found = flooded(photos, tmp_path / "run", **{"site-clients": 20})
    assert found == twin(settings(photos, eval_every=0), tmp_path / "local", {})
    assert "site 99 could not register (too many): it has registered 60 clients" in caplog.text
    assert "set site-clients at the server" in caplog.text


def test_a_site_that_registers_too_many_classes_takes_no_part(photos, tmp_path, caplog):
    flooded(photos, tmp_path / "run", **{"site-classes": 20})
    assert "it has registered 60 classes, expected at most 20" in caplog.text
    assert records(tmp_path / "run")[-1]["num_classes"] == 10


def test_names_that_a_site_had_before_count(photos, tmp_path, caplog):
    """Or it would register others in every round."""
    renamed = tmp_path / "renamed.csv"
    rows = (photos / "south.csv").read_text().splitlines()
    renamed.write_text(
        "\n".join([rows[0], *(f"{photos}/{r}".replace(",cem,", ",kim,") for r in rows[1:])])
    )
    grid = ProcessGrid(nodes(photos))
    grid.visit = lambda round: (
        grid.nodes.update({SOUTH: site_of(photos, renamed)}) if round >= 1 else None
    )
    config = settings(photos, eval_every=0)
    federate(grid, config, tmp_path / "run", quorum=0.0, **{"site-clients": len(CLIENTS["south"])})
    assert f"it has registered {len(CLIENTS['south']) + 1} clients" in caplog.text


# Absence.

ROUNDS = 9


def away(photos: Path, out: Path, *, absence: int) -> list[list[str]]:
    """South is offline in rounds 2 to 6 (of 1 to 9); failures of each round."""
    grid = ProcessGrid(nodes(photos))

    def visit(trained: int) -> None:
        grid.nodes = nodes(photos)
        if 1 <= trained < 6:
            del grid.nodes[SOUTH]

    grid.visit = visit
    config = settings(photos, eval_every=0, rounds=ROUNDS)
    federate(grid, config, out, absence=absence, quorum=0.0)
    return [[name for name, _ in counted(record)] for record in records(out)]


def test_clients_that_are_away_are_not_drawn_until_they_return(photos, tmp_path):
    still = away(photos, tmp_path / "still", absence=0)
    assert all(still[1:6])
    struck = away(photos, tmp_path / "struck", absence=2)
    assert struck[:3] == still[:3]
    assert not any(struck[3:])
    found = records(tmp_path / "struck")
    assert [record["num_clients"] for record in found] == [6, 6, 6, 3, 3, 3, 3, 6, 6]
    # All that are there are drawn meanwhile, and all are when it is back.
    assert [record["clients"] for record in found][3:7] == [3, 3, 3, 3]
    assert [record["clients"] for record in found][7:] == [4, 4]
