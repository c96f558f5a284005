"""What a round took, phase by phase, and which clients failed in which way."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from fedss.runs.reading import Group
from fedss.text import DASH, spaced

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
    "too many": "more classes or clients than a site may register",
    "norm": "a change far larger than those of others",
}


def round_times(groups: Sequence[Group], slots: Sequence[str]) -> dict[str, Any] | None:
    """Where the time of a round goes, means over rounds and seeds; None before any was timed."""
    rows = []
    for group, slot in zip(groups, slots, strict=True):
        runs = [run.records for run in group.runs if run.records]
        seconds: defaultdict[str, float] = defaultdict(float)
        for records in runs:
            for phase, value in (item for r in records for item in r["seconds"].items()):
                known = value if math.isfinite(value) else 0.0
                seconds[phase] += known / len(records) / len(runs)
        if seconds:
            rows.append((group.label, slot, seconds))
    longest = max((sum(seconds.values()) for _, _, seconds in rows), default=0.0)
    if longest <= 0:
        return None
    named = {phase for _, _, seconds in rows for phase in seconds}
    phases = [*(p for p in PHASES if p in named), *sorted(named - PHASES.keys())]
    return {
        "unit": unit(longest),
        "phases": [(phase, _color(phase)) for phase in phases],
        "rows": [
            {
                "label": label,
                "slot": slot,
                "whole": shown(sum(seconds.values()), longest),
                "seconds": [shown(seconds.get(phase), longest) for phase in phases],
                # In percent of the longest round.
                "bar": [
                    (_color(p), round(100 * seconds[p] / longest, 2))
                    for p in phases
                    if seconds.get(p)
                ],
            }
            for label, slot, seconds in rows
        ],
    }


def _color(phase: str) -> str:
    return f"phase-{phase}" if phase in PHASES else "neutral"


def unit(longest: float) -> str:
    """``s``, or ``ms`` where no round takes a second."""
    return "s" if longest >= 1 else "ms"


def shown(seconds: float | None, longest: float) -> str:
    """Seconds in the table's unit, all with as many decimals; ``<0.1`` for what would be a zero."""
    if seconds is None:
        return DASH
    scale = 1 if unit(longest) == "s" else 1000
    digits = 0 if longest * scale >= 1000 else 1 if longest * scale >= 100 else 2
    if 0 < seconds * scale < 10**-digits:
        return f"<{10**-digits:.{digits}f}"
    return spaced(seconds) if digits == 0 else f"{seconds * scale:.{digits}f}"


def failures(groups: Sequence[Group]) -> dict[str, Any] | None:
    """What went wrong, by reason (the most frequent first) and by client; None if nothing did."""
    of_group = [[record for run in group.runs for record in run.records] for group in groups]
    records = [record for of_one in of_group for record in of_one]
    again = sum(record.get("attempts", 1) - 1 for record in records)
    counts = [
        Counter(failure["reason"] for record in of_one for failure in record.get("failures", ()))
        for of_one in of_group
    ]
    total = sum(counts, Counter[str]())
    if not total and not again:
        return None
    by_client: defaultdict[str, Counter[str]] = defaultdict(Counter)
    last: dict[str, int] = {}
    for record in records:
        for failure in record.get("failures", ()):
            by_client[failure["client"]][failure["reason"]] += 1
            last[failure["client"]] = max(record["round"], last.get(failure["client"], 0))
    most = sorted(by_client.items(), key=lambda item: (-item[1].total(), item[0]))
    return {
        "count": total.total(),
        # In rounds that came to an end.
        "asked": total.total() + sum(int(record["clients"]) for record in records),
        "again": again,
        "labels": [group.label for group in groups],
        "reasons": [
            (word, REASONS.get(word, ""), times, [of_one[word] for of_one in counts])
            for word, times in _most_frequent(total)
        ],
        "clients": [
            (name, reasons.total(), _listed_reasons(reasons), last[name])
            for name, reasons in most[:MOST_CLIENTS]
        ],
        "num_clients": len(by_client),
    }


def _most_frequent(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _listed_reasons(reasons: Counter[str]) -> str:
    """``5 offline, 2 deadline``, or ``offline`` if that is all."""
    if len(reasons) == 1:
        return next(iter(reasons))
    return ", ".join(f"{number}\u00a0{word}" for word, number in _most_frequent(reasons))
