"""Everything the page says, put together."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from fedss.evaluation.intervals import ENOUGH_CLASSES, weakness
from fedss.files import write_file, writing
from fedss.report import charts, tables
from fedss.report.audit import audit_section
from fedss.report.figures import evaluations, page_charts
from fedss.report.labels import wrap
from fedss.report.panels import augmented, retrieval
from fedss.report.rounds import PHASES, failures, round_times
from fedss.report.verification import number, verification_section
from fedss.runs import headlines
from fedss.runs.reading import Group, RecordedRun, group_runs
from fedss.runs.records import METRICS, num_sites
from fedss.text import decimals, human_seconds, listed, plural, spaced, tally

METRIC_NAMES = dict(zip(METRICS, ("MAP@10", "R@1", "R@5", "MAP@R"), strict=True))


def render(
    runs: Sequence[RecordedRun], folder: Path, watched: Mapping[str, Any] | None = None
) -> str:
    """The page of the ``runs`` in a run's or a comparison's folder.

    While something is under way ``watched`` says when the page was ``written``, when the
    ``last_round`` ended (times of day; empty before the first), whether none ended for far longer
    than one takes (``late``), and after how many seconds it loads itself again (``refresh``).

    Raises:
        RunFolderError: there are two of one method and seed.
    """
    groups = group_runs(runs, folder)
    slots = charts.slots_of([group.label for group in groups])
    full = headlines.full_softmax(groups)
    paired = list(zip(groups, slots, strict=True))
    curves, cards = evaluations(groups, slots), _key_figures(groups)
    return _template().render(
        title=_title(groups),
        headline=headlines.headline(groups).replace(" %", "\u00a0%"),
        caveat=headlines.caveat(groups),
        setup=_setup(groups),
        figures=cards,
        # Rows of equal length; seven fit into one.
        columns=len(cards) if len(cards) < 8 else 4,
        unfinished=[headlines.status(run) for run in runs if not run.finished],
        watched=watched,
        unscored=headlines.unscored(groups),
        charts=page_charts(groups, slots),
        evaluated=[curve.label for curve in curves],
        evaluations=tables.evaluation_rows(curves),
        rows=[tables.method_row(group, slot, full) for group, slot in paired],
        floors=tables.floor_rows(groups),
        # Of a federation, whose classes are not known, nothing is said.
        weakness=weakness(runs[0].data.get("test_classes") or ENOUGH_CLASSES),
        has_intervals=any(group.interval for group in groups),
        has_ratio=any(headlines.ratio(g, full) is not None for g in groups if g is not full),
        several_seeds=any(len(group.runs) > 1 for group in groups),
        exact=[
            (group.label, slot, run.seed, tables.exact_row(run))
            for group, slot in paired
            for run in group.runs
        ],
        metric_names=METRIC_NAMES,
        federated=any(run.data.get("name") == "federation" for run in runs),
        sites=max((num_sites(r) for run in runs for r in run.records[-1:]), default=0),
        times=round_times(groups, slots),
        phases=PHASES,
        failures=failures(groups),
        retrieval=retrieval(groups, slots),
        verification=verification_section(groups, slots),
        audit=audit_section(groups, slots),
        number=number,
        augmented=augmented(groups),
        settings=tables.settings(groups),
        commands=tables.commands(groups),
        versions=tables.versions(runs),
        single=len(groups) == 1,
        things=_things(groups),
        has_moments=headlines.has_moments(groups),
        pooled=next((group.label for group in groups if group.pooled), ""),
        nearest_neighbours=headlines.nearest_neighbours,
        human_seconds=human_seconds,
        count=spaced,
        tally=tally,
    )


def write_page(
    runs: Sequence[RecordedRun], folder: Path, watched: Mapping[str, Any] | None = None
) -> Path:
    """:func:`render`, into ``report.html`` of the folder."""
    # Names of classes may hold bytes that are no UTF-8, which a page cannot.
    html = render(runs, folder, watched).encode("utf-8", "backslashreplace")
    with writing(folder, "make room or check permissions, then start the same command again"):
        write_file(folder / "report.html", html)
    return folder / "report.html"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "decimals": decimals,
        "percent": headlines.unbroken_percent,
        "breakable": lambda name: _breakable(name, "/_"),
        "shortened": lambda name: wrap(name, 20, 1),
        "foldable": lambda text: _breakable(text, ":,"),
    }
    return environment.get_template("report.html")


def _breakable(text: str, after: str) -> Markup:
    """The text with leave to break lines after some signs."""
    return Markup(re.sub(f"([{after}])", r"\1<wbr>", str(escape(text))))


def _things(groups: Sequence[Group]) -> str:
    return "variants" if headlines.has_variants(groups) else "methods"


def _title(groups: Sequence[Group]) -> str:
    where = _where(groups[0].runs[0])
    if len(groups) == 1:
        return f"{groups[0].label} {where}"
    return f"{len(groups)} {_things(groups)} {where}"


def _where(run: RecordedRun) -> str:
    """``on glyphs``; a list or a folder of one's own goes by its file name."""
    data, path = run.data.get("name", "unnamed data"), run.settings.get("data_path")
    if data == "federation":
        return "in a federation"
    return f"on {Path(str(path)).name if path and data in ('csv', 'folder') else data}"


