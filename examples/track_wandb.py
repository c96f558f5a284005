"""A run in Weights & Biases: its settings, a curve for each figure of its rounds, its summary.

    pip install wandb
    WANDB_MODE=offline python examples/track_wandb.py     # later, to upload it: wandb sync

A tracker is a callback: `on_round` gets each round's record, and `scalars` makes numbers of it.
"""

from dataclasses import asdict
from pathlib import Path

import wandb

import fedss
from fedss.runs.records import Record, scalars


def track(config: fedss.Config, out: Path, project: str = "fedss") -> fedss.Run:
    """Train, or go on; a run that goes on is the same one there, and no round is there twice."""
    with wandb.init(project=project, id=out.name, resume="allow", config=asdict(config)) as run:

        def on_round(record: Record) -> None:
            # Those of before an interruption come first, again; their steps are there.
            if record["round"] >= run.step:
                run.log(scalars(record), step=record["round"])

        done = fedss.train(config, out, on_round=on_round)
        figures = {name: done.summary[name] for name in ("map_at_10", "recall_at_1", "rounds")}
        run.summary.update(figures)
    return done


if __name__ == "__main__":
    track(fedss.Config(data="glyphs", rounds=40), Path("runs/wandb"))
