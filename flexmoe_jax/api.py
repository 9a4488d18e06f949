"""The library's front door: open a model directory, choose experts, get logits, text and scores."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flexmoe_jax import tree
from flexmoe_jax.artifacts.model_dir import load_model
from flexmoe_jax.config import ModelConfig
from flexmoe_jax.data.tokenizer import Tokenizer, load_tokenizer
from flexmoe_jax.errors import DataError
from flexmoe_jax.evaluate.lm import LM
from flexmoe_jax.evaluate.perplexity import Score, score
from flexmoe_jax.evaluate.routing import TokenRouting, route_text
from flexmoe_jax.model.generate import Sampling, stream
from flexmoe_jax.model.transformer import forward
from flexmoe_jax.parallel.specs import place
from flexmoe_jax.parallel.stacked import stack_weights


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model in memory. `params` is the whole tree with named experts; `top_k` the experts active per token.

    On a `mesh` the devices of all processes hold it in parts, made of `params` when they are first wanted. `score` is
    for any number of processes, the rest for one.

    `select` and `without` return the model that never had the other experts: the same arrays, run by the same code as a
    model merged without them, so its outputs are bit-identical (method: compaction, never masking).
    """

    config: ModelConfig
    params: tree.Params
    tokenizer: Tokenizer
    wanted_top_k: int | None = None
    mesh: Mesh | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        """Names in canonical order: `public` first, then alphabetical."""
        return tree.canonical_order(self.params["experts"])

    @property
    def top_k(self) -> int:
        """Experts active per token: the wanted number, at most as many as there are."""
        return min(self.wanted_top_k or len(self.experts), len(self.experts))

    def select(self, names: Iterable[str]) -> "Model":
        """The model of only these experts."""
        return dataclasses.replace(self, params=tree.select(self.params, names))

    def without(self, *names: str) -> "Model":
        """The model that never had these experts."""
        return dataclasses.replace(self, params=tree.without(self.params, *names))

    def logits(self, tokens) -> jax.Array:
        """Integer token ids [T] or [B, T] -> float32 logits [T, V] or [B, T, V]."""
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
        return _logits(self.config, self.top_k, self._dispatch, self._stacked, jnp.atleast_2d(tokens)).reshape(
            *tokens.shape, -1
        )

    def generate(self, prompt: str, **kwargs) -> str:
        """Continues `prompt`: what `stream` yields, joined."""
        return "".join(self.stream(prompt, **kwargs))

    def stream(
        self,
        prompt: str,
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

        `top_k` and `top_p` restrict the sampled tokens. The text ends before the end-of-text token or one of
        `stop_ids`. A piece is one token's text, or more where a character takes several tokens.
        """
        if experts is not None:
            model = self.select(experts)
            return model.stream(
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop_ids=stop_ids,
                seed=seed,
            )
        steps = stream(
            self.config,
            self._stacked,
            [self.tokenizer.encode(prompt) or [self.tokenizer.eos_id]],
            max_new_tokens=max_new_tokens,
            stop_ids={self.tokenizer.eos_id, *stop_ids},
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
            top_k=self.top_k,
            dispatch="sparse",  # also where all experts are active: it alone reads weights in place
        )
        return self._pieces(token for tokens in steps for token in tokens.values())

    def _pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        ids: list[int] = []
        shown = ""
        for token in tokens:
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # the beginning of a character whose other bytes are still to come
                yield text[len(shown) :]
                shown = text
        if ids:
            yield self.tokenizer.decode(ids)[len(shown) :]

    def score(self, texts: list[str], *, seq_len: int | None = None, stride: int | None = None, **kwargs) -> Score:
        """Bits per byte and routed shares of `texts`; windows of `max_seq_len`, moved by half of it, unless told."""
        seq_len = seq_len or self.config.max_seq_len
        return score(
            self.config,
            self._stacked,
            texts,
            self.tokenizer,
            seq_len=seq_len,
            stride=stride or max(seq_len // 2, 1),
            top_k=self.top_k,
            dispatch=self._dispatch,
            mesh=self.mesh,
            **kwargs,
        )

    def routing(self, text: str) -> TokenRouting:
        """Each token of the beginning of `text` and the experts that every layer sends it to."""
        return route_text(self.config, self._stacked, text, self.tokenizer, top_k=self.top_k, dispatch=self._dispatch)

    def lm(self, batch_size: int = 8) -> LM:
        """This selection of experts as what benchmarks ask: log-likelihoods and text until a stop string."""
        return LM(self.config, self._stacked, self.tokenizer, self.top_k, self._dispatch, batch_size)

    @functools.cached_property
    def _stacked(self) -> tree.Params:
        """The run-time form: experts stacked, once per selection."""
        if self.mesh is not None:
            return place(self.mesh, {**self.params, "experts": stack_weights(self.params["experts"])})
        return {
            **jax.tree.map(jnp.asarray, {"trunk": self.params["trunk"]}),
            "experts": tree.stack(self.params["experts"]),
        }

    @property
    def _dispatch(self) -> str:
        return "sparse" if self.mesh is not None or self.top_k < len(self.experts) else "dense"


def load(path: str | pathlib.Path, mesh: Mesh | None = None) -> Model:
    """Opens a model directory; every digest is checked before anything is used.

    For a `mesh` (`parallel.mesh.make_mesh`) arrays are mapped files: a process reads into memory what its devices hold.
    """
    directory, params = load_model(path, mapped=mesh is not None)
    tokenizer = load_tokenizer(str(directory.tokenizer_path))
    return Model(directory.config, params, tokenizer, directory.top_k, mesh)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _logits(config, top_k, dispatch, params, tokens_BT):
    return forward(config, params, tokens_BT, top_k=top_k, dispatch=dispatch).logits_BTV
