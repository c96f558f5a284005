"""The common job in FedJAX (Google): its FedAvg on a model in plain JAX, which uses all cores.

JAX computes in float32 unless JAX_ENABLE_X64 is set.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

jax.tree_map = jax.tree_util.tree_map  # FedJAX 0.0.17 calls what newer JAX has moved

import fedjax  # noqa: E402
from fedjax.algorithms import fed_avg  # noqa: E402
from job import BATCH, BLOCKS, GROUPS, LR, SCALE, finish, read_job, shapes, turns  # noqa: E402

Params = list[Any]


def embed(params: Params, x: Any) -> Any:
    for block in range(BLOCKS):
        weight, bias, scale, shift = params[4 * block : 4 * block + 4]
        axes = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=axes) + bias
        batch, height, width, channels = x.shape
        groups = x.reshape(batch, height, width, GROUPS, channels // GROUPS)
        mean = groups.mean((1, 2, 4), keepdims=True)
        groups = (groups - mean) * lax.rsqrt(groups.var((1, 2, 4), keepdims=True) + 1e-5)
        x = jax.nn.relu(groups.reshape(x.shape) * scale + shift)
        window = (1, 2, 2, 1)
        x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
    return x.reshape(len(x), -1) @ params[-2] + params[-1]


def normalized(x: Any) -> Any:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def loss(params: dict[str, Any], batch: dict[str, Any], rng: Any) -> Any:
    x = (batch["x"].astype(float) / 255 - 0.5) / 0.5
    h = normalized(embed(params["theta"], x))
    logits = SCALE * h @ normalized(params["rows"]).T
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], 1).mean()


def from_flat(theta: np.ndarray) -> Params:
    """Convolutions as HWIO, the linear layer from the left."""
    parts = np.split(theta, np.cumsum([np.prod(shape) for shape in shapes()])[:-1])
    tensors = [part.reshape(shape) for part, shape in zip(parts, shapes(), strict=True)]
    return [jnp.asarray(t.transpose(_AXES.get(t.ndim, (0,)))) for t in tensors]


def to_flat(params: Params) -> np.ndarray:
    back = {4: (3, 2, 0, 1), 2: (1, 0)}
    return np.concatenate([np.asarray(p).transpose(back.get(p.ndim, (0,))).ravel() for p in params])


_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}


def main() -> None:
    job = read_job(Path(sys.argv[1]))
    images = job.pixels.transpose(0, 1, 3, 4, 2)
    algorithm = fed_avg.federated_averaging(
        jax.grad(loss),
        fedjax.optimizers.sgd(LR),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH, num_epochs=1, skip_shuffle=True),
    )
    state = algorithm.init(
        {"theta": from_flat(job.theta.astype(float)), "rows": jnp.asarray(job.rows.astype(float))}
    )
    turn = turns()
    for cohort, orders in zip(job.cohorts, job.orders, strict=True):
        turn()
        clients = []
        for client, order in zip(cohort, orders, strict=True):
            examples = {"x": images[client, order], "y": job.labels[client, order]}
            clients.append((int(client), fedjax.ClientDataset(examples), jax.random.PRNGKey(0)))
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)
    turn()
    rows = np.asarray(state.params["rows"])
    finish(job, to_flat(state.params["theta"]), rows)


main()
