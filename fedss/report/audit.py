"""What a run told its server, as a page shows it."""

from collections.abc import Sequence
from typing import Any

from fedss.runs.audits import by_attack
from fedss.runs.reading import Group
from fedss.text import DASH


def audit_section(groups: Sequence[Group], slots: Sequence[str]) -> dict[str, Any] | None:
    """Attacks on the first audited run of each group; None if there is none."""
    audited = [
        (group.label, slot, found)
        for group, slot in zip(groups, slots, strict=True)
        if (found := next((run.audit for run in group.runs if run.audit), None))
    ]
    if not audited:
        return None
    tables = [(label, slot, found, by_attack(found)) for label, slot, found in audited]
    rounds = sorted({r for *_, rows in tables for _, cells in rows for r in cells})
    return {
        "rounds": rounds,
        "runs": [
            (
                label,
                slot,
                found,
                [
                    (
                        last.name,
                        [cells.get(r, DASH) for r in rounds],
                        f"{100 * last.guess:.0f}",
                        "hidden" if last.hidden else "",
                    )
                    for last, cells in rows
                ],
            )
            for label, slot, found, rows in tables
        ],
    }
