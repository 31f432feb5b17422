"""From a claimed job to model inputs: decoding in sandboxed children, one instance at a time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from config.settings import InferenceSettings
from db import queue, studies
from db.errors import ChildDied, PermanentError, TransientError
from db.files import store_path
from db.header import InstanceHeader
from db.pixels import read_images
from db.result import Eligibility
from db.sandbox import Sandbox
from inference.bundle import Bundle
from inference.choice import headers_of, select_images
from inference.eligibility import check_pixels
from inference.manifest import Manifest
from inference.predict import Prepared, prepare
from inference.volume import Decoded, NoVolume, build_volume

#: An instance whose decoding kills the child this often is not read again.
MAX_DEATHS = 3


class DecoderKilled(PermanentError):
    """An image crashed, hung or exhausted the decoder each time it was tried."""

    code: ClassVar[str] = "decoder_killed"


class InstanceGone(TransientError):
    """A chosen instance is not in the store (any more)."""

    code: ClassVar[str] = "instance_gone"


@dataclass(frozen=True, eq=False)
class Loaded:
    """A study ready for the device."""

    prepared: Prepared
    instance_ids: tuple[str, ...]  # as chosen
    is_partial: bool


class Loader:
    """Reads studies; any thread may call, the sandbox has a child for each and one more."""

    def __init__(self, engine: Engine, data_dir: Path, settings: InferenceSettings) -> None:
        self._engine = engine
        self._data_dir = data_dir
        self._settings = settings
        self._sandbox = Sandbox(
            size=settings.loaders + 1,  # one for an emergency alone: see the scheduler
            memory_mb=settings.loader_memory_mb,
            cpu_s=settings.loader_timeout_s,
        )

    def close(self) -> None:
        self._sandbox.close()

    def load(self, job: queue.ClaimedJob, bundle: Bundle) -> Loaded | Eligibility:
        """Everything from rows to model inputs, or why the study cannot be judged.

        Raises
        ------
        StaleAnalysis
            If the analysis has moved on since the job was made.
        NodeError
            If an image cannot be decoded, now or ever.
        """
        with Session(self._engine) as session, session.begin():
            analysis = queue.analysis_of(session, job)
            if analysis.bundle_folder != job.version.folder:
                # Chosen by the rules of a version that was replaced while the study waited.
                studies.choose_anew(session, analysis, job.version.folder)
                analysis = queue.analysis_of(session, job)
            only = analysis.analysed_ids or None
            headers = headers_of(session, job.study_id, only)
            chosen = select_images(session, job.study_id, headers, bundle.manifest)
        if only and len(headers) < len(only):
            raise InstanceGone(f"{len(only) - len(headers)} chosen instances are not in the store")
        if isinstance(chosen, Eligibility):
            return chosen
        chosen_headers = [headers[key] for key in chosen.instance_ids]
        if refused := oversized(chosen_headers, self._settings.max_pixels):
            return refused
        made = prepare_images(self._images(job, chosen.instance_ids, headers), bundle)
        if isinstance(made, Eligibility):
            return made
        return Loaded(
            made, chosen.instance_ids, is_partial=analysis.is_partial or not chosen.is_complete
        )

    def _images(
        self, job: queue.ClaimedJob, chosen: Sequence[str], headers: Mapping[str, InstanceHeader]
    ) -> list[Decoded]:
        """All of them: a scan without an image that is there would be another scan."""
        images = []
        for number, instance_id in enumerate(chosen, start=1):
            header = headers[instance_id]
            path = store_path(self._data_dir, job.tenant, job.study_id, UUID(instance_id))
            try:
                images.append(decode(self._sandbox, path, instance_id, header, self._settings))
            except PermanentError as error:
                which = f"Image {number} of {len(chosen)} ({_numbers(header)})"
                raise type(error)(f"{which}: {error}.") from error
        return images


def oversized(headers: Iterable[InstanceHeader], max_pixels: int) -> Eligibility | None:
    """Refuses images that are too large together: they all lie in this process's memory at once.

    By header, before anything is decoded; a child refuses an instance that is another than it says.
    """
    found = sum((one.rows or 0) * (one.columns or 0) * one.frames for one in headers)
    if found <= max_pixels:
        return None
    reason = "The images have too many pixels together."
    return Eligibility("pixels", str(found), f"<= {max_pixels}", reason)


def _numbers(header: InstanceHeader) -> str:
    """How a viewer lists an image; never its patient."""
    series, instance = (
        "without number" if number is None else str(number)
        for number in (header.series_number, header.instance_number)
    )
    return f"series {series}, instance {instance}"


def decode(
    sandbox: Sandbox,
    path: Path,
    instance_id: str,
    header: InstanceHeader,
    settings: InferenceSettings,
) -> Decoded:
    """Decode one instance in a child; another child tries when one dies.

    Raises
    ------
    DecoderKilled
        If it killed its child each time.
    """
    for attempt in range(1, MAX_DEATHS + 1):
        try:
            meta, arrays = sandbox.run(
                read_images,
                str(path.resolve()),
                None,
                settings.max_pixels,
                timeout_s=settings.loader_timeout_s,
            )
            return Decoded(instance_id, header, meta, arrays[0])
        except ChildDied as error:
            if attempt == MAX_DEATHS:
                raise DecoderKilled("it ended its decoder each time it was read") from error
    raise AssertionError("unreachable")


def prepare_images(images: Sequence[Decoded], bundle: Bundle) -> Prepared | Eligibility:
    """Decoded images to model inputs, or the pixel rule that refuses them."""
    manifest: Manifest = bundle.manifest
    try:
        volume = build_volume(images, manifest)
    except NoVolume as error:
        return Eligibility("volume", "several", "one array of images", f"{error}.".capitalize())
    refused = check_pixels(volume, manifest)
    return refused if refused is not None else prepare(volume, bundle)
