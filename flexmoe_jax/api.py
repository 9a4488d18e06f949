"""Models in memory: open a model directory, choose experts, and get logits, text and scores."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy.typing as npt
from jax.sharding import Mesh

from flexmoe_jax import tree
from flexmoe_jax.artifacts.model_dir import load_model
from flexmoe_jax.data.chat import Turn, encode_prompt
from flexmoe_jax.data.tokenizer import Tokenizer, load_tokenizer
from flexmoe_jax.errors import DataError
from flexmoe_jax.evaluate.joining import Joining
from flexmoe_jax.evaluate.lm import LM
from flexmoe_jax.evaluate.perplexity import Score, half_window, score
from flexmoe_jax.evaluate.routing import TokenRouting, route_text
from flexmoe_jax.evaluate.statistics import TokenStatistics, token_statistics
from flexmoe_jax.model.decoder import Decoder, forward
from flexmoe_jax.model.generate import Sampling, generate, stream
from flexmoe_jax.model.precision import exact
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.parallel.specs import place
from flexmoe_jax.parallel.stacked import stack_weights
from flexmoe_jax.params import EXPERT


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model in memory. `params` is the whole tree with named experts; `top_k` experts are active per token.

    The devices of `mesh` hold the shards of `params`, which are placed there at the first use (ConfigError if the mesh
    cannot split them). `score` works with any number of processes, all other methods with one.

    `select` and `without` return the model that never had the other experts: the same arrays, run by the same code as a
    model merged without them. Its outputs are bit-identical to that model's: experts are left out, never masked.
    """

    config: ModelConfig
    params: tree.Params
    tokenizer: Tokenizer
    wanted_top_k: int | None = None
    mesh: Mesh = dataclasses.field(default_factory=mesh_of_one)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts in canonical order: `public` first, then alphabetical."""
        return tree.canonical_order(self.params["experts"])

    @property
    def top_k(self) -> int:
        """Experts active per token: `wanted_top_k` (None: all), at most the number of experts."""
        return min(self.wanted_top_k or len(self.experts), len(self.experts))

    def select(self, names: Iterable[str]) -> "Model":
        """The model that has only these experts; FlexMoEError for an unknown name, a name given twice, or none."""
        return dataclasses.replace(self, params=tree.select(self.params, names))

    def without(self, *names: str) -> "Model":
        """The model that never had these experts; FlexMoEError for an unknown name, or if no expert is left."""
        return dataclasses.replace(self, params=tree.without(self.params, *names))

    def logits(self, tokens: npt.ArrayLike) -> jax.Array:
        """Integer token ids [T] or [B, T] -> float32 logits [T, V] or [B, T, V].

        DataError for another shape or dtype, no token, more than `max_seq_len` tokens, or ids outside the vocabulary.
        """
        tokens = jnp.asarray(tokens)
        if tokens.ndim not in (1, 2) or not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.size == 0:
            raise DataError(
                f"tokens have shape {tokens.shape} and dtype {tokens.dtype}", "give integer ids [T] or [B, T]"
            )
        if tokens.shape[-1] > self.config.max_seq_len:
            raise DataError(
                f"{tokens.shape[-1]} tokens exceed the model's {self.config.max_seq_len}", "give a shorter sequence"
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.config.vocab_size:
            raise DataError(
                f"token ids range from {int(tokens.min())} to {int(tokens.max())}, the vocabulary has "
                f"{self.config.vocab_size}",
                "encode the text with this model's own tokenizer",
            )
        return _logits(self.decoder(), self._stacked, jnp.atleast_2d(tokens)).reshape(*tokens.shape, -1)

    def generate(self, prompt: str | Sequence[Turn], **kwargs) -> str:
        """The continuation of `prompt`, without the prompt; arguments and errors as of `stream`."""
        return "".join(self.stream(prompt, **kwargs))

    def stream(
        self,
        prompt: str | Sequence[Turn],
        *,
        experts: Iterable[str] | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_ids: Iterable[int] = (),
        seed: int = 0,
    ) -> Iterator[str]:
        """Yields the continuation of `prompt` piece by piece, with only `experts` if given.

        A prompt is a text, or the turns of a conversation ({"role": "user", "content": text}, ..), which the model's
        chat template makes a text of. `temperature` 0 is greedy; `top_k` and `top_p` restrict the sampled tokens (not
        the experts). The text ends before one of the tokenizer's or of these `stop_ids`, or after `max_new_tokens`. A
        piece is the text of one token, or of several that form one character. FlexMoEError for an unknown expert,
        impossible sampling, a prompt that exceeds `max_seq_len` together with `max_new_tokens`, and for turns without
        a chat template or that it cannot render.
        """
        model = self if experts is None else self.select(experts)
        if isinstance(prompt, str):
            ids, before = self.tokenizer.encode_prompt(prompt), self.tokenizer.encode(prompt)
        else:  # the answer is a text of its own
            ids, before = encode_prompt(self.tokenizer, prompt), []
        steps = stream(
            dataclasses.replace(model.decoder(), dispatch="sparse"),  # sparse decoding reads weights in place
            model._stacked,
            [ids],
            max_new_tokens=max_new_tokens,
            stop_ids={*self.tokenizer.stop_ids, *stop_ids},
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
        )
        pieces = self.tokenizer.pieces((token for tokens in steps for token in tokens.values()), before)
        return (piece for piece in pieces if piece)

    def score(
        self,
        texts: list[str],
        *,
        seq_len: int | None = None,
        stride: int | None = None,
        uniform: bool = False,
        batch_size: int = 8,
    ) -> Score:
        """Bits per byte and routed shares of `texts`.

        Windows of `seq_len` tokens (default: `max_seq_len`) advance by `stride` (default: half a window).
        `uniform` ignores the router: every expert has equal weight. Errors as of `evaluate.perplexity.score`.
        """
        seq_len = seq_len or self.config.max_seq_len
        run = self.decoder(uniform)
        stride = half_window(seq_len) if stride is None else stride
        return score(
            run, self._stacked, texts, self.tokenizer, self.mesh, seq_len=seq_len, stride=stride, batch_size=batch_size
        )

    def joining(self, texts: Mapping[str, list[str]], *, seq_len: int | None = None) -> dict[str, Joining]:
        """What this merged model gives or costs owners: their held-out `texts` under three models with its top-k.

        `texts` is {expert: documents}, with D documents each; the result has the same names in canonical order. Its
        scores are in bits per byte: public alone, {public, owner}, and all experts (`gain`, `regret`). For `public`
        the second is public alone, too. Windows as of `score`, one model after the other: no device copy of the
        weights is kept. FlexMoEError for an unknown expert, no text, or a model without `public`; DataError as of
        `score`.
        """
        owners = tree.check_known(texts, self.experts)

        def scores(experts: Iterable[str], names: Iterable[str]) -> dict[str, Score]:
            model = self.select(experts)
            return {name: model.score(texts[name], seq_len=seq_len) for name in names}

        public = scores([tree.PUBLIC], owners)
        hybrids = public | {name: scores([tree.PUBLIC, name], [name])[name] for name in owners if name != tree.PUBLIC}
        merged = scores(self.experts, owners)
        return {name: Joining(public[name], hybrids[name], merged[name]) for name in owners}

    def routing(self, text: str) -> TokenRouting:
        """The tokens of `text` (the first `max_seq_len - 1`) and the weights that every layer gives each expert.

        DataError if there is no token.
        """
        return route_text(self.decoder(), self._stacked, text, self.tokenizer)

    def statistics(self, rows: list[list[int]], sampling: Sampling) -> list[TokenStatistics]:
        """What the model says of every token of `rows` but the first of each (`evaluate.statistics`)."""
        return token_statistics(self.decoder(), self._stacked, rows, sampling)

    def continuations(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling, seed: int = 0
    ) -> list[list[int]]:
        """The new token ids of each prompt of token ids, drawn together; a row ends before a stop token."""
        run = dataclasses.replace(self.decoder(), dispatch="sparse")
        how = {"stop_ids": self.tokenizer.stop_ids, "sampling": sampling, "seed": seed}
        return generate(run, self._stacked, prompts, max_new_tokens=max_new_tokens, **how)

    def lm(self, batch_size: int = 8) -> LM:
        """The model as benchmarks call it: log-likelihoods, and text until a stop string."""
        return LM(self.decoder(), self._stacked, self.tokenizer, batch_size)

    def decoder(self, uniform: bool = False) -> Decoder:
        """The `Decoder` that runs this model: top-k of its experts, or all of them with equal weights (`uniform`)."""
        sparse = self.mesh.size > 1 or self.top_k < len(self.experts)
        return Decoder(self.config, self.top_k, "sparse" if sparse else "dense", uniform)

    @functools.cached_property
    def _stacked(self) -> tree.Params:
        """The parameters on the devices, experts stacked; made once per selection."""
        return place(
            self.mesh, {**self.params, "experts": stack_weights(self.params["experts"], self.mesh.shape[EXPERT])}
        )


def load(path: str | pathlib.Path, mesh: Mesh | None = None) -> Model:
    """Opens the model directory `path` after all its digests are checked.

    `mesh` (`parallel.mesh.make_mesh`) splits the model over devices; by default the first device holds it. For several
    devices the arrays are memory-mapped files, of which a process reads only what its devices hold. ArtifactError for a
    damaged directory.
    """
    mesh = mesh or mesh_of_one()
    directory, params = load_model(path, mapped=mesh.size > 1)
    tokenizer = load_tokenizer(directory.tokenizer_files).for_rows(directory.config.vocab_size)
    return Model(directory.config, params, tokenizer, directory.top_k, mesh)


@functools.partial(jax.jit, static_argnums=0)
@exact
def _logits(run: Decoder, params: tree.Params, tokens_BT: jax.Array) -> jax.Array:
    return forward(run, params, tokens_BT).logits_BTV
