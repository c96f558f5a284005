"""Names at sites, rows and numbers at the server: who comes when, what grows, what stays secret."""

import csv
import dataclasses
import json
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from fedss.core.class_rows import ClassRows, create_class_rows, grow, read, with_sums, write_
from fedss.core.optimizers import ServerOptimizer, current_rows, step_rows_
from fedss.errors import QuorumError, RunFolderError
from fedss.flower import client_app
from fedss.flower.registry import (
    Growth,
    Registry,
    digest,
    load_registry,
    register,
    row_numbers,
    save_registry,
    token,
)
from fedss.losses.moments import moments_of
from fedss.secret import draw_key, proof
from fedss.training import loop
from tests.flower_grid import ProcessGrid, digests
from tests.reference import whole
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


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


def registered(out: Path) -> Registry:
    return load_registry(out / "registry.json")


# Growing tables.


@examples(max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_a_grown_table_is_one_made_at_full_size(kind, data):
    dtype, optimizer = data.draw(st.sampled_from(["float32", "bfloat16"])), ServerOptimizer(kind)
    sizes = [3, *sorted(data.draw(st.lists(st.integers(4, 9), min_size=1, max_size=3)))]
    grown = create_class_rows(sizes[0], 4, optimizer.slots, 7, dtype)
    full = create_class_rows(sizes[-1], 4, optimizer.slots, 7, dtype)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    for round, size in enumerate(sizes):
        grown = grown if size == grown.num_classes else grow(grown, size)
        ids = np.sort(rng.choice(size, rng.integers(0, size + 1), replace=False))
        update = torch.from_numpy(rng.standard_normal((len(ids), 4), dtype=np.float32))
        for rows in (grown, full):
            step_rows_(optimizer, rows, torch.from_numpy(ids), update, round)
    every, round = torch.arange(sizes[-1]), len(sizes)
    of_grown, of_full = (current_rows(optimizer, rows, every, round) for rows in (grown, full))
    assert torch.equal(of_grown[0], of_full[0])
    assert of_grown[1].keys() == of_full[1].keys()
    assert all(torch.equal(of_grown[1][name], of_full[1][name]) for name in of_full[1])
    assert torch.equal(grown.updated_N, full.updated_N)
    written = [set(torch.cat(rows.changed).tolist()) for rows in (grown, full)]
    assert written[0] == written[1]


def test_a_grown_table_stays_where_it_was(tmp_path):
    rows = create_class_rows(3, 4, ("momentum",), 7, "bfloat16", tmp_path)
    slots = {"momentum": torch.ones(1, 4)}
    write_(rows, torch.tensor([1]), torch.ones(1, 4), slots, 1)
    grown = grow(rows, 70_000)
    assert grown.folder == tmp_path
    assert grown.weight_ND.dtype == torch.bfloat16
    assert torch.equal(read(grown, torch.tensor([1]))[0], torch.ones(1, 4))
    assert not list(tmp_path.iterdir())


@examples(max_examples=30)
@given(
    seed=st.integers(0, 99),
    growth=st.lists(st.integers(0, 3), min_size=3, max_size=6),
    kind=st.sampled_from(["sgd", "momentum", "adam"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_sums_of_a_growing_table_are_those_of_its_rows(seed, growth, kind, dtype):
    optimizer = ServerOptimizer(kind, lr=0.7, momentum=0.8)
    rng, dim = np.random.default_rng(seed), 3
    rows = with_sums(create_class_rows(4, dim, optimizer.slots, seed, dtype))
    for round, more in enumerate(growth):
        n = rows.num_classes
        ids = torch.from_numpy(np.sort(rng.choice(n, rng.integers(0, n + 1), replace=False)))
        update = torch.from_numpy(rng.standard_normal((len(ids), dim), dtype=np.float32))
        step_rows_(optimizer, rows, ids, update, round)
        rows = grow(rows, n + more) if more else rows
        now = whole(rows).double()
        moments = moments_of(rows.sums_EE)
        assert (moments.mean_D - now.mean(0)).abs().max() < 1e-6
        assert (moments.covariance_DD - torch.cov(now.T, correction=0)).abs().max() < 1e-6


# The table of names.

names = st.lists(st.text(st.characters(codec=None), max_size=3), max_size=5)


@pytest.mark.parametrize("round", [0, 3])
def test_who_comes_twice_before_a_round_is_there_in_it(round):
    registry = register(Registry(), ["b"], ["k"], 0)
    for name in ("a", "c"):
        registry = register(registry, [name], [], round)
    assert registry.classes == ("b", "a", "c")
    assert registry.at(round).classes == 3
    assert [growth.round for growth in registry.growth] == sorted({0, round})


@given(batches=st.lists(st.tuples(names, names), max_size=6))
def test_the_registry_only_grows_and_remembers_when(batches, tmp_path_factory):
    registry, path = Registry(), tmp_path_factory.mktemp("registry") / "registry.json"
    seen: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for round, (classes, clients) in enumerate(batches):
        grown = register(registry, classes, clients, round)
        assert grown.classes[: len(registry.classes)] == registry.classes
        assert {*grown.classes} == {*registry.classes, *classes}
        assert {*grown.clients} == {*registry.clients, *clients}
        new = grown.classes[len(registry.classes) :]
        assert new == tuple(sorted(new))
        assert len(set(grown.classes)) == len(grown.classes)
        assert [grown.classes[i] for i in row_numbers(grown.classes, classes)] == classes
        registry = grown
        seen.append((grown.classes, grown.clients))
    if registry.growth:
        first = next(i for i, (classes, clients) in enumerate(seen) if classes or clients)
        for round in range(first, len(seen)):
            classes, clients = seen[round]
            assert registry.at(round) == dataclasses.replace(
                registry.at(round), classes=len(classes), clients=len(clients)
            )
        assert registry.at(0) == dataclasses.replace(registry.at(first), round=0)
        registry = dataclasses.replace(registry, secret="")
        save_registry(path, registry)
        assert load_registry(path) == registry
        assert digest(registry.classes) != digest((*registry.classes, "another"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: [],
        lambda found: {},
        lambda found: {**found, "classes": "abc"},
        lambda found: {**found, "classes": [1, 2]},
        lambda found: {**found, "classes": found["classes"][:-1]},
        lambda found: {**found, "classes": [found["classes"][0]] * len(found["classes"])},
        lambda found: {**found, "secret": None},
        lambda found: {**found, "growth": []},
        lambda found: {**found, "growth": [[0, 1, 2]]},
        lambda found: {**found, "growth": [{"round": 0}]},
        lambda found: {**found, "growth": [{"round": 1, "classes": 2, "clients": 1}]},
    ],
)
def test_a_damaged_registry_is_told(damage, tmp_path):
    path = tmp_path / "registry.json"
    save_registry(path, Registry(("a", "b"), ("x",), "", (Growth(0, 2, 1),)))
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(RunFolderError, match=r"registry\.json is damaged .*which class has which"):
        load_registry(path)


def test_half_a_registry_is_told(photos, tmp_path):
    out = tmp_path / "run"
    federate(ProcessGrid(nodes(photos)), settings(photos, rounds=1), out)
    text = (out / "registry.json").read_text()
    for name in ("summary.json", "report.html"):
        (out / name).unlink()
    (out / "registry.json").write_text(text[: len(text) // 2])
    with pytest.raises(RunFolderError, match=r"registry\.json: damaged JSON"):
        federate(ProcessGrid(nodes(photos)), settings(photos, rounds=1), out)
    (out / "registry.json").unlink()
    with pytest.raises(
        RunFolderError, match=r"registry\.json is missing, but there is a checkpoint"
    ):
        federate(ProcessGrid(nodes(photos)), settings(photos, rounds=1), out)


# Sites that come and go.


def test_it_does_not_matter_who_comes_first(photos, tmp_path):
    """Sites are there one after another, under other numbers: same rows, same bits."""
    config, apart = settings(photos, eval_every=0), []
    for turn in range(3):
        late = dict(zip((50, 20, 90), np.roll(list(nodes(photos).values()), turn), strict=True))
        grid = ProcessGrid({}, seed=turn)
        grid.visit = lambda round, grid=grid, late=late: (
            grid.nodes.update([late.popitem()]) if late else None
        )
        out = tmp_path / str(turn)
        apart.append(digests(lambda grid=grid, out=out: federate(grid, config, out)))
        known = registered(out)
        assert known.classes == tuple(sorted(known.classes))
        assert known.clients == tuple(sorted(known.clients))
        assert known.growth == (Growth(0, 10, 6),)
    assert apart[0] == apart[1] == apart[2]


def test_two_sites_with_one_client_are_told_what_to_do(photos, tmp_path):
    grid = ProcessGrid({1: nodes(photos)[3], 2: nodes(photos)[3]})
    config = settings(photos)
    with pytest.raises(QuorumError) as raised:
        federate(grid, config, tmp_path / "refused", sites=2, deadline=1.0)
    text = str(raised.value)
    assert "another site has 2 of its clients too, such as 'ada'" in text
    assert "name of its own in its node-config (site=...)" in text
    for number, node in grid.nodes.items():
        node["site"] = f"hospital {number}"
    federate(grid, config, tmp_path / "run", sites=2, **{"evaluate-at": "sites"})
    expected = [f"hospital {i}/{name}" for i in (1, 2) for name in ("ada", "ben")]
    assert registered(tmp_path / "run").clients == tuple(expected)


@pytest.mark.parametrize("theirs", [None, "theirs"])
def test_another_secret_is_refused(theirs, photos, tmp_path, capfd):
    write_secret(tmp_path / "ours")
    found = nodes(photos, **{"secret-file": str(tmp_path / "ours")})
    if theirs is None:
        del found[10]["secret-file"]
    else:
        found[10]["secret-file"] = str(write_secret(tmp_path / theirs, theirs))
    with pytest.raises(QuorumError, match=r"another secret-file.*give all sites the same, or none"):
        federate(ProcessGrid(found), settings(photos), tmp_path / "run", deadline=1.0)
    # Of the site itself: an operator there does not see the server's log.
    told = "the server does not let this site take part: "
    (line,) = {line for line in capfd.readouterr().err.splitlines() if told in line}
    assert "another secret-file" in line


def test_a_passphrase_is_no_secret(photos, tmp_path, capfd):
    """The site says why in its own log; the server is not told what stands in the file."""
    (tmp_path / "secret").write_text("correct horse battery staple\n")
    found = nodes(photos, **{"secret-file": str(tmp_path / "secret")})
    with pytest.raises(QuorumError, match=r"raised\): ConfigError"):
        federate(ProcessGrid(found), settings(photos), tmp_path / "run", deadline=1.0)
    assert "others cannot read" in capfd.readouterr().err
    (tmp_path / "secret").chmod(0o600)
    with pytest.raises(QuorumError, match=r"raised\): ConfigError"):
        federate(ProcessGrid(found), settings(photos), tmp_path / "run", deadline=1.0)
    said = capfd.readouterr().err
    assert "expected at least 64 hexadecimal digits at random" in said
    assert "horse" not in said


def test_which_secret_keys_the_draws_of_a_site(photos, tmp_path):
    """Its own before the shared one; never a file that the server names, as ``settings`` does."""
    files = {name: write_secret(tmp_path / name, name) for name in ("own", "shared")}
    keys = {name: draw_key(file.read_bytes().strip()) for name, file in files.items()}
    own, shared = {"own-secret-file": str(files["own"])}, {"secret-file": str(files["shared"])}
    config, data = settings(photos), {"data": str(photos / "north.csv")}
    assert client_app._open(config, data | own).key == keys["own"]
    assert client_app._open(config, data | shared).key == keys["shared"]
    site = client_app._open(config, data | own | shared)
    assert site.key == keys["own"]
    assert site.names["secret"] == proof(files["shared"].read_bytes().strip())
    assert keys["own"].hex() not in repr(site)
    assert str(keys["own"]) not in repr(site)
    simulated = {"partition-id": 0, "num-partitions": 2}
    assert client_app._open(config, simulated).key is None


def test_a_site_without_a_secret_does_not_take_part(photos, tmp_path, capfd):
    found = nodes(photos)
    del found[10]["own-secret-file"]
    with pytest.raises(QuorumError, match=r"raised\): ConfigError"):
        federate(ProcessGrid(found), settings(photos), tmp_path / "run", deadline=1.0)
    assert "make one with: fedss secret FILE" in capfd.readouterr().err


# Secret names.


def rename(photos: Path, site: str, to: Path, named: Callable[[str, str], str]) -> None:
    """A site's manifest with other names of classes and clients."""
    with (photos / f"{site}.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    with to.open("w", newline="") as file:
        csv.writer(file).writerows(
            [header]
            + [
                [str(photos / image), named("class", label), named("client", client), split]
                for image, label, client, split in rows
            ]
        )


def test_no_name_reaches_the_server_and_names_do_not_matter(photos, tmp_path):
    """A run on tokens is that of sites whose names are these tokens."""
    secret = write_secret(tmp_path / "secret").read_bytes().strip()
    # One batch for each client: the order of its images is that of their names.
    config = settings(photos, data_path=None, data="glyphs", eval_every=0, batch_size=64)
    crossed: list[bytes] = []

    def keep(node: int, message: Message, reply: Message) -> Sequence[Message]:
        for each in (message, reply):
            crossed.extend(thing.deflate() for thing in get_all_nested_objects(each).values())
        return [reply]

    # Draws are keyed by the same as those of the sites with plain names below.
    hidden = ProcessGrid(nodes(photos, **{"secret-file": str(tmp_path / "secret")}), keep)
    out = tmp_path / "hidden"
    at_sites = {"evaluate-at": "sites"}
    of_hidden = federate(hidden, config, out, **at_sites)
    everything = b"\n".join(crossed)
    everything += b"\n".join(p.read_bytes() for p in out.rglob("*") if p.is_file())
    assert token(secret, "class", "class 3").encode() in everything
    told = [name for names in CLIENTS.values() for name in names]
    for name in [f"class {i}" for i in range(14)]:
        assert name.encode() not in everything
    # Short names are found by chance in so many bytes of weights, if not between quotes.
    for name in told:
        assert f'"{name}"'.encode() not in everything
        assert f'\\"{name}\\"'.encode() not in everything
    assert str(photos).encode() not in everything
    assert secret not in everything

    plain = {}
    for number, site in zip(nodes(photos), SITES, strict=True):
        manifest = photos / f"{site}-tokens.csv"
        rename(photos, site, manifest, lambda kind, name: token(secret, kind, name))
        plain[number] = site_of(photos, manifest)
    of_plain = federate(ProcessGrid(plain), config, tmp_path / "plain", **at_sites)
    pairs = zip(of_plain.embedder.parameters(), of_hidden.embedder.parameters(), strict=True)
    assert all((a - b).abs().max() < 1e-5 for a, b in pairs)
    assert of_plain.summary["map_at_10"] == pytest.approx(of_hidden.summary["map_at_10"])
    assert registered(tmp_path / "plain").classes == registered(out).classes


def test_letters_with_accents_meet_in_one_row(photos, tmp_path):
    """One site's file system keeps them composed, the other's takes them apart."""
    found = nodes(photos)
    for number, form in ((3, "NFC"), (10, "NFD"), (17, "NFC")):
        site = {3: "north", 10: "south", 17: "west"}[number]
        manifest = photos / f"{site}-accents.csv"
        rename(
            photos,
            site,
            manifest,
            lambda kind, name, form=form: unicodedata.normalize(form, f"é{name}"),
        )
        found[number] = site_of(photos, manifest)
    config, at_sites = settings(photos), {"evaluate-at": "sites"}
    federate(ProcessGrid(found), config, tmp_path / "accents", **at_sites)
    federate(ProcessGrid(nodes(photos)), config, tmp_path / "plain", **at_sites)
    accents, plain = (registered(tmp_path / name) for name in ("accents", "plain"))
    assert accents.classes == tuple(f"é{name}" for name in plain.classes)
    assert accents.clients == tuple(f"é{name}" for name in plain.clients)


def test_tokens_of_names_that_are_no_unicode():
    """As os.fsdecode gives for a folder's name in some older encoding."""
    assert token(b"x" * 16, "class", "caf\udce9") != token(b"x" * 16, "class", "caf\udce8")
    assert token(b"x" * 16, "class", "a") != token(b"x" * 16, "client", "a")


# Growth in the middle of a run.


def add_images(photos: Path) -> Path:
    """Manifest of the site south with two new classes, and a new client, beside what it had."""
    lines = (photos / "south.csv").read_text().splitlines()
    rng = np.random.default_rng(5)
    for name, label, client in (
        ("new/0.png", "aa class of dee", "dee"),
        ("new/1.png", "zz class", "dee"),
        ("new/2.png", "zz class", "abe"),
        ("new/3.png", "class 3", "abe"),
        ("new/4.png", "class 4", "abe"),
    ):
        (photos / "new").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8)).astype(np.uint8)).save(photos / name)
        lines.append(f"{name},{label},{client},train")
    manifest = photos / "south-grown.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


GROWING: dict[str, dict[str, Any]] = {
    "momentum": {},
    "moments": {"method": "moments"},
    "deck": {"sampler": "deck"},
    "adam in a file": {"server_optimizer": "adam", "row_store": "file"},
    "full in bfloat16": {"method": "full", "row_dtype": "bfloat16"},
    "moments in a file": {"method": "moments", "row_store": "file"},
}


class StopError(Exception):
    """The process ends here."""


@pytest.mark.parametrize("variant", GROWING)
def test_classes_and_clients_that_come_in_the_middle(variant, photos, tmp_path):
    """W grows and training goes on; and it is the same where the run was interrupted after it."""
    config = settings(photos, rounds=6, clients_per_round=7, eval_every=0, **GROWING[variant])

    def run(out: Path, stops: Sequence[int]) -> list[str]:
        """Digests of a run that ends before some rounds, and is started again."""
        left, grid = list(stops), ProcessGrid(nodes(photos))

        def visit(round: int) -> None:
            if round >= 2:
                grid.nodes[10] = site_of(photos, grown)
            if left and round == left[0]:
                left.pop(0)
                raise StopError

        def once() -> None:
            with suppress(StopError):
                federate(grid, config, out, quorum=0.2)

        grid.visit = visit
        found = [digest for _ in (*stops, None) for digest in digests(once)]
        assert not left
        return found

    grown = add_images(photos)
    whole_run = run(tmp_path / "whole", [])
    assert len(set(whole_run)) == 6
    known = registered(tmp_path / "whole")
    assert known.classes[10:] == ("aa class of dee", "zz class")
    assert known.clients[6:] == ("abe",)
    assert known.growth == (Growth(0, 10, 6), Growth(3, 12, 7))
    lines = (tmp_path / "whole" / "records.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [(f["client"], f["reason"]) for f in found[2]["failures"]] == [
        (name, "registered") for name in CLIENTS["south"]
    ]
    assert [record["clients"] for record in found] == [6, 6, 3, 7, 7, 7]
    assert run(tmp_path / "stopped", [4, 5]) == whole_run


def test_growth_that_is_seen_when_the_model_is_judged(photos, tmp_path):
    """A client with a class that has no row yet trains on the others for a round."""
    grid, grown = ProcessGrid(nodes(photos)), add_images(photos)
    grid.visit = lambda round: (
        grid.nodes.update({10: site_of(photos, grown)})
        if round >= 2 and grid.sent[-1][0] == "train"
        else None
    )
    config = settings(photos, rounds=5, clients_per_round=7, eval_every=2)
    federate(grid, config, tmp_path / "run", **{"evaluate-at": "sites"})
    assert registered(tmp_path / "run").growth == (Growth(0, 10, 6), Growth(3, 12, 7))
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert not any("failures" in record for record in found)
    assert [record["clients"] for record in found] == [6, 6, 6, 7, 7]


def test_a_site_that_joins_later_takes_part_from_the_next_round_on(photos, tmp_path):
    late = nodes(photos)
    grid = ProcessGrid({10: late[10], 17: late[17]})
    grid.visit = lambda round: grid.nodes.update({3: late[3]}) if round >= 1 else None
    config = settings(photos, clients_per_round=6, eval_every=0, rounds=3)
    federate(grid, config, tmp_path / "run", sites=2)
    known = registered(tmp_path / "run")
    assert known.clients == ("cem", "dee", "eva", "fay", "ada", "ben")
    assert known.growth[1].round == 2
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["clients"] for line in lines] == [4, 4, 6]


def test_a_grown_table_trains_its_new_rows(photos, tmp_path):
    seen: list[ClassRows] = []
    run_round = loop.run_round  # type: ignore[attr-defined]

    def watch(*arguments: Any) -> Any:
        result = run_round(*arguments)
        seen.append(result[0].class_rows)
        return result

    grid = ProcessGrid(nodes(photos))
    manifest = add_images(photos)
    grid.visit = lambda round: grid.nodes.update({10: site_of(photos, manifest)}) if round else None
    config = settings(photos, rounds=4, clients_per_round=7, eval_every=0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "run_round", watch)
        federate(grid, config, tmp_path / "run", quorum=0.2)
    assert [rows.num_classes for rows in seen] == [10, 10, 12, 12]
    assert bool((seen[-1].updated_N[10:] > 0).all())


@pytest.mark.parametrize("method", ["fedss", "full", "pos-only", "moments", "fedaws"])
def test_one_class_in_all(method, photos, tmp_path):
    """There is nothing to tell apart, but nothing to fall over either."""
    rows = ["image,label,client,split"]
    for client in ("ada", "ben"):
        image = f"north/{client}.png"
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save(photos / image)
        rows.append(f"{image},only,{client},train")
    (photos / "one.csv").write_text("\n".join(rows) + "\n")
    config = settings(photos, method=method, sample_size=None, eval_every=0, rounds=2)
    grid = ProcessGrid({3: site_of(photos, "one.csv")})
    assert len(digests(lambda: federate(grid, config, tmp_path / "run", sites=1))) == 2
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    assert all("failures" not in json.loads(line) for line in lines)
