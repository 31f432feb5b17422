"""A withdrawal to its DICOM objects: rejection notes, by which an archive hides what they name.

Key Object Selection Documents (PS3.3 A.35.4, TID 2010) whose title says why, as IHE's Imaging
Object Change Management has it. One for each result, for it names the patient whom that named.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import highdicom as hd
from pydicom import Dataset

from db.result import Code, ModelIdentity, OutputSpec, SentObject
from db.study import WithdrawalReason
from db.withdrawals import Withdrawal
from dicom_sr import evidence, key_objects, report
from dicom_sr.build import BuiltObject, written
from dicom_sr.plan import MAP, OVERLAY, REJECTION, SUMMARY, Context, Issue, Variant

#: Of CID 7010.
TITLES = {
    WithdrawalReason.PATIENT_SAFETY: Code("113037", "DCM", "Rejected for Patient Safety Reasons"),
    WithdrawalReason.QUALITY: Code("113001", "DCM", "Rejected for Quality Reasons"),
}
TITLE_MODIFIER = Code("113011", "DCM", "Document Title Modifier")
#: TID 2010 wants one of CID 7011 beside "Quality Reasons"; most speak of how an image was taken.
OTHER_FAILURE = Code("111220", "DCM", "Other failure")
_IMAGES = frozenset({SUMMARY, OVERLAY, MAP})


@dataclass(frozen=True)
class RejectionPlan(Issue):
    """One withdrawal as one destination gets it."""

    withdrawal: Withdrawal

    @property
    def uuid(self) -> str:
        return self.withdrawal.withdrawal_uuid

    @property
    def started_at(self) -> str:
        return self.withdrawal.withdrawn_at

    @property
    def model(self) -> ModelIdentity:
        return self.withdrawal.model

    @property
    def output(self) -> OutputSpec:
        return self.withdrawal.output

    @property
    def contribution(self) -> str:
        return "None: an operator withdraws results of the algorithm"


def build_rejections(
    withdrawal: Withdrawal, headers: Mapping[str, Dataset], context: Context, variant: Variant
) -> list[BuiltObject]:
    """A note for each result of which the peer has something; the same input, the same bytes.

    What may never have arrived stands in notes of its own, sent last: an archive may refuse a note
    as a whole because it does not know one of its instances.

    headers : of any object of each result, by its id
    """
    built = []
    for seq, objects in enumerate(_groups(variant.rejects), 1):
        header = headers[objects[0].result_id]
        plan = RejectionPlan(
            context=context,
            variant=variant,
            study_instance_uid=str(header.StudyInstanceUID),
            zone=evidence.zone_of(header, context.zone),
            withdrawal=withdrawal,
        )
        built.append(written(REJECTION, seq, _note(plan, header, objects, seq)))
    return built


def _groups(rejects: Sequence[SentObject]) -> Iterator[list[SentObject]]:
    results = dict.fromkeys(one.result_id for one in rejects)
    for is_certain in (True, False):
        for result_id in results:
            if group := [
                one for one in rejects if (one.result_id, one.is_certain) == (result_id, is_certain)
            ]:
                yield group


def _note(
    plan: RejectionPlan, header: Dataset, objects: Sequence[SentObject], number: int
) -> Dataset:
    rejected = [_instance(plan, one) for one in objects]
    first = objects[0]
    tree = hd.ko.KeyObjectSelection(
        document_title=evidence.coded(TITLES[plan.withdrawal.reason]),
        referenced_objects=rejected,
        observer_device_context=report.observer(plan),
        description=_words(plan, is_certain=first.is_certain),
    )
    if plan.withdrawal.reason is WithdrawalReason.QUALITY:
        tree[0].ContentSequence.insert(0, _modifier())
    built: Dataset = hd.ko.KeyObjectSelectionDocument(
        evidence=[evidence.carrier(header), *rejected],
        content=tree,
        sop_instance_uid=plan.uid(REJECTION, first.result_id, str(first.is_certain)),
        instance_number=number,
        **evidence.series_values(plan, REJECTION, f"{plan.output.short_name} results withdrawn"),
    )
    key_objects.tidy(built)
    evidence.keep_evidence(built, rejected)
    evidence.stamp(built, plan, header)
    return built


def _instance(plan: RejectionPlan, one: SentObject) -> Dataset:
    item = evidence.identified(
        plan.study_instance_uid, one.series_instance_uid, one.sop_class_uid, one.sop_instance_uid
    )
    return key_objects.as_image(item) if one.role in _IMAGES else item


def _modifier() -> hd.sr.CodeContentItem:
    return hd.sr.CodeContentItem(
        name=evidence.coded(TITLE_MODIFIER),
        value=evidence.coded(OTHER_FAILURE),
        relationship_type=hd.sr.RelationshipTypeValues.HAS_CONCEPT_MOD,
    )


def _words(plan: RejectionPlan, *, is_certain: bool) -> str:
    what = "withdrawn" if is_certain else "withdrawn; it is not known whether this arrived"
    words = plan.withdrawal.words
    return f"{plan.output.short_name} result {what}. {words}".strip()
