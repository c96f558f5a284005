"""A network of your own: train it, load what was trained, embed images with it.

Any module that maps float pixels [B, C, H, W] to vectors [B, features] will do. Where these are not
of size `embedding_size`, a linear layer is added; embeddings are brought to length 1.

    python examples/own_backbone.py
"""

import tempfile
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

import fedss


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    # A group per channel: statistics of an image alone, the same at every client.
    return nn.Sequential(layer, nn.GroupNorm(outputs, outputs))


class Residual(nn.Module):
    """Four convolutions, the second of which adds to what it was given."""

    def __init__(self, channels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.stem = convolution(channels, width, stride=2)
        self.middle, self.fine, self.last = (convolution(width, width) for _ in range(3))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x = nn.functional.relu(self.stem(pixels_BCHW))
        x = nn.functional.max_pool2d(nn.functional.relu(x + self.middle(x)), 2)
        x = nn.functional.max_pool2d(nn.functional.relu(self.fine(x)), 2)
        # No ReLU at the end: the linear layer that follows wants both signs.
        return nn.functional.adaptive_max_pool2d(self.last(x), 3).flatten(1)


def main(rounds: int = 30, classes: int = 320) -> float:
    """Train it on glyphs, load it, embed two files; the cosine of the two."""
    config = fedss.Config(rounds=rounds, glyphs_classes=classes, glyphs_clients=64, eval_every=0)
    data = fedss.load_data(config)
    assert data.test is not None
    with tempfile.TemporaryDirectory() as folder:
        run = fedss.train(config, Path(folder) / "run", data=data, backbone=Residual())
        # The weights come from the run folder, the structure from the module.
        model = fedss.load(run.folder, backbone=Residual())
        files = [Path(folder) / f"{i}.png" for i in range(2)]
        for file, pixels in zip(files, data.test.query.pixels[:2], strict=True):
            Image.fromarray(pixels[0]).save(file)
        one, other = fedss.embed_files(model, files).embeddings_ND
    print(f"MAP@10 on unseen classes: {run.summary['map_at_10']:.3f}")
    return float(one @ other)


if __name__ == "__main__":
    print(f"cosine of the first two test images: {main():.3f}")
