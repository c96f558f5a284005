"""Numbers as people read them, and the sentence that says how a run or a comparison did."""

import statistics
from collections.abc import Iterable, Sequence

from fedss.evaluation.intervals import Interval, floor_order, floor_words
from fedss.runs.eta import time_left
from fedss.runs.reading import Group, RecordedRun
from fedss.runs.summaries import MOMENTS
from fedss.text import decimals, human_bytes, listed, spaced, tally

ENOUGH = 0.96  # of the full softmax's MAP@10: from here on a variant is recommended for its bytes


def percent(ratio: float) -> str:
    """``7 %``; one decimal below 1 %."""
    return f"{100 * ratio:.{1 if 100 * ratio < 0.995 else 0}f} %"


def unbroken_percent(ratio: float) -> str:
    """:func:`percent` for a page, where number and sign stay on one line."""
    return percent(ratio).replace(" ", "\u00a0")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The sample standard deviation as ``± 0.004``; empty for a single value."""
    return f"± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""


def listed_numbers(values: Sequence[int]) -> str:
    """``0–2`` for consecutive numbers, otherwise ``0, 2 and 5``."""
    values = sorted(set(values))
    if len(values) > 2 and values[-1] - values[0] == len(values) - 1:
        return f"{values[0]}\u2060–\u2060{values[-1]}"
    return listed([str(value) for value in values])


def nearest_neighbours(number: int) -> str:
    """``nearest neighbour``, ``five nearest neighbours``."""
    if number == 1:
        return "nearest neighbour"
    spelled = {2: "two", 3: "three", 4: "four", 5: "five"}.get(number, number)
    return f"{spelled} nearest neighbours"


def cohort(groups: Sequence[Group]) -> str:
    """How many clients took part in a round, as recorded: ``20 clients``; empty if not known."""
    # Pooled images have no clients.
    runs = [run for group in groups if not group.pooled for run in group.runs]
    sizes = [record["clients"] for run in runs for record in run.records]
    if sizes:
        low, high = min(sizes), max(sizes)
        many = spaced(low) if low == high else f"{spaced(low)}\u2060–\u2060{spaced(high)}"
        return f"{many} client{'' if high == 1 else 's'}"
    planned = runs[0].settings.get("clients_per_round") if runs else None
    return "" if planned is None else f"up to {tally(planned, 'client')}"


def rounds_done(run: RecordedRun) -> str:
    """``round 40 of 120``."""
    return f"round {run.last_round} of {run.planned_rounds}"


def status(run: RecordedRun) -> str:
    """``fedss, seed 0: round 40 of 120, MAP@10 0.310, about 3 min left`` of an unfinished run."""
    score = run.results["map_at_10"]
    evaluated, saved = run.settings.get("eval_every"), run.settings.get("checkpoint_every")
    left = None
    if isinstance(evaluated, int) and saved is not None:  # older records do not say
        seconds = [record["seconds"] for record in run.records]
        left = time_left(seconds, run.planned_rounds, evaluated, saved)
    shown = "" if score is None else f"MAP@10 {decimals(score)}"
    parts = (f"{run.label}, seed {run.seed}: {rounds_done(run)}", shown, str(left or ""))
    return ", ".join(filter(None, parts))


def both_ways(group: Group, part: str = "") -> float | None:
    """Bytes down and up per client and round; ``part`` is "", "row_" or "backbone_"."""
    ways = [group.mean(f"{part}bytes_{way}_per_client_round") for way in ("down", "up")]
    return None if ways[0] is None or ways[1] is None else ways[0] + ways[1]


def ratio(group: Group, full: Group | None, key: str = "map_at_10") -> float | None:
    """The mean of ``key`` relative to the full softmax; None without two finished groups."""
    if full is None or not (group.finished and full.finished):
        return None
    value, reference = group.mean(key), full.mean(key)
    # Rounded as it is shown: a sentence must not call 0.960 less than 0.96.
    return round(value / reference, 3) if value is not None and reference else None


def full_softmax(groups: Sequence[Group]) -> Group | None:
    """The group all others are measured against."""
    of_full = [group for group in groups if group.method == "full"]
    return next((group for group in of_full if group.label == "full"), next(iter(of_full), None))


def has_variants(groups: Sequence[Group]) -> bool:
    """Whether some name says more than the method's."""
    return any(group.label != group.method for group in groups)


