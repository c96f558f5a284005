"""The engine of a real federation: two message phases a round, and to each site its own.

Clients ask for classes, then they train. The reply to a training message carries what the site's
clients will ask for in the next round, so most rounds are one message to each site. Nothing that a
site sends is used before :mod:`fedss.flower.validation` has checked it.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from torch import Tensor

from fedss.core.algorithm import draw_cohort
from fedss.core.client import Broadcast, ClientUpdate, RoundPlan
from fedss.core.engine import Failure
from fedss.core.optimizers import ServerOptimizer
from fedss.core.state import ServerState
from fedss.distributed import ALONE, Ranks
from fedss.evaluation.intervals import FLOORS
from fedss.flower.messages import (
    EVALUATE,
    REQUEST,
    TRAIN,
    Tensors,
    buffer,
    of_clients,
    pack,
    say,
)
from fedss.flower.sites import Sites
from fedss.flower.validation import (
    Parts,
    RefusedError,
    check_floors,
    check_metrics,
    check_request,
    check_update,
    part_of,
)
from fedss.wire.downlink import Downlink, answer_requests
from fedss.wire.messages import WireFormat, encode_broadcast, encode_request, traffic


@dataclass
class FlowerEngine:
    """A :class:`fedss.core.engine.Engine` for clients at sites.

    Attributes:
        sites: who takes part.
        rounds: number of rounds of the run.
        cohort_size: clients per round.
        optimizer: the server optimizer, which knows how rows are read.
        wire: how messages are encoded; n is that of each round.
        on_phase: told when a phase is over.
        requests: what clients ask for, as far as it is known, by round and n.
    """

    sites: Sites
    rounds: int
    cohort_size: int
    optimizer: ServerOptimizer
    wire: WireFormat
    on_phase: Callable[[str], None]
    requests: dict[tuple[int, int], dict[int, Tensor]] = field(default_factory=dict)

    @property
    def ranks(self) -> Ranks:
        """The server is one process."""
        return ALONE

    def num_clients(self, round: int) -> int:
        """Number of clients that are registered for a round (0-based)."""
        return self.sites.registry.at(round).clients

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate | Failure]:
        """Lines 2 to 4, at the sites; results in the order in which they arrive."""
        failures = []
        for result in self._train(state, cohort, plan):
            if isinstance(result, Failure):
                failures.append(result)
            yield result
        if failures:
            counts = Counter(failure.reason for failure in failures).most_common()
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
            detail = next((f" ({f.detail})" for f in failures if f.detail), "")
            say(f"round {plan.round + 1}: of {len(cohort)} clients, {reasons}{detail}")

    def _train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate | Failure]:
        wire = replace(self.wire, num_classes=plan.num_classes)
        self.sites.meet(plan.round)
        homes = self.sites.homes()
        yield from (Failure(k, "offline") for k in cohort.tolist() if k not in homes)
        online = [k for k in cohort.tolist() if k in homes]
        needed = max(1.0, self.sites.deployment.quorum * len(cohort))
        called = [k for k in online if homes[k] not in self.sites.aside]
        if len(called) < needed:
            called = online
        yield from (Failure(k, "aside") for k in online if k not in called)
        yield from self._ask(wire, plan, called, needed)
        asked, homes = self.requests[plan.round, plan.num_classes], self.sites.homes()
        # Those whose site was refused meanwhile.
        yield from (Failure(k, "offline") for k in called if k in asked and k not in homes)
        present = [k for k in called if k in asked and k in homes]
        self.on_phase("request")
        if not present:
            return
        down = answer_requests(wire, self.optimizer, state, plan, {k: asked[k] for k in present})
        here, sent = self.sites.by_node(present), dict[int, Tensors]()
        coming = self.sites.by_node(self._cohort(plan.round + 1, plan.seed))
        messages = self._training_messages(plan, down, here, coming, sent)
        done, answered = set[int](), set[int]()
        for node, reply in self.sites.exchange(
            messages, lambda: self._enough(needed, len(present), done, answered)
        ):
            answered.update(here[node])
            try:
                facts, buffers = self.sites.read(node, reply, plan.round)
                updates = buffers.get("updates", {})
                if not updates.keys() <= set(here[node]):
                    raise RefusedError("damaged", "updates of clients that were not asked")
            except RefusedError as error:
                self.sites.put_aside(node, error, plan.round + 1)
                for k in here[node]:
                    asked.pop(k, None)
                    yield error.of(k)
                continue
            self._keep_requests(wire, plan, facts, buffers.get("requests", {}), coming.get(node))
            for k in here[node]:
                try:
                    message = part_of(facts, updates, k)
                    update = check_update(wire, plan, k, down.ids[k], message)
                except RefusedError as error:
                    # What it asked for may be what was amiss: it is asked again.
                    asked.pop(k, None)
                    yield error.of(k)
                    continue
                counted = traffic(sent[k], encode_request(wire, asked[k]), message)
                done.add(k)
                yield replace(update, traffic=counted)

    def _training_messages(
        self,
        plan: RoundPlan,
        down: Downlink,
        here: Mapping[int, Sequence[int]],
        coming: Mapping[int, Sequence[int]],
        sent: dict[int, Tensors],
    ) -> Iterator[tuple[int, Message]]:
        """A message for each node that has clients ``here``, and what each gets, into ``sent``."""
        packed = buffer(down.to_all)
        for node, clients in here.items():
            classes = {"classes": torch.from_numpy(self.sites.online[node].class_ids)}
            answers = {k: down.answer(k) for k in clients}
            facts = self._facts(node, plan, clients, coming.get(node, []))
            content = pack(
                facts,
                broadcast=packed,
                classes=buffer(classes),
                answers=buffer(of_clients(answers)),
            )
            # What a site gets once, for all its clients, counts to the first of them.
            told = {"facts": torch.empty(len(json.dumps(facts)), dtype=torch.uint8)}
            sent.update(answers)
            sent[clients[0]] = {**down.to_all, **classes, **told, **answers[clients[0]]}
            yield node, self.sites.message(TRAIN, node, plan.round, content)

    def _ask(
        self, wire: WireFormat, plan: RoundPlan, clients: Sequence[int], needed: float
    ) -> Iterator[Failure]:
        """Line 2: requests of those clients that have not sent theirs ahead."""
        self.requests = {key: known for key, known in self.requests.items() if key[0] >= plan.round}
        known = self.requests.setdefault((plan.round, plan.num_classes), {})
        here = self.sites.by_node(k for k in clients if k not in known)

        def messages() -> Iterator[tuple[int, Message]]:
            for node, missing in here.items():
                classes = {"classes": torch.from_numpy(self.sites.online[node].class_ids)}
                content = pack(self._facts(node, plan, missing, []), classes=buffer(classes))
                yield node, self.sites.message(REQUEST, node, plan.round, content)

        answered = set[int]()
        for node, reply in self.sites.exchange(
            messages(),
            lambda: self._enough(needed, len(clients), known.keys() & {*clients}, answered),
        ):
            answered.update(here[node])
            try:
                facts, buffers = self.sites.read(node, reply, plan.round)
            except RefusedError as error:
                self.sites.put_aside(node, error, plan.round + 1)
                yield from map(error.of, here[node])
                continue
            for k in here[node]:
                try:
                    message = part_of(facts, buffers.get("requests", {}), k)
                    known[k] = check_request(wire, plan, message)
                except RefusedError as error:
                    yield error.of(k)

    def _enough(
        self, needed: float, asked: int, done: Collection[int], answered: Collection[int]
    ) -> bool:
        """Whether the others need not be waited for much longer.

        Args:
            needed: number of clients that make a quorum.
            asked: number of those that were asked.
            done: those that gave what can be used.
            answered: those whose site has answered; where they are not done, they have failed.
        """
        hoped_for = asked - len({*answered} - {*done})
        return len(done) >= max(needed, self.sites.deployment.share * hoped_for)

    def _keep_requests(
        self,
        wire: WireFormat,
        plan: RoundPlan,
        facts: Mapping[str, Any],
        parts: Parts,
        clients: Iterable[int] | None,
    ) -> None:
        """Requests for the next round; what is amiss with one is found when it is asked again."""
        coming = replace(plan, round=plan.round + 1)
        known = self.requests.setdefault((coming.round, plan.num_classes), {})
        sent = facts.get("next")
        for k in clients or ():
            if isinstance(sent, list) and k in sent:
                try:
                    known[k] = check_request(wire, coming, parts.get(k, {}))
                except RefusedError:
                    continue

    def evaluate(
        self, backbone_P: Tensor, round: int
    ) -> tuple[dict[str, float] | None, dict[str, float]]:
        """Retrieval at each site among its own images, averaged over all their queries.

        Args:
            backbone_P: the weights to judge; they travel in float32, as the model is kept.
            round: number of rounds complete.

        Returns:
            The means, the numbers of queries added up, and of ``sites`` that could tell; None where
            none could. Before the first round also the floors that all of these sites have.
        """
        wire, online = replace(self.wire, backbone_down="float32"), self.sites.nodes()
        asked = {n: site for n, site in self.sites.online.items() if n in online}
        asked = {n: site for n, site in asked.items() if n not in self.sites.aside} or asked
        packed = buffer(encode_broadcast(wire, Broadcast(backbone_P, None)))

        def messages() -> Iterator[tuple[int, Message]]:
            for node, site in asked.items():
                facts = {**self.sites.told, "round": round, "stamp": site.stamp}
                content = pack(facts, broadcast=packed)
                yield node, self.sites.message(EVALUATE, node, round, content)

        found, floors = [], []
        # All are waited for: who is left out would be left out of the figures.
        for node, reply in self.sites.exchange(messages()):
            try:
                facts = self.sites.read(node, reply, round)[0]
                metrics = check_metrics(facts)
                if metrics:
                    floors.append({**check_floors(facts), "untrained": metrics["map_at_10"]})
                    found.append(metrics)
            except RefusedError as error:
                self.sites.put_aside(node, error, round)
                say(f"site {node} did not evaluate: {error.reason} {error.detail}")
        counts = {n: sum(m[n] for m in found) for n in ("queries", "classes", "skipped")}
        if not counts["queries"] or not counts["classes"]:
            return None, {}
        queries = [metrics["queries"] for metrics in found]
        means = {
            name: float(np.average([metrics[name] for metrics in found], weights=queries))
            for name in found[0]
        }
        means["map_at_10_by_class"] = float(
            np.average(
                [metrics["map_at_10_by_class"] for metrics in found],
                weights=[metrics["classes"] for metrics in found],
            )
        )
        shared = [name for name in FLOORS if all(name in floor for floor in floors)]
        told = {
            name: float(np.average([floor[name] for floor in floors], weights=queries))
            for name in shared
        }
        return {**means, **counts, "sites": len(found)}, {} if round else told

    def _facts(
        self, node: int, plan: RoundPlan, clients: Iterable[int], coming: Iterable[int]
    ) -> dict[str, Any]:
        site = self.sites.online[node]
        return {
            **self.sites.told,
            "round": plan.round,
            "num_classes": plan.num_classes,
            "stamp": site.stamp,
            "clients": [[k, site.places[k]] for k in clients],
            "next": [[k, site.places[k]] for k in coming],
        }

    def _cohort(self, round: int, seed: int) -> list[int]:
        if round >= self.rounds:
            return []
        cohort = draw_cohort(self.num_clients(round), self.cohort_size, seed, round)
        return [int(k) for k in cohort]
