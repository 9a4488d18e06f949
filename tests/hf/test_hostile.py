"""A hostile checkpoint is refused by name, quickly and in little memory, and nothing is written; or it is imported."""

import copy
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import tempfile
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.errors import FlexMoEError
from flexmoe_jax.hf.checkpoint import Checkpoint, open_folder
from flexmoe_jax.hf.gguf_file import open_gguf
from flexmoe_jax.hf.load import import_model
from flexmoe_jax.hf.tensors import INDEX, SINGLE
from tests.faults.hostile import DEEP, ODD, TERABYTES, limits, places, snapshot
from tests.hf.tiny import CONFIG, LLAMA, arrays, edit_config, join_file, split_file, write

NORM, Q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
TINY_LISTS = b'{"a":[' + b"[]," * 9_000_000 + b"[]]}"  # 27 MB of text, 600 MB as lists
BLANKS = b" " * (100 << 20)
DIGITS = b'{"hidden_size":' + b"9" * 1_000_000 + b"}"
PICKLE = pickle.dumps({"a": [1, 2, 3]})
Attack = Callable[[pathlib.Path], object]


def content(name: str, raw: bytes) -> Attack:
    return lambda folder: (folder / name).write_bytes(raw)


def keys(**changes) -> Attack:
    return lambda folder: edit_config(folder, **changes)


def instead(name: str, make: Callable[[pathlib.Path], object]) -> Attack:
    def attack(folder):
        (folder / name).unlink()
        make(folder / name)

    return attack


def index(change: Callable[[dict], object]) -> Attack:
    """The folder gets shards, whose index is changed."""

    def attack(folder):
        (folder / SINGLE).unlink()
        write(folder, arrays(), 40_000)
        fields = json.loads((folder / INDEX).read_bytes())
        change(fields)
        (folder / INDEX).write_text(json.dumps(fields))

    return attack


def header(change: Callable[[dict], object]) -> Attack:
    def attack(folder):
        fields, data = split_file(folder / SINGLE)
        change(fields)
        join_file(folder / SINGLE, fields, data)

    return attack


def raw_header(raw: bytes) -> Attack:
    return lambda folder: join_file(folder / SINGLE, raw, split_file(folder / SINGLE)[1])


def everything_of_gigabytes(folder: pathlib.Path) -> None:
    """Configuration, header and (sparse) file agree on a vocabulary of 16 million and tensors of gigabytes."""
    fields, _ = split_file(folder / SINGLE)
    rows, at = 1 << 24, 0
    for name in fields.keys() - {"__metadata__"}:
        shape = [rows if size == CONFIG.vocab_size else size for size in fields[name]["shape"]]
        fields[name] |= {"shape": shape, "data_offsets": [at, at + 4 * int(np.prod(shape, dtype=object))]}
        at = fields[name]["data_offsets"][1]
    join_file(folder / SINGLE, fields, b"")
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size + at)
    edit_config(folder, vocab_size=rows)


