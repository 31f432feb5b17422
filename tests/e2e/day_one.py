"""A senior administrator's first day: the twelve first hazards, tried on a whole node.

`make hazards` prints what was tried, what must happen and what was seen. Every try goes through
real peers to a real `vigil serve` with the shipped bundle; what is seen is read from the rows, the
archives and the command line, never assumed.
"""

import contextlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)
from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage, Verification
from rich.console import Console
from rich.table import Table
from sqlalchemy import select

from db.tables import AnalysisRow, StudyRow
from tests.builders import changed, compressed, other_patient, other_pixels, real_size_study
from tests.e2e.hospital import QUIET_S, Hospital, eventually, running, written
from tests.e2e.raw_sender import encoded

OK = 0x0000
REJECTIONS = ("113001", "113037")  # IHE IOCM: for quality reasons, for patient safety


class Differs(Exception):
    """What was seen is not what must be."""


@dataclass(frozen=True, slots=True)
class Hazard:
    number: int
    tried: str
    must: str
    attempt: Callable[[Hospital, Path], str]


@dataclass(frozen=True, slots=True)
class Tried:
    hazard: Hazard
    seen: str
    is_as_it_must: bool


HAZARDS: list[Hazard] = []


def hazard(number: int, tried: str, must: str) -> Callable:
    """Enter an attempt; it returns what was seen, or raises `Differs`."""

    def enter(attempt: Callable[[Hospital, Path], str]) -> Callable[[Hospital, Path], str]:
        HAZARDS.append(Hazard(number, tried, must, attempt))
        return attempt

    return enter


def expect(is_so: bool, seen: str) -> str:
    if not is_so:
        raise Differs(seen)
    return seen


def study_of(seed: int) -> list[Dataset]:
    """A clear head: localiser and 30 slices; a matrix of 256 is enough for what is tried."""
    return real_size_study("plain", seed=seed, matrix=256)


def sent(hospital: Hospital, study: Sequence[Dataset], folder: Path, tenant: str = "north") -> None:
    """By dcmtk, all of it acknowledged with 0x0000."""
    name = f"{study[0].StudyInstanceUID.rpartition('.')[2]}-{len(list(folder.iterdir()))}"
    done = hospital.send(written(study, folder / name), tenant)
    expect(done.returncode == 0, f"the sender was refused (exit {done.returncode})")


def state_of(hospital: Hospital, uid: str) -> str:
    rows = hospital.study_rows(AnalysisRow, uid)
    return rows[0].state if rows else ""


def held(hospital: Hospital, uid: str, tenant: str = "north") -> bool:
    found = hospital.query(
        select(StudyRow.is_held).where(
            StudyRow.study_instance_uid == uid, StudyRow.tenant == tenant
        )
    )
    return bool(found and found[0])


def set_aside(hospital: Hospital, sop_instance_uid: str) -> dict:
    """The one entry of the quarantine with that UID."""
    entries = eventually(lambda: hospital.quarantined(sop_instance_uid))
    expect(len(entries) == 1, f"{len(entries)} entries in the quarantine")
    return entries[0]


def quiet() -> None:
    """Nothing is to happen, so there is no event to wait for."""
    time.sleep(QUIET_S + 3)


def identities(hospital: Hospital, tenant: str, uid: str) -> set[tuple[str, str]]:
    """Patient ID and name on everything that an archive got for a study."""
    return {(one.PatientID, str(one.PatientName)) for one in hospital.received(tenant, uid)}


@hazard(1, "the same study twice", "0x0000, one result, no new inference")
def the_same_again(hospital: Hospital, folder: Path) -> str:
    study = study_of(101)
    uid = study[0].StudyInstanceUID
    sent(hospital, study, folder)
    first = hospital.outcome(uid)
    sent(hospital, study, folder)
    quiet()
    after = hospital.outcome(uid)
    n = len(hospital.results(uid))
    return expect(
        after.row_version == first.row_version and n == 1 and len(hospital.stored(uid)) == 31,
        f"{after.state}, {n} result, {len(hospital.stored(uid))} instances, "
        f"{after.row_version - first.row_version} changes",
    )


@hazard(
    2,
    "a known SOP Instance UID with other pixels; then one in another encoding",
    "the first stays, the newcomer is set aside, the study is held; the other is a variant",
)
def other_pixels_under_a_known_uid(hospital: Hospital, folder: Path) -> str:
    study = study_of(102)
    uid, one = study[0].StudyInstanceUID, study[9]
    sent(hospital, study, folder)
    hospital.outcome(uid)
    rle = compressed(study[5])
    expect(hospital.store(rle, encoded(rle)) == OK, "the variant was refused")
    quiet()
    expect(not hospital.quarantined(rle.SOPInstanceUID), "the variant was set aside")
    expect(not held(hospital, uid), "the variant holds its study")
    twin = other_pixels(one)
    expect(hospital.store(twin, encoded(twin)) == OK, "the newcomer was refused")
    entry = set_aside(hospital, one.SOPInstanceUID)
    is_held = eventually(lambda: held(hospital, uid))
    hospital.vigil("quarantine", "discard", entry["id"])
    goes_on = eventually(lambda: not held(hospital, uid))
    return expect(
        entry["code"] == "identity_conflict" and is_held and goes_on,
        f"variant filed; newcomer set aside ({entry['code']}), study held until discarded",
    )


