"""What is frozen of a backbone gives the same numbers in every round: it is computed once.

Shape suffixes: B images of a batch, C channels, H height, W width, X numbers at the border.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn


@dataclass(frozen=True, eq=False)
class Border:
    """A backbone cut in two: ``trained(frozen(x))`` is what the backbone gives.

    Attributes:
        frozen: pixels, scaled as the backbone expects them, [B, C, H, W], to activations [B, X].
        trained: activations to features; it holds the backbone's own parameters, no copies.
        shape: X, the shape of an image's activations.
    """

    frozen: Callable[[Tensor], Tensor]
    trained: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]


def find_border(backbone: nn.Module, images_BCHW: Tensor) -> Border | None:
    """Where the trained part of a backbone begins; None where that cannot be told.

    The backbone is followed by ``torch.fx``, with a module as one step if all of its parameters are
    trained or none is. It must be one tensor that goes from the frozen part to the other.

    Args:
        backbone: the module; what does not require grad is frozen.
        images_BCHW: two images or more, to try the cut with.

    Returns:
        None also where nothing is frozen before the first part that trains.
    """
    trained = {p.requires_grad for p in backbone.parameters()}
    if False not in trained:
        return None
    if True not in trained:
        border: Border | None = Border(backbone, nn.Identity(), ())
    else:
        try:
            border = _cut(backbone)
        except Exception:  # whatever tracing makes of a forward that depends on its input
            return None
    if border is None:
        return None
    with torch.no_grad():
        whole_BF, activations_BX = backbone(images_BCHW), border.frozen(images_BCHW)
        if not isinstance(activations_BX, Tensor) or len(activations_BX) != len(images_BCHW):
            return None
        if not torch.allclose(border.trained(activations_BX), whole_BF, rtol=1e-4, atol=1e-5):
            return None
    return Border(border.frozen, border.trained, tuple(activations_BX.shape[1:]))


class _Tracer(fx.Tracer):
    """Looks into a module only if a part of it is trained and another is not."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return len({p.requires_grad for p in m.parameters()}) < 2


def _cut(backbone: nn.Module) -> Border | None:
    _, *others = inspect.signature(backbone.forward).parameters.values()
    defaults = {p.name: p.default for p in others if p.default is not inspect.Parameter.empty}
    graph = _Tracer().trace(backbone, concrete_args=defaults)
    nodes = list(graph.nodes)
    of_input, trained = set[fx.Node](), set[fx.Node]()
    for node in nodes:
        if node.op == "placeholder" or of_input.intersection(node.all_input_nodes):
            of_input.add(node)
        if _is_trained(backbone, node) or trained.intersection(node.all_input_nodes):
            trained.add(node)
    crossing = {
        source
        for node in nodes
        if node in trained
        for source in node.all_input_nodes
        if source in of_input and source not in trained
    }
    if len(crossing) != 1:
        return None
    (border,) = crossing
    if border.op == "placeholder":
        return None
    before, after = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[: nodes.index(border) + 1]:
        copies[node] = before.node_copy(node, copies.__getitem__)
    before.output(copies[border])
    copies = {border: after.placeholder("activations")}
    for node in nodes:
        # Constants, which no input reaches, are made anew.
        constant = node not in of_input
        if node not in copies and (node in trained or node.op == "output" or constant):
            copies[node] = after.node_copy(node, copies.__getitem__)
    return Border(_part(backbone, before), _part(backbone, after), ())


def _is_trained(backbone: nn.Module, node: fx.Node) -> bool:
    """Whether a step has parameters that train, of its own."""
    if node.op == "call_module":
        module = backbone.get_submodule(str(node.target))
        return any(p.requires_grad for p in module.parameters())
    if node.op == "get_attr":
        value: Any = backbone
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return bool(getattr(value, "requires_grad", False))
    return False


def _part(backbone: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    part = fx.GraphModule(backbone, graph)
    part.graph.eliminate_dead_code()
    part.recompile()
    part.delete_all_unused_submodules()
    return part
