"""The example trains, loads and embeds."""

import numpy as np

import fedss
from examples.own_backbone import main


def test_it_trains_loads_and_embeds(capsys, monkeypatch):
    embedded = []
    embed_files = fedss.embed_files

    def noted(model, files):
        embedded.append(embed_files(model, files).embeddings_ND)
        return embed_files(model, files)

    monkeypatch.setattr(fedss, "embed_files", noted)
    cosine = main(rounds=2, classes=40)
    (vectors,) = embedded
    assert vectors.shape == (2, 64)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    assert cosine == np.float64(vectors[0] @ vectors[1])
    found = float(capsys.readouterr().out.removeprefix("MAP@10 on unseen classes: "))
    assert 0 < found < 1
