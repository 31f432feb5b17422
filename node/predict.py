"""`vigil predict`: one study through the node's own path, without network and database."""

import datetime as dt
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from pydicom import Dataset
from pynetdicom.dsutils import split_dataset
from rich.console import Console
from rich.table import Table

from config.settings import Settings, load
from db.describe import describe
from db.errors import ChildDied, NotDicom, PermanentError
from db.header import InstanceHeader
from db.meta import Provenance, encode_head
from db.pixels import read_images
from db.result import Eligibility, Finding, percent
from db.sandbox import Sandbox, Unreadable
from db.wording import verdict
from dicom_sr.build import BuiltObject, build_objects
from dicom_sr.plan import Context, Variant, needed_images
from dicom_sr.source import parsed, read_header
from inference.device import Device
from inference.eligibility import judge
from inference.loader import decode, oversized, prepare_images
from inference.predict import make_finding, make_heatmaps
from inference.serving import Served, bundle_folder, load_served, pick_device
from node import send
from node.terminal import SUCCESS, WRONG_USAGE, complain, report

READ_TIMEOUT_S = 60.0
TENANT = "predict"


class NoModel(PermanentError):
    """The bundle cannot serve."""

    code = "no_model"


@dataclass(frozen=True, slots=True)
class Study:
    """The instances of one study, as the node's store would hold them."""

    paths: Mapping[str, Path]  # by instance id
    headers: Mapping[str, InstanceHeader]
    skipped: Mapping[str, str]  # file name -> why


def run(
    folder: Path, *, out: Path | None, model: str | None, as_json: bool, config: Path | None
) -> int:
    """Predict, print, write; a study that cannot be judged is an answer, not a failure."""
    settings = load(config)
    torch.set_num_threads(min(torch.get_num_threads(), 4))
    with ExitStack() as stack:
        try:
            source = stack.enter_context(send.opened(folder))
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vigil-predict-")))
            sandbox = stack.enter_context(Sandbox(settings.inference.loaders))
            study = take_in(source, store, sandbox)
        except ValueError as error:
            complain(str(error))
            return WRONG_USAGE
        served = _served(settings, model or settings.inference.models[0])
        document, built = _judge(study, served, settings, sandbox, wants_objects=out is not None)
    document["skipped"] = [{"file": name, "reason": why} for name, why in study.skipped.items()]
    if out is not None:
        document["files"] = _write(built, out)
    report(document, _show, as_json=as_json)
    return SUCCESS


def trial(settings: Settings, model: str) -> str:
    """A phantom through all but network and database, for `vigil doctor`; says what came out.

    Raises
    ------
    NodeError
        If any step fails.
    """
    from node.phantom import Kind, Phantom, instances, write

    served = _served(settings, model)
    with tempfile.TemporaryDirectory(prefix="vigil-doctor-") as name, Sandbox(2) as sandbox:
        folder = Path(name)
        write(instances(Phantom(kind=Kind.LESION)), folder / "scan")
        (folder / "store").mkdir()
        study = take_in(folder / "scan", folder / "store", sandbox)
        document, built = _judge(study, served, settings, sandbox, wants_objects=True)
    if document["outcome"] == "result":
        return f"a result and {len(built)} DICOM objects"
    return f"a stated reason ({document['rule']})"


