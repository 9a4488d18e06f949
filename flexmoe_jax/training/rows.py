"""Router rows that are not trained: a linear discriminant "the owner's text or public text?" in every layer.

The inputs x of a layer's router have means m_own and m_public and, within each text, a common covariance S. The
log-odds of the two texts under such Gaussians are linear,

    s_own(x) - s_public(x) = a * (m_own - m_public)' S^-1 x + c,

which is the router's form r.x + b, the bias included. (a, c) are fitted by logistic regression on further tokens: real
inputs are no Gaussians, and odds that are calibrated against the same public text are comparable between owners who
never met. Everything is a function of the owner's text, public text and the public model.
"""

import dataclasses
import functools
import io
import logging
import math
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg
import numpy as np
import scipy.optimize
import scipy.special
from jax.sharding import Mesh

from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.pipeline import Batch, Mixture, mix_batches
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import write_bytes
from flexmoe_jax.model.decoder import Decoder, hidden_states, moe
from flexmoe_jax.model.precision import EXACT, exact
from flexmoe_jax.parallel.mesh import everywhere
from flexmoe_jax.parallel.processes import is_lead
from flexmoe_jax.parallel.specs import batch_parts, place, place_batch
from flexmoe_jax.progress import track
from flexmoe_jax.training.metrics import log_chance
from flexmoe_jax.training.start import Start
from flexmoe_jax.training.state import place_frozen
from flexmoe_jax.training.step import decoder_of, halves
from flexmoe_jax.tree import PUBLIC, Params

log = logging.getLogger(__name__)

LEAST_TOKENS, TOKENS_PER_INPUT = 8192, 16  # tokens of each text that the means and the covariance are taken from
SHRINKAGE = 0.1  # towards the covariance's mean variance in all directions


def with_discriminants(
    run: RunConfig, initial: Start, mixtures: list[Mixture], mesh: Mesh, kept: pathlib.Path, started: bool
) -> Start:
    """`initial` with the owner's router rows [L, D] and biases [L] from discriminants, as `config.router` asks.

    They are kept in the file `kept`. A run that has `started`, and so cannot be another one, reads them from there;
    ArtifactError if that file is damaged. Only text that the run trains on is read. `config.bias_init`, the owner's
    prior, is added to the bias, which is at most 0.
    """
    if run.router != "generative":
        return initial
    if started and kept.exists():
        router_LD, bias_L = _read(kept)
    else:
        router_LD, bias_L = _discriminants(run, initial, mixtures, mesh)
        if is_lead():
            buffer = io.BytesIO()
            np.savez(buffer, router=router_LD, bias=bias_L)
            write_bytes(kept, buffer.getvalue())
    owner = {**initial.params["experts"][run.owner], "router": router_LD, "bias": bias_L}
    experts = {**initial.params["experts"], run.owner: owner}
    return dataclasses.replace(initial, params={**initial.params, "experts": experts})


