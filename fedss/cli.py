"""The command line: arguments and printing only."""

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fedss.config import OPTIONS, Config, Option, config_from_dict
from fedss.engines.flower.settings import DEPLOYMENT_FIELDS, Deployment, write_app
from fedss.errors import ConfigError, FedssError, LostRankError
from fedss.methods import METHODS
from fedss.ranks import join, this_rank


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 2 a mistake to mend, 1 a rank lost, 130 interrupted.

    Where torchrun has started several of it, the first speaks for all.
    """
    try:
        ranks = this_rank()
    except ConfigError as error:
        print(f"fedss: {error}", file=sys.stderr)
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
            print(f"{command}: {error}", file=sys.__stderr__ if lost or not met else sys.stderr)
            return 1 if lost else 2
        except KeyboardInterrupt:
            print("\nfedss: interrupted; start the same command again to go on", file=sys.stderr)
            return 130
    return 0


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

    evaluate = command(_evaluate, "RUN [OPTIONS]", "retrieval with a trained model")
    evaluate.add_argument("folder", metavar="RUN", help="a run folder")
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

    report = command(_report, "OUT", "write report.html for a run or a comparison")
    report.add_argument("folder", metavar="OUT", help="the folder of a run or a comparison")

    app = command(
        _app,
        "DIR --out PATH [OPTIONS]",
        "write the app folder of a real federation, to submit with flwr run",
    )
    app.add_argument("folder", metavar="DIR", help="the app folder; gets a pyproject.toml")
    _add_deployment(app)
    _add_config(app)

    info = command(_info, "[OPTIONS]", "what is in a data set, and what each method would move")
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
    try:
        content = json.loads(Path(options.config).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {options.config}: cannot read it as JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise ConfigError(
            f"--config {options.config}: expected the config.json of a run, with a 'config' object"
        )
    return content


def _train(options: argparse.Namespace) -> None:
    from fedss.data import seen_classes
    from fedss.experiment import load_together, train

    config = _config(options, _stored(options).get("config"))
    data = load_together(config)
    _print_left_out(data.skipped, data.unpaired)
    run = train(config, options.out, data=data)
    if run.already_done:
        print(f"{options.out} is done: {config.rounds} rounds; delete it to train again")
    _print_results([run.summary], seen_classes(data))
    print(f"model   {run.folder / 'model'}\nreport  {run.folder / 'report.html'}")


def _compare(options: argparse.Namespace) -> None:
    from fedss.data import seen_classes
    from fedss.experiment import compare, load_together

    stored = _stored(options)
    config = _config(options, stored.get("config"))
    methods = options.methods or stored.get("methods")
    methods = methods or ["full", "fedss", "fedss-uncorrected", "pos-only"]
    seeds = options.seeds or stored.get("seeds") or [0]
    data = load_together(config)
    _print_left_out(data.skipped, data.unpaired)
    summaries = compare(config, methods, seeds, options.out, data=data)
    _print_results(summaries, seen_classes(data))
    print(f"summary  {Path(options.out) / 'summary.json'}")
    print(f"report   {Path(options.out) / 'report.html'}")


def _evaluate(options: argparse.Namespace) -> None:
    from fedss.build import evaluation_task, load_data
    from fedss.evaluation import evaluate
    from fedss.experiment import load
    from fedss.files import read_json

    embedder = load(options.folder)
    stored = read_json(Path(options.folder) / "config.json")["config"]
    shape = {"image_size": embedder.spec.image_size, "channels": embedder.spec.channels}
    config = _config(options, {**stored, **shape})
    data = load_data(config)
    _print_left_out(data.skipped, data.unpaired)
    metrics = evaluate(embedder, evaluation_task(config, data))
    print(json.dumps(dataclasses.asdict(metrics), indent=2))


def _embed(options: argparse.Namespace) -> None:
    from fedss.embedding import embed_files, list_pictures, write_embeddings
    from fedss.experiment import load

    embedder = load(options.folder)
    paths, names = list_pictures(Path(options.pictures))
    result = embed_files(embedder, paths, names=names, skip_broken=options.skip_broken)
    _print_left_out(result.skipped)
    written = write_embeddings(Path(options.out), result)
    print(f"{len(result.names)} embeddings of size {result.embeddings_ND.shape[1]}")
    print("\n".join(str(path) for path in written))


def _app(options: argparse.Namespace) -> None:
    names = {item.name for item in DEPLOYMENT_FIELDS}
    given = {name: value for name, value in vars(options).items() if name in names}
    # Pictures at sites are photographs, as far as one can tell; and what a round costs there is not
    # to be lost.
    usual = {"data": "folder", "checkpoint_every": 1}
    config = _config(options, {**usual, **_stored(options).get("config", {})})
    print(write_app(Path(options.folder), config, Deployment(**given)))


def _report(options: argparse.Namespace) -> None:
    from fedss.report import write_report

    print(write_report(Path(options.folder)))


def _info(options: argparse.Namespace) -> None:
    from fedss.build import build_model, load_data, num_frozen, num_trainable
    from fedss.describe import costs, describe

    config = _config(options, _stored(options).get("config"))
    data = load_data(config)
    _print_left_out(data.skipped, data.unpaired)
    console = _console()
    facts = describe(config, data)
    embedder = build_model(config, data, None)
    trained, frozen = num_trainable(embedder), num_frozen(embedder)
    low, median, high = facts["own_classes"]
    gallery = facts["test_gallery"]
    searched = "each other" if gallery is None else f"{gallery:,} gallery pictures"
    table = _table(f"data set {data.name}")
    table.show_header = False
    table.add_column()
    table.add_column()
    for name, value in (
        ("training pictures", f"{facts['train_images']:,}"),
        ("training classes n", f"{facts['train_classes']:,}"),
        ("clients", f"{facts['train_clients']:,}"),
        ("own classes per client", f"{low} to {high}, median {median:g}"),
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
    console.print(table)
    table = _table(f"per client and round, {config.backbone}, d = {config.embedding_size}")
    for heading in (
        "method",
        "class rows",
        "share of W",
        "class-row bytes",
        "bytes down",
        "bytes up",
    ):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for cost in costs(config, data, embedder):
        table.add_row(
            cost.method,
            f"{cost.class_rows:,.1f}",
            f"{cost.share:.1%}",
            _bytes(cost.row_bytes),
            _bytes(cost.bytes_down),
            _bytes(cost.bytes_up),
        )
    console.print(table)


def _console() -> Console:
    """Stdout; wide enough for the tables where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 140)


