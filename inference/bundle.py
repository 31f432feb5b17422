"""A model bundle as it stands on disk: read, checked against its own hash, never trusted.

weights/<name>/
    manifest.toml            everything particular to the question: inference.manifest,
    docs/bundles.md model.safetensors        weights, named as timm names them; nothing else is ever
    loaded calibration.toml         logit -> probability, one table a label; a site may have its own
    reference.safetensors    "inputs" (n, channels, size, size) and "logits" (n, labels), fp32
    MODEL_CARD.md, report/   for people
"""

import hashlib
import json
import struct
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import TypeAdapter, ValidationError

from db.errors import PermanentError
from db.result import ModelIdentity
from inference.calibration import CalibrationFile, LabelCalibration
from inference.manifest import Manifest

MANIFEST, WEIGHTS = "manifest.toml", "model.safetensors"
CALIBRATION, REFERENCE = "calibration.toml", "reference.safetensors"

# A safetensors file begins with the length of its JSON header; the format's own cap is 100 MB.
_MAX_HEADER_BYTES = 100_000_000
_T = TypeVar("_T")
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")  # pickle protocol 2+; torch.save's ZIP


class BundleError(PermanentError):
    """The bundle's manifest or calibration cannot be used; the message names file and key."""

    code: ClassVar[str] = "bundle_invalid"


class WeightsArePickle(BundleError):
    """A pickle can run code when it is read: refused whatever its name."""

    code: ClassVar[str] = "weights_pickle"


class WeightsTruncated(BundleError):
    """Not a whole safetensors file."""

    code: ClassVar[str] = "weights_truncated"


class WeightsChanged(BundleError):
    """The weights are not those the manifest was written for."""

    code: ClassVar[str] = "weights_hash"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A manifest whose weights are whole and have the hash it names, and its calibration."""

    folder: Path
    manifest: Manifest
    calibrations: dict[str, LabelCalibration]  # one for each validated label
    calibration_id: str  # short hash of calibration.toml's content

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    @property
    def reference(self) -> Path:
        return self.folder / REFERENCE

    def identity(self, numerics: str) -> ModelIdentity:
        """Which numbers make a result's numbers; `numerics` is what serves ("fp32", ...)."""
        manifest = self.manifest
        return ModelIdentity(
            bundle=manifest.name,
            version=manifest.version,
            architecture=manifest.architecture,
            weights_sha256=manifest.weights_sha256,
            calibration_id=self.calibration_id,
            aggregation=str(manifest.study.aggregation),
            preprocessing=preprocessing_id(manifest),
            numerics=numerics,
        )


def load_bundle(folder: Path, *, calibration: Path | None = None) -> Bundle:
    """Read and check a bundle; weights are hashed, not loaded.

    `calibration` is a site's own file in place of the bundle's.

    Raises
    ------
    BundleError
        With the file and the key at fault, or one of its kinds for the weights.
    """
    manifest = read_manifest(folder / MANIFEST)
    check_weights(folder / WEIGHTS, manifest.weights_sha256)
    path = calibration or folder / CALIBRATION
    calibrations = _calibrations(path, manifest)
    digest = hashlib.sha256(_read(path)).hexdigest()[:12]
    return Bundle(folder, manifest, calibrations, digest)


def check_overrides(
    bundle: Bundle, thresholds: Mapping[str, float], prevalence: Mapping[str, float]
) -> None:
    """Refuse a tenant's numbers that could never take effect.

    Raises
    ------
    BundleError
        For a label of this bundle that is unknown or exploratory, or a threshold beyond what its
        calibration can reach.
    """
    for key in (*thresholds, *prevalence):
        name, _, label = key.partition(".")
        if name == bundle.name and label not in bundle.calibrations:
            raise BundleError(f"{key}: {name} has no validated label {label!r}")
    for label, calibration in bundle.calibrations.items():
        threshold = thresholds.get(f"{bundle.name}.{label}")
        reference = bundle.manifest.label(label).reference_prevalence
        lower, upper = calibration.clips(reference or calibration.prevalence)
        if threshold is not None and not lower < threshold <= upper:
            raise BundleError(f"{bundle.name}.{label}: threshold outside {lower:.4f}..{upper:.4f}")


