"""Three sites with a few images each, for federations in this process."""

import csv
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import fedss
from fedss.config import Config
from fedss.flower.server_app import run_server
from tests.flower_grid import ProcessGrid

SITES = ("north", "south", "west")
CLIENTS = {"north": ("ada", "ben"), "south": ("cem", "dee", "eva"), "west": ("fay",)}


def write_secret(path: Path, text: str = "of the tests") -> Path:
    """A file such as ``fedss secret`` makes, the same for the same text."""
    path.write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
    path.chmod(0o600)
    return path


def write_photos(folder: Path) -> None:
    """An image folder for each site, and manifests of each and of all. Same client, same site.

    And a secret, for all sites and for a simulation.
    """
    write_secret(folder / "secret")
    rng = np.random.default_rng(0)
    prototypes = rng.integers(0, 256, (17, 8, 8))
    rows: dict[str, list[tuple[str, ...]]] = {}
    for site in SITES:
        for client in CLIENTS[site]:
            for label in sorted(rng.choice(10, 4, replace=False).tolist()):
                for copy in range(int(rng.integers(1, 4))):
                    name = f"{site}/{client}/class {label}/{copy}.png"
                    rows.setdefault(site, []).append((name, f"class {label}", client, "train"))
    for label in range(10, 17):  # at least two to test with at each site
        for copy in range(3):
            name = f"{SITES[label % 3]}/test/class {label}/{copy}.png"
            of_test = (name, f"class {label}", "test", "test")
            rows[SITES[label % 3]].append(of_test)
    for name, label, *_ in (row for part in rows.values() for row in part):
        noise = rng.normal(0, 20, (8, 8))
        image = np.clip(prototypes[int(label.split()[1])] + noise, 0, 255).astype(np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    for name, listed in {"all": [r for part in rows.values() for r in part], **rows}.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "label", "client", "split"), *listed])


def settings(photos: Path, **changes: Any) -> Config:
    small = {
        "data": "csv",
        "data_path": str(photos / "all.csv"),
        "image_size": 8,
        "channels": 1,
        "backbone": "conv4-8",
        "embedding_size": 6,
        "sample_size": 6,
        "rounds": 3,
        "clients_per_round": 4,
        "batch_size": 2,
        "eval_every": 1,
        "checkpoint_every": 1,
        # A federation does not know its images beforehand, so `auto` would be other numbers there.
        "server_momentum": 0.9,
        "class_row_lr": 1.0 if changes.get("method") == "moments" else 2.0,
        "secret_file": str(photos / "secret"),
    }
    return Config(**{**small, **changes})


def nodes(photos: Path, **more: Any) -> dict[int, dict[str, Any]]:
    return {
        7 * i + 3: {**site_of(photos, f"{site}.csv"), "workers": 2, **more}
        for i, site in enumerate(SITES)
    }


def site_of(photos: Path, manifest: str | Path) -> dict[str, Any]:
    """What a site with these images needs."""
    return {"data": str(photos / manifest), "own-secret-file": str(photos / "secret")}


def flood(photos: Path, clients: int) -> dict[str, Any]:
    """What a site needs that has so many clients, each with one image of a class of its own."""
    (photos / "flood").mkdir(exist_ok=True)
    names = [f"flood/{i}.png" for i in range(clients)]
    for i, name in enumerate(names):
        Image.fromarray(np.full((8, 8), i % 256, np.uint8)).save(photos / name)
    with (photos / "flood.csv").open("w", newline="") as file:
        rows = [(name, f"many {i}", f"many {i}", "train") for i, name in enumerate(names)]
        csv.writer(file).writerows([("image", "label", "client", "split"), *rows])
    return site_of(photos, "flood.csv")


def federate(grid: ProcessGrid, config: Config, out: Path, **deployment: Any) -> fedss.Run:
    """A federation as ``config`` says, but for the secret, which the sites have."""
    told = dataclasses.asdict(dataclasses.replace(config, secret_file=None))
    values = {k: "" if v is None else v for k, v in told.items()}
    federation = {"out": str(out), "sites": 3, "evaluate-at": "server", "deadline": 5.0, "pause": 0}
    return run_server(
        grid, {k.replace("_", "-"): v for k, v in {**values, **federation, **deployment}.items()}
    )
