"""What one destination gets of one result: which objects, under which numbers and UIDs."""

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

from pydicom.uid import Comprehensive3DSRStorage, ComprehensiveSRStorage, EnhancedSRStorage

from config.tenants import Destination, Tenant
from db.result import Finding, ImageRef, KeyImage, LabelResult
from dicom_sr import uids

MANUFACTURER = "Vigil"
MODEL_NAME = "vigil"

SUMMARY, OVERLAY, MAP, REPORT, KEYS = "summary", "overlay", "pm", "sr", "ko"
#: Last part of the Series Number; also the roles there are.
SERIES_DIGIT = {SUMMARY: 1, OVERLAY: 2, REPORT: 3, KEYS: 4, MAP: 5}
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
    started_at: str  # ISO 8601 UTC, when the replaced analysis began


@dataclass(frozen=True, slots=True)
class Variant:
    """Everything that differs between destinations; two that agree share the same objects."""

    series_base: int = 9900  # of this bundle at this tenant
    sr_classes: tuple[str, ...] = (SR_CLASSES["3d"],)  # one is sent: the first the peer accepts
    roles: tuple[str, ...] = (SUMMARY, OVERLAY, REPORT, KEYS)
    emit_negative: str = "sr+summary"
    k: int | None = None  # overlays at most; None: every key image
    is_rle: bool = False
    anchors_groups: bool = True  # a whole-image SCOORD in each label group, for OHIF
    content_qualification: str = "RESEARCH"
    predecessors: tuple[ReportReference, ...] = ()

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
        predecessors: Sequence[ReportReference] = (),
    ) -> "Variant":
        """What the configuration asks for."""
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
            anchors_groups=destination.sr_anchor_groups,
            content_qualification=destination.content_qualification,
            predecessors=tuple(predecessors),
        )


@dataclass(frozen=True, slots=True)
class Context:
    """What a result does not know of itself: whose it is, and which node speaks."""

    tenant: str
    result_no: int  # 1, 2, ...: REVISION n from the second on
    node_version: str
    node_serial: str
    zone: dt.tzinfo = field(default=dt.UTC)  # for sources that do not state their own


@dataclass(frozen=True)
class Plan:
    """One result as one destination gets it; everything here follows from the arguments."""

    finding: Finding
    context: Context
    variant: Variant
    study_instance_uid: str
    zone: dt.tzinfo  # of every date and time written

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
    def device_uid(self) -> str:
        return uids.device_uid(self.finding.model, self.finding.output.algorithm)

    @cached_property
    def _result(self) -> str:
        return uids.result_id(self.context.tenant, self.finding.result_uuid)

    def uid(self, role: str, *parts: str) -> str:
        return uids.object_uid(self._result, role, self.variant.key, *parts)

    def series_uid(self, role: str) -> str:
        return self.uid(f"series/{role}")

    def overlay_uid(self, image: ImageRef) -> str:
        return self.uid(f"overlay/{image.sop_instance_uid}", *frame_parts(image))

    def track(self, what: str) -> str:
        model = self.finding.model
        return uids.tracking_uid(self.context.tenant, model.bundle, self.study_instance_uid, what)

    def track_region(self, image: ImageRef) -> str:
        return self.track("|".join(("roi", image.sop_instance_uid, *frame_parts(image))))

    def series_number(self, role: str) -> int:
        revision = SERIES_STEP_REVISION * (self.context.result_no - 1)
        return self.variant.series_base + revision + SERIES_DIGIT[role]

    def image(self, key: KeyImage) -> ImageRef:
        return self.finding.images[key.image]

    def label(self, key: KeyImage) -> LabelResult:
        """The label whose heat map a key image shows."""
        return next(label for label in self.finding.labels if label.label == key.label)

    @cached_property
    def started(self) -> dt.datetime:
        return parse_time(self.finding.started_at).astimezone(self.zone)

    @property
    def revision_words(self) -> str:
        """Empty for a first result."""
        if self.context.result_no == 1:
            return ""
        words = f"REVISION {self.context.result_no}"
        if not self.variant.predecessors:
            return words
        replaced = parse_time(self.variant.predecessors[-1].started_at).astimezone(self.zone)
        return f"{words} - replaces AI result of {minute(replaced)}"

    @property
    def partial_words(self) -> str:
        """Empty over a whole series."""
        if not self.finding.is_partial:
            return ""
        n = len(self.finding.images)
        word = self.finding.output.image_word
        return f"PARTIAL - {n} {word if n == 1 else word + 's'}"


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


def image_name(image: ImageRef, index: int, word: str) -> str:
    """What a reader calls the image: `slice 12`, or `frame 3` of a multi-frame instance."""
    if image.frame is not None:
        return f"frame {image.frame}"
    return f"{word} {index + 1 if image.instance_number is None else image.instance_number}"


def parse_time(text: str) -> dt.datetime:
    """ISO 8601 with an offset; without one it is UTC."""
    at = dt.datetime.fromisoformat(text)
    return at if at.tzinfo else at.replace(tzinfo=dt.UTC)


def minute(at: dt.datetime) -> str:
    """To the minute, with its offset: 2026-03-01 14:05 UTC+01:00."""
    return f"{at:%Y-%m-%d %H:%M} {_offset(at)}"


def _offset(at: dt.datetime) -> str:
    minutes = int((at.utcoffset() or dt.timedelta()).total_seconds()) // 60
    if minutes == 0:
        return "UTC"
    sign = "+" if minutes > 0 else "-"
    return f"UTC{sign}{abs(minutes) // 60:02d}:{abs(minutes) % 60:02d}"