@hazard(
    3,
    "a known study's UIDs with another patient's name and ID, after its result is out",
    "set aside, held, nothing of the intruder goes out; the result can be withdrawn",
)
def an_intruder(hospital: Hospital, folder: Path) -> str:
    study = study_of(103)
    uid = study[0].StudyInstanceUID
    own = (study[0].PatientID, str(study[0].PatientName))
    sent(hospital, study, folder)
    hospital.outcome(uid)
    (twin,) = other_patient([study[9]])
    expect(hospital.store(twin, encoded(twin)) == OK, "the intruder was refused")
    entry = set_aside(hospital, twin.SOPInstanceUID)
    is_held = eventually(lambda: held(hospital, uid))
    quiet()
    expect(identities(hospital, "north", uid) == {own}, "another identity is in the archive")
    out = {one.SOPInstanceUID for one in hospital.received("north", uid)}
    hospital.vigil("withdraw", uid, "--yes")
    note = eventually(lambda: rejection(hospital, uid))
    rejected = referenced(note)
    return expect(
        is_held and entry["code"] == "identity_conflict" and rejected == out,
        f"set aside ({entry['code']}), held; note rejects {len(rejected)} of {len(out)} objects",
    )


def rejection(hospital: Hospital, uid: str) -> Dataset | None:
    """The note that takes results back (IHE IOCM), once the archive has it."""
    found = [
        one
        for one in hospital.received("north", uid)
        if one.Modality == "KO" and one.ConceptNameCodeSequence[0].CodeValue in REJECTIONS
    ]
    return found[0] if found else None


def referenced(note: Dataset) -> set[str]:
    return {
        item.ReferencedSOPInstanceUID
        for study in note.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }


@hazard(4, "one Study UID from two tenants, two patients", "two results, each in its own archive")
def two_tenants(hospital: Hospital, folder: Path) -> str:
    study = study_of(104)
    other = changed(study, PatientID="SOUTH-1", PatientName="SOUTH^PATIENT")
    uid = study[0].StudyInstanceUID
    sent(hospital, study, folder, "north")
    sent(hospital, other, folder, "south")
    states = [hospital.outcome(uid, tenant).state for tenant in ("north", "south")]
    ids = [{who for who, _ in identities(hospital, t, uid)} for t in ("north", "south")]
    return expect(
        ids == [{study[0].PatientID}, {"SOUTH-1"}] and states == ["DELIVERED"] * 2,
        f"{' and '.join(states)}; each archive has its own patient only: "
        f"{ids[0] == {study[0].PatientID} and ids[1] == {'SOUTH-1'}}",
    )


@hazard(5, "a second patient inside a study", "the newcomer is set aside, no merged result")
def a_second_patient(hospital: Hospital, folder: Path) -> str:
    study = study_of(105)
    uid = study[0].StudyInstanceUID
    (stranger,) = other_patient([study[9]])
    stranger.SOPInstanceUID = stranger.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    sent(hospital, study[:20], folder)
    eventually(lambda: hospital.stored(uid))
    expect(hospital.store(stranger, encoded(stranger)) == OK, "the stranger was refused")
    entry = set_aside(hospital, stranger.SOPInstanceUID)
    sent(hospital, study[20:], folder)
    eventually(lambda: len(hospital.stored(uid)) == 31)
    hospital.vigil("quarantine", "discard", entry["id"])
    analysis = hospital.outcome(uid)
    (result,) = hospital.results(uid)
    own = (study[0].PatientID, str(study[0].PatientName))
    return expect(
        identities(hospital, "north", uid) == {own} and len(result.finding["images"]) == 30,
        f"set aside ({entry['code']}); after discarding {analysis.state} for the first patient",
    )


@hazard(
    6,
    "one SOP UID in two series; a header that names another UID than the command",
    "both are set aside",
)
def uids_that_disagree(hospital: Hospital, folder: Path) -> str:
    study = study_of(106)
    uid = study[0].StudyInstanceUID
    sent(hospital, study, folder)
    hospital.outcome(uid)
    moved, lying = changed([study[9], study[10]])
    moved.SeriesInstanceUID = generate_uid()
    expect(hospital.store(moved, encoded(moved)) == OK, "the moved one was refused")
    body, said = encoded(lying), lying.SOPInstanceUID
    lying.SOPInstanceUID = generate_uid()
    expect(hospital.store(lying, body) == OK, "the lying one was refused")
    entries = [set_aside(hospital, one) for one in (moved.SOPInstanceUID, said)]
    for entry in entries:
        hospital.vigil("quarantine", "discard", entry["id"])
    codes = [entry["code"] for entry in entries]
    return expect(
        codes == ["identity_conflict", "uid_mismatch"] and len(hospital.stored(uid)) == 31,
        f"set aside: {', '.join(codes)}",
    )


