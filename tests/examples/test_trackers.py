"""What the examples tell trackers: the real ones if they are installed, else stand-ins."""

import dataclasses
import importlib
import importlib.util
import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import fedss
from fedss.runs.records import scalars

CONFIG = fedss.Config(
    glyphs_classes=20,
    glyphs_clients=8,
    image_size=12,
    backbone="conv4-4",
    embedding_size=4,
    clients_per_round=2,
    rounds=4,
    eval_every=2,
    workers=1,
)


def stub_mlflow(monkeypatch):
    """What of MLflow the example calls; a run's figures by name and step, and its files."""
    metrics, told = {}, SimpleNamespace(params={}, files=[])

    @contextmanager
    def start_run(run_id, run_name):
        assert run_id in (None, "id of it")
        latest = {name: max(by_step.items())[1] for name, by_step in metrics.items()}
        data = SimpleNamespace(metrics=latest)
        yield SimpleNamespace(info=SimpleNamespace(run_id="id of it"), data=data)

    def log_metrics(figures, step):
        for name, value in figures.items():
            assert step not in metrics.setdefault(name, {})
            metrics[name][step] = value

    module = SimpleNamespace(
        start_run=start_run,
        log_metrics=log_metrics,
        log_params=told.params.update,
        log_dict=lambda content, name: told.files.append(name),
        log_artifact=lambda path: told.files.append(path.rpartition("/")[2]),
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return lambda out: (metrics, told.params, told.files)


def real_mlflow(monkeypatch, tmp_path):
    mlflow = importlib.import_module("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.create_experiment("test", artifact_location=f"file://{tmp_path}/files")
    mlflow.set_experiment("test")

    def told(out):
        client, run_id = mlflow.MlflowClient(), (out / "mlflow_run.txt").read_text()
        run = client.get_run(run_id)
        metrics = {}
        for name in run.data.metrics:
            history = client.get_metric_history(run_id, name)
            metrics[name] = {m.step: m.value for m in history}
            assert len(history) == len(metrics[name])
        files = [file.path for file in client.list_artifacts(run_id)]
        return metrics, run.data.params, files

    return told


@contextmanager
def cut_at(monkeypatch, round):
    """A run that is interrupted after a round, once."""
    train, seen = fedss.train, []

    def cut(config, out, on_round):
        def watched(record):
            on_round(record)
            if record["round"] == round and not seen:
                seen.append(round)
                raise KeyboardInterrupt

        return train(config, out, on_round=watched)

    monkeypatch.setattr(fedss, "train", cut)
    yield
    monkeypatch.setattr(fedss, "train", train)


def records_of(out):
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


# Of what trackers import.
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_each_round_once(monkeypatch, tmp_path):
    if importlib.util.find_spec("mlflow"):
        told = real_mlflow(monkeypatch, tmp_path)
    else:
        told = stub_mlflow(monkeypatch)
    monkeypatch.delitem(sys.modules, "examples.track_mlflow", raising=False)
    track, out = importlib.import_module("examples.track_mlflow").track, tmp_path / "run"
    with cut_at(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        track(CONFIG, out)
    track(CONFIG, out)
    metrics, params, files = told(out)
    records = records_of(out)
    assert sorted(metrics["train/loss"]) == [1, 2, 3, 4]
    for record in records:
        for name, value in scalars(record).items():
            assert metrics[name][record["round"]] == pytest.approx(value)
    assert sorted(metrics["test/map_at_10"]) == [2, 4]
    assert str(params["backbone"]) == "conv4-4"
    assert sorted(files) == ["report.html", "summary.json"]


def test_wandb_has_each_round_once(monkeypatch, tmp_path):
    logged, summary = {}, {}

    class Run:
        def __init__(self):
            self.summary = summary
            self.step = max(logged, default=-1) + 1

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def log(self, figures, step):
            assert step not in logged
            logged[step] = figures

    def init(*, project, id, resume, config):
        assert (project, id, resume) == ("fedss", "run", "allow")
        assert config == dataclasses.asdict(CONFIG)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.delitem(sys.modules, "examples.track_wandb", raising=False)
    track, out = importlib.import_module("examples.track_wandb").track, tmp_path / "run"
    with cut_at(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        track(CONFIG, out)
    run = track(CONFIG, out)
    assert logged == {record["round"]: scalars(record) for record in records_of(out)}
    assert summary["map_at_10"] == run.summary["map_at_10"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
def test_the_real_wandb_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delitem(sys.modules, "examples.track_wandb", raising=False)
    importlib.import_module("examples.track_wandb").track(CONFIG, tmp_path / "run")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"map_at_10" in content
    assert b"train/loss" in content
