"""Short forms of `make test-faults`: the same faults, injected fewer times."""

import pytest

from tests.artifacts.test_checkpoints import start
from tests.faults import kills, optouts, tamper
from tests.faults.__main__ import saved_run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return kills.home(tmp_path_factory.mktemp("home"))


def check(faults, number, *, detected=True):
    """`number` faults were injected, all were survived, and (with `detected`) all were named."""
    faults = list(faults)
    assert len(faults) == number
    assert [f.what for f in faults if not f.survived] == []
    assert [f.what for f in faults if detected and not f.detected] == []


def test_a_change_killed_at_any_moment_shows_the_model_before_or_after_and_can_be_finished(home, tmp_path):
    check(kills.kill_changes(home, tmp_path, 9, seed=1), 9, detected=False)


def test_a_save_killed_at_any_moment_loses_no_step_reported_as_saved(tmp_path):
    check(kills.kill_saves(tmp_path / "run", 1, seed=1), 1, detected=False)


def test_a_merge_onto_a_full_disk_is_an_error_and_leaves_nothing(home, tmp_path):
    try:
        with kills.small_disk(tmp_path / "disk", "2m") as disk:
            check(kills.full_disk_changes(home, disk, 3), 3)
    except OSError as error:
        pytest.skip(str(error))


def test_tampering_is_named_and_damaged_files_are_never_used(home, tmp_path):
    things = {"package": home / "news", "model": home / "all", "run": saved_run(tmp_path / "run")}
    (tmp_path / "copies").mkdir()
    check(tamper.tamper(things, start(), tmp_path / "copies", 21, seed=1), 21)


def test_opt_outs_in_any_order_are_byte_identical_to_a_merge_without_the_experts(tmp_path):
    check(optouts.every_order(tmp_path, (("news",), ("code", "law", "news"))), 7)


def test_the_memory_of_a_merge_does_not_grow_with_the_experts_and_links_share_their_bytes(tmp_path):
    """Experts of 24 MiB in processes limited to 48 MiB more than they start with; so are exports. For times see
    `make test-faults`.
    """
    pytest.importorskip("huggingface_hub")  # the card of an export
    rows = [row for row in optouts.merge_at_size(tmp_path, 24, (1, 3)) if row["how"] != "export"]
    assert [row["shared"] for row in rows] == [False, False, True, True]
    assert rows[1]["peak"] - rows[0]["peak"] < 12 << 20
