"""What becomes of a real federation when its processes stop, die or come back.

    python benchmarks/faults.py     (about 20 minutes; --only NAME ...: some trials, writes no file)
    python benchmarks/faults.py --attackers    (those of ``benchmarks/attackers.py``, and no other)

Each trial starts a federation of its own, that of ``examples/federation.py``: a SuperLink with TLS,
node keys and a database, a SuperExec, and three sites with glyphs as image files. It does
something to their processes while a run trains. The run's end is compared, bit for bit, with
training on this machine on the images of all sites: with ``fedss.train``, or, where clients have
failed, with the same without exactly those that the run's records name, in the rounds that they
name. Compared is a digest of the model's file and the server's whole state: backbone, class rows,
and what the optimizer keeps of both.

Writes ``benchmarks/results/faults.txt``.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import attackers
import common
import numpy as np
import torch

import fedss
from examples import federation
from examples.federation import FederationError, Place, Process, children, flwr, kill
from fedss.core.class_rows import create_class_rows, read
from fedss.core.client import ClientUpdate, RoundPlan
from fedss.core.engine import Failure
from fedss.core.state import ServerState
from fedss.flower.settings import Deployment, write_app
from fedss.runs.checkpoint import load_checkpoint, newest_round
from fedss.runs.records import Record
from fedss.settings import problem_of, resolve
from fedss.training.build import load_data, resolved, server_optimizer

SITES, CLIENTS, CLASSES = 3, 12, 60
ROUNDS, COHORT = 5, 6
ATTEMPTS, PAUSE = 2, 5.0
PATIENCE = 300
"""Seconds after which a trial is given up."""


class TrialError(Exception):
    """A trial did not come to its end."""


@dataclass
class Trial:
    """A federation, and what has been seen of it."""

    place: Place
    images: list[Path]
    out: Path
    app: Path
    link: Process
    server: Process
    sites: list[Process]
    runs: list[int] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    repeated: int = 0
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def rounds(self) -> int:
        """Rounds that are in the records."""
        path = self.out / "records.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0


def submit_run(trial: Trial) -> int:
    trial.runs.append(federation.submit(trial.place, trial.app))
    return trial.runs[-1]


def again(trial: Trial) -> None:
    """The same submission once more: it goes on from the last checkpoint, up to the end."""
    lost = trial.rounds - newest_round(trial.out / "checkpoint")
    trial.repeated += lost + 1
    trial.seen.append(f"submitted again: goes on after round {trial.rounds - lost}")
    complete(trial, submit_run(trial))


def wait_for(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TrialError(f"waited {seconds:g} s for {what}")
        time.sleep(0.2)


def wait_for_round(trial: Trial, round: int, number: int = 0) -> int:
    """Until a site's client works on a round's message; the client's process."""
    wait_for(lambda: trial.rounds >= round - 1, f"round {round - 1}")
    working: list[int] = []

    def at_work() -> bool:
        working[:] = children(trial.sites[number], "flwr-clientapp")
        return bool(working)

    wait_for(at_work, f"a client in round {round}")
    time.sleep(1)  # longer than it takes to read the message, shorter than to answer it
    return working[0]


def ended(trial: Trial, run: int) -> dict[str, str]:
    """What ``flwr list`` says of a run, once it has ended."""
    state: dict[str, str] = {}

    def is_over() -> bool:
        if children(trial.server, "flwr-serverapp"):
            return False
        (told,) = json.loads(flwr(trial.place, "list", "--run-id", run, "--format", "json"))["runs"]
        state.update(told)
        return state["status"].startswith("finished")

    wait_for(is_over, f"the end of run {run}")
    return state


def complete(trial: Trial, run: int) -> None:
    """Wait for a run that must complete."""
    state = ended(trial, run)
    if state["status"] != "finished:completed":
        raise TrialError(f"run {run} {state}\n" + "\n".join(federation.follow(trial.place, run)))
    trial.seconds = time.monotonic() - trial.began


def start_site(trial: Trial, number: int) -> None:
    trial.sites[number] = federation.site(trial.place, number, site_config(trial, number))


def site_config(trial: Trial, number: int) -> dict[str, str]:
    secret = federation.secret(trial.place)
    return {"data": str(trial.images[number]), "own-secret-file": secret}


