"""Sites that come, register, go, and make the others wait."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict

from fedss.core.algorithm import NO_CLIENTS
from fedss.errors import QuorumError
from fedss.flower.exchange import exchange, once_more
from fedss.flower.messages import REGISTER, Nodes, log_line, pack
from fedss.flower.registry import Registry, register, row_numbers, save_registry
from fedss.flower.settings import Deployment
from fedss.flower.validation import Parts, RefusedError, check_registration, read_reply

# Reasons that may be gone in a moment, such as a restart of the node.
_PASSING = ("offline", "lost", "died")
# Those of a site that made the others wait.
_WAITED_FOR = ("late", "deadline")


@dataclass(frozen=True)
class Site:
    """A registered node: the fingerprint of its names, and of each name in sorted order the row of
    the class (int32), or the number of the client with its place."""

    stamp: str
    class_ids: np.ndarray
    places: Mapping[int, int]


@dataclass
class Sites:
    """The sites of a federation: who is online, and what each is registered with.

    ``metadata`` (version, configuration, fingerprint of frozen weights) is in every message, and
    ``path`` is the registry's file. ``online`` and ``refused`` are by node; ``aside`` has the first
    round (0-based) that asks a slow site again, ``unanswered`` the node of each message that had no
    reply in time. ``seen`` is the last round in which a client was online, since this server
    ``began``; ``brought`` are the names of classes and of clients that a node ever registered.
    """

    grid: Nodes
    metadata: Mapping[str, Any]
    deployment: Deployment
    path: Path
    registry: Registry
    online: dict[int, Site] = field(default_factory=dict)
    refused: dict[int, RefusedError] = field(default_factory=dict)
    aside: dict[int, int] = field(default_factory=dict)
    unanswered: dict[str, int] = field(default_factory=dict)
    began: int = 0
    seen: dict[int, int] = field(default_factory=dict)
    brought: dict[int, tuple[set[str], set[str]]] = field(default_factory=dict)

    def start(self, sites: int, round: int) -> None:
        """Wait until so many sites are online, and register them all at once.

        Together, since rows are numbered in the order of names: the order of arrival does not
        matter. ``round`` is the number of rounds complete.

        Raises:
            QuorumError: they are not there in time.
        """
        arrived: dict[int, dict[str, Any]] = {}
        deadline = self.deployment.deadline
        end, shown, before = time.monotonic() + deadline, -1, self.registry
        while True:
            online = self.nodes()
            arrived = {node: names for node, names in arrived.items() if node in online}
            self.refused = {
                node: error
                for node, error in self.refused.items()
                if node in online and error.reason not in _PASSING
            }
            arrived |= self._introduce(online - arrived.keys() - self.refused.keys(), round)
            if len(arrived) != shown:
                shown = len(arrived)
                log_line(f"{shown} of {sites} sites are there")
            if len(arrived) >= sites:
                # All or none: a name that was a mistake would stay for good.
                self.registry, self.online = before, {}
                self._admit(arrived, round)
                if len(self.online) >= sites:
                    save_registry(self.path, self.registry)
                    return
                arrived = {n: names for n, names in arrived.items() if n not in self.refused}
            if time.monotonic() >= end:
                reasons = "".join(f"; {_why(*refused)}" for refused in self.refused.items())
                to_tell = {n for n, error in self.refused.items() if error.reason != "deadline"}
                self._introduce(to_tell, round)
                raise QuorumError(
                    f"expected {sites} sites within {deadline:g} s, found {shown}{reasons}. "
                    "Start the others and submit again, or set sites to what there is"
                )
            time.sleep(1)

    def meet(self, round: int) -> None:
        """Forget sites that are gone, and register those that came, from the next round on.

        Those that were refused are asked again in every round: the cause may be gone. But a site
        that does not answer costs all a deadline, and is asked again only after it has been away.
        """
        online = self.nodes()
        self.online = {node: site for node, site in self.online.items() if node in online}
        silent = {node for node, error in self.refused.items() if error.reason == "deadline"}
        arrived = self._introduce(online - self.online.keys() - silent, round)
        self.refused = {
            n: error for n, error in self.refused.items() if n in online - arrived.keys()
        }
        self._admit_and_save(arrived, round)
        self._take_back(online, round)
        away = len(self.absent(round))
        self.seen.update(dict.fromkeys(self.homes(), round))
        if (now := len(self.absent(round + 1))) != away:
            log_line(
                f"{now} clients have been offline for {self.deployment.absence} rounds: they are "
                "not drawn until their sites are back"
            )

    def absent(self, round: int) -> np.ndarray:
        """Clients that are not to be drawn in a round: offline for too long before it. Sorted."""
        absence, known = self.deployment.absence, self.registry.at(round).clients
        if not absence or round - self.began <= absence:
            return NO_CLIENTS
        seen = (self.seen.get(k, self.began - 1) for k in range(known))
        return np.array([k for k, last in enumerate(seen) if round - last > absence], np.int64)

    def _introduce(self, nodes: Iterable[int], round: int) -> dict[int, dict[str, Any]]:
        """The names at these sites; those that were refused are told why, for their own log."""

        def messages() -> Iterator[tuple[int, Message]]:
            for node in sorted(nodes):
                metadata = {**self.metadata, "round": round}
                if node in self.refused:
                    metadata["refused"] = _why(node, self.refused[node])
                yield node, self.message(REGISTER, node, round, pack(metadata))

        arrived: dict[int, dict[str, Any]] = {}
        for node, reply in exchange(self.grid, messages(), self.deployment.deadline):
            try:
                arrived[node], _ = read_reply(reply, round)
            except RefusedError as error:
                if node not in arrived:
                    self._refuse(node, error)
        return arrived

    def nodes(self) -> set[int]:
        """Nodes that are online, as Flower says."""
        return set(once_more(self.grid.get_node_ids))

    def _admit(self, arrived: Mapping[int, dict[str, Any]], round: int) -> None:
        """Register the names of sites."""
        admitted: dict[int, tuple[list[str], list[str], str]] = {}
        for node, names in sorted(arrived.items()):
            others = [site.places for n, site in self.online.items() if n != node]
            taken = {self.registry.clients[k] for places in others for k in places}
            taken.update(name for _, clients, _ in admitted.values() for name in clients)
            try:
                classes, clients, stamp = check_registration(names, self.registry, taken)
                self._check_number(node, classes, clients)
                admitted[node] = classes, clients, stamp
            except RefusedError as error:
                self._refuse(node, error)
                continue
            if self.registry.secret is None:
                self.registry = replace(self.registry, secret=names["secret"])
        classes = [name for of_site, _, _ in admitted.values() for name in of_site]
        clients = [name for _, of_site, _ in admitted.values() for name in of_site]
        grown = register(self.registry, classes, clients, round + 1)
        if grown is not self.registry:
            self.registry = grown
            now = grown.growth[-1]
            log_line(f"registered {now.classes:,} classes and {now.clients:,} clients")
        for node, (classes, clients, stamp) in admitted.items():
            ids = row_numbers(grown.clients, clients).tolist()
            places = {k: place for place, k in enumerate(ids)}
            self.online[node] = Site(stamp, row_numbers(grown.classes, classes), places)

    def _check_number(self, node: int, classes: list[str], clients: list[str]) -> None:
        """Whether a site keeps its limits, with names that it had before: these stay registered."""
        most = self.deployment.site_classes, self.deployment.site_clients
        before = self.brought.setdefault(node, (set(), set()))
        kinds = zip(("classes", "clients"), (classes, clients), before, most, strict=True)
        for kind, names, known, limit in kinds:
            if (count := len(known.union(names))) > limit:
                raise RefusedError(
                    "too many",
                    f"it has registered {count:,} {kind}, expected at most {limit:,}; if they are "
                    f"real, set site-{kind} at the server",
                )
        for names, known in zip((classes, clients), before, strict=True):
            known.update(names)

    def _admit_and_save(self, arrived: Mapping[int, dict[str, Any]], round: int) -> None:
        before = self.registry
        self._admit(arrived, round)
        if self.registry is not before:
            save_registry(self.path, self.registry)

    def _refuse(self, node: int, error: RefusedError) -> None:
        self.refused[node] = error
        self.online.pop(node, None)
        log_line(_why(node, error))

    def read(
        self, node: int, reply: "Message | RefusedError", round: int
    ) -> tuple[dict[str, Any], dict[str, Parts]]:
        """A reply; one that says that the site's names have changed registers them."""
        metadata, buffers = read_reply(reply, round)
        if "changed" in metadata:
            self._admit_and_save({node: metadata["changed"]}, round)
            raise RefusedError("registered", "classes or clients of the site have changed")
        return metadata, buffers

    def exchange(
        self, messages: Iterable[tuple[int, Message]], enough: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, "Message | RefusedError"]]:
        """:func:`fedss.flower.exchange.exchange` with the deployment's times."""
        of_run = self.deployment
        return exchange(self.grid, messages, of_run.deadline, enough, of_run.grace, self.unanswered)

    def put_aside(self, node: int, error: RefusedError, round: int) -> None:
        """Do not ask a site that made the others wait, in some rounds from ``round`` on."""
        if error.reason in _WAITED_FOR and self.deployment.aside:
            self.aside[node] = again = round + self.deployment.aside
            log_line(
                f"site {node} let the others wait ({error.reason}): it is not asked before round "
                f"{again + 1}, unless it answers or starts anew before"
            )

    def _take_back(self, online: Collection[int], round: int) -> None:
        """Ask those sites again whose time is over, or that have answered at last."""
        late = list(self.unanswered)
        for reply in once_more(self.grid.pull_messages, late) if late else []:
            node = self.unanswered.pop(reply.metadata.reply_to_message_id, None)
            # An error is Flower's own, mostly that the message has expired.
            if node in self.aside and not reply.has_error():
                del self.aside[node]
                log_line(f"site {node} has answered at last: it is asked again")
        self.aside = {n: again for n, again in self.aside.items() if n in online and again > round}
        self.unanswered = {id: n for id, n in self.unanswered.items() if n in self.aside}

    def message(self, kind: str, node: int, round: int, content: RecordDict) -> Message:
        """A message for a node."""
        # Flower reports an expired message as lost: not before our own deadline.
        ttl = self.deployment.deadline + 2.0
        return Message(content, dst_node_id=node, message_type=kind, ttl=ttl, group_id=str(round))

    def homes(self) -> dict[int, int]:
        """The node of each client that is online."""
        return {k: node for node, site in self.online.items() for k in site.places}

    def by_node(self, clients: Iterable[int]) -> dict[int, list[int]]:
        """Those of the clients that are online, by node."""
        homes, of_node = self.homes(), dict[int, list[int]]()
        for k in clients:
            if k in homes:
                of_node.setdefault(homes[k], []).append(k)
        return of_node


def _why(node: int, error: RefusedError) -> str:
    detail = f": {error.detail}" if error.detail else ""
    return f"site {node} could not register ({error.reason}){detail}"