RECORD = {"content": "0" * 64, "record": {}}
ATTACKS: dict[str, tuple[Attack, str]] = {
    "config of blanks": (content("config.json", BLANKS), "config.json has 104857600 bytes"),
    "config of tiny lists": (content("config.json", TINY_LISTS[:4_000_000]), "config.json holds some"),
    "config nested deeply": (content("config.json", DEEP), "config.json"),
    "config nested a little too deep": (content("config.json", b'{"a":' * 60 + b"1" + b"}" * 60), "nested"),
    "config with a number of a million digits": (content("config.json", DIGITS), "config.json"),
    "config with a key twice": (content("config.json", b'{"a":1,"a":2}'), "'a' is given twice"),
    "config that is not UTF-8": (content("config.json", b"{\xff}"), "config.json is not valid JSON"),
    "config with half a character": (content("config.json", b'{"a":"\\ud800"}'), "config.json is not valid JSON"),
    "config that is a list": (content("config.json", b"[]"), "holds a list"),
    "config that is a pickle": (content("config.json", PICKLE), "config.json is not valid JSON"),
    "config that is a named pipe": (instead("config.json", os.mkfifo), "config.json is not a regular file"),
    "config that is a folder": (
        instead("config.json", pathlib.Path.mkdir),
        "config.json is not a regular file|Is a directory",
    ),
    "config that is a device": (instead("config.json", lambda p: p.symlink_to("/dev/zero")), "not a regular file"),
    "config that links to itself": (instead("config.json", lambda p: p.symlink_to(p)), "config.json"),
    "a billion layers": (keys(num_hidden_layers=10**9), "implies 1000000000 layers"),
    "a billion experts": (keys(num_experts=10**9), "implies 2 layers of 1000000000 experts"),
    "layers beyond all numbers": (keys(num_hidden_layers=10**4000), "num_hidden_layers is 1000"),
    "no heads": (keys(num_attention_heads=0), "num_attention_heads is 0"),
    "heads below zero": (keys(num_key_value_heads=-2), "num_key_value_heads is -2"),
    "a width of half a number": (keys(hidden_size=0.5), "hidden_size is 0.5"),
    "a width that is true": (keys(hidden_size=True), "hidden_size is True"),
    "theta beyond all numbers": (keys(rope_parameters={"rope_theta": 10**4000}), "rope_theta of the rotary"),
    "rope that is a list": (keys(rope_parameters=[1]), "rope_parameters is [1]"),
    "rope that holds a list": (keys(rope_parameters={"rope_theta": [1]}), "'rope_theta' of the rotary embedding"),
    "rope of an odd kind": (keys(rope_parameters={"rope_type": {}}), "'rope_type' of the rotary embedding"),
    "yarn of factor 0": (
        keys(rope_parameters={"rope_type": "yarn", "factor": 0, "mscale": 1, "mscale_all_dim": 1}),
        "with|factor",
    ),
    "kinds of layers that are a number": (keys(layer_types=3), "layer_types is 3"),
    "layers without rope that are a number": (keys(no_rope_layers=3), "no_rope_layers is 3"),
    "a smooth SmolLM3 of a billion layers": (
        keys(model_type="smollm3", architectures=None, num_hidden_layers=10**9),
        "implies 1000000000 layers",
    ),
    "our key with a number": (keys(flexmoe=3), "flexmoe is 3"),
    "our names that are a number": (keys(flexmoe={"names": 3}), "flexmoe is {'names': 3}"),
    "our names that are paths": (keys(flexmoe={"names": ["public", "../x", "/y"]}), "'../x' is not usable"),
    "our owners that are a list": (keys(flexmoe={"owners": [RECORD]}), "flexmoe is {'owners'"),
    "our top-k that is text": (keys(flexmoe={"top_k": "2"}), "flexmoe is {'top_k': '2'}"),
    "our top-k of 0": (keys(flexmoe={"top_k": 0}), "top_k"),
    "generation config of blanks": (content("generation_config.json", BLANKS), "generation_config.json has"),
    "tokenizer of tiny lists": (content("tokenizer.json", TINY_LISTS), "tokenizer.json holds some"),
    "tokenizer nested deeply": (content("tokenizer.json", DEEP), "tokenizer.json"),
    "tokenizer that is a pickle": (content("tokenizer.json", PICKLE), "tokenizer.json"),
    "tokenizer that is a named pipe": (instead("tokenizer.json", os.mkfifo), "tokenizer.json is not a regular file"),
    "index of blanks": (lambda f: (index(lambda i: 0)(f), content(INDEX, BLANKS)(f)), f"{INDEX} has 104857600"),
    "index of tiny lists": (lambda f: (index(lambda i: 0)(f), content(INDEX, TINY_LISTS)(f)), f"{INDEX} holds some"),
    "index without a map": (index(lambda i: i.pop("weight_map")), "has no weight_map"),
    "index with a list": (index(lambda i: i.update(weight_map=[1])), "has no weight_map"),
    "index with a parent path": (index(lambda i: i["weight_map"].update(a="../a.safetensors")), "has no weight_map"),
    "index with an absolute path": (index(lambda i: i["weight_map"].update(a="/a.safetensors")), "has no weight_map"),
    "index with a zero byte": (index(lambda i: i["weight_map"].update(a="a\0.safetensors")), "has no weight_map"),
    "index with escapes": (index(lambda i: i["weight_map"].update(a="\x1b[2J.safetensors")), "has no weight_map"),
    "index with a long name": (
        index(lambda i: i["weight_map"].update(a="a" * 999 + ".safetensors")),
        "File name too long",
    ),
    "weights that are a named pipe": (instead(SINGLE, os.mkfifo), f"{SINGLE} is not a regular file"),
    "weights that are a pickle": (content(SINGLE, PICKLE), "and a header of"),
    "weights that are empty": (content(SINGLE, b""), "and a header of"),
    "header beyond the file": (content(SINGLE, struct.pack("<Q", 1 << 62) + b"{}"), "and a header of"),
    "header of blanks": (raw_header(b"{}" + b" " * (40 << 20)), "and a header of"),
    "header of tiny lists": (raw_header(TINY_LISTS), f"{SINGLE} holds some"),
    "header nested deeply": (raw_header(DEEP), SINGLE),
    "header with a number of a million digits": (raw_header(DIGITS), SINGLE),
    "shape of terabytes": (header(lambda h: h[Q].update(shape=[TERABYTES, 32])), "has 4096 bytes"),
    "shape beyond all numbers": (header(lambda h: h[Q].update(shape=[10**4000, 32])), "has the header entry"),
    "shape of many dimensions": (header(lambda h: h[Q].update(shape=[1 << 40] * 100_000)), "has the header entry"),
    "shape of true": (header(lambda h: h[NORM].update(shape=[True])), "has the header entry"),
    "dtype that is a list": (header(lambda h: h[Q].update(dtype=["F32"])), "has dtype"),
    "offsets that overlap": (header(lambda h: h[Q].update(data_offsets=h[NORM]["data_offsets"])), "starts at byte"),
    "offsets beyond the file": (header(lambda h: h[Q].update(data_offsets=[1 << 40, (1 << 40) + 4096])), "starts at"),
    "offsets below zero": (header(lambda h: h[Q].update(data_offsets=[-4096, 0])), "has the header entry"),
    "a tensor of a long name": (header(lambda h: h.update({"a" * 1_000_000: h.pop(Q)})), "has the header entry"),
    "everything of gigabytes": (everything_of_gigabytes, "almost no blocks on the disk"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sound checkpoint of three experts. It was imported once: libraries start their threads outside the limits."""
    root = tmp_path_factory.mktemp("sound")
    import_model(open_folder(write(root / "hf", arrays())), root / "out")
    return root / "hf"


def test_the_checkpoint_that_is_attacked_is_sound(folder, tmp_path):
    with limits():
        import_model(open_folder(folder), tmp_path / "out")


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_by_name_and_nothing_is_written(folder, tmp_path, attack):
    shutil.copytree(folder, tmp_path / "hf")
    strike, words = ATTACKS[attack]
    strike(tmp_path / "hf")
    before = snapshot(tmp_path)
    with limits(), pytest.raises(FlexMoEError) as error:
        import_model(open_folder(tmp_path / "hf"), tmp_path / "out")
    assert any(word in error.value.what for word in words.split("|"))
    assert error.value.remedy
    assert len(str(error.value)) < 2000
    assert str(error.value).replace("\n", "").isprintable()
    assert snapshot(tmp_path) == before


def refused_or_sound(root: pathlib.Path, read: Callable[[], Checkpoint]) -> None:
    """The import is refused, and nothing around it changes, or it gives a model that verifies."""
    before = snapshot(root)
    refused = None
    with limits():
        try:
            import_model(read(), root / "out")
        except FlexMoEError as error:
            refused = error
    if refused is not None:
        assert refused.remedy
        assert snapshot(root) == before
        return
    assert all(check.ok for check in verify_model(root / "out"))


def altered(value: dict, seed: int) -> dict:
    """A JSON object in which one value is set to something odd, removed, or added."""
    rng, value = random.Random(seed), copy.deepcopy(value)
    node, name = rng.choice(places(value))
    kind = rng.choice(("set", "set", "set", "remove", "add"))
    if kind == "remove":
        del node[name]
    elif kind == "add" and isinstance(node, dict):
        node["odd"] = rng.choice(ODD)
    else:
        node[name] = rng.choice(ODD)
    return value


def cut_or_flipped(raw: bytes, seed: int) -> bytes:
    """The bytes with some of them changed, or a part missing or doubled."""
    rng, raw = random.Random(seed), bytearray(raw)
    at, kind = rng.randrange(max(len(raw), 1)), rng.choice(("flip", "flip", "cut", "double"))
    if kind == "flip":
        for _ in range(rng.choice((1, 8))):
            raw[rng.randrange(len(raw))] ^= rng.randrange(1, 256)
        return bytes(raw)
    return bytes(raw[:at]) if kind == "cut" else bytes(raw[:at] + raw)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), part=st.sampled_from(("config", "ours", "header", "tokenizer", "bytes")))
def test_a_mutated_folder_is_refused_or_imported_soundly(folder, seed, part):
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        hf = shutil.copytree(folder, root / "hf")
        config = json.loads((hf / "config.json").read_bytes())
        if part == "config":
            (hf / "config.json").write_text(json.dumps(altered(config, seed)))
        elif part == "ours":
            owners = dict.fromkeys(("trunk", "public", "code", "news"), RECORD)
            kept = {"names": ["public", "code", "news"], "top_k": 2, "owners": owners, "tokenizer": ["tokenizer.json"]}
            (hf / "config.json").write_text(json.dumps(config | {"flexmoe": altered(kept, seed)}))
        elif part == "header":
            fields, data = split_file(hf / SINGLE)
            join_file(hf / SINGLE, altered(fields, seed), data)
        elif part == "tokenizer":
            fields = json.loads((hf / "tokenizer.json").read_bytes())
            (hf / "tokenizer.json").write_text(json.dumps(altered(fields, seed)))
        else:
            file = random.Random(seed).choice(sorted(hf.iterdir()))
            file.write_bytes(cut_or_flipped(file.read_bytes(), seed))
        refused_or_sound(root, lambda: open_folder(hf))


# GGUF. A value is (type of the container, value); arrays are (9, (type of the elements, list)).
FORMATS = {0: "<B", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 12: "<d"}


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def encoded(kind: int, value) -> bytes:
    """A value of the container, without its type; bytes stand for themselves."""
    if isinstance(value, bytes):
        return value
    if kind == 8:
        return text(value)
    if kind == 9:
        of, values = value
        return struct.pack("<IQ", of, len(values)) + b"".join(encoded(of, v) for v in values)
    return struct.pack(FORMATS[kind], value)


def gguf_bytes(fields: dict, tensors: dict, counts: tuple[int, int] | None = None, version: int = 3) -> bytes:
    """A GGUF file; `tensors` are {name: (type, shape, offset, bytes)}, `counts` those stated of tensors and keys."""
    counts = counts or (len(tensors), len(fields))
    raw = b"GGUF" + struct.pack("<IQQ", version, *counts)
    for name, (kind, value) in fields.items():
        raw += text(name) + struct.pack("<I", kind) + encoded(kind, value)
    for name, (kind, shape, offset, _) in tensors.items():
        raw += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in reversed(shape))
        raw += struct.pack("<IQ", kind, offset)
    raw += b"\0" * (-len(raw) % 32)
    return raw + b"".join(data for *_, data in tensors.values())


def sound_gguf() -> tuple[dict, dict]:
    """(keys, tensors) of a tiny Llama with a tokenizer."""
    c, vocab = LLAMA, json.loads(load_tokenizer("cl100k:300").json_bytes)
    tokens = sorted(vocab["model"]["vocab"], key=vocab["model"]["vocab"].get)
    tokens += [entry["content"] for entry in vocab["added_tokens"]]
    numbers = {
        **{"context_length": c.max_seq_len, "embedding_length": c.d_model, "block_count": c.num_layers},
        **{"feed_forward_length": c.d_ff, "attention.head_count": c.num_heads},
        **{"attention.head_count_kv": c.num_kv_heads, "vocab_size": c.vocab_size},
    }
    fields = {
        "general.architecture": (8, "llama"),
        **{f"llama.{name}": (4, value) for name, value in numbers.items()},
        "llama.attention.layer_norm_rms_epsilon": (6, c.norm_eps),
        "llama.rope.freq_base": (6, c.rope_theta),
        "tokenizer.ggml.model": (8, "gpt2"),
        "tokenizer.ggml.pre": (8, "llama-bpe"),
        "tokenizer.ggml.tokens": (9, (8, tokens)),
        "tokenizer.ggml.token_type": (9, (5, [1] * 298 + [3, 3])),
        "tokenizer.ggml.merges": (9, (8, [" ".join(merge) for merge in vocab["model"]["merges"]])),
        "tokenizer.ggml.eos_token_id": (4, 298),
    }
    kv = c.num_kv_heads * c.head_dim
    layer = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (kv, 32), "attn_v": (kv, 32)}
    layer |= {"attn_output": (32, 32), "ffn_gate": (40, 32), "ffn_up": (40, 32), "ffn_down": (32, 40)}
    shapes = {"token_embd.weight": (300, 32), "output_norm.weight": (32,)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(c.num_layers) for name, shape in layer.items()}
    tensors, at, rng = {}, 0, np.random.default_rng(0)
    for name, shape in shapes.items():
        data = rng.standard_normal(shape).astype(np.float32).tobytes()
        tensors[name], at = (0, shape, at, data), at + len(data)
    return fields, tensors


SOUND = sound_gguf()
HUGE = struct.pack("<Q", 1 << 62)
ODD_NAMES = {"escapes": "\x1b[2J", "long": "a" * 1000, "not UTF-8": b"\xff"}


def fields(**changes) -> bytes:
    return gguf_bytes(SOUND[0] | {k.replace("__", "."): v for k, v in changes.items()}, SOUND[1])


def tensor(name: str = "output_norm.weight", **changes) -> bytes:
    entry = dict(zip(("kind", "shape", "offset", "data"), SOUND[1][name], strict=True)) | changes
    return gguf_bytes(SOUND[0], SOUND[1] | {name: tuple(entry.values())})


GGUF_ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "a pickle": (PICKLE, "is not a GGUF file"),
    "only the magic": (b"GGUF", "is damaged"),
    "another version": (gguf_bytes(*SOUND, version=1), "version 1"),
    "another byte order": (gguf_bytes(*SOUND, version=3 << 24), "version"),
    "more keys than bytes": (gguf_bytes(*SOUND, counts=(20, 1 << 62)), "is damaged"),
    "more tensors than bytes": (gguf_bytes(*SOUND, counts=(1 << 62, len(SOUND[0]))), "is damaged"),
    "a string longer than the file": (fields(x=(8, HUGE)), "bytes at byte"),
    "a list longer than the file": (fields(x=(9, struct.pack("<I", 8) + HUGE)), "a list has 4611686018427387904"),
    "numbers longer than the file": (fields(x=(9, struct.pack("<I", 4) + HUGE)), "bytes at byte"),
    "a list of lists": (fields(x=(9, struct.pack("<IQIQ", 9, 1, 9, 1) * 1000)), "values of the type 9"),
    "a value of an unknown type": (fields(x=(99, b"")), "a value has the type 99"),
    "three million strings": (fields(x=(9, (8, [""] * 3_000_000))), "a list has 3000000 values"),
    "three million keys": (
        gguf_bytes({}, {}, (0, 3_000_000))
        + b"".join(text(str(i)) + struct.pack("<IB", 0, 0) for i in range(3_000_000)),
        "is damaged",
    ),
    "a key twice": (
        gguf_bytes({"a": (0, 1)}, {}, (0, 2))[:-32] + (text("a") + struct.pack("<IB", 0, 1)) * 2,
        "given twice|is damaged",
    ),
    "text that is not UTF-8": (fields(x=(8, b"\x01" + bytes(7) + b"\xff")), "is damaged"),
    **{
        f"a key of a name with {k}": (gguf_bytes(SOUND[0] | {v: (0, 1)}, SOUND[1]), "is damaged")
        for k, v in ODD_NAMES.items()
    },
    "a tensor of a name with escapes": (gguf_bytes(SOUND[0], {"\x1b[2J": (0, (1,), 0, b"")}), "it has the name"),
    "a tensor of many dimensions": (tensor(shape=(1,) * 100_000), "100000 dimensions"),
    "a tensor of terabytes": (tensor(shape=(TERABYTES,)), "goes beyond the file"),
    "a tensor beyond the file": (tensor(offset=1 << 62), "goes beyond the file"),
    "a tensor of an unknown type": (tensor(kind=200), "unknown type 200"),
    "a tensor of integers": (tensor(kind=26), "which the package gguf does not undo|has dtype"),
    "a tensor of part of a block": (tensor(kind=8, shape=(31,)), "goes beyond the file"),
    "another shape": (tensor(shape=(31,)), "has shape (31,)"),
    "no shape": (tensor(shape=()), "has shape ()"),
    "an alignment of 0": (fields(general__alignment=(4, 0)), "alignment is 0"),
    "an alignment that is text": (fields(general__alignment=(8, "a")), "alignment is 'a'"),
    "an architecture that is a list": (fields(general__architecture=(9, (8, ["llama"]))), "is a list"),
    "a billion layers": (fields(llama__block_count=(4, 10**9)), "implies 1000000000 layers"),
    "no heads": (fields(**{"llama.attention.head_count": (4, 0)}), "head_count is 0"),
    "heads of each layer": (fields(**{"llama.attention.head_count": (9, (4, [4, 4]))}), "is a list"),
    "a width that is text": (fields(llama__embedding_length=(8, "32")), "embedding_length is '32'"),
    "theta that is no number": (fields(**{"llama.rope.freq_base": (6, float("nan"))}), "rope_theta is nan"),
    "theta that is infinite": (fields(**{"llama.rope.freq_base": (6, float("inf"))}), "rope_theta is inf"),
    "eps that is no number": (
        fields(**{"llama.attention.layer_norm_rms_epsilon": (6, float("nan"))}),
        "norm_eps is nan",
    ),
    "a factor that is no number": (fields(**{"llama.rope.scaling.factor": (6, float("nan"))}), "factor is nan"),
    "tokens that are numbers": (fields(**{"tokenizer.ggml.tokens": (9, (4, [1, 2]))}), "has no tokenizer.json"),
    "types that are text": (fields(**{"tokenizer.ggml.token_type": (9, (8, ["1"]))}), "has no tokenizer.json"),
    "a tokenizer's kind that is a list": (
        fields(**{"tokenizer.ggml.model": (9, (4, [1, 2]))}),
        "has no tokenizer.json",
    ),
    "an end token beyond the list": (fields(**{"tokenizer.ggml.eos_token_id": (10, 1 << 60)}), "has no tokenizer.json"),
    "merges of unknown tokens": (
        fields(**{"tokenizer.ggml.merges": (9, (8, ["x y z", "q"]))}),
        "is not a tokenizer.json",
    ),
}


def test_the_file_that_is_attacked_is_sound(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(*SOUND))
    import_model(open_gguf(tmp_path / "x.gguf"), tmp_path / "out")


@pytest.mark.parametrize("attack", GGUF_ATTACKS)
def test_an_attack_by_a_gguf_file_is_refused_by_name_and_nothing_is_written(folder, tmp_path, attack):
    pytest.importorskip("gguf")
    raw, words = GGUF_ATTACKS[attack]
    (tmp_path / "x.gguf").write_bytes(raw)
    before = snapshot(tmp_path)
    with limits(), pytest.raises(FlexMoEError) as error:
        import_model(open_gguf(tmp_path / "x.gguf"), tmp_path / "out")
    assert any(word in error.value.what for word in words.split("|"))
    assert error.value.remedy
    assert len(str(error.value)) < 2000
    assert str(error.value).replace("\n", "").isprintable()
    assert snapshot(tmp_path) == before


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), in_header=st.booleans())
def test_a_mutated_gguf_file_is_refused_or_imported_soundly(folder, seed, in_header):
    pytest.importorskip("gguf")
    raw = gguf_bytes(*SOUND)
    end = raw.index(b"output_norm.weight")  # of the keys; some way into the names of tensors
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        changed = cut_or_flipped(raw[:end], seed) + raw[end:] if in_header else cut_or_flipped(raw, seed)
        (root / "x.gguf").write_bytes(changed)
        refused_or_sound(root, lambda: open_gguf(root / "x.gguf"))
