"""The engine of a real federation: two message phases a round, and to each site its own.

Clients ask for classes, then they train. The reply to a training message carries what the site's
clients will ask for in the next round, so most rounds are one message to each site. Nothing that a
site sends is used before :mod:`fedss.flower.validation` has checked it.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fedss.core.algorithm import draw_cohort
from fedss.core.client import Broadcast, ClientUpdate, RoundPlan
from fedss.core.engine import Failure
from fedss.core.optimizers import ServerOptimizer
from fedss.core.state import ServerState
from fedss.distributed import ALONE, Ranks
from fedss.errors import QuorumError
from fedss.evaluation.intervals import FLOORS
from fedss.flower.messages import (
    EVALUATE,
    REGISTER,
    REQUEST,
    TRAIN,
    Nodes,
    Tensors,
    buffer,
    of_clients,
    pack,
    say,
)
from fedss.flower.registry import Registry, numbers, register, save_registry
from fedss.flower.settings import Deployment
from fedss.flower.validation import (
    Parts,
    RefusedError,
    check_floors,
    check_metrics,
    check_registration,
    check_request,
    check_update,
    part_of,
    read_reply,
)
from fedss.wire.downlink import Downlink, answer_requests
from fedss.wire.messages import WireFormat, encode_broadcast, encode_request, traffic

T = TypeVar("T")

# Reasons that may be gone in a moment: a node that was just restarted, say.
_PASSING = ("offline", "lost", "died")
# Those of a site that let the others wait.
_WAITED_FOR = ("late", "deadline")


@dataclass(frozen=True)
class Site:
    """A node that has registered.

    Attributes:
        stamp: of the names of its classes and clients; when these change, the site says so.
        class_ids: int32, the rows of its classes, in the order of their names.
        places: its clients: number, and place in the order of their names.
    """

    stamp: str
    class_ids: np.ndarray
    places: Mapping[int, int]


@dataclass
class FlowerEngine:
    """A :class:`fedss.core.engine.Engine` for clients at sites.

    Attributes:
        grid: Flower's way to the nodes.
        told: what every message tells: the version, the configuration, and the fingerprint of the
            weights that are not sent.
        rounds: number of rounds of the run.
        cohort_size: clients per round.
        optimizer: the server optimizer, which knows how rows are read.
        wire: how messages are encoded; n is that of each round.
        deployment: how long sites have to answer, and how many must.
        lap: told when a phase is over.
        path: the registry's file.
        registry: rows of classes and numbers of clients.
        sites: those that are online, by node.
        refused: nodes online that could not register, and why.
        requests: what clients ask for, as far as it is known, by round and n.
        aside: sites that let the others wait, and the first round (0-based) that asks them again.
        unanswered: the messages that these have not answered, by id, and the site of each.
    """

    grid: Nodes
    told: Mapping[str, Any]
    rounds: int
    cohort_size: int
    optimizer: ServerOptimizer
    wire: WireFormat
    deployment: Deployment
    lap: Callable[[str], None]
    path: Path
    registry: Registry
    sites: dict[int, Site] = field(default_factory=dict)
    refused: dict[int, RefusedError] = field(default_factory=dict)
    requests: dict[tuple[int, int], dict[int, Tensor]] = field(default_factory=dict)
    aside: dict[int, int] = field(default_factory=dict)
    unanswered: dict[str, int] = field(default_factory=dict)

    @property
    def ranks(self) -> Ranks:
        """The server is one process."""
        return ALONE

    def num_clients(self, round: int) -> int:
        """Number of clients that are registered for a round (0-based)."""
        return self.registry.at(round).clients

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
        self.meet(plan.round)
        homes = self._homes()
        yield from (Failure(k, "offline") for k in cohort.tolist() if k not in homes)
        online = [k for k in cohort.tolist() if k in homes]
        needed = max(1.0, self.deployment.quorum * len(cohort))
        called = [k for k in online if homes[k] not in self.aside]
        if len(called) < needed:
            called = online
        yield from (Failure(k, "aside") for k in online if k not in called)
        yield from self._ask(wire, plan, called, needed)
        asked, homes = self.requests[plan.round, plan.num_classes], self._homes()
        # Those whose site was refused meanwhile.
        yield from (Failure(k, "offline") for k in called if k in asked and k not in homes)
        present = [k for k in called if k in asked and k in homes]
        self.lap("request")
        if not present:
            return
        down = answer_requests(wire, self.optimizer, state, plan, {k: asked[k] for k in present})
        here, sent = self._by_node(present), dict[int, Tensors]()
        coming = self._by_node(self._cohort(plan.round + 1, plan.seed))
        messages = self._training_messages(plan, down, here, coming, sent)
        done, answered = set[int](), set[int]()
        for node, reply in self._exchange(
            messages, lambda: self._enough(needed, len(present), done, answered)
        ):
            answered.update(here[node])
            try:
                facts, buffers = self._read(node, reply, plan.round)
                updates = buffers.get("updates", {})
                if not updates.keys() <= set(here[node]):
                    raise RefusedError("damaged", "updates of clients that were not asked")
            except RefusedError as error:
                self._put_aside(node, error, plan.round + 1)
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
            classes = {"classes": torch.from_numpy(self.sites[node].class_ids)}
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
            yield node, self._message(TRAIN, node, plan.round, content)

    def _ask(
        self, wire: WireFormat, plan: RoundPlan, clients: Sequence[int], needed: float
    ) -> Iterator[Failure]:
        """Line 2: requests of those clients that have not sent theirs ahead."""
        self.requests = {key: known for key, known in self.requests.items() if key[0] >= plan.round}
        known = self.requests.setdefault((plan.round, plan.num_classes), {})
        here = self._by_node(k for k in clients if k not in known)

        def messages() -> Iterator[tuple[int, Message]]:
            for node, missing in here.items():
                classes = {"classes": torch.from_numpy(self.sites[node].class_ids)}
                content = pack(self._facts(node, plan, missing, []), classes=buffer(classes))
                yield node, self._message(REQUEST, node, plan.round, content)

        answered = set[int]()
        for node, reply in self._exchange(
            messages(),
            lambda: self._enough(needed, len(clients), known.keys() & {*clients}, answered),
        ):
            answered.update(here[node])
            try:
                facts, buffers = self._read(node, reply, plan.round)
            except RefusedError as error:
                self._put_aside(node, error, plan.round + 1)
                yield from map(error.of, here[node])
                continue
            for k in here[node]:
                try:
                    message = part_of(facts, buffers.get("requests", {}), k)
                    known[k] = check_request(wire, plan, message)
                except RefusedError as error:
                    yield error.of(k)

    def _exchange(
        self, messages: Iterable[tuple[int, Message]], enough: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, "Message | RefusedError"]]:
        of_run = self.deployment
        return exchange(self.grid, messages, of_run.deadline, enough, of_run.grace, self.unanswered)

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
        return len(done) >= max(needed, self.deployment.share * hoped_for)

    def _put_aside(self, node: int, error: RefusedError, round: int) -> None:
        """A site that let the others wait is not asked in some rounds from ``round`` on."""
        if error.reason in _WAITED_FOR and self.deployment.aside:
            self.aside[node] = again = round + self.deployment.aside
            say(
                f"site {node} let the others wait ({error.reason}): it is not asked before round "
                f"{again + 1}, unless it answers or starts anew before"
            )

    def _take_back(self, online: Collection[int], round: int) -> None:
        """Of the sites put aside, those whose time is over, or that are seen to be well again.

        A reply that comes too late is not used; but who has sent it can take the next message.
        """
        late = list(self.unanswered)
        for reply in once_more(self.grid.pull_messages, late) if late else []:
            node = self.unanswered.pop(reply.metadata.reply_to_message_id, None)
            # An error is Flower's word, and as a rule that the message has outlived its time.
            if node in self.aside and not reply.has_error():
                del self.aside[node]
                say(f"site {node} has answered at last: it is asked again")
        self.aside = {n: again for n, again in self.aside.items() if n in online and again > round}
        self.unanswered = {id: n for id, n in self.unanswered.items() if n in self.aside}

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
        """Retrieval at each site among its own pictures, averaged over all their queries.

        Args:
            backbone_P: the weights to judge; they travel in float32, as the model is kept.
            round: number of rounds complete.

        Returns:
            The means, the numbers of queries added up, and of ``sites`` that could tell; None where
            none could. Before the first round also the floors that all of these sites have.
        """
        wire, online = replace(self.wire, backbone_down="float32"), self._online()
        asked = {n: site for n, site in self.sites.items() if n in online}
        asked = {n: site for n, site in asked.items() if n not in self.aside} or asked
        packed = buffer(encode_broadcast(wire, Broadcast(backbone_P, None)))

        def messages() -> Iterator[tuple[int, Message]]:
            for node, site in asked.items():
                facts = {**self.told, "round": round, "stamp": site.stamp}
                content = pack(facts, broadcast=packed)
                yield node, self._message(EVALUATE, node, round, content)

        found, floors = [], []
        # All are waited for: who is left out would be left out of the figures.
        for node, reply in self._exchange(messages()):
            try:
                facts = self._read(node, reply, round)[0]
                metrics = check_metrics(facts)
                if metrics:
                    floors.append({**check_floors(facts), "untrained": metrics["map_at_10"]})
                    found.append(metrics)
            except RefusedError as error:
                self._put_aside(node, error, round)
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

    def start(self, sites: int, round: int) -> None:
        """Wait until so many sites are there, and register them all at once.

        Together, since rows are numbered in the order of names: so it does not matter who came
        first.

        Args:
            sites: how many.
            round: number of rounds complete.

        Raises:
            QuorumError: they are not there in time.
        """
        arrived: dict[int, dict[str, Any]] = {}
        deadline = self.deployment.deadline
        end, shown, before = time.monotonic() + deadline, -1, self.registry
        while True:
            online = self._online()
            arrived = {node: facts for node, facts in arrived.items() if node in online}
            self.refused = {
                node: error
                for node, error in self.refused.items()
                if node in online and error.reason not in _PASSING
            }
            arrived |= self._introduce(online - arrived.keys() - self.refused.keys(), round)
            if len(arrived) != shown:
                shown = len(arrived)
                say(f"{shown} of {sites} sites are there")
            if len(arrived) >= sites:
                # All or none: a name that was a mistake would stay for good.
                self.registry, self.sites = before, {}
                self._admit(arrived, round)
                if len(self.sites) >= sites:
                    save_registry(self.path, self.registry)
                    return
                arrived = {n: facts for n, facts in arrived.items() if n not in self.refused}
            if time.monotonic() >= end:
                reasons = "".join(f"; {_why(*refused)}" for refused in self.refused.items())
                there = {n for n, error in self.refused.items() if error.reason != "deadline"}
                self._introduce(there, round)
                raise QuorumError(
                    f"expected {sites} sites within {deadline:g} s, found {shown}{reasons}. "
                    "Start the others and submit again, or set sites to what there is"
                )
            time.sleep(1)

    def meet(self, round: int) -> None:
        """Forget sites that are gone, and register those that came, from the next round on.

        Those that could not be registered are asked again in every round: what was amiss may have
        been mended, or was another node with their clients that is seen to be gone by now. But
        who does not answer costs all a deadline, and is asked again only after it has been away.
        """
        online = self._online()
        self.sites = {node: site for node, site in self.sites.items() if node in online}
        silent = {node for node, error in self.refused.items() if error.reason == "deadline"}
        before = self.registry
        arrived = self._introduce(online - self.sites.keys() - silent, round)
        self.refused = {
            n: error for n, error in self.refused.items() if n in online - arrived.keys()
        }
        self._admit(arrived, round)
        if self.registry is not before:
            save_registry(self.path, self.registry)
        self._take_back(online, round)

    def _introduce(self, nodes: Iterable[int], round: int) -> dict[int, dict[str, Any]]:
        """What sites say of themselves; those that were refused hear why, for their own log."""

        def messages() -> Iterator[tuple[int, Message]]:
            for node in sorted(nodes):
                facts = {**self.told, "round": round}
                if node in self.refused:
                    facts["refused"] = _why(node, self.refused[node])
                yield node, self._message(REGISTER, node, round, pack(facts))

        arrived: dict[int, dict[str, Any]] = {}
        for node, reply in exchange(self.grid, messages(), self.deployment.deadline):
            try:
                arrived[node], _ = read_reply(reply, round)
            except RefusedError as error:
                if node not in arrived:
                    self._refuse(node, error)
        return arrived

    def _online(self) -> set[int]:
        return set(once_more(self.grid.get_node_ids))

    def _admit(self, arrived: Mapping[int, dict[str, Any]], round: int) -> None:
        """Register what sites have said of themselves."""
        names: dict[int, tuple[list[str], list[str], str]] = {}
        for node, facts in sorted(arrived.items()):
            taken = {k for n, site in self.sites.items() if n != node for k in site.places}
            taken_names = {self.registry.clients[k] for k in taken}
            taken_names |= {name for _, clients, _ in names.values() for name in clients}
            try:
                names[node] = check_registration(facts, self.registry, taken_names)
            except RefusedError as error:
                self._refuse(node, error)
                continue
            if self.registry.secret is None:
                self.registry = replace(self.registry, secret=facts["secret"])
        classes = [name for of_site, _, _ in names.values() for name in of_site]
        clients = [name for _, of_site, _ in names.values() for name in of_site]
        grown = register(self.registry, classes, clients, round + 1)
        if grown is not self.registry:
            self.registry = grown
            now = grown.growth[-1]
            say(f"registered {now.classes:,} classes and {now.clients:,} clients")
        for node, (classes, clients, stamp) in names.items():
            ids = numbers(grown.clients, clients).tolist()
            places = {k: place for place, k in enumerate(ids)}
            self.sites[node] = Site(stamp, numbers(grown.classes, classes), places)

    def _refuse(self, node: int, error: RefusedError) -> None:
        self.refused[node] = error
        self.sites.pop(node, None)
        say(_why(node, error))

    def _read(
        self, node: int, reply: "Message | RefusedError", round: int
    ) -> tuple[dict[str, Any], dict[str, Parts]]:
        """A reply; one that says that the site's names have changed registers them."""
        facts, buffers = read_reply(reply, round)
        if "changed" in facts:
            before = self.registry
            self._admit({node: facts["changed"]}, round)
            if self.registry is not before:
                save_registry(self.path, self.registry)
            raise RefusedError("registered", "classes or clients of the site have changed")
        return facts, buffers

    def _facts(
        self, node: int, plan: RoundPlan, clients: Iterable[int], coming: Iterable[int]
    ) -> dict[str, Any]:
        site = self.sites[node]
        return {
            **self.told,
            "round": plan.round,
            "num_classes": plan.num_classes,
            "stamp": site.stamp,
            "clients": [[k, site.places[k]] for k in clients],
            "next": [[k, site.places[k]] for k in coming],
        }

    def _message(self, kind: str, node: int, round: int, content: RecordDict) -> Message:
        # Flower says of a message that has outlived its time that it is lost: not before the
        # deadline has been noticed here.
        ttl = self.deployment.deadline + 2.0
        return Message(content, dst_node_id=node, message_type=kind, ttl=ttl, group_id=str(round))

    def _cohort(self, round: int, seed: int) -> list[int]:
        if round >= self.rounds:
            return []
        cohort = draw_cohort(self.num_clients(round), self.cohort_size, seed, round)
        return [int(k) for k in cohort]

    def _homes(self) -> dict[int, int]:
        """The node of each client that is online."""
        return {k: node for node, site in self.sites.items() for k in site.places}

    def _by_node(self, clients: Iterable[int]) -> dict[int, list[int]]:
        homes, found = self._homes(), dict[int, list[int]]()
        for k in clients:
            if k in homes:
                found.setdefault(homes[k], []).append(k)
        return found


