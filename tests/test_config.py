import dataclasses
import json
import pydoc
from inspect import cleandoc

import pytest

from fedss import Config, ConfigError
from fedss.config import OPTIONS, config_from_dict
from fedss.variants import variant

PINNED = [
    "data",
    "data_path",
    "columns",
    "image_size",
    "channels",
    "test_classes",
    "skip_broken",
    "data_seed",
    "glyphs_classes",
    "glyphs_clients",
    "partition",
    "partition_clients",
    "client_classes",
    "rotations",
    "eval_split",
    "method",
    "sample_size",
    "sampler",
    "requests",
    "objective",
    "correction",
    "cover",
    "scale",
    "margin_kind",
    "margin",
    "row_mean",
    "normalize_rows",
    "spread_out_weight",
    "spread_out_margin",
    "spread_out_neighbours",
    "backbone",
    "pretrained",
    "weights",
    "trainable",
    "batch_norm",
    "pixel_mean",
    "pixel_std",
    "embedding_size",
    "projection_init",
    "rows_init",
    "rounds",
    "clients_per_round",
    "local_epochs",
    "local_steps",
    "batch_size",
    "client_lr",
    "class_row_lr",
    "augment",
    "precision",
    "lr_schedule",
    "lr_decay_start",
    "server_optimizer",
    "server_lr",
    "server_row_lr",
    "server_momentum",
    "server_second_momentum",
    "server_epsilon",
    "clip",
    "row_clip",
    "noise",
    "delta",
    "epsilon",
    "rows_down",
    "rows_up",
    "backbone_down",
    "backbone_up",
    "moments_rank",
    "row_dtype",
    "row_store",
    "norm_bound",
    "weight_cap",
    "aggregate",
    "seed",
    "secret_file",
    "eval_every",
    "patience",
    "checkpoint_every",
    "device",
    "stack",
    "workers",
    "cache_activations",
    "keep_memory",
]


def test_the_options_are_pinned():
    assert [option.name for option in OPTIONS] == PINNED


def test_texts_of_options_are_whole():
    section = cleandoc(Config.__doc__ or "").partition("Attributes:")[2].partition("\n\n")[0]
    words = [word for option in OPTIONS for word in f"{option.name}: {option.help}".split()]
    assert section.split() == words


