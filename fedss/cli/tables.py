"""What commands print: lines, tables, and the figures in them."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedss.cli.output import say
from fedss.errors import RunFolderError
from fedss.text import DASH, counted, decimals, encodable, human_bytes, printable

if TYPE_CHECKING:
    from fedss.evaluation.intervals import Interval
    from fedss.settings import Setting
    from fedss.training.summary import Cost


def cell(text: str) -> str:
    """Text from elsewhere for a table, as wide as stdout will show it."""
    return escape(encodable(printable(text), sys.stdout.encoding))


def make_table(title: str | None, *headings: str) -> Table:
    """An empty table; a heading that begins with ``>`` is one of numbers, set to the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in headings:
        right = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if right else "left")
    return table


def print_table(table: Table, spare: Sequence[str] = ()) -> None:
    """Print a table on stdout.

    Where it is too wide, headings of numbers are broken between words, then columns with a
    ``spare`` heading are left out, then text is folded, then lines are longer than the terminal.
    """
    # Wide enough for the tables where it is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 140)
    if table.title is not None:
        # As a line of its own: a title is no wider than its table.
        console.print(Text(str(table.title), style="bold"), soft_wrap=True)
        table.title = None
    unbounded = console.options.update(width=10_000)
    wide = Measurement.get(console, unbounded, table).maximum > console.width
    for column in table.columns:
        column.overflow = "fold"
        if column.justify == "right":
            column.no_wrap = True
            column.header = str(column.header).replace(" ", "\n") if wide else column.header
    for heading in spare:
        if Measurement.get(console, unbounded, table).maximum <= console.width:
            break
        left_out = heading.replace(" ", "\n")
        table.columns = [c for c in table.columns if c.header not in (heading, left_out)]
    console.width = max(console.width, Measurement.get(console, unbounded, table).minimum)
    console.print(table)


def say_left_out(
    skipped: Sequence[str],
    unpaired: Sequence[str],
    passed_over: Mapping[str, int],
    remarks: Sequence[str] = (),
) -> None:
    """Say on stderr what is there and not used, and what is easily mistaken."""
    from fedss.data.folder import besides

    for names, what in (
        (skipped, "unreadable images"),
        (unpaired, "images of held-out classes, each the only one of its class"),
    ):
        if names:
            first = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            say(f"left out {len(names)} {what}: {first}", file=sys.stderr)
    if passed_over:
        links = "; list what links lead to in a CSV" if "symbolic links" in passed_over else ""
        say(besides(passed_over).removeprefix("; ") + links, file=sys.stderr)
    say(*(f"remark: {remark}" for remark in remarks), file=sys.stderr)


def print_data(name: str, description: Mapping[str, Any], held: Sequence[np.ndarray]) -> None:
    """Print what is in a data set, and who holds what, as :func:`fedss.data.holdings` gives it.

    ``description``: that of :func:`fedss.training.summary.describe`, with ``dealt``, ``trained``
    and ``frozen``.
    """
    clients_P, classes_P, count_P = held
    gallery, seen = description["test_gallery"], description["test_classes_seen"]
    searched = "each other" if gallery is None else f"{gallery:,} gallery images"
    queries = f"{description['test_queries']:,}, searched among {searched}"
    table = make_table(f"data set {name}", "", "")
    table.show_header = False
    for row in (
        ("training images", f"{description['train_images']:,}"),
        ("training classes n", f"{description['train_classes']:,}"),
        ("clients", f"{description['train_clients']:,}{description['dealt']}"),
        ("images per client", _spread(np.bincount(clients_P, weights=count_P))),
        ("own classes per client", _spread(np.bincount(clients_P))),
        ("clients per class", _spread(np.bincount(classes_P))),
        ("test queries", queries if description["test_queries"] else "none: no class is held out"),
        ("test classes", f"{description['test_classes']:,}, {seen:,} of them seen in training"),
        ("images", "{} x {} x {} (channels, height, width)".format(*description["image_shape"])),
        (
            "parameters trained and sent",
            f"{description['trained']:,}, {description['frozen']:,} more stay as they are",
        ),
    ):
        table.add_row(*row)
    print_table(table)


def _spread(values: np.ndarray) -> str:
    low, high, median = values.min(), values.max(), np.median(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}, median {median:,g}"


