"""`flexmoe plan`: memory and time of a run on given TPUs or GPUs, and whether it fits."""

import argparse
import dataclasses
import math
import pathlib
from typing import TYPE_CHECKING, Any

from flexmoe_jax.cli.common import add_json, emit, parser, table
from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ConfigError, MachineError
from flexmoe_jax.experiment import read_values
from flexmoe_jax.mapping import from_mapping
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.ranges import COUNT
from flexmoe_jax.tree import PUBLIC, canonical_order

if TYPE_CHECKING:
    from flexmoe_jax.plan.compiled import Compiled
    from flexmoe_jax.plan.search import Choice
    from flexmoe_jax.plan.work import Work

_TEXT = """Plans a run: where each parameter lies, and memory, operations, communication and time of a device.

The plan is computed from shapes; --compile (TPUs; extra `tpu`) also asks the compiler, which needs no TPU. Without
--mesh all meshes are tried, without --topology all slices. Paths need not exist. Exit code 1 if it does not fit."""
_EXAMPLE = "flexmoe plan --config=experiments/olmo2_7b_expert.py:news --topology v5p:2x2x2 --mesh fsdp=8"
SHOWN = 5  # meshes of a search


def plan(argv: list[str]) -> int:
    """Prints the plan; 1 if nothing fits."""
    p = parser("plan", _TEXT, _EXAMPLE, config=RunConfig)
    what = "v5e:4x4, v5p:4x4x4, v6e:2x2, h100:8, h200:1; by default the smallest that fit"
    p.add_argument("--topology", help=what)
    what = "data=2,fsdp=4; by default config.mesh, or the best mesh with as many microbatches as it needs"
    p.add_argument("--mesh", help=what)
    what = "what runs: a training step (default), the prefill of a prompt, or the decoding of a token"
    p.add_argument("--kind", choices=("train", "prefill", "decode"), default="train", help=what)
    what = "number of experts, for a public run whose model is merged later"
    p.add_argument("--experts", type=COUNT, help=what)
    p.add_argument("--compile", action="store_true", help="also compile the run for the topology")
    add_json(p)
    args = p.parse(argv)
    if args.compile and not args.topology:
        raise ConfigError("--compile was given without --topology", "say which chips to compile for")
    work = _work(args)
    if not args.topology:
        return _smallest(work, args.json)
    return _plan(work, args)


def _work(args: argparse.Namespace) -> "Work":
    import jax

    from flexmoe_jax.plan.work import Work

    jax.config.update("jax_platforms", "cpu")  # a plan needs no device and takes none
    run = _planned_run(args)
    model, experts = _model_and_experts(run)
    if args.experts:
        if args.experts < 1 or not run.is_public:
            raise ConfigError(f"--experts {args.experts} in the run of {run.owner!r}", "it is for public runs only")
        experts = (PUBLIC, *(f"expert{i:02}" for i in range(1, args.experts)))
    if not run.is_public and not run.coordinate:
        experts = (run.owner,)
    return Work(model, canonical_order(experts), run, args.kind)


def _planned_run(args: argparse.Namespace) -> RunConfig:
    """The configured run; paths that a plan does not need may be missing."""
    values = {"data": "-", **read_values(RunConfig, args.config, args.overrides)}
    if values.get("owner") != PUBLIC:
        values["public"] = values.get("public") or "-"
    if not values.get("expert") and (values.get("owner") != PUBLIC or not values.get("public")):
        values["domain_vector"] = values.get("domain_vector") or "-"
    if values.get("public_fraction"):
        values["public_data"] = values.get("public_data") or "-"
    return from_mapping(RunConfig, values)


def _model_and_experts(run: RunConfig) -> tuple[ModelConfig, tuple[str, ...]]:
    """The shape and the experts of the model that `run` trains: config.public's where it is here, else config.model."""
    model = run.model
    experts: tuple[str, ...] = (PUBLIC,) if run.is_public else (PUBLIC, run.owner)
    if run.public and pathlib.Path(run.public).is_dir():
        from flexmoe_jax.artifacts.model_dir import open_model

        opened = open_model(run.public)
        model, experts = opened.config, opened.experts if run.is_public else experts
    if model is None:
        raise ConfigError(
            f"the model's shape is not known: config.model is not set and config.public {run.public!r} is not here",
            "set config.public to a model directory, or config.model in the experiment",
        )
    return model, experts


