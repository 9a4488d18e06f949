"""`flexmoe VERB ...`: finds the verb's module, imports only that, and turns mendable errors into exit code 1."""

import contextlib
import hashlib
import importlib
import logging
import os
import pathlib
import platform
import sys

from flexmoe_jax.errors import ConfigError, FlexMoEError, did_you_mean

# verb: (module under flexmoe_jax.cli, what it does). The function is the verb's name with '_' for '-'.
VERBS = {
    "quickstart": ("quickstart", "everything on one machine: train, merge, evaluate, opt out, prove it"),
    "data": ("data", "build, inspect or tokenise documents"),
    "embed": ("data", "domain embedding of a folder of documents (the start of a router row)"),
    "pretrain": ("train", "train the public model"),
    "train": ("train", "train one owner's expert beside the frozen public model"),
    "merge": ("models", "join a public model and experts into one model"),
    "optout": ("models", "remove an expert from a model, exactly"),
    "replace": ("models", "put a new version of an expert in its place"),
    "classify": ("tune", "train an owner's classifier: which public documents look like mine?"),
    "proxies": ("tune", "choose those documents"),
    "tune": ("tune", "tune the router of a merged model on them"),
    "inspect": ("models", "show what a package or a model holds"),
    "verify": ("models", "check every digest of a package or a model"),
    "keygen": ("models", "make a key that signs packages"),
    "sign": ("models", "sign a package with its owner's key"),
    "import-hf": ("interchange", "take over an Olmo2, FlexOlmo or Llama checkpoint"),
    "import-gguf": ("interchange", "take over a GGUF file of the Llama architecture"),
    "export-hf": ("interchange", "write a checkpoint that transformers loads"),
    "eval": ("evaluate", "held-out bits per byte, the paper's task suites, lm-evaluation-harness"),
    "reproduce": ("reproduce", "the paper's comparison: baselines, ablations, seeds and intervals"),
    "report": ("reproduce", "a study as one HTML page"),
    "generate": ("generate", "continue a prompt"),
    "plan": ("plan", "what a run would take on chips that are not here, and whether it fits"),
    "doctor": ("doctor", "devices, versions, memory and processes of this machine, and the usual mistakes"),
}
# What all processes of a job do together; the rest is done by process 0 alone, as if there were no other.
TOGETHER = {"pretrain", "train", "doctor"}
EXIT_REFUSED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns 0, 1 (refused, with reason and remedy), 2 (usage), 75 (stopped by SIGTERM, saved), 130."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else EXIT_USAGE
    if argv[0] == "--version":
        from flexmoe_jax import __version__

        print(f"flexmoe {__version__}")
        return 0
    use_compilation_cache()
    _log_to_stderr()
    verb, *rest = argv
    if verb not in VERBS:
        print(f"flexmoe: unknown verb {verb!r}: {did_you_mean(verb, VERBS)}", file=sys.stderr)
        return EXIT_USAGE
    try:
        if "FLEXMOE_PROCESSES" in os.environ and not _together(verb, rest) and not _leads(verb):
            print(f"flexmoe {verb}: left to process 0", file=sys.stderr)
            return 0
        module = importlib.import_module(f"flexmoe_jax.cli.{VERBS[verb][0]}")
        return getattr(module, verb.replace("-", "_"))(rest) or 0
    except FlexMoEError as error:
        print(f"flexmoe {verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"flexmoe {verb}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_REFUSED


def _together(verb: str, arguments: list[str]) -> bool:
    return verb in TOGETHER or (verb == "eval" and any(a.partition("=")[0] == "--data" for a in arguments))


def _leads(verb: str) -> bool:
    """Whether this process does alone what is not for many; it then forgets that there are others."""
    from flexmoe_jax.parallel.processes import place_of

    place = place_of(os.environ)
    if place is None:
        raise ConfigError(
            f"FLEXMOE_PROCESSES is {os.environ['FLEXMOE_PROCESSES']!r}, and nothing says which process is the first",
            f"run flexmoe {verb} by one process, without FLEXMOE_PROCESSES",
        )
    del os.environ["FLEXMOE_PROCESSES"]
    return place.number == 0


def _log_to_stderr() -> None:
    """What the library logs goes to stderr, a line each."""
    logger = logging.getLogger("flexmoe_jax")
    if not logger.handlers:
        logger.addHandler(_Stderr())
    logger.setLevel(logging.INFO)


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes in $FLEXMOE_CACHE/compiled; JAX_ENABLE_COMPILATION_CACHE=0 does not.

    A folder for each kind of processor: a program compiled for one may not run on another that shares the disk. Only
    programs are kept, never data. Takes effect on the import of JAX; whoever sets JAX's own variables decides instead.
    """
    from flexmoe_jax.files import default_cache

    folder = default_cache() / "compiled" / _processor()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _processor() -> str:
    """A short name of what programs compiled here may use: architecture and instruction sets."""
    flags = platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        flags += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return hashlib.sha256(flags.encode()).hexdigest()[:12]


def entry() -> int:
    """The console script: `main` in a process whose large arrays lie on huge pages.

    glibc reads that setting only as a process begins, so the process begins again with it. Fresh pages are a large
    part of a training step's time on a CPU (BUILD.md). Whoever sets GLIBC_TUNABLES decides instead.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and sys.argv[1:2] != ["--help"]:
        environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    return main()


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {text}" for verb, (_, text) in VERBS.items())
    return (
        "usage: flexmoe VERB ...\n\n"
        "Language models whose parts belong to different data owners.\n\n"
        f"{verbs}\n\n"
        "flexmoe VERB --help shows a verb's arguments with an example. Exit codes: 0 done, 1 refused (with the reason\n"
        "and a remedy), 2 usage, 75 stopped by SIGTERM with the state saved (run again to go on)."
    )


if __name__ == "__main__":
    sys.exit(entry())
