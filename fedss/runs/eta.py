"""How long a run will still take, from the seconds that its rounds took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

_ROUNDS, _TIMES = 30, 5  # as many of the last rounds, and of the last evaluations, are looked at


@dataclass(frozen=True)
class TimeLeft:
    """An estimate in seconds; ``at_least``: what is still to come includes what never came yet."""

    seconds: float
    at_least: bool

    def __str__(self) -> str:
        """``about 3 min left``, as coarse as such an estimate is."""
        start, seconds = "at least" if self.at_least else "about", self.seconds
        if seconds < 10:
            return f"{'at least ' if self.at_least else ''}a few seconds left"
        if seconds < 57.5:
            return f"{start} {5 * round(seconds / 5)} s left"
        minutes = max(1, round(seconds / 60))
        if minutes < 60:
            return f"{start} {minutes} min left"
        hours, rest = divmod(10 * round(minutes / 10), 60)
        if hours < 10:
            return f"{start} {hours} h {rest:02d} min left" if rest else f"{start} {hours} h left"
        hours = round(minutes / 60)
        return f"{start} {hours} h left" if hours < 48 else f"{start} {round(hours / 24)} days left"


def time_left(
    seconds: Sequence[Mapping[str, float]], rounds: int, eval_every: int, checkpoint_every: int
) -> TimeLeft | None:
    """What is left of a run: rounds, evaluations and checkpoints, each at its own recent cost::

        (rounds left) r + (evaluations left) e + (checkpoints left) c

    r is the mean of the last 30 rounds without their evaluations and checkpoints, e that of the
    last 5 evaluations, c that of the last 5 checkpoints, each without its longest: a first round,
    which warms up, or a machine that was busy once tells nothing of the rest. Where every fifth
    round waits for a slow client, a median would forget these rounds; the mean does not.

    ``seconds`` are those of each phase of each round so far; a round's checkpoint is among those of
    the next round. Where ``eval_every`` or ``checkpoint_every`` is 0, one comes at the end alone.
    None before the first round and after the last.
    """
    done = len(seconds)
    if not 0 < done < rounds:
        return None
    total = (rounds - done) * _typical(
        [
            sum(took for phase, took in by_phase.items() if phase not in ("evaluate", "checkpoint"))
            for by_phase in seconds[-_ROUNDS:]
        ]
    )
    at_least = False
    for phase, every, later in (("evaluate", eval_every, 0), ("checkpoint", checkpoint_every, 1)):
        past = range(done - done % every, 0, -every) if every else range(0)
        due = [number - 1 + later for number in past[: _TIMES + later]]
        known = [seconds[i][phase] for i in due if i < done and phase in seconds[i]]
        left = rounds // every - done // every + (rounds % every > 0) if every else 1
        at_least = at_least or not known
        total += left * _typical(known[:_TIMES]) if known else 0.0
    return TimeLeft(total, at_least)


def _typical(values: Sequence[float]) -> float:
    """The mean of all but the largest; of a single value, that."""
    return fmean(sorted(values)[:-1]) if len(values) > 1 else values[0]
