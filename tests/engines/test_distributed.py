"""Ranks as real processes on gloo: the laws of one process, and how a run ends when a rank does."""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedss
from fedss import ConfigError, RunFolderError
from fedss.cli import main
from fedss.config import config_from_dict
from fedss.core.class_rows import create_class_rows
from fedss.distributed import ALONE, Ranks, join, share_out, this_rank
from fedss.runs.checkpoint import load_checkpoint
from fedss.runs.folder import check_same_round
from fedss.training.build import server_optimizer
from tests.ranks import commands, die, fail_in_every_way, launch, live_on, tiny, train
from tests.reference import whole
from tests.reports import empty_reports
from tests.training.test_experiment import SMALL, lines

FOUR = dataclasses.replace(SMALL, rounds=4, eval_every=3)
CASES = {
    name: dataclasses.replace(FOUR, **settings)
    for name, settings in {
        "full": {"method": "full"},
        "fedss": {},
        "deck": {"sampler": "deck", "local_steps": 2},
        "int8": {"rows_up": "int8", "server_optimizer": "adam"},
        "rows in a file": {"row_store": "file"},
        "moments": {"method": "moments", "class_row_lr": 0.1},
        "holders": {"row_mean": "holders"},
        "fewer clients than ranks": {"clients_per_round": 1},
        "moments, fewer clients than ranks": {
            "method": "moments",
            "class_row_lr": 0.1,
            "clients_per_round": 1,
        },
        "fedaws": {"method": "fedaws", "workers": 2},
        "local heads": {"method": "local-heads"},
        "all": {"requests": "all", "server_optimizer": "adam"},
        "common": {"requests": "common", "sample_size": 3, "local_steps": 2},
        "adaptive norm": {"clip": "adaptive:0.5"},
        "private": {"method": "full", "clip": "adaptive:0.5", "noise": 0.5},
    }.items()
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the newest checkpoint holds."""
    stored = json.loads((folder / "config.json").read_text())
    config, n = (
        config_from_dict(stored["config"] | stored["resolved"]),
        stored["data"]["train_classes"],
    )
    slots = server_optimizer(config).of_rows.slots
    rows = create_class_rows(n, config.embedding_size, slots, config.seed)
    state = load_checkpoint(folder / "checkpoint", rows)
    assert state is not None
    found = {"backbone": state.backbone_P, "rows": whole(state.class_rows), **rows.slots}
    found |= {f"backbone {name}": slot for name, slot in state.backbone_slots.items()}
    if state.class_rows.sums_EE is not None:
        found["row sums"] = state.class_rows.sums_EE
    return found


def assert_near(one: Path, other: Path) -> None:
    """The same run, to 1e-6: weights, and every line of the records."""
    for name, tensor in weights(one).items():
        assert (tensor - weights(other)[name]).abs().max() <= 1e-6, name
    for line, same in zip(lines(one), lines(other), strict=True):
        metrics, others = (record.pop("metrics") for record in (line, same))
        assert line == pytest.approx(same, abs=1e-6)
        assert metrics == (others and pytest.approx(others, abs=1e-6))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    with empty_reports():
        for name, config in CASES.items():
            fedss.train(config, folder / name, **tiny())
    return folder


def test_a_run_lives_on_at_all_ranks(tmp_path):
    ended = launch(2, live_on, FOUR, tmp_path / "two")
    assert [rank.code for rank in ended] == [0, 0], [rank.output for rank in ended]
    found = live_on(FOUR, tmp_path / "one")
    assert ended[0].found == ended[1].found
    assert [s["rounds"] for s in found] == [s["rounds"] for s in ended[0].found] == [2, 4, 6, 4]
    for name in ("stopped", "grown", "other"):
        assert_near(tmp_path / "two" / name, tmp_path / "one" / name)


@pytest.mark.parametrize("size", [2, 3])
def test_several_ranks_train_what_one_does(size, alone, tmp_path):
    ended = launch(size, train, CASES, tmp_path)
    assert [rank.code for rank in ended] == [0] * size, [rank.output for rank in ended]
    for name, config in CASES.items():
        assert_near(tmp_path / name, alone / name)
        found = [rank.found[name] for rank in ended]
        assert all(other["summary"] == found[0]["summary"] for other in found)
        records = lines(alone / name)
        assert len(records) == config.rounds
        for record, *told in zip(records, *(other["rounds"] for other in found), strict=True):
            digests, examples, changed = zip(*told, strict=True)
            # Every rank holds the same bits, and forgets what a checkpoint has written.
            assert len(set(digests)) == 1
            assert len(set(changed)) == 1
            if config.noise:
                continue  # Each round is kept, and its record does not tell who took part.
            if not fedss.METHODS[config.method].local_rows:
                assert (changed[0] == 0) == (record["round"] % config.checkpoint_every == 1)
            totals = [sum(share) for share in examples]
            assert sum(map(len, examples)) == record["clients"]
            assert sum(totals) == record["examples"]
            if config.local_steps is None:
                clients = list(itertools.chain(*examples))
                shares = share_out(clients, size)
                assert sorted(totals) == sorted(sum(clients[i] for i in s) for s in shares)


@given(st.lists(st.integers(0, 40), max_size=7), st.integers(1, 4))
def test_shares_are_near_the_best_there_are(weights, size):
    shares = share_out(weights, size)
    assert len(shares) == size
    assert sorted(itertools.chain(*shares)) == list(range(len(weights)))
    assert all(share == sorted(share) for share in shares)
    best = min(
        max(
            sum(w for w, rank in zip(weights, dealt, strict=True) if rank == r) for r in range(size)
        )
        for dealt in itertools.product(range(size), repeat=len(weights))
    )
    largest = max(sum(weights[i] for i in share) for share in shares)
    assert best <= largest <= (4 / 3 - 1 / (3 * size)) * best


def test_an_error_of_one_rank_ends_all_with_the_same_message(alone, tmp_path):
    ended = launch(2, fail_in_every_way, FOUR, tmp_path)
    assert [rank.code for rank in ended] == [0, 0], [rank.output for rank in ended]
    for at, owner, raised, message in (
        (0, 0, "StopError", "enough"),
        (1, 1, "RunFolderError", "fingerprint: "),
        (2, 1, "RunFolderError", "client_lr: "),
        (3, 1, "RunFolderError", "not the folder that rank 0 has made"),
        (4, 1, "DivergedError", "round 2, client"),
        (5, 1, "IndexError", "out of range"),
    ):
        (name, here), there = ended[owner].found[at], ended[1 - owner].found[at]
        assert name == raised
        assert message in here
        kind = "" if name.endswith(("FolderError", "DivergedError")) else f"{name}: "
        assert there == ["RankError", f"rank {owner}: {kind}{here}"]
    # Both name the client.
    assert all(re.search(r"client (\d) is 'client \1'", rank.found[4][1]) for rank in ended)
    # And the same processes can train on.
    assert [rank.found[6] for rank in ended] == [["", ""]] * 2
    assert_near(tmp_path / "6", alone / "fedss")
    # Where most clients remain, both go on without the one that diverges.
    assert [rank.found[7] for rank in ended] == [["", ""]] * 2
    lines = (tmp_path / "7" / "records.jsonl").read_text().splitlines()
    reasons = [[f["reason"] for f in json.loads(line).get("failures", [])] for line in lines]
    assert reasons == [[], ["not finite"], [], []]


def test_only_the_first_rank_speaks(tmp_path):
    run, both = ["--out", str(tmp_path / "run")], ["--out", str(tmp_path / "compared")]
    few = ["--rounds", "2"]
    mistakes = [["--sample-size", "1000"], ["--seed", "x"], ["--data", "csv"]]
    ended = launch(
        2,
        commands,
        ["train", *GLYPHS, *run],
        ["compare", "--methods", "full", "fedss", *GLYPHS, *few, *both],
        *(["train", *GLYPHS, *wrong, "--out", str(tmp_path / "not")] for wrong in mistakes),
    )
    assert [rank.found for rank in ended] == [[0, 0, 2, 2, 2]] * 2, ended[0].output
    said = ended[0].output
    # Of three evaluations in all, and each command's table and sentence.
    assert said.count("MAP@10") == 2 + 2 + 2 + 2, said
    told = re.findall("^fedss(?! falls| reaches).*: ", said, re.M)
    assert len(told) == 1 + len(mistakes)  # and where the ranks meet
    assert ended[1].output == ""
    assert not (tmp_path / "not").exists()
    summaries = json.loads((tmp_path / "compared" / "summary.json").read_text())
    assert [summary["method"] for summary in summaries] == ["full", "fedss"]
    assert "fedss" in (tmp_path / "compared" / "report.html").read_text()


GLYPHS = """
    --data glyphs --glyphs-classes 40 --glyphs-clients 8 --image-size 12 --backbone conv4-4
    --embedding-size 4 --sample-size 8 --rounds 6 --clients-per-round 4 --checkpoint-every 2
    --eval-every 3 --workers 1
""".split()  # noqa: SIM905
GO_ON = (
    "start the same command again, with any number of ranks: it goes on from the last "
    "checkpoint, if there is one"
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(["train", *GLYPHS, "--out", str(folder)]) == 0
    return folder


def test_kill_9_under_torchrun_and_go_on_with_other_ranks(undisturbed, tmp_path):
    words = ["train", *GLYPHS, "--out", str(tmp_path / "run")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    died = subprocess.run(
        [*torchrun, "-m", "tests.ranks", "1", "4", *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert died.returncode != 0
    (told,) = (line for line in died.stderr.splitlines() if line.startswith("fedss train: "))
    assert told.startswith("fedss train: rank 0 of 2: ")
    assert told.endswith(GO_ON)
    assert len(lines(tmp_path / "run")) == 3
    ended = launch(3, commands, words)
    assert [rank.found for rank in ended] == [[0]] * 3, ended[0].output
    assert_near(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(("victim", "number"), [(0, "SIGKILL"), (2, "SIGTERM")])
def test_a_rank_is_missed_without_torchrun(victim, number, undisturbed, tmp_path):
    """As other launchers start ranks: nobody tells the others."""
    words = ["train", *GLYPHS, "--out", str(tmp_path / "run")]
    ended = launch(3, die, victim, 4, signal.Signals[number], words)
    for rank, how in enumerate(ended):
        if rank == victim and number == "SIGKILL":
            assert how.code == -9
            continue
        assert how.found == 1, how.output
        (told,) = (line for line in how.output.splitlines() if line.startswith("fedss train: "))
        cause = (
            "told to end (SIGTERM)" if rank == victim else "another rank ended or does not answer; "
        )
        assert told.startswith(f"fedss train: rank {rank} of 3: {cause}")
        assert told.endswith(GO_ON)
    assert main(words) == 0
    assert_near(tmp_path / "run", undisturbed)


def test_environment_of_ranks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")  # some clusters set it for purposes of their own
    with join() as ranks:
        assert ranks == this_rank() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert this_rank() == Ranks(3, 4)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 4.*MASTER_ADDR"):
        join().__enter__()


def test_ranks_of_a_host_share_its_cores():
    cores = len(os.sched_getaffinity(0))
    assert ALONE.cores == torch.get_num_threads()
    assert Ranks(0, 2, 0, 1).cores == cores
    assert Ranks(0, 2 * cores, 0, cores).cores == 1
    assert Ranks(0, 4 * cores, 0, 2 * cores).cores == 1


def test_ranks_that_found_different_checkpoints_are_refused(tmp_path):
    check_same_round(tmp_path, [4, 4])
    with pytest.raises(RunFolderError, match=r"rounds 4, 2;.*all of them"):
        check_same_round(tmp_path, [4, 2])
