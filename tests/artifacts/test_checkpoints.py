"""Run checkpoints restore every bit, skip damaged steps, and report failed saves."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax.artifacts.checkpoints import RunCheckpoints, verify_run
from flexmoe_jax.artifacts.sealed import write_sealed
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import list_files
from tests.tiny import flip_bit, random_part

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 100), b1=0.9, b2=0.95),
)


def start():
    trainable = jax.tree.map(jnp.asarray, {"experts": {"news": random_part("news", 0)}})
    trainable["experts"]["news"]["bias"] = trainable["experts"]["news"]["bias"].astype(jnp.bfloat16)
    return trainable, OPTIMIZER.init(trainable)


@jax.jit
def gradients(trainable):
    return jax.grad(lambda t: sum((leaf.astype(jnp.float32) ** 4).sum() for leaf in jax.tree.leaves(t)))(trainable)


@jax.jit
def update(grads, opt_state, trainable):
    updates, opt_state = OPTIMIZER.update(grads, opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state


def advance(state, steps=1):
    for _ in range(steps):
        state = update(gradients(state[0]), state[1], state[0])
    return state


def bits(tree):
    return jax.tree.structure(tree), [
        (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)
    ]


def save(checkpoints, step, state):
    checkpoints.save(step, *state, {"next_index": step}, {"step": step, "frozen": "ab" * 32})


@pytest.fixture
def saved(tmp_path):
    """A run with steps 1, 2 and 3 saved (2 and 3 are kept), and the states of all steps."""
    states = {0: start()}
    with RunCheckpoints(tmp_path / "run", keep=2) as checkpoints:
        for step in (1, 2, 3):
            states[step] = advance(states[step - 1])
            save(checkpoints, step, states[step])
    return tmp_path / "run", states


def test_a_restored_state_and_the_steps_after_it_are_bit_identical(saved):
    path, states = saved
    with RunCheckpoints(path) as checkpoints:
        assert checkpoints.latest() == 3
        for like in (states[0], jax.eval_shape(start)):
            restored = checkpoints.restore(*like)
            assert (restored.step, restored.skipped) == (3, ())
            assert (restored.data_state, restored.meta) == ({"next_index": 3}, {"step": 3, "frozen": "ab" * 32})
            state = restored.trainable, restored.opt_state
            assert bits(state) == bits(states[3])
            assert bits(advance(state, 2)) == bits(advance(states[3], 2))
        assert bits(checkpoints.restore(*states[0], step=2).trainable) == bits(states[2][0])


def test_an_empty_run_has_nothing_to_restore(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.restore(*start()) is None


def test_only_the_newest_steps_and_their_digests_are_kept(saved):
    path, _ = saved
    assert {p.name for p in (path / "checkpoints").iterdir()} == {"2", "3"}
    assert {p.name for p in (path / "digests").iterdir()} == {"2.json", "3.json"}


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    scribble = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 + 7, tree), donate_argnums=0)
    state = advance(start(), 3)
    expected = bits(state)
    with RunCheckpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state)
        scribble(state)
        restored = checkpoints.restore(*start())
    assert bits((restored.trainable, restored.opt_state)) == expected


def test_a_flipped_bit_in_any_file_of_the_newest_step_falls_back_to_the_step_before(saved, tmp_path):
    path, states = saved
    for number, name in enumerate(list_files(path / "checkpoints/3")[0]):
        run = shutil.copytree(path, tmp_path / str(number))
        file = run / "checkpoints/3" / name
        flip_bit(file, file.stat().st_size // 2)
        with RunCheckpoints(run) as checkpoints:
            restored = checkpoints.restore(*states[0])
            ((step, reason),) = restored.skipped
            assert (restored.step, step, checkpoints.latest()) == (2, 3, 2)
            assert name in reason
            assert (restored.data_state, bits((restored.trainable, restored.opt_state))) == (
                {"next_index": 2},
                bits(states[2]),
            )
            assert (run / "damaged/3" / name).exists()


def test_a_run_saves_again_the_step_that_was_damaged(saved):
    path, states = saved
    with RunCheckpoints(path) as checkpoints:
        for _ in range(2):
            flip_bit(path / "checkpoints/3/meta/metadata", 0)
            assert checkpoints.restore(*states[0]).step == 2
            save(checkpoints, 3, states[3])
            assert checkpoints.restore(*states[0]).step == 3


@pytest.mark.parametrize("damage", ["missing", "extra", "swapped", "no digests", "digests altered"])
def test_missing_extra_and_swapped_files_fall_back_too(saved, damage):
    path, states = saved
    newest, digests = path / "checkpoints/3", path / "digests/3.json"
    if damage == "missing":
        (newest / "trainable/manifest.ocdbt").unlink()
    elif damage == "extra":
        (newest / "trainable/extra").touch()
    elif damage == "swapped":
        (path / "checkpoints/2/trainable").rename(path / "t")
        (newest / "trainable").rename(path / "checkpoints/2/trainable")
        (path / "t").rename(newest / "trainable")
    elif damage == "no digests":
        digests.unlink()
    else:
        flip_bit(digests, 40)
    with RunCheckpoints(path) as checkpoints:
        if damage == "swapped":
            with pytest.raises(ArtifactError, match=r"(?s)no checkpoint .* step 3: .* step 2: "):
                checkpoints.restore(*states[0])
        else:
            restored = checkpoints.restore(*states[0])
            assert (restored.step, [step for step, _ in restored.skipped]) == (2, [3])


def test_another_model_or_optimizer_is_refused(saved):
    path, (trainable, state) = saved[0], start()
    wider = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape[:-1], leaf.shape[-1] + 1), leaf.dtype), trainable)
    with RunCheckpoints(path) as checkpoints:
        for like in ((wider, state), ({"other": jnp.zeros(3)}, state), (trainable, optax.sgd(1.0).init(trainable))):
            with pytest.raises(ArtifactError, match="does not fit"):
                checkpoints.restore(*like)


FULL_DISK = """
import resource, sys
from flexmoe_jax.artifacts.checkpoints import RunCheckpoints
from flexmoe_jax.errors import ArtifactError
from tests.artifacts.test_checkpoints import advance, save, start
with RunCheckpoints(sys.argv[1]) as checkpoints:
    save(checkpoints, 1, advance(start()))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
    save(checkpoints, 2, start())
    checkpoints.wait()
    sys.stdout.write("saved")
