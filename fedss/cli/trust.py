"""Commands about who learns what."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedss.cli.options import (
    JSON,
    TRUST,
    argument,
    check_stored,
    command,
    config_options,
    given,
    setting,
    with_data_at_path,
)
from fedss.cli.output import say
from fedss.config import Config
from fedss.errors import ConfigError, RunFolderError
from fedss.text import DASH, counted

if TYPE_CHECKING:
    from fedss.runs.audits import Audit


@command(
    "RUN [OPTIONS]",
    argument("folder", "RUN", "folder of a simulated run or of a comparison, of its first seed"),
    TRUST,
    setting("--seconds", 20.0, "how long rounds of a run are trained again, to attack its updates"),
    argument(
        "--secret-file",
        "FILE",
        "where the run's secret is now; attacks do not get it",
        default=argparse.SUPPRESS,
    ),
    argument(
        "--device",
        "TEXT",
        "where rounds are trained again, cpu or cuda (default: as the run)",
        default=argparse.SUPPRESS,
    ),
    JSON,
    config_options(groups=("data",), stored=False),
)
def audit(options: argparse.Namespace) -> None:
    """Attack a run as its server could: what does it learn of its clients?"""
    from fedss.report import write_report
    from fedss.runs.about import read_any_config
    from fedss.runs.audits import write_audit
    from fedss.trust.audit import audit

    folder, found = Path(options.folder), []
    for run in _runs(folder):
        about = read_any_config(run)["config"]
        check_stored(about, f"{run}/config.json")
        values = {"data": about.get("data", Config.data), **given(options)}
        changes = with_data_at_path(values, options)
        done = audit(run, changes, options.seconds, options.trust_code)
        found.append(done)
        if not options.json:
            _print_audit(done)
        try:
            write_audit(run, done)
            write_report(run)
        except (OSError, RunFolderError) as error:
            say(f"the report of {run} is without this audit: {error}", file=sys.stderr)
    if len(found) > 1:
        write_report(folder)
    if options.json:
        print(json.dumps(_as_json(found), indent=2))


def _runs(folder: Path) -> Sequence[Path]:
    """The run, or of a comparison those of its first seed that have clients."""
    from fedss.losses.methods import METHODS
    from fedss.runs.about import read_any_config
    from fedss.runs.summaries import read_summaries

    about = read_any_config(folder)
    if "methods" not in about:
        return [folder]
    seed = about.get("seeds", [0])[0]
    done = [s for s in read_summaries(folder) if s["seed"] == seed]
    runs = [folder / s["folder"] for s in done if not METHODS[s["method"]].pooled]
    if not runs:
        raise ConfigError(f"{folder}: expected a comparison that is done; name one of its runs")
    return runs


def _as_json(audits: "Sequence[Audit]") -> dict[str, object]:
    """All findings, and what else is known of each run."""
    runs = [dataclasses.asdict(audit) for audit in audits]
    found = [{"mode": run["mode"], **finding} for run in runs for finding in run.pop("attacks")]
    return {"attacks": found, "runs": runs}


def _print_audit(audit: "Audit") -> None:
    from fedss.cli.tables import make_table, print_table
    from fedss.runs.audits import by_attack

    rows, why = by_attack(audit), f" ({audit.why})" if audit.why else ""
    rounds = sorted({r for _, cells in rows for r in cells})
    say(
        audit.mode,
        f"requests of {counted(audit.rounds, 'round')}, {counted(audit.clients, 'client')}",
        f"updates of {counted(audit.trained_again, 'round')}{why}",
        "precision/recall in % after so many rounds, and the precision of guessing",
    )
    table = make_table(None, "attack", *(f">{r}" for r in rounds), ">guess", "claim")
    for last, cells in rows:
        guess, claim = f"{100 * last.guess:.0f}", "hidden" if last.hidden else ""
        table.add_row(last.name, *(cells.get(r, DASH) for r in rounds), guess, claim)
    print_table(table)
    say(_in_words(audit), "")


def _in_words(audit: "Audit") -> str:
    """The attack that tells most; and claims that do not hold."""
    broken = sorted({finding.name for finding in audit.attacks if finding.broken})
    most = audit.most_telling
    if broken:
        return f"Not hidden, against what is claimed: {', '.join(broken)}. Please report it."
    if most is None:
        return "No attack is better than a guess."
    right, known, guess = (round(100 * x) for x in (most.precision, most.recall, most.guess))
    after = counted(most.rounds, "round")
    return f"{most.name}, {after}: {right} % right (guess {guess} %), {known} % of what is there"
