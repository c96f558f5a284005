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
from safetensors.torch import load_file

import fedss
from fedss import ConfigError, RunFolderError
from fedss.cli import main
from fedss.ranks import ALONE, Ranks, join, share_out, speaks
from fedss.run_folder import check_same_round
from tests.ranks import command, die, fail_in_every_way, launch, tiny, train
from tests.test_experiment import SMALL, lines

FOUR = dataclasses.replace(SMALL, rounds=4, eval_every=3)
CASES = {
    name: dataclasses.replace(FOUR, **settings)
    for name, settings in {
        "full": {"method": "full"},
        "fedss": {},
        "deck": {"sampler": "deck", "local_steps": 2},
        "hard": {"sampler": "hard", "rows_up": "int8", "server_optimizer": "adam"},
        "moments": {"method": "moments", "class_row_lr": 0.1},
        "holders": {"row_mean": "holders"},
        "fewer clients than ranks": {"clients_per_round": 1},
        "moments, fewer clients than ranks": {
            "method": "moments",
            "class_row_lr": 0.1,
            "clients_per_round": 1,
        },
        "fedaws": {"method": "fedaws", "workers": 2},
    }.items()
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoint").glob("round-*"))
    return load_file(newest / "state.safetensors")


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
    for name, config in CASES.items():
        fedss.train(config, folder / name, **tiny())
    return folder


@pytest.mark.parametrize("size", [2, 3])
def test_several_ranks_train_what_one_does(size, alone, tmp_path):
    ended = launch(size, train, CASES, tmp_path)
    assert [rank.code for rank in ended] == [0] * size, [rank.output for rank in ended]
    for name, config in CASES.items():
        assert_near(tmp_path / name, alone / name)
        found = [rank.found[name] for rank in ended]
        # Every rank holds the same bits after every round, and returns the same.
        assert len(found[0]["digests"]) == config.rounds
        assert all(other["digests"] == found[0]["digests"] for other in found)
        assert all(other["summary"] == found[0]["summary"] for other in found)
        whole = lines(alone / name)
        for round, examples in enumerate(zip(*(f["examples"] for f in found), strict=True)):
            assert sum(map(len, examples)) == whole[round]["clients"]
            totals = [sum(share) for share in examples]
            assert sum(totals) == whole[round]["examples"]
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
    first, second = ({name: rest for name, *rest in rank.found} for rank in ended)
    of = {rank: rf"rank {rank} \(process \d+ at .*\)" for rank in (0, 1)}
    for name, raised, here, there, rank in (
        ("first's own", ["StopError", "FedssError"], "enough", "failed with StopError: enough", 0),
        ("other data", ["RunFolderError"] * 2, "fingerprint: ", ": .*fingerprint: ", 1),
        ("other settings", ["RunFolderError"] * 2, "client_lr: ", ": .*client_lr: ", 1),
        ("diverged", ["DivergedError"] * 2, "round 2, client", ": round 2, client", 1),
        ("a bug", ["IndexError", "FedssError"], "out of range", "failed with IndexError: out", 1),
        ("nothing", ["", ""], "$", "$", None),
    ):
        owner, other = (second, first) if rank == 1 else (first, second)
        assert [owner[name][0], other[name][0]] == raised, name
        assert re.search(here, owner[name][1]), name
        assert re.match(of.get(rank, "") + ".*" + there, other[name][1]), name
    # Both name the client.
    assert re.search(r"client (\d) is 'client \1'", first["diverged"][1])
    assert re.search(r"client (\d) is 'client \1'", second["diverged"][1])
    # And the same processes can train on.
    assert_near(tmp_path / "5", alone / "fedss")


def test_only_the_first_rank_speaks(tmp_path):
    done = launch(2, command, "train", *GLYPHS, "--out", str(tmp_path / "run"))
    assert [rank.found for rank in done] == [0, 0]
    assert done[0].output.count("MAP@10") == 3  # two evaluations and the table
    assert done[1].output == ""
    for words in (["--sample-size", "1000"], ["--seed", "x"], ["--data", "csv"]):
        mistaken = launch(2, command, "train", *GLYPHS, *words, "--out", str(tmp_path / "not"))
        assert len(re.findall("^fedss.*: ", mistaken[0].output, re.M)) == 1
        assert mistaken[1].output == ""
        assert [rank.found or rank.code for rank in mistaken] == [2, 2]
    assert not (tmp_path / "not").exists()


def test_ranks_compare(tmp_path):
    words = ["--methods", "full", "fedss", "--rounds", "2", "--out", str(tmp_path / "run")]
    assert [rank.found for rank in launch(2, command, "compare", *GLYPHS, *words)] == [0, 0]
    summaries = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [summary["method"] for summary in summaries] == ["full", "fedss"]
    assert "fedss" in (tmp_path / "run" / "report.html").read_text()


GLYPHS = """
    --data glyphs --glyphs-classes 40 --glyphs-clients 8 --image-size 12 --backbone conv4-4
    --embedding-size 4 --sample-size 8 --rounds 6 --clients-per-round 4 --checkpoint-every 2
    --eval-every 3 --workers 1
""".split()  # noqa: SIM905
GO_ON = (
    "start the same command again, with any number of ranks: it goes on from the last checkpoint"
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(["train", *GLYPHS, "--out", str(folder)]) == 0
    return folder


def test_kill_9_under_torchrun_and_go_on_with_other_ranks(undisturbed, tmp_path):
    words = [*GLYPHS, "--out", str(tmp_path / "run")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    died = subprocess.run(
        [*torchrun, "-m", "tests.ranks", "0", "4", "SIGKILL", *words],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert died.returncode != 0
    (told,) = (line for line in died.stderr.splitlines() if line.startswith("fedss: "))
    assert re.match(r"fedss: rank 0 \(process \d+ at .*\) of 2 ended, was killed", told)
    assert GO_ON in told
    assert len(lines(tmp_path / "run")) == 3
    assert [rank.found for rank in launch(3, command, "train", *words)] == [0] * 3
    assert_near(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    ("victim", "number"), [(0, "SIGKILL"), (1, "SIGKILL"), (2, "SIGSTOP"), (1, "SIGTERM")]
)
def test_a_rank_is_missed_without_torchrun(victim, number, undisturbed, tmp_path):
    """As other launchers start ranks: nobody tells the others. A halted one is as good as dead."""
    words = [*GLYPHS, "--out", str(tmp_path / "run")]
    halted = victim if number == "SIGSTOP" else None
    ended = launch(3, die, victim, 4, signal.Signals[number], words, 20, halted=halted)
    told = [line for rank in ended for line in rank.output.splitlines() if GO_ON in line]
    for rank, how in enumerate(ended):
        assert how.code == (1 if rank != victim or number == "SIGTERM" else -9), how.output
    if victim == 0:
        # With the first rank, the store by which the others hear of each other is gone.
        assert told
    elif number == "SIGTERM":
        assert len(told) == 1
    else:
        (line,) = told
        assert re.search(rf"rank {victim} \(process \d+ at .*\) of 3 ended", line)
    assert main(["train", *words]) == 0
    assert_near(tmp_path / "run", undisturbed)


def test_environment_of_ranks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")  # some clusters set it for purposes of their own
    with join() as ranks:
        assert ranks is ALONE
        assert speaks()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not speaks()
    monkeypatch.setenv("RANK", "0")
    assert speaks()
    with pytest.raises(ConfigError, match="WORLD_SIZE is 4, but MASTER_ADDR, MASTER_PORT is not"):
        join().__enter__()


def test_ranks_of_a_host_share_its_cores():
    cores = len(os.sched_getaffinity(0))
    assert ALONE.cores == torch.get_num_threads()
    assert Ranks(0, 2, 0, 1).cores == cores
    assert Ranks(0, 2 * cores, 0, cores).cores == 1
    assert Ranks(0, 4 * cores, 0, 2 * cores).cores == 1


def test_ranks_that_found_different_checkpoints_are_refused(tmp_path):
    check_same_round(tmp_path, [4, 4])
    with pytest.raises(RunFolderError, match=r"rank 0 of round 4, rank 1 of round 2.*all of them"):
        check_same_round(tmp_path, [4, 2])
