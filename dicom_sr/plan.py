"""What one destination gets of one result: which objects, under which numbers and UIDs."""

import datetime as dt
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from functools import cached_property

from pydicom.uid import (
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
)

from config.tenants import Destination, Tenant
from db.result import (
    Finding,
    ImageRef,
    KeyImage,
    LabelResult,
    ModelIdentity,
    OutputSpec,
    SentObject,
)
from dicom_sr import uids
from dicom_sr.times import minute, parse_time

#: What a notice says in one word: no numbers, or none that could be sent.
NOT_PROCESSED, NOT_SENT = "AI NOT PROCESSED", "AI RESULT NOT SENT"

MANUFACTURER = "Vigil"
MODEL_NAME = "vigil"

SUMMARY, OVERLAY, MAP, REPORT, KEYS = "summary", "overlay", "pm", "sr", "ko"
REJECTION = "rejection"
#: Last part of the Series Number; also the roles there are. A withdrawal has a number of its own,
#: and no key images.
SERIES_DIGIT = {SUMMARY: 1, OVERLAY: 2, REPORT: 3, KEYS: 4, REJECTION: 4, MAP: 5}
#: Which roles may leave when nothing was found.
NEGATIVE_ROLES = {
    "none": frozenset[str](),
    "sr": frozenset({REPORT}),
    "sr+summary": frozenset({REPORT, SUMMARY}),
}
#: In the order of preference of `auto`.
SR_CLASSES = {
    "3d": str(Comprehensive3DSRStorage),
    "comprehensive": str(ComprehensiveSRStorage),
    "enhanced": str(EnhancedSRStorage),
}
#: Room for ten revisions of one bundle, and for the bundles of a tenant beside each other.
SERIES_STEP_REVISION, SERIES_STEP_BUNDLE = 10, 100


