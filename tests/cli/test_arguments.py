"""Arguments: unknown options get a hint, paths are checked before anything starts, wrong usage exits with 2."""

import shutil

import pytest

from flexmoe_jax.cli.main import main

PUBLIC = "--config=experiments/quickstart_public.py"


@pytest.fixture
def experiments(request, tmp_path):
    """A folder with the experiment files and the files that quickstart_public.py names."""
    folder = tmp_path / "here"
    shutil.copytree(request.config.rootpath / "experiments", folder)
    (folder / "data").mkdir()
    (folder / "domain.json").write_text("{}")
    return folder


def usage_error(argv: list[str], capsys) -> str:
    """What a command that is used wrongly prints on stderr."""
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["merge", "--trusted-keys", "x"], "unknown option --trusted-keys: did you mean '--trusted'?"),
        (["merge", "--expert", "x", "--out", "y"], "unknown option --expert: did you mean '--package'?"),
        (["replace", "model", "--expert=x"], "unknown option --expert: did you mean '--package'?"),
        (["generate", "model", "--expert", "news"], "unknown option --expert: did you mean '--experts'?"),
        (["generate", "model", "-experts", "news"], "unknown option -experts: did you mean '--experts'?"),
        (["eval", "model", "--limit", "3", "--suite", "mc9"], "did you mean 'flexmoe eval-suite MODEL --tasks'?"),
        (["eval", "model", "--tasks", "gsm8k"], "did you mean 'flexmoe eval-harness MODEL --tasks'?"),
        (["eval", "--list-suites"], "did you mean 'flexmoe eval-suite --list'?"),
        (["data", "build", "--domain", "news"], "unknown option --domain: did you mean '--domains'?"),
        (["optout", "model", "--exprt", "news"], "unknown option --exprt: did you mean '--expert'?"),
        (["train", "--allw=x"], "unknown option --allw: did you mean '--allow'?"),
        (["pretrain", PUBLIC, "--steps=5"], "unknown option --steps: did you mean '--config.steps'?"),
        (["pretrain", PUBLIC, "--lr=5"], "unknown option --lr: did you mean '--config.optimizer.lr'?"),
        (["verify", "x", "--nothing-like-it"], "choose one of: --certificate, --help, --json, --quick"),
    ],
)
def test_an_unknown_option_gets_a_hint_before_a_missing_one_is_asked_for(argv, message, capsys):
    printed = usage_error(argv, capsys)
    assert message in printed
    assert "required" not in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["merge", "--public", "."], "the following arguments are required: --package, --out"),
        (["pretrain"], "the following arguments are required: --config"),
        (["pretrain", PUBLIC, "extra"], "unrecognized arguments: extra"),
        (["pretrain", PUBLIC, PUBLIC], "--config is given more than once"),
        (["pretrain", PUBLIC, "--config.steps", "5"], "--config.steps has no value: write --config.steps=VALUE"),
        (["eval", "."], "the following arguments are required: --data"),
        (["eval-suite", "."], "give a model and --tasks, or --list"),
        (["data", "biuld"], "choose from"),
        (["keys", "merge"], "choose from"),
    ],
)
def test_wrong_usage_exits_with_2(argv, message, capsys):
    assert message in usage_error(argv, capsys)