def _smallest(work: "Work", as_json: bool) -> int:
    from flexmoe_jax.parallel.chips import CHIPS
    from flexmoe_jax.plan.search import smallest

    found = {name: smallest(work, chip) for name, chip in CHIPS.items()}
    rows = [_choice_row(choice) if choice else [f"{name}: none", *["-"] * 5] for name, choice in found.items()]
    result = {name: choice and _choice(choice) for name, choice in found.items()}
    emit({"smallest": result}, [*_head(work), "smallest slices that fit:", *table(_CHOICE, rows)], as_json)
    return 0


def _plan(work: "Work", args: argparse.Namespace) -> int:
    from flexmoe_jax.parallel.chips import parse_topology
    from flexmoe_jax.parallel.mesh import check_mesh
    from flexmoe_jax.plan.costs import estimate
    from flexmoe_jax.plan.search import Choice, choices

    topology = parse_topology(args.topology)
    if mesh := args.mesh or work.run.mesh or ("data=1" if topology.count == 1 else ""):
        found = [Choice(work, topology, estimate(work, topology, check_mesh(mesh, topology.count)))]
    else:
        found = choices(work, topology)
    best = found[0]
    compiled = None
    if args.compile:
        from flexmoe_jax.plan.compiled import compile_for

        compiled = compile_for(best.work, topology, best.mesh)
    result = _choice(best) | {
        "leaves": _leaves(best),
        "transfers": [dataclasses.asdict(t) for t in best.costs.transfers],
    }
    result |= {"meshes": [_choice(choice) for choice in found[:SHOWN]]}
    result |= {"compiled": None if compiled is None else dataclasses.asdict(compiled)}
    shown = [*_head(best.work), *_lines(best)]
    if len(found) > 1:
        shown += ["", "meshes, the best first:", *table(_CHOICE, [_choice_row(choice) for choice in found[:SHOWN]])]
    if compiled is not None:
        shown += ["", *_compiled_lines(best, compiled)]
    emit(result, shown, args.json)
    if not best.costs.fits:
        need, usable, whole = (f"{_gb(x):.1f}" for x in (best.costs.total, best.costs.usable, topology.chip.memory))
        raise MachineError(
            f"it does not fit: a device needs {need} GB, usable are {usable} of {whole} GB",
            "take more chips, a larger `fsdp` axis, more microbatches or a smaller optimizer state",
        )
    return 0


_CHOICE = ["topology", "mesh", "microbatches", "GB a device", "usable", "s a step"]


def _gb(size: float) -> float:
    return size / 1e9


def _choice_row(choice: "Choice") -> list:
    costs = choice.costs
    numbers = [f"{_gb(costs.total):.1f}", f"{_gb(costs.usable):.1f}", f"{costs.step_seconds:.3g}"]
    cut = choice.work.accumulation if choice.work.kind == "train" else "-"
    return [choice.topology.name, choice.mesh, cut, *numbers]


def _choice(choice: "Choice") -> dict:
    costs = choice.costs
    return {
        "topology": choice.topology.name,
        "mesh": choice.mesh,
        "accumulation": choice.work.accumulation,
        "memory": dict(costs.memory),
        "total": costs.total,
        "usable": costs.usable,
        "fits": costs.fits,
        "needed_flops": costs.needed_flops,
        "computed_flops": costs.computed_flops,
        "seconds": dict(costs.seconds),
        "step_seconds": costs.step_seconds,
    }


def _head(work: "Work") -> list[str]:
    run = work.run
    doing = f"{run.batch_size} rows of {run.seq_len} tokens, {run.compute_dtype}"
    if work.kind == "train":
        doing += f", remat {'on' if run.remat else 'off'}"
    return [f"{work.kind} with {len(work.experts)} experts, {work.active} a token: {doing}"]


def _leaves(choice: "Choice") -> list[dict]:
    from flexmoe_jax.plan.costs import part_bytes
    from flexmoe_jax.plan.work import leaves

    sizes = choice.costs.sizes
    return [
        {
            "part": leaf.part,
            "path": leaf.path,
            "shape": list(leaf.shape),
            "spec": _spec(leaf.spec),
            "bytes": part_bytes(leaf, sizes),
        }
        for leaf in leaves(choice.work, sizes["expert"])
    ]


