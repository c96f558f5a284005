"""What requests tell: those of all rounds, but of the first clients to take part alone."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np

from fedss.core.client import RoundPlan, request_classes
from fedss.errors import RunFolderError
from fedss.log import Progress, progress_log
from fedss.runs.audits import Finding
from fedss.text import printable
from fedss.trust import attacks
from fedss.trust.score import MARKS, Score
from fedss.trust.simulated import SimulatedRun

# Whose requests are attacked, and how many of these are replayed.
_CLIENTS, _REPLAYED = 300, 1000


@dataclass
class Requests:
    """How far attacks on requests have come.

    ``common``: what all requests of a client have. ``fits``: each asked for all its classes.
    """

    simulated: SimulatedRun
    common: dict[int, np.ndarray] = field(default_factory=dict)
    fits: bool = True
    all: Score = field(default_factory=Score)
    replay: Score = field(default_factory=Score)
    replayed: Score = field(default_factory=Score)

    def hear(self, plan: RoundPlan, refused: Collection[str] = ()) -> int:
        """The requests of a round; returns for how many rows they are, but for those of clients
        whose update was refused: records count the others.
        """
        asked, names = 0, self.simulated.data.train.client_names
        # The server has all of the plan but the secret.
        seen = replace(plan, secret=None)
        for k in self.simulated.cohort(plan.round):
            request = request_classes(plan, k, self.simulated.labels(k))
            ids_S, own_P = request.ids_S.numpy(), self.simulated.own(k)
            asked += 0 if printable(names[k]) in refused else len(ids_S)
            if k not in self.common and len(self.common) == _CLIENTS:
                continue
            self.fits &= len(request.own_P) == len(own_P)
            self.common[k] = attacks.intersection([self.common.get(k, ids_S), ids_S])
            self.all.add(ids_S, own_P)
            if self.all.count <= _REPLAYED:
                self.replay.add(attacks.replay(seen, k, ids_S), own_P)
                self.replayed.add(ids_S, own_P)
        return asked

    def findings(self, rounds: int) -> list[Finding]:
        """What attacks have come to by now."""
        both = Score()
        for k, ids_S in self.common.items():
            both.add(ids_S, self.simulated.own(k))
        of_all = self.all.there / (self.all.count * self.simulated.num_classes)
        return [
            self.all.finding("request", rounds, of_all, "all classes"),
            self.replay.finding("replay", rounds, self.replayed.precision),
            both.finding("intersection", rounds, self.all.precision),
        ]


def attack_requests(simulated: SimulatedRun) -> tuple[list[Finding], Requests]:
    """Make all requests again, and attack them.

    Raises:
        RunFolderError: they are not those that were recorded.
    """
    requests, found, log = Requests(simulated), list[Finding](), progress_log()
    for record in simulated.records:
        rounds, recorded = record["round"], record["class_rows"]
        plan = simulated.plan(rounds - 1)
        refused = {failure["client"] for failure in record.get("failures", ())}
        asked = requests.hear(plan, refused)
        # Of a private run there are the rows of as many clients as take part on average.
        known = plan.sampler.drawn_by == "client" and not plan.private
        if known and recorded not in (None, asked):
            raise RunFolderError(
                f"{simulated.folder}: expected requests for {recorded:,.0f} rows in round "
                f"{rounds}, as recorded, got {asked:,}: audit it with the fedss that made it"
            )
        if rounds in MARKS or record is simulated.records[-1]:
            found += requests.findings(rounds)
        log(Progress("requests", rounds, len(simulated.records), "rounds"), False)
    return found, requests
