"""Our models as models of lm-evaluation-harness (extra `eval`).

Import this module only where it is used: the harness imports torch and datasets.
"""

from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.evaluate.lm import LM

MAX_NEW_TOKENS = 256  # default for tasks without one, as in the harness's own models


class HarnessLM(TemplateLM):
    """An `LM` with the interface of the harness. Results equal those of its `hf` model on the exported checkpoint."""

    def __init__(self, lm: LM):
        super().__init__()
        self.lm = lm

    @property
    def eot_token_id(self) -> int:
        """The id of the tokenizer's `eos_token`."""
        return self.lm.tokenizer.named.get("eos_token", self.lm.tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """The id that stands for an empty context: the tokenizer's `bos_token`, else its `eos_token`."""
        named = self.lm.tokenizer.named.get("bos_token", self.lm.tokenizer.bos_id)
        return self.eot_token_id if named is None else named

    @property
    def tokenizer_name(self) -> str:
        """The digest of the tokenizer, with which the harness identifies cached requests."""
        return self.lm.tokenizer.digest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids that `transformers` gives: here special tokens are recognized by name in a text."""
        ids, _ = self.lm.tokenizer.encode_marked(string)
        before, after = self.lm.tokenizer.around
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.lm.tokenizer.decode([self.prefix_token_id]))
        return [*before, *ids, *after] if add_special_tokens else ids

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = self.lm.loglikelihoods([(context, continuation) for _, context, continuation in requests])
        for (key, _, _), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.lm.run.config.max_seq_len,
                context_len=1,
            )
            some = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += some
            owners += [i] * len(some)
        totals = [0.0] * len(requests)
        for i, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += log_p
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        for members in groups.values():
            kwargs = normalize_gen_kwargs(requests[members[0]].args[1], MAX_NEW_TOKENS)
            if kwargs.get("do_sample"):
                raise ConfigError(f"a task asks for sampling: {kwargs}", "set do_sample: false in the task")
            eos = self.lm.tokenizer.decode([self.eot_token_id])
            stops = handle_stop_sequences(kwargs.get("until"), eos=eos)
            prompts = [self.tok_encode(requests[i].args[0]) or [self.eot_token_id] for i in members]
            made = self.lm.continue_until(prompts, stops, int(kwargs["max_gen_toks"]))
            for i, text in zip(members, made, strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts


def run_tasks(
    lm: LM,
    tasks: list[str],
    *,
    include: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    cache: str | None = None,
    allow_code_execution: bool = False,
) -> dict[str, Any]:
    """The harness's result dictionary of `tasks` (names of its own tasks, or of those in the folder `include`).

    `limit` is the number of examples per task. `cache` is a file that keeps answers between runs: name it after the
    model and its experts. ConfigError for a task that the harness does not know or that samples.
    """
    manager = _task_manager(tasks, include)
    result = simple_evaluate(
        HarnessLM(lm),
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        use_cache=cache,
        bootstrap_iters=0,
        confirm_run_unsafe_code=allow_code_execution,
        log_samples=True,
    )
    return result if result is not None else {}


def _task_manager(tasks: list[str], include: str | None) -> TaskManager:
    """A manager that knows all of `tasks`; ConfigError if there is none.

    It reads only the folder `include` if that suffices: the harness has thousands of task files of its own.
    """
    if include is not None:
        manager = TaskManager(include_path=include, include_defaults=False)
        if all(manager.match_tasks([name]) for name in tasks):
            return manager
    manager = TaskManager(include_path=include)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"the harness knows no task {unknown[0]!r}", "`lm_eval ls tasks` lists them; --include adds a folder"
        )
    return manager