def _setup(groups: Sequence[Group]) -> str:
    """What was compared, in a sentence or two."""
    run = groups[0].runs[0]
    seeds = [r.seed for g in groups for r in g.runs]
    what = listed([g.label for g in groups])
    if len(groups) > charts.FEW and headlines.has_variants(groups):
        what = f"{len(groups)} variants"
    times = "Trained" if len(groups) == 1 else f"{what}, trained"
    rounds = tally(run.planned_rounds, "round")
    if not all(r.finished for g in groups for r in g.runs):
        single = len(groups) == 1 and len(seeds) == 1
        rounds = f"{spaced(run.last_round)} of {rounds}" if single else f"up to {rounds}"
    parts = [f"{times} {_where(run)} for {rounds}"]
    if clients := headlines.cohort(groups):
        parts.append(f"of {clients}")
    plural = "s" if len(set(seeds)) > 1 else ""
    parts.append(f"with seed{plural} {headlines.listed_numbers(seeds)}.")
    return " ".join(parts)


def _key_figures(groups: Sequence[Group]) -> list[tuple[str, str, str]]:
    """(number, what it counts, addition) for the strip under the headline."""
    run = groups[0].runs[0]
    data, config = run.data, run.settings
    split = config.get("eval_split", "test")
    figures = []
    last = run.records[-1] if run.records else None
    for count, name in (
        (data.get("train_images"), "training image"),
        # A federation learns of these by and by.
        (data.get("train_classes", last and last["num_classes"]), "training class"),
        (data.get("train_clients", last and last["num_clients"]), "client"),
    ):
        if count is not None:
            figures.append((spaced(count), plural(name, count), ""))
    if "own_classes" in data:
        low, middle, high = (spaced(value) for value in data["own_classes"])
        figures.append((middle, "classes per client", f"median; {low} to {high}"))
    if last is not None and (epsilon := last.get("epsilon")) is not None:
        spent_at = f"at δ = {config.get('delta'):.2g}, one client added or removed"
        figures.append((f"{epsilon:.3g}", "ε spent", spent_at))
    if queries := data.get("test_queries"):
        gallery = data.get("test_gallery")
        against = "each against all others" if gallery is None else f"against {spaced(gallery)}"
        figures.append((spaced(queries), plural(f"{split} query", queries), against))
    if classes := data.get("test_classes"):
        seen = data.get("test_classes_seen")  # older records do not say
        trained = "" if seen is None else f"{spaced(seen)} of them trained on"
        addition = "never trained on" if seen == 0 else trained
        figures.append((spaced(classes), plural(f"{split} class", classes), addition))
    if "image_shape" in data:
        channels, height, width = data["image_shape"]
        kind = {1: "gray", 3: "colour"}.get(channels, f"{channels} channels")
        figures.append((f"{width} × {height}", "pixels", kind))
    network = [config.get("backbone") or ""]
    if (size := config.get("embedding_size")) is not None:
        network.append(f"embedding size {size}")
    figures.append((spaced(run.parameters), "parameters", ", ".join(filter(None, network))))
    return figures
