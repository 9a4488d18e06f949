"""The table of the systems that the study compares: training, scoring, tables and the page follow it."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping

from flexmoe_jax.model.flops import forward_flops, training_flops
from flexmoe_jax.params import HEAD, read_ranks
from flexmoe_jax.study.baselines import FORGETTING, Nats, branch_train_merge, causal_branch_train_merge, oracle
from flexmoe_jax.study.config import Experts, StudyConfig
from flexmoe_jax.study.results import Kind, hybrid_of
from flexmoe_jax.study.scoring import (
    Bench,
    Scorer,
    SystemScore,
    mixture,
    of_model,
    prompt_routing,
    selected,
    tuned_mixture,
    uniform_soup,
    weighted_soup,
    with_router,
    with_top_k,
)
from flexmoe_jax.study.workshop import ALL, Joint, Training, Tuned, btx_start, trained, upcycled
from flexmoe_jax.tree import PUBLIC

METHOD = "FlexMoE"


@dataclasses.dataclass(frozen=True)
class Derived:
    """How a system without training of its own is scored: with the models or the scores of systems before it."""

    score: Scorer
    kept: bool = True
    """Whether its scores are kept on disk; arithmetic on other scores is not."""


@dataclasses.dataclass(frozen=True)
class System:
    """A row of the comparison."""

    name: str
    kind: Kind
    make: Training | Derived
    """How it is trained, or how it is derived from other systems."""

    training_flops: float
    """Operations of the training that it needs, by all owners together, after the public model."""

    active: int = 1
    """Experts active per token."""

    models: int = 1
    """Whole models that score each token; more than one in mixtures of models."""

    experts: tuple[str, ...] = ()
    """The experts kept, if it is a selection of the merged model's experts."""

    sees_text: bool = False
    """Whether it chooses or weighs models by the very text that it scores: it is then no language model."""

    @property
    def training(self) -> Training | None:
        """How it is trained; None where it is derived from other systems."""
        return None if isinstance(self.make, Derived) else self.make

    def forward_flops(self, config: StudyConfig) -> float:
        """Operations of a token's forward pass in windows of `config.seq_len`."""
        return self.models * forward_flops(config.shape, config.seq_len, self.active)

    def score(self, bench: Bench) -> SystemScore:
        """Scores it, or reads its scores."""
        made = self.make if isinstance(self.make, Derived) else Derived(of_model(self.name))
        return bench.kept(self.name, made.score) if made.kept else made.score(bench)


@dataclasses.dataclass(frozen=True)
class _Costs:
    """Operations of training after the public model, by kind of step (model/flops.py)."""

    config: StudyConfig

    @property
    def method(self) -> float:
        """Every owner's expert as the method trains it."""
        return self.experts(Experts())

    @property
    def dense(self) -> float:
        """Every owner's dense expert, all parameters trained."""
        return self.owners(self.config.owner_steps, "joint", self.config.own_sequences)

    @property
    def frozen_trunk(self) -> float:
        """Every owner's feed-forward network, without the public expert beside it."""
        return self.owners(self.config.owner_steps, "alone", self.config.own_sequences)

    def experts(self, how: Experts) -> float:
        """Every owner's expert."""
        rows = self.config.batch_size if how.public_text else self.config.own_sequences
        kind, rank = "expert" if how.coordinate else "alone", how.changes.get("rank")
        ranks = read_ranks(rank, self.config.shape) if rank else {}
        ranks.pop(HEAD, None)  # below 1% of a step beside a head
        tokens = len(self.config.owners) * self.config.owner_steps * rows * self.config.seq_len
        return tokens * training_flops(self.config.shape, self.config.seq_len, kind, ranks=ranks)

    def owners(self, steps: int, kind: str, rows: int) -> float:
        """`steps` of `rows` sequences by every owner."""
        return len(self.config.owners) * self._steps(steps, kind, rows)

    def joint(self, steps: int) -> float:
        """`steps` of all experts together, `top_k` of them active."""
        return self._steps(steps, "joint", self.config.batch_size, self.config.top_k)

    def _steps(self, count: int, kind: str, rows: int, active: int = 1) -> float:
        return count * rows * self.config.seq_len * training_flops(self.config.shape, self.config.seq_len, kind, active)


def systems(config: StudyConfig) -> list[System]:
    """Every system of the study, each after those that it is made from."""
    cost, experts = _Costs(config), (PUBLIC, *config.owners)
    dense, frozen = _whole_models(config, cost)
    table = [
        System(PUBLIC, Kind.BASELINE, Derived(of_model(PUBLIC)), training_flops=0.0),
        *dense.values(),
        *frozen.values(),
        System(METHOD, Kind.METHOD, Experts(), cost.method, config.top_k, experts=experts),
        System("uniform mixing", Kind.BASELINE, Derived(of_model(METHOD, uniform=True)), cost.method, len(experts)),
        _oracle("oracle dense expert", dense, cost.dense),
        _oracle("oracle expert, frozen trunk", frozen, cost.frozen_trunk),
        *_selections(config, cost),
        *_calibrations(config, cost),
    ]
    if config.systems == "all":
        names = {owner: system.name for owner, system in dense.items()}
        table += [*_mixtures(names, cost), *_joint(config, cost, names), *_ablations(config, cost)]
    return [system for system in table if not re.fullmatch(config.leave_out or "", system.name)]


