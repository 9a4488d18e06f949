"""The command line: lazy, helpful, exit codes that can be relied on, nothing half-written."""

import errno
import json
import os
import subprocess
import sys

import jax
import pyarrow
import pytest

from flexmoe_jax.cli.main import VERBS, main
from tests.tiny import MODEL, write_documents


def test_help_imports_nothing_heavy():
    """What makes `flexmoe --help` answer at once, checked as a property and not by the clock."""
    code = "import sys; from flexmoe_jax.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "quickstart" in printed
    for heavy in ("'jax'", "'flax'", "'numpy'", "'orbax'", "'grain'", "'torch'", "'absl'", "'transformers'"):
        assert heavy not in printed


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_and_a_result_for_programs(verb, capsys):
    words = [verb, "build"] if verb == "data" else [verb]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    printed = capsys.readouterr().out
    assert f"example:\n  flexmoe {' '.join(words)}" in printed
    assert "--json" in printed


def test_help_names_every_verb_once_under_its_role(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == list(VERBS)
    assert len([line for line in lines if line.startswith("for ")]) == 6
    assert all(len(line) <= 110 for line in lines)


@pytest.mark.parametrize(
    ("verb", "meant"), [("mrege", "merge"), ("classify", "train-classifier"), ("proxies", "find-proxies")]
)
def test_a_misspelt_or_renamed_verb_gets_a_hint(verb, meant, capsys):
    assert main([verb]) == 2
    assert f"did you mean '{meant}'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--config=experiments/quickstart_expert.py:news", "--config.optimizer.lrr=1"], "optimizer.lr'?"),
        (["train", "--config=experiments/nothing.py"], "does not exist"),
        (["train", "--config=experiments/quickstart_public.py"], "use flexmoe pretrain"),
        (["pretrain", "--config=experiments/quickstart_public.py", "--config.steps=x"], "steps"),
        (["pretrain", "--config=experiments/quickstart_public.py", "--config.steps=0"], "config.steps is 0"),
        (["pretrain", "--config=experiments/olmo2_7b_public.py"], "config.data is not set"),
        (["train", "--config=experiments/quickstart_expert.py"], "config.owner is empty"),
        (["verify", "nowhere"], "nowhere does not exist"),
        (["inspect", "tests"], "manifest.json"),
        (["eval", "nowhere", "--data", "x"], "nowhere"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["embed", "nowhere", "--out", "domain.json"], "nowhere"),
        (["data", "info", "tests"], "mix.json"),
        (["data", "build", "--out", "x", "--domains", "public,nwes"], "did you mean 'news'"),
        (["data", "tokenize", "nowhere", "--out", "x"], "nowhere"),
        (["data", "tokenize", "tests", "--out", "x", "--tokenizer", "cl100k:12"], "12"),
    ],
)
def test_bad_input_is_refused_with_exit_code_1_and_a_remedy(argv, message, capsys, monkeypatch, request, tmp_path):
    root = request.config.rootpath
    argv = [part.replace("experiments/", f"{root}/experiments/") for part in argv]
    argv = [str(root / "tests") if part == "tests" else part for part in argv]
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "remedy:" in printed
    assert not list(tmp_path.iterdir())


