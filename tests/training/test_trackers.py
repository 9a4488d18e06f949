"""What the trackers are given is what `metrics.jsonl` says."""

import json
import pathlib
import struct
import subprocess
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.training import loop
from flexmoe_jax.training.trackers import scalars
from tests.tiny import public_run, write_documents


def events(run) -> list[Event]:
    """The events of the run's TensorBoard files: records of (length, checksum, bytes, checksum)."""
    found = []
    for path in sorted((pathlib.Path(run.out) / "tensorboard").iterdir()):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack_from("<Q", raw, at)
            found.append(Event.FromString(raw[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def lines_of(run) -> list[dict]:
    return [json.loads(line) for line in (pathlib.Path(run.out) / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_the_numbers_of_the_metrics_file_and_what_identifies_the_run(tmp_path):
    run = public_run(tmp_path, eval_every=2)
    write_documents(pathlib.Path(run.data), "public", count=4, split="heldout")
    loop.train(run)
    found, texts = {}, {}
    for event in events(run):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found[event.step, value.tag] = value.simple_value
            else:
                texts[value.tag] = value.tensor.string_val[:1] or value.metadata.plugin_data.content
    expected = {(line["step"], name): number for line in lines_of(run) for name, number in scalars(line)}
    assert found == pytest.approx(expected, rel=1e-6)  # TensorBoard keeps float32
    assert (3, "validation/own") in found
    identity = json.loads((pathlib.Path(run.out) / "run.json").read_text())
    assert identity["data"]["own"]["tokens"].encode() in texts["run.json/text_summary"][0]
    assert b"optimizer/lr" in texts["_hparams_/session_start_info"]


def test_a_resumed_run_tells_tensorboard_where_it_starts_again(tmp_path, monkeypatch):
    run = public_run(tmp_path, steps=8, save_every=2)
    make = loop.make_train_step

    def dying(*args):
        step = make(*args)

        def once(state, *rest):
            if int(state.step) == 5:
                raise RuntimeError
            return step(state, *rest)

        return once

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", dying)
        with pytest.raises(RuntimeError):
            loop.train(run)
    loop.train(run)
    (again,) = [event for event in events(run) if event.HasField("session_log") and event.session_log.status == 1]
    assert again.step == 4


def test_every_number_of_a_line_is_a_scalar():
    line = {"step": 7, "loss": 1.5, "bad": None, "share": {"news": 0.4}, "router_accuracy": [0.5, 1.0]}
    expected = {"loss": 1.5, "share/news": 0.4, "router_accuracy/0": 0.5, "router_accuracy/1": 1.0}
    assert dict(scalars(line)) == expected


def test_an_unknown_tracker_and_one_that_is_not_installed_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"config\.track names 'mlflow'") as refusal:
        public_run(tmp_path, track="tensorboard,mlflow")
    assert "tensorboard, wandb" in refusal.value.remedy
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb, which is not installed") as refusal:
        loop.train(public_run(tmp_path, track="wandb"))
    assert "flexmoe_jax[track]" in refusal.value.remedy


_FAKE = """
class Settings:
    def __init__(self, **kwargs): pass
class Run:
    def __init__(self, kwargs): self.kwargs = kwargs
    def log(self, values, step): calls.append((step, values))
    def finish(self): calls.append("finish")
calls, started = [], []
def init(**kwargs):
    started.append(kwargs)
    return Run(kwargs)
"""


def test_weights_and_biases_is_offline_and_has_the_same_numbers_under_one_id(tmp_path, monkeypatch):
    """With a stand-in of the library, which is not among the test's requirements."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(_FAKE)
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    import wandb

    run = public_run(tmp_path, track="wandb")
    loop.train(run)
    assert wandb.started[0]["mode"] == "offline"
    assert wandb.started[0]["id"] == (pathlib.Path(run.out) / "wandb" / "id").read_text()
    identity = json.loads((pathlib.Path(run.out) / "run.json").read_text())
    assert wandb.started[0]["config"]["data"] == identity["data"]
    assert wandb.calls == [*((line["step"], dict(scalars(line))) for line in lines_of(run)), "finish"]
    assert not (pathlib.Path(run.out) / "tensorboard").exists()


def test_a_training_opens_no_connection(tmp_path):
    """In a process of its own, with the default trackers: no socket is connected to an address of a network."""
    run = public_run(tmp_path, steps=1)
    program = f"""
import sys
def hook(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) and not str(args[1][0]).startswith("127."):
        raise SystemExit(f"connected to {{args[1]}}")
sys.addaudithook(hook)
from flexmoe_jax.config import RunConfig
from flexmoe_jax.mapping import from_mapping
from flexmoe_jax.training.loop import train
import json
train(from_mapping(RunConfig, json.loads({json.dumps(json.dumps(_mapping(run)))!s})))
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def _mapping(run) -> dict:
    from flexmoe_jax.mapping import to_mapping

    return to_mapping(run)
