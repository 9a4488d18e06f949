"""Profiles of chosen steps, and the rates in metrics.jsonl."""

import dataclasses
import gzip
import json
import pathlib

import jax
import pytest

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.model.decoder import init_params
from flexmoe_jax.model.flops import forward_flops, products, training_flops
from flexmoe_jax.parallel import chips
from flexmoe_jax.training import loop, metrics
from flexmoe_jax.training.profile import parse_steps
from flexmoe_jax.training.state import flops_per_token
from tests.tiny import MODEL, expert_run, public_run

RATES = {"step_seconds", "tokens_per_second"}


def lines_of(run) -> list[dict]:
    return [json.loads(line) for line in (pathlib.Path(run.out) / "metrics.jsonl").read_text().splitlines()]


def traced_steps(run) -> list[list[int]]:
    """The steps in each trace of the run, in the order of the traces."""
    found = []
    for path in sorted((pathlib.Path(run.out) / "profile" / "0").rglob("*.trace.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found.append(sorted(int(e["args"]["step_num"]) for e in events if e.get("name") == "train"))
    return found


def test_a_profile_names_its_steps_and_a_resumed_run_profiles_the_rest(tmp_path, monkeypatch, caplog):
    run = public_run(tmp_path, steps=8)
    save = loop._save

    def stopping(job, state, *rest):
        save(job, state, *rest)
        if int(state.step) == 4:
            job.checkpoints.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save", stopping)
        with pytest.raises(KeyboardInterrupt):
            loop.train(run, profile="1:2")
    assert traced_steps(run) == [[1, 2]]
    caplog.set_level("INFO", "flexmoe_jax")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save", lambda *a: (save(*a), stop_at(a[1], 6)))
        with pytest.raises(KeyboardInterrupt):
            loop.train(run, profile="3:6")  # step 3 is done, and the run is stopped after 5
    assert "resumed at step 4" in caplog.messages
    assert traced_steps(run) == [[1, 2], [4, 5]]
    loop.train(run, profile="3:5")
    assert "steps 3 to 5 are done: there is nothing to profile" in caplog.messages
    assert len(traced_steps(run)) == 2
    assert [line["step"] for line in lines_of(run)] == list(range(8))


def stop_at(state, step: int) -> None:
    if int(state.step) == step:
        raise KeyboardInterrupt


@pytest.mark.parametrize("text", ["3", "3:", ":3", "a:b", "5:3", "-1:2", "1:2:3", "2:8"])
def test_malformed_step_ranges_are_refused_before_anything_is_written(tmp_path, text):
    run = public_run(tmp_path, steps=8)
    with pytest.raises(ConfigError, match=f"--profile is '{text}'"):
        loop.train(run, profile=text)
    assert not pathlib.Path(run.out).exists()


def test_step_ranges_include_both_ends():
    assert list(parse_steps("10:13", 20)) == [10, 11, 12, 13]
    assert list(parse_steps("0:7", 8))[-1] == 7
    assert not parse_steps("", 8)


def test_rates_agree_with_one_another_and_with_the_peak(tmp_path, monkeypatch, caplog):
    """The peak of this machine's devices is unknown, so that there is no `mfu` until the test sets one."""
    run = public_run(tmp_path / "a", steps=6)
    loop.train(run)
    first, *others = lines_of(run)
    assert not RATES & set(first)  # the first step compiles
    tokens = run.batch_size * run.seq_len
    for line in others:
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(tokens)
        assert not {"mfu", "peak_flops"} & set(line)
    monkeypatch.setitem(chips.PEAK_FLOPS, jax.devices()[0].device_kind, 1e12)
    caplog.set_level("INFO", "flexmoe_jax")
    run = public_run(tmp_path / "b", steps=6, log_every=3)
    loop.train(run)
    assert any("1 x cpu, 1e+12 bfloat16 FLOP/s" in line for line in caplog.messages)
    lines = lines_of(run)
    assert [line["step"] for line in lines] == [2, 5]
    for line in lines:
        flops = training_flops(MODEL, run.seq_len, "joint") * line["tokens_per_second"]
        assert line["mfu"] == pytest.approx(flops / line["peak_flops"])
        assert line["peak_flops"] == 1e12
        assert 0 < line["mfu"] < 1


def test_a_step_lasts_from_the_end_of_the_previous_one_without_pauses(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    meter = metrics.Meter(tokens=100, flops_per_token=2.0, peak_flops=1000.0)

    def after(seconds, do):
        clock[0] += seconds
        return do()

    after(7, meter.resume)  # nothing is measured before the first step
    after(60, meter.step_ended)  # compiles
    assert meter.read() == {}
    after(2, meter.step_ended)
    after(30, meter.resume)  # saving
    after(4, meter.step_ended)
    rate = 100 / 3
    assert meter.read() == pytest.approx(
        {"step_seconds": 3, "tokens_per_second": rate, "mfu": 2 * rate / 1000, "peak_flops": 1000}
    )
    assert meter.read() == {}


def test_flops_per_token_count_only_the_gradients_of_trained_weights(tmp_path):
    """Equal to `training_flops` for the kinds that it has; frozen weights have no gradient."""
    pair = init_params(MODEL, jax.random.key(0), ("public", "news"))
    alone = {**pair, "experts": {"public": pair["experts"]["public"]}}
    public, owner = public_run(tmp_path), expert_run(tmp_path, "news", tmp_path)
    T = public.seq_len
    assert flops_per_token(MODEL, public, alone) == training_flops(MODEL, T, "joint")
    assert flops_per_token(MODEL, owner, pair) == training_flops(MODEL, T, "expert")
    joint = dataclasses.replace(public, model=None, domain_vector=None, public="model")
    assert flops_per_token(MODEL, joint, pair) == training_flops(MODEL, T, "joint", 2)
    assert flops_per_token(MODEL, dataclasses.replace(joint, top_k=1), pair) == training_flops(MODEL, T, "joint", 1)
    rows = dataclasses.replace(joint, freeze="trunk/.*|experts/.*/w_.*")
    news = dataclasses.replace(joint, freeze="trunk/.*|experts/public/.*")
    assert flops_per_token(MODEL, news, pair) == training_flops(MODEL, T, "expert")
    assert flops_per_token(MODEL, rows, pair) == 2 * forward_flops(MODEL, T, 2) + products(MODEL, T)["scores"]
