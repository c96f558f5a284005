import dataclasses
import hashlib
import json
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedss
import fedss.cli
from fedss import Config, ConfigError, DivergedError, RunFolderError
from fedss.core import algorithm, class_rows
from fedss.core.algorithm import draw_cohort
from fedss.core.checks import check_growth
from fedss.core.class_rows import ClassRows, create_class_rows
from fedss.engines.local import LocalEngine
from fedss.evaluation.baselines import data_floors
from fedss.evaluation.intervals import FLOORS, interval
from fedss.losses.methods import METHODS
from fedss.runs import checkpoint
from fedss.runs.checkpoint import load_checkpoint, newest_round
from fedss.runs.findings import read_scores
from fedss.runs.records import open_records, read_records
from fedss.runs.summaries import summarize
from fedss.runs.tensorboard import add_scalars, open_writer
from fedss.sampling.samplers import Sampler
from fedss.training import federation, loop
from fedss.training.build import build_model, compute_device, pool_images, round_plan
from fedss.training.summary import unused_settings
from tests import reference
from tests.killed_run import train_until

DATA = reference.tiny_dataset()
SMALL = Config(
    data="tiny",
    sample_size=6,
    embedding_size=6,
    rounds=6,
    clients_per_round=3,
    batch_size=4,
    client_lr=0.05,
    class_row_lr=2.0,
    server_momentum=0.9,
    eval_every=2,
    checkpoint_every=2,
    workers=1,
)


def train(out: Path, config: Config = SMALL, **kwargs: object) -> fedss.Run:
    return fedss.train(config, out, data=DATA, backbone=reference.tiny_backbone(), **kwargs)