def test_json_round_trip():
    config = Config(method="pos-only", local_steps=3, client_lr=1, pixel_mean=(0.485, 0.456, 0.4))
    assert config.pixel_mean == "0.485,0.456,0.4"
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "fedsss"}, "'fedsss' is unknown; did you mean fedss"),
        ({"method": "zebra"}, "choose from full, fedss"),
        ({"sample_size": 1}, "sample_size: expected at least 2 classes.*got 1"),
        ({"sample_size": 6.5}, r"sample_size: expected int, got 6.5 \(float\)"),
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"rounds": True}, "rounds: expected int"),
        ({"client_lr": -1.0}, "client_lr: expected a number above 0"),
        ({"client_lr": float("nan")}, "client_lr: expected a number above 0"),
        ({"client_lr": "fast"}, "client_lr: expected float"),
        ({"margin_kind": "cosfacce"}, "did you mean cosface"),
        ({"row_mean": "all"}, "row_mean: 'all' is unknown; choose from cohort, holders"),
        ({"class_row_lr": 0.0}, "class_row_lr: expected a number above 0"),
        ({"channels": 2}, "channels: expected 1 or 3, got 2"),
        ({"device": "gpu"}, "device: expected cpu, cuda or cuda:<number>, got gpu"),
        ({"device": "cuda:01"}, "device: expected cpu, cuda or cuda:<number>, got cuda:01"),
        ({"device": "cuda:200"}, "device: expected cpu, cuda or cuda:<number>, got cuda:200"),
        ({"device": "cuda:-1"}, "device: expected cpu, cuda or cuda:<number>, got cuda:-1"),
        ({"augment": "photo"}, "'photo' is unknown; did you mean photos"),
        ({"precision": "float16"}, "'float16' is unknown; did you mean"),
        ({"stack": 0}, "stack: expected at least 1, got 0"),
        ({"patience": 0, "eval_split": "validation"}, "patience: expected at least 1, got 0"),
        ({"patience": 3}, "patience: .* take eval_split validation"),
        ({"server_momentum": 1.0}, "below 1"),
        ({"sampler": "decks"}, "'decks' is unknown; did you mean deck"),
        ({"correction": 1.5}, r"correction: expected 0 \(none\) to 1 \(full\), got 1.5"),
        ({"cover": -1}, "cover: expected 0 or more"),
        ({"trainable": "last-0"}, "trainable: expected all, head or last-<number>, got last-0"),
        ({"pixel_mean": "0.5;0.4"}, "pixel_mean: expected numbers separated by commas.*'0.5;0.4'"),
        ({"pixel_std": ("wide",)}, "pixel_std: expected numbers separated by commas"),
        ({"batch_norm": "freze"}, "'freze' is unknown; did you mean freeze"),
        ({"rows_up": "int2"}, "rows_up: 'int2' is unknown; did you mean int"),
        ({"method": "moments", "normalize_rows": False}, "takes rows for unit vectors"),
        ({"image_size": 4097}, "image_size: expected 8 to 4096 pixels, got 4097"),
        ({"embedding_size": 2**20 + 1}, "embedding_size: expected 1 to 1048576, got 1048577"),
        ({"method": "moments", "embedding_size": 4097}, "expected at most 4096; got 4097"),
        (
            {"method": "moments", "moments_rank": 64, "embedding_size": 64},
            "expected below embedding_size = 64",
        ),
        ({"requests": "some"}, "'some' is unknown; choose from own, all, common"),
        ({"requests": "all", "method": "moments"}, "requests: all is for .*, not for moments"),
        ({"requests": "all", "method": "pos-only"}, "requests: all is for .*, not for pos-only"),
        ({"requests": "common", "method": "full"}, "requests: common is for .*, not for full"),
        ({"requests": "common", "row_mean": "holders"}, "row_mean: .* take cohort"),
        ({"requests": "common", "sampler": "sticky"}, "sampler: .* leave out sticky"),
    ],
)
def test_values_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        Config(**values)


def test_an_unknown_field_offers_the_nearest():
    with pytest.raises(ConfigError, match="'clients_lr' is unknown; did you mean client_lr"):
        config_from_dict({"clients_lr": 0.1})


def test_every_option_has_a_line_of_help():
    plain = pydoc.plaintext  # type: ignore[attr-defined]
    shown = " ".join(pydoc.render_doc(Config, renderer=plain).replace("|", " ").split())
    for option in OPTIONS:
        assert 10 < len(option.help) < 80, option.name
        assert f" {option.name}: {' '.join(option.help.replace('|', ' ').split())} " in shown


def test_variants_of_a_method():
    base = Config(rounds=7, sample_size=9)
    assert variant(base, "full") == dataclasses.replace(base, method="full")
    options = "sampler=deck,rows_up=int8,sample_size=none,client_lr=0.5,normalize_rows=no"
    text = f"fedss-published:{options}"
    assert variant(base, text) == dataclasses.replace(
        base,
        method="fedss-published",
        sampler="deck",
        rows_up="int8",
        sample_size=None,
        client_lr=0.5,
        normalize_rows=False,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fedsss:sampler=deck", "'fedsss' is unknown; did you mean fedss"),
        ("fedss:sampla=deck", "'sampla' is unknown; did you mean sampler"),
        ("fedss:sampler=dek", "'dek' is unknown; did you mean deck"),
        ("fedss:sampler", "expected method:option=value"),
        ("fedss:", "option in 'fedss:': '' is unknown"),
        ("fedss: sampler=deck", "' sampler' is unknown; did you mean sampler"),
        ("fedss:sampler=deck,sampler=sticky", "each option once; got 'sampler=sticky'"),
        ("fedss:seed=3", "'seed' is unknown"),
        ("fedss:data=omniglot", "'data' is unknown"),
        ("fedss:batch_size=many", "batch_size in .*: expected int, got 'many'"),
        ("fedss:normalize_rows=maybe", "choose from yes, no"),
    ],
)
def test_variants_that_cannot_be(text, message):
    with pytest.raises(ConfigError, match=message):
        variant(Config(), text)
