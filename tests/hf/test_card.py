"""What strangers' records say is text in a model card: no HTML, no markup, no keys of the metadata block."""

import pytest
import yaml
from markdown_it import MarkdownIt

from flexmoe_jax.artifacts.model_dir import create_model
from flexmoe_jax.hf.architectures import architecture_of
from flexmoe_jax.hf.card import model_card
from tests.tiny import CONFIG, RECORDS, TOKENIZER, release_params

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[our terms](https://evil.example)",
    "![](https://evil.example/pixel.png)",
    "mit\n---\n# A heading\n\n<b>bold</b>",
    "mit\ntags: [evil]\nlicense: mit",
    "mit\r\nlicense: mit",
    "a | b | c |\n| `evil` | 1 |",
    "`code` *loud* _soft_ ~~gone~~",
    "\x1b[2Jgone\x07",
    "&lt;script&gt;",
    "\\<b>",
    "\u202eevil",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_record_cannot_act_in_the_card(tmp_path, text):
    hostile = {"licence": text, "contact": text, "training": {"steps": text, "tokens": text, "privacy_budget": [text]}}
    model = create_model(tmp_path / "model", release_params(0), CONFIG, TOKENIZER, RECORDS | {"public": hostile})
    card = model_card(model, ("public",), architecture_of(CONFIG, False, False), {"bias_left_out": None})
    plain = create_model(tmp_path / "plain", release_params(0), CONFIG, TOKENIZER, RECORDS | {"public": {}})
    expected = model_card(plain, ("public",), architecture_of(CONFIG, False, False), {"bias_left_out": None})

    _, metadata, body = card.split("---\n", 2)
    assert yaml.safe_load(metadata).keys() == yaml.safe_load(expected.split("---\n", 2)[1]).keys()
    assert yaml.safe_load(metadata)["license"] == "other"
    assert kinds(body) == kinds(expected.split("---\n", 2)[2])
    assert not any(c for c in body if not c.isprintable() and c != "\n")


def kinds(markdown: str) -> list[str]:
    """The elements of a page, of text and code only how many paragraphs and cells they are in."""
    tokens = MarkdownIt("gfm-like").disable("linkify").parse(markdown)
    inner = [child.type for token in tokens for child in token.children or ()]
    return [token.type for token in tokens] + [kind for kind in inner if kind not in ("text", "text_special")]
