"""A run's model card: Markdown with the YAML header that model hubs read, from what the run left.

``model_card.md`` is its text. Nothing is made up: what neither configuration nor records tell
stands there as unknown, or as the owner's to fill in (Mitchell et al. 2018, arXiv 1810.03993, says
what belongs into such a card).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from fedss.config import OPTIONS
from fedss.errors import RunFolderError
from fedss.evaluation.intervals import floor_order, floor_words
from fedss.losses.methods import METHODS
from fedss.models import EmbedderSpec
from fedss.runs.about import AnyConfig, read_any_config, run_of
from fedss.runs.checkpoint import newest_round
from fedss.runs.findings import read_scores, read_verification
from fedss.runs.records import read_records
from fedss.runs.summaries import read_summaries, summarize
from fedss.text import decimals, human_bytes

UNKNOWN = "unknown"

_METRICS = {
    "map_at_10": ("MAP@10", "mean over queries of the average precision among the first 10 found"),
    "map_at_r": ("MAP@R", "the same among the first R, R = images of the query's class"),
    "recall_at_1": ("R@1", "share of queries whose first image found is of their class"),
    "recall_at_5": ("R@5", "share of queries with an image of their class among the first 5"),
}
# Beside these, each setting that is not the default.
_SETTINGS = """
    backbone embedding_size rounds clients_per_round local_epochs batch_size client_lr
    class_row_lr scale server_optimizer server_lr server_row_lr seed
""".split()  # noqa: SIM905
_GROUPS = ("method", "model", "training", "privacy", "wire", "server")


def model_card(folder: Path, spec: EmbedderSpec, fingerprint: str, preprocessing: str) -> str:
    """The card of a run's model, of the last checkpoint where the run is not finished.

    Args:
        folder: the run folder; or ``best`` in it, the model that patience kept.
        spec: what the model is built from.
        fingerprint: the model's.
        preprocessing: what is to be done to an image before the model gets it.

    Raises:
        RunFolderError: a configuration or a summary that is missing, damaged or of no single run.
    """
    about, summary, which = _read_run(folder)
    data, settings = about["data"], {**about["config"], **about.get("resolved", {})}
    name, split = _plain(data.get("name", UNKNOWN)), settings.get("eval_split", "test")
    own = f"{about['model'].get('backbone', UNKNOWN)} (a module of its owner's)"
    backbone = _plain(spec.backbone or own)
    title = f"{backbone} trained with fedss on {name}"
    header: dict[str, Any] = {
        "library_name": "fedss",
        "pipeline_tag": "image-feature-extraction",
        "license": UNKNOWN,
        "tags": ["fedss", "image-retrieval", "metric-learning", "federated-learning"],
        "metrics": [metric for metric in _METRICS if summary.get(metric) is not None],
    }
    results = [
        {"type": metric, "name": _METRICS[metric][0], "value": summary[metric]}
        for metric in header["metrics"]
    ]
    if results:
        task = {"type": "image-feature-extraction", "name": "Image retrieval"}
        where = {"type": name, "name": name, "split": split}
        header["model-index"] = [
            {"name": title, "results": [{"task": task, "dataset": where, "metrics": results}]}
        ]
    return _template().render(
        header=header,
        title=title,
        name=name,
        split=split,
        spec=spec,
        fingerprint=fingerprint,
        preprocessing=preprocessing,
        about=about,
        data=data,
        summary=summary,
        which=which,
        method=METHODS.get(summary["method"]),
        settings=_setting_rows(settings, summary, backbone),
        metrics=_METRICS,
        floors={name: floor_words(name) for name in floor_order(summary.get("floors", {}))},
        measured=read_verification(folder),
        row=_row,
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        # JSON is YAML, and its quotes keep names with colons whole.
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "number": lambda value: UNKNOWN if value is None else f"{value:,}",
        "plain": _plain,
        "decimals": decimals,
        "human_bytes": human_bytes,
    }
    return environment.get_template("model_card.md")


def _read_run(folder: Path) -> tuple[AnyConfig, Mapping[str, Any], str]:
    """A run's ``config.json``, its summary, and of which round its model is, where not the last."""
    run = run_of(folder)
    about, summaries = read_any_config(run), read_summaries(run)
    if not {"data", "model"} <= about.keys():
        raise RunFolderError(
            f"{folder / 'config.json'}: expected what a run knows of its settings, data and model, "
            "found something else; name the run folder itself"
        )
    best = read_any_config(folder)["config"].get("round") if folder.name == "best" else None
    done = best or newest_round(run / "checkpoint")
    if done and (best or not summaries):
        settings = {**about["config"], **about.get("resolved", {})}
        known = {name: settings.get(name) for name in ("method", "seed", "sample_size")}
        if settings.get("noise"):
            known |= {"noise": settings["noise"], "delta": settings.get("delta")}
        floors = read_scores(run / "floors.json").map_at_10
        records = read_records(run / "records.jsonl", done)
        summary = summarize({**known, "folder": ".", "rounds": done}, records, floors)
        round = f"round {done} of {about['config'].get('rounds', UNKNOWN)}"
        if best:
            split = settings.get("eval_split", "test")
            which = f"These are the weights of {round}: those that did best on the split `{split}`"
            return about, summary, f"{which}, so the results below are a little too good."
        return about, summary, f"The run was not finished: these are its weights of {round}."
    if len(summaries) != 1:
        raise RunFolderError(
            f"{folder}: expected a finished run with a summary.json of one run, found "
            f"{len(summaries)}; start its fedss train command again: it goes on from the last "
            "checkpoint"
        )
    return about, summaries[0], ""


def _setting_rows(
    settings: Mapping[str, Any], summary: Mapping[str, Any], backbone: str
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for option in OPTIONS:
        value = settings.get(option.name, option.default)
        listed = option.group in _GROUPS and option.name != "method" and value != option.default
        if option.name == "sample_size":
            listed, value = True, summary.get("sample_size", UNKNOWN)
        elif option.name == "backbone":
            value = backbone
        if listed or option.name in _SETTINGS:
            # Where a file lay on some machine is nobody's business.
            shown = Path(value).name if isinstance(value, str) and "/" in value else value
            rows.append((f"`{option.name}`", f"`{_plain(shown)}`", _plain(option.help)))
    return rows


def _row(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(value: object) -> str:
    """Text of one line, without what would end a code span or no YAML may hold."""
    return "".join(c if c.isprintable() else " " for c in str(value)).replace("`", "'")
