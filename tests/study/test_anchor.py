"""A study beside a given model: imported out of a wheel, public text of several domains, the paper's tasks."""

import dataclasses
import json
import pathlib
import types
import zipfile

import numpy as np
import pytest

from flexmoe_jax.artifacts.model_dir import load_params, open_model
from flexmoe_jax.cli.common import check_paths
from flexmoe_jax.cli.main import main
from flexmoe_jax.data import embedding
from flexmoe_jax.data.embedding import DomainVector
from flexmoe_jax.data.sources import read_documents
from flexmoe_jax.data.wheels import Wheel
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.evaluate.tasks import Result
from flexmoe_jax.flexmix import build
from flexmoe_jax.hf import anchors
from flexmoe_jax.hf.anchors import ANCHORS, Anchor
from flexmoe_jax.hf.gguf_export import export_gguf
from flexmoe_jax.study import suites
from flexmoe_jax.study.reproduce import reproduce
from flexmoe_jax.study.results import PUBLIC_TEXT, read_results
from flexmoe_jax.study.scoring import Bench, Text, Texts, of_model
from flexmoe_jax.study.suites import ACCURACY, GOLD, by_seed, score_suites, suite_table
from flexmoe_jax.study.systems import METHOD, systems
from flexmoe_jax.study.train import make_shared, train_public
from flexmoe_jax.study.workshop import Artifacts, Workshop, text_folder
from tests.hf.tiny import LLAMA, our_model
from tests.study.tiny import CONFIG

pytest.importorskip("gguf")
BESIDE = dataclasses.replace(
    CONFIG,
    model=None,
    public="smollm2",
    domains="math,spanish",
    public_domains="educational",
    public_share=0.0,
    seeds=1,
    rates="1e-3",
    ablations="",
    systems="method",
    seq_len=32,
    batch_size=4,
)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with a tiny pre-norm model in the place of SmolLM2's; how often it was asked for."""
    model, asked = our_model(tmp_path / "source", config=LLAMA), []
    export_gguf(model, tmp_path / "tiny.gguf", experts=["public"])
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny/tiny.gguf")
    monkeypatch.setitem(ANCHORS, "smollm2", Anchor(Wheel("tiny", "1", "0"), "tiny/tiny.gguf", "MIT"))
    monkeypatch.setattr(anchors, "fetch", lambda wheels, _: asked.append(1) or {"tiny": tmp_path / "tiny.whl"})
    return asked


def test_a_study_imports_its_anchor_once_with_the_vector_of_its_public_text(wheel, tmp_path):
    (tmp_path / "domains").mkdir()
    vector = np.random.default_rng(0).standard_normal(24).astype(np.float32)
    DomainVector(vector, "encoder", "0" * 64, 20, 0, 20).save(tmp_path / "domains" / "public.json")
    paths = [train_public(BESIDE, tmp_path, tmp_path) for _ in range(2)]
    assert paths == [tmp_path / "made" / "smollm2"] * 2
    assert wheel == [1]
    model = open_model(paths[0])
    assert model.config.pre_norm
    assert model.manifests["public"].record.fields["licence"] == "MIT"
    row = load_params(model)["experts"]["public"]["router"][0]
    assert np.linalg.norm(row) == pytest.approx(0.1, rel=1e-5)  # float32


def test_the_command_takes_the_anchors_name(wheel, tmp_path, capsys):
    assert main(["import-gguf", "smollm2", "--out", str(tmp_path / "model"), "--licence", "MIT"]) == 0
    assert open_model(tmp_path / "model").config == dataclasses.replace(LLAMA, norm_topk=True)
    study = dataclasses.replace(BESIDE, out=str(tmp_path))
    check_paths(study, known=ANCHORS)
    with pytest.raises(ConfigError, match="smollm2 does not exist"):
        check_paths(study)


