"""Progress of a run, as it is logged."""

from collections.abc import Callable

from fedss.config import Config
from fedss.log import Progress, progress_log
from fedss.runs.eta import TimeLeft, time_left
from fedss.runs.records import Record
from fedss.settings import auto_eval_every


def log_rounds(label: str, config: Config) -> Callable[[Record], None]:
    """A function to call with each round's record, which logs how far the run is.

    A round with an evaluation is worth a line; see :func:`fedss.log.progress_log`.
    """
    log, left = progress_log(), estimate(config)
    log(Progress(label, 0, config.rounds, "round"), False)

    def on_round(record: Record) -> None:
        metrics = record["metrics"]
        figures = {
            "loss": loss_text(record),
            "map": f"MAP@10 {metrics['map_at_10']:.3f}" if metrics else "",
            "left": str(left(record) or ""),
        }
        done = record["round"]
        log(Progress(label, done, config.rounds, "round", figures, record), bool(metrics))

    return on_round


def loss_text(record: Record) -> str:
    """A round's loss; where noise is to hide the clients, what the run has spent of epsilon."""
    loss = record["loss"]
    return f"loss {loss:.3f}" if loss is not None else f"ε {record.get('epsilon', 0.0):.3g}"


def estimate(config: Config) -> Callable[[Record], TimeLeft | None]:
    """Gives a function to call with each round's record, which says what is left of the run."""
    every = auto_eval_every(config.rounds) if config.eval_every == "auto" else config.eval_every
    seconds = []

    def left(record: Record) -> TimeLeft | None:
        seconds.append(record["seconds"])
        return time_left(seconds, config.rounds, every, config.checkpoint_every)

    return left
