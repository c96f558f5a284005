"""The command line: arguments and printing only."""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedss.cli.output import lasting_output
from fedss.config import OPTIONS, Config, Option, config_from_dict, variant
from fedss.distributed import join, this_rank
from fedss.errors import ConfigError, FedssError, LostRankError, RunFolderError
from fedss.flower.settings import DEPLOYMENT_FIELDS, Deployment, write_app
from fedss.losses.methods import METHODS
from fedss.text import counted, encodable, printable

if TYPE_CHECKING:
    from fedss.data import Dataset
    from fedss.evaluation.intervals import Interval


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 2 a mistake to mend, 1 a rank lost, 130 interrupted.

    Where torchrun has started several of it, the first speaks for all. Output that nobody reads
    any more changes neither what is done nor the code.
    """
    with lasting_output() as written:
        code = _run(arguments)
        sys.stdout.flush()
        if written is not None and written.error is not None:
            print(f"fedss: cannot write its output: {written.error.strerror}", file=sys.stderr)
            code = code or 2
    return code


def _run(arguments: Sequence[str] | None) -> int:
    stderr = sys.stderr
    try:
        ranks = this_rank()
    except ConfigError as error:
        print(f"fedss: {printable(str(error))}", file=stderr)
        return 2
    command, met = "fedss", False
    with nullcontext() if ranks.first else _silence():
        try:
            with join():
                met = True
                options = _parser().parse_args(arguments)
                command = f"fedss {options.command}"
                options.run(options)
        except FedssError as error:
            if ranks.size > 1:
                # torchrun tells the others to end as soon as one has: not before this is said.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            lost = isinstance(error, LostRankError)
            # Whoever is there speaks then: it may be the first that is not.
            speaks = stderr if lost or not met else sys.stderr
            print(f"{command}: {printable(str(error))}", file=speaks)
            return 1 if lost else 2
        except (MemoryError, RuntimeError) as error:
            if not _lacks_memory(error):
                raise
            said = printable(str(error).partition("\n")[0]) or type(error).__name__
            print(
                f"{command}: not enough memory ({said}): take "
                "smaller pictures (--image-size), a smaller network (--backbone, "
                "--embedding-size) or smaller batches (--batch-size)",
                file=stderr,
            )
            return 2
        except UnicodeEncodeError as error:
            # No output fails so: it is the name of a file.
            print(
                f"{command}: the name {printable(str(error.object))} has letters that this "
                f"system's encoding, {sys.getfilesystemencoding()}, lacks: set LC_ALL=C.UTF-8 (or "
                "PYTHONUTF8=1)",
                file=stderr,
            )
            return 2
        except KeyboardInterrupt:
            again = command.removeprefix("fedss ") in ("train", "compare", "index")
            then = "; start the same command again to go on" if again else ""
            print(f"\nfedss: interrupted{then}", file=sys.stderr)
            return 130
    return 0


def _lacks_memory(error: BaseException) -> bool:
    """Whether Python, NumPy, torch's GPU or, as a plain RuntimeError, its CPU has no more of it."""
    import torch

    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "not enough memory" in str(error) or "allocate memory" in str(error)


@contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedss",
        description="Federated Sampled Softmax: image embeddings from pictures that stay where "
        "they are, with very many classes.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], None], usage: str, help: str
    ) -> argparse.ArgumentParser:
        name, usage = run.__name__.strip("_"), f"fedss {run.__name__.strip('_')} {usage}"
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            usage=usage,
            epilog=_METHODS if name in ("train", "compare") else None,
            formatter_class=_help_formatter,
        )
        sub.set_defaults(run=run)
        return sub

    train = command(
        _train, "[OPTIONS] --out DIR", "train one model, or go on with an interrupted run"
    )
    _add_config(train)
    _add_out(train)

    compare = command(
        _compare,
        "[OPTIONS] --methods METHOD ... --seeds INT ... --out DIR",
        "train several methods with several seeds and report on them",
    )
    compare.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="methods to compare, or variants such as fedss:sampler=uniform,rows_up=int8 "
        "(default: full fedss fedss-uncorrected pos-only)",
    )
    compare.add_argument(
        "--seeds", nargs="+", type=int, metavar="INT", help="seeds of each method (default: 0)"
    )
    _add_config(compare, without=("method", "seed"))
    _add_out(compare)

    evaluate = command(
        _evaluate,
        "RUN [OPTIONS]",
        "retrieval, verification and identification with a trained model",
    )
    evaluate.add_argument("folder", metavar="RUN", help="a run folder")
    evaluate.add_argument(
        "--far",
        nargs="+",
        type=float,
        metavar="NUMBER",
        help="rates of false accepts to give the TAR at (default: 0.1 0.01 0.001 0.0001)",
    )
    evaluate.add_argument("--json", action="store_true", help="all figures, and the ROC, as JSON")
    _add_config(evaluate, groups=("data",), config=False)

    embed = command(
        _embed, "RUN PICTURES --out FILE", "embeddings of pictures, with their file names"
    )
    embed.add_argument("folder", metavar="RUN", help="a run folder")
    embed.add_argument("pictures", metavar="PICTURES", help="a folder, or a CSV with 'image'")
    embed.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="FILE.npy (and FILE.names.json) or FILE.parquet",
    )
    embed.add_argument(
        "--skip-broken", action="store_true", help="leave out and count unreadable pictures"
    )

    export = command(
        _export, "RUN --format FORMAT [--out DIR]", "a trained model as a file for other programs"
    )
    export.add_argument("folder", metavar="RUN", help="a run folder")
    export.add_argument(
        "--format", required=True, metavar="FORMAT", help="onnx, safetensors or torch-export"
    )
    export.add_argument(
        "--out", metavar="DIR", help="folder for it and its model card (default: RUN/export)"
    )

    index = command(
        _index, "RUN PICTURES [OPTIONS]", "make pictures searchable, or bring them up to date"
    )
    index.add_argument("folder", metavar="RUN", help="a run folder")
    index.add_argument(
        "pictures", metavar="PICTURES", help="a folder, or a CSV with 'image' and perhaps 'label'"
    )
    _add_index(index)
    index.add_argument(
        "--skip-broken", action="store_true", help="leave out and count unreadable pictures"
    )

    search = command(_search, "RUN PICTURE ... [OPTIONS]", "the nearest pictures of an index")
    search.add_argument("folder", metavar="RUN", help="a run folder")
    search.add_argument("pictures", metavar="PICTURE", nargs="+", help="what to look for")
    _add_index(search)
    search.add_argument(
        "--count", type=int, default=10, metavar="INT", help="how many to find (default: 10)"
    )
    search.add_argument("--json", action="store_true", help="print JSON, for scripts")
    search.add_argument("--show", metavar="FILE.html", help="write them as a page with pictures")

    enrol = command(
        _enrol, "RUN CLASS PICTURE ... [OPTIONS]", "add a class to an index from a few pictures"
    )
    enrol.add_argument("folder", metavar="RUN", help="a run folder")
    enrol.add_argument("label", metavar="CLASS", help="its name")
    enrol.add_argument("pictures", metavar="PICTURE", nargs="*", help="pictures of it")
    _add_index(enrol)
    enrol.add_argument(
        "--remove", action="store_true", help="remove the enrolled pictures of the class instead"
    )

    identify = command(
        _identify, "RUN PICTURE ... [OPTIONS]", "the class that a picture shows, or unknown"
    )
    identify.add_argument("folder", metavar="RUN", help="a run folder")
    identify.add_argument("pictures", metavar="PICTURE", nargs="+", help="what to look at")
    _add_index(identify)
    identify.add_argument(
        "--threshold",
        type=float,
        metavar="NUMBER",
        help="least cosine, below it is unknown (default: that of RUN/verification.json)",
    )
    identify.add_argument("--json", action="store_true", help="print JSON, for scripts")

    report = command(_report, "OUT [--watch]", "write report.html for a run or a comparison")
    report.add_argument("folder", metavar="OUT", help="the folder of a run or a comparison")
    report.add_argument(
        "--watch", action="store_true", help="write it again as records come in, until all is done"
    )

    serve = command(
        _serve, "RUN [OPTIONS]", "a web page of this machine: search by picture, browse, enrol"
    )
    serve.add_argument("folder", metavar="RUN", help="a run folder with an index (fedss index)")
    _add_index(serve)
    serve.add_argument(
        "--threshold",
        type=float,
        metavar="NUMBER",
        help="least cosine, below it is unknown (default: that of RUN/verification.json)",
    )
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="TEXT",
        help="address to listen on; 0.0.0.0 lets other machines in, without a password "
        "(default: 127.0.0.1, this machine alone)",
    )
    serve.add_argument(
        "--port",
        type=int,
        default=8600,
        metavar="INT",
        help="port to listen on; 0: any free one (default: 8600)",
    )
    serve.add_argument(
        "--max-upload-mb",
        type=float,
        default=20.0,
        metavar="NUMBER",
        help="largest picture that is taken, in megabytes (default: 20)",
    )
    serve.add_argument(
        "--max-upload-megapixels",
        type=float,
        default=25.0,
        metavar="NUMBER",
        help="picture of most pixels that is taken, in millions (default: 25)",
    )
    serve.add_argument("--open", action="store_true", help="open the page in the browser")

    app = command(
        _app,
        "DIR --out PATH [OPTIONS]",
        "write the app folder of a real federation, to submit with flwr run",
    )
    app.add_argument("folder", metavar="DIR", help="the app folder; gets a pyproject.toml")
    _add_deployment(app)
    _add_config(app)

    info = command(_info, "[OPTIONS]", "what is in a data set, and what each method would move")
    info.add_argument(
        "--plot", metavar="FILE.png", help="draw who holds what: pictures, classes, clients"
    )
    _add_config(info)
    return parser


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    """One line per option, also where the terminal is narrower and breaks it."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=42, width=136)


_METHODS = "methods:\n" + "\n".join(
    f"  {method.name:<18} {method.summary}" for method in METHODS.values()
)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the results; holds one experiment"
    )


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", metavar="DIR", help="the index's folder (default: RUN/index)")


def _add_deployment(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("federation")
    for item in DEPLOYMENT_FIELDS:
        group.add_argument(
            "--" + item.name.replace("_", "-"),
            type=type(item.default),
            metavar={int: "INT", float: "NUMBER", str: "TEXT"}[type(item.default)],
            default=argparse.SUPPRESS,
            required=item.name == "out",
            help=item.metadata["help"] + (f" (default: {item.default})" if item.default else ""),
        )


def _add_config(
    parser: argparse.ArgumentParser,
    without: Sequence[str] = (),
    groups: Sequence[str] | None = None,
    config: bool = True,
) -> None:
    if config:
        parser.add_argument(
            "--config",
            metavar="FILE",
            help="start from the config.json of a run; other options override it",
        )
    sections: dict[str, Any] = {}
    for option in OPTIONS:
        if option.name in without or (groups and option.group not in groups):
            continue
        if option.group not in sections:
            sections[option.group] = parser.add_argument_group(option.group)
        _add_option(sections[option.group], option)


def _add_option(parser: Any, option: Option) -> None:
    flag = "--" + option.name.replace("_", "-")
    text = option.help.replace("%", "%%")
    if option.choices:
        text += f": {', '.join(option.choices)}"
    if option.default is not None:
        text += f" (default: {_shown(option.default)})"
    if option.type is bool:
        action = argparse.BooleanOptionalAction
        parser.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
        return
    metavar = {int: "INT", float: "NUMBER", str: "TEXT"}[option.type]
    parser.add_argument(
        flag, type=option.type, metavar=metavar, default=argparse.SUPPRESS, help=text
    )


def _shown(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = {option.name for option in OPTIONS}
    return {name: value for name, value in vars(options).items() if name in names}


def _config(options: argparse.Namespace, stored: Mapping[str, Any] | None = None) -> Config:
    return config_from_dict({**(stored or {}), **_given(options)})


def _stored(options: argparse.Namespace) -> dict[str, Any]:
    """The content of ``--config FILE``, or nothing."""
    if options.config is None:
        return {}
    named = f"--config {options.config}"
    try:
        content = json.loads(Path(options.config).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{named}: cannot read it as JSON: {error}") from error
    return _checked_config(content, named)


def _checked_config(content: Any, named: str) -> dict[str, Any]:
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise ConfigError(f"{named}: expected the config.json of a run, with a 'config' object")
    return content


def _train(options: argparse.Namespace) -> None:
    from fedss.data import seen_classes
    from fedss.training.experiment import load_together, train

    config = _config(options, _stored(options).get("config"))
    data = load_together(config)
    _print_left_out(data.skipped, data.unpaired, data.passed_over, data.remarks)
    _print_found([config], data)
    run = train(config, options.out, data=data)
    if run.already_done:
        _say(f"{options.out} is done: {counted(config.rounds, 'round')}; delete it to train again")
    _print_results([run.summary], seen_classes(data), run.folder)
    _say(f"model   {Path(options.out) / 'model'}", f"report  {Path(options.out) / 'report.html'}")


def _compare(options: argparse.Namespace) -> None:
    from fedss.data import seen_classes
    from fedss.training.experiment import compare, load_together

    stored = _stored(options)
    config = _config(options, stored.get("config"))
    methods = options.methods or stored.get("methods")
    methods = methods or ["full", "fedss", "fedss-uncorrected", "pos-only"]
    seeds = options.seeds or stored.get("seeds") or [0]
    data = load_together(config)
    _print_left_out(data.skipped, data.unpaired, data.passed_over, data.remarks)
    _print_found([variant(config, method) for method in methods], data)
    summaries = compare(config, methods, seeds, options.out, data=data)
    _print_results(summaries, seen_classes(data), Path(options.out))
    _say(f"summary  {Path(options.out) / 'summary.json'}")
    _say(f"report   {Path(options.out) / 'report.html'}")


def _evaluate(options: argparse.Namespace) -> None:
    from fedss.data import data_fingerprint
    from fedss.evaluation.baselines import data_floors
    from fedss.evaluation.evaluate import check_tellable, embed_task, judge, verify
    from fedss.evaluation.intervals import interval
    from fedss.evaluation.verification import FARS
    from fedss.files import read_json
    from fedss.inference.model import load
    from fedss.models import embed_pixels
    from fedss.runs.findings import read_scores, read_verification, write_verification
    from fedss.training.build import evaluation_task, load_data
    from fedss.training.summary import why_not_own

    fars = options.far or FARS
    if not all(0 < far <= 1 for far in fars):
        raise ConfigError(
            "--far: expected shares above 0 and at most 1, such as 0.001, got "
            + ", ".join(map(str, fars))
        )
    embedder = load(options.folder)
    path = Path(options.folder) / "config.json"
    about = _checked_config(read_json(path), str(path))
    known: dict[str, Any] = about["data"] if isinstance(about.get("data"), dict) else {}
    shape = {"image_size": embedder.spec.image_size, "channels": embedder.spec.channels}
    config = _config(options, {**about["config"], **shape})
    other = why_not_own(options.folder, known, config.data)
    if known.get("name") != config.data and not _given(options):
        raise ConfigError(other)
    data = load_data(config)
    _print_left_out(data.skipped, data.unpaired, data.passed_over, data.remarks)
    own = known.get("fingerprint") == data_fingerprint(data)
    if not own and not _given(options):
        raise ConfigError(other)
    task = evaluation_task(config, data)
    check_tellable(task, data.name, config.test_classes)
    embedded = embed_task(partial(embed_pixels, embedder), task)
    found = judge(task, embedded)
    assert found.metrics is not None
    assert found.by_class is not None
    ends = interval([found.by_class])
    floors = data_floors(task)
    if own:
        floors |= read_scores(Path(options.folder) / "floors.json")
    measured = verify(task, embedded, config.data_seed, fars)
    assert measured is not None
    if options.json:
        told = {
            "map_at_10_interval": ends and [ends.low, ends.high],
            "floors": floors.map_at_10,
        }
        print(
            json.dumps(
                {**found.metrics, **told, "verification": dataclasses.asdict(measured)}, indent=2
            )
        )
    else:
        if not own:
            _say(f"pictures of {data.name}, other than the run's own")
        _print_figures(found.metrics, ends, floors.map_at_10, dataclasses.asdict(measured))
    # Of other pictures it would not be the run's.
    writes = own and not options.far
    try:
        if read_verification(Path(options.folder)) is not None:
            return
    except RunFolderError as error:
        if not writes:
            _say(error, file=sys.stderr)
    if not writes:
        return
    try:
        write_verification(Path(options.folder), measured)
    except OSError as error:
        path = Path(options.folder) / "verification.json"
        _say(f"{path} cannot be written: {error}", file=sys.stderr)


def _embed(options: argparse.Namespace) -> None:
    from fedss.inference.embedding import embed_files, list_pictures, write_embeddings
    from fedss.inference.model import load

    embedder = load(options.folder)
    found = list_pictures(Path(options.pictures))
    if not options.skip_broken:
        found.check_there()
    result = embed_files(embedder, found.paths, names=found.names, skip_broken=options.skip_broken)
    _print_left_out(result.skipped, (), found.passed_over, found.remarks)
    written = write_embeddings(Path(options.out), result)
    print(f"{counted(len(result.names), 'embedding')} of size {result.embeddings_ND.shape[1]}")
    _say(*written)


def _export(options: argparse.Namespace) -> None:
    from fedss.inference.export import CARD, export

    path = export(options.folder, options.format, options.out)
    _say(f"model  {path}", f"card   {path.with_name(CARD)}")


def _index(options: argparse.Namespace) -> None:
    from fedss.data.names import look_alikes
    from fedss.search import build_collection

    found = build_collection(
        options.folder, options.pictures, _place(options), skip_broken=options.skip_broken
    )
    _print_left_out(
        found.skipped,
        (),
        found.passed_over,
        (*found.remarks, *look_alikes(found.classes, "classes")),
    )
    enrolled = f", and {len(found) - found.indexed:,} enrolled ones" if found.enrolled else ""
    _say(
        f"{counted(found.indexed, 'picture')}{enrolled}; {counted(len(found.classes), 'class')}; "
        f"{counted(found.embedded, 'picture')} {'was' if found.embedded == 1 else 'were'} new or "
        "changed",
        found.folder,
    )


def _place(options: argparse.Namespace) -> Path:
    return Path(options.index or Path(options.folder) / "index")


def _search(options: argparse.Namespace) -> None:
    from fedss.files import write_file, writing
    from fedss.search import open_collection
    from fedss.search.web.page import neighbours_page

    collection, names = open_collection(_place(options), options.folder), options.pictures
    found = collection.search(collection.embed(names), options.count)
    if options.show is not None:
        page = neighbours_page(collection, names, found)
        with writing(Path(options.show), "choose another place (--show)"):
            write_file(Path(options.show), page.encode())
    if options.json:
        content = [
            {
                "picture": name,
                "matches": [
                    {**dataclasses.asdict(match), "path": str(path) if path else None}
                    for match, path in ((m, collection.path(m.position)) for m in matches)
                ],
            }
            for name, matches in zip(names, found, strict=True)
        ]
        print(json.dumps(content, indent=2))
        return
    for name, matches in zip(names, found, strict=True):
        _say(f"nearest to {name} in {collection.source}")
        table = _table()
        table.add_column("score", justify="right")
        table.add_column("class")
        table.add_column("picture")
        for match in matches:
            label = "–" if match.label is None else match.label
            table.add_row(_score(match.score), _cell(label), _cell(match.name))
        _print_table(table)
    if options.show is not None:
        _say(options.show)


def _enrol(options: argparse.Namespace) -> None:
    from fedss.search import enrol, open_collection, remove

    if options.remove and options.pictures:
        raise ConfigError("--remove takes a whole class out: give no pictures with it")
    collection = open_collection(_place(options), options.folder)
    if options.remove:
        collection = remove(collection, options.label)
        done = f"removed the enrolled pictures of {options.label}"
    else:
        collection = enrol(collection, options.label, options.pictures)
        done = f"enrolled {counted(len(options.pictures), 'picture')} of {options.label}"
    _say(f"{done}; {counted(len(collection.classes), 'class')} now")


def _identify(options: argparse.Namespace) -> None:
    from fedss.search import identify, open_collection, stored_threshold, why_no_threshold

    collection = open_collection(_place(options), options.folder)
    if options.threshold is None:
        stored = stored_threshold(options.folder)
        if stored is None:
            raise ConfigError(why_no_threshold(options.folder))
        threshold, about = stored.threshold, stored.worth(len(collection.classes))
    else:
        threshold, about = options.threshold, "as given"
    found = identify(collection, collection.embed(options.pictures), threshold)
    if options.json:
        named = zip(options.pictures, found, strict=True)
        rows = [{"picture": name, **dataclasses.asdict(identity)} for name, identity in named]
        print(json.dumps({"threshold": threshold, "pictures": rows}, indent=2))
        if threshold > 1:
            print(about, file=sys.stderr)
        return
    least = about if threshold > 1 else f"threshold {threshold:.3f} ({about})"
    print(f"among {counted(len(collection.classes), 'class')}, {least}")
    table = _table()
    for heading in ("picture", "class", "nearest"):
        table.add_column(heading)
    table.add_column("score", justify="right")
    for name, identity in zip(options.pictures, found, strict=True):
        label = "unknown" if identity.label is None else identity.label
        words = (_cell(word) for word in (name, label, identity.nearest))
        table.add_row(*words, _score(identity.score))
    _print_table(table)


def _app(options: argparse.Namespace) -> None:
    names = {item.name for item in DEPLOYMENT_FIELDS}
    given = {name: value for name, value in vars(options).items() if name in names}
    # Pictures at sites are photographs, as far as one can tell; and what a round costs there is not
    # to be lost.
    usual = {"data": "folder", "checkpoint_every": 1}
    config = _config(options, {**usual, **_stored(options).get("config", {})})
    _say(write_app(Path(options.folder), config, Deployment(**given)))


def _report(options: argparse.Namespace) -> None:
    from fedss.report import write_report
    from fedss.report.watch import watch_report

    folder = Path(options.folder)
    if options.watch:
        watch_report(folder, _say)
    else:
        _say(write_report(folder))


def _serve(options: argparse.Namespace) -> None:
    from fedss.search import open_collection, stored_threshold
    from fedss.search.web import app as server

    measured = stored_threshold(options.folder) if options.threshold is None else None
    limits = server.make_limits(
        options.max_upload_mb, options.threshold, measured, options.max_upload_megapixels
    )
    with server.listen(options.host, options.port) as listener:
        run = Path(options.folder)
        collection = open_collection(options.index or run / "index", run)
        title, address = run.resolve().name, server.address_of(listener)
        if not server.is_loopback(listener):
            print(
                f"warning: --host {options.host} lets other machines in. Whoever reaches port "
                f"{listener.getsockname()[1]} sees all pictures and can enrol and remove classes: "
                "there is no password and no encryption",
                file=sys.stderr,
            )
        _say(f"{counted(len(collection), 'picture')} at {address}  (Ctrl-C stops)")
        if options.open:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            server.serve(collection, title, listener, options.host, limits)
    print("stopped")


def _info(options: argparse.Namespace) -> None:
    from fedss.data import DATASETS, holdings, parse_partition
    from fedss.training.build import (
        build_model,
        check_trainable,
        load_data,
        num_frozen,
        num_trainable,
    )
    from fedss.training.summary import costs, describe

    config = _config(options, _stored(options).get("config"))
    if options.plot is not None and not options.plot.lower().endswith(".png"):
        raise ConfigError(f"--plot {options.plot}: expected a name that ends with .png")
    data = load_data(config)
    _print_left_out(data.skipped, data.unpaired, data.passed_over, ())
    check_trainable(data)
    facts = describe(config, data)
    held = clients_P, classes_P, count_P = holdings(data.train)
    dealt = parse_partition(config.partition, config.partition_clients)
    dealt = dealt or DATASETS[config.data].partition
    embedder = build_model(config, data, None)
    trained, frozen = num_trainable(embedder), num_frozen(embedder)
    gallery = facts["test_gallery"]
    searched = "each other" if gallery is None else f"{gallery:,} gallery pictures"
    table = _table(f"data set {data.name}")
    table.show_header = False
    table.add_column()
    table.add_column()
    for name, value in (
        ("training pictures", f"{facts['train_images']:,}"),
        ("training classes n", f"{facts['train_classes']:,}"),
        (
            "clients",
            f"{facts['train_clients']:,}"
            + (f", dealt by {dataclasses.replace(dealt, clients=None)}" if dealt else ""),
        ),
        ("pictures per client", _spread(np.bincount(clients_P, weights=count_P))),
        ("own classes per client", _spread(np.bincount(clients_P))),
        ("clients per class", _spread(np.bincount(classes_P))),
        (
            "test queries",
            f"{facts['test_queries']:,}, searched among {searched}"
            if facts["test_queries"]
            else "none: no class is held out",
        ),
        (
            "test classes",
            f"{facts['test_classes']:,}, {facts['test_classes_seen']:,} of them seen in training",
        ),
        ("pictures", "{} x {} x {} (channels, height, width)".format(*facts["image_shape"])),
        ("parameters trained and sent", f"{trained:,}, {frozen:,} more stay as they are"),
    ):
        table.add_row(name, value)
    _print_table(table)
    for remark in data.remarks:
        _say(f"remark: {remark}")
    if data.remarks:
        print()
    table = _table(f"per client and round, {config.backbone}, d = {config.embedding_size}")
    for heading in (
        "method",
        "class rows",
        "share of W",
        "class-row bytes",
        "bytes down",
        "bytes up",
    ):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for cost in costs(config, data, embedder):
        table.add_row(
            cost.method,
            f"{cost.class_rows:,.1f}",
            f"{cost.share:.1%}",
            _bytes(cost.row_bytes),
            _bytes(cost.bytes_down),
            _bytes(cost.bytes_up),
        )
    _print_table(table)
    if options.plot is not None:
        _plot_clients(Path(options.plot), held, f"{data.name}: who holds the training pictures")


def _plot_clients(path: Path, held: Any, title: str) -> None:
    from fedss.files import write_file
    from fedss.report import clients_picture

    try:
        write_file(path, clients_picture(held, title))
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot write it: {error.strerror}") from error
    _say(path)


def _spread(values: np.ndarray) -> str:
    low, high, median = values.min(), values.max(), np.median(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}, median {median:,g}"


def _print_table(table: Table, spare: Sequence[str] = ()) -> None:
    """On stdout. Where it is too wide, headings of numbers are broken between words, columns with a
    ``spare`` heading are left out, then text is folded, then lines are longer than the terminal."""
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


def _say(*lines: object, file: TextIO | None = None) -> None:
    """A line each, at once, with whatever they have in them from elsewhere."""
    stream = file or sys.stdout
    for line in lines:
        print(encodable(printable(str(line)), stream.encoding), file=stream, flush=True)


def _cell(text: str) -> str:
    """Text from elsewhere for a table, as wide as stdout will show it."""
    return escape(encodable(printable(text), sys.stdout.encoding))


def _bytes(count: float | None) -> str:
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"


def _print_left_out(
    skipped: Sequence[str],
    unpaired: Sequence[str],
    passed_over: Mapping[str, int],
    remarks: Sequence[str],
) -> None:
    """What is there and not used, and what is easily mistaken, on stderr."""
    from fedss.data.folder import besides

    for names, what in (
        (skipped, "unreadable pictures"),
        (unpaired, "pictures of held-out classes, each the only one of its class"),
    ):
        if names:
            first = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            _say(f"left out {len(names)} {what}: {first}", file=sys.stderr)
    if passed_over:
        links = "; list what links lead to in a CSV" if "symbolic links" in passed_over else ""
        _say(besides(passed_over).removeprefix("; ") + links, file=sys.stderr)
    for remark in remarks:
        _say(f"remark: {remark}", file=sys.stderr)


def _print_found(configs: Sequence[Config], data: "Dataset") -> None:
    """What there is to train on and to test with, before any training."""
    from fedss.training.build import check_trainable
    from fedss.training.summary import found, notes

    check_trainable(data)
    told = dict.fromkeys(note for config in configs for note in notes(config, data))
    lines = [*found(configs[0], data), *(f"note     {note}" for note in told)]
    _say(*lines)


def _print_results(summaries: Sequence[Mapping[str, Any]], seen: int, folder: Path) -> None:
    """What was retrieved and what was moved: means over seeds, one row per method."""
    from fedss.evaluation.intervals import FLOORS
    from fedss.runs.headlines import headline
    from fedss.runs.reading import Group, group_runs, read_runs

    groups: Sequence[Group] = ()
    # With a damaged file of the report the figures are here all the same.
    with suppress(RunFolderError):
        groups = group_runs(read_runs(folder), folder)
    intervals = {group.label: group.interval for group in groups}
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for summary in summaries:
        by_method.setdefault(str(summary.get("label", summary["method"])), []).append(summary)

    def mean(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
        values: list[Any] = [run.get(name) for run in runs]
        return None if None in values else sum(values) / len(values)

    classes = "unseen classes" if not seen else f"test classes ({seen} of them seen in training)"
    sites = ", in each site's gallery" if any("sites" in s for s in summaries) else ""
    found = _table(f"{classes} after {counted(summaries[0]['rounds'], 'round')}{sites}")
    moved = _table("per client and round; sums with ids and headers")
    full = mean(by_method["full"], "map_at_10") if "full" in by_method else None
    found.add_column("method")
    moved.add_column("method")
    numbers = ("MAP@10", "95 %", "by class", *(("/ full",) if full else ()), "R@1", "seeds")
    for heading in (*numbers, "time s"):
        found.add_column(heading, justify="right")
    moved.add_column("class rows", justify="right")
    for way in ("down", "up"):
        for part in ("kB", "backbone kB", "class-row kB"):
            moved.add_column(f"{part} {way}", justify="right")
    for method, runs in by_method.items():
        map_at_10, name = mean(runs, "map_at_10"), _cell(method.replace(",", ", "))
        found.add_row(
            name,
            _score(map_at_10),
            _ends(intervals.get(method)),
            _score(mean(runs, "map_at_10_by_class")),
            *((_score(None if map_at_10 is None else map_at_10 / full),) if full else ()),
            _score(mean(runs, "recall_at_1")),
            str(len(runs)),
            f"{mean(runs, 'seconds'):.0f}",
        )
        rows = mean(runs, "class_rows_per_client")
        sizes = []
        for way in ("down", "up"):
            total, backbone, of_rows, moments = (
                mean(runs, f"{part}bytes_{way}_per_client_round")
                for part in ("", "backbone_", "class_row_", "moment_")
            )
            sizes += [total, backbone, None if of_rows is None else of_rows + (moments or 0.0)]
        moved.add_row(
            name,
            "–" if rows is None else f"{rows:.0f}",
            *("–" if size is None else f"{size / 1000:.1f}" for size in sizes),
        )
    found.add_section()
    measured = [run.get("floors", {}) for run in summaries]
    for name, told in FLOORS.items():
        values = [floors[name] for floors in measured if name in floors]
        if values:
            found.add_row(told, _score(sum(values) / len(values)))
    _print_table(found, spare=("by class", "seeds", "time s"))
    if groups:
        sentence = headline(groups)
        if sys.stdout.isatty():
            sentence = fill(sentence, shutil.get_terminal_size().columns)
        _say(*sentence.splitlines(), "")
    _print_table(moved, spare=("backbone kB down", "backbone kB up"))


def _print_figures(
    metrics: Mapping[str, Any],
    ends: "Interval | None",
    floors: Mapping[str, float],
    measured: Mapping[str, Any],
) -> None:
    from fedss.evaluation.intervals import FLOORS, weakness
    from fedss.evaluation.verification import ERRORS

    found = _table("retrieval")
    names = {"recall_at_1": "R@1", "recall_at_5": "R@5", "map_at_r": "MAP@R"}
    found.add_column("")
    for heading in ("MAP@10", "95 %", "by class", *names.values()):
        found.add_column(heading, justify="right")
    both = _score(metrics["map_at_10"]), _ends(ends), _score(metrics["map_at_10_by_class"])
    found.add_row("this model", *both, *(_score(metrics[name]) for name in names))
    for name in (name for name in FLOORS if name in floors):
        found.add_row(FLOORS[name], _score(floors[name]))
    _print_table(found)
    _say(f"{counted(metrics['queries'], 'query')} of {counted(metrics['classes'], 'class')}")
    weak = weakness(metrics["classes"])
    _say(*([weak, ""] if weak else [""]))
    pairs = _table("verification")
    for heading in ("", "FAR", "TAR", "threshold"):
        pairs.add_column(heading, justify="left" if not heading else "right")
    eer = measured["eer"]
    pairs.add_row("equal error rate", f"{eer:.4f}", _score(1 - eer), _cosine(measured, "eer_"))
    for point in measured["points"]:
        few = "" if point["supported"] else "*"
        pairs.add_row("", f"{point['far']:g}{few}", _score(point["tar"]), _cosine(point))
    _print_table(pairs)
    print(f"{measured['genuine']:,} pairs of one class, {measured['impostor']:,} of two")
    if not all(point["supported"] for point in measured["points"]):
        least = measured["smallest_far"]
        lowest = f"a FAR below {least:.2g}" if least <= 1 else "any FAR"
        print(f"* too few impostor pairs for {lowest}: fewer than {ERRORS} false accepts")
    known = measured["identification"]
    if known is None:
        print(
            "nobody to find or nobody to refuse: no threshold for fedss identify; give it one "
            "with --threshold"
        )
        return
    print()
    open_set = _table("identification")
    for heading in ("", "FPIR", "DIR", "of draws", "threshold"):
        open_set.add_column(heading, justify="left" if not heading else "right")
    open_set.add_row(
        "open set, rank 1",
        f"{known['fpir']:g}" + ("" if known["supported"] else "*"),
        _score(known["dir"]),
        f"{known['dir_low']:.3f} to {known['dir_high']:.3f}",
        _cosine(known),
    )
    _print_table(open_set)
    print(f"{counted(known['enrolled'], 'class')} enrolled in each of {known['draws']} draws")
    if not known["supported"]:
        print(
            f"* too few searches for other classes: fewer than {ERRORS} false positives in a draw"
        )


def _cosine(figures: Mapping[str, Any], part: str = "") -> str:
    return f"{figures[part + 'threshold']:.4f}"


def _ends(ends: "Interval | None") -> str:
    return _score(None) if ends is None else f"{ends.low:.3f}–{ends.high:.3f}"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _table(title: str | None = None) -> Table:
    return Table(
        title=title,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
