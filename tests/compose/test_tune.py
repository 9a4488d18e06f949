"""Router tuning changes only rows and biases, and determines whether later opt-outs are exact."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from flexmoe_jax.artifacts.journal import read_journal
from flexmoe_jax.artifacts.model_dir import load_params, open_model
from flexmoe_jax.artifacts.package import load_package, read_manifest, write_package
from flexmoe_jax.compose.certificate import read_certificate, verify_certificate
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.compose.tune import Tuning, tune
from flexmoe_jax.data.sources import content_digest
from flexmoe_jax.errors import ArtifactError, DataError, FlexMoEError
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.training.loop import train
from flexmoe_jax.tree import PUBLIC, TRUNK
from tests.faults.hostile import reseal
from tests.tiny import expert_run, public_run, write_documents

STEPS = {"steps": 3, "batch_size": 4, "seq_len": 32, "lr": 0.05}
ROUTER = {"router", "bias"}


@pytest.fixture(scope="module")
def proxies(world, tmp_path_factory):
    """Folders of proxies by owner: here documents of the owners' words."""
    root = tmp_path_factory.mktemp("proxies")
    return {name: write_documents(root / name, name, 20) for name in ("code", "news")}


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "together"])
def tuned(request, world, proxies, tmp_path_factory):
    """(folder, whether the rows are tuned together)."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    tune(world / "model", proxies, world / "public" / "data", out, Tuning(together=request.param, **STEPS))
    return out, request.param


def moved(before, after):
    """Names of an expert's leaves that differ."""
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_tuning_changes_only_the_owners_rows_and_biases(world, tuned):
    out, together = tuned
    before, after = open_model(world / "model"), open_model(out / "model")
    old, new = load_params(before), load_params(after)
    assert after.manifests[TRUNK].digest == before.manifests[TRUNK].digest
    assert after.manifests[PUBLIC].digest == before.manifests[PUBLIC].digest
    for name in ("code", "news"):
        assert "router" in moved(old["experts"][name], new["experts"][name]) <= ROUTER
        record = after.manifests[name].record.fields["tuned"]
        assert record["start"] == before.manifests[name].digest
        assert set(record["with"]) == ({"code", "news"} if together else {name})
        assert after.manifests[name].record.training == before.manifests[name].record.training
    assert [entry.event for entry in read_journal(out / "model")][-2:] == ["merged", "tuned"]


def test_the_tuning_of_one_owner_reads_its_proxies_and_public_text(world, proxies, tuned):
    out, together = tuned
    for name in () if together else ("code", "news"):
        data = json.loads((out / "runs" / name / "run.json").read_text())["data"]
        read = {source: part["documents"] for source, part in data.items()}
        public = content_digest(world / "public" / "data")
        assert read == {"own": content_digest(proxies[name]), "public": public}


def test_untuned_packages_are_unchanged_and_tuned_ones_merge(world, tuned, tmp_path):
    out, _ = tuned
    merged = merge(world / "public" / "run" / "model", [out / "packages" / n for n in ("news", "code")], tmp_path / "m")
    assert merged.digest == open_model(out / "model").digest
    assert open_model(world / "model").manifests["news"].record.tuned_with == ()


def test_opting_out_after_tuning_each_owner_equals_tuning_without_that_owner(world, proxies, tmp_path):
    """Bit for bit, and the certificate says `exact`."""
    data = world / "public" / "data"
    both = tune(world / "model", proxies, data, tmp_path / "both", Tuning(**STEPS))
    left = opt_out(both.path, "news", tmp_path / "left", certificate=tmp_path / "proof.json")
    opt_out(world / "model", "news", tmp_path / "never")
    never = tune(tmp_path / "never", {"code": proxies["code"]}, data, tmp_path / "alone", Tuning(**STEPS))
    assert left.digest == never.digest
    assert (left.path / "code" / "manifest.json").read_bytes() == (never.path / "code" / "manifest.json").read_bytes()
    assert read_certificate(tmp_path / "proof.json")["label"] == "exact"


def test_opting_out_after_tuning_together_is_labeled_approximate(world, proxies, tmp_path):
    data = world / "public" / "data"
    both = tune(world / "model", proxies, data, tmp_path / "both", Tuning(together=True, **STEPS))
    left = opt_out(both.path, "news", tmp_path / "left", certificate=tmp_path / "proof.json")
    certificate = read_certificate(tmp_path / "proof.json")
    assert certificate["label"] == "approximate"
    assert certificate["reason"] == "'news' had a part in training code"
    check = verify_certificate(tmp_path / "proof.json", left.path)[0]
    assert check.ok
    assert check.detail.endswith("was removed: approximate " + certificate["reason"])
    # The label is true: the row that stays differs from that of tuning without news.
    opt_out(world / "model", "news", tmp_path / "never")
    never = tune(
        tmp_path / "never", {"code": proxies["code"]}, data, tmp_path / "alone", Tuning(together=True, **STEPS)
    )
    assert left.manifests["code"].content != never.manifests["code"].content


def test_later_training_keeps_the_record_of_owners_that_influenced_a_package(world, proxies, tmp_path):
    """Tuned together, then tuned by itself or trained further by its owner."""
    data = world / "public" / "data"
    together = tune(world / "model", proxies, data, tmp_path / "together", Tuning(together=True, **STEPS))
    alone = tune(together.path, proxies, data, tmp_path / "alone", Tuning(**STEPS))
    assert alone.manifests["code"].record.tuned_with == ("code", "news")
    run = expert_run(
        tmp_path, "code", world / "public" / "run" / "model", domain_vector="", expert=str(alone.package("code"))
    )
    assert read_manifest(train(run), "code").record.tuned_with == ("code", "news")
    opt_out(alone.path, "news", tmp_path / "left", certificate=tmp_path / "proof.json")
    assert read_certificate(tmp_path / "proof.json")["label"] == "approximate"