def has_moments(groups: Sequence[Group]) -> bool:
    """Whether any message holds moments next to class rows."""
    return any((run.results[key] or 0) > 0 for g in groups for run in g.runs for key in MOMENTS)


def headline(groups: Sequence[Group]) -> str:
    """Say, computed from the records, how the method did, also when it lost."""
    sentence = _under_a_floor(groups) or _result(groups)
    if any(run.at_sites for group in groups for run in group.runs):
        sentence = sentence.replace("MAP@10", "MAP@10 in each site’s gallery", 1)
    return " ".join([*filter(None, map(_grown, groups)), sentence])


GROWN = 1.5
"""Last loss over first from which on it is said: a loss that falls, as it should, is below 1."""


def _grown(group: Group) -> str:
    """What to say of a group in which a run's loss did not fall but grew."""
    losses = ([record["loss"] for record in run.records] for run in group.runs)
    ends = [(of_run[0], of_run[-1]) for of_run in losses if of_run]
    grown = [(a, z) for a, z in ends if a is not None and z is not None and z > GROWN * abs(a)]
    if not grown:
        return ""
    first, last = max(grown, key=lambda pair: pair[1])
    return (
        f"The loss of {group.label} grew from {first:.3g} to {last:.3g}: lower its learning rates."
    )


def floor_names(groups: Iterable[Group]) -> list[str]:
    """The floors that any run of the groups has."""
    return floor_order(
        name for group in groups for run in group.runs for name in run.floors.map_at_10
    )


def best_floor(groups: Sequence[Group], without: str = "") -> tuple[str, float] | None:
    """The highest floor of any group, its name and MAP@10; None where none was measured."""
    floors = [
        (value, name)
        for group in groups
        for name in floor_names([group])
        if name != without and (value := group.floor(name)) is not None
    ]
    return max(floors)[::-1] if floors else None


def unbeaten_floor(group: Group) -> tuple[str, float] | None:
    """The highest floor that a group's MAP@10 is not shown to be above, as :func:`best_floor`.

    Where classes are not known, as in a federation, the higher figure has to do.
    """
    score, floors = group.mean("map_at_10"), []
    for name in floor_names([group]):
        value, ends = group.floor(name), group.over_floor(name)
        if score is not None and value is not None:
            beaten = score > value if ends is None else ends.shown and ends.low > 0
            floors += [] if beaten else [(value, name)]
    return max(floors)[::-1] if floors else None


def _under_a_floor(groups: Sequence[Group]) -> str:
    """What to say, before anything else, of finished groups that do not beat their floors."""
    done = [group for group in groups if group.finished and group.mean("map_at_10") is not None]
    floors = [(group, floor) for group in done if (floor := unbeaten_floor(group))]
    if not floors:
        return ""
    group, (name, value) = max(floors, key=lambda pair: pair[1][1])
    rounds = f"after {tally(group.runs[0].last_round, 'round')}"
    if len(done) == 1:
        ends, score = group.over_floor(name), decimals(group.mean("map_at_10"))
        start = f"{group.label} falls below {floor_words(name)}"
        if ends is not None and not ends.shown:
            start = f"No difference shown between {group.label} and {floor_words(name)}"
        return f"{start}: MAP@10 {score} against {decimals(value)} {rounds}."
    under = [group for group, _ in floors]
    start = f"Not shown to beat {floor_words(name)}, MAP@10 {decimals(value)}, {rounds}"
    above = [group for group in done if group not in under]
    rest = f" Above it: {_with_scores(above)}." if above else ""
    return f"{start}: {_with_scores(under)}.{rest}"


