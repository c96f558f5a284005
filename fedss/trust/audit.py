"""What a run told its server: its rounds are simulated again, and what clients sent is attacked.

Requests follow from configuration, seed and images alone, so those of all rounds are made again.
Updates need training: that of the first rounds is done again, from the run's first weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedss.core.client import RoundPlan
from fedss.runs.audits import Audit
from fedss.trust.attacks import draws
from fedss.trust.requests import attack_requests
from fedss.trust.simulated import read_simulated
from fedss.trust.updates import attack_updates


def audit(
    folder: str | Path,
    changes: Mapping[str, Any] | None = None,
    seconds: float = 20.0,
    trust_code: bool = False,
) -> Audit:
    """Attack a simulated run as its server could.

    Args:
        folder: the run folder.
        changes: settings in place of the run's: where its images and its secret are now.
        seconds: how long rounds are trained again; the one that is begun then is finished.
        trust_code: import code of its owner's that the run names.

    Raises:
        ConfigError, DataError: images or secret are not those of the run, or not to be had.
        RunFolderError: the folder holds no run that can be simulated again.
    """
    simulated = read_simulated(Path(folder), changes or {}, trust_code)
    of_requests, requests = attack_requests(simulated)
    of_updates, trained, why = attack_updates(simulated, seconds)
    plan = simulated.plan(0)
    # Before the first round, of all own classes.
    told = simulated.config.rows_init == "means" and not plan.method.local_rows
    hidden = frozenset[str]() if told else hides(plan, requests.fits)
    found = [replace(f, hidden=f.name in hidden) for f in (*of_requests, *of_updates)]
    return Audit(_mode(plan), len(simulated.records), trained, why, len(requests.common), found)


def hides(plan: RoundPlan, fits: bool) -> frozenset[str]:
    """The attacks that a mode claims to withstand; in no mode one on updates.

    ``fits``: clients ask for all their classes in each round. Those that take turns give
    themselves away beside negatives that stay.
    """
    if plan.method.negatives == "all" or plan.requests != "own" or plan.method.local_rows:
        return frozenset(("request", "replay", "intersection"))
    if not draws(plan) or plan.sampler.drawn_by == "server" or plan.secret is None:
        return frozenset()
    return frozenset(("replay", "intersection") if plan.sampler.fixed and fits else ("replay",))


def _mode(plan: RoundPlan) -> str:
    if plan.requests != "own":
        asked = {"all": "all rows", "common": "a set common to a round"}[plan.requests]
        return f"{plan.method.name}, {asked}"
    if not draws(plan):
        return plan.method.name
    by_client = "with a secret" if plan.secret else "without a secret"
    by = by_client if plan.sampler.drawn_by == "client" else "drawn by the server"
    return f"{plan.method.name}, {plan.sampler.name} {by}"
