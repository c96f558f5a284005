"""What a round took, phase by phase, and which clients failed in which way."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fedss.runs.headlines import count
from fedss.runs.reading import Group
from fedss.runs.records import FailedClient
from fedss.text import DASH

MOST_CLIENTS = 10
# In their order within a round; any others come behind them.
PHASES = {
    "request": "clients say which class rows they need",
    "train": "rows and backbone go out, clients train, updates come back",
    "aggregate": "the server adds up and takes its step",
    "evaluate": "retrieval is measured",
    "checkpoint": "the state is written to disk",
    "pause": "waiting, before a round is begun again",
}
# What the server's word for a failure means. A word that is not among them stands alone.
REASONS = {
    "offline": "the site was not connected",
    "deadline": "no reply in time",
    "late": "no reply when most others had answered and the grace was over",
    "aside": "not asked, as the site had let the others wait",
    "raised": "an error at the site",
    "died": "the site’s process ended",
    "lost": "a message got lost",
    "not installed": "fedss does not start at the site",
    "version": "another version of fedss at the site",
    "registered": "the site’s classes or clients have changed",
    "damaged": "a reply that cannot be read",
    "stale": "a reply to another round",
    "twice": "a second reply to one message",
    "request": "classes that cannot be asked for",
    "ids": "other classes than asked for",
    "shape": "arrays of another shape or type",
    "examples": "an impossible number of images",
    "not finite": "infinite or undefined numbers",
}


@dataclass(frozen=True)
class RoundTime:
    """Seconds per round of a group, by phase: means over all rounds and seeds."""

    label: str
    slot: str
    seconds: dict[str, float]

    @property
    def whole(self) -> float:
        """Seconds of a whole round."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class RoundTimes:
    """The groups' times, the phases that any of them has in order, and the longest round."""

    groups: list[RoundTime]
    phases: list[str]
    longest: float

    @property
    def unit(self) -> str:
        """``s``, or ``ms`` where no round takes a second."""
        return "s" if self.longest >= 1 else "ms"

    def shown(self, seconds: float | None) -> str:
        """In the table's unit, all with as many decimals; ``<0.1`` for what would be a zero."""
        if seconds is None:
            return DASH
        scale = 1 if self.unit == "s" else 1000
        digits = 0 if self.longest * scale >= 1000 else 1 if self.longest * scale >= 100 else 2
        if 0 < seconds * scale < 10**-digits:
            return f"<{10**-digits:.{digits}f}"
        return count(seconds) if digits == 0 else f"{seconds * scale:.{digits}f}"

    def slot_of(self, phase: str) -> str:
        """The name of the phase's colour."""
        return f"phase-{phase}" if phase in PHASES else "neutral"

    def share(self, seconds: float) -> float:
        """Percent of the longest round."""
        return round(100 * seconds / self.longest, 2)


def round_times(groups: Sequence[Group], slots: Sequence[str]) -> RoundTimes | None:
    """Where the time of a round goes; None before anything has been timed."""
    found = []
    for group, slot in zip(groups, slots, strict=True):
        runs = [run.records for run in group.runs if run.records]
        seconds: defaultdict[str, float] = defaultdict(float)
        for records in runs:
            for phase, value in (item for r in records for item in r["seconds"].items()):
                known = value if math.isfinite(value) else 0.0
                seconds[phase] += known / len(records) / len(runs)
        if seconds:
            found.append(RoundTime(group.label, slot, dict(seconds)))
    longest = max((time.whole for time in found), default=0.0)
    if longest <= 0:
        return None
    named = {phase for time in found for phase in time.seconds}
    phases = [*(p for p in PHASES if p in named), *sorted(named - PHASES.keys())]
    return RoundTimes(found, phases, longest)


@dataclass(frozen=True)
class Reason:
    """A word for what went wrong, what it means, and how often it did, per group and in all."""

    word: str
    meaning: str
    counts: list[int]

    @property
    def total(self) -> int:
        """How often in all groups."""
        return sum(self.counts)


@dataclass(frozen=True)
class FailingClient:
    """A client, how often it failed and why, and the last round in which it did."""

    name: str
    count: int
    reasons: str
    last_round: int


@dataclass(frozen=True)
class Failures:
    """All failures of the shown runs.

    Attributes:
        count: how many.
        asked: how often a client was asked, in rounds that came to an end.
        again: how often a round was begun again.
        labels: of the groups, as the ``counts`` of ``reasons``.
        reasons: the most frequent first.
        clients: those that failed most.
        num_clients: how many clients failed at all.
    """

    count: int
    asked: int
    again: int
    labels: list[str]
    reasons: list[Reason]
    clients: list[FailingClient]
    num_clients: int


def failures(groups: Sequence[Group]) -> Failures | None:
    """What went wrong; None if nothing did."""
    records = [r for group in groups for run in group.runs for r in run.records]
    again = sum(record.get("attempts", 1) - 1 for record in records)
    of_group = [Counter(failure["reason"] for failure in _failures(group)) for group in groups]
    total = sum(of_group, Counter[str]())
    if not total and not again:
        return None
    by_client: dict[str, Counter[str]] = {}
    last: dict[str, int] = {}
    for record in records:
        for failure in record.get("failures", ()):
            client = failure["client"]
            by_client.setdefault(client, Counter())[failure["reason"]] += 1
            last[client] = max(record["round"], last.get(client, 0))
    most = sorted(by_client.items(), key=lambda item: (-item[1].total(), item[0]))
    return Failures(
        count=total.total(),
        asked=total.total() + sum(int(record["clients"]) for record in records),
        again=again,
        labels=[group.label for group in groups],
        reasons=[
            Reason(word, REASONS.get(word, ""), [counts[word] for counts in of_group])
            for word, _ in _most_frequent(total)
        ],
        clients=[
            FailingClient(name, reasons.total(), _listed_reasons(reasons), last[name])
            for name, reasons in most[:MOST_CLIENTS]
        ],
        num_clients=len(by_client),
    )


def _failures(group: Group) -> list[FailedClient]:
    records = [record for run in group.runs for record in run.records]
    return [failure for record in records for failure in record.get("failures", ())]


def _most_frequent(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _listed_reasons(reasons: Counter[str]) -> str:
    """``5 offline, 2 deadline``, or ``offline`` if that is all."""
    if len(reasons) == 1:
        return next(iter(reasons))
    return ", ".join(f"{number}\u00a0{word}" for word, number in _most_frequent(reasons))
