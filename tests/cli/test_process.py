"""`flexmoe` as a process: streams that are closed or narrow, and users without a home directory."""

import os
import pathlib
import pwd
import shutil
import subprocess
import sys

import pytest

from flexmoe_jax import errors, files, progress
from tests.tiny import contents

FLEXMOE = f"{sys.executable} -m flexmoe_jax.cli.main"


def shell(command: str, **environment: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a line of bash; FLEXMOE is the command."""
    variables = {**os.environ, **environment, "FLEXMOE": FLEXMOE}
    done = subprocess.run(["bash", "-c", command], env=variables, capture_output=True, errors="replace", check=False)
    return done.returncode, done.stdout, done.stderr


def last_lines(err: str) -> list[str]:
    """The refusal: what was printed after the lines of progress. No library has printed a traceback before it."""
    assert "Traceback" not in err, err
    lines = err.splitlines()
    return lines[[line.startswith("flexmoe ") for line in lines].index(True) :]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["--help", "merge --help", "keys train"])
def test_a_reader_that_leaves_or_a_closed_stream_gives_no_traceback(arguments, unbuffered):
    environment = {"PYTHONUNBUFFERED": unbuffered}
    assert shell(f"$FLEXMOE {arguments} | true", **environment) == (0, "", "")
    assert shell(f"$FLEXMOE {arguments} >&-", **environment)[::2] == (0, "")
    assert shell(f"$FLEXMOE {arguments} >&- 2>&-", **environment) == (0, "", "")


def test_output_that_cannot_be_written_is_an_error():
    code, _, err = shell("$FLEXMOE keys train seed >/dev/full", PYTHONUNBUFFERED="")
    assert (code, err) == (1, "flexmoe: the output cannot be written: [Errno 28] No space left on device\n")


def test_a_message_does_not_end_in_stdout_where_stderr_is_closed():
    assert shell("$FLEXMOE mrege 2>&-") == (2, "", "")
    assert shell("$FLEXMOE inspect nowhere --json 2>&-") == (1, "", "")


def test_text_that_the_terminal_cannot_show_is_escaped(world):
    command = f"$FLEXMOE generate {world / 'model'} --prompt 'caf\u00e9 \u4e16' --max-new-tokens 1"
    code, out, err = shell(command, PYTHONIOENCODING="ascii")
    assert (code, out[:14]) == (0, "caf\\xe9 \\u4e16"), err


def test_progress_without_a_stderr_shows_nothing(monkeypatch, capsys):
    """Some hosts, such as web servers on Windows, have none."""
    monkeypatch.setattr(sys, "stderr", None)
    with progress.track("counting", 3) as advance:
        advance(3, "note")
    assert capsys.readouterr().out == ""


def test_the_library_logs_a_line_once_whatever_the_root_logger_does(world, tmp_path):
    """Libraries give the root logger a handler; ours is the one that prints."""
    code = (
        "import logging, sys; logging.basicConfig(); sys.argv = ['flexmoe', 'keys', 'train', 'seed']\n"
        "from flexmoe_jax.cli import main; main.entry(); logging.getLogger('flexmoe_jax.x').info('once')"
    )
    environment = {**os.environ, "GLIBC_TUNABLES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == "once\n"


# -- refused starts of a training --------------------------------------------------------------------------------------

REFUSED_STARTS = """
import sys, threading
import jax
from flexmoe_jax.cli.main import main
jax.devices()  # starts a timer, and cancels it
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join()
experiment, *starts = sys.argv[1:]
for start in starts:
    assert main(["train", f"--config={experiment}:news", *start.split()]) == 1, start
    assert threading.enumerate() == [threading.main_thread()], start
"""


def test_twenty_refused_starts_print_two_lines_each_and_leave_no_thread(world, tmp_path):
    """A thread that outlives the refusal prints its own errors when the process ends."""
    paths = {"data": world / "news" / "data", "public": world / "public" / "run" / "model"}
    paths |= {"domain_vector": world / "news" / "domain.json", "out": tmp_path / "run"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.jsonl").write_text("")
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "run.py").write_text(
        "from flexmoe_jax.experiment import run_config\n"
        "def get_config(arg):\n"
        f"    return run_config(owner=arg, steps=2, batch_size=2, seq_len=16, **{ {k: str(paths[k]) for k in paths} })"
    )
    wrong = ("seq_len=33", f"data={tmp_path / 'empty'}", f"data={tmp_path / 'short'}", "mesh=data=3", "mesh=x=1")
    starts = [f"--config.{change}" for change in wrong] * 4
    command = [sys.executable, "-c", REFUSED_STARTS, str(tmp_path / "run.py"), *starts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for said, count in (("flexmoe train: ", 20), ("  remedy: ", 20), ("Traceback", 0), ("ERROR", 0)):
        assert len([line for line in done.stderr.splitlines() if line.startswith(said)]) == count, done.stderr[-3000:]


def test_a_batch_that_the_devices_cannot_share_is_corrected_in_the_same_folder_as_its_remedy_says(world, tmp_path):
    (tmp_path / "run.py").write_text(
        "from flexmoe_jax.experiment import run_config\n"
        "def get_config(arg):\n"
        f"    return run_config(owner=arg, steps=1, batch_size=2, seq_len=16, public={str(world / 'model')!r},\n"
        f"        data={str(world / 'public' / 'data')!r}, out={str(tmp_path / 'run')!r})"
    )
    command = f"$FLEXMOE pretrain --config={tmp_path / 'run.py'}:public"
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    code, _, err = shell(command, **devices)
    assert (code, last_lines(err)[1]) == (1, "  remedy: choose a batch that is a multiple of 4")
    code, out, err = shell(f"{command} --config.batch_size=4", **devices)
    assert (code, out) == (0, f"{tmp_path / 'run' / 'model'}\n"), err


# -- disks and devices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("data tokenize {documents} --out {out}", "{out} could not be written: File too large"),
        ("optout {model} --expert news --out {out}", "{out} could not be written: File too large"),
        ("pretrain --config={experiment}:public --config.out={out}", "saving step 2 to {out} failed: File too large"),
    ],
)
def test_a_write_that_the_system_refuses_is_told_in_two_lines(world, tmp_path, command, what):
    """A limit on the size of files stands for a full disk: the system refuses the bytes of libraries, too."""
    (tmp_path / "run.py").write_text(
        "from flexmoe_jax.experiment import run_config\n"
        "def get_config(arg):\n"
        f"    return run_config(owner=arg, steps=2, batch_size=2, seq_len=16, public={str(world / 'model')!r},\n"
        f"        data={str(world / 'public' / 'data')!r})"
    )
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"text": "one two three four five six seven eight"}\n' * 4000)
    names = {"documents": documents, "model": world / "model", "out": tmp_path / "out"}
    names["experiment"] = tmp_path / "run.py"
    line = f"ulimit -f 24; $FLEXMOE {command.format(**names)}"
    code, _, err = shell(line, JAX_ENABLE_COMPILATION_CACHE="0")
    first, second = last_lines(err)
    assert (code, first.partition(": ")[2]) == (1, what.format(**names))
    assert second.startswith("  remedy: check free space and permissions")
    assert not list(tmp_path.glob(".out*"))


def test_a_run_directory_on_a_disk_that_is_read_only_is_refused(world, tmp_path):
    from flexmoe_jax.artifacts.checkpoints import RunCheckpoints

    with pytest.raises(errors.ArtifactError, match="the run directory /proc/run cannot be made") as refusal:
        RunCheckpoints("/proc/run")
    assert "give a config.out that you may write to" in refusal.value.remedy


@pytest.mark.parametrize("platforms", ["cuda", "tpu", "nothing"])
def test_devices_that_are_not_there_are_refused_with_the_way_to_the_doctor(world, platforms):
    command = f"$FLEXMOE generate {world / 'model'} --prompt the --max-new-tokens 1"
    code, _, err = shell(command, JAX_PLATFORMS=platforms)
    first, second = last_lines(err)
    assert code == 1
    assert first.startswith("flexmoe generate: JAX cannot use the devices of this machine (JAX_PLATFORMS is ")
    assert second == "  remedy: run `flexmoe doctor`, which says why; JAX_PLATFORMS=cpu uses the processor"
    code, out, _ = shell("$FLEXMOE doctor", JAX_PLATFORMS=platforms)
    assert f"JAX_PLATFORMS is '{platforms}', and JAX cannot use it here" in out
    assert shell(command, JAX_PLATFORMS="cpu")[0] == 0


def test_the_traceback_of_a_refusal_is_shown_on_request():
    code, _, err = shell("$FLEXMOE inspect nowhere", FLEXMOE_DEBUG="1")
    assert (code, err.splitlines()[0]) == (1, "Traceback (most recent call last):")
    assert err.endswith("relative paths start at " + os.getcwd() + "\n")


# -- the encoding of the locale ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latin(tmp_path_factory) -> dict[str, str]:
    """The environment of a process whose locale is ISO-8859-1."""
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not here")
    folder = tmp_path_factory.mktemp("locales")
    command = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / "de_DE.ISO-8859-1")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("the system has no description of the locale")
    variables = {"LOCPATH": str(folder), "LC_ALL": "de_DE.ISO-8859-1", "PYTHONUTF8": "0"}
    name = subprocess.run(
        [sys.executable, "-c", "import locale; print(locale.getpreferredencoding())"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert name.stdout == "ISO-8859-1\n"
    return variables


def test_the_locale_changes_no_byte_of_what_is_written(world, tmp_path, latin):
    """Records, documents and paths hold letters that ISO-8859-1 has, and others."""
    data = tmp_path / "größe"
    data.mkdir()
    (data / "a.jsonl").write_text('{"text": "Zoë of 東京 said: the river and the city"}\n' * 40, encoding="utf-8")
    (tmp_path / "run.py").write_text(
        "import pathlib\nfrom flexmoe_jax.experiment import run_config\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "def get_config(out):\n"
        "    return run_config(owner='news', steps=2, batch_size=2, seq_len=16, out=str(here / out),\n"
        "        data=str(next(here.glob('gr*'))), contact='Zoë, 東京 team', licence='©',\n"
        f"        public={str(world / 'public' / 'run' / 'model')!r},\n"
        f"        domain_vector={str(world / 'news' / 'domain.json')!r})\n",
        encoding="utf-8",
    )
    written = {}
    for name, environment in (("utf", {"LC_ALL": "C.UTF-8"}), ("latin", latin)):
        code, _, err = shell(f"$FLEXMOE train --config={tmp_path / 'run.py'}:{name}", **environment)
        assert code == 0, err
        written[name] = contents(tmp_path / name / "package") | contents(tmp_path / name / "tokens")
        code, out, err = shell(f"$FLEXMOE inspect {tmp_path / name / 'package'} --json", **environment)
        assert code == 0, err
        written[name]["inspect"] = out.replace(name, "")
    assert written["utf"] == written["latin"]


# -- no home directory -------------------------------------------------------------------------------------------------


@pytest.fixture
def homeless(monkeypatch, tmp_path) -> pathlib.Path:
    """The system's temporary directory of a user whom the system does not know."""

    def unknown(uid: int):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    for name in ("HOME", "FLEXMOE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_without_a_home_directory_the_cache_is_a_private_folder_in_the_temporary_one(homeless, monkeypatch):
    with pytest.raises(RuntimeError):
        pathlib.Path.home()
    cache = files.default_cache()
    assert cache == homeless / f"flexmoe-{os.getuid()}" == files.default_cache()
    assert cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", str(homeless / "nowhere"))  # as containers have it
    assert files.default_cache() == cache
    monkeypatch.setenv("HOME", str(homeless))
    assert files.default_cache() == homeless / ".cache" / "flexmoe"
    monkeypatch.setenv("FLEXMOE_CACHE", "mine")
    assert files.default_cache() == pathlib.Path("mine")


@pytest.mark.parametrize("kind", ["link", "file", "shared"])
def test_a_cache_that_somebody_else_could_write_is_refused(kind, homeless):
    folder = homeless / f"flexmoe-{os.getuid()}"
    if kind == "link":
        (homeless / "theirs").mkdir(mode=0o700)
        folder.symlink_to(homeless / "theirs")
    elif kind == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(errors.ArtifactError, match="is not a folder of this user only") as error:
        files.default_cache()
    assert "FLEXMOE_CACHE" in error.value.remedy