# The trials. Each begins when a run is submitted, and ends when one is complete.


def nothing(trial: Trial) -> None:
    complete(trial, trial.runs[0])


def twice(trial: Trial) -> None:
    wait_for_round(trial, 2)
    second = submit_run(trial)
    complete(trial, trial.runs[0])
    tell_failure(trial, second)


def client_killed(trial: Trial) -> None:
    os.kill(wait_for_round(trial, 2), signal.SIGKILL)
    complete(trial, trial.runs[0])


def site_killed(trial: Trial) -> None:
    wait_for_round(trial, 2)
    kill(trial.sites[0])
    start_site(trial, 0)
    complete(trial, trial.runs[0])


def site_stopped(trial: Trial) -> None:
    wait_for_round(trial, 2)
    os.killpg(trial.sites[0].pid, signal.SIGSTOP)
    wait_for(lambda: trial.rounds >= 2, "the round without the site")
    time.sleep(5)
    os.killpg(trial.sites[0].pid, signal.SIGCONT)
    complete(trial, trial.runs[0])


def client_raises(trial: Trial) -> None:
    wait_for(lambda: trial.rounds >= 1, "round 1")
    folder = trial.images[0]
    away = folder.rename(folder.with_name("away"))
    wait_for(lambda: trial.rounds >= 2, "the round without the site")
    away.rename(folder)
    complete(trial, trial.runs[0])


def sites_gone(trial: Trial) -> None:
    wait_for_round(trial, 2)
    for process in trial.sites:
        os.killpg(process.pid, signal.SIGTERM)
    tell_failure(trial, trial.runs[0])
    trial.repeated += ATTEMPTS - 1
    for number in range(SITES):
        start_site(trial, number)
    again(trial)


def server_killed(trial: Trial) -> None:
    wait_for_round(trial, 4)
    for process in children(trial.server, "flwr-serverapp"):
        os.kill(process, signal.SIGKILL)
    again(trial)
    tell_failure(trial, trial.runs[0])


def link_away(trial: Trial, seconds: float) -> None:
    wait_for_round(trial, 4)
    kill(trial.link)
    time.sleep(seconds)
    trial.link = federation.superlink(trial.place)
    if seconds > 60:
        tell_failure(trial, trial.runs[0])
        again(trial)
    else:
        complete(trial, trial.runs[0])


def machine_lost(trial: Trial) -> None:
    wait_for_round(trial, 4)
    kill(trial.link)
    kill(trial.server)
    trial.link, trial.server = federation.superlink(trial.place), federation.superexec(trial.place)
    again(trial)
    tell_failure(trial, trial.runs[0])


TRIALS: dict[str, tuple[str, Callable[[Trial], None]]] = {
    "nothing": ("nothing", nothing),
    "twice": ("submitted a second time while it runs", twice),
    "client-killed": ("a ClientApp killed in round 2", client_killed),
    "site-killed": ("a SuperNode and its ClientApp killed in round 2, started again", site_killed),
    "site-stopped": ("a site stopped in round 2, past the deadline, then continued", site_stopped),
    "client-raises": ("a site's images moved away in round 2, then back", client_raises),
    "sites-gone": ("all sites stopped in round 2, started when the run had ended", sites_gone),
    "server-killed": ("ServerApp killed in round 4", server_killed),
    "link-10": ("SuperLink killed in round 4, back after 10 s", partial(link_away, seconds=10)),
    "link-75": ("SuperLink killed in round 4, back after 75 s", partial(link_away, seconds=75)),
    "machine-lost": ("SuperLink, SuperExec and ServerApp killed in round 4", machine_lost),
}


def tell_failure(trial: Trial, run: int) -> None:
    """Note how a run that must fail has ended, for ``flwr list`` and for ``flwr log``."""
    state = ended(trial, run)
    if state["status"] != "finished:failed":
        raise TrialError(f"run {run} has {state['status']}, expected it to fail")
    message = state["status-details"].removeprefix("ServerApp failed with exception: ")
    if message == state["status-details"]:
        trial.seen.append(f"flwr list: {state['status']}, {message}")
        return
    if f"fedss: {message}" not in federation.follow(trial.place, run):
        raise TrialError(f"flwr log does not say what flwr list does: {message}")
    message = message.replace(f"{trial.place.folder}/", "")
    trial.seen.append(f"flwr list and log: {state['status']}, {message}")


