"""What every test needs: a torchvision that can be imported, where only a foreign build is at hand.

`timm` and `torchmetrics` import torchvision. A torchvision built for another torch (a CUDA build
beside the CPU build of torch) cannot load its compiled operators and then dies at import with
"operator torchvision::nms does not exist". Only the two declarations that its Python code attaches
to are missing; no test here calls them. They are declared, without any implementation, if and only
if torchvision's own library cannot be loaded, so on a sound installation nothing happens.
"""

import importlib.util
from pathlib import Path

import torch
from hypothesis import settings

settings.register_profile("fedss", deadline=None)  # a timing is never a test
settings.load_profile("fedss")

_declared: list[torch.library.Library] = []  # a declaration lives as long as its Library


def _declare_missing_torchvision_operators() -> None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for library in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return
    declarations = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        declarations.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(declarations)


_declare_missing_torchvision_operators()
