"""From scores to tables: bits per byte and choices with intervals, costs, and each system against the method."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from flexmoe_jax.api import load
from flexmoe_jax.artifacts.sealed import differences, write_json
from flexmoe_jax.config import to_mapping
from flexmoe_jax.errors import ArtifactError, ConfigError, did_you_mean
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.systems import make_texts, score_seed
from flexmoe_jax.study.tables import classifiers, compare_never_merged, curves, samples, tabulate
from flexmoe_jax.study.train import METHOD, OF_PUBLIC, OF_SHARED, make_shared, train_public, train_seed


def reproduce(config: StudyConfig, shared: pathlib.Path | None = None) -> dict:
    """Runs the study, or what is missing of it, in `config.out`; writes and returns `results.json`.

    `shared` is the folder of another study of the same domains, with its mix and domain vectors.
    """
    root = pathlib.Path(config.out)
    shared = root if shared is None else shared
    check_same(config, root)
    make_shared(config, shared)
    texts = make_texts(config, shared / "mix")
    public = train_public(config, shared, root)
    made, scores = [], []
    for seed in range(config.seeds):
        home = root / f"seed-{seed}"
        made.append(train_seed(config, shared, public, home, seed))
        scores.append(score_seed(config, made[-1], texts, home))
    results = tabulate(config, texts, scores, made[0].flops)
    results |= {
        "opting_out": [compare_never_merged(artefacts) for artefacts in made],
        "curves": curves([root / "runs", root / "seed-0" / "runs"]),
        "classifiers": classifiers(config, shared),
    }
    # Held-out text stays in the study's folder: results may be published, news may not.
    write_json(root / "samples.json", samples(load(made[0].merged[METHOD]), texts))
    write_json(root / "results.json", results)
    return results


def vary(config: StudyConfig, key: str, values: Sequence[str]) -> dict[str, dict]:
    """{value: results} of the study at each value of one of its numbers: the method and its dense experts alone.

    Each is a study of its own in `config.out`/KEY-VALUE. They share the text and the public model where these do not
    depend on the number.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(StudyConfig) if field.type in (int, float)}
    if key not in kinds:
        raise ConfigError(f"config.{key} cannot be varied", did_you_mean(key, kinds))
    if config.public and key in ("public_steps", "public_share"):
        raise ConfigError(f"config.public is {config.public!r} and config.{key} is varied", "leave config.public out")
    root, base = pathlib.Path(config.out), dataclasses.replace(config, systems="method")
    try:
        changes: list[dict] = [{key: kinds[key](value), "out": str(root / f"{key}-{value}")} for value in values]
        studies = [dataclasses.replace(base, **change) for change in changes]
    except ValueError as error:
        raise ConfigError(f"{key} is varied over {', '.join(values)}: {error}", "give numbers") from error
    if key not in OF_PUBLIC:
        make_shared(base, root)
        public = str(train_public(base, root, root))
        studies = [dataclasses.replace(study, public=public) for study in studies]
    shared = None if key in OF_SHARED else root
    return {value: reproduce(study, shared) for value, study in zip(values, studies, strict=True)}


def check_same(config: StudyConfig, root: pathlib.Path) -> None:
    """Refuses a folder that holds another study: what is cached there would be taken for this one's.

    More seeds may be added, other ablations, and more systems.
    """
    path, fields = root / "study.json", to_mapping(config)
    fields = {key: value for key, value in fields.items() if key not in ("out", "seeds", "ablations", "systems")}
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        write_json(path, fields)
    elif lines := differences(json.loads(path.read_text()), fields):
        raise ArtifactError(
            f"{root} holds another study (there != now):\n    " + "\n    ".join(lines), "give another config.out"
        )