def _read(kept: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(kept) as arrays:  # the archive has a checksum of each array
            return arrays["router"], arrays["bias"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        remedy = "delete it: the router rows are then made again, of the same text"
        raise ArtifactError(f"{kept} cannot be read: {error}", remedy) from error


def _discriminants(
    run: RunConfig, initial: Start, mixtures: list[Mixture], mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """(rows float32 [L, D], biases float32 [L]) of the owner beside the public expert."""
    public = initial.params["experts"][PUBLIC]
    params = place_frozen(mesh, {**initial.params, "experts": {PUBLIC: public}}, run)
    rows = batch_parts(mesh) * math.ceil(run.batch_size / batch_parts(mesh) / 2)
    batches = mix_batches(*(dataclasses.replace(mixture, rows=rows).batches(run.seed) for mixture in mixtures))
    decoder, tokens = decoder_of(initial.model, run), max(LEAST_TOKENS, TOKENS_PER_INPUT * initial.model.d_model)
    count = math.ceil(tokens / (rows * run.seq_len))
    fitted = range(count, count + math.ceil(count / 2))
    moments = None
    with jax.set_mesh(mesh), track("router rows", fitted.stop, "batches") as advance:
        for n in range(count):
            found = _moments(decoder, params, place_batch(mesh, batches[n]))
            moments = found if moments is None else jax.tree.map(jnp.add, moments, found)
            advance(1)
        direction_LD = np.asarray(_directions(*jax.tree.map(lambda total: total / count, moments)), np.float64)
        probe = {"router": direction_LD.astype(np.float32), "bias": np.zeros(len(direction_LD), np.float32)}
        probe = params["experts"][PUBLIC] | place(mesh, {"experts": {PUBLIC: probe}})["experts"][PUBLIC]
        params = {**params, "experts": {PUBLIC: probe}}
        scores = []
        for n in fitted:
            scores.append(np.asarray(_scores(decoder, params, place_batch(mesh, batches[n])), np.float64))
            advance(1)
    own_N, counted_N = (
        np.concatenate([getattr(batches[n], name).reshape(-1) for n in fitted]) > 0 for name in ("own", "weights")
    )
    fits = [fit_odds(s_N[counted_N], own_N[counted_N]) for s_N in np.concatenate(scores, axis=1)]
    factor_L, constant_L, accuracy_L = np.array(fits).T
    _say(accuracy_L)
    router_LD = np.asarray(public["router"]) + factor_L[:, None] * direction_LD
    return router_LD.astype(np.float32), np.minimum(constant_L + run.bias_init, 0.0).astype(np.float32)


@jax.jit
@exact
def _directions(own_LD: jax.Array, public_LD: jax.Array, square_LDD: jax.Array) -> jax.Array:
    """S^-1 (m_own - m_public) of every layer, float32 [L, D], from the means and the mean of both texts' x x'.

    By conjugate gradients, on the device: as many processes as a host has devices would each solve with all of its
    cores. Shrinkage bounds the condition of S by about D / SHRINKAGE.
    """
    D = own_LD.shape[-1]

    def direction(own_D: jax.Array, public_D: jax.Array, square_DD: jax.Array) -> jax.Array:
        within_DD = square_DD - (jnp.outer(own_D, own_D) + jnp.outer(public_D, public_D)) / 2
        shrunk_DD = (1 - SHRINKAGE) * within_DD + SHRINKAGE * jnp.trace(within_DD) / D * jnp.eye(D)
        multiply = functools.partial(jnp.dot, shrunk_DD, precision=EXACT)
        return jax.scipy.sparse.linalg.cg(multiply, own_D - public_D, tol=1e-5, maxiter=D)[0]

    return jax.vmap(direction)(own_LD, public_LD, square_LDD)


def fit_odds(scores_N: np.ndarray, own_N: np.ndarray) -> tuple[float, float, float]:
    """(a, c, accuracy) of the log-odds a * score + c that a token is the owner's, by logistic regression.

    `scores_N` is float64, `own_N` bool; each of the two texts has half of the weight. A small penalty on the
    standardized slope keeps it finite where the texts are separable.
    """
    weights_N = np.where(own_N, 0.5 / max(own_N.sum(), 1), 0.5 / max((~own_N).sum(), 1))
    mean = float((weights_N * scores_N).sum())  # sums, not products of BLAS, which would take every core for each
    deviation = math.sqrt(float((weights_N * (scores_N - mean) ** 2).sum())) or 1.0
    z_N, sign_N = (scores_N - mean) / deviation, np.where(own_N, 1.0, -1.0)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        odds_N = sign_N * (values[0] * z_N + values[1])
        slope_N = -weights_N * sign_N * scipy.special.expit(-odds_N)
        penalty = 1e-4 * values[0] ** 2
        return float((weights_N * np.logaddexp(0.0, -odds_N)).sum()) + penalty, np.array(
            [(slope_N * z_N).sum() + 2e-4 * values[0], slope_N.sum()]
        )

    slope, constant = scipy.optimize.minimize(loss, np.zeros(2), jac=True, method="BFGS").x
    accuracy = float(weights_N[sign_N * (slope * z_N + constant) > 0].sum())
    return slope / deviation, constant - slope * mean / deviation, accuracy


def _say(accuracy_L: np.ndarray) -> None:
    """Logs how well the rows tell the two texts apart."""
    log.info(
        f"router rows by discriminants: they tell {accuracy_L.mean():.1%} of the tokens right "
        f"({accuracy_L.min():.1%} to {accuracy_L.max():.1%} by layer; chance is 50%)"
    )
    log_chance(accuracy_L.tolist())


@functools.partial(jax.jit, static_argnums=0)
@exact
def _moments(run: Decoder, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The means of the routers' inputs x over own and over public tokens [L, D], and that of x x' over both [L, D, D].

    All float32; own and public tokens have half of the weight each.
    """
    assert batch.own is not None  # RunConfig refuses the run without public text
    own_N = batch.own.reshape(-1)
    totals = {"all": batch.weights.sum(), "own": (batch.weights * batch.own).sum()}
    halves_N = halves(batch.weights, batch.own, jax.tree.map(lambda total: jnp.maximum(total, 1.0), totals)).reshape(-1)

    def watch(run: Decoder, experts: Params, x_BTD: jax.Array) -> tuple:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(jnp.float32)
        weighted_ND = halves_N[:, None] * x_ND
        own_D, all_D = 2 * jnp.dot(own_N, weighted_ND, precision=EXACT), 2 * weighted_ND.sum(0)
        square_DD = jnp.dot(weighted_ND.T, x_ND, precision=EXACT)
        return moe(run, experts, x_BTD)[0], (own_D, all_D - own_D, square_DD)

    _, found = hidden_states(run, params, batch.tokens, batch.segments, mix=watch)
    return jax.tree.map(everywhere, found)


@functools.partial(jax.jit, static_argnums=0)
@exact
def _scores(run: Decoder, params: Params, batch: Batch) -> jax.Array:
    """The logits [L, N] of the only expert's router, float32."""
    return everywhere(hidden_states(run, params, batch.tokens, batch.segments)[1][..., 0])