"""


def test_a_full_disk_is_an_error_and_the_last_good_step_stays(tmp_path):
    """Writing a file over 300 bytes fails; in another process, since Orbax's threads outlive the error."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert f"ArtifactError: saving step 2 to {tmp_path} failed" in done.stderr
    assert "File too large" in done.stderr
    assert done.stdout == ""
    with RunCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        restored = checkpoints.restore(*start())
        assert (restored.step, restored.skipped) == (1, ())
        assert bits((restored.trainable, restored.opt_state)) == bits(advance(start()))
        save(checkpoints, 2, start())
        assert checkpoints.latest() == 2


@pytest.mark.parametrize("then", ["wait", "latest", "save", "restore", "nothing"])
def test_the_error_of_a_save_is_raised_by_the_next_call(tmp_path, monkeypatch, then):
    def run():
        with RunCheckpoints(tmp_path) as checkpoints:
            finish = checkpoints._manager.wait_until_finished

            def fail():
                finish()
                raise OSError("full")

            monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
            save(checkpoints, 1, start())
            {
                "wait": checkpoints.wait,
                "latest": checkpoints.latest,
                "save": lambda: save(checkpoints, 2, start()),
                "restore": lambda: checkpoints.restore(*start()),
                "nothing": lambda: None,
            }[then]()

    with pytest.raises(ArtifactError, match=r"saving step 1 to .* failed: full"):
        run()
    assert not (tmp_path / "digests/1.json").exists()


def test_a_save_whose_digests_cannot_be_written_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr("flexmoe_jax.artifacts.checkpoints.write_sealed", fail)
    checkpoints = RunCheckpoints(tmp_path)
    save(checkpoints, 1, start())
    with pytest.raises(ArtifactError, match=r"saving step 1 to .* failed: full"):
        checkpoints.__exit__(None, None, None)

    def run():
        with RunCheckpoints(tmp_path) as checkpoints:
            save(checkpoints, 2, start())
            raise ZeroDivisionError  # the first error is shown

    with pytest.raises(ZeroDivisionError):
        run()


def test_a_second_process_on_a_run_is_refused_with_the_number_of_the_first(tmp_path):
    code = "import sys, pathlib\nfrom flexmoe_jax.files import lock_directory\n"
    code += "with lock_directory(pathlib.Path(sys.argv[1]), '.lock'):\n  print('held', flush=True)\n  sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match=f"{tmp_path} is in use by process {other.pid}"):
            RunCheckpoints(tmp_path)
        other.stdin.close()
        other.wait()
    with RunCheckpoints(tmp_path), pytest.raises(ArtifactError, match="in use by process"):
        RunCheckpoints(tmp_path)
    with RunCheckpoints(tmp_path):
        pass


