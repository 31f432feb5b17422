"""DICOM studies from disk through the served path: eligibility, volume, input, logits."""

import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError
from pydicom.filereader import dcmread, read_file_meta_info
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from torch import nn

from db.describe import describe
from db.errors import NotDicom, PermanentError
from db.header import InstanceHeader
from db.meta import Provenance, encode_head
from db.pixels import read_images
from db.result import Eligibility
from inference.bundle import Bundle
from inference.eligibility import check_pixels, judge
from inference.manifest import Manifest
from inference.model import logits
from inference.predict import Prepared, in_context, prepare
from inference.volume import Decoded, Volume, build_volume

# Preamble, prefix, and the element that holds the meta group's length (PS3.10 7.1).
_META_LENGTH_END = 128 + 4 + 12
# Of a data set without a file header, in little endian: 0002 where only the preamble is missing.
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")


class NotJudged(PermanentError):
    """The bundle's own rules refuse the series."""

    code: ClassVar[str] = "not_judged"


def series_logits(folder: Path, bundle: Bundle, model: nn.Module) -> NDArray[np.float32]:
    """(images, labels) of the series the bundle chooses; see `read_series`."""
    outputs = logits(model, read_series(folder, bundle).inputs)
    return in_context(outputs, bundle.manifest.study.context)


def read_series(path: Path, bundle: Bundle) -> Prepared:
    """One study as the model sees it: a folder with whatever is under it, or one file.

    Reads in this process, without the sandbox: for files that are trusted.

    Raises
    ------
    NotJudged
        With the rule, if the bundle's eligibility refuses the study; or if it holds no DICOM.
    PermanentError
        If an image cannot be read or decoded.
    """
    volume = read_volume(path, bundle.manifest)
    if refused := check_pixels(volume, bundle.manifest):
        raise NotJudged(f"{refused.rule}: {refused.value}, allowed {refused.limit}")
    return prepare(volume, bundle)


def read_volume(path: Path, manifest: Manifest) -> Volume:
    """What the header rules choose of a study, before the pixel rules; raises as `read_series`."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    with TemporaryDirectory() as folder:
        return _volume(_dicom_files(files, Path(folder)), manifest)


def _volume(paths: Mapping[str, Path], manifest: Manifest) -> Volume:
    if not paths:
        raise NotJudged("no DICOM file in it")
    headers = {name: _header(file) for name, file in paths.items()}
    if len({header.study_instance_uid for header in headers.values()}) > 1:
        raise NotJudged("more than one study in it")
    chosen = judge(headers, manifest)
    if isinstance(chosen, Eligibility):
        raise NotJudged(f"{chosen.rule}: {chosen.value}, allowed {chosen.limit}")
    images = []
    for name in chosen.instance_ids:
        meta, arrays = read_images(str(paths[name]))
        images.append(Decoded(name, headers[name], meta, arrays[0]))
    return build_volume(images, manifest)


def _dicom_files(files: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Those that are DICOM, by number; copies with a header in `folder` of those without.

    A DICOMDIR names files and is none. A bare data set is what a node is sent (PS3.10 7.1 is for
    files alone), so the served path would judge it, too.
    """
    paths: dict[str, Path] = {}
    for number, file in enumerate(files):
        if file.name.upper() == "DICOMDIR":
            continue
        with file.open("rb") as opened:
            head = opened.read(132)
        if head[128:] == b"DICM":
            paths[str(number)] = file
        elif head.startswith(_FIRST_GROUPS) and (whole := _with_header(file, folder, number)):
            paths[str(number)] = whole
    return paths


def _with_header(path: Path, folder: Path, number: int) -> Path | None:
    """A copy with preamble and meta group; None of what has no SOP Class UID.

    Without a transfer syntax, pydicom tells implicit from explicit value representations by the
    first element.
    """
    whole = folder / f"{number}.dcm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's hold values, which may be a patient's
            dataset = dcmread(path, force=True)
            if not dataset.get("SOPClassUID"):
                return None
            if "TransferSyntaxUID" not in dataset.file_meta:
                is_implicit, _ = dataset.original_encoding
                syntax = ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian
                dataset.file_meta.TransferSyntaxUID = syntax
            dataset.save_as(whole, enforce_file_format=True)
    except (AttributeError, EOFError, KeyError, NotImplementedError, ValueError, struct.error):
        return None  # no data set after all
    return whole


def _header(path: Path) -> InstanceHeader:
    """By the node's own reader, which knows spooled files only: the meta group is exchanged."""
    try:
        meta = read_file_meta_info(path)
        length, syntax = meta.FileMetaInformationGroupLength, meta.TransferSyntaxUID
    except (AttributeError, InvalidDicomError, EOFError, ValueError, struct.error):
        raise NotDicom("a file's meta group is damaged") from None
    dataset = path.read_bytes()[_META_LENGTH_END + length :]
    ours = encode_head(Provenance(tenant="recipe", transfer_syntax_uid=syntax))
    with TemporaryDirectory() as folder:
        spooled = Path(folder) / "one.dcm"
        spooled.write_bytes(ours + dataset)
        return InstanceHeader.from_json(describe(str(spooled))[0]["header"])