@hazard(
    7,
    "two studies without Patient ID; an image of one comes under another name",
    "two identities, kept apart; the image is set aside",
)
def blank_ids(hospital: Hospital, folder: Path) -> str:
    study = changed(study_of(107), PatientID="")
    uid = study[0].StudyInstanceUID
    other = changed(study_of(1007), PatientID="", PatientName="OTHER^BLANK")
    sent(hospital, study, folder)
    sent(hospital, other, folder)
    ends = [hospital.outcome(one[0].StudyInstanceUID).state for one in (study, other)]
    ids = [identities(hospital, "north", one[0].StudyInstanceUID) for one in (study, other)]
    (late,) = changed([study[9]], IssuerOfPatientID="ELSEWHERE", PatientName="LATE^BLANK")
    late.SOPInstanceUID = late.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    expect(hospital.store(late, encoded(late)) == OK, "the late one was refused")
    entry = set_aside(hospital, late.SOPInstanceUID)
    hospital.vigil("quarantine", "discard", entry["id"])
    return expect(
        all(len(one) == 1 for one in ids) and ids[0] != ids[1] and len(hospital.stored(uid)) == 31,
        f"{' and '.join(ends)} under two identities; the third set aside ({entry['code']})",
    )


@hazard(
    8,
    "a conflict between the result and its sending (the archive is down meanwhile)",
    "nothing is sent while held; after the decision all of it, once",
)
def held_before_sending(hospital: Hospital, folder: Path) -> str:
    study = study_of(108)
    uid = study[0].StudyInstanceUID
    with hospital.archives["north"].down():
        sent(hospital, study, folder)
        eventually(lambda: hospital.results(uid) and state_of(hospital, uid) == "BUILT")
        (twin,) = other_patient([study[9]])
        expect(hospital.store(twin, encoded(twin)) == OK, "the newcomer was refused")
        entry = set_aside(hospital, twin.SOPInstanceUID)
        eventually(lambda: held(hospital, uid))
    quiet()
    while_held = len(hospital.received("north", uid))
    hospital.vigil("quarantine", "discard", entry["id"])
    state = hospital.outcome(uid).state
    arrived = [one.SOPInstanceUID for one in hospital.received("north", uid)]
    return expect(
        while_held == 0 and arrived and len(arrived) == len(set(arrived)),
        f"{while_held} objects while held; afterwards {state}, {len(arrived)} objects, once each",
    )


NAMES = {  # PS3.5 annexes H, I, J, K and 6.1.2.5.3
    ("ISO 2022 IR 6", "ISO 2022 IR 87"): "Yamada^Tarou=山田^太郎",
    ("", "ISO 2022 IR 149"): "Hong^Gildong=洪^吉洞",
    ("GB18030",): "Wang^XiaoDong=王^小东",
    ("ISO_IR 192",): "Müller^Žofie=王^小东",
    ("ISO_IR 144",): "Люкceмбypг^Иван",
    ("ISO_IR 127",): "قباني^لنزار",
}


@hazard(9, "names in six character sets", "result objects carry the same characters")
def names(hospital: Hospital, folder: Path) -> str:
    kept = {}
    for number, (charset, name) in enumerate(NAMES.items()):
        study = changed(
            study_of(1090 + number), SpecificCharacterSet=list(charset), PatientName=name
        )
        uid = study[0].StudyInstanceUID
        sent(hospital, study, folder)
        hospital.outcome(uid)
        source = pydicom.dcmread(written(study[:1], folder / f"source-{number}")[0])
        kept[charset] = {str(one.PatientName) for one in hospital.received("north", uid)} == {
            str(source.PatientName)
        }
    n = sum(kept.values())
    return expect(n == len(NAMES), f"{n} of {len(NAMES)} names came back as they were")