def take_in(source: Path, store: Path, sandbox: Sandbox) -> Study:
    """Files to instances with headers, as reception and intake would make them.

    Raises
    ------
    ValueError
        If there is no DICOM file, or more than one study.
    """
    files, passed = send.gather(source)
    skipped = {one.name: one.reason for one in passed}
    paths: dict[str, Path] = {}
    headers: dict[str, InstanceHeader] = {}
    for file in files:
        instance_id = str(uuid.uuid4())
        path = store / f"{instance_id}.dcm"
        try:
            _spool(file, path)
            value, _ = sandbox.run(describe, str(path), timeout_s=READ_TIMEOUT_S)
        except (NotDicom, Unreadable, ChildDied) as error:
            skipped[file.name] = f"{error.code}: {error}"
            continue
        paths[instance_id] = path
        headers[instance_id] = InstanceHeader.from_json(value["header"])
    studies = {header.study_instance_uid for header in headers.values()}
    if len(studies) != 1:
        why = "".join(f"\n  {name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"{len(studies) or 'no'} DICOM studies there; give one{why}")
    return Study(paths, headers, skipped)


def _spool(file: send.DicomFile, path: Path) -> None:
    """The data set's own bytes behind a meta group of ours, as `db.spool` keeps it."""
    provenance = Provenance(
        tenant=TENANT,
        received_at=_now(),
        sop_class_uid=file.sop_class_uid,
        sop_instance_uid=file.sop_instance_uid,
        transfer_syntax_uid=file.transfer_syntax_uid,
    )
    _, offset = split_dataset(file.path)
    with file.path.open("rb") as old, path.open("wb") as new:
        old.seek(offset)
        new.write(encode_head(provenance))
        _copy(old, new)


def _copy(old: BinaryIO, new: BinaryIO) -> None:
    while piece := old.read(2**20):
        new.write(piece)


def _served(settings: Settings, model: str) -> Served:
    if not bundle_folder(model).is_dir():
        raise NoModel(f"there is no bundle {model!r}; see `vigil models list`")
    served, refused = load_served([model], pick_device(settings.inference.device))
    if refused:
        raise NoModel(f"{refused[0].name}: {refused[0].reason}")
    return next(iter(served.values()))


def _judge(
    study: Study, served: Served, settings: Settings, sandbox: Sandbox, *, wants_objects: bool
) -> tuple[dict[str, Any], list[BuiltObject]]:
    header = next(iter(study.headers.values()))
    document = {"study_instance_uid": header.study_instance_uid, "bundle": served.bundle.name}
    started_at = _now()
    chosen = judge(study.headers, served.bundle.manifest)
    if isinstance(chosen, Eligibility):
        return document | _refusal(chosen), []
    headers = [study.headers[i] for i in chosen.instance_ids]
    if refused := oversized(headers, settings.inference.max_pixels):
        return document | _refusal(refused), []
    images = [
        decode(sandbox, study.paths[i], i, study.headers[i], settings.inference)
        for i in chosen.instance_ids
    ]
    prepared = prepare_images(images, served.bundle)
    if isinstance(prepared, Eligibility):
        return document | _refusal(prepared), []
    device = Device(pick_device(settings.inference.device), settings.inference.max_batch)
    finding = make_finding(
        prepared,
        device.score(served.model, prepared.inputs),
        served.bundle,
        started_at=started_at,
        result_uuid=str(uuid.uuid4()),
        numerics=served.numerics,
        is_partial=not chosen.is_complete,
    )
    finding, maps = make_heatmaps(prepared, finding, served.bundle, served.explainer)
    built = _objects(study, finding, maps, settings, sandbox) if wants_objects else []
    return document | {"outcome": "result", "finding": finding.to_json()}, built


def _objects(
    study: Study,
    finding: Finding,
    maps: Sequence[NDArray[np.float32]],
    settings: Settings,
    sandbox: Sandbox,
) -> list[BuiltObject]:
    headers: dict[int, Dataset] = {}
    for index in needed_images(finding):
        image = finding.images[index]
        path = str(study.paths[image.instance_id])
        _, (blob,) = sandbox.run(read_header, path, image.frame, timeout_s=READ_TIMEOUT_S)
        headers[index] = parsed(blob)
    pixels: dict[int, NDArray[np.float32]] = {}
    for key in finding.key_images:
        image = finding.images[key.image]
        frames = None if image.frame is None else [image.frame - 1]
        _, (values,) = sandbox.run(
            read_images,
            str(study.paths[image.instance_id]),
            frames,
            settings.inference.max_pixels,
            timeout_s=READ_TIMEOUT_S,
        )
        pixels[key.image] = values[0]
    context = Context(
        tenant=TENANT, result_no=1, node_version=_version(), node_serial=settings.node.serial
    )
    return build_objects(finding, headers, pixels, dict(enumerate(maps)), context, Variant())


def _write(built: Sequence[BuiltObject], out: Path) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    names = []
    for one in built:
        path = out / f"{one.seq:02d}-{one.role}.dcm"
        path.write_bytes(one.data)
        names.append(str(path))
    return names


def _refusal(eligibility: Eligibility) -> dict[str, Any]:
    return {
        "outcome": "not_analysed",
        "rule": eligibility.rule,
        "value": eligibility.value,
        "limit": eligibility.limit,
        "reason": eligibility.reason,
        "is_applicable": eligibility.is_applicable,
    }


def _show(document: dict[str, Any], console: Console) -> None:
    if document["outcome"] != "result":
        console.print(f"[bold]not analysed[/]: {document['reason']}")
        console.print(
            f"rule {document['rule']}: found {document['value']}, asked {document['limit']}"
        )
        return
    finding = Finding.from_json(document["finding"])
    partial = " PARTIAL" if finding.is_partial else ""
    words = verdict(is_positive=finding.is_positive, is_partial=finding.is_partial)
    console.print(f"[bold]{finding.output.title}[/]: {words}, {finding.urgency}{partial}")
    table = Table("label", "probability", "threshold", "logit", "strongest on")
    for label in finding.labels:
        image = finding.images[label.top_image]
        table.add_row(
            label.words,
            percent(label.probability) if label.probability else "exploratory",
            f"{label.threshold:.2f}" if label.threshold is not None else "",
            f"{label.raw.logit:+.2f}",
            f"{finding.output.image_word} {image.instance_number or label.top_image + 1}",
        )
    console.print(table)
    for note in finding.notes:
        console.print(note)
    for name in document.get("files", ()):
        console.print(name)
    console.print(f"[dim]{finding.output.disclaimer}[/]")


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def _version() -> str:
    from importlib.metadata import version

    return version("vigil")
