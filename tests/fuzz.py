"""Hostile input, made from real DICOM by seeded mutation: the same seed makes the same bytes.

A `Sample` is a data set as it travels in a C-STORE; a `Case` is what became of one.
"""

import random
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pydicom

from node.phantom import Kind, Phantom, study
from tests.bundles.sources import enhanced, head_series
from tests.encodings import READABLE, series, written_in
from tests.stage import encoded

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
BIG, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
CT = "1.2.840.10008.5.1.4.1.1.2"
# Not by pydicom.data, which asks the network for what the package does not hold.
PYDICOMS_OWN = Path(pydicom.__file__).parent / "data" / "test_files"
#: All that a sender may claim; one of them is nobody's.
SYNTAXES = (*(one.syntax for one in READABLE.values()), "1.2.840.10008.1.2.4.50", "1.2.3.4.5")
_UNDEFINED = 0xFFFFFFFF
_MAX_ELEMENTS = 500  # what is no data set reads as any number
_VRS = (
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO", b"LT", b"OB",
    b"OD", b"OF", b"OL", b"OV", b"OW", b"PN", b"SH", b"SL", b"SQ", b"SS", b"ST", b"SV", b"TM",
    b"UC", b"UI", b"UL", b"UN", b"UR", b"US", b"UT", b"UV", b"\0\0", b"??",
)  # fmt: skip
_LONG_VRS = frozenset(
    {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
)
_LENGTHS = (0, 1, 3, 7, 0xFFFF, 0xFFFE, 2**20, 2**31 - 1, 2**31, _UNDEFINED - 1, _UNDEFINED)
_PROGRAMS = (b"\x7fELF\x02\x01\x01", b"MZ\x90\x00", b"#!/bin/sh\n", b"%PDF-1.7\n", b"PK\x03\x04")


@dataclass(frozen=True, slots=True)
class Sample:
    """A data set without its file header, and under which command it travels."""

    name: str
    sop_class_uid: str
    sop_instance_uid: str
    syntax: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Case(Sample):
    """A sample after `mutations`."""

    mutations: tuple[str, ...] = ()


def samples(real: Path | None = None) -> list[Sample]:
    """pydicom's own test files, what the builders make, and a folder of `real` images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the files are wrong on purpose
        return _samples(real)


def _samples(real: Path | None) -> list[Sample]:
    found = [one for path in sorted(PYDICOMS_OWN.glob("*.dcm")) if (one := _of_file(path))]
    phantom = Phantom(kind=Kind.LESION, slices=4, matrix=256, step_mm=30.0)
    for image in (*study(phantom), enhanced(), *head_series(n=2)):
        found.append(_of_dataset(image, image.get("SeriesDescription", "built")))
    image = series()[8]
    found += [
        _of_bytes(name, *written_in(encoding, image))
        for name, encoding in READABLE.items()
        if encoding.encode is not None or encoding.syntax in (BIG, DEFLATED)
    ]
    if real is not None and real.is_dir():
        found += [one for path in sorted(real.glob("*.dcm"))[::9] if (one := _of_file(path))]
    return found


def _of_file(path: Path) -> Sample | None:
    """A file as it stands, behind its file header; None where it has none, or says too little."""
    try:
        meta = pydicom.filereader.read_file_meta_info(path)
        head = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID"])
        syntax, sop_class = str(meta.TransferSyntaxUID), str(meta.MediaStorageSOPClassUID)
        length = int(meta.FileMetaInformationGroupLength)
    except (pydicom.errors.InvalidDicomError, AttributeError, KeyError, NotImplementedError):
        return None
    uid = str(head.get("SOPInstanceUID", ""))
    return Sample(path.name, sop_class, uid, syntax, path.read_bytes()[144 + length :])


def _of_dataset(dataset: pydicom.Dataset, name: str) -> Sample:
    return _of_bytes(name, dataset, encoded(dataset))


def _of_bytes(name: str, dataset: pydicom.Dataset, body: bytes) -> Sample:
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    return Sample(name, str(dataset.SOPClassUID), str(dataset.SOPInstanceUID), syntax, body)


# --- where the elements are ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Element:
    """A top-level element of a body, as far as it can be followed."""

    tag: int
    start: int
    length_at: int
    length_size: int  # bytes
    value: int  # where it starts
    end: int
    vr: bytes  # empty: implicit


def elements(body: bytes, syntax: str) -> list[Element]:
    """The elements up to the first that cannot be followed; one of undefined length is the last."""
    order = ">" if syntax == BIG else "<"
    found: list[Element] = []
    at = 0
    while at + 8 <= len(body) and len(found) < _MAX_ELEMENTS:
        group, number = struct.unpack_from(order + "HH", body, at)
        vr, size, length_at = b"", 4, at + 4
        if syntax != IMPLICIT:
            vr = body[at + 4 : at + 6]
            size, length_at = (4, at + 8) if vr in _LONG_VRS else (2, at + 6)
        if length_at + size > len(body):
            break
        (length,) = struct.unpack_from(order + ("I" if size == 4 else "H"), body, length_at)
        value = length_at + size
        end = len(body) if length == _UNDEFINED else min(value + length, len(body))
        found.append(Element(group << 16 | number, at, length_at, size, value, end, vr))
        if end <= at:
            break
        at = end
    return found


def _plain(case: Case) -> list[Element]:
    return [] if case.syntax == DEFLATED else elements(case.body, case.syntax)


# --- mutations ----------------------------------------------------------------------------------

Mutation = Callable[[random.Random, Case, Sequence[Sample]], Case]


def flip_bits(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    body = bytearray(case.body)
    # Headers are few bytes among many: half of the flips go there.
    reach = min(len(body), 2000) if rng.random() < 0.5 else len(body)
    for _n in range(rng.choice((1, 2, 8, 64))):
        if reach:
            body[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return replace(case, body=bytes(body))


def cut_off(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    keep = rng.randrange(len(case.body) + 1) if rng.random() < 0.7 else rng.randrange(64)
    return replace(case, body=case.body[:keep])


def insert_bytes(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    return _inserted(rng, case, rng.randbytes(rng.choice((1, 2, 7, 100, 5000))))


def only_noise(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    return replace(case, body=rng.randbytes(rng.choice((1, 100, 4096, 300_000))))


def change_length(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    """A length field that is odd, huge, undefined or off by a little."""
    found = _plain(case)
    if not found:
        return case
    element = rng.choice(found)
    length = rng.choice((*_LENGTHS, element.end - element.value + rng.randint(-3, 3))) & _UNDEFINED
    order = "big" if case.syntax == BIG else "little"
    size = element.length_size
    return _overwritten(
        case, element.length_at, (length & (2 ** (8 * size) - 1)).to_bytes(size, order)
    )


def swap_vr(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    found = [element for element in _plain(case) if element.vr]
    return _overwritten(case, rng.choice(found).start + 4, rng.choice(_VRS)) if found else case


def repeat_element(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    found = _plain(case)
    if not found:
        return case
    element = rng.choice(found)
    return _inserted(rng, case, case.body[element.start : element.end][:200_000])


def shuffle_elements(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    found = _plain(case)
    parts = [case.body[element.start : element.end] for element in found]
    rng.shuffle(parts)
    return replace(case, body=b"".join(parts)) if parts else case


def nest_sequences(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    """Sequences in sequences, 200 to 3,000 deep, of undefined length, some never closed."""
    depth = rng.choice((200, 1000, 3000))
    head = b"\x08\x00\x40\x11" + (b"" if case.syntax == IMPLICIT else b"SQ\0\0") + b"\xff" * 4
    opened = (head + b"\xfe\xff\x00\xe0" + b"\xff" * 4) * depth
    closing = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    return _inserted(rng, case, opened + closing * rng.choice((0, depth // 2, depth)))


def group_length(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    found = _plain(case)
    if not found:
        return case
    group = struct.pack("<HH", rng.choice(found).tag >> 16, 0)
    vr = b"" if case.syntax == IMPLICIT else b"UL\x04\x00"
    value = struct.pack("<I", rng.choice((*_LENGTHS, 40)))
    head = group + (vr or b"\x04\0\0\0") + value
    return _inserted(rng, case, head)


def lie_about_syntax(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    return replace(case, syntax=rng.choice(SYNTAXES))


def extreme_matrix(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    """Rows, Columns and the like as no image has them, some as a VR that they never have."""
    size = rng.choice((0, 1, 4096, 32768, 65535))
    for tag, vr, value in (
        (0x00280010, b"US", struct.pack("<H", size)),
        (0x00280010, b"UL", struct.pack("<I", rng.choice((65535, 2**31, _UNDEFINED)))),
        (0x00280011, b"US", struct.pack("<H", rng.choice((0, 1, 65535)))),
        (0x00280008, b"IS", rng.choice((b"0 ", b"-1", b"1000", b"99999999", b"1e9 ", b"x "))),
        (0x00280002, b"US", struct.pack("<H", rng.choice((0, 3, 65535)))),
        (0x00280100, b"US", struct.pack("<H", rng.choice((0, 1, 8, 12, 32, 64, 65535)))),
        (0x00280101, b"US", struct.pack("<H", rng.choice((0, 1, 17, 65535)))),
        (0x00280103, b"US", struct.pack("<H", rng.choice((0, 1, 2, 65535)))),
        (0x00281053, b"DS", rng.choice((b"0 ", b"1e308 ", b"-1", b"NaN ", b"", b"1\\2 "))),
        (0x00281052, b"DS", rng.choice((b"1e39", b"inf ", b"x ", b"-1024 "))),
    ):
        if rng.random() < 0.3:
            case = _with_element(case, tag, vr, value)
    return case


def break_fragments(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    """Item tags and lengths of encapsulated pixel data; native data made to look like it."""
    body = bytearray(case.body)
    places = [at for at in _occurrences(case.body, b"\xfe\xff\x00\xe0") if at + 8 <= len(body)]
    if not places or rng.random() < 0.2:
        pixels = [element for element in _plain(case) if element.tag == 0x7FE00010]
        if not pixels or pixels[0].length_size != 4:
            return case
        return _overwritten(case, pixels[0].length_at, b"\xff" * 4)
    at = rng.choice(places)
    if rng.random() < 0.3:
        body[at : at + 4] = rng.randbytes(4)
    else:
        struct.pack_into("<I", body, at + 4, rng.choice(_LENGTHS))
    return replace(case, body=bytes(body))


def rubbish_stream(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    """A codestream's own header with other sizes than the data set's."""
    body = bytearray(case.body)
    for mark, at in (
        (b"\xff\x4f\xff\x51", 8),
        (b"\xff\xf7", 5),
        (b"\xff\xc3", 5),
        (b"\xff\xc1", 5),
    ):
        for place in _occurrences(case.body, mark)[:4]:
            if place + at + 8 <= len(body):
                body[place + at : place + at + 8] = rng.choice((rng.randbytes(8), b"\xff" * 8))
    return replace(case, body=bytes(body))


def program_first(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    """A whole file with an executable's preamble where a data set should be."""
    program = rng.choice(_PROGRAMS)
    head = (program + rng.randbytes(128 - len(program))) + b"DICM"
    return replace(case, body=(head if rng.random() < 0.5 else program) + case.body)


def private_block(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    """Up to 4 MB of a manufacturer's own, as bytes or as text."""
    size = rng.choice((10, 60_000, 2**20, 2**22))
    value = rng.randbytes(16) * (size // 16 + 1)
    creator = _element(case, 0x00990010, b"LO", b"FUZZ")
    held = _element(case, 0x00991001, rng.choice((b"OB", b"UN", b"UT")), value)
    return _placed(case, 0x00990010, creator + held)


def rename(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    """Another UID in the command, or none, or none that can be one."""
    uid = rng.choice(
        ("", "../../etc/passwd", "1." * 40, "1.2.x", "1.2.3\0", case.sop_instance_uid + "9")
    )
    return replace(case, sop_instance_uid=uid)


def other_text(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    """Texts and character sets that no one declares, of any length."""
    tag = rng.choice((0x00080005, 0x00100010, 0x00100020, 0x0008103E, 0x00200013, 0x00080060))
    value = rng.choice(
        (rng.randbytes(64), b"\x1b$B" * 20, b"=" * 4000, b"\0" * 64, b"ISO 2022 IR 87")
    )
    return _with_element(case, tag, b"LO", value)


def inflate(rng: random.Random, case: Case, _: Sequence[Sample]) -> Case:
    """A deflated data set that grows to 64 MB, or is broken in the middle."""
    squeeze = zlib.compressobj(level=1, wbits=-zlib.MAX_WBITS)
    grown = bytes(2**26) if rng.random() < 0.2 else b""
    body = squeeze.compress(case.body + grown) + squeeze.flush()
    return replace(
        case, syntax=DEFLATED, body=body if rng.random() < 0.6 else body[: len(body) // 2]
    )


def splice(rng: random.Random, case: Case, others: Sequence[Sample]) -> Case:
    """The first part of this one, and the last of another."""
    other = rng.choice(others).body
    at, its = rng.randrange(len(case.body) + 1), rng.randrange(len(other) + 1)
    return replace(case, body=case.body[:at] + other[its:])


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits, cut_off, insert_bytes, only_noise, change_length, swap_vr, repeat_element,
    shuffle_elements, nest_sequences, group_length, lie_about_syntax, extreme_matrix,
    break_fragments, rubbish_stream, program_first, private_block, rename, other_text, inflate,
    splice,
)  # fmt: skip


def mutated(rng: random.Random, found: Sequence[Sample]) -> Case:
    """One sample, unharmed now and then, else mutated once or several times."""
    sample = rng.choice(found)
    case = Case(
        sample.name, sample.sop_class_uid, sample.sop_instance_uid, sample.syntax, sample.body
    )
    if rng.random() < 0.7:
        case = under_new_uid(rng, case)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        mutation = rng.choice(MUTATIONS)
        case = mutation(rng, case, found)
        case = replace(case, mutations=(*case.mutations, mutation.__name__))
    return case


def cases(seed: int, found: Sequence[Sample]) -> Iterator[Case]:
    """Without end."""
    rng = random.Random(seed)
    while True:
        yield mutated(rng, found)


def under_new_uid(rng: random.Random, case: Case) -> Case:
    """Another SOP Instance UID of the same length, in command and data set."""
    old = case.sop_instance_uid
    if not 8 <= len(old) <= 64:
        return case
    new = "2.25." + str(rng.randrange(10 ** (len(old) - 6), 10 ** (len(old) - 5)))
    body = case.body.replace(old.encode(), new.encode())
    return replace(case, sop_instance_uid=new, body=body)


def hostile_pdus(rng: random.Random, good: bytes) -> bytes:
    """A conversation's bytes, made wrong somewhere."""
    body = bytearray(good)
    for _ in range(rng.choice((1, 2, 8))):
        at = rng.randrange(len(body)) if rng.random() < 0.5 else rng.randrange(min(len(body), 400))
        match rng.randrange(5):
            case 0:
                body[at] ^= 1 << rng.randrange(8)
            case 1:
                body[at : at + 4] = struct.pack(">I", rng.choice(_LENGTHS))
            case 2:
                del body[at:]
            case 3:
                body[at:at] = rng.randbytes(rng.choice((1, 6, 500)))
            case _:
                body[at : at + 64] = b""
        if not body:
            break
    return bytes(body)


# --- bytes --------------------------------------------------------------------------------------


def _occurrences(body: bytes, mark: bytes) -> list[int]:
    found, at = [], body.find(mark)
    while at >= 0 and len(found) < 100:
        found.append(at)
        at = body.find(mark, at + 1)
    return found


def _overwritten(case: Case, at: int, data: bytes) -> Case:
    return replace(case, body=case.body[:at] + data + case.body[at + len(data) :])


def _inserted(rng: random.Random, case: Case, data: bytes) -> Case:
    """Between two elements, where that can be told."""
    found = _plain(case)
    at = rng.choice(found).start if found else rng.randrange(len(case.body) + 1)
    return replace(case, body=case.body[:at] + data + case.body[at:])


def _element(case: Case, tag: int, vr: bytes, value: bytes) -> bytes:
    order = ">" if case.syntax == BIG else "<"
    value += b" " * (len(value) % 2)
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    if case.syntax == IMPLICIT:
        return head + struct.pack("<I", len(value)) + value
    if vr in _LONG_VRS:
        return head + vr + b"\0\0" + struct.pack(order + "I", len(value)) + value
    return head + vr + struct.pack(order + "H", len(value)) + value


def _placed(case: Case, tag: int, data: bytes) -> Case:
    """Where an element of this tag belongs."""
    at = next((element.start for element in _plain(case) if element.tag >= tag), len(case.body))
    return replace(case, body=case.body[:at] + data + case.body[at:])


def _with_element(case: Case, tag: int, vr: bytes, value: bytes) -> Case:
    """In place of the one there is."""
    found = [element for element in _plain(case) if element.tag == tag]
    made = _element(case, tag, vr, value)
    if not found:
        return _placed(case, tag, made)
    first = found[0]
    return replace(case, body=case.body[: first.start] + made + case.body[first.end :])