@dataclass(frozen=True)
class Absent(common.WrappedEngine):
    """An engine whose clients fail in some rounds: numbers of clients, by round (0-based)."""

    absent: Mapping[int, Set[int]]

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate | Failure]:
        """The updates of those that do not fail."""
        gone = self.absent.get(plan.round, set())
        yield from (Failure(k, "absent") for k in cohort.tolist() if k in gone)
        present = [k for k in cohort.tolist() if k not in gone]
        yield from self.engine.train(state, np.array(present), plan)


def train_locally(config: fedss.Config, folder: Path, absent: Mapping[int, Set[int]]) -> str:
    """The digest of the same training on this machine, without some clients in some rounds."""
    data = load_data(config)
    attackers.train_wrapped(config, folder, data, lambda e: Absent(e, absent), quorum=0.0)
    resolved, _ = resolve(config, problem_of(data))
    return digest(resolved, folder, len(data.train.class_names))


def digest(config: fedss.Config, folder: Path, num_classes: int) -> str:
    """SHA-256 of the model's file and of every number of the server's state."""
    optimizer = server_optimizer(config)
    rows = create_class_rows(
        num_classes, resolved(config.embedding_size), optimizer.of_rows.slots, config.seed
    )
    state = load_checkpoint(folder / "checkpoint", rows)
    assert state is not None
    assert state.round == config.rounds
    weight_ND, slots, *_ = read(state.class_rows, torch.arange(num_classes))
    digest = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes())
    tensors = [state.backbone_P, *state.backbone_slots.values(), weight_ND, *slots.values()]
    for tensor in [*tensors, state.class_rows.updated_N]:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def left_out(records: Sequence[Record], client_names: Sequence[str]) -> dict[int, set[int]]:
    """The clients that rounds (0-based) have done without.

    A round that was begun again lists the failures of all attempts; those of the last one, which
    count, come last.
    """
    number = {name: i for i, name in enumerate(client_names)}
    absent = {}
    for record in records:
        missing = COHORT - record["clients"]
        if missing:
            failures = record["failures"][-missing:]
            absent[record["round"] - 1] = {number[failure["client"]] for failure in failures}
    return absent


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    seconds: float
    repeated: int
    failures: Counter[str]
    digest: str
    absent: dict[int, set[int]]
    seen: list[str]


def try_out(name: str, folder: Path, config: fedss.Config, deadline: float) -> Outcome:
    """One trial, in a copy of a folder whose database knows the sites' keys."""
    shutil.copytree(folder / "keys and database", folder / name)
    out, app = folder / name / "run", folder / name / "app"
    shutil.copytree(folder / "images", folder / name / "images")
    images = sorted((folder / name / "images").iterdir())
    deployment = Deployment(
        out=str(out),
        sites=SITES,
        evaluate_at="server",
        deadline=deadline,
        attempts=ATTEMPTS,
        pause=PAUSE,
    )
    write_app(app, replace(config, secret_file=None), deployment)
    with federation.place(folder / name, SITES) as place:
        link, server = federation.superlink(place), federation.superexec(place)
        trial = Trial(place, images, out, app, link, server, [])
        trial.sites = [
            federation.site(place, number, site_config(trial, number)) for number in range(SITES)
        ]
        wait_for(lambda: online(trial) == SITES, "the sites")
        trial.began = time.monotonic()
        submit_run(trial)
        TRIALS[name][1](trial)
        started = list(place.processes)
    left = [process for one in started for process in children(one, "")]
    if left:
        raise TrialError(f"processes are left: {left}")
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    failures = [failure for record in records for failure in record.get("failures", [])]
    repeated = trial.repeated + sum(record.get("attempts", 1) - 1 for record in records)
    known = load_data(config).train
    return Outcome(
        trial.seconds,
        repeated,
        Counter(failure["reason"] for failure in failures),
        digest(config, out, len(known.class_names)),
        left_out(records, known.client_names),
        trial.seen,
    )


def online(trial: Trial) -> int:
    told = json.loads(flwr(trial.place, "supernode", "list", "--format", "json"))
    return sum(node["status"] == "online" for node in told["nodes"])


