"""What a build reads: headers, key images and heat maps, each checked against the finding."""

import io
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar
from zipfile import BadZipFile

import numpy as np
import structlog
from pydicom import Dataset

from db.errors import ChildDied, NodeError, PermanentError
from db.files import result_folder, storage_errors, store_path
from db.notices import Notice
from db.pixels import read_images
from db.result import Finding, ImageRef, SentObject
from db.sandbox import Answer, Sandbox
from db.withdrawals import Withdrawal
from dicom_sr.build import Floats
from dicom_sr.evidence import unfit
from dicom_sr.plan import needed_images
from dicom_sr.source import parsed, read_header

log = structlog.get_logger()

READ_TIMEOUT_S = 60.0
#: A child that died may have been unlucky; twice on one file is the file's doing.
MAX_DEATHS = 2


class ObjectGone(PermanentError):
    """None of a result's objects can be read any more: nobody knows under whose name it went."""

    code: ClassVar[str] = "objects_gone"


class InstanceGone(PermanentError):
    """An analysed instance is not in the store any more."""

    code: ClassVar[str] = "instance_gone"


class SourceKillsReader(PermanentError):
    """A source instance crashed, hung or exhausted its reader each time."""

    code: ClassVar[str] = "undecodable"


class WrongSource(PermanentError):
    """A stored instance is not the one that was analysed, or of another study."""

    code: ClassVar[str] = "wrong_source"


class MapsGone(PermanentError):
    """The result's heat maps are missing or do not fit its images."""

    code: ClassVar[str] = "maps_gone"


@dataclass(frozen=True, slots=True)
class Subject:
    """A result, a notice or a withdrawal, and where its study's files are."""

    result_id: uuid.UUID
    result_no: int
    analysis_id: int
    study_id: int
    study_instance_uid: str
    tenant: str
    origin: str
    bundle: str
    content: Finding | Notice | Withdrawal


class Inputs:
    """Reads a result's inputs; untrusted files only through the sandbox. Any thread may call."""

    def __init__(self, data_dir: Path, sandbox: Sandbox, max_pixels: int) -> None:
        self._data_dir = data_dir
        self._sandbox = sandbox
        self._max_pixels = max_pixels

    def warm(self) -> None:
        """Have a child load what it needs, before the first study waits for it."""
        for function, args in ((read_header, (None,)), (read_images, ([0],))):
            with suppress(NodeError):  # there is no such file, and that is all it says
                self._sandbox.run(function, "/nonexistent", *args, timeout_s=READ_TIMEOUT_S)

    def headers(self, subject: Subject, finding: Finding) -> Mapping[int, Dataset]:
        owner = (subject.tenant, subject.study_id, subject.study_instance_uid)
        return {i: self.header(*owner, finding.images[i]) for i in needed_images(finding)}

    def header(
        self, tenant: str, study_id: int, study_instance_uid: str, image: ImageRef
    ) -> Dataset:
        """The header of an instance of a study; `PermanentError` if it is gone, unreadable or of
        another study."""
        path = self._source(tenant, study_id, image)
        _, (blob,) = self._read(
            lambda: self._sandbox.run(read_header, str(path), image.frame, timeout_s=READ_TIMEOUT_S)
        )
        header = parsed(blob)
        if left_out := unfit(header):
            log.warning("source_values_left_out", value=" ".join(left_out))
        found = (str(header.get("SOPInstanceUID", "")), str(header.get("StudyInstanceUID", "")))
        if found != (image.sop_instance_uid, study_instance_uid):
            raise WrongSource("a stored instance does not name the analysed image and study")
        return header

    def header_of_own(self, tenant: str, objects: Sequence[SentObject]) -> Dataset:
        """Patient and study as the objects of one result name them: the first that can be read."""
        for one in objects:
            folder = result_folder(self._data_dir, tenant, uuid.UUID(one.result_id))
            path = (folder / f"{one.sop_instance_uid}.dcm").resolve()
            if not path.is_file():
                continue
            _, (blob,) = self._read(
                partial(self._sandbox.run, read_header, str(path), None, timeout_s=READ_TIMEOUT_S)
            )
            header = parsed(blob)
            if str(header.get("SOPInstanceUID", "")) == one.sop_instance_uid:
                return header
        raise ObjectGone("none of the objects that were sent is in the store any more")

    def pixels(self, subject: Subject, finding: Finding) -> Mapping[int, Floats]:
        keys = finding.key_images if finding.is_positive else ()
        return {key.image: self._image(subject, finding.images[key.image]) for key in keys}

    def _image(self, subject: Subject, image: ImageRef) -> Floats:
        path = self._source(subject.tenant, subject.study_id, image)
        index = 0 if image.frame is None else image.frame - 1
        _, (values,) = self._read(
            lambda: self._sandbox.run(
                read_images,
                str(path),
                [index],
                self._max_pixels,
                timeout_s=READ_TIMEOUT_S,
            )
        )
        if values.shape != (1, image.rows, image.columns):
            raise WrongSource(f"a stored instance has the matrix {values.shape[1:]}")
        picture: Floats = values[0]
        return picture

    def _read(self, call: Callable[[], Answer]) -> Answer:
        for _ in range(MAX_DEATHS - 1):
            try:
                return call()
            except ChildDied:
                log.warning("reader_died", exc_code=ChildDied.code)
        try:
            return call()
        except ChildDied as error:
            raise SourceKillsReader(
                f"a source instance killed its reader {MAX_DEATHS} times"
            ) from error

    def _source(self, tenant: str, study_id: int, image: ImageRef) -> Path:
        path = store_path(self._data_dir, tenant, study_id, uuid.UUID(image.instance_id))
        if not path.is_file():
            raise InstanceGone("an analysed instance is not in the store")
        return path.resolve()  # the child runs in another folder

    def maps(self, subject: Subject, finding: Finding) -> Mapping[int, Floats]:
        """Heat maps by index into the key images; our own file, never pickled."""
        if not (finding.is_positive and finding.key_images):
            return {}
        path = result_folder(self._data_dir, subject.tenant, subject.result_id) / "maps.npz"
        if not path.is_file():
            raise MapsGone("the heat maps are not in the result's folder")
        with storage_errors():
            data = path.read_bytes()
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                maps = {i: file[f"cam_{i}"] for i in range(len(finding.key_images))}
        except (KeyError, ValueError, BadZipFile) as error:
            raise MapsGone(f"the heat maps cannot be read ({type(error).__name__})") from None
        for i, key in enumerate(finding.key_images):
            image = finding.images[key.image]
            if maps[i].shape != (image.rows, image.columns):
                raise MapsGone(f"heat map {i} does not fit its image")
        return maps
