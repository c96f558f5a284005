"""What goes wrong at sites and is mended: the run goes on, and nothing of the mistake stays."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedss.errors import DivergedError, QuorumError
from fedss.flower.messages import unpack
from fedss.flower.registry import load_registry
from tests.flower_grid import ProcessGrid
from tests.sites import (
    CLIENTS,
    SITES,
    federate,
    nodes,
    settings,
    site_of,
    write_photos,
    write_secret,
)

AT_SITES = {"evaluate-at": "sites", "attempts": 3}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    write_photos(folder)
    return folder


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def all_grown(photos: Path) -> dict[int, dict[str, Any]]:
    """Every client has an image of a class that was not there before."""
    rng, configs = np.random.default_rng(1), {}
    (photos / "new").mkdir()
    for node, site in zip(nodes(photos), SITES, strict=True):
        lines = (photos / f"{site}.csv").read_text().splitlines()
        for client in CLIENTS[site]:
            image = rng.integers(0, 256, (8, 8)).astype(np.uint8)
            Image.fromarray(image).save(photos / "new" / f"{client}.png")
            lines.append(f"new/{client}.png,new {client},{client},train")
        (photos / f"{site} grown.csv").write_text("\n".join(lines) + "\n")
        configs[node] = site_of(photos, f"{site} grown.csv")
    return configs


class StopError(Exception):
    pass


@pytest.mark.parametrize("method", ["full", "fedss", "moments"])
@pytest.mark.parametrize("restarted", [False, True])
def test_new_classes_at_every_client(method, restarted, photos, tmp_path):
    # Absent rows of so few classes would run away at the default rate.
    config = settings(photos, method=method, rounds=5, eval_every=0, class_row_lr=0.1)
    grid, out, later = ProcessGrid(nodes(photos)), tmp_path / "run", all_grown(photos)

    def visit(round: int) -> None:
        if round >= 2:
            if restarted:
                raise StopError
            grid.nodes.update(later)

    grid.visit = visit
    if restarted:
        with pytest.raises(StopError):
            federate(grid, config, out, **AT_SITES)
        grid = ProcessGrid(later)
    federate(grid, config, out, **AT_SITES)
    rounds = records(out)
    assert [record["clients"] for record in rounds] == [4] * 5
    # Seen in a round, registered for the next; that round is begun again with the classes it had.
    assert {f["reason"] for r in rounds for f in r.get("failures", [])} <= {"registered"}
    assert load_registry(out / "registry.json").growth[-1].classes == 10 + 6


def test_another_secret_at_the_site_that_comes_first(photos, tmp_path):
    for name in ("ours", "other"):
        write_secret(tmp_path / name, name)
    ours = nodes(photos, **{"secret-file": str(tmp_path / "ours")})
    first = min(ours)
    wrong = ours | {first: ours[first] | {"secret-file": str(tmp_path / "other")}}
    config = settings(photos, rounds=2, eval_every=0)
    with pytest.raises(QuorumError, match="another secret-file"):
        federate(ProcessGrid(wrong), config, tmp_path / "run", deadline=2.0)
    federate(ProcessGrid(ours), config, tmp_path / "run", deadline=2.0)
    assert [record["clients"] for record in records(tmp_path / "run")] == [4, 4]


def test_clients_that_two_sites_had(photos, tmp_path):
    apart, config = nodes(photos), settings(photos, rounds=2, eval_every=0)
    _, second, third = apart
    with pytest.raises(QuorumError, match="give each site a name of its own"):
        federate(
            ProcessGrid(apart | {third: apart[second]}), config, tmp_path / "run", deadline=2.0
        )
    named = {node: of_node | {"site": f"shop {node}"} for node, of_node in apart.items()}
    federate(ProcessGrid(named), config, tmp_path / "run", deadline=2.0)
    clients = load_registry(tmp_path / "run" / "registry.json").clients
    assert len(clients) == 6
    assert all(name.startswith("shop ") for name in clients)
    assert not any("failures" in record for record in records(tmp_path / "run"))


def test_a_client_whose_classes_changed_after_it_had_asked(photos, tmp_path):
    """Its site's names are what they were, so only the client's request is not what it was."""
    head, *lines = (photos / "south.csv").read_text().splitlines()
    more = []
    for number, line in enumerate(lines):
        name, label, client, split = line.split(",")
        for other in set(CLIENTS["south"]) - {client} if split == "train" else ():
            copied = f"copies/{number} {other}.png"
            (photos / "copies").mkdir(exist_ok=True)
            (photos / copied).write_bytes((photos / name).read_bytes())
            more.append(f"{copied},{label},{other},train")
    (photos / "moved.csv").write_text("\n".join([head, *lines, *more]) + "\n")
    told = []

    def listen(node: int, message: Any, reply: Any) -> list[Any]:
        told.extend(unpack(reply)[0].get("failed", {}).values())
        return [reply]

    grid = ProcessGrid({10: site_of(photos, "south.csv")}, listen)
    grid.visit = lambda round: (
        grid.nodes.update({10: site_of(photos, "moved.csv")}) if round >= 2 else None
    )
    config = settings(photos, rounds=4, eval_every=0, clients_per_round=1)
    federate(grid, config, tmp_path / "run", sites=1, **AT_SITES)
    rounds = records(tmp_path / "run")
    assert [record.get("attempts", 1) for record in rounds] == [1, 1, 2, 1]
    assert [failure["reason"] for failure in rounds[2]["failures"]] == ["raised"]
    # Of an error no more than its kind leaves the site.
    assert told == ["ValueError"]


def test_weights_that_no_client_can_use(photos, tmp_path):
    """The state from which no client comes to finite numbers is not kept as a checkpoint."""
    config = settings(photos, rounds=4, eval_every=0, class_row_lr=1e25, client_lr=1e25)
    with pytest.raises(DivergedError, match="no client comes to finite numbers"):
        federate(ProcessGrid(nodes(photos)), config, tmp_path / "run")