def exchange(
    grid: Nodes,
    messages: Iterable[tuple[int, Message]],
    deadline: float,
    enough: Callable[[], bool] = lambda: False,
    grace: float = 0.0,
    unanswered: dict[str, int] | None = None,
) -> Iterator[tuple[int, "Message | RefusedError"]]:
    """Send a message to each node, and give their replies as they come.

    Args:
        grid: Flower's way to the nodes.
        messages: with the node of each. They are sent one by one, as they are made: so one of them
            is in memory at a time, and it is known which one Flower does not take.
        deadline: seconds after which those that are missing are given as refused.
        enough: whether so many have answered that the others have the grace alone, looked at
            whenever the replies that are there have been used. They have as long again as it took,
            and ``grace`` seconds at least, but no longer than the deadline.
        grace: seconds.
        unanswered: gets the ids of messages that were not answered in time, with their nodes.
    """
    waiting, answered = dict[str, int](), dict[str, int]()
    for node, message in messages:
        # None, or nothing at all: Flower could not take it.
        message_id = next(iter(once_more(grid.push_messages, [message])), None)
        if message_id:
            waiting[message_id] = node
        else:
            yield node, RefusedError("lost", "Flower did not take the message")
    began, pause, missing = time.monotonic(), 0.05, "deadline"
    end = began + deadline
    while waiting:
        # What came while the last replies were looked at is in time.
        late = time.monotonic() >= end
        for reply in once_more(grid.pull_messages, list(waiting)):
            message_id = reply.metadata.reply_to_message_id
            if message_id in waiting:
                answered[message_id] = waiting.pop(message_id)
                yield answered[message_id], reply
            elif message_id in answered:
                yield answered[message_id], RefusedError("twice", "a second reply to one message")
        if late or not waiting:
            break
        now = time.monotonic()
        if missing == "deadline" and enough() and now + max(grace, now - began) < end:
            end, missing = now + max(grace, now - began), "late"
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    if unanswered is not None:
        unanswered.update(waiting)
    yield from ((node, RefusedError(missing)) for node in waiting.values())


def _why(node: int, error: RefusedError) -> str:
    detail = f": {error.detail}" if error.detail else ""
    return f"site {node} could not register ({error.reason}){detail}"


def once_more(ask: Callable[..., Iterable[T]], *arguments: Any) -> list[T]:
    """What Flower's grid gives; asked a second time where the SuperLink died in a handshake.

    Flower waits for a SuperLink that is away, however long, but takes one that dies in the middle
    of a TLS handshake for one whose certificate is wrong, and raises.
    """
    try:
        return list(ask(*arguments))
    except httpx.TransportError as error:
        say(f"lost the SuperLink, trying again ({error})")
        time.sleep(1)
        return list(ask(*arguments))
