"""A small file from a stranger is read or refused by name: quickly, in little memory, whatever its bytes are.

Directories of models and packages have tests of their own (tests/artifacts), and so have checkpoints (tests/hf).
"""

import copy
import json
import os
import pathlib
import pickle
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexmoe_jax.artifacts.signature import generate_key, read_trusted
from flexmoe_jax.compose.certificate import read_certificate
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.data.embedding import DomainVector
from flexmoe_jax.data.proxies import Classifier
from flexmoe_jax.data.store import TokenStore
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.data.writer import write_store
from flexmoe_jax.errors import FlexMoEError
from flexmoe_jax.flexmix.build import read_mix
from flexmoe_jax.study.page import read_study
from flexmoe_jax.study.results import RESULTS, SAMPLES, write_results
from flexmoe_jax.training.resume import read_identity
from tests.faults.hostile import TERABYTES, limits
from tests.study.tiny import results
from tests.tiny import make_expert, make_release, write_vector

Reader = tuple[Callable[[pathlib.Path], pathlib.Path], Callable[[pathlib.Path], object]]


def a_classifier(folder: pathlib.Path) -> pathlib.Path:
    weights = np.random.default_rng(0).normal(size=12).astype(np.float32)
    Classifier(weights, 0.5, "encoder", "e" * 64, 0.9, 38, 10).save(folder / "classifier.json")
    return folder / "classifier.json"


def a_certificate(folder: pathlib.Path) -> pathlib.Path:
    release = make_release(folder / "release")
    model = merge(release.path, [make_expert(folder / "news", "news", release)], folder / "model")
    opt_out(model.path, "news", certificate=folder / "certificate.json")
    return folder / "certificate.json"


def a_study(folder: pathlib.Path) -> pathlib.Path:
    write_results(folder / RESULTS, [results()])
    (folder / SAMPLES).write_text("[]")
    return folder / RESULTS


def samples(folder: pathlib.Path) -> pathlib.Path:
    return a_study(folder).with_name(SAMPLES)


def a_store(folder: pathlib.Path) -> pathlib.Path:
    write_store(["one text", "and another"], load_tokenizer("cl100k:300"), folder / "tokens")
    return folder / "tokens" / "index.json"


def a_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    load_tokenizer("cl100k:300").save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


def a_tokenizer_config(folder: pathlib.Path) -> pathlib.Path:
    fields = {"eos_token": {"content": "<|endoftext|>"}, "model_max_length": 64, "chat_template": "{{ messages }}"}
    a_tokenizer(folder).with_name("tokenizer_config.json").write_text(json.dumps(fields))
    return folder / "tokenizer_config.json"


def trusted_keys(folder: pathlib.Path) -> pathlib.Path:
    return generate_key(folder / "key", "news")


def json_file(name: str, value: object) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(folder: pathlib.Path) -> pathlib.Path:
        (folder / name).write_text(json.dumps(value))
        return folder / name

    return make