def new_rows() -> ClassRows:
    return create_class_rows(len(DATA.train.class_names), 6, ("momentum",), SMALL.seed)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def lines(folder: Path) -> list[dict]:
    text = (folder / "records.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.mark.report
def test_a_run_leaves_what_it_promises(tmp_path):
    run = train(tmp_path / "run")
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        ".lock",
        "config.json",
        "records.jsonl",
        "tensorboard",
        "checkpoint",
        "model",
        "retrieval.npz",
        "confusions.npz",
        "verification.json",
        "floors.json",
        "by_class.json",
        "summary.json",
        "report.html",
    }
    records = lines(folder)
    assert [r["round"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["round"] for r in records if r["metrics"]] == [2, 4, 6]
    assert json.loads((folder / "summary.json").read_text()) == [run.summary]
    assert run.summary["map_at_10"] == records[-1]["metrics"]["map_at_10"]
    assert run.summary["class_rows_per_client"] == 6
    assert run.summary["class_row_bytes_down_per_client_round"] == 6 * 6 * 4
    again = fedss.load(folder, backbone=reference.tiny_backbone())
    pixels = DATA.test.query.pixels
    with torch.no_grad():
        one, other = (m(torch.from_numpy(pixels)) for m in (run.embedder.eval(), again.eval()))
    assert torch.equal(one, other)
    metrics = dataclasses.asdict(fedss.evaluate(again, DATA.test))
    assert metrics["map_at_10"] == pytest.approx(run.summary["map_at_10"])


def test_a_run_knows_its_floors_and_how_sure_it_is(tmp_path):
    run = train(tmp_path / "run")
    floors = run.summary["floors"]
    first = build_model(SMALL, DATA, reference.tiny_backbone())
    assert floors == {
        **data_floors(DATA.test).map_at_10,
        "untrained": pytest.approx(fedss.evaluate(first, DATA.test).map_at_10, abs=1e-6),
    }
    (trained,) = read_scores(run.folder / "by_class.json").by_class.values()
    assert trained.map_at_10 == pytest.approx(run.summary["map_at_10"])
    assert trained.map_at_10_C.mean() == pytest.approx(run.summary["map_at_10_by_class"])
    ends = interval([trained])
    assert run.summary["map_at_10_interval"] == [ends.low, ends.high]
    assert run.summary["gallery"] == "all test images"
    # Measured once, and again only where they cannot be read.
    path = run.folder / "floors.json"
    before = path.read_bytes()
    for content in (b"{", before):
        path.write_bytes(content)
        for name in ("summary.json", "report.html"):
            (run.folder / name).unlink()
        assert train(tmp_path / "run").summary["floors"] == floors
        assert path.read_bytes() == before


def test_a_network_with_trained_weights_has_its_frozen_features_for_a_floor(tmp_path):
    run = train(tmp_path / "run", dataclasses.replace(SMALL, rounds=1, pretrained=True))
    assert list(run.summary["floors"]) == [*FLOORS]


def test_runs_of_a_comparison_share_their_floors(tmp_path, monkeypatch):
    measured = []
    for name in ("data_floors", "frozen_floors"):
        real = getattr(federation, name)
        monkeypatch.setattr(
            federation, name, lambda *args, f=real, n=name: (measured.append(n), f(*args))[1]
        )
    config = dataclasses.replace(SMALL, rounds=1, pretrained=True, projection_init="random")
    found = fedss.compare(
        config,
        ["full", "fedss", "fedss:embedding_size=4"],
        [0, 1],
        tmp_path,
        data=DATA,
        backbone=reference.tiny_backbone(),
    )
    # PCA goes to the size of the embedding.
    assert measured == ["data_floors", "frozen_floors", "frozen_floors"]
    floors = [summary["floors"] for summary in found]
    assert floors[0] == floors[2]
    assert floors[0]["untrained"] != floors[1]["untrained"]
    assert floors[0]["frozen"] == floors[5]["frozen"]
    alone = fedss.train(
        dataclasses.replace(config, seed=1),
        tmp_path / "alone",
        data=DATA,
        backbone=reference.tiny_backbone(),
    )
    assert alone.summary["floors"] == floors[3]


def test_tensorboard_reads_the_events(tmp_path):
    run = train(tmp_path / "run")
    drawn = scalars(run.folder)
    assert [step for step, _ in drawn["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert drawn["test/map_at_10"][-1] == (6, pytest.approx(run.summary["map_at_10"]))
    assert drawn["test/map_at_10"][0] == (0, pytest.approx(run.summary["floors"]["untrained"]))


@pytest.mark.report
def test_a_run_says_where_its_time_went_and_that_nobody_failed(tmp_path):
    run = train(tmp_path / "run")
    records = read_records(run.folder / "records.jsonl", 6)
    by_phase = run.summary["seconds_by_phase"]
    assert {"train", "evaluate"} <= by_phase.keys()
    for phase, seconds in by_phase.items():
        assert seconds == pytest.approx(sum(r["seconds"].get(phase, 0) for r in records))
    assert run.summary["seconds"] == pytest.approx(sum(by_phase.values()))
    assert run.summary["failures"] == {}
    page = (run.folder / "report.html").read_text()
    assert "Where the time goes" in page
    assert "What failed" not in page
    assert "federation/failures" not in scalars(run.folder)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: name -> (round, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_failures_are_summed_up_and_drawn_from_the_first_one_on(tmp_path):
    """Also those before an interruption."""
    with (train(tmp_path / "run").folder / "records.jsonl").open() as file:
        record = json.loads(file.readline())
    reasons = [[], ["offline", "ids"], [], ["offline"], []]
    records = [
        record
        | {"round": round, "metrics": None, "seconds": {"train": 2.0, "pause": float(round)}}
        | ({"failures": [{"client": "a", "reason": r} for r in failed]} if failed else {})
        for round, failed in enumerate(reasons, start=1)
    ]
    folder = tmp_path / "federation"
    folder.mkdir()
    for past, new in (([], records[:3]), (records[:3], records[3:])):
        failed = any(line.get("failures") for line in past)
        with open_records(folder, past) as add, open_writer(folder, len(past) + 1) as board:
            for line in new:
                add(line, True)
                failed = failed or "failures" in line
                add_scalars(board, line, failed)
    assert read_records(folder / "records.jsonl", 5) == records
    assert scalars(folder)["federation/failures"] == [(2, 2), (3, 0), (4, 1), (5, 0)]
    summary = summarize({"method": "fedss"}, records)
    assert summary["failures"] == {"offline": 2, "ids": 1}
    assert summary["seconds_by_phase"] == {"train": 10.0, "pause": 15.0}
    assert summary["seconds"] == 25.0


def test_the_summary_judges_the_model_that_is_kept(tmp_path):
    run = train(tmp_path / "run")
    records = read_records(run.folder / "records.jsonl", 6)
    metrics = dataclasses.asdict(fedss.evaluate(run.embedder, DATA.test))
    of_run = dict(run.summary)
    assert {name: of_run[name] for name in metrics} == pytest.approx(metrics)
    assert records[3]["metrics"]
    summary = dict(summarize({}, [*records[:5], records[5] | {"metrics": None}]))
    assert {name: summary[name] for name in metrics} == dict.fromkeys(metrics)
    assert summary["bytes_down_per_client_round"] == run.summary["bytes_down_per_client_round"]


def test_training_learns(tmp_path):
    config = dataclasses.replace(SMALL, rounds=60, client_lr=0.1, class_row_lr=1.0, eval_every=60)
    losses = [r["loss"] for r in lines(train(tmp_path / "run", config).folder)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, tmp_path):
    config = dataclasses.replace(SMALL, method=method, rounds=2)
    summary = train(tmp_path / "run", config).summary
    assert 0 <= summary["map_at_10"] <= 1
    bytes_down = summary["bytes_down_per_client_round"]
    assert bytes_down is None if method == "central" else bytes_down > 0


def test_sampling_all_classes_is_full_training_bit_for_bit(tmp_path):
    n = len(DATA.train.class_names)
    train(tmp_path / "full", dataclasses.replace(SMALL, method="full"))
    train(tmp_path / "all", dataclasses.replace(SMALL, method="fedss", sample_size=n))
    assert digest(tmp_path / "full") == digest(tmp_path / "all")


def test_the_number_of_workers_does_not_change_a_bit(tmp_path):
    for workers in (1, 2, 5):
        train(tmp_path / str(workers), dataclasses.replace(SMALL, workers=workers))
    assert len({digest(tmp_path / str(workers)) for workers in (1, 2, 5)}) == 1
    assert lines(tmp_path / "1") == lines(tmp_path / "2") == lines(tmp_path / "5")


def weights(folder: Path) -> torch.Tensor:
    state = load_file(folder / "model" / "model.safetensors")
    return torch.cat([tensor.reshape(-1).double() for tensor in state.values()])


@pytest.mark.parametrize("method", ["fedss", "moments", "local-heads"])
def test_a_stack_changes_rounding_alone(method, tmp_path):
    gentle = dataclasses.replace(SMALL, class_row_lr=0.1, workers=2)
    for stack in (1, 2, 3):
        config = dataclasses.replace(gentle, method=method, stack=stack)
        train(tmp_path / str(stack), config)
    plain = weights(tmp_path / "1")
    for stack in (2, 3):
        assert (weights(tmp_path / str(stack)) - plain).norm() < 1e-4 * plain.norm()


@pytest.mark.parametrize(
    ("name", "rank", "there", "expected"),
    [
        ("cpu", "1", 0, "cpu"),
        ("cuda", None, 1, "cuda:0"),
        ("cuda", "1", 2, "cuda:1"),
        ("cuda:0", "1", 2, "cuda:0"),
        ("cuda", "1", 1, "cuda means GPU 1 of this machine.* finds 1; use cpu, or up to cuda:0"),
        ("cuda:2", None, 2, "cuda:2 means GPU 2 of this machine.* finds 2; .* up to cuda:1"),
        ("cuda", None, 0, "finds 0; use cpu, or install a CUDA build of torch"),
    ],
)
def test_which_device_is_meant(name, rank, there, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    if re.fullmatch(r"cpu|cuda:\d", expected):
        assert compute_device(Config(device=name)) == torch.device(expected)
    else:
        with pytest.raises(ConfigError, match=expected):
            compute_device(Config(device=name))


def test_seeds_matter_and_global_state_does_not(tmp_path):
    train(tmp_path / "a")
    torch.manual_seed(99)
    train(tmp_path / "b")
    train(tmp_path / "c", dataclasses.replace(SMALL, seed=1))
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_a_finished_run_is_not_run_again(tmp_path):
    first = train(tmp_path / "run")
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    second = train(tmp_path / "run", on_round=lambda record: pytest.fail("trained again"))
    assert second.already_done
    assert not first.already_done
    assert second.summary == first.summary
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before


class StopError(Exception):
    pass


INT4 = dict.fromkeys(("rows_down", "rows_up", "backbone_down", "backbone_up"), "int4")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "moments"},
        {"method": "moments", "moments_rank": 2, "cover": 2, "sampler": "deck", **INT4},
        {"sampler": "deck"},
        {"sampler": "sticky", **INT4},
        {"method": "local-heads", **INT4},
    ],
    ids=["fedss", "moments", "moments-int4", "deck", "sticky-int4", "local-heads-int4"],
)
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, settings):
    config = dataclasses.replace(SMALL, **settings)
    train(tmp_path / "whole", config)

    def stop(record: dict) -> None:
        if record["round"] == 5:
            raise StopError

    with pytest.raises(StopError):
        train(tmp_path / "stopped", config, on_round=stop)
    assert not (tmp_path / "stopped" / "summary.json").exists()
    seen: list[int] = []
    train(tmp_path / "stopped", config, on_round=lambda record: seen.append(record["round"]))
    assert seen == [1, 2, 3, 4, 5, 6]
    assert digest(tmp_path / "whole") == digest(tmp_path / "stopped")
    assert lines(tmp_path / "whole") == lines(tmp_path / "stopped")


MOMENTS_OF_A_ROUND = {
    # What is called, how often in a round, and the newest checkpoint if the last call of round 4
    # fails.
    "training": ((LocalEngine, "train"), 1, 3),
    "the sum": ((algorithm, "aggregate"), 1, 3),
    "the first table": ((class_rows, "to_bfloat16"), 2, 2),
    "a bad step": ((algorithm, "check_finite_state"), 1, 2),
    "the record": ((loop, "new_record"), 1, 2),
    "the scalars": ((loop, "add_scalars"), 1, 4),
    # It is tried once more.
    "the checkpoint": ((checkpoint, "save"), 0.5, 4),
}


KEPT = dataclasses.replace(SMALL, row_dtype="bfloat16", rounds=5, eval_every=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), KEPT).folder


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, DivergedError])
@pytest.mark.parametrize("moment", MOMENTS_OF_A_ROUND)
def test_whatever_ends_a_run_what_was_learnt_is_kept(
    moment, error, undisturbed, tmp_path, monkeypatch
):
    """Checkpoints are due every 2 rounds. A step that is bad or half done has taught nothing."""
    (place, name), per_round, kept = MOMENTS_OF_A_ROUND[moment]
    call, calls = getattr(place, name), []

    def fails_in_round_4(*arguments, **named):
        calls.append(name)
        if len(calls) == 4 * per_round:
            raise error("told to")
        return call(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(place, name, fails_in_round_4)
        with pytest.raises(error, match="told to"):
            train(tmp_path / "run", KEPT)
    assert newest_round(tmp_path / "run" / "checkpoint") == kept
    train(tmp_path / "run", KEPT)
    assert digest(tmp_path / "run") == digest(undisturbed)
    assert lines(tmp_path / "run") == lines(undisturbed)


def test_a_run_goes_on_stacked_but_not_in_another_precision(tmp_path):
    def stop(record: dict) -> None:
        if record["round"] == 3:
            raise StopError

    with pytest.raises(StopError):
        train(tmp_path / "run", on_round=stop)
    with pytest.raises(RunFolderError, match="precision: 'float32' there, 'bfloat16' now"):
        train(tmp_path / "run", dataclasses.replace(SMALL, precision="bfloat16"))
    train(tmp_path / "run", dataclasses.replace(SMALL, stack=3))
    train(tmp_path / "whole")
    difference = weights(tmp_path / "run") - weights(tmp_path / "whole")
    assert difference.norm() < 1e-4 * weights(tmp_path / "whole").norm()


GLYPHS = """
    --data glyphs --glyphs-classes 40 --glyphs-clients 8 --image-size 12 --backbone conv4-4
    --embedding-size 4 --sample-size 8 --rounds 9 --clients-per-round 2 --checkpoint-every 1
    --eval-every 3 --workers 2
""".split()  # noqa: SIM905


def test_kill_9_at_random_moments_and_go_on(tmp_path):
    """Every death is at a change to the run folder, so also in the middle of a checkpoint."""
    assert fedss.cli.main(["train", *GLYPHS, "--out", str(tmp_path / "whole")]) == 0
    chance, deaths, code = random.Random(0), 0, -9
    while code == -9:
        assert deaths < 40, "no progress"
        change, store = chance.randint(4, 45), chance.choice(["memory", "file"])
        code = train_until(change, tmp_path / "run", [*GLYPHS, "--row-store", store])
        deaths += code == -9
    assert code == 0
    assert deaths >= 3
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    for name in ("run", "whole"):
        assert not (tmp_path / name / "checkpoint" / ".unfinished").exists()
    for file in ("round-000009/state.safetensors", "rows-000009.safetensors"):
        one, other = (load_file(tmp_path / name / "checkpoint" / file) for name in ("run", "whole"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_full_disk_loses_nothing(tmp_path):
    """No file may grow beyond a limit that a checkpoint passes: writes fail as on a full disk."""
    config = dataclasses.replace(SMALL, checkpoint_every=1)

    def shrink(record: dict) -> None:
        if record["round"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(RunFolderError, match=r"cannot write .*make room"):
            train(tmp_path / "run", config, on_round=shrink)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    state = load_checkpoint(tmp_path / "run" / "checkpoint", new_rows())
    assert state is not None
    assert state.round == 2
    train(tmp_path / "run", config)
    train(tmp_path / "whole", config)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_in_a_file_change_nothing_and_may_be_chosen_anew(tmp_path, dtype):
    config = dataclasses.replace(SMALL, row_dtype=dtype)
    in_file = dataclasses.replace(config, row_store="file")

    def stop(record: dict) -> None:
        if record["round"] == 3:
            raise StopError

    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    train(tmp_path / "memory", config)
    with pytest.raises(StopError):
        train(tmp_path / "file", in_file, on_round=stop)
    train(tmp_path / "file", config)
    train(tmp_path / "file again", in_file)
    assert digest(tmp_path / "file") == digest(tmp_path / "memory")
    assert digest(tmp_path / "file again") == digest(tmp_path / "memory")
    with pytest.raises(RunFolderError, match="row_dtype"):
        train(tmp_path / "file", dataclasses.replace(config, row_dtype=other))


def test_a_checkpoint_of_the_first_version_is_refused(tmp_path):
    train(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    path = tmp_path / "run" / "checkpoint" / "round-000006" / "checkpoint.json"
    record = json.loads(path.read_text())
    del record["rows"]
    path.write_text(json.dumps(record))
    with pytest.raises(RunFolderError, match=r"written by fedss 0\.1; go on with that version"):
        train(tmp_path / "run")


def test_another_configuration_is_refused_by_name(tmp_path):
    train(tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"client_lr: 0\.05 there, 0\.1 now"):
        train(tmp_path / "run", dataclasses.replace(SMALL, client_lr=0.1))
    other = reference.tiny_dataset(seed=1)
    with pytest.raises(RunFolderError, match="fingerprint"):
        fedss.train(SMALL, tmp_path / "run", data=other, backbone=reference.tiny_backbone())
    train(tmp_path / "run", dataclasses.replace(SMALL, workers=2))


@pytest.mark.parametrize(
    "file", ["state.safetensors", "checkpoint.json", "../rows-000004.safetensors"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_still_works(tmp_path, file, damage):
    def stop(record: dict) -> None:
        if record["round"] == 4:
            raise StopError

    with pytest.raises(StopError):
        train(tmp_path / "run", on_round=stop)
    newest = tmp_path / "run" / "checkpoint" / "round-000004"
    content = (newest / file).read_bytes()
    if damage == "gone":
        (newest / file).unlink()
    elif damage == "cut":
        (newest / file).write_bytes(content[: len(content) // 2])
    else:
        (newest / file).write_bytes(content[:-40] + b"?" + content[-39:])
    with pytest.raises(RunFolderError, match=r"round-000004 is damaged.*go on from round-000002"):
        train(tmp_path / "run")
    for leftover in newest.iterdir():
        leftover.unlink()
    newest.rmdir()
    train(tmp_path / "run")
    train(tmp_path / "whole")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_a_diverging_client_stops_the_run(tmp_path):
    broken = reference.tiny_backbone()
    broken[1].weight.data.fill_(float("inf"))
    with pytest.raises(ConfigError, match=r"numbers that are not finite: 1\.weight"):
        fedss.train(SMALL, tmp_path / "broken", data=DATA, backbone=broken)
    config = dataclasses.replace(SMALL, client_lr=1e30, batch_size=2)
    with pytest.raises(DivergedError, match=r"round 1, client (\d): .*is 'client \1'"):
        fedss.train(config, tmp_path / "run", data=DATA)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_diverging_server_stops_the_run_and_keeps_finite_checkpoints(tmp_path):
    config = dataclasses.replace(SMALL, server_lr=1e30, client_lr=1e10, checkpoint_every=1)
    with pytest.raises(DivergedError, match=r"round \d+: the server's step"):
        train(tmp_path / "run", config)
    kept = load_checkpoint(tmp_path / "run" / "checkpoint", new_rows())
    assert kept is None or kept.backbone_P.isfinite().all()


def without_a_bound(h_BD, rows_SD, target_B, sample, scoring, absent=None):
    """A squared distance, of which a step that is too long makes more."""
    return (h_BD - 5 * rows_SD[target_B]).square().sum(dim=1)


def test_a_loss_that_runs_away_stops_the_run(tmp_path):
    config = dataclasses.replace(
        SMALL, method="pos-only", class_row_lr=3.0, rounds=40, normalize_rows=False
    )
    with pytest.raises(
        DivergedError, match=r"round \d+: expected a loss of the order of the first"
    ):
        fedss.train(config, tmp_path / "run", data=DATA, objective=without_a_bound)
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "run/records.jsonl").read_text().splitlines()
    ]
    assert all(loss <= 100 * losses[0] for loss in losses)
    assert newest_round(tmp_path / "run" / "checkpoint") <= len(losses)


def test_one_client_that_lies_about_its_loss_stops_nobody():
    told = round_plan(SMALL, 10, 3)
    check_growth([2.0, 1e30, 3.0], 4.0, told)
    check_growth([80.0], 0.01, told)
    with pytest.raises(DivergedError, match=r"round 4: .*first round's \(4\), got 500"):
        check_growth([500.0, 1e30, 3.0], 4.0, told)


def test_one_process_at_a_time(tmp_path):
    (tmp_path / "run").mkdir()
    code = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunFolderError, match="in use by another fedss process"):
            train(tmp_path / "run")
        other.kill()
    train(tmp_path / "run")


def test_runs_and_comparisons_do_not_overwrite_each_other(tmp_path):
    config = dataclasses.replace(SMALL, rounds=1)
    kwargs = {"data": DATA, "backbone": reference.tiny_backbone()}
    train(tmp_path / "run", config)
    fedss.compare(config, ["fedss"], [0], tmp_path / "both", **kwargs)
    before = {p: p.read_bytes() for p in tmp_path.glob("*/*.json")}
    with pytest.raises(RunFolderError, match="holds a single run"):
        fedss.compare(config, ["full"], [0], tmp_path / "run", **kwargs)
    with pytest.raises(RunFolderError, match="holds a comparison"):
        train(tmp_path / "both", config)
    two = dataclasses.replace(config, rounds=2)
    with pytest.raises(RunFolderError, match="holds a comparison"):
        train(tmp_path / "both", two)
    assert before == {p: p.read_bytes() for p in tmp_path.glob("*/*.json")}
    fedss.compare(config, ["full"], [0], tmp_path / "both", **kwargs)
    summary = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert [s["method"] for s in summary] == ["fedss", "full"]


def test_a_run_without_its_configuration_is_refused(tmp_path):
    train(tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(RunFolderError, match=r"no config\.json"):
        train(tmp_path / "run", dataclasses.replace(SMALL, method="full"))


@pytest.mark.parametrize("file", ["config.json", "summary.json"])
@pytest.mark.parametrize("content", ["[]", "[{}]", "{", "5"])
def test_damaged_json_is_refused(tmp_path, file, content):
    train(tmp_path / "run", dataclasses.replace(SMALL, rounds=1))
    (tmp_path / "run" / file).write_text(content)
    if (file, content) == ("summary.json", "[]"):
        train(tmp_path / "run", dataclasses.replace(SMALL, rounds=1))
        return
    with pytest.raises(RunFolderError, match=rf"{file}.*(damaged|'folder' is missing|expected)"):
        train(tmp_path / "run", dataclasses.replace(SMALL, rounds=1))


@pytest.mark.parametrize("line", ["5", '{"round": 7}', "{"])
def test_damaged_records_are_refused(tmp_path, line):
    def stop(record: dict) -> None:
        if record["round"] == 5:
            raise StopError

    with pytest.raises(StopError):
        train(tmp_path / "run", on_round=stop)
    path = tmp_path / "run" / "records.jsonl"
    path.write_text("\n".join([line, *path.read_text().splitlines()[1:]]))
    with pytest.raises(RunFolderError, match=r"records\.jsonl"):
        train(tmp_path / "run")


def test_a_module_of_another_structure_is_refused(tmp_path):
    train(tmp_path / "run")
    other = reference.tiny_backbone()
    other[2] = torch.nn.ReLU()
    with pytest.raises(RunFolderError, match="structure"):
        fedss.train(SMALL, tmp_path / "run", data=DATA, backbone=other)


@pytest.mark.parametrize(("methods", "seeds"), [(["full", "full"], [0]), (["full"], [0, 0])])
def test_nothing_is_compared_twice(tmp_path, methods, seeds):
    with pytest.raises(ConfigError, match="each once"):
        fedss.compare(SMALL, methods, seeds, tmp_path, data=DATA)


def test_sample_size_above_n_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"2 to n = 12.*got 13"):
        train(tmp_path / "run", dataclasses.replace(SMALL, sample_size=13))
    assert not (tmp_path / "run").exists()


def test_the_default_sample_size_fits_few_classes(tmp_path):
    run = train(tmp_path / "run", dataclasses.replace(SMALL, sample_size=None, rounds=1))
    assert run.summary["sample_size"] == 12


def test_no_validation_images(tmp_path):
    with pytest.raises(ConfigError, match="no validation images"):
        train(tmp_path / "run", dataclasses.replace(SMALL, eval_split="validation"))


@pytest.mark.report
def test_compare_trains_each_and_reports(tmp_path):
    config = dataclasses.replace(SMALL, rounds=2)
    backbone = reference.tiny_backbone()
    kwargs = {"data": DATA, "backbone": backbone}
    found = fedss.compare(config, ["full", "fedss"], [0, 1], tmp_path / "out", **kwargs)
    assert [(s["method"], s["seed"]) for s in found] == [
        ("full", 0),
        ("full", 1),
        ("fedss", 0),
        ("fedss", 1),
    ]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == found
    assert set(found[0]) >= {
        "method",
        "seed",
        "rounds",
        "sample_size",
        "map_at_10",
        "recall_at_1",
        "bytes_down_per_client_round",
        "bytes_up_per_client_round",
        "class_row_bytes_down_per_client_round",
        "seconds",
    }
    assert "fedss" in (tmp_path / "out" / "report.html").read_text()
    alone = train(tmp_path / "alone", dataclasses.replace(config, method="fedss", seed=1))
    assert digest(tmp_path / "out" / "fedss-seed1") == digest(tmp_path / "alone")
    assert fedss.compare(config, ["fedss"], [1], tmp_path / "out", **kwargs)[0] == found[3]
    sent = [s["class_row_bytes_down_per_client_round"] for s in (alone.summary, found[0])]
    assert sent[0] < sent[1]


def test_methods_of_one_seed_see_the_same_cohorts(tmp_path):
    config = dataclasses.replace(SMALL, rounds=3)
    kwargs = {"data": DATA, "backbone": reference.tiny_backbone()}
    fedss.compare(config, ["full", "pos-only"], [0], tmp_path, **kwargs)
    full, own = (lines(tmp_path / f"{m}-seed0") for m in ("full", "pos-only"))
    assert [r["examples"] for r in full] == [r["examples"] for r in own]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 1, 1, 0.5]), ("cosine", [1, 1, 1, 0.5])],
)
def test_learning_rates_decay_over_rounds(schedule, expected):
    config = dataclasses.replace(SMALL, rounds=4, lr_schedule=schedule, lr_decay_start=0.5)
    chosen = dataclasses.replace(config, method="moments", class_row_lr=0.3)
    for round, factor in enumerate(expected):
        for told, row_lr in ((config, 2.0), (chosen, 0.3)):
            local = round_plan(told, 12, round).local
            assert local.lr == pytest.approx(config.client_lr * factor)
            assert local.row_lr == pytest.approx(row_lr * factor)


def test_pooling_deals_every_image_once():
    pooled = pool_images(DATA.train, cohort_size=3, seed=0)
    assert len(pooled.client_names) == 2
    counts = np.bincount(pooled.clients)
    assert counts.sum() == len(DATA.train)
    assert counts.max() - counts.min() <= 1
    assert draw_cohort(2, 1, 0, 0).shape == (1,)


def test_query_and_gallery_match_by_class_name(tmp_path):
    """The gallery numbers its classes its own way."""
    query = DATA.test.query
    reversed_names = list(reversed(query.class_names))
    labels = len(query.class_names) - 1 - query.labels
    gallery = dataclasses.replace(query, class_names=reversed_names, labels=labels)
    embedder = train(tmp_path / "run").embedder
    metrics = fedss.evaluate(embedder, fedss.RetrievalTask(query, gallery))
    assert metrics.recall_at_1 == 1.0


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Its config.json lacks the options that came later: they had what is the default now."""
    run = train(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    content = json.loads(path.read_text())
    for name in ("sampler", "rows_up", "rotations", "cover"):
        del content["config"][name]
    del content["model"]["sampler"]
    path.write_text(json.dumps(content))
    again = train(tmp_path / "run")
    assert again.already_done
    assert again.summary == run.summary
    with pytest.raises(RunFolderError, match="sampler: 'uniform' there, 'deck' now"):
        train(tmp_path / "run", dataclasses.replace(SMALL, sampler="deck"))


def test_full_moves_the_same_bytes_whatever_the_sampler(tmp_path):
    plans = [
        round_plan(dataclasses.replace(SMALL, method="full", sampler=name), 12, 0)
        for name in ("uniform", "deck", "sticky")
    ]
    assert {plan.sampler.name for plan in plans} == {"uniform"}
    covered = dataclasses.replace(SMALL, method="moments", sampler="deck", cover=2)
    assert round_plan(covered, 12, 0).sampler.name == "deck"


def test_a_sampler_that_breaks_its_promise_is_named(tmp_path):
    def draw(own_P, num_classes, num_negatives, rng):
        return own_P[:1], np.ones(1)

    own = Sampler("mine", "own classes as negatives", draw=draw)
    with pytest.raises(ConfigError, match="sampler 'mine': expected no own class"):
        train(tmp_path / "run", sampler=own)


OTHERS = {"sampler": "deck", "correction": 0.5, "cover": 2, "spread_out_weight": 1.0}
OTHERS |= {"row_mean": "holders", "row_dtype": "bfloat16", "row_store": "file"}


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_that_is_said_to_be_unused_changes_nothing(method, tmp_path):
    usual = dataclasses.replace(SMALL, method=method, rounds=2, eval_every=0)
    changed = dataclasses.replace(usual, **OTHERS)
    unused = unused_settings(changed)
    assert unused <= set(OTHERS)
    assert unused_settings(usual) == set()
    others = {name: OTHERS[name] for name in unused}
    train(tmp_path / "a", usual)
    train(tmp_path / "b", dataclasses.replace(usual, **others))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
