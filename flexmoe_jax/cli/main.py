"""`flexmoe VERB ...`: finds the verb's module, imports only that, and turns FlexMoEErrors into exit codes."""

import contextlib
import errno
import hashlib
import importlib
import logging
import os
import pathlib
import platform
import re
import sys
import traceback

from flexmoe_jax.errors import LINE_ENDS, ArtifactError, ConfigError, FlexMoEError, MachineError, printable

# Who runs what: {role: {verb: (module under flexmoe_jax.cli, what the verb does)}}.
# The function is the verb's name with '_' for '-'.
ROLES = {
    "everybody": {
        "quickstart": ("quickstart", "do everything once on one machine: train, merge, evaluate, opt out, prove it"),
        "generate": ("generate", "continue a prompt"),
        "keys": ("keys", "explain the keys of a configuration"),
        "doctor": ("doctor", "check this machine: devices, versions, memory, processes, common mistakes"),
    },
    "a public trainer": {
        "data": ("data", "build or check the example data, tokenize documents"),
        "pretrain": ("train", "train a public model, or all experts of a model together"),
    },
    "a data owner (embed and sign: a public trainer too)": {
        "embed": ("data", "compute the domain embedding of documents, which a router row starts from"),
        "lr-find": ("train", "compare learning rates in short runs"),
        "train": ("train", "train an expert beside the frozen public model"),
        "train-classifier": ("tune", "train a classifier that finds public documents like the owner's"),
        "compress": ("convert", "make an expert's package smaller, and measure what that costs"),
        "rebase": ("convert", "carry an expert over to a public model that was trained further"),
        "keygen": ("models", "make a key that signs packages"),
        "sign": ("models", "sign a package or a public release"),
    },
    "a coordinator (eval-joining: a data owner too)": {
        "merge": ("models", "merge a public model and experts into one model, without training"),
        "optout": ("models", "remove an expert from a model, exactly"),
        "replace": ("models", "replace an expert by a new version"),
        "eval": ("evaluate", "measure bits per byte on held-out documents"),
        "eval-joining": ("joining", "measure what joining gives or costs an owner"),
        "eval-suite": ("evaluate", "score the paper's tasks"),
        "eval-harness": ("evaluate", "score tasks of lm-evaluation-harness"),
        "find-proxies": ("tune", "choose public documents like the owners', with their classifiers"),
        "tune": ("tune", "tune the router of a merged model on such documents"),
        "import-hf": ("interchange", "import a checkpoint of transformers"),
        "import-gguf": ("interchange", "import a GGUF file of the Llama architecture"),
        "export-hf": ("interchange", "export a checkpoint that transformers loads"),
        "export-gguf": ("interchange", "export a file that llama.cpp runs"),
    },
    "an auditor (verify: a coordinator too)": {
        "inspect": ("models", "show what a package or a model holds"),
        "verify": ("models", "check every digest and signature of a package, a model or a run"),
        "attack-extract": ("attack", "measure how much of its training text a model gives back"),
        "attack-membership": ("attack", "measure whether trained documents can be told from others"),
    },
    "a researcher": {
        "plan": ("plan", "estimate memory and time of a run on given TPUs or GPUs"),
        "reproduce": ("reproduce", "run the paper's comparison: baselines, ablations, seeds, intervals"),
        "report": ("reproduce", "write a study as one HTML page"),
    },
}
VERBS = {verb: module for verbs in ROLES.values() for verb, (module, _) in verbs.items()}
# Verbs that all processes of a job run together; process 0 runs the others on its own.
TOGETHER = {"pretrain", "train", "eval", "doctor"}
# With this variable set, a refusal is printed after its traceback.
DEBUG = "FLEXMOE_DEBUG"
_LIBRARIES = {"jax", "jaxlib", "orbax", "tensorstore", "grain", "optax", "tokenizers", "pyarrow", "safetensors"}
_LIBRARIES |= {"transformers", "sentence_transformers", "huggingface_hub", "datasets", "lm_eval", "torch", "gguf"}
_SPACE, _PLACE = "free some space, or use another disk", "choose a place that you may read and write"
_OF_ERRNO = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _SPACE)
_OF_ERRNO |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _PLACE)
EXIT_REFUSED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns 0, 1 (refused, with a remedy), 2 (usage), 75 (stopped by a signal, saved), or 130."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else EXIT_USAGE
    if argv[0] == "--version":
        from flexmoe_jax import __version__

        print(f"flexmoe {__version__}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        from flexmoe_jax.cli.common import suggest

        print(f"flexmoe: unknown verb {verb!r}: {suggest(verb, VERBS)}", file=sys.stderr)
        return EXIT_USAGE
    _log_to_stderr()
    try:
        use_compilation_cache()
        if "FLEXMOE_PROCESSES" in os.environ and verb not in TOGETHER and not _leads(verb):
            print(f"flexmoe {verb}: left to process 0", file=sys.stderr)
            return 0
        module = importlib.import_module(f"flexmoe_jax.cli.{VERBS[verb]}")
        return getattr(module, verb.replace("-", "_"))(rest) or 0
    except BrokenPipeError:
        raise
    except Exception as error:
        refusal = explained(error)
        if refusal is None:
            raise
        if os.environ.get(DEBUG):
            traceback.print_exception(error)
        print(f"flexmoe {verb}: {printable(str(refusal), keep=LINE_ENDS)}", file=sys.stderr)
        return refusal.exit_code
    except KeyboardInterrupt:
        print(f"flexmoe {verb}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def explained(error: Exception) -> FlexMoEError | None:
    """The refusal that stands for `error`: of the package, the system, or a library; None for a bug, of any of them.

    A ValueError or RuntimeError is a library's if its class is, or if the library's code raised it.
    """
    if isinstance(error, FlexMoEError):
        return error
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    debug = f"{DEBUG}=1 shows where"
    if "jax._src.xla_bridge" in frames:
        asked = os.environ.get("JAX_PLATFORMS")
        what = f"JAX cannot use the devices of this machine{f' (JAX_PLATFORMS is {asked!r})' if asked else ''}: {first}"
        return MachineError(what, "run `flexmoe doctor`, which says why; JAX_PLATFORMS=cpu uses the processor")
    if isinstance(error, MemoryError) or re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", first):
        remedy = "use smaller batches or shorter sequences, or more devices; `flexmoe plan` estimates a run"
        return MachineError(f"there is not enough memory: {first}", remedy)
    if isinstance(error, OSError):
        remedy = _OF_ERRNO.get(error.errno or 0, f"check paths, permissions and the network; {debug}")
        return ArtifactError(first, remedy)
    if isinstance(error, ValueError | RuntimeError):
        roots = (name.partition(".")[0] for name in (type(error).__module__, *reversed(frames)))
        library = next((root for root in roots if root in {*_LIBRARIES, "flexmoe_jax"}), None)
        if library in _LIBRARIES:
            return FlexMoEError(f"{library}: {first}", f"check what it names; {debug}")
    return None


def _leads(verb: str) -> bool:
    """Whether this process runs a verb that is for one process; it then forgets that there are others."""
    from flexmoe_jax.parallel.processes import place_of

    place = place_of(os.environ)
    if place is None:
        raise ConfigError(
            f"FLEXMOE_PROCESSES is {os.environ['FLEXMOE_PROCESSES']!r}, and nothing says which process is the first",
            f"run flexmoe {verb} in one process, without FLEXMOE_PROCESSES",
        )
    del os.environ["FLEXMOE_PROCESSES"]
    return place.number == 0


def _log_to_stderr() -> None:
    """Sends the library's log to stderr, one line per record."""
    logger = logging.getLogger("flexmoe_jax")
    if not logger.handlers:
        logger.addHandler(_Stderr())
    logger.setLevel(logging.INFO)
    if not os.environ.get(DEBUG):  # Orbax's tasks and threads tell an error many times; its caller reports it
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(lambda record: False)


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(printable(record.getMessage(), keep=LINE_ENDS), file=sys.stderr, flush=True)


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes in $FLEXMOE_CACHE/compiled; JAX_ENABLE_COMPILATION_CACHE=0 does not.

    There is a folder for each kind of processor: a program compiled for one may not run on another that shares the
    disk. Only programs are kept, never data. Takes effect when JAX is imported; JAX's own variables have precedence.
    """
    from flexmoe_jax.files import default_cache

    folder = default_cache() / "compiled" / _processor()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if os.path.expanduser("~") == "~":  # no home directory: Hugging Face's libraries would make a folder named "~"
        os.environ.setdefault("HF_HOME", str(default_cache() / "huggingface"))


def _processor() -> str:
    """A short name of what programs compiled here may use: architecture and instruction sets."""
    flags = platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return hashlib.sha256(flags.encode()).hexdigest()[:12]


def entry() -> int:
    """The console script: `main` in a process whose large arrays lie on huge pages.

    glibc reads that setting only when a process starts, so the process starts itself again with it. Fresh pages are a
    large part of a training step's time on a CPU. A GLIBC_TUNABLES that is already set has precedence.
    """
    quick = sys.argv[1:2] in (["-h"], ["--help"], ["--version"])
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and not quick:
        environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        with contextlib.suppress(OSError):  # of another user, who may not run it again
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: what is printed must not land in another file
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - it stays open as long as the process
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if not os.environ.get(DEBUG):
        sys.unraisablehook = lambda _: None  # as of Orbax's tasks, when an error ends them
    logging.getLogger("flexmoe_jax").propagate = False  # some libraries give the root logger a handler, too
    try:
        code = main()
    except SystemExit as end:  # of argparse
        code = end.code if isinstance(end.code, int) else EXIT_USAGE
    except BrokenPipeError:
        code = EXIT_REFUSED
    code = _flushed(code)
    if code == EXIT_INTERRUPTED:
        os._exit(code)  # at once: threads that still write leave whole files
    return code


def _flushed(code: int) -> int:
    """`code` once stdout and stderr are flushed; 1 instead of 0 where they cannot be."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # the interpreter flushes again at its end
            code = code or EXIT_REFUSED
            if not isinstance(error, BrokenPipeError):  # a reader that left needs no message
                print(f"flexmoe: the output cannot be written: {error}", file=sys.stderr)
    return code


def _help() -> str:
    width = max(map(len, VERBS))
    lines = ["usage: flexmoe VERB ...", "", "Mixture-of-experts language models whose experts belong to data owners."]
    for role, verbs in ROLES.items():
        lines += ["", f"for {role}:", *(f"  {verb:{width}}  {text}" for verb, (_, text) in verbs.items())]
    return "\n".join(
        [
            *lines,
            "",
            "`flexmoe VERB --help` shows a verb's options with an example; `flexmoe keys` explains the configuration.",
            "Exit codes: 0 done; 1 refused, with the reason and a remedy; 2 wrong usage; 75 stopped by a signal with",
            "the state saved (the same command resumes it); 130 interrupted (a training saves at the first Ctrl-C).",
            f"{DEBUG}=1 shows the traceback of a refusal.",
        ]
    )


if __name__ == "__main__":
    sys.exit(entry())