def test_a_value_that_looks_like_an_option_is_a_value_where_it_has_spaces(world, capsys):
    assert main(["generate", str(world / "model"), "--prompt", "--the king", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("--the king")


# {verb: a command whose paths are all given}; each path that must exist is taken away in turn.
PATHS = {
    "merge": ["merge", "--public", "{}", "--package", "{}", "--trusted", "{}", "--out", "new"],
    "merge --heldout": ["merge", "--public", "{}", "--package", "{}", "--heldout", "news={}", "--out", "new"],
    "optout": ["optout", "{}", "--expert", "news"],
    "replace": ["replace", "{}", "--package", "{}", "--trusted", "{}"],
    "inspect": ["inspect", "{}"],
    "verify": ["verify", "{}", "--certificate", "{}", "--trusted", "{}"],
    "sign": ["sign", "{}", "--key", "{}", "--version", "1"],
    "data info": ["data", "info", "{}"],
    "data tokenize": ["data", "tokenize", "{}", "--out", "new"],
    "embed": ["embed", "{}", "--out", "new"],
    "train-classifier": ["train-classifier", "{}", "--public-data", "{}", "--out", "new"],
    "find-proxies": ["find-proxies", "{}", "--classifier", "news={}", "--out", "new"],
    "tune": ["tune", "{}", "--proxies", "{}", "--public-data", "{}", "--out", "new"],
    "import-hf": ["import-hf", "{}", "--public", "{}", "--domain", "{}", "--out", "new"],
    "import-gguf": ["import-gguf", "{}", "--domain", "{}", "--out", "new"],
    "export-gguf": ["export-gguf", "{}", "--out", "new"],
    "export-hf": ["export-hf", "{}", "--data", "{}", "--evaluation", "{}", "--out", "new"],
    "eval": ["eval", "{}", "--data", "{}"],
    "eval-joining": ["eval-joining", "{}", "--heldout", "news={}"],
    "eval-suite": ["eval-suite", "{}", "--tasks", "mc9"],
    "eval-harness": ["eval-harness", "{}", "--tasks", "gsm8k", "--include", "{}"],
    "attack-extract": ["attack-extract", "{}", "--data", "{}", "--control", "{}"],
    "attack-membership": ["attack-membership", "{}", "--members", "{}", "--others", "{}"],
    "generate": ["generate", "{}", "--prompt", "x"],
    "report": ["report", "{}"],
}


def commands(value: str):
    """(command, its option or argument) with one path of a verb `value`, the others a folder that exists."""
    for verb, words in PATHS.items():
        for place in (i for i, word in enumerate(words) if "{}" in word):
            yield pytest.param(
                [w.format(value if i == place else ".") for i, w in enumerate(words)], id=f"{verb} {place}"
            )


@pytest.mark.parametrize("argv", list(commands("nowhere")))
def test_a_path_that_does_not_exist_is_said_to_not_exist(argv, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    printed = capsys.readouterr().err
    assert f"flexmoe {argv[0]}: nowhere does not exist\n  remedy: " in printed
    assert f"relative paths start at {tmp_path}" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv",
    [
        *commands("gs://bucket/x"),
        ["merge", "--public", ".", "--package", ".", "--out", "s3://bucket/x"],
        ["embed", ".", "--out", "gs://bucket/x"],
        ["keygen", "gs://bucket/key", "--owner", "news"],
        ["quickstart", "--out", "gs://bucket/x"],
        ["pretrain", "--config=gs://bucket/x.py"],
        ["pretrain", "--config=quickstart_public.py", "--config.out=gs://bucket/x"],
        ["reproduce", "--config=reproduction.py:tiny", "--config.out=gs://bucket/x"],
    ],
)
def test_a_path_on_another_machine_is_refused(argv, capsys, monkeypatch, tmp_path, experiments):
    monkeypatch.chdir(experiments)
    assert main(argv) == 1
    printed = capsys.readouterr().err
    assert "only paths on this machine are read and written" in printed
    assert "mount it as a folder" in printed


@pytest.mark.parametrize(
    "argv",
    [
        ["merge", "--public=~/release"],
        ["embed", ".", "--out=~/x"],
        ["pretrain", "--config=quickstart_public.py", "--config.out=~/x"],
    ],
)
def test_a_home_directory_that_the_shell_did_not_expand_is_refused(argv, capsys, monkeypatch, experiments):
    monkeypatch.chdir(experiments)
    assert main(argv) == 1
    assert 'write "$HOME" in its place' in capsys.readouterr().err


def test_an_empty_path_is_refused(capsys):
    assert main(["merge", "--public", ""]) == 1
    assert "--public is empty" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["data", "domain_vector", "public_data"])
def test_a_path_of_the_configuration_that_does_not_exist_is_said_to_not_exist(key, capsys, monkeypatch, experiments):
    monkeypatch.chdir(experiments)
    given = {"data": "data", "domain_vector": "data", "public_data": "data", key: "nowhere"}
    overrides = [f"--config.{name}={value}" for name, value in given.items()]
    assert main(["pretrain", "--config=quickstart_public.py", "--config.public_fraction=0.25", *overrides]) == 1
    printed = capsys.readouterr().err
    assert "nowhere does not exist" in printed
    assert f"config.{key}: " in printed
