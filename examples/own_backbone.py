"""A network of your own: train it, load what was trained, embed pictures with it.

Any module that maps float pixels [B, C, H, W] to vectors [B, features] will do. Where these are not
of size `embedding_size`, a linear layer is added; embeddings are brought to length 1.

    python examples/own_backbone.py
"""

import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import fedss


class TwoScales(nn.Module):
    """Strokes and their arrangement: features before and after a second convolution."""

    def __init__(self, channels: int = 1, width: int = 24) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            nn.Conv2d(channels, width, 5, stride=2, padding=2), nn.GroupNorm(4, width), nn.ReLU()
        )
        self.coarse = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GroupNorm(4, 2 * width)
        )

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        fine = self.fine(pixels_BCHW)
        coarse = self.coarse(fine)
        parts = (nn.functional.adaptive_avg_pool2d(part, 4).flatten(1) for part in (fine, coarse))
        return torch.cat(list(parts), dim=1)


def main(rounds: int = 30, classes: int = 320) -> float:
    """Train it on glyphs, load it, embed two files; the cosine of the two."""
    config = fedss.Config(rounds=rounds, glyphs_classes=classes, glyphs_clients=64, eval_every=0)
    data = fedss.load_data(config)
    with tempfile.TemporaryDirectory() as folder:
        run = fedss.train(config, Path(folder) / "run", data=data, backbone=TwoScales())
        # The weights come from the run folder, the structure from the module.
        model = fedss.load(run.folder, backbone=TwoScales())
        files = [Path(folder) / f"{i}.png" for i in range(2)]
        for file, pixels in zip(files, data.test.query.pixels[:2], strict=True):
            Image.fromarray(pixels[0]).save(file)
        one, other = fedss.embed_files(model, files).embeddings_ND
    print(f"MAP@10 on unseen classes: {run.summary['map_at_10']:.3f}")
    return float(one @ other)


if __name__ == "__main__":
    print(f"cosine of the first two test pictures: {main():.3f}")
