"""Several processes make everything of a study once, and one that waits for another goes on with what is free."""

import contextlib
import logging
import pathlib
import subprocess
import sys

import pytest

from flexmoe_jax.errors import BusyError
from flexmoe_jax.files import lock_directory
from flexmoe_jax.study import sharing
from flexmoe_jax.study.sharing import every, once, until_free

WORKER = """
import functools, os, pathlib, sys, time
from flexmoe_jax.study import sharing

root, name, other = pathlib.Path(sys.argv[1]), *sys.argv[2:]
sharing.PAUSE = 0.01

def make(path):
    with open(root / "made", "a") as made:
        made.write(f"{path.name} {name}\\n")
    time.sleep(0.05)
    path.write_text(name)

(root / f"{name} is here").touch()
while not (root / f"{other} is here").exists():
    time.sleep(0.001)
paths = [root / "products" / str(n) for n in range(20)]
sharing.until_free(lambda: sharing.every(functools.partial(sharing.once, path, make) for path in paths))
assert all(path.exists() for path in paths)
"""


def test_two_processes_make_everything_once_between_them(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    workers = [subprocess.Popen([*command, *names]) for names in (("a", "b"), ("b", "a"))]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    lines = (tmp_path / "made").read_text().splitlines()
    made = dict(line.split() for line in lines)
    assert len(lines) == len(made) == 20
    assert {*made.values()} == {"a", "b"}


def busy():
    raise BusyError("x is in use")


def test_what_is_busy_does_not_keep_the_next_from_being_done(tmp_path):
    done: list[str] = []
    scores: dict[str, float] = {}
    with pytest.raises(BusyError, match="x is in use"):
        every([busy, lambda: done.append("next"), lambda: scores["of what is busy"], lambda: done.append("last")])
    assert done == ["next", "last"]
    with pytest.raises(KeyError):  # a mistake, where nothing is busy
        every([lambda: scores["unknown"]])
    assert every([lambda: 1, lambda: 2]) == [1, 2]


def test_what_another_process_is_making_or_has_just_made_is_not_made_again(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "product"

    def make(path: pathlib.Path) -> None:
        with pytest.raises(BusyError, match="is in use by process"):
            once(path, lambda path: pytest.fail("made while another makes it"))
        path.touch()

    once(path, make)
    once(path, lambda path: pytest.fail("made again"))

    @contextlib.contextmanager
    def late(folder, name):
        (folder / "other").touch()  # the other process finished after the first look, and let go of the lock
        yield True

    monkeypatch.setattr(sharing, "lock_directory", late)
    once(tmp_path / "folder" / "other", lambda path: pytest.fail("made after another made it"))


def test_a_process_that_waits_says_for_what_and_goes_on(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "flexmoe_jax.study")
    monkeypatch.setattr(sharing, "PAUSE", 0.0)
    answers = iter([busy, busy, lambda: "done"])
    assert until_free(lambda: next(answers)()) == "done"
    assert caplog.messages == ["waiting: x is in use"]


def test_a_lock_that_waits_is_held_after_the_other_and_not_beside_it(tmp_path):
    code = "import sys, pathlib, time\nfrom flexmoe_jax.files import lock_directory\nroot = pathlib.Path(sys.argv[1])\n"
    code += "print('waits', flush=True)\nwith lock_directory(root, '.lock', wait=True):\n  (root / 'held').touch()"
    with lock_directory(tmp_path, ".lock"):
        waiter = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert waiter.stdout is not None
        assert waiter.stdout.readline() == "waits\n"
        with pytest.raises(subprocess.TimeoutExpired):
            waiter.wait(0.3)
        assert not (tmp_path / "held").exists()
    assert waiter.wait(30) == 0
    assert (tmp_path / "held").exists()
