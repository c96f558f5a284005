"""``audit.json``: how far attacks came on what a run told, its one writer and its one reader."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedss.files import write_json
from fedss.runs.fields import Share, read_file

AUDIT = "audit.json"
_TOLERANCE = 0.05  # above guessing, up to which an attack has failed


@dataclass(frozen=True)
class Finding:
    """What an attack comes to after the first ``rounds`` rounds.

    ``precision``: of what it names, the share that is right; ``recall``: of what there is to name
    at the clients that took part, the share that it names. ``guess``: the precision of guessing
    ``among`` all classes, the rows asked for, own classes, or images. ``hidden``: the mode of the
    run claims that this attack fails.
    """

    name: str
    rounds: int
    precision: Share
    recall: Share
    guess: Share
    among: str
    hidden: bool

    @property
    def succeeds(self) -> bool:
        """Whether it is better than a guess."""
        return self.precision > self.guess + _TOLERANCE

    @property
    def broken(self) -> bool:
        """Whether it should fail, and does not."""
        return self.hidden and self.succeeds


@dataclass(frozen=True)
class Audit:
    """Findings, and what they are about.

    ``mode`` is the method and what decides what it tells. ``rounds`` are those of the run,
    ``trained_again`` how many of them were, and ``why`` says why no more were. Requests are those
    of the first ``clients`` to take part.
    """

    mode: str
    rounds: int
    trained_again: int
    why: str
    clients: int
    attacks: Sequence[Finding]

    @property
    def most_telling(self) -> Finding | None:
        """The attack that names most and is right, by the harmonic mean; None: all fail."""
        better = [f for f in self.attacks if f.succeeds]
        telling = {f: 2 * f.precision * f.recall / (f.precision + f.recall) for f in better}
        return max(telling, key=telling.__getitem__, default=None)


def write_audit(folder: Path, audit: Audit) -> None:
    """Write ``audit.json``: the fields of its class, as they are."""
    write_json(folder / AUDIT, asdict(audit))


def read_audit(folder: Path) -> Audit | None:
    """What ``audit.json`` says; None where there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    path = folder / AUDIT
    if not path.exists():
        return None
    audit: Audit = read_file(Audit, path)
    return audit


def by_attack(audit: Audit) -> list[tuple[Finding, dict[int, str]]]:
    """For tables: the last finding of each attack; precision/recall, in percent, by rounds."""
    rows: dict[str, dict[int, Finding]] = {}
    for finding in audit.attacks:
        rows.setdefault(finding.name, {})[finding.rounds] = finding
    return [
        (
            of_rounds[max(of_rounds)],
            {r: f"{100 * f.precision:.0f}/{100 * f.recall:.0f}" for r, f in of_rounds.items()},
        )
        for of_rounds in rows.values()
    ]
