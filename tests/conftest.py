"""Settings of all tests.

timm imports torchvision, and a torchvision of another build than torch dies at its import for want
of two operators, which no test calls. Tests that need it are skipped then (tests/installed.py), as
it would fail for whoever has that pair. A CI that cannot have another pair sets
FEDSS_TEST_DECLARE_OPERATORS: the two are declared, without an implementation, and these tests run.

torch gets one thread, here and in the processes that tests start: networks are so small that two
threads take longer than one, and pytest-xdist has a process on each core. What several threads do
is tested where a test sets their number.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it once, when it is imported

import torch
from hypothesis import settings

settings.register_profile("fedss", deadline=None)  # a timing is never a test
settings.load_profile("fedss")

_declared = torch.library.Library("torchvision", "FRAGMENT")
if os.environ.get("FEDSS_TEST_DECLARE_OPERATORS"):
    for name in ("nms", "qnms"):
        _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
