"""Commands that use a trained model."""

import argparse
import dataclasses
import json
import sys
import webbrowser
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedss.cli.options import (
    BACKBONE,
    INDEX,
    JSON,
    RUN,
    SKIP_BROKEN,
    THRESHOLD,
    TRUST,
    argument,
    check_stored,
    command,
    config_options,
    flag,
    given,
    own_code,
    setting,
    with_data_at_path,
)
from fedss.cli.output import say
from fedss.config import Config, config_from_dict
from fedss.errors import ConfigError, RunFolderError
from fedss.text import DASH, counted, decimals

if TYPE_CHECKING:
    from fedss.data import Dataset
    from fedss.evaluation.verification import Verification
    from fedss.models import Embedder
    from fedss.search import Collection, Match


@command(
    "RUN [OPTIONS]",
    RUN,
    TRUST,
    BACKBONE,
    argument(
        "--far",
        "NUMBER",
        "false-accept rates at which to give the true-accept rate (default: 0.1 0.01 0.001 0.0001)",
        nargs="+",
        type=float,
    ),
    flag("--json", "print all results, with the ROC curve, as JSON"),
    config_options(groups=("data",), stored=False),
)
def evaluate(options: argparse.Namespace) -> None:
    """Measure retrieval, verification and identification with a trained model."""
    from fedss.cli.tables import print_evaluation
    from fedss.evaluation.baselines import data_floors
    from fedss.evaluation.intervals import interval
    from fedss.evaluation.task import check_tellable, embed_task, judge, verify
    from fedss.evaluation.verification import FARS
    from fedss.inference.model import load
    from fedss.models import embed_pixels
    from fedss.runs.about import read_any_config, run_of
    from fedss.runs.findings import read_scores
    from fedss.training.build import evaluation_task

    fars, run = options.far or FARS, Path(options.folder)
    if not all(0 < far <= 1 for far in fars):
        raise ConfigError(
            "--far: expected shares above 0 and at most 1, such as 0.001, got "
            + ", ".join(map(str, fars))
        )
    embedder = load(run, **own_code(options))
    config, data, own = _data_to_evaluate(options, embedder)
    task = evaluation_task(config, data)
    check_tellable(task, data.name, config.test_classes, config.eval_split)
    embedded = embed_task(partial(embed_pixels, embedder), task)
    evaluation, measured = judge(task, embedded), verify(task, embedded, config.data_seed, fars)
    assert evaluation.metrics is not None
    assert evaluation.by_class is not None
    assert measured is not None
    ends = interval([evaluation.by_class])
    floors = data_floors(task)
    if own and (run / "floors.json").exists():
        floors |= read_scores(run / "floors.json")
    if options.json:
        figures = {
            **evaluation.metrics,
            "map_at_10_interval": ends and [ends.low, ends.high],
            "floors": floors.map_at_10,
            "verification": dataclasses.asdict(measured),
        }
        print(json.dumps(figures, indent=2))
    else:
        if not own:
            say(f"images of {data.name}, other than the run's own")
        print_evaluation(evaluation.metrics, ends, floors.map_at_10, dataclasses.asdict(measured))
    # Of other images it would not be the run's, and of a round in between not of its model.
    done = (run_of(run) / "summary.json").exists() and run.name != "model"
    trained_with = read_any_config(run_of(run))["config"].get("eval_split", "test")
    as_trained = own and config.eval_split == trained_with
    _keep_measured(run, measured, writes=as_trained and done and not options.far)


def _data_to_evaluate(
    options: argparse.Namespace, embedder: "Embedder"
) -> tuple[Config, "Dataset", bool]:
    """The run's configuration and data with what was given in their place; whether it is its own.

    Raises:
        ConfigError: the run's own images are not at hand, and no others are named.
    """
    from fedss.cli.tables import say_left_out
    from fedss.data import data_fingerprint
    from fedss.runs.about import read_any_config, run_of
    from fedss.training.build import load_data
    from fedss.training.summary import why_not_own

    run = run_of(Path(options.folder))
    about = read_any_config(run)
    known = about.get("data", {})
    shape = {"image_size": embedder.spec.image_size, "channels": embedder.spec.channels}
    check_stored(about["config"], f"{run}/config.json")
    # Nothing is chosen here: the test will do for a run that had to have a validation split.
    values = {**about["config"], "patience": None, **shape, **given(options)}
    config = config_from_dict(with_data_at_path(values, options))
    other = why_not_own(options.folder, known, config.data)
    if known.get("name") != config.data and not given(options):
        raise ConfigError(other)
    # Classes that the run held out stay out, whatever it is judged on now.
    trained_with = about["config"].get("eval_split", config.eval_split)
    data = load_data(dataclasses.replace(config, eval_split=trained_with))
    say_left_out(data.skipped, data.unpaired, data.passed_over, data.remarks)
    own = known.get("fingerprint") == data_fingerprint(data)
    if not own and not given(options):
        raise ConfigError(other)
    if not own and data.test is not None and "eval_split" not in given(options):
        # A part of other images' classes would be judged, as if the rest had been trained on.
        config = dataclasses.replace(config, eval_split="test")
    return config, data, own


