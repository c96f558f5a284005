"""Which networks of timm train: the smallest of each family, with random weights.

    python benchmarks/architectures.py      (15 minutes on one idle core; --only NAME ...: no file)

A family is a module of ``timm.models``; its smallest model has the fewest parameters, models for
timm's own tests apart. Each is built as ``--backbone timm:<name>`` builds it, for color images of
64 pixels a side or, if it refuses these, of the size that timm states for it. Then it takes five
steps of SGD on four images of noise in two classes, with fixed class rows. It trains if the loss is
finite throughout and lower in the end. Nothing is downloaded.

Writes ``benchmarks/results/architectures.txt``.
"""

import math
import warnings

import common
import timm
import torch

from fedss.errors import ConfigError
from fedss.models import build_embedder, flatten_

SIDE, IMAGES, CLASSES, STEPS, LR, SCALE, DIM = 64, 4, 2, 5, 0.0005, 10.0, 32


def smallest() -> dict[str, str]:
    """The model of fewest parameters by family."""
    smallest = {}
    for family in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=family):
            if not name.startswith("test_"):
                with torch.device("meta"):
                    net = timm.create_model(name, num_classes=0)
                sizes[name] = sum(parameter.numel() for parameter in net.parameters())
        if sizes:
            smallest[family] = min(sizes, key=sizes.__getitem__)
    return smallest


def losses(name: str, side: int) -> tuple[int, list[float]]:
    """The number of parameters, and the loss before each step."""
    embedder = build_embedder(
        f"timm:{name}", channels=3, image_size=side, embedding_size=DIM, seed=0
    ).train()
    flat, rng = flatten_(embedder), torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (IMAGES, 3, side, side), generator=rng, dtype=torch.uint8)
    rows = torch.nn.functional.normalize(torch.randn(2 * CLASSES, DIM, generator=rng), dim=1)
    labels, seen = torch.arange(IMAGES) % CLASSES, []
    for _ in range(STEPS):
        flat.grad_P.zero_()
        loss = torch.nn.functional.cross_entropy(SCALE * embedder(pixels) @ rows.T, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        seen.append(loss.item())
        flat.theta_P.add_(flat.grad_P, alpha=-LR)
    return len(flat.theta_P), seen


def line(family: str, name: str) -> tuple[bool, str]:
    published = timm.get_pretrained_cfg(name)
    why = ""
    for side in dict.fromkeys((SIDE, published.input_size[-1] if published else SIDE)):
        try:
            size, seen = losses(name, side)
        except ConfigError as error:
            why = str(error)
            continue
        if all(map(math.isfinite, seen)) and seen[-1] < seen[0]:
            told = f"{size:>13,}{side:>6}{seen[0]:>9.3f}{seen[-1]:>9.3f}"
            return True, f"{family:<28}{name:<36}{told}"
        why = f"the loss goes {', '.join(f'{value:.3f}' for value in seen)} at {side} px"
    return False, f"{family:<28}{name:<36}  no: {why}"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models; write no file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report = common.Report(
        "Which networks of timm train: the smallest of each family, random weights", ["timm"]
    )
    report.add(f"{'family':<28}{'model':<36}{'parameters':>13}{'px':>6}{'loss':>9}{'at last':>9}")
    models = {name: name for name in options.only} if options.only else smallest()
    count = 0
    for family, name in models.items():
        trains, text = line(family, name)
        count += trains
        report.add(text)
    report.add("", f"{count} of {len(models)} train")
    report.write(unless=options.only)


if __name__ == "__main__":
    main()