def read_manifest(path: Path) -> Manifest:
    """The manifest, strictly: a key that is unknown, missing or of another type is an error."""
    return _parse(path, TypeAdapter(Manifest))


def preprocessing_id(manifest: Manifest) -> str:
    """A short hash of all that stands between pixels and the model."""
    parts = {"pixels": asdict(manifest.pixels), "input": asdict(manifest.input)}
    text = json.dumps(parts, sort_keys=True).encode()
    return f"{manifest.input.size}px {hashlib.sha256(text).hexdigest()[:12]}"


def check_weights(path: Path, sha256: str) -> None:
    """Refuse what is no whole safetensors file, or not the one the manifest names."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            _check_layout(path, head, file.read(1))
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({type(error).__name__})") from None
    if found != sha256:
        raise WeightsChanged(f"{path}: sha256 {found[:12]}, the manifest says {sha256[:12]}")


def _check_layout(path: Path, head: bytes, first: bytes) -> None:
    if first != b"{" and head.startswith(_PICKLE_STARTS):
        raise WeightsArePickle(f"{path}: looks like a pickle; only safetensors are loaded")
    if len(head) < 8 or first != b"{":
        raise WeightsTruncated(f"{path}: not a safetensors file")
    (length,) = struct.unpack("<Q", head)
    if length > min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
        raise WeightsTruncated(f"{path}: its header is cut off")
    with path.open("rb") as file:
        file.seek(8)
        try:
            entries: dict[str, Any] = json.loads(file.read(length))
            ends = [x["data_offsets"][1] for name, x in entries.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise WeightsTruncated(f"{path}: its header is damaged") from None
    if path.stat().st_size != 8 + length + max(ends, default=0):
        raise WeightsTruncated(f"{path}: its length does not match its header")


def _calibrations(path: Path, manifest: Manifest) -> dict[str, LabelCalibration]:
    file = _parse(path, TypeAdapter(CalibrationFile))
    validated = {label.id for label in manifest.labels if label.threshold is not None}
    if missing := sorted(validated - set(file.labels)):
        raise BundleError(f"{path}: labels: no calibration for {', '.join(missing)}")
    if strange := sorted(set(file.labels) - {label.id for label in manifest.labels}):
        raise BundleError(f"{path}: labels: the manifest has no {', '.join(strange)}")
    for label in manifest.labels:
        _check_threshold(path, label.id, label.threshold, label.reference_prevalence, file)
    return {name: value for name, value in file.labels.items() if name in validated}


def _check_threshold(
    path: Path,
    name: str,
    threshold: float | None,
    prevalence: float | None,
    file: CalibrationFile,
) -> None:
    """A threshold beyond the clips could never be reached, or never be missed."""
    if threshold is None or prevalence is None:
        return
    lower, upper = file.labels[name].clips(prevalence)
    if not lower < threshold <= upper:
        raise BundleError(
            f"{path}: labels.{name}: the threshold {threshold} lies outside "
            f"{lower:.4f}..{upper:.4f}, all that the calibration data can support"
        )


def _parse(path: Path, adapter: TypeAdapter[_T]) -> _T:
    try:
        values = tomllib.loads(_read(path).decode())
        # By way of JSON, whose strict mode takes lists for tuples and words for enumerations.
        return adapter.validate_json(json.dumps(values))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as error:
        raise BundleError(f"{path}: {error}") from None
    except ValidationError as error:
        raise BundleError(_explain(path, error)) from None


def _explain(path: Path, error: ValidationError) -> str:
    words = {"unexpected_keyword_argument": "unknown key", "missing": "key is missing"}
    lines = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        key = ".".join(str(part) for part in problem["loc"]) or "manifest"
        reason = words.get(problem["type"], problem["msg"].removeprefix("Value error, "))
        lines.append(f"{path}: {key}: {reason}")
    return "\n".join(lines)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({type(error).__name__})") from None
