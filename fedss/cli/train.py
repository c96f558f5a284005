"""Commands that train, and those that come before: what is in the data, a federation's app."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedss.cli.options import (
    OUT,
    argument,
    command,
    config_options,
    deployment_options,
    read_config,
    stored,
)
from fedss.cli.output import say
from fedss.config import Config
from fedss.errors import ConfigError
from fedss.flower.settings import DEPLOYMENT_FIELDS, Deployment, write_app
from fedss.secret import make_secret
from fedss.text import counted, listed
from fedss.variants import variant

if TYPE_CHECKING:
    from fedss.data import Dataset


_FROM = argument(
    "--from",
    "RUN",
    "start with the weights of another run: the backbone, and the rows of classes of the same name",
    dest="start",
)


@command(
    "[OPTIONS] --out DIR",
    _FROM,
    config_options(),
    OUT,
)
def train(options: argparse.Namespace) -> None:
    """Train one model, or resume an interrupted run."""
    config = read_config(options)
    from fedss.cli.tables import print_results
    from fedss.data import seen_classes
    from fedss.training.experiment import load_together, train

    data = load_together(config)
    _say_before([config], data)
    run = train(config, options.out, data=data, start=options.start)
    if run.already_done:
        rounds = counted(run.summary["rounds"], "round")
        say(f"{options.out} is done: {rounds}; more --rounds go on, or delete it to train again")
    print_results([run.summary], seen_classes(data), run.folder)
    out = Path(options.out)
    best = [f"best    {out / 'best'}"] if (out / "best").exists() else []
    say(f"model   {out / 'model'}", *best, f"report  {out / 'report.html'}")


@command(
    "[OPTIONS] --methods METHOD ... --seeds INT ... --out DIR",
    argument(
        "--methods",
        "METHOD",
        "methods to compare; fedss:sampler=uniform,rows_up=int8 is a variant with other options "
        "(default: full fedss fedss-uncorrected pos-only)",
        nargs="+",
    ),
    argument("--seeds", "INT", "seeds to train each method with (default: 0)", nargs="+", type=int),
    _FROM,
    config_options(without=("method", "seed")),
    OUT,
)
def compare(options: argparse.Namespace) -> None:
    """Train several methods, each with several seeds, and compare them in a report."""
    config, before = read_config(options), stored(options)
    methods = options.methods or before.get("methods")
    methods = methods or ["full", "fedss", "fedss-uncorrected", "pos-only"]
    seeds = options.seeds or before.get("seeds") or [0]
    variants = [variant(config, method) for method in methods]
    from fedss.cli.tables import print_results
    from fedss.data import seen_classes
    from fedss.training.experiment import compare, load_together

    data = load_together(config)
    _say_before(variants, data)
    summaries = compare(config, methods, seeds, options.out, data=data, start=options.start)
    print_results(summaries, seen_classes(data), Path(options.out))
    say(f"summary  {Path(options.out) / 'summary.json'}")
    say(f"report   {Path(options.out) / 'report.html'}")


@command(
    "[OPTIONS]",
    argument("--plot", "FILE.png", "draw how images and classes are spread over the clients"),
    config_options(),
)
def info(options: argparse.Namespace) -> None:
    """Show what is in a data set, and what each method would send."""
    config = read_config(options)
    if options.plot is not None and not options.plot.lower().endswith(".png"):
        raise ConfigError(f"--plot {options.plot}: expected a name that ends with .png")
    from fedss.cli import tables
    from fedss.data import DATASETS, holdings, parse_partition
    from fedss.settings import problem_of, resolve, small_images
    from fedss.training.build import build_model, check_trainable, load_data, num_parameters
    from fedss.training.private import check_private, outlook
    from fedss.training.summary import costs, describe

    data = load_data(config)
    tables.say_left_out(data.skipped, data.unpaired, data.passed_over)
    check_trainable(data)
    held = holdings(data.train)
    dealt = parse_partition(config.partition, config.partition_clients)
    dealt = dealt or DATASETS[config.data].partition
    told, settings = resolve(config, problem_of(data))
    check_private(told, len(data.train.client_names))
    embedder = build_model(told, data, None)
    description = {
        **describe(config, data),
        "dealt": f", dealt by {replace(dealt, clients=None)}" if dealt else "",
        "trained": num_parameters(embedder),
        "frozen": num_parameters(embedder, trained=False),
    }
    tables.print_data(data.name, description, held)
    tables.print_settings(settings)
    claim = outlook(told, len(data.train.client_names))
    say(*(["differential privacy", *(f"  {line}" for line in claim), ""] if claim else []))
    small = small_images(config, embedder.spec.image_size)
    remarks = [*data.remarks, *([small] if small else [])]
    for remark in remarks:
        say(f"remark: {remark}")
    if remarks:
        say("")
    title = f"per client and round, {told.backbone}, d = {told.embedding_size}"
    tables.print_costs(title, costs(config, data, embedder))
    if options.plot is not None:
        from fedss.files import write_file, writing
        from fedss.report import clients_figure

        image = clients_figure(held, f"{data.name}: who holds the training images")
        with writing(Path(options.plot).parent, "choose another place (--plot)"):
            write_file(Path(options.plot), image)
        say(Path(options.plot))


@command(
    "DIR --out PATH [OPTIONS]",
    argument("folder", "DIR", "app folder to write; it gets a pyproject.toml"),
    deployment_options,
    config_options(),
)
def app(options: argparse.Namespace) -> None:
    """Write the app folder of a real federation, which flwr run submits."""
    names = {item.name for item in DEPLOYMENT_FIELDS}
    chosen = {name: value for name, value in vars(options).items() if name in names}
    # Images at sites are photographs, as far as one can tell; and what a round costs there is not
    # to be lost.
    config = read_config(options, usual={"data": "folder", "checkpoint_every": 1})
    say(write_app(Path(options.folder), config, Deployment(**chosen)))


@command("FILE", argument("file", "FILE", "file to write; you alone may read it"))
def secret(options: argparse.Namespace) -> None:
    """Make a secret for the sites of a federation, or for a simulation of one."""
    make_secret(Path(options.file))
    say(f"{options.file}: 256 random bits, for your eyes alone; the server must not get it")


def _say_before(configs: Sequence[Config], data: "Dataset") -> None:
    """What there is to train on and to test with, before any training."""
    from fedss.cli.tables import say_left_out
    from fedss.training.build import check_trainable
    from fedss.training.summary import notes, overview, unused_settings

    say_left_out(data.skipped, data.unpaired, data.passed_over, data.remarks)
    check_trainable(data)
    remarks = dict.fromkeys(note for config in configs for note in notes(config, data))
    unused = sorted(set.intersection(*map(unused_settings, configs)))
    if unused:
        methods = list(dict.fromkeys(config.method for config in configs))
        remarks[f"{listed(unused)}: not used by {listed(methods)}"] = None
    say(*overview(configs[0], data), *(f"note     {note}" for note in remarks))
