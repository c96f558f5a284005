"""A run's model card: Markdown with the YAML header that model hubs read, from what the run left.

Nothing is made up: what neither configuration nor records tell stands there as unknown, or as the
owner's to fill in (Mitchell et al. 2018, arXiv 1810.03993, says what belongs into such a card).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedss.config import OPTIONS
from fedss.errors import RunFolderError
from fedss.evaluation.intervals import FLOORS
from fedss.evaluation.verification import Verification
from fedss.files import read_json
from fedss.losses.methods import METHODS
from fedss.models import EmbedderSpec
from fedss.runs.findings import read_verification
from fedss.runs.summaries import read_summaries
from fedss.text import human_bytes

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
    class_row_lr scale server_optimizer server_lr seed
""".split()  # noqa: SIM905
_GROUPS = ("method", "model", "training", "wire", "server")


def model_card(folder: Path, spec: EmbedderSpec, fingerprint: str, preprocessing: str) -> str:
    """The card of a finished run's model.

    Args:
        folder: the run folder.
        spec: what the model is built from.
        fingerprint: the model's.
        preprocessing: what is to be done to an image before the model gets it.

    Raises:
        RunFolderError: a configuration or a summary that is missing, damaged or of no single run.
    """
    about, summary = _facts(folder)
    data, settings = about["data"], about["config"]
    method = METHODS.get(summary["method"])
    name = _plain(data.get("name", UNKNOWN))
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
        where = {"type": name, "name": name, "split": settings.get("eval_split", "test")}
        header["model-index"] = [
            {"name": title, "results": [{"task": task, "dataset": where, "metrics": results}]}
        ]
    # JSON is YAML, and its quotes keep names with colons whole.
    yaml = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()]
    parts = [
        "\n".join(["---", *yaml, "---"]),
        f"# {title}",
        f"Maps an image to a vector of {spec.embedding_size} numbers and length 1; the nearer two "
        "vectors (cosine), the likelier two images show the same class, also a class that "
        "training never saw. Made for search: given an image, find others of the same thing.",
        "## Data",
        _table(("", ""), _data_rows(data)),
        "What is in the images, who labelled them and who consented to their use: "
        f"{UNKNOWN} to the program that wrote this card; for the owner to fill in.",
        "## Training",
        f"Method `{_plain(summary['method'])}`: {method.summary if method else UNKNOWN}.",
        _table(("setting", "value", "what it is"), _setting_rows(settings, summary, backbone)),
        "## Results",
        *_results(data, settings, summary),
        "## Thresholds",
        *_thresholds(read_verification(folder), settings),
        "## What training moved",
        *_traffic(summary),
        "## Limits",
        *_LIMITS,
        "## Preprocessing",
        preprocessing,
        "```python\n" + _pixels_code(spec) + "```",
        "## Loading",
        *_loading(spec),
        "## Versions",
        _table(("", ""), _version_rows(about, fingerprint)),
        "## Licence",
        "Not stated: the owner of images and model fills it in here, and as `license` above.",
    ]
    return "\n\n".join(parts) + "\n"


