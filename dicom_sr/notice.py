"""A notice to its DICOM object: one page that says that there is no result, and nothing else."""

from dataclasses import dataclass

from pydicom import Dataset

from db.notices import Notice
from db.result import ModelIdentity, OutputSpec
from dicom_sr import capture, evidence, notice_page
from dicom_sr.build import BuiltObject, written
from dicom_sr.plan import NOT_PROCESSED, NOT_SENT, SUMMARY, Context, Issue, Variant
from dicom_sr.times import minute


@dataclass(frozen=True)
class NoticePlan(Issue):
    """One notice as one destination gets it."""

    notice: Notice

    @property
    def uuid(self) -> str:
        return self.notice.notice_uuid

    @property
    def started_at(self) -> str:
        return self.notice.ended_at

    @property
    def model(self) -> ModelIdentity:
        return self.notice.model

    @property
    def output(self) -> OutputSpec:
        return self.notice.output

    @property
    def contribution(self) -> str:
        if self.notice.has_numbers:
            return "AI analysis of the source images; its result is not in this object"
        return "None: the AI did not process the images"

    @property
    def earlier_result(self) -> str:
        """When the result began that the peer still has, in words; empty where it has none."""
        old = self.variant.earlier_result
        return minute(self.local(old)) if old else ""

    @property
    def _replaced_words(self) -> str:
        """A notice takes the place of a notice; a result still says what it said of its images."""
        return super()._replaced_words if self.variant.replaced_notice else ""


def build_notice(
    notice: Notice, header: Dataset, context: Context, variant: Variant
) -> BuiltObject:
    """The page; `header` is of any instance of the study. The same input gives the same bytes."""
    plan = NoticePlan(
        context=context,
        variant=variant,
        study_instance_uid=str(header.StudyInstanceUID),
        zone=evidence.zone_of(header, context.zone),
        notice=notice,
    )
    page = notice_page.draw(_said(plan))
    uid = plan.uid(SUMMARY)
    built = capture.captured(plan, header, page, SUMMARY, uid, 1, plan.output.summary_series)
    built.PatientOrientation = None  # 2C, and a page has none
    what = "AI result not sent" if notice.has_numbers else "AI did not process this study"
    built.DerivationDescription = f"{what}; not for primary diagnosis"
    return written(SUMMARY, 1, built)


def _said(plan: NoticePlan) -> notice_page.Said:
    notice, model = plan.notice, plan.model
    return notice_page.Said(
        qualification=plan.variant.content_qualification,
        title=plan.output.title,
        verdict=verdict(notice),
        reason=_reason(notice),
        revision=plan.revision_words,
        earlier_result=plan.earlier_result,
        unsent_result=notice_page.UNSENT if plan.variant.has_unsent else "",
        made_by=(
            f"{plan.output.algorithm} {model.version}   weights {model.weights_sha256[:12]}   "
            f"node {plan.context.node_version}"
        ),
        ended=minute(plan.started),
        disclaimer=plan.output.disclaimer,
    )


def verdict(notice: Notice) -> str:
    """What a notice says in one word."""
    return NOT_SENT if notice.has_numbers else NOT_PROCESSED


def _reason(notice: Notice) -> str:
    """For a radiologist: of a failure its code is enough, for whoever is called about it."""
    if notice.has_numbers:
        return f"The AI's result could not be prepared for sending ({notice.code})."
    if notice.is_failure:
        return f"The analysis failed for a technical reason ({notice.code})."
    return notice.reason