def row(name: str, outcome: Outcome, usual: float | None, equal: str) -> str:
    lost = "-" if usual is None else f"{outcome.seconds - usual:.0f}"
    failures = ", ".join(f"{count} {why}" for why, count in outcome.failures.most_common())
    first = f"{name:<15}{outcome.seconds:>6.0f}{lost:>6}{outcome.repeated:>10}  "
    lines = [f"{first}{failures or '-':<14}  {equal}", f"    {TRIALS[name][0]}"]
    return "\n".join(lines + [f"    {text}" for text in outcome.seen])


def trials(
    names: Sequence[str], folder: Path, config: fedss.Config, deadline: float
) -> Iterator[str]:
    """What each trial came to, and whether its end is that of training on this machine."""
    oracle = partial(train_locally, config)
    undisturbed = oracle(folder / "here", {})
    usual = None
    for name in names:
        try:
            outcome = try_out(name, folder, config, deadline)
        except (TrialError, FederationError, ProcessLookupError) as error:
            yield f"{name:<15}{'-':>6}{'-':>6}{'-':>10}  {'-':<14}  NO: {error}"
            continue
        if name == "nothing":
            usual = outcome.seconds
        if outcome.absent:
            expected = oracle(folder / f"{name} here", outcome.absent)
            rounds = ", ".join(str(round + 1) for round in sorted(outcome.absent))
            text = f"without those that failed in round {rounds}"
        else:
            expected, text = undisturbed, "with all"
        yield row(name, outcome, usual, f"{'yes' if outcome.digest == expected else 'NO'}: {text}")


def main() -> int:
    parser = common.parser(__doc__, "of --attackers: a tenth of the clients, two minutes")
    parser.add_argument("--only", nargs="+", choices=TRIALS, metavar="NAME")
    parser.add_argument("--deadline", type=float, default=20.0, help="seconds (default: 20)")
    parser.add_argument("--folder", type=Path, help="keep all that is written there")
    parser.add_argument("--attackers", action="store_true", help="clients that misbehave")
    options = parser.parse_args()
    if options.attackers:
        return attackers.run(options.short)
    command = f"python benchmarks/faults.py --deadline {options.deadline:g}"
    report = common.Report(
        "A federation whose processes stop, die or come back", ["flwr"], command=command
    )
    report.add(
        f"{SITES} sites, {CLIENTS} clients, {ROUNDS} rounds of {COHORT}, checkpoint every 2, "
        f"quorum 0.5, {ATTEMPTS} attempts, pause {PAUSE:g} s",
        "s: from submission to the run's end; lost: more than with nothing done; repeated: rounds",
        "begun more than once; failures: of clients, by reason; digest: equal to that of local",
        "training, and with whom",
        "",
        f"{'trial':<15}{'s':>6}{'lost':>6}{'repeated':>10}  {'failures':<14}  digest",
    )
    with ExitStack() as stack:
        folder = (options.folder or Path(stack.enter_context(TemporaryDirectory()))).resolve()
        images = federation.write_images(folder / "images", SITES, CLIENTS, CLASSES)
        together = folder / "all sites"
        together.mkdir()
        for drawer in (drawer for data in images for drawer in data.iterdir()):
            shutil.copytree(drawer, together / drawer.name)
        config = fedss.Config(
            data="folder",
            data_path=str(together),
            image_size=28,
            channels=1,
            backbone="conv4-8",
            rounds=ROUNDS,
            clients_per_round=COHORT,
            server_momentum=0.9,  # as in a federation, where `auto` does not know the images
            class_row_lr=2.0,
            eval_every=0,
            checkpoint_every=2,
            workers=1,
        )
        with federation.place(folder / "keys and database", SITES) as place:
            # The same at all sites, and here, where the training is that of all their clients.
            config = replace(config, secret_file=federation.secret(place))
            federation.superlink(place)
            for number in range(SITES):
                federation.register(place, number)
        for text in trials(options.only or [*TRIALS], folder, config, options.deadline):
            report.add(text)
    report.write(unless=options.only)
    return int(any("NO:" in line for line in report.lines))


if __name__ == "__main__":
    sys.exit(main())