def _whole_models(config: StudyConfig, cost: _Costs) -> tuple[dict[str, System], dict[str, System]]:
    """The public model trained further by each owner: all of its parameters, and only those outside the trunk."""
    dense, frozen = {}, {}
    for owner in config.owners:
        training = Joint(owner, config.owner_steps, trained(PUBLIC))
        dense[owner] = System(f"dense {owner}", Kind.PART, training, cost.dense)
        training = dataclasses.replace(training, changes={"freeze": "trunk/.*"})
        frozen[owner] = System(f"frozen trunk {owner}", Kind.PART, training, cost.frozen_trunk)
    return dense, frozen


def _oracle(name: str, models: Mapping[str, System], flops: float) -> System:
    """For each set of texts the best of the public model and `models`."""
    names = [PUBLIC, *(system.name for system in models.values())]
    return System(name, Kind.BASELINE, Derived(mixture(names, oracle), kept=False), flops, sees_text=True)


def _selections(config: StudyConfig, cost: _Costs) -> list[System]:
    """The merged model with fewer experts."""
    owners = config.owners
    kept: dict[str, tuple[str, ...]] = {hybrid_of(owner): (PUBLIC, owner) for owner in owners}
    kept |= {f"without {owner}": (PUBLIC, *(other for other in owners if other != owner)) for owner in owners}
    kept |= {f"first {n} owners": (PUBLIC, *owners[:n]) for n in range(2, len(owners) - 1)}
    table = []
    for name, experts in kept.items():
        made, active = Derived(of_model(METHOD, selected(experts))), min(config.top_k, len(experts))
        table.append(System(name, Kind.PART, made, cost.method, active, experts=experts))
    return table


def _calibrations(config: StudyConfig, cost: _Costs) -> list[System]:
    """The method with its router changed so that the public expert might keep its share.

    The odds of every pair {public, owner} stay as trained when owners join, so the public expert's share falls. Owners'
    biases shifted by -log n give the experts of n owners together the odds that each of them had by itself.
    """
    changes = {
        "shifted by log n": with_router(1.0, -math.log(len(config.owners))),
        "rows x 2": with_router(2.0, 0.0),
        "rows / 2": with_router(0.5, 0.0),
    }
    return [
        System(f"{METHOD}, {name}", Kind.ABLATION, Derived(of_model(METHOD, change)), cost.method, config.top_k)
        for name, change in changes.items()
    ]


def _mixtures(dense: Mapping[str, str], cost: _Costs) -> list[System]:
    """Baselines that mix, choose among or average the public model and the dense experts {owner: name}."""
    models = [PUBLIC, *dense.values()]
    base, every = functools.partial(System, kind=Kind.BASELINE, training_flops=cost.dense), len(models)
    mixes: dict[str, Callable[[dict[str, Nats]], Nats]] = {
        "BTM": branch_train_merge,
        "BTM, top-2": functools.partial(branch_train_merge, top_k=2),
    }
    causal: dict[str, Callable[[dict[str, Nats], float], Nats]] = {
        "causal BTM": causal_branch_train_merge,
        "causal BTM, top-2": functools.partial(causal_branch_train_merge, top_k=2),
    }
    return [
        *(
            base(name, make=Derived(mixture(models, mix), False), models=every, sees_text=True)
            for name, mix in mixes.items()
        ),
        *(
            base(name, make=Derived(tuned_mixture(models, mix, FORGETTING), False), models=every)
            for name, mix in causal.items()
        ),
        base("prompt routing", make=Derived(prompt_routing(models), False), sees_text=True),
        base("soup", make=Derived(uniform_soup(models))),
        base("weighted soup", make=Derived(weighted_soup(models)), sees_text=True),
    ]


def _joint(config: StudyConfig, cost: _Costs, dense: Mapping[str, str]) -> list[System]:
    """Baselines whose experts are trained together; "unrestricted" ones on all text, at once or twice our cost."""
    options = {"top_k": config.top_k, "load_balance": 0.01, "router_z_loss": 1e-3}
    btx = Joint(PUBLIC, config.mix_steps, btx_start(dense), options)
    table = [System("BTX", Kind.BASELINE, btx, cost.dense + cost.joint(config.mix_steps), config.top_k)]
    for times in (1, 2):
        steps = max(1, round(times * cost.method / cost.joint(1)))
        training = Joint(ALL, steps, upcycled, options)
        table.append(System(f"unrestricted {times}x", Kind.BASELINE, training, cost.joint(steps), config.top_k))
    return table


def _ablations(config: StudyConfig, cost: _Costs) -> list[System]:
    """The method with other numbers of active experts, with experts trained otherwise, and with its router tuned."""
    table = [
        System(f"{METHOD}, top-{k}", Kind.ABLATION, Derived(of_model(METHOD, with_top_k(k))), cost.method, k)
        for k in (1, 4)
        if k <= len(config.owners) + 1 and k != config.top_k
    ]
    for name, experts in config.chosen_ablations.items():
        table.append(System(name, Kind.ABLATION, experts, cost.experts(experts), config.top_k))
    fitted = {
        "freeze": "trunk/.*|experts/public/.*|experts/.*/(router|w_.*)",
        "top_k": config.top_k,
        "groups": "experts/.*/bias lr=10",
    }
    steps = config.tune_steps
    alone = cost.method + cost.owners(steps, "expert", config.batch_size)
    together = cost.method + cost.joint(steps)
    further: dict[str, tuple[Training, float]] = {
        "tuned alone": (Tuned(METHOD, together=False), alone),
        "tuned together": (Tuned(METHOD, together=True), together),
        "biases fitted on public text": (Joint(PUBLIC, steps, trained(METHOD), fitted), together),
    }
    for name, (training, flops) in further.items():
        table.append(System(f"{METHOD}, {name}", Kind.ABLATION, training, flops, config.top_k))
    return table