def _keep_measured(run: Path, measured: "Verification", writes: bool) -> None:
    """Write ``verification.json`` where there is none that can be read."""
    from fedss.runs.findings import VERIFICATION, read_verification, write_verification

    try:
        if read_verification(run) is not None:
            return
    except RunFolderError as error:
        if not writes:
            say(error, file=sys.stderr)
    if writes:
        try:
            write_verification(run, measured)
        except OSError as error:
            say(f"{run / VERIFICATION} cannot be written: {error}", file=sys.stderr)


@command(
    "RUN IMAGES --out FILE",
    RUN,
    TRUST,
    BACKBONE,
    argument("images", "IMAGES", "folder of images, or CSV file with the column 'image'"),
    argument(
        "--out",
        "FILE",
        "file to write: FILE.npy (the names go to FILE.names.json) or FILE.parquet",
        required=True,
    ),
    SKIP_BROKEN,
)
def embed(options: argparse.Namespace) -> None:
    """Write embeddings of images, with their file names."""
    from fedss.cli.tables import say_left_out
    from fedss.inference.embedding import embed_files, list_images, write_embeddings
    from fedss.inference.model import load

    embedder = load(options.folder, **own_code(options))
    images = list_images(Path(options.images))
    if not options.skip_broken:
        images.check_files()
    result = embed_files(
        embedder, images.paths, names=images.names, skip_broken=options.skip_broken
    )
    say_left_out(result.skipped, (), images.passed_over, images.remarks)
    written = write_embeddings(Path(options.out), result)
    say(f"{counted(len(result.names), 'embedding')} of size {result.embeddings_ND.shape[1]}")
    say(*written)


@command(
    "RUN --format FORMAT [--out DIR]",
    RUN,
    TRUST,
    BACKBONE,
    argument("--format", "FORMAT", "file format: onnx, safetensors or torch-export", required=True),
    argument("--out", "DIR", "folder for the file and its model card (default: RUN/export)"),
)
def export(options: argparse.Namespace) -> None:
    """Write a trained model as a file for other programs."""
    from fedss.inference.export import CARD, export

    path = export(options.folder, options.format, options.out, **own_code(options))
    say(f"model  {path}", f"card   {path.with_name(CARD)}")


@command(
    "RUN IMAGES [OPTIONS]",
    RUN,
    TRUST,
    BACKBONE,
    argument(
        "images",
        "IMAGES",
        "folder of images, or CSV file with the column 'image' and, optionally, 'label'",
    ),
    INDEX,
    SKIP_BROKEN,
    flag("--replace", "embed all images anew, in place of an index of another model or images"),
)
def index(options: argparse.Namespace) -> None:
    """Build an index to search images with, or bring it up to date."""
    from fedss.cli.tables import say_left_out
    from fedss.data.names import look_alikes
    from fedss.search import build_collection

    collection = build_collection(
        options.folder,
        options.images,
        _index_folder(options),
        skip_broken=options.skip_broken,
        replace=options.replace,
        **own_code(options),
    )
    remarks = (*collection.remarks, *look_alikes(collection.classes, "classes"))
    say_left_out(collection.skipped, (), collection.passed_over, remarks)
    enrolled = (
        f", and {len(collection) - collection.indexed:,} enrolled ones"
        if collection.enrolled
        else ""
    )
    say(
        f"{counted(collection.indexed, 'image')}{enrolled}; "
        f"{counted(len(collection.classes), 'class')}; {counted(collection.embedded, 'image')} "
        f"{'was' if collection.embedded == 1 else 'were'} new or changed",
        collection.folder,
    )


def _index_folder(options: argparse.Namespace) -> Path:
    return Path(options.index or Path(options.folder) / "index")


def _open(options: argparse.Namespace) -> "Collection":
    from fedss.search import open_collection

    return open_collection(_index_folder(options), options.folder, **own_code(options))


@command(
    "RUN IMAGE ... [OPTIONS]",
    RUN,
    TRUST,
    BACKBONE,
    argument("images", "IMAGE", "image to search with", nargs="+"),
    INDEX,
    setting("--count", 10, "number of matches for each image"),
    setting("--expand", 0, "move each query towards so many of its matches first, such as 2"),
    JSON,
    argument("--show", "FILE.html", "write the matches as a web page that shows the images"),
)
def search(options: argparse.Namespace) -> None:
    """Find the images of an index that are nearest to each IMAGE."""
    from fedss.cli.tables import cell, make_table, print_table

    collection = _open(options)
    results = collection.search(collection.embed(options.images), options.count, options.expand)
    if options.show is not None:
        from fedss.files import write_file, writing
        from fedss.search.web.page import neighbours_page

        page = neighbours_page(collection, options.images, results)
        with writing(Path(options.show), "choose another place (--show)"):
            write_file(Path(options.show), page.encode())

    def content(match: "Match") -> dict[str, Any]:
        path = collection.path(match.position)
        return {**dataclasses.asdict(match), "path": str(path) if path else None}

    by_query = list(zip(options.images, results, strict=True))
    if options.json:
        rows = [{"picture": name, "matches": [*map(content, each)]} for name, each in by_query]
        print(json.dumps(rows, indent=2))
        return
    for name, matches in by_query:
        say(f"nearest to {name} in {collection.source}")
        table = make_table(None, ">score", "class", "image")
        for match in matches:
            label = DASH if match.label is None else match.label
            table.add_row(decimals(match.score), cell(label), cell(match.name))
        print_table(table)
    if options.show is not None:
        say(options.show)