def print_settings(settings: "Mapping[str, Setting]") -> None:
    """Print what ``auto`` settings are for this data set, and why."""
    table = make_table("settings that follow from the data", "", "", "")
    table.show_header = False
    for name, setting in settings.items():
        value = setting.value
        table.add_row(name, f"{value:g}" if isinstance(value, float) else str(value), setting.why)
    print_table(table)


def print_costs(title: str, costs: "Sequence[Cost]") -> None:
    """Print what each method moves each way."""
    table = make_table(
        title,
        "method",
        ">class rows",
        ">share of W",
        ">class-row bytes",
        ">bytes down",
        ">bytes up",
    )
    for cost in costs:
        moved = (cost.row_bytes, cost.bytes_down, cost.bytes_up)
        rows = (f"{cost.class_rows:,.1f}", f"{cost.share:.1%}")
        table.add_row(cost.method, *rows, *map(human_bytes, moved))
    print_table(table)


def print_results(summaries: Sequence[Mapping[str, Any]], seen: int, folder: Path) -> None:
    """Print what was retrieved and what was moved: means over seeds, one row per method; ``seen``:
    how many of the test classes were seen in training."""
    from fedss.runs.headlines import headline
    from fedss.runs.reading import Group, group_runs, read_runs

    groups: Sequence[Group] = ()
    # With a damaged file of the report the figures are here all the same.
    with suppress(RunFolderError):
        groups = group_runs(read_runs(folder), folder)
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for summary in summaries:
        by_method.setdefault(str(summary.get("label", summary["method"])), []).append(summary)
    classes = "unseen classes" if not seen else f"test classes ({seen} of them seen in training)"
    if all(summary["map_at_10"] is None for summary in summaries):
        classes = "not evaluated,"
    sites = ", in each site's gallery" if any("sites" in s for s in summaries) else ""
    title = f"{classes} after {counted(summaries[0]['rounds'], 'round')}{sites}"
    intervals = {group.label: group.interval for group in groups}
    _print_retrieved(title, by_method, intervals)
    if groups:
        sentence = headline(groups)
        if sys.stdout.isatty():
            sentence = fill(sentence, shutil.get_terminal_size().columns)
        say(*sentence.splitlines(), "")
    _print_moved(by_method)


ByMethod = Mapping[str, Sequence[Mapping[str, Any]]]