def _spec(spec: Any) -> list:
    return [list(axes) if isinstance(axes, tuple) else axes for axes in spec]


def _lines(choice: "Choice") -> list[str]:
    from flexmoe_jax.plan.costs import ATTAINABLE, activations, tokens_of
    from flexmoe_jax.plan.work import params_shapes
    from flexmoe_jax.training.freezing import freezing_table

    work, costs, run = choice.work, choice.costs, choice.work.run
    shown = []
    if work.kind == "train":
        for pattern, trainable, count, size in freezing_table(params_shapes(work), run.owner, run.freeze):
            shown.append(
                f"{'trained' if trainable else 'frozen ':8} {pattern:34} {count:3} leaves {size:16,} parameters"
            )
    shown.append("")
    rows = [
        [
            f"{leaf['part']} {leaf['path']}",
            "x".join(map(str, leaf["shape"])) or "1",
            ",".join("+".join(a) if isinstance(a, list) else a or "-" for a in leaf["spec"]) or "everywhere",
            f"{leaf['bytes'] / 1e6:.2f}",
        ]
        for leaf in _leaves(choice)
    ]
    shown += table(["array", "shape", "split by", "MB a device"], rows)
    cut = f", {work.accumulation} microbatches" if work.kind == "train" else ""
    shown += ["", f"{choice.topology.name}, mesh {choice.mesh}{cut}; a device takes:"]
    shown += [f"  {part:18} {_gb(size):9.3f} GB" for part, size in costs.memory.items()]
    if work.kind == "train":
        other = dataclasses.replace(work, run=dataclasses.replace(run, remat=not run.remat))
        other_size = activations(other, tokens_of(other, costs.sizes), costs.sizes)
        shown.append(f"  (activations {'without' if run.remat else 'with'} remat {_gb(other_size):.3f} GB)")
    verdict = "fits" if costs.fits else "does not fit"
    shown.append(f"  {'all':18} {_gb(costs.total):9.3f} GB of {_gb(costs.usable):.1f} usable: {verdict}")
    shown.append(f"operations a device: {costs.computed_flops:.3e}, needed {costs.needed_flops:.3e}")
    moved = [[f"{t.kind} of {t.of}", "+".join(t.axes), t.count, f"{_gb(t.size):.3f}"] for t in costs.transfers]
    if moved:
        shown += ["", *table(["communication", "over", "times", "GB received"], moved)]
    seconds = ", ".join(f"{name} {value:.3g}" for name, value in costs.seconds.items())
    shown += ["", f"seconds: {seconds} (products at {ATTAINABLE:.0%} of the peak)"]
    tokens = run.batch_size * (1 if work.kind == "decode" else run.seq_len) / costs.step_seconds
    shown.append(f"a step: {costs.step_seconds:.3g} s if nothing overlaps, {tokens:,.0f} tokens/s")
    if work.kind == "train":
        shown.append(f"the run: {run.steps:,} steps, {costs.step_seconds * run.steps / 3600:,.0f} hours")
    return shown


def _compiled_lines(choice: "Choice", compiled: "Compiled") -> list[str]:
    if compiled.refused:
        return [f"the compiler refuses it: {compiled.refused}"]
    costs = choice.costs
    held = sum(costs.memory.get(part, 0) for part in ("trained", "moments", "frozen", "batch", "cache"))
    rows = [
        ["arguments, GB", _gb(compiled.arguments), _gb(held)],
        ["temporaries, GB", _gb(compiled.temporaries), _gb(costs.total - held)],
        ["peak, GB", _gb(compiled.peak), _gb(costs.total)],
    ]
    kinds = sorted({*compiled.collectives, *(t.kind for t in costs.transfers)})
    for kind in kinds:
        mine = math.fsum(t.size for t in costs.transfers if t.kind == kind)
        rows.append([f"{kind}, GB received", _gb(compiled.collectives.get(kind, (0, 0.0))[1]), _gb(mine)])
    received = math.fsum(size for _, size in compiled.collectives.values())
    rows.append(["all received, GB", _gb(received), _gb(math.fsum(t.size for t in costs.transfers))])
    cost = f"the compiler counts {compiled.flops:.3e} operations a device, those of a loop's body once"
    return [*table(["a device", "compiled", "estimated"], rows), cost]
