"""A run in MLflow: its settings, a curve for each figure of its rounds, its summary and its files.

    pip install mlflow-skinny
    python examples/track_mlflow.py     # then: mlflow ui

A tracker is a callback: `on_round` gets each round's record, and `scalars` makes numbers of it.
"""

from pathlib import Path

import mlflow

import fedss
from fedss.runs.records import Record, scalars


def track(config: fedss.Config, out: Path) -> fedss.Run:
    """Train, or go on: as the same run in MLflow, where no round is twice."""
    known = out / "mlflow_run.txt"
    with mlflow.start_run(known.read_text() if known.exists() else None, run_name=out.name) as run:
        out.mkdir(parents=True, exist_ok=True)
        known.write_text(run.info.run_id)
        if "round" not in run.data.metrics:
            mlflow.log_params({name: getattr(config, name) for name in vars(config)})
        last = run.data.metrics.get("round", 0)

        def on_round(record: Record) -> None:
            # Those of before an interruption come first, again.
            if record["round"] > last:
                figures = {"round": float(record["round"]), **scalars(record)}
                mlflow.log_metrics(figures, step=record["round"])

        done = fedss.train(config, out, on_round=on_round)
        mlflow.log_dict(done.summary, "summary.json")
        mlflow.log_artifact(str(out / "report.html"))
    return done


if __name__ == "__main__":
    track(fedss.Config(data="glyphs", rounds=40), Path("runs/mlflow"))