def _mean(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values: list[Any] = [run.get(name) for run in runs]
    return None if None in values else sum(values) / len(values)


def _print_retrieved(
    title: str, by_method: ByMethod, intervals: "Mapping[str, Interval | None]"
) -> None:
    from fedss.evaluation.intervals import floor_order, floor_words

    full = _mean(by_method["full"], "map_at_10") if "full" in by_method else None
    numbers = (">MAP@10", ">95 %", ">by class", *((">/ full",) if full else ()), ">R@1", ">seeds")
    table = make_table(title, "method", *numbers, ">time s")
    for method, runs in by_method.items():
        map_at_10 = _mean(runs, "map_at_10")
        table.add_row(
            cell(method.replace(",", ", ")),
            decimals(map_at_10),
            _ends(intervals.get(method)),
            decimals(_mean(runs, "map_at_10_by_class")),
            *((decimals(None if map_at_10 is None else map_at_10 / full),) if full else ()),
            decimals(_mean(runs, "recall_at_1")),
            str(len(runs)),
            f"{_mean(runs, 'seconds'):.0f}",
        )
    table.add_section()
    measured = [run.get("floors", {}) for runs in by_method.values() for run in runs]
    for name in floor_order(chain.from_iterable(measured)):
        values = [floors[name] for floors in measured if name in floors]
        table.add_row(floor_words(name), decimals(sum(values) / len(values)))
    print_table(table, spare=("by class", "seeds", "time s"))


def _print_moved(by_method: ByMethod) -> None:
    parts = ("kB", "backbone kB", "class-row kB")
    headings = (f">{part} {way}" for way in ("down", "up") for part in parts)
    title = "per client and round; sums with ids and headers"
    table = make_table(title, "method", ">class rows", *headings)
    for method, runs in by_method.items():
        sizes = []
        for way in ("down", "up"):
            total, backbone, of_rows, moments = (
                _mean(runs, f"{part}bytes_{way}_per_client_round")
                for part in ("", "backbone_", "class_row_", "moment_")
            )
            sizes += [total, backbone, None if of_rows is None else of_rows + (moments or 0.0)]
        table.add_row(
            cell(method.replace(",", ", ")),
            decimals(_mean(runs, "class_rows_per_client"), 0),
            *(decimals(None if size is None else size / 1000, 1) for size in sizes),
        )
    print_table(table, spare=("backbone kB down", "backbone kB up"))
    _say_before_rounds(by_method)


def _say_before_rounds(by_method: ByMethod) -> None:
    """Say below the table what it leaves out: the messages that features are whitened with."""
    by_size: dict[str, list[str]] = {}
    for method, runs in by_method.items():
        ways = [_mean(runs, f"warm_start_bytes_{way}") for way in ("down", "up")]
        if any(ways):
            down, up = map(human_bytes, ways)
            size = f"before the first round, all clients together: {down} down, {up} up"
            by_size.setdefault(size, []).append(method)
    for size, methods in by_size.items():
        say(size if len(by_size) == 1 else f"{size}: {', '.join(methods)}")
    say(*([""] if by_size else []))


def print_evaluation(
    metrics: Mapping[str, Any],
    ends: "Interval | None",
    floors: Mapping[str, float],
    measured: Mapping[str, Any],
) -> None:
    """Print the figures of one model; ``measured``: as ``verification.json`` has them."""
    from fedss.evaluation.intervals import floor_order, floor_words, weakness

    names = {"recall_at_1": "R@1", "recall_at_5": "R@5", "map_at_r": "MAP@R"}
    headings = (f">{name}" for name in ("MAP@10", "95 %", "by class", *names.values()))
    table = make_table("retrieval", "", *headings)
    both = decimals(metrics["map_at_10"]), _ends(ends), decimals(metrics["map_at_10_by_class"])
    table.add_row("this model", *both, *(decimals(metrics[name]) for name in names))
    for name in floor_order(floors):
        table.add_row(floor_words(name), decimals(floors[name]))
    print_table(table)
    say(f"{counted(metrics['queries'], 'query')} of {counted(metrics['classes'], 'class')}")
    weak = weakness(metrics["classes"])
    say(*([weak, ""] if weak else [""]))
    _print_pairs(measured)
    _print_open_set(measured["identification"])


def _print_pairs(measured: Mapping[str, Any]) -> None:
    from fedss.evaluation.verification import ERRORS

    table = make_table("verification", "", ">FAR", ">TAR", ">threshold")
    eer, at = measured["eer"], decimals(measured["eer_threshold"], 4)
    table.add_row("equal error rate", decimals(eer, 4), decimals(1 - eer), at)
    for point in measured["points"]:
        far = f"{point['far']:g}" + ("" if point["supported"] else "*")
        table.add_row("", far, decimals(point["tar"]), decimals(point["threshold"], 4))
    print_table(table)
    say(f"{measured['genuine']:,} pairs of one class, {measured['impostor']:,} of two")
    if not all(point["supported"] for point in measured["points"]):
        least = measured["smallest_far"]
        lowest = f"a FAR below {least:.2g}" if least <= 1 else "any FAR"
        say(f"* too few impostor pairs for {lowest}: fewer than {ERRORS} false accepts")


def _print_open_set(known: Mapping[str, Any] | None) -> None:
    from fedss.evaluation.verification import ERRORS

    if known is None:
        say(
            "nobody to find or nobody to refuse: no threshold for fedss identify; give it one "
            "with --threshold"
        )
        return
    say("")
    table = make_table("identification", "", ">FPIR", ">DIR", ">of draws", ">threshold")
    table.add_row(
        "open set, rank 1",
        f"{known['fpir']:g}" + ("" if known["supported"] else "*"),
        decimals(known["dir"]),
        f"{known['dir_low']:.3f} to {known['dir_high']:.3f}",
        decimals(known["threshold"], 4),
    )
    print_table(table)
    say(f"{counted(known['enrolled'], 'class')} enrolled in each of {known['draws']} draws")
    if not known["supported"]:
        say(f"* too few searches for other classes: fewer than {ERRORS} false positives in a draw")


def _ends(ends: "Interval | None") -> str:
    return DASH if ends is None else f"{ends.low:.3f}–{ends.high:.3f}"