@dataclass(frozen=True, slots=True)
class ReportReference:
    """A report that a destination accepted earlier, and that a new one replaces."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str


@dataclass(frozen=True, slots=True)
class Variant:
    """Everything that differs between destinations; two that agree share the same objects."""

    series_base: int = 9900  # of this bundle at this tenant
    sr_classes: tuple[str, ...] = (SR_CLASSES["3d"],)  # one is sent: the first the peer accepts
    roles: tuple[str, ...] = (SUMMARY, OVERLAY, REPORT, KEYS)
    emit_negative: str = "sr+summary"
    k: int | None = None  # overlays at most; None: every key image
    is_rle: bool = False
    is_stacked: bool = False  # overlays as frames of one object, where they have one matrix
    anchors_groups: bool = True  # a whole-image SCOORD in each label group, for OHIF
    content_qualification: str = "RESEARCH"
    predecessors: tuple[ReportReference, ...] = ()
    # What the peer has accepted of this analysis before, in ISO 8601 UTC, and "" where nothing:
    earlier_result: str = ""  # when its newest result began, whatever objects of it the peer has
    replaced_notice: str = ""  # when its notice was drawn, if that is newer than any result
    replaced_verdict: str = NOT_PROCESSED  # what that notice said
    has_unsent: bool = False  # of a notice: there is a newer result, which the peer does not have
    withdrawn_result: str = ""  # when the newest began that was taken back, if nothing followed it
    rejects: tuple[SentObject, ...] = ()  # of a withdrawal: what the peer has, or may have

    @property
    def key(self) -> str:
        """Part of every UID: other bytes never share a SOP Instance UID."""
        return uids.digest(json.dumps(asdict(self), sort_keys=True))

    @classmethod
    def of(
        cls,
        destination: Destination,
        tenant: Tenant,
        bundle: str,
    ) -> "Variant":
        """What the configuration asks for, of a first result."""
        known = (*tenant.models, *tenant.shadow)
        index = known.index(bundle) if bundle in known else len(known)
        wanted = destination.sr_sop_class
        send = destination.send
        flags = {
            SUMMARY: send.summary,
            OVERLAY: send.overlay,
            MAP: send.pm,
            REPORT: send.sr,
            KEYS: send.kos,
        }
        return cls(
            series_base=destination.series_base + SERIES_STEP_BUNDLE * index,
            sr_classes=tuple(SR_CLASSES.values()) if wanted == "auto" else (SR_CLASSES[wanted],),
            roles=tuple(role for role, is_on in flags.items() if is_on),
            emit_negative=destination.emit_negative or tenant.emit_negative,
            k=destination.k,
            is_rle=destination.sc_compress == "rle",
            is_stacked=send.mfsc,
            anchors_groups=destination.sr_anchor_groups,
            content_qualification=destination.content_qualification,
        )


@dataclass(frozen=True, slots=True)
class Picture:
    """An overlay, as other objects refer to it."""

    sop_class_uid: str
    sop_instance_uid: str
    frame: int | None = None  # from 1, in a multi-frame object


@dataclass(frozen=True, slots=True)
class Context:
    """What a result does not know of itself: whose it is, and which node speaks."""

    tenant: str
    result_no: int  # 1, 2, ...: the n of REVISION n, for a peer that has an earlier one
    node_version: str
    node_serial: str
    zone: dt.tzinfo = field(default=dt.UTC)  # for sources that do not state their own


@dataclass(frozen=True)
class Issue(ABC):
    """What one destination gets of a result, of a notice that there is none, or of a withdrawal."""

    context: Context
    variant: Variant
    study_instance_uid: str
    zone: dt.tzinfo  # of every date and time written

    @property
    @abstractmethod
    def uuid(self) -> str:
        """Drawn when what is issued was stored first; every UID follows from it."""

    @property
    @abstractmethod
    def started_at(self) -> str:
        """ISO 8601 UTC."""

    @property
    @abstractmethod
    def model(self) -> ModelIdentity: ...

    @property
    @abstractmethod
    def output(self) -> OutputSpec: ...

    @property
    @abstractmethod
    def contribution(self) -> str:
        """What the algorithm did."""

    @cached_property
    def device_uid(self) -> str:
        return uids.device_uid(self.model, self.output.algorithm)

    @cached_property
    def _result(self) -> str:
        return uids.result_id(self.context.tenant, self.uuid)

    def uid(self, role: str, *parts: str) -> str:
        return uids.object_uid(self._result, role, self.variant.key, *parts)

    def series_uid(self, role: str) -> str:
        return self.uid(f"series/{role}")

    def series_number(self, role: str) -> int:
        revision = SERIES_STEP_REVISION * (self.context.result_no - 1)
        return self.variant.series_base + revision + SERIES_DIGIT[role]

    @cached_property
    def started(self) -> dt.datetime:
        return self.local(self.started_at)

    def local(self, text: str) -> dt.datetime:
        """A stored time in the zone of this study."""
        return parse_time(text).astimezone(self.zone)

    @property
    def revision_words(self) -> str:
        """Empty for the first that this peer gets; it may be the third that was issued."""
        words = f"REVISION {self.context.result_no}"
        if not (self.variant.earlier_result or self.variant.replaced_notice):
            old = self.variant.withdrawn_result
            return f"{words} - AI result of {minute(self.local(old))} withdrawn" if old else ""
        replaced = self._replaced_words
        return f"{words} - replaces {replaced}" if replaced else words

    @property
    def _replaced_words(self) -> str:
        old = self.variant
        if old.replaced_notice:
            return f"{old.replaced_verdict} of {minute(self.local(old.replaced_notice))}"
        return f"AI result of {minute(self.local(old.earlier_result))}"


@dataclass(frozen=True)
class Plan(Issue):
    """One result as one destination gets it; everything here follows from the arguments."""

    finding: Finding

    @property
    def uuid(self) -> str:
        return self.finding.result_uuid

    @property
    def started_at(self) -> str:
        return self.finding.started_at

    @property
    def model(self) -> ModelIdentity:
        return self.finding.model

    @property
    def output(self) -> OutputSpec:
        return self.finding.output

    @property
    def contribution(self) -> str:
        return "AI analysis of the source images"

    @cached_property
    def roles(self) -> frozenset[str]:
        return roles_of(self.finding, self.variant)

    @cached_property
    def key_images(self) -> tuple[KeyImage, ...]:
        """At most `k` of them, the strongest, in order along the normal."""
        keys = self.finding.key_images if self.finding.is_positive else ()
        if self.variant.k is None or len(keys) <= self.variant.k:
            return keys
        chosen = sorted(keys, key=lambda key: key.raw, reverse=True)[: self.variant.k]
        return tuple(key for key in keys if key in chosen)

    @cached_property
    def is_stacked(self) -> bool:
        """Whether the overlays are frames of one object: they have one matrix, and it is asked."""
        matrices = {(self.image(key).rows, self.image(key).columns) for key in self.key_images}
        return self.variant.is_stacked and len(matrices) == 1

    @cached_property
    def pictures(self) -> tuple[Picture, ...]:
        """Where the overlay of each of `key_images` is found; none where none is wanted."""
        if OVERLAY not in self.roles:
            return ()
        if self.is_stacked:
            stack = str(MultiFrameTrueColorSecondaryCaptureImageStorage), self.uid("mfsc")
            return tuple(Picture(*stack, n) for n in range(1, len(self.key_images) + 1))
        single = str(SecondaryCaptureImageStorage)
        return tuple(Picture(single, self._overlay_uid(self.image(k))) for k in self.key_images)

    def _overlay_uid(self, image: ImageRef) -> str:
        return self.uid(f"overlay/{image.sop_instance_uid}", *frame_parts(image))

    def track(self, what: str) -> str:
        bundle = self.model.bundle
        return uids.tracking_uid(self.context.tenant, bundle, self.study_instance_uid, what)

    def track_region(self, image: ImageRef) -> str:
        return self.track("|".join(("roi", image.sop_instance_uid, *frame_parts(image))))

    def image(self, key: KeyImage) -> ImageRef:
        return self.finding.images[key.image]

    def label(self, key: KeyImage) -> LabelResult:
        """The label whose heat map a key image shows."""
        return next(label for label in self.finding.labels if label.label == key.label)


def roles_of(finding: Finding, variant: Variant) -> frozenset[str]:
    """Which kinds of object a destination gets; it may be none."""
    wanted = frozenset(variant.roles)
    if not finding.is_positive:
        return wanted & NEGATIVE_ROLES[variant.emit_negative]
    return wanted if finding.key_images else wanted - {OVERLAY, KEYS, MAP}


def needed_images(finding: Finding) -> tuple[int, ...]:
    """Indices of the images whose headers are needed; of the others a reference is enough."""
    tops = (label.top_image for label in finding.labels)
    return tuple(sorted({0, *tops, *(key.image for key in finding.key_images)}))


def frame_parts(image: ImageRef) -> tuple[str, ...]:
    return () if image.frame is None else (str(image.frame),)