def test_public_text_of_several_domains_is_as_much_of_each_and_owners_mix_it_in(tmp_path, monkeypatch):
    built = []

    def fake_build(out, *, domains, public_share):
        built.append((domains, public_share))
        for name in domains:
            (out / name).mkdir(parents=True)
            size = 50 if name == "public" else 90
            rows = [{"text": f"{name} {n:03d} " + "x" * (90 - len(name))} for n in range(size)]
            (out / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    embedded = {}

    class Vector:
        def __init__(self, texts):
            self.texts = texts

        def save(self, path):
            embedded[path.stem] = self.texts

    monkeypatch.setattr(build, "build", fake_build)
    monkeypatch.setattr(embedding, "domain_vector", lambda documents, count: Vector([d.text for d in documents]))
    make_shared(BESIDE, tmp_path)
    assert built == [(("public", "educational", "math", "spanish"), 0.0)]
    words = [document.text.split()[0] for document in read_documents(tmp_path / "public")]
    assert {word: words.count(word) for word in words} == {"public": 50, "educational": 50}
    assert len(embedded["public"]) == 100
    assert len(embedded["math"]) == 90

    given = {}
    monkeypatch.setattr(
        "flexmoe_jax.study.workshop.train", lambda run: given.update({run.owner: run}) or tmp_path / "x"
    )
    monkeypatch.setattr("flexmoe_jax.study.workshop.merge", lambda release, packages, path, top_k: path.mkdir())
    workshop = Workshop(dataclasses.replace(BESIDE, router_scale=0.1), tmp_path, tmp_path / "seed-0", 0)
    monkeypatch.setattr(Workshop, "at_norm", lambda self, release, scale: release)
    monkeypatch.setattr(Workshop, "tokens", lambda self, text, release: text_folder(self.config, self.shared, text))
    method = next(system for system in systems(dataclasses.replace(BESIDE, model=LLAMA)) if system.name == METHOD)
    workshop.make(METHOD, method.training, Artifacts({"public": pathlib.Path("release")}))
    assert given["math"].public_data == str(tmp_path / "public")
    assert given["math"].data == str(tmp_path / "mix" / "math")


def test_suites_are_scored_once_for_each_system_and_the_public_model_once_for_all_seeds(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, systems="all", suites="arc_easy,gsm8k", suite_items=3)
    calls = []

    def run_task(lm, task, examples, gold=False):
        calls.append((lm, task.name, gold, examples))
        return Result(task.name, "", 1.5 if gold else 0.25, 0.0, 3)

    class Tiny:
        def __init__(self, path):
            self.path = path

        def lm(self):
            return self.path

    class Loaded(Bench):
        load = Tiny

    monkeypatch.setattr(suites, "run_task", run_task)
    monkeypatch.setattr(suites, "load_examples", lambda task, limit, form: [limit])
    monkeypatch.setattr(suites, "soup_of", lambda bench, models: Tiny("+".join(models)))
    models = {name: pathlib.Path(name) for name in ("public", METHOD, "dense news")}
    benches = [Loaded(config, Artifacts(models), Texts({}, {}), tmp_path, tmp_path / f"seed-{n}") for n in range(2)]
    found = by_seed([score_suites(bench) for bench in benches])
    scored = {"public", METHOD, "soup", "dense news"}
    assert set(found) == scored
    assert found["soup"]["arc_easy"] == {ACCURACY: [0.25] * 2, GOLD: [1.5] * 2}
    assert found["public"]["gsm8k"] == {GOLD: [1.5] * 2}  # text is not generated
    assert {str(lm) for lm, *_ in calls} == {"public", METHOD, "public+dense news", "dense news"}
    assert sum(str(lm) == "public" for lm, *_ in calls) == 3  # the accuracy of one task, the gold answers of two
    assert sum(str(lm) == METHOD for lm, *_ in calls) == 6
    assert all(examples == [3] for *_, examples in calls)
    calls.clear()
    assert by_seed([score_suites(bench) for bench in benches]) == found
    assert calls == []
    assert suite_table(found)[1][0] == ["public", 0.25, 1.5, 1.5]
    assert score_suites(dataclasses.replace(benches[0], config=dataclasses.replace(config, suites=""))) == {}


def test_systems_are_scored_in_windows_of_the_study_not_of_the_models_longest(tmp_path):
    """SmolLM2 reads 8,192 tokens: every short document would be padded to rows of 1,024."""
    windows = []

    class Model:
        def score(self, texts, *, seq_len, uniform):
            windows.append(seq_len)
            return types.SimpleNamespace(token_nats=[np.ones(3)] * len(texts), share_LE=np.ones((1, 1)))

    class Loaded(Bench):
        load = staticmethod(lambda path: Model())

    texts = Texts({"public": [Text("abc", "1")]}, {})
    of_model("public")(Loaded(BESIDE, Artifacts({"public": tmp_path}), texts, tmp_path, tmp_path))
    assert windows == [BESIDE.seq_len]


@pytest.mark.slow
@pytest.mark.torch
def test_a_study_beside_an_anchor_of_another_shape(wheel, tmp_path):
    config = dataclasses.replace(
        BESIDE,
        out=str(tmp_path / "study"),
        systems="all",
        leave_out="unrestricted.*|FlexMoE, .*",
        compute_dtype="bfloat16",
        owner_steps=2,
        mix_steps=2,
        embed_count=16,
        classifier_documents=16,
        proxies=16,
        proxies_of=40,
        heldout_bytes=2000,
        suites="arc_easy",
        suite_items=2,
    )
    results = reproduce(config)
    names = {system.name for system in results.systems}
    assert {"public", METHOD, "BTX", "soup", "dense math", "oracle dense expert"} < names
    assert not any(name.startswith(("unrestricted", "FlexMoE, ")) for name in names)
    assert results.config["model"]["d_model"] == LLAMA.d_model
    assert {"public", "educational", PUBLIC_TEXT} & set(results.method.bits_per_byte) >= {"public", "educational"}
    assert set(results.suites) == {"public", METHOD, "soup", "dense math", "dense spanish"}
    assert read_results(tmp_path / "study" / "results.jsonl") == [results]
    runs = tmp_path / "study" / "seed-0" / "runs"
    assert (runs / "dense_math" / "model").exists()
    assert not (runs / "dense_math" / "checkpoints").exists()
    assert reproduce(config) == results
