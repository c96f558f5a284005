"""The engine of a real federation: two message phases a round, and to each site its own.

Clients ask for classes, then they train. The reply to a training message also has the requests of
the site's clients in the next round, so most rounds are one message to each site. Nothing that a
site sends is used before :mod:`fedss.flower.validation` has checked it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from flwr.app import Array, Message
from torch import Tensor

from fedss.core.algorithm import draw_cohort
from fedss.core.client import Broadcast, ClientUpdate, RoundPlan
from fedss.core.engine import Failure
from fedss.core.features import FeatureSums
from fedss.core.optimizers import ServerOptimizer
from fedss.core.privacy import Noise
from fedss.core.state import ServerState
from fedss.distributed import ALONE, Ranks
from fedss.engines.local import Workers
from fedss.errors import QuorumError
from fedss.evaluation.intervals import floor_order
from fedss.flower.messages import (
    EVALUATE,
    FEATURES,
    REQUEST,
    TRAIN,
    Tensors,
    buffer,
    log_line,
    of_clients,
    pack,
)
from fedss.flower.sites import Sites
from fedss.flower.validation import (
    Parts,
    RefusedError,
    check_feature_sums,
    check_floors,
    check_metrics,
    check_request,
    check_update,
    part_of,
)
from fedss.wire.downlink import answer_requests
from fedss.wire.messages import (
    WireFormat,
    encode_broadcast,
    encode_request,
    encode_whitening,
    traffic,
)


@dataclass
class FlowerEngine:
    """A :class:`fedss.core.engine.Engine` for clients at sites.

    Rows are read by ``optimizer``; n in ``wire`` is replaced by that of each round; ``on_phase`` is
    called at the end of a phase. ``requests`` are those known so far, by round and n. ``whitening``
    goes to each site with each message for training or evaluation; it is empty where features are
    not whitened.
    """

    sites: Sites
    rounds: int
    cohort_size: int
    optimizer: ServerOptimizer
    wire: WireFormat
    on_phase: Callable[[str], None]
    features: int = 0
    requests: dict[tuple[int, int], dict[int, Tensor]] = field(default_factory=dict)
    whitening: dict[str, Tensor] = field(default_factory=dict)
    judges: Workers | None = None
    noise: Noise | None = None

    @property
    def ranks(self) -> Ranks:
        """The server is one process."""
        return ALONE

    def num_clients(self, round: int) -> int:
        """Number of clients that are registered for a round (0-based)."""
        return self.sites.registry.at(round).clients

    def whiten(self, mean_F: Tensor, axes_FK: Tensor) -> None:
        """Send this whitening to sites from now on; who judges at the server has it, too."""
        self.whitening = {**encode_whitening(mean_F, axes_FK)}
        if self.judges is not None:
            self.judges.whiten(mean_F, axes_FK)

    def feature_sums(
        self, backbone_P: Tensor, clients: Sequence[int], by_class: bool
    ) -> list[FeatureSums]:
        """What clients tell of their features before the first round, in their order.

        Raises:
            QuorumError: none did.
        """
        of_node, told = self.sites.by_node(clients), dict[int, FeatureSums]()
        failures = list[Failure]()
        num_classes = self.sites.registry.at(0).classes
        packed = buffer(encode_broadcast(self.wire, Broadcast(backbone_P)))

        def messages() -> Iterator[tuple[int, Message]]:
            for node, of_site in of_node.items():
                site = self.sites.online[node]
                metadata = {
                    **self.sites.metadata,
                    "round": 0,
                    "num_classes": num_classes,
                    "stamp": site.stamp,
                    "clients": [[k, site.places[k]] for k in of_site],
                    "by_class": by_class,
                }
                classes = buffer({"classes": torch.from_numpy(site.class_ids)})
                content = pack(metadata, classes=classes, broadcast=packed)
                yield node, self.sites.message(FEATURES, node, 0, content)

        for node, reply in self.sites.exchange(messages()):
            try:
                metadata, buffers = self.sites.read(node, reply, 0)
            except RefusedError as error:
                self.sites.put_aside(node, error, 0)
                failures += map(error.of, of_node[node])
                log_line(f"site {node} told nothing of features: {error.reason} {error.detail}")
                continue
            for k in of_node[node]:
                try:
                    message = part_of(metadata, buffers.get("sums", {}), k)
                    told[k] = check_feature_sums(num_classes, self.features, by_class, message)
                except RefusedError as error:
                    failures.append(error.of(k))
                    log_line(f"client {k} told nothing of features: {error.reason} {error.detail}")
        if not told:
            why = f" ({failures[0].reason} {failures[0].detail})" if failures else ""
            raise QuorumError(f"no site told of its features{why}; see to the sites", failures)
        return [told[k] for k in sorted(told)]

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate | Failure]:
        """Lines 2 to 4, at the sites; results in the order in which they arrive."""
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

        # Line 2, for those clients that have not sent their requests ahead.
        self.requests = {key: known for key, known in self.requests.items() if key[0] >= plan.round}
        requests = self.requests.setdefault((plan.round, plan.num_classes), {})

        def keep(k: int, message: Tensors) -> None:
            requests[k] = check_request(wire, plan, message)

        ahead = requests.keys() & {*called}
        missing = [k for k in called if k not in ahead]
        yield from self._exchange(REQUEST, plan, missing, keep, needed, ahead)
        homes = self.sites.homes()
        # Those whose site was refused meanwhile.
        yield from (Failure(k, "offline") for k in called if k in requests and k not in homes)
        present = [k for k in called if k in requests and k in homes]
        self.on_phase("request")
        if not present:
            return

        down = answer_requests(wire, self.optimizer, state, plan, {k: requests[k] for k in present})
        packed, sent = buffer(down.to_all), dict[int, Tensors]()

        def submodels(clients: Sequence[int], shared: Tensors) -> dict[str, Array]:
            answers = {k: down.answer(k) for k in clients}
            sent.update(answers)
            # What a site gets once for all its clients is counted at the first of them.
            of_site = {f"whitening.{name}": part for name, part in self.whitening.items()}
            sent[clients[0]] = {**down.to_all, **shared, **of_site, **answers[clients[0]]}
            answer = buffer(of_clients(answers))
            return {"broadcast": packed, "answers": answer, **self._whitening()}

        def check(k: int, message: Tensors) -> ClientUpdate:
            update = check_update(wire, plan, k, down.ids[k], message)
            counted = traffic(sent[k], encode_request(wire, requests[k]), message)
            return replace(update, traffic=counted)

        for result in self._exchange(TRAIN, plan, present, check, needed, set(), submodels):
            if isinstance(result, Failure):
                # Its request may be what was wrong: the client is asked again.
                requests.pop(result.client, None)
            yield result

    def _exchange(
        self,
        kind: str,
        plan: RoundPlan,
        clients: Iterable[int],
        check: Callable[[int, Tensors], ClientUpdate | None],
        needed: float,
        done: set[int],
        more: Callable[[Sequence[int], Tensors], dict[str, Array]] = lambda clients, shared: {},
    ) -> Iterator[ClientUpdate | Failure]:
        """Send each site its clients' message, and give what ``check`` makes of their replies.

        Sites are waited for until ``needed`` clients are ``done``, and ``share`` of all that can
        be; see :func:`fedss.flower.exchange.exchange`.
        """
        of_node = self.sites.by_node(clients)
        coming = self._next_cohort(plan) if kind == TRAIN else {}
        answered, total = set[int](), len(done) + sum(map(len, of_node.values()))

        def messages() -> Iterator[tuple[int, Message]]:
            for node, of_site in of_node.items():
                metadata = self._metadata(node, plan, of_site, coming.get(node, []))
                classes = {"classes": torch.from_numpy(self.sites.online[node].class_ids)}
                header = {"facts": torch.empty(len(json.dumps(metadata)), dtype=torch.uint8)}
                buffers = more(of_site, {**classes, **header})
                content = pack(metadata, classes=buffer(classes), **buffers)
                yield node, self.sites.message(kind, node, plan.round, content)

        def enough() -> bool:
            possible = total - len(answered - done)
            return len(done) >= max(needed, self.sites.deployment.share * possible)

        name = "updates" if kind == TRAIN else "requests"
        for node, reply in self.sites.exchange(messages(), enough):
            answered.update(of_node[node])
            try:
                metadata, buffers = self.sites.read(node, reply, plan.round)
                parts = buffers.get(name, {})
                if not parts.keys() <= {*of_node[node]}:
                    raise RefusedError("damaged", f"{name} of clients that were not asked")
            except RefusedError as error:
                self.sites.put_aside(node, error, plan.round + 1)
                yield from map(error.of, of_node[node])
                continue
            self._keep_requests(plan, metadata, buffers, coming.get(node, []))
            for k in of_node[node]:
                try:
                    result = check(k, part_of(metadata, parts, k))
                except RefusedError as error:
                    yield error.of(k)
                    continue
                done.add(k)
                if result:
                    yield result

    def _keep_requests(
        self,
        plan: RoundPlan,
        metadata: Mapping[str, Any],
        buffers: Mapping[str, Parts],
        clients: Iterable[int],
    ) -> None:
        """Requests for the next round; a bad one is left out: its client is asked again."""
        plan = replace(plan, round=plan.round + 1)
        wire = replace(self.wire, num_classes=plan.num_classes)
        known = self.requests.setdefault((plan.round, plan.num_classes), {})
        sent, parts = metadata.get("next"), buffers.get("requests", {})
        for k in clients:
            if isinstance(sent, list) and k in sent:
                with suppress(RefusedError):
                    known[k] = check_request(wire, plan, parts.get(k, {}))

    def evaluate(
        self, backbone_P: Tensor, round: int
    ) -> tuple[dict[str, float] | None, dict[str, float]]:
        """Retrieval at each site among its own images, averaged over all their queries.

        Args:
            backbone_P: the weights to judge; they travel in float32, as the model is kept.
            round: number of rounds complete.

        Returns:
            The means, the sums of counts, and the number of ``sites`` that could evaluate; None
            where none could. Before the first round also the floors that all these sites have.
        """
        wire, online = replace(self.wire, backbone_down="float32"), self.sites.nodes()
        sites = {n: site for n, site in self.sites.online.items() if n in online}
        sites = {n: site for n, site in sites.items() if n not in self.sites.aside} or sites
        packed = buffer(encode_broadcast(wire, Broadcast(backbone_P)))

        def messages() -> Iterator[tuple[int, Message]]:
            for node, site in sites.items():
                metadata = {**self.sites.metadata, "round": round, "stamp": site.stamp}
                content = pack(metadata, broadcast=packed, **self._whitening())
                yield node, self.sites.message(EVALUATE, node, round, content)

        metrics, floors = list[dict[str, float]](), list[dict[str, float]]()
        # All are waited for: who is left out would be left out of the figures.
        for node, reply in self.sites.exchange(messages()):
            try:
                metadata = self.sites.read(node, reply, round)[0]
                of_site = check_metrics(metadata)
                if of_site:
                    floors.append({**check_floors(metadata), "untrained": of_site["map_at_10"]})
                    metrics.append(of_site)
            except RefusedError as error:
                self.sites.put_aside(node, error, round)
                log_line(f"site {node} did not evaluate: {error.reason} {error.detail}")
        counts = {n: sum(m[n] for m in metrics) for n in ("queries", "classes", "skipped")}
        if not counts["queries"] or not counts["classes"]:
            return None, {}

        def means(
            names: Iterable[str], figures: Sequence[Mapping[str, float]], weight: str = "queries"
        ) -> dict[str, float]:
            weights = [of_site[weight] for of_site in metrics]
            return {n: float(np.average([f[n] for f in figures], weights=weights)) for n in names}

        shared = [n for n in floor_order(floors[0]) if all(n in of_site for of_site in floors)]
        by_class = means(["map_at_10_by_class"], metrics, "classes")
        figures = {**means(metrics[0], metrics), **by_class, **counts, "sites": len(metrics)}
        return figures, {} if round else means(shared, floors)

    def _whitening(self) -> dict[str, Array]:
        return {"whitening": buffer(self.whitening)} if self.whitening else {}

    def _metadata(
        self, node: int, plan: RoundPlan, clients: Iterable[int], coming: Iterable[int]
    ) -> dict[str, Any]:
        site = self.sites.online[node]
        return {
            **self.sites.metadata,
            "round": plan.round,
            "num_classes": plan.num_classes,
            "stamp": site.stamp,
            "clients": [[k, site.places[k]] for k in clients],
            "next": [[k, site.places[k]] for k in coming],
        }

    def _next_cohort(self, plan: RoundPlan) -> dict[int, list[int]]:
        """The clients of the next round that are online, by node."""
        round = plan.round + 1
        if round >= self.rounds:
            return {}
        count, size = self.num_clients(round), self.cohort_size
        absent = self.sites.absent(round)
        cohort = draw_cohort(count, size, plan.seed, round, absent, self.noise)
        return self.sites.by_node(cohort.tolist())