def test_a_document_that_is_not_utf8_names_file_and_place(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_bytes(b"caf\xe9 au lait")
    assert main(["data", "tokenize", str(tmp_path / "data"), "--out", str(tmp_path / "store")]) == 1
    printed = capsys.readouterr().err
    assert "a.txt" in printed
    assert "UTF-8" in printed
    assert not (tmp_path / "store").exists()


def test_merge_inspect_verify_optout_by_command(world, tmp_path, capsys):
    release, out = world / "public" / "run" / "model", tmp_path / "model"
    experts = [part for owner in ("news", "code") for part in ("--package", str(world / owner / "run" / "package"))]
    assert main(["merge", "--public", str(release), *experts, "--out", str(out), "--top-k", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == ["public", "code", "news"]
    assert main(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert main(["inspect", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "top-2 of 3 experts" in printed
    assert "merged" in printed
    assert main(["optout", str(out), "--expert", "news"]) == 0
    assert not (out / "news").exists()
    assert main(["verify", str(out)]) == 0
    victim = next((out / "code" / "arrays").rglob("*.zarray"), None) or next(
        path for path in (out / "code" / "arrays").rglob("*") if path.is_file()
    )
    damaged = bytearray(victim.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    victim.write_bytes(damaged)
    capsys.readouterr()
    assert main(["verify", str(out)]) == 1
    assert victim.name in capsys.readouterr().err


def test_merge_refuses_and_leaves_nothing(world, tmp_path, capsys):
    release, package = str(world / "public" / "run" / "model"), str(world / "news" / "run" / "package")
    out = str(tmp_path / "model")
    for argv, message in (
        (["--package", package, "--package", package], "given twice"),
        (["--package", package, "--top-k", "3"], "top_k is 3, the model has 2 experts"),
        (["--package", release + "/public"], "reserved"),
    ):
        assert main(["merge", "--public", release, *argv, "--out", out]) == 1
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_eval_reports_every_folder_and_any_subset(world, capsys):
    folders = [part for domain in ("public", "news") for part in ("--data", str(world / domain / "data"))]
    command = ["eval", str(world / "model"), *folders, "--experts", "public,news", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["experts"] == ["public", "news"]
    assert set(result["domains"]) == {str(world / domain / "data") for domain in ("public", "news")}
    for score in result["domains"].values():
        assert score["documents"] == 6
        assert len(score["layers"]) == MODEL.num_layers


def test_generate_prints_prompt_and_continuation(world, capsys):
    command = ["generate", str(world / "model"), "--prompt", "the king", "--experts", "news", "--max-new-tokens", "4"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("the king")


def _raised(call) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("error", "what", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left", "out"), "[Errno 28] No space left: 'out'", "free some space"),
        (OSError(errno.EROFS, "Read-only", "out"), "[Errno 30] Read-only: 'out'", "choose a place that you may"),
        (ConnectionError("cannot reach the hub"), "cannot reach the hub", "check paths, permissions and the network"),
        (MemoryError(), "there is not enough memory: MemoryError", "use smaller batches"),
        (
            ValueError("RESOURCE_EXHAUSTED: Out of memory"),
            "there is not enough memory: RESOURCE",
            "use smaller batches",
        ),
        (_raised(lambda: pyarrow.array([1, "a"])), "pyarrow: Could not convert", "FLEXMOE_DEBUG=1"),
        (_raised(lambda: jax.devices("nothing")), "JAX cannot use the devices of this machine", "flexmoe doctor"),
    ],
)
def test_errors_of_the_system_and_of_libraries_are_refusals(error, what, remedy, capsys, monkeypatch):
    def fail(argv):
        raise error

    monkeypatch.setattr("flexmoe_jax.cli.keys.keys", fail)
    assert main(["keys"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"flexmoe keys: {what}")
    assert second.startswith("  remedy: ")
    assert remedy in second


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), TypeError("any"), ZeroDivisionError()])
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    def fail(argv):
        raise error

    monkeypatch.setattr("flexmoe_jax.cli.keys.keys", fail)
    with pytest.raises(type(error)):
        main(["keys"])


def _job(monkeypatch, number: int) -> None:
    for name, value in {"PROCESSES": "2", "PROCESS_ID": str(number), "COORDINATOR": "127.0.0.1:1"}.items():
        monkeypatch.setenv(f"FLEXMOE_{name}", value)


def test_what_is_not_for_many_processes_is_done_by_the_first_alone(world, capsys, monkeypatch):
    _job(monkeypatch, 1)
    assert main(["inspect", str(world / "model")]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", "flexmoe inspect: left to process 0\n")
    _job(monkeypatch, 0)
    assert main(["inspect", str(world / "model")]) == 0
    assert "news" in capsys.readouterr().out
    assert "FLEXMOE_PROCESSES" not in os.environ  # a training that the verb starts is one process too


def test_a_process_that_cannot_know_its_number_is_refused(world, capsys, monkeypatch):
    monkeypatch.setenv("FLEXMOE_PROCESSES", "auto")
    assert main(["inspect", str(world / "model")]) == 1
    assert "without FLEXMOE_PROCESSES" in capsys.readouterr().err


def test_training_by_command_and_sigterm_exit_code(world, tmp_path):
    """A real process, stopped by a real SIGTERM: exit code 75; the same command again finishes."""
    import signal
    import time

    write_documents(tmp_path / "data", "news")
    (tmp_path / "domain.json").write_text((world / "news" / "domain.json").read_text())
    config = tmp_path / "expert.py"
    config.write_text(
        "from flexmoe_jax.experiment import run_config\n"
        "def get_config(arg):\n"
        f"    return run_config(owner=arg, data={str(tmp_path / 'data')!r},\n"
        f"        public={str(world / 'public' / 'run' / 'model')!r},\n"
        f"        domain_vector={str(tmp_path / 'domain.json')!r}, out={str(tmp_path / 'run')!r}, steps=100000,\n"
        "        batch_size=2, seq_len=16, log_every=1)\n"
    )
    command = [sys.executable, "-m", "flexmoe_jax.cli.main", "train", f"--config={config}:news"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "stopped by SIGTERM after step" in errors
    again = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert again.stderr is not None
    seen = ""
    for line in again.stderr:
        seen += line
        if "resumed at step" in line:
            break
    again.kill()
    again.communicate()
    assert "resumed at step" in seen