def _facts(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    about, summaries = read_json(folder / "config.json"), read_summaries(folder)
    if not isinstance(about, dict) or not all(
        isinstance(about.get(part), dict) for part in ("config", "data", "model")
    ):
        raise RunFolderError(
            f"{folder / 'config.json'}: expected what a run knows of its settings, data and model, "
            "found something else; name the run folder itself"
        )
    if len(summaries) != 1:
        raise RunFolderError(
            f"{folder}: expected a finished run with a summary.json of one run, found "
            f"{len(summaries)}; start its fedss train command again: it goes on from the last "
            "checkpoint"
        )
    return about, summaries[0]


def _data_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    low, median, high = data.get("own_classes") or [None] * 3
    own = UNKNOWN if low is None else f"{low} to {high}, median {median:g}"
    shape = data.get("image_shape")
    size = UNKNOWN if shape is None else "{} x {} x {} (channels, height, width)".format(*shape)
    rows: list[tuple[str, ...]] = [
        ("data set", _plain(data.get("name", UNKNOWN))),
        ("training images", _number(data.get("train_images"))),
        ("training classes", _number(data.get("train_classes"))),
        ("clients", _number(data.get("train_clients"))),
        ("classes per client", own),
        ("images, as trained on", size),
        ("images left out as unreadable", _number(data.get("skipped_pictures"))),
    ]
    if "fingerprint" in data:
        rows.append(("fingerprint of the data", f"`{data['fingerprint']}`"))
    if "train_images" not in data:
        rows.append(("why unknown", "images stayed at their sites, and these counts with them"))
    return rows


def _setting_rows(
    settings: Mapping[str, Any], summary: Mapping[str, Any], backbone: str
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for option in OPTIONS:
        value = settings.get(option.name, option.default)
        told = option.group in _GROUPS and option.name != "method" and value != option.default
        if option.name == "sample_size":
            told, value = True, summary.get("sample_size", UNKNOWN)
        elif option.name == "backbone":
            value = backbone
        elif value is None and settings.get("method") in METHODS:
            # Some defaults are the method's.
            value = getattr(METHODS[settings["method"]], option.name, None)
        if told or option.name in _SETTINGS:
            # Where a file lay on some machine is nobody's business.
            shown = Path(value).name if isinstance(value, str) and "/" in value else value
            rows.append((f"`{option.name}`", f"`{_plain(shown)}`", _plain(option.help)))
    return rows


def _results(
    data: Mapping[str, Any], settings: Mapping[str, Any], summary: Mapping[str, Any]
) -> list[str]:
    known = [metric for metric in _METRICS if summary.get(metric) is not None]
    if not known:
        return [f"{UNKNOWN.capitalize()}: nobody could evaluate the model."]
    queries, skipped = summary.get("queries"), summary.get("skipped")
    among = "each among all the others"
    if data.get("test_gallery") is not None:
        among = f"among {data['test_gallery']:,} gallery images"
    elif "test_queries" not in data:
        among = f"evaluated at: {data.get('evaluated_at', UNKNOWN)}"
    classes, seen = _number(data.get("test_classes")), _number(data.get("test_classes_seen"))
    rows = [(_METRICS[m][0], f"{summary[m]:.4f}", _METRICS[m][1]) for m in known]
    if summary.get("map_at_10_interval"):
        low, high = summary["map_at_10_interval"]
        words = "95 % interval of MAP@10: bootstrap over classes"
        rows.append(("MAP@10, 95 %", f"{low:.4f} to {high:.4f}", words))
    rows += [
        (f"MAP@10, {FLOORS[name]}", f"{value:.4f}", "for comparison: to be had without training")
        for name, value in summary.get("floors", {}).items()
        if name in FLOORS
    ]
    return [
        _table(("metric", "value", "what it is"), rows),
        f"{_number(queries)} queries of the split `{settings.get('eval_split', 'test')}` "
        f"({among}), {_number(skipped)} more left out for want of anything to find; {classes} "
        f"classes, {seen} of them seen in training. One run with one seed; whether settings were "
        f"chosen on these images is {UNKNOWN}.",
    ]


def _thresholds(found: Verification | None, settings: Mapping[str, Any]) -> list[str]:
    if found is None:
        return [
            f"{UNKNOWN.capitalize()}: no `verification.json` lay beside the run. `fedss evaluate` "
            "measures them where there are test images of two classes or more."
        ]
    few = "; these are fewer than 30, so it is a rough figure"
    rows = [
        (
            "EER",
            f"{found.eer:.4f}",
            f"{found.eer_threshold:.4f}",
            "equal error rate: the share of pairs of two classes that are accepted, where as large "
            "a share of pairs of one class is refused",
        )
    ]
    for at in found.points:
        means = "share of pairs of one class accepted, where at most "
        means += f"{at.far:g} of those of two are{'' if at.supported else few}"
        rows.append((f"TAR at FAR {at.far:g}", f"{at.tar:.4f}", f"{at.threshold:.4f}", means))
    counted = (
        f"{found.genuine:,} pairs of images of one class and {found.impostor:,} of two, of the "
        f"split `{settings.get('eval_split', 'test')}`. A pair is accepted as one class if its "
        "cosine reaches the threshold."
    )
    known = found.identification
    if known is not None:
        means = (
            "share of images of enrolled classes that get the right name, where at most "
            f"{known.fpir:g} of the images of other classes get any"
        )
        means += "" if known.supported else few
        dir_at = f"DIR at FPIR {known.fpir:g}"
        rows.append((dir_at, f"{known.dir:.4f}", f"{known.threshold:.4f}", means))
        counted += (
            f" DIR is that of {known.enrolled:,} enrolled classes, drawn {known.draws:,} times; "
            "with more classes, more images of others get a name at the same threshold."
        )
    return [_table(("figure", "value", "threshold", "what it is"), rows), counted]


def _traffic(summary: Mapping[str, Any]) -> list[str]:
    down = summary.get("bytes_down_per_client_round")
    if down is None:
        return ["No federated message: images were pooled."]
    rows = [
        (label, *(human_bytes(summary.get(f"{part}bytes_{way}_per_client_round")) for way in ways))
        for ways in [("down", "up")]
        for label, part in (("all", ""), ("backbone", "backbone_"), ("class rows", "class_row_"))
    ]
    sentences = ["Per client and round, as serialised:", _table(("", "down", "up"), rows)]
    if summary.get("class_rows_per_client") is not None:
        sentences.append(f"Class rows per client: {summary['class_rows_per_client']:,.1f}.")
    return sentences


_LIMITS = [
    "- FedSS is not a privacy method: the server sees which classes a client asks for, and updates "
    "travel in the clear unless something else protects them. Nothing is known about what of the "
    "training images could be drawn out of these weights.\n"
    "- The figures above hold for images like those that were tested. For other cameras, places, "
    "classes or people they are unknown, and so are biases: none was looked for.\n"
    '- A cosine is no probability. A threshold for "the same" or "unknown" has to be chosen on '
    "images of your own, also where some stand above.\n"
    "- Only the central square of an image is seen, at the size stated below.\n"
    "- Not for recognising or following people without their consent, nor for decisions about "
    "people.",
]


def _pixels_code(spec: EmbedderSpec) -> str:
    size, channels = spec.image_size, spec.channels
    mode = "RGB" if channels == 3 else "L"
    return f'''import numpy as np
from PIL import Image, ImageOps


def pixels(path):
    """uint8 [1, {channels}, {size}, {size}]"""
    with Image.open(path) as image:
        image.draft(None, ({2 * size}, {2 * size}))  # JPEG: decode at a fraction of its size
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("{mode}"), ({size}, {size}), Image.Resampling.BILINEAR)
    return np.array(image).reshape(1, {size}, {size}, {channels}).transpose(0, 3, 1, 2).copy()
'''


def _loading(spec: EmbedderSpec) -> list[str]:
    own = spec.backbone is None
    net = ", backbone=net)  # net: a module of the same structure" if own else ")"
    return [
        "The model may lie here in up to three files; `fedss export RUN --format FORMAT` writes "
        "each. With fedss, `model.safetensors`:",
        f'```python\nimport fedss\n\nmodel = fedss.load("model.safetensors"{net}\n'
        'embeddings = fedss.embed_files(model, ["photo.jpg"]).embeddings_ND\n```',
        "With onnxruntime, `model.onnx`, and `pixels` from above:",
        "```python\nimport onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("model.onnx")\n'
        '(embeddings,) = session.run(None, {"pixels": pixels("photo.jpg")})\n```',
        "With torch alone, `model.pt2`, and `pixels` from above:",
        "```python\nimport torch\n\n"
        'model = torch.export.load("model.pt2").module()\n'
        'embeddings = model(torch.from_numpy(pixels("photo.jpg")))\n```',
    ]


def _version_rows(about: Mapping[str, Any], fingerprint: str) -> list[tuple[str, ...]]:
    names = ("fedss", "torch", "numpy", "python")
    return [
        *((f"{name}, in training", _plain(about.get(name, UNKNOWN))) for name in names),
        ("fingerprint of the model", f"`{fingerprint}`"),
    ]


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _plain(value: object) -> str:
    """Text of one line, without what would end a code span or no YAML may hold."""
    return "".join(c if c.isprintable() else " " for c in str(value)).replace("`", "'")