def _alike(one: Group, other: Group) -> Interval | None:
    """The interval of a difference that may be none; None if there is one, or it is not known."""
    ends = one.over(other) if one.finished and other.finished else None
    return None if ends is None or ends.shown else ends


def _within(ends: Interval) -> str:
    low, high = (decimals(value).replace("-", "−") for value in (ends.low, ends.high))
    return f"95 % interval of the difference: {low} to {high}"


def _result(groups: Sequence[Group]) -> str:
    full = full_softmax(groups)
    others = _measured(groups, full)
    if full is not None and len(others) > 1 and has_variants(others):
        return _best_of(others, full)
    if full is not None and others:
        return _against_full(next((g for g in others if g.method == "fedss"), others[0]), full)
    scored = [group for group in groups if group.mean("map_at_10") is not None]
    if len(scored) > 3:
        return _from_to(scored)
    if len(groups) > 3 and not scored:
        yet = "" if all(group.finished for group in groups) else " yet"
        return f"None of {len(groups)} has been evaluated{yet}."
    sentence = f"{listed([_alone(g) for g in (groups if len(groups) <= 3 else scored)])}."
    if len(scored) > 1:
        low, high = _extremes(scored)
        if ends := _alike(high, low):
            return f"No difference shown: {sentence[:-1]} ({_within(ends)})."
    return sentence


def unscored(groups: Sequence[Group]) -> str:
    """Say which methods the charts of accuracy lack; empty if they have them all."""
    missing = [
        group
        for group in groups
        if not all(any(r["metrics"] for r in run.records) for run in group.runs)
    ]
    if not missing:
        return ""
    yet = "" if all(group.finished for group in missing) else " yet"
    if len(missing) < len(groups):
        return f"Not evaluated{yet}, and so without accuracy: {listed([g.label for g in missing])}."
    advice = "" if yet else " A finished model can be scored with fedss evaluate."
    return f"No round has been evaluated{yet}, so there is no accuracy to draw.{advice}"


def caveat(groups: Sequence[Group]) -> str:
    """What qualifies the first sentence: methods that did better than those it names, or worse."""
    full = full_softmax(groups)
    others = _measured(groups, full)
    if len(others) > 1 and has_variants(others):
        lost = [
            g for g in others if (ratio(g, full) or 0.0) < ENOUGH and not (full and _alike(g, full))
        ]
        if not lost:
            return ""
        names = listed([f"{g.label} ({decimals(ratio(g, full))})" for g in lost])
        return f"Below {ENOUGH} of full: {names}."
    fedss = next((g for g in others if g.method == "fedss"), None)
    if full is None or fedss is None:
        return ""
    better = [g for g in others if _score(g) > _score(fedss) and not _alike(g, fedss)]
    if not better:
        return ""
    verb = "retrieves" if len(better) == 1 else "retrieve"
    return f"{_with_scores(better)} {verb} better than fedss here."


def _measured(groups: Sequence[Group], full: Group | None) -> list[Group]:
    """The finished groups that can be compared with the full softmax, but for pooled training."""
    return [g for g in groups if g is not full and not g.pooled and ratio(g, full) is not None]


def _score(group: Group) -> float:
    return group.mean("map_at_10") or 0.0


def _with_scores(groups: Sequence[Group]) -> str:
    return listed([f"{group.label} ({decimals(group.mean('map_at_10'))})" for group in groups])


