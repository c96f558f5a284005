"""A backbone with trained weights on photographs: what it knows, and what it learns at clients."""

from pathlib import Path

import pytest

import fedss
from fedss.models import build_embedder
from tests.installed import needs_timm
from tests.photographs import fine_tuning, make_photographs, of_features, of_pixels
from tests.pretrained import lite0_weights


@needs_timm
@pytest.mark.slow
def test_trained_features_beat_pixels_and_fine_tuning_beats_both(tmp_path: Path) -> None:
    """On things that neither ImageNet nor the clients have seen."""
    weights, photos = lite0_weights(), make_photographs()
    config = fine_tuning(weights)
    embedder = build_embedder(
        config.backbone, channels=3, image_size=64, embedding_size=64, seed=0, weights=weights
    )
    frozen, pixels = of_features(embedder, photos), of_pixels(photos)
    assert frozen > pixels + 0.2
    run = fedss.train(config, tmp_path / "run", data=photos, on_round=lambda record: None)
    assert run.summary["map_at_10"] > frozen + 0.03
