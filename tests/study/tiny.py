"""A configuration of a study, and results whose figures are known."""

from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.intervals import Interval
from flexmoe_jax.study.results import MEAN, Curve, Kind, RateSearch, Regret, Results, SystemResult
from flexmoe_jax.study.systems import METHOD

MODEL = ModelConfig(
    vocab_size=512, num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8, max_seq_len=32
)
CONFIG = StudyConfig(out="", domains="news", model=MODEL, seeds=2)
DOMAINS = ("public", "code", "news", "code + news")
SYSTEMS = {
    METHOD: (Kind.METHOD, 1.5, ["public", "code", "news"], 1e9),
    "public": (Kind.BASELINE, 2.0, [], 0.0),
    "BTM": (Kind.BASELINE, 1.6, [], 2e9),
    "unrestricted 2x": (Kind.BASELINE, 1.4, [], 2e9),
    "no bias": (Kind.ABLATION, 1.51, [], 1e9),
    "frozen trunk code": (Kind.PART, 1.65, [], 3e9),
    "without code": (Kind.PART, 1.75, ["public", "news"], 1e9),
    "without news": (Kind.PART, 1.7, ["public", "code"], 1e9),
}


def interval(value: float) -> Interval:
    return Interval(value, value - 0.01, value + 0.02, 0.025)


def results(study: str = "reproduction-small") -> Results:
    """Two owners, two seeds."""
    systems = [
        SystemResult(
            name=name,
            kind=kind,
            experts=experts,
            sees_text=name == "BTM",
            bits_per_byte={d: interval(bits) for d in (*DOMAINS, MEAN)},
            against_method={} if name == METHOD else {d: interval(bits - SYSTEMS[METHOD][1]) for d in (*DOMAINS, MEAN)},
            forward_flops_per_token=1e6 if name == "public" else 2e6,
            training_flops_after_public=flops,
            share={d: [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]] for d in DOMAINS} if name == METHOD else {},
        )
        for name, (kind, bits, experts, flops) in SYSTEMS.items()
    ]
    runs = (("public", "public"), (METHOD, "code"), (METHOD, "news"), ("unrestricted 2x", "all"), ("no bias", "code"))
    return Results(
        study=study,
        config={"out": f"runs/{study}", "domains": "news,code", "seeds": 2, "model": {"d_model": 8}},
        documents={d: {"documents": 3, "groups": 3, "bytes": 4321} for d in DOMAINS},
        opting_out=[
            {"code": {"left": "a", "never": "a", "equal": True}, "news": {"left": "b", "never": "b", "equal": True}}
        ],
        regret=[
            Regret("without news", "public", None, interval(0.2)),
            Regret("without news", "code", interval(0.0), interval(-0.1)),
            Regret(METHOD, "public", None, interval(0.3)),
            Regret(METHOD, "code", interval(0.05), interval(-0.2)),
            Regret(METHOD, "news", interval(-0.003), interval(0.04)),
        ],
        curves=[Curve(system, text, [[0, 5.0], [10, 4.0]]) for system, text in runs],
        classifiers={"code": 0.975, "news": 0.9},
        suites={},
        rates={"dense": RateSearch({"0.001": 1.6, "0.002": 1.5, "0.004": None}, 0.002, at_end=False)},
        systems=systems,
    )
