"""A hostile checkpoint is refused by name, quickly and in little memory, and nothing is written; or it is imported."""

import copy
import json
import os
import pathlib
import random
import shutil
import struct
import tempfile
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.hf.checkpoint import open_folder
from flexmoe_jax.hf.load import import_model
from flexmoe_jax.hf.tensors import INDEX, SINGLE
from tests.faults.hostile import DEEP, ODD, TERABYTES, limits, places
from tests.hf.hostile import PICKLE, cut_or_flipped, refused_by_name, refused_or_sound
from tests.hf.tiny import CONFIG, arrays, edit_config, join_file, split_file, write

NORM, Q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
TINY_LISTS = b'{"a":[' + b"[]," * 9_000_000 + b"[]]}"  # 27 MB of text, 600 MB as lists
BLANKS = b" " * (100 << 20)
DIGITS = b'{"hidden_size":' + b"9" * 1_000_000 + b"}"
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
    refused_by_name(tmp_path, lambda: open_folder(tmp_path / "hf"), words)


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