def _bytes(count: float | None) -> str:
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"


def _print_left_out(skipped: Sequence[str], unpaired: Sequence[str] = ()) -> None:
    for names, what in (
        (skipped, "unreadable pictures"),
        (unpaired, "pictures of held-out classes, each the only one of its class"),
    ):
        if names:
            first = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            print(f"left out {len(names)} {what}: {first}", file=sys.stderr)


def _print_results(summaries: Sequence[Mapping[str, Any]], seen: int) -> None:
    """What was retrieved and what was moved: means over seeds, one row per method."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for summary in summaries:
        by_method.setdefault(summary.get("label", summary["method"]), []).append(summary)

    def mean(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
        values = [run[name] for run in runs]
        return None if None in values else sum(values) / len(values)

    classes = "unseen classes" if not seen else f"test classes ({seen} of them seen in training)"
    found = _table(f"{classes} after {summaries[0]['rounds']} rounds")
    moved = _table("kB per client and round; sums with ids and headers")
    full = mean(by_method["full"], "map_at_10") if "full" in by_method else None
    found.add_column("method", overflow="fold")
    moved.add_column("method", overflow="fold")
    for heading in ("MAP@10", *(("/ full",) if full else ()), "R@1", "seeds", "seconds"):
        found.add_column(heading, justify="right", no_wrap=True)
    for heading in ("rows", "down", "backbone", "rows", "up", "backbone", "rows"):
        moved.add_column(heading, justify="right", no_wrap=True)
    for method, runs in by_method.items():
        map_at_10, name = mean(runs, "map_at_10"), method.replace(",", ", ")
        found.add_row(
            name,
            _score(map_at_10),
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
    console = _console()
    console.print(found)
    console.print(moved)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