def test_verify_names_every_damaged_file_of_a_run(saved, tmp_path):
    path, _ = saved
    assert {f.ok for f in verify_run(path)} == {True}
    names = list_files(path / "checkpoints")[0]
    assert {f.subject for f in verify_run(path)} == {f"checkpoints/{name}" for name in names}
    for name in names:
        file = path / "checkpoints" / name
        good = file.read_bytes()
        flip_bit(file, len(good) // 2)
        assert [f.subject for f in verify_run(path) if not f.ok] == [f"checkpoints/{name}"]
        assert all(f.ok for f in verify_run(path, quick=True))
        file.write_bytes(good[:-1])
        assert [f.subject for f in verify_run(path, quick=True) if not f.ok] == [f"checkpoints/{name}"]
        file.write_bytes(good)
    flip_bit(path / "digests/3.json", 40)
    shutil.rmtree(path / "checkpoints/2")
    (path / "checkpoints/4.orbax-checkpoint-tmp").mkdir()
    bad = {f.subject for f in verify_run(path) if not f.ok}
    assert bad == {"checkpoints/3/digests", "digests/2.json", "checkpoints/4.orbax-checkpoint-tmp"}


@pytest.mark.parametrize("place", ["checkpoints", "digests", "damaged", "checkpoints/1", "digests/1.json", "damaged/1"])
def test_a_run_with_links_is_refused_and_nothing_behind_them_changes(tmp_path, place):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "settings.json").write_text("{}")
    link = tmp_path / "run" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    with pytest.raises(ArtifactError, match=f"{place} is a link"), RunCheckpoints(tmp_path / "run") as checkpoints:
        save(checkpoints, 2, start())
    assert [path.name for path in victim.iterdir()] == ["settings.json"]
    assert [path.name for path in (tmp_path / "run").rglob("*") if path != link and path != link.parent] == []


@pytest.mark.parametrize("kind", ["hard link", "pipe"])
def test_a_lock_file_that_is_not_the_runs_own_is_refused(tmp_path, kind):
    (tmp_path / "important").write_text("mine")
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / ".lock"
    os.link(tmp_path / "important", lock) if kind == "hard link" else os.mkfifo(lock)
    with pytest.raises(ArtifactError, match=r"\.lock is a special file or has other hard links") as refusal:
        RunCheckpoints(tmp_path / "run")
    assert (tmp_path / "important").read_text() == "mine"
    assert "delete it" in refusal.value.remedy
    lock.unlink()
    with RunCheckpoints(tmp_path / "run"):
        pass


def test_what_is_not_a_step_or_not_its_digests_fails_its_check(saved):
    path, _ = saved
    for row in (3, None, {}, {"size": "3", "sha256": "0" * 64}, {"size": 3, "sha256": ["x"]}):
        write_sealed(path / "digests/3.json", {"step": 3, "files": {"x": row}})
        for quick in (False, True):
            bad = [check for check in verify_run(path, quick=quick) if not check.ok]
            assert [check.subject for check in bad] == ["checkpoints/3/digests"]
    shutil.rmtree(path / "digests")
    for name in ("007", "5", "٣"):
        (path / "checkpoints" / name).touch()
    assert not any(check.ok for check in verify_run(path))
    shutil.rmtree(path / "checkpoints")
    (path / "checkpoints").mkdir()
    assert [check.ok for check in verify_run(path)] == [False]


def test_a_first_save_that_was_interrupted_before_its_digests_is_set_aside(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, start())
    (tmp_path / "digests/1.json").unlink()
    with RunCheckpoints(tmp_path) as checkpoints:
        assert not checkpoints.started
        assert checkpoints.restore(*start()) is None
        save(checkpoints, 1, start())
        assert checkpoints.restore(*start()).step == 1
    assert (tmp_path / "damaged/1").is_dir()


def test_leftovers_of_interrupted_saves_are_removed(tmp_path):
    leftover = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    with RunCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(*start()) is None
    assert not leftover.exists()


def test_an_interrupted_block_does_not_wait_for_its_save(tmp_path, monkeypatch):
    """A second Ctrl-C ends at once; the directory can be used again."""
    halt = threading.Event()
    monkeypatch.setattr(RunCheckpoints, "_commit", lambda self, step: halt.wait())
    with contextlib.suppress(KeyboardInterrupt), RunCheckpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, start())
        raise KeyboardInterrupt
    with RunCheckpoints(tmp_path):
        halt.set()
    checkpoints._manager.close()