@command(
    "RUN CLASS IMAGE ... [OPTIONS]",
    RUN,
    TRUST,
    BACKBONE,
    argument("label", "CLASS", "name of the class"),
    argument("images", "IMAGE", "image of the class", nargs="*"),
    INDEX,
    flag("--remove", "remove the enrolled images of the class; give no IMAGE"),
)
def enrol(options: argparse.Namespace) -> None:
    """Add a class to an index from a few images."""
    from fedss.search import enrol, remove

    if options.remove and options.images:
        raise ConfigError("--remove takes a whole class out: give no images with it")
    collection = _open(options)
    if options.remove:
        collection = remove(collection, options.label)
        done = f"removed the enrolled images of {options.label}"
    else:
        collection = enrol(collection, options.label, options.images)
        done = f"enrolled {counted(len(options.images), 'image')} of {options.label}"
    say(f"{done}; {counted(len(collection.classes), 'class')} now")


@command(
    "RUN IMAGE ... [OPTIONS]",
    RUN,
    TRUST,
    BACKBONE,
    argument("images", "IMAGE", "image to identify", nargs="+"),
    INDEX,
    THRESHOLD,
    JSON,
)
def identify(options: argparse.Namespace) -> None:
    """Name the class that an image shows, or say that it is unknown."""
    from fedss.cli.tables import cell, make_table, print_table
    from fedss.search import identify, stored_threshold, why_no_threshold

    collection = _open(options)
    if options.threshold is None:
        stored = stored_threshold(options.folder)
        if stored is None:
            raise ConfigError(why_no_threshold(options.folder))
        threshold, about = stored.threshold, stored.worth(len(collection.classes))
    else:
        threshold, about = options.threshold, "as given"
    identities = identify(collection, collection.embed(options.images), threshold)
    named = list(zip(options.images, identities, strict=True))
    if options.json:
        rows = [{"picture": name, **dataclasses.asdict(identity)} for name, identity in named]
        print(json.dumps({"threshold": threshold, "pictures": rows}, indent=2))
        if threshold > 1:
            print(about, file=sys.stderr)
        return
    least = about if threshold > 1 else f"threshold {threshold:.3f} ({about})"
    say(f"among {counted(len(collection.classes), 'class')}, {least}")
    table = make_table(None, "image", "class", "nearest", ">score")
    for name, identity in named:
        label = "unknown" if identity.label is None else identity.label
        table.add_row(*map(cell, (name, label, identity.nearest)), decimals(identity.score))
    print_table(table)


@command(
    "OUT [--watch]",
    argument("folder", "OUT", "folder of a run or of a comparison"),
    flag("--watch", "keep updating the report until training is done"),
)
def report(options: argparse.Namespace) -> None:
    """Write report.html for a run or a comparison."""
    from fedss.report import write_report
    from fedss.report.watch import watch_report

    folder = Path(options.folder)
    if options.watch:
        watch_report(folder, say)
    else:
        say(write_report(folder))


@command(
    "RUN [OPTIONS]",
    argument("folder", "RUN", "run folder with an index (see fedss index)"),
    TRUST,
    BACKBONE,
    INDEX,
    THRESHOLD,
    argument(
        "--host",
        "TEXT",
        "address to listen on; 0.0.0.0 admits other machines, without a password "
        "(default: 127.0.0.1, this machine alone)",
        default="127.0.0.1",
    ),
    setting("--port", 8600, "port to listen on; 0 picks a free one"),
    setting("--max-upload-mb", 20.0, "largest image file to accept, in megabytes"),
    setting("--max-upload-megapixels", 25.0, "largest image to accept, in millions of pixels"),
    flag("--open", "open the page in the browser"),
)
def serve(options: argparse.Namespace) -> None:
    """Serve a web page for searching by image, browsing and enrolling."""
    from fedss.search import stored_threshold
    from fedss.search.web import app, guard

    measured = stored_threshold(options.folder) if options.threshold is None else None
    limits = guard.make_limits(
        options.max_upload_mb, options.threshold, measured, options.max_upload_megapixels
    )
    with guard.listen(options.host, options.port) as listener:
        collection = _open(options)
        title, address = Path(options.folder).resolve().name, guard.address_of(listener)
        if not guard.is_loopback(listener):
            say(
                f"warning: --host {options.host} lets other machines in. Whoever reaches port "
                f"{listener.getsockname()[1]} sees all images and can enrol and remove classes: "
                "there is no password and no encryption",
                file=sys.stderr,
            )
        say(f"{counted(len(collection), 'image')} at {address}  (Ctrl-C stops)")
        if options.open:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            app.serve(collection, title, listener, options.host, limits)
    say("stopped")