@hazard(
    10,
    "UIDs of 70 characters, with letters, `../`, `/etc/passwd`; padded with NUL",
    "never part of a path; a stated outcome for each",
)
def uids_that_cannot_be(hospital: Hospital, folder: Path) -> str:
    hostile = ["1." + "2" * 68, "1.2.abc", "../../../etc/passwd", "/etc/passwd"]
    image, padded = study_of(110)[3], study_of(1010)[3]
    for uid in hostile:
        with pydicom.config.disable_value_validation(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that is what is tried
            (bad,) = changed([image], StudyInstanceUID=uid, SOPInstanceUID=generate_uid())
            answer = hospital.store(bad, encoded(bad))
        expect(answer == OK, f"answered {answer:#06x}")
        set_aside(hospital, bad.SOPInstanceUID)
    expect(hospital.store(padded, encoded(padded)) == OK, "the padded one was refused")
    filed = eventually(lambda: hospital.stored(padded.StudyInstanceUID))
    strays = list((hospital.folder / "var").rglob("*passwd*"))
    return expect(not strays and len(filed) == 1, f"{len(hostile)} set aside, the padded one filed")


@hazard(
    11,
    "C-ECHO while idle associations hold every storage slot, and while the database is stopped",
    "success",
)
def echoes(hospital: Hospital, folder: Path) -> str:
    scanner = AE(ae_title="NORTH_CT")
    scanner.add_requested_context(CTImageStorage)
    with contextlib.ExitStack() as stack:
        lines = [
            scanner.associate("127.0.0.1", hospital.port, ae_title="NORTH_AI")
            for _ in range(60)  # more than scp.max_associations
        ]
        for line in lines:
            stack.callback(line.release)
        expect(not all(line.is_established for line in lines), "no limit was reached")
        while_full = echo(hospital)
    with hospital.database_stopped():
        while_down = echo(hospital)
    return expect(while_full and while_down, f"full: {while_full}, database down: {while_down}")


def echo(hospital: Hospital) -> bool:
    scanner = AE(ae_title="NORTH_CT")
    scanner.add_requested_context(Verification)
    line = scanner.associate("127.0.0.1", hospital.port, ae_title="NORTH_AI")
    if not line.is_established:
        return False
    answer = line.send_c_echo()
    line.release()
    return answer.get("Status") == OK


SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
    JPEG2000Lossless,
)


@hazard(
    12,
    "one series whose images are in six transfer syntaxes, and the same as plain",
    "accepted as they are, decoded, one result with the same probabilities",
)
def encodings(hospital: Hospital, folder: Path) -> str:
    plain = study_of(112)
    mixed = changed(plain, StudyInstanceUID=generate_uid())
    for one in mixed:
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    mixed = [in_syntax(one, SYNTAXES[number % 6]) for number, one in enumerate(mixed)]
    sent(hospital, plain, folder)
    statuses = {hospital.store(one, encoded(one)) for one in mixed}
    expect(statuses == {OK}, f"answered {statuses}")
    scores = []
    for study in (plain, mixed):
        uid = study[0].StudyInstanceUID
        hospital.outcome(uid)
        (result,) = hospital.results(uid)
        scores.append([label["probability"] for label in result.finding["labels"]])
    kept = {str(one.file_meta.TransferSyntaxUID) for one in mixed}
    words = "equal" if scores[0] == scores[1] else "differ"
    return expect(scores[0] == scores[1], f"{len(kept)} syntaxes stored; probabilities {words}")


def in_syntax(image: Dataset, syntax: UID) -> Dataset:
    if syntax.is_compressed and syntax != DeflatedExplicitVRLittleEndian:
        return compressed(image, syntax)
    (twin,) = changed([image])
    if not syntax.is_little_endian:
        pixels = np.frombuffer(twin.PixelData, "<u2").astype(">u2")
        twin.PixelData = pixels.tobytes()
    twin.file_meta.TransferSyntaxUID = syntax
    return twin


def main(numbers: Sequence[str]) -> int:
    """Try those hazards, or all; 0 if each was as it must be."""
    console = Console()
    wanted = [one for one in HAZARDS if not numbers or str(one.number) in numbers]
    console.print("A node and three archives start; what is tried then takes some minutes.")
    with tempfile.TemporaryDirectory() as name, running(Path(name)) as hospital:
        done = [tried(one, hospital, Path(name), console) for one in wanted]
    table = Table("", "tried", "must", "seen", title="Day one", show_lines=True)
    for column in table.columns:
        column.overflow = "fold"  # an identifier cut off says nothing
    for one in done:
        mark = "[green]as it must[/]" if one.is_as_it_must else "[red]DIFFERS[/]"
        hazard = one.hazard
        table.add_row(f"H{hazard.number}\n{mark}", hazard.tried, hazard.must, one.seen)
    console.print(table)
    return 0 if all(one.is_as_it_must for one in done) else 1


def tried(hazard: Hazard, hospital: Hospital, folder: Path, console: Console) -> Tried:
    console.log(f"H{hazard.number}: {hazard.tried}")
    own = folder / f"h{hazard.number}"
    own.mkdir()
    try:
        return Tried(hazard, hazard.attempt(hospital, own), True)
    except (Differs, AssertionError) as error:  # what did not happen in time is seen, too
        return Tried(hazard, str(error) or "it did not happen in time", False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