def _best_of(groups: Sequence[Group], full: Group) -> str:
    """Which variant retrieves best, and which good one moves fewest bytes."""
    best = max(groups, key=_score)
    share = ratio(best, full) or 0.0
    scores = f"{decimals(best.mean('map_at_10'))} against {decimals(full.mean('map_at_10'))}"
    if ends := _alike(best, full):
        sentence = (
            f"No difference shown between {best.label}, the best variant, and full softmax: MAP@10 "
            f"{scores} ({_within(ends)}){_price(best, full)}"
        )
    elif share < ENOUGH:
        start = f"No variant reaches {ENOUGH} of full softmax’s MAP@10: the best, {best.label}, "
        return f"{start}reaches only {share:.3f} ({scores}){_price(best, full)}."
    else:
        better = "does better than full softmax, with"
        verb = better if share > 1 else "comes closest to full softmax:"
        sentence = f"{best.label} {verb} {share:.3f} of its MAP@10 ({scores}){_price(best, full)}"
    good = [g for g in groups if (ratio(g, full) or 0.0) >= ENOUGH and both_ways(g) is not None]
    if not good:
        return f"{sentence}."
    cheapest = min(good, key=lambda group: both_ways(group) or 0.0)
    if cheapest is best:
        return f"{sentence}; no variant at {ENOUGH} or more moves fewer."
    price = f"{decimals(ratio(cheapest, full))}{_price(cheapest, full)}"
    return f"{sentence}; the cheapest at {ENOUGH} or more is {cheapest.label}: {price}."


def _price(group: Group, full: Group) -> str:
    mine, theirs = both_ways(group), both_ways(full)
    return "" if mine is None or not theirs else f" with {percent(mine / theirs)} of all bytes"


def _from_to(groups: Sequence[Group]) -> str:
    lowest, highest = _extremes(groups)
    low, high = (
        f"{decimals(group.mean('map_at_10'))} ({group.label})" for group in (lowest, highest)
    )
    if ends := _alike(highest, lowest):
        return f"No difference shown: MAP@10 goes from {low} to {high} ({_within(ends)})."
    so_far = "" if all(group.finished for group in groups) else " so far"
    return f"MAP@10 goes from {low} to {high}{so_far}."


def _extremes(groups: Sequence[Group]) -> tuple[Group, Group]:
    """The groups of the lowest and of the highest MAP@10."""
    ordered = sorted(groups, key=_score)
    return ordered[0], ordered[-1]


def _against_full(group: Group, full: Group) -> str:
    share = ratio(group, full) or 0.0
    scores = f"{decimals(group.mean('map_at_10'))} against {decimals(full.mean('map_at_10'))}"
    verb = "reaches" if share >= 0.95 else "falls short: it reaches only"
    sentence = f"{group.label} {verb} {share:.3f} of full softmax’s MAP@10 ({scores})"
    joint = " and" if share >= 0.95 else " while it"
    if ends := _alike(group, full):
        sentence = f"No difference shown between {group.label} and full softmax: MAP@10 {scores}"
        sentence, joint = f"{sentence} ({_within(ends)})", f"; {group.label}"
    costs = []
    rows = "class-row and moment" if has_moments([group]) else "class-row"
    for part, name in (("row_", f"its {rows} bytes"), ("", "all bytes")):
        mine, theirs = both_ways(group, part), both_ways(full, part)
        if mine is not None and theirs:
            costs.append(f"{percent(mine / theirs)} of {name}")
    return f"{sentence}{joint} moves {', '.join(costs)}." if costs else f"{sentence}."


def _alone(group: Group) -> str:
    score = group.mean("map_at_10")
    run = group.runs[0]
    if score is None and group.finished:
        text = f"{group.label} was trained for {tally(run.last_round, 'round')} and not evaluated"
    elif score is None:
        text = f"{group.label} has not been evaluated yet"
    elif group.finished:
        text = f"{group.label} reaches MAP@10 {decimals(score)}"
        if group.interval is not None:
            low, high = group.interval.low, group.interval.high
            text += f" (95 % interval {decimals(low)} to {decimals(high)})"
        if best := best_floor([group]):
            text += f", {floor_words(best[0])} {decimals(best[1])},"
        text += f" after {tally(run.last_round, 'round')}"
    else:
        text = f"{group.label} stands at MAP@10 {decimals(score)}"
    if not group.finished:
        text += f" ({rounds_done(run)})"
    moved = both_ways(group)
    return text if moved is None else f"{text}, moving {human_bytes(moved)} per client and round"