def test_experts_trained_together_record_one_another(world, tmp_path):
    run = dataclasses.replace(public_run(tmp_path), model=None, public=str(world / "model"), domain_vector="")
    joint = open_model(train(run))
    assert joint.manifests["code"].record.tuned_with == ("code", "news")
    opt_out(joint.path, "news", tmp_path / "left", certificate=tmp_path / "proof.json")
    fields = read_certificate(tmp_path / "proof.json")
    assert (fields["label"], fields["reason"]) == ("approximate", "'news' had a part in training trunk, public, code")


def test_an_owner_trains_only_its_own_package_further(world, tmp_path):
    package = world / "news" / "run" / "package"
    run = expert_run(
        tmp_path,
        "news",
        world / "public" / "run" / "model",
        domain_vector="",
        expert=str(package),
        optimizer=OptimizerConfig(lr=0.0, warmup_steps=0, weight_decay=0.1),
    )
    made = read_manifest(train(run), "news")
    assert made.content == read_manifest(package).content  # it starts from the package, and a rate of 0 changes nothing
    assert made.record.fields["start"] == read_manifest(package).digest
    for owner, message in (("code", "this is the package of 'news'"), ("news", "belongs to another run")):
        other = package if owner == "code" else _another_version(package, tmp_path)
        with pytest.raises(ArtifactError, match=message):
            train(dataclasses.replace(run, owner=owner, expert=str(other)))


def _another_version(package, tmp_path):
    manifest, params = read_manifest(package), load_package(package)
    write_package(
        tmp_path / "other",
        owner="news",
        params={**params, "router": params["router"] * 2},
        config=manifest.config,
        base=manifest.base,
        record=manifest.record.fields,
    )
    return tmp_path / "other"


def test_owners_without_proxies_keep_their_rows(world, proxies, tmp_path):
    before = open_model(world / "model")
    for together in (False, True):
        out = tmp_path / str(together)
        tuning = Tuning(together=together, **STEPS)
        model = tune(world / "model", {"news": proxies["news"]}, world / "public" / "data", out, tuning)
        assert model.manifests["code"].digest == before.manifests["code"].digest
        assert model.manifests["news"].content != before.manifests["news"].content
        assert not (out / "packages" / "code").exists()


def test_a_finished_tuning_is_reused_and_another_tuning_in_its_place_is_refused(world, tuned, proxies, caplog):
    out, together = tuned
    caplog.set_level("INFO", "flexmoe_jax")
    again = tune(world / "model", proxies, world / "public" / "data", out, Tuning(together=together, **STEPS))
    assert again.path == out / "model"
    assert caplog.messages == [f"{out / 'model'} exists: nothing to do"]
    for change in ({"together": not together}, {"steps": 4}, {"proxies": {"news": proxies["news"]}}):
        settings = {"together": together, **STEPS} | {key: value for key, value in change.items() if key != "proxies"}
        arguments = {"proxies": change.get("proxies", proxies), "tuning": Tuning(**settings)}
        with pytest.raises(ArtifactError, match="holds another tuning"):
            tune(world / "model", public_data=world / "public" / "data", out=out, **arguments)


@pytest.mark.parametrize("together", [False, True])
def test_a_start_that_failed_before_its_first_checkpoint_binds_nothing(world, proxies, tmp_path, together):
    public, few = world / "public" / "data", {"news": proxies["news"]}
    with pytest.raises(FlexMoEError, match="seq_len is 99"):
        tune(world / "model", proxies, public, tmp_path / "out", Tuning(together, **STEPS | {"seq_len": 99}))
    corrected = tune(world / "model", few, public, tmp_path / "out", Tuning(together, **STEPS))
    fresh = tune(world / "model", few, public, tmp_path / "fresh", Tuning(together, **STEPS))
    assert corrected.digest == fresh.digest


@pytest.mark.parametrize(
    ("names", "message"), [(["sport"], "there is no expert 'sport'"), ([], "there are no proxies")]
)
def test_impossible_tunings_are_refused(world, proxies, tmp_path, names, message):
    with pytest.raises(FlexMoEError, match=message):
        tune(
            world / "model",
            dict.fromkeys(names, proxies["news"]),
            world / "public" / "data",
            tmp_path / "o",
            Tuning(**STEPS),
        )
    with pytest.raises(DataError, match="does not exist"):
        tune(world / "model", {"news": tmp_path / "none"}, world / "public" / "data", tmp_path / "o", Tuning(**STEPS))


@pytest.mark.parametrize("tuned", [3, [], {"with": "news"}, {"with": {"a": 1}}, {"with": [1]}, {"with": ["../news"]}])
def test_a_malformed_tuning_record_is_refused(world, tmp_path, tuned):
    package = shutil.copytree(world / "news" / "run" / "package", tmp_path / "news")
    reseal(package, lambda fields: fields["record"].update(tuned={"with": ["news", "public"]}))
    assert read_manifest(package).record.tuned_with == ("news", "public")
    reseal(package, lambda fields: fields["record"].update(tuned=tuned))
    with pytest.raises(FlexMoEError, match=r"record\.tuned"):
        read_manifest(package)