READERS: dict[str, Reader] = {
    "a domain vector": (lambda folder: write_vector(folder / "domain.json", 0), DomainVector.load),
    "a classifier": (a_classifier, Classifier.load),
    "a certificate": (a_certificate, read_certificate),
    "results of a study": (a_study, lambda path: read_study(path.parent)),
    "samples of a study": (samples, lambda path: read_study(path.parent)),
    "the index of a token store": (a_store, lambda path: TokenStore.open(path.parent)),
    "a tokenizer": (a_tokenizer, load_tokenizer),
    "a tokenizer's configuration": (a_tokenizer_config, lambda path: load_tokenizer(path.with_name("tokenizer.json"))),
    "trusted keys": (trusted_keys, read_trusted),
    "the identity of a run": (json_file("run.json", {"config": {"steps": 3}, "data": {}}), read_identity),
    "the description of a mix": (json_file("mix.json", {"key": "k", "files": {}}), lambda path: read_mix(path.parent)),
}
DIRECTORY, PIPE, LOOP, HUGE = "a directory", "a named pipe", "a link to itself", "a terabyte without blocks"
CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"hello",
    "null": b"null",
    "a list": b"[1, 2, 3]",
    "a number of 10,000 digits": b'{"format": ' + b"9" * 10_000 + b"}",
    "an infinite number": b'{"vector": [1e999], "width": 1, "count": 16, "seed": 0, "seen": 16}',
    "no UTF-8": b'{"format": "\xff\xfe"}',
    "a lone surrogate": b'{"format": "\\ud800"}',
    "deep nesting": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "two million values": b"[" + b"0," * 2_000_000 + b"0]",
    "a binary file": bytes(range(256)) * 1000,
    "a pickle": pickle.dumps(pathlib.Path("x")),
}
# No trusted key; a key that a tokenizer's configuration does not use.
HARMLESS = {("trusted keys", "nothing"), ("a tokenizer's configuration", "a lone surrogate")}


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """A reader that waits, as for the other end of a pipe, is interrupted and fails."""

    def ring(*_: object) -> None:
        raise TimeoutError("the reader waits")

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(read: Callable[[pathlib.Path], object], path: pathlib.Path) -> str | None:
    """The refusal, which is short and has a remedy; None if the file is read. Anything else fails."""
    signal.alarm(10)
    refusal = None
    try:
        with limits():
            read(path)
    except FlexMoEError as error:
        refusal = error
    finally:
        signal.alarm(0)
    if refusal is None:
        return None
    assert refusal.what
    assert refusal.remedy
    assert len(refusal.what) < 11_000
    return refusal.what


@pytest.mark.parametrize("kind", READERS)
def test_the_file_itself_is_read(kind, tmp_path):
    make, read = READERS[kind]
    assert refused(read, make(tmp_path)) is None


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("kind", READERS)
def test_other_content_is_refused(kind, content, tmp_path):
    make, read = READERS[kind]
    path = make(tmp_path)
    path.write_bytes(CONTENTS[content])
    what = refused(read, path)
    assert what is not None or (kind, content) in HARMLESS


@pytest.mark.parametrize("thing", [DIRECTORY, PIPE, LOOP, HUGE])
@pytest.mark.parametrize("kind", READERS)
def test_what_is_not_a_file_of_this_size_is_refused(kind, thing, tmp_path):
    make, read = READERS[kind]
    path = make(tmp_path)
    path.unlink()
    if thing == DIRECTORY:
        path.mkdir()
    elif thing == PIPE:
        os.mkfifo(path)
    elif thing == LOOP:
        path.symlink_to(path.name)
    else:
        with path.open("wb") as file:
            file.truncate(TERABYTES)
    assert refused(read, path) is not None


VALUES = [None, True, -1, 0, 10**20, 1e300, "", "x" * 70_000, "../../etc", [], {}, [[1]], {"a": 1}, "\x1b[2J\ud800"]


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    found = [path] if path else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        found += places(part, (*path, key))
    return found


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind not in ("trusted keys", "results of a study")])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_with_another_value_somewhere_is_read_or_refused(kind, data, tmp_path):
    make, read = READERS[kind]
    path = next((p for p in tmp_path.rglob("*.json") if p.with_suffix(".good").exists()), None)
    if path is None:
        path = make(tmp_path)
        path.with_suffix(".good").write_bytes(path.read_bytes())
    value = json.loads(path.with_suffix(".good").read_bytes())
    change(data, value, path)
    refused(read, path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_results_with_another_value_somewhere_are_read_or_refused(data, tmp_path):
    path = a_study(tmp_path)
    lines = path.read_text().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    change(data, json.loads(lines[number]), path)
    lines[number] = path.read_text()
    path.write_text("\n".join(lines) + "\n")
    refused(lambda p: read_study(p.parent), path)


def change(data: st.DataObject, value: object, path: pathlib.Path) -> None:
    """Writes `value` with one or two values replaced or removed."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 2))):
        found = places(value)
        if not found:
            break
        *way, last = data.draw(st.sampled_from(found))
        node = value
        for key in way:
            node = node[key]
        if data.draw(st.booleans()) or isinstance(node, list):
            node[last] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
        else:
            del node[last]
    path.write_text(json.dumps(value), encoding="utf-8")
