"""A hostile GGUF file is refused by name, quickly and in little memory, and nothing is written; or it is imported."""

import json
import pathlib
import struct
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.hf.gguf_file import open_gguf
from flexmoe_jax.hf.load import import_model
from tests.faults.hostile import TERABYTES
from tests.hf.hostile import PICKLE, cut_or_flipped, refused_by_name, refused_or_sound
from tests.hf.tiny import LLAMA

pytest.importorskip("gguf")

# A value is (type of the container, value); arrays are (9, (type of the elements, list)).
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


@pytest.fixture(scope="module", autouse=True)
def sound(tmp_path_factory):
    """The file that is attacked is imported once: it is sound, and libraries start their threads outside the limits."""
    root = tmp_path_factory.mktemp("sound")
    (root / "x.gguf").write_bytes(gguf_bytes(*SOUND))
    import_model(open_gguf(root / "x.gguf"), root / "out")


@pytest.mark.parametrize("attack", GGUF_ATTACKS)
def test_an_attack_by_a_gguf_file_is_refused_by_name_and_nothing_is_written(tmp_path, attack):
    raw, words = GGUF_ATTACKS[attack]
    (tmp_path / "x.gguf").write_bytes(raw)
    refused_by_name(tmp_path, lambda: open_gguf(tmp_path / "x.gguf"), words)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), in_header=st.booleans())
def test_a_mutated_gguf_file_is_refused_or_imported_soundly(seed, in_header):
    raw = gguf_bytes(*SOUND)
    end = raw.index(b"output_norm.weight")  # of the keys; some way into the names of tensors
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        changed = cut_or_flipped(raw[:end], seed) + raw[end:] if in_header else cut_or_flipped(raw, seed)
        (root / "x.gguf").write_bytes(changed)
        refused_or_sound(root, lambda: open_gguf(root / "x.gguf"))
