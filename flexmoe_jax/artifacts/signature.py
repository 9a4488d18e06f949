"""Ed25519 signatures of packages; they are made and checked offline (library `cryptography`).

    news/signature.json   owner, manifest digest, version, public key and the signature of these, in canonical form

The manifest's digest covers every byte of the package, so a signature does too. `version` is the owner's own count.
Signatures of older versions stay valid, so the list of trusted keys states the lowest version that may be used.

A file of trusted keys has lines `OWNER KEY [LOWEST VERSION]`; `flexmoe keygen` writes the owner's line beside the
private key. The key of `public` also signs the trunk. Blank lines and lines that start with `#` are ignored.
"""

import dataclasses
import os
import pathlib
import stat
from typing import Any

from flexmoe_jax.artifacts.manifest import check_owner, read_manifest
from flexmoe_jax.artifacts.sealed import check_fields, check_format, is_sha256, json_bytes, write_json
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import sync_directory, write_bytes
from flexmoe_jax.json_files import canonical_json, parse_json, read_bytes
from flexmoe_jax.tree import PUBLIC, TRUNK

FILE = "signature.json"
FORMAT = "flexmoe-signature-1"
_MAX_BYTES = 1 << 12
_FIELDS: dict[str, type] = {"format": str, "owner": str, "manifest": str, "version": int}
_FIELDS |= {"public_key": str, "signature": str}


@dataclasses.dataclass(frozen=True)
class Trust:
    """{(owner, public key in hexadecimal): lowest version}; `required`: packages without a signature are refused."""

    keys: dict[tuple[str, str], int]
    required: bool = False


@dataclasses.dataclass(frozen=True)
class Signature:
    """The content of a valid signature. Whose key it is: see `Trust`."""

    owner: str
    manifest: str
    version: int
    public_key: str


def generate_key(path: pathlib.Path | str, owner: str) -> pathlib.Path:
    """Writes a new private key (PEM, mode 600) to the new file `path`, and its line for trusted keys to `path`.pub.

    Returns the path of the latter. ArtifactError if one of the files exists or cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    check_owner(owner)
    path = pathlib.Path(path)
    public = path.with_name(f"{path.name}.pub")
    for file in (path, public):
        if os.path.lexists(file):
            raise ArtifactError(f"{file} already exists", "give another path: a key that was used must not be lost")
    key = Ed25519PrivateKey.generate()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as writer:
            writer.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            writer.flush()
            os.fsync(writer.fileno())
        write_bytes(public, f"{owner} {key.public_key().public_bytes_raw().hex()} 1\n".encode())
    except OSError as error:
        raise ArtifactError(f"{path} could not be written: {error}", "check free space and permissions") from error
    return public


def write_signature(package: pathlib.Path, key: pathlib.Path | str, version: int) -> Signature:
    """`package.sign_package` without the checks of the package, also for a package inside a model."""
    if version < 1:
        raise ArtifactError(f"the version is {version}", "count versions from 1, each higher than the one before")
    manifest, private = read_manifest(package), _read_key(pathlib.Path(key))
    if (package / FILE).exists() and (old := read_signature(package, manifest.digest)).version > version:
        what = f"{package} is signed as version {old.version}, which is higher than {version}"
        raise ArtifactError(what, f"give at least version {old.version}")
    fields = {"format": FORMAT, "owner": manifest.owner, "manifest": manifest.digest, "version": version}
    fields["public_key"] = private.public_key().public_bytes_raw().hex()
    write_json(package / FILE, {**fields, "signature": private.sign(canonical_json(fields)).hex()})
    sync_directory(package)
    return read_signature(package, manifest.digest)


def read_signature(package: pathlib.Path, manifest: str) -> Signature:
    """The signature of the package whose manifest has the digest `manifest`; ArtifactError unless it is valid."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    where = package / FILE
    raw = read_bytes(where, _MAX_BYTES)
    fields = parse_json(raw, where)
    check_format(fields, FORMAT, where)
    check_fields(fields, _FIELDS, where)
    if json_bytes(fields) != raw:
        raise ArtifactError(f"{where} is not in canonical form", "ask the owner for the package as it was signed")
    if fields["manifest"] != manifest:
        raise ArtifactError(
            f"{where} signs the manifest {fields['manifest']}, this package's is {manifest}",
            "ask the owner for the signature of this version",
        )
    signed = {name: value for name, value in fields.items() if name != "signature"}
    try:
        key, signature = bytes.fromhex(fields["public_key"]), bytes.fromhex(fields["signature"])
        if (key.hex(), signature.hex()) != (fields["public_key"], fields["signature"]):
            raise ValueError("hexadecimal digits have one form")
        Ed25519PublicKey.from_public_bytes(key).verify(signature, canonical_json(signed))
    except (InvalidSignature, ValueError) as error:
        raise ArtifactError(f"{where} is not a valid signature", "do not use this package") from error
    return Signature(fields["owner"], fields["manifest"], fields["version"], fields["public_key"])


def check_signature(package: pathlib.Path, owner: str, manifest: str, trust: Trust | None = None) -> str | None:
    """A line that describes the signature of `owner`'s package; None if there is none.

    ArtifactError for a signature that is not valid or of another owner; with `trust` also for a key that is not trusted
    for the owner, a version that is too low, and a missing signature if `trust.required`.
    """
    if not os.path.lexists(package / FILE):
        if trust is None or not trust.required:
            return None
        raise ArtifactError(f"{package} is not signed", f"ask {owner!r} for the signed package")
    signature = read_signature(package, manifest)
    if signature.owner != owner:
        raise ArtifactError(f"{package} is signed as {signature.owner!r}, not {owner!r}", "do not use this package")
    line = f"version {signature.version}, signed with {signature.public_key}"
    if trust is None:
        return f"{line}, a key not checked against a trust list"
    lowest = trust.keys.get((PUBLIC if owner == TRUNK else owner, signature.public_key))
    if lowest is None:
        raise ArtifactError(
            f"{package} is signed with {signature.public_key}, a key not trusted for {owner!r}",
            "ask the owner over another channel for the line of the key, and add it to the trusted keys",
        )
    if signature.version < lowest:
        raise ArtifactError(
            f"{package} is version {signature.version} of {owner!r}, the lowest that may be used is {lowest}",
            "it was replaced by its owner: ask for the newest version",
        )
    return line


def read_trusted(path: pathlib.Path | str, required: bool = False) -> Trust:
    """The trusted keys in the file `path`; ArtifactError names a line of another form."""
    keys = {}
    for number, line in enumerate(read_bytes(pathlib.Path(path)).decode(errors="replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        owner, key, lowest = (*words, "1", "1")[:3]
        if len(words) not in (2, 3) or not is_sha256(key) or not lowest.isdecimal():  # a key has as many digits
            raise ArtifactError(f"{path} line {number} is {line!r}", "write: OWNER KEY [LOWEST VERSION]")
        check_owner(owner)
        keys[owner, key] = int(lowest)
    return Trust(keys, required)


def _read_key(path: pathlib.Path) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    raw = read_bytes(path, _MAX_BYTES)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ArtifactError(f"{path} can be read by others", f"chmod 600 {path}")
    try:
        key = load_pem_private_key(raw, None)
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is not a private key: {error}", "make one with flexmoe keygen") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ArtifactError(f"{path} is not an Ed25519 key", "make one with flexmoe keygen")
    return key
