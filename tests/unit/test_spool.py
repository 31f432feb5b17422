"""The spool: what is acknowledged is whole and on the disk, and says where it came from."""

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread

from db import files, spool
from db.errors import DiskFull
from db.meta import Provenance, decode_head, encode_head
from db.spool import EmptyDataset, FolderLock, Spool, SpoolBusy, SpoolCorrupt, read_provenance, scan
from tests.builders import ct_image

SOURCE = Provenance(
    tenant="north",
    calling_ae="CT1",
    called_ae="NORTH_AI",
    address="10.1.0.7",
    tls_subject="CN=ct1,O=Hospital",
    association="a1",
    received_at="2026-11-23T05:00:00+00:00",
    sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
    sop_instance_uid="1.2.3",
    transfer_syntax_uid="1.2.840.10008.1.2.1",
)
BODY = b"\x08\x00\x60\x00CS\x02\x00CT"  # (0008,0060) Modality


def test_a_kept_instance_is_a_dicom_file_that_says_where_it_came_from(tmp_path):
    with Spool(tmp_path, "scp-0") as box:
        instance_id = box.keep(SOURCE, BODY)

    path = tmp_path / "spool" / "scp-0" / "north" / f"{instance_id}.dcm"
    found = dcmread(path)
    assert found.Modality == "CT"
    assert found.file_meta.SourceApplicationEntityTitle == "CT1"
    assert found.file_meta.ReceivingApplicationEntityTitle == "NORTH_AI"
    assert found.file_meta.MediaStorageSOPInstanceUID == "1.2.3"
    assert path.read_bytes()[:128] == bytes(128)
    assert read_provenance(path) == SOURCE


text = st.text(max_size=100)


@given(text, text, text, st.binary(max_size=20))
def test_provenance_survives_whatever_a_peer_calls_itself(calling, called, uid, body):
    source = Provenance(tenant="north", calling_ae=calling, called_ae=called, sop_instance_uid=uid)
    path = Path(f"/dev/shm/provenance-{os.getpid()}")

    path.write_bytes(encode_head(source) + body)

    with open(path, "rb") as file:
        assert decode_head(file) == source
        assert file.read() == body
    path.unlink()


def test_a_chunked_instance_is_the_same_bytes(tmp_path):
    with Spool(tmp_path, "scp-0") as box:
        part = box.begin(SOURCE)
        for at in range(0, len(BODY), 3):
            part.write(BODY[at : at + 3])

        part.commit()

        (item,) = scan(box.folder)
    assert item.id == part.id
    assert item.path.read_bytes().endswith(BODY)
    assert part.size_bytes == len(BODY)


def test_what_is_not_committed_is_never_seen(tmp_path):
    with Spool(tmp_path, "scp-0") as box:
        part = box.begin(SOURCE)
        part.write(BODY)

        assert scan(box.folder) == []

        part.discard()
    assert list(tmp_path.rglob("*.part")) == []


def test_a_dead_receivers_halves_are_cleared_when_the_next_one_starts(tmp_path):
    with Spool(tmp_path, "scp-0") as box:
        box.keep(SOURCE, BODY)
        half = box.folder / "north" / "11111111-1111-4111-8111-111111111111.part"
        half.write_bytes(b"half")

    with Spool(tmp_path, "scp-0") as box:
        assert not half.exists()
        assert len(scan(box.folder)) == 1


def test_a_folder_has_one_receiver(tmp_path):
    with Spool(tmp_path, "scp-0"), pytest.raises(SpoolBusy):
        Spool(tmp_path, "scp-0")

    Spool(tmp_path, "scp-0").close()


def test_a_folder_lock_is_given_back(tmp_path):
    FolderLock(tmp_path / "box", ".lock").close()

    FolderLock(tmp_path / "box", ".lock").close()


def test_an_empty_data_set_is_not_kept(tmp_path):
    with Spool(tmp_path, "scp-0") as box:
        with pytest.raises(EmptyDataset):
            box.keep(SOURCE, b"")

        assert scan(box.folder) == []
    assert list(tmp_path.rglob("*.part")) == []


def test_the_watermark_refuses_before_the_disk_is_full(tmp_path):
    with (
        Spool(tmp_path, "scp-0", min_free_mb=2**40) as box,
        pytest.raises(DiskFull, match="below the watermark"),
    ):
        box.keep(SOURCE, BODY)


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    full = Path("/dev/full")  # the kernel's own ENOSPC

    with pytest.raises(DiskFull), files.storage_errors(), open(full, "wb") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, files.StorageError)],
)
def test_a_sync_that_fails_is_no_success(tmp_path, monkeypatch, number, kind):
    def refuse(fd):
        raise OSError(number, os.strerror(number))

    with Spool(tmp_path, "scp-0") as box:
        box.keep(SOURCE, BODY)
        monkeypatch.setattr(spool.os, "fsync", refuse)

        with pytest.raises(kind):
            box.keep(SOURCE, BODY)

        assert len(scan(box.folder)) == 1
    assert list(tmp_path.rglob("*.part")) == []


@pytest.mark.parametrize("name", ["../x", "North", "", "a" * 33, "a/b"])
def test_no_tenant_leads_out_of_the_folder(tmp_path, name):
    with Spool(tmp_path, "scp-0") as box, pytest.raises(ValueError, match="tenant"):
        box.keep(Provenance(tenant=name), BODY)


def test_the_oldest_comes_first(tmp_path):
    with Spool(tmp_path, "scp-0") as box:
        ids = [box.keep(SOURCE, BODY) for _ in range(20)]

        assert [item.id for item in scan(box.folder)] == ids


def test_strange_files_are_not_taken_for_instances(tmp_path):
    with Spool(tmp_path, "scp-0") as box:
        box.keep(SOURCE, BODY)
        for name in ("x.dcm", "note.txt", "a.b.dcm"):
            (box.folder / "north" / name).write_bytes(b"")
        (box.folder / "Not A Tenant").mkdir()

        assert len(scan(box.folder)) == 1


@pytest.mark.parametrize("size", [0, 100, 140, 200, 400])
def test_a_torn_head_is_said_to_be_torn(tmp_path, size):
    path = tmp_path / "torn.dcm"
    path.write_bytes((encode_head(SOURCE) + BODY)[:size])

    with pytest.raises(SpoolCorrupt):
        read_provenance(path)


def test_several_threads_keep_at_once(tmp_path):
    with Spool(tmp_path, "scp-0") as box:
        keep = [threading.Thread(target=box.keep, args=(SOURCE, BODY)) for _ in range(16)]
        for thread in keep:
            thread.start()
        for thread in keep:
            thread.join()

        assert len(scan(box.folder)) == 16


def test_a_durable_write_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "a" / "b" / "result.dcm"

    files.write_durably(path, b"one")
    files.write_durably(path, b"two")

    assert path.read_bytes() == b"two"
    assert [found.name for found in path.parent.iterdir()] == ["result.dcm"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_linking_again_changes_nothing(tmp_path):
    source, target = tmp_path / "one", tmp_path / "store" / "one"
    source.write_bytes(b"x")

    files.link_all([(source, target)])
    files.link_all([(source, target)])

    assert target.samefile(source)


def test_where_a_link_cannot_be_a_copy_is_made(tmp_path):
    source, target = tmp_path / "one", Path(f"/dev/shm/copy-{os.getpid()}/one")
    source.write_bytes(b"x" * 5000)

    files.link_all([(source, target)])

    assert target.read_bytes() == source.read_bytes()
    target.unlink()
    target.parent.rmdir()


def test_equal_data_sets_are_equal_whatever_their_heads_say(tmp_path):
    one, other, third = (tmp_path / name for name in "abc")
    one.write_bytes(encode_head(SOURCE) + BODY)
    other.write_bytes(encode_head(Provenance(tenant="south")) + BODY)
    third.write_bytes(encode_head(SOURCE) + BODY + b"x")

    assert files.same_content(one, other)
    assert not files.same_content(one, third)


def test_a_real_image_comes_back_as_it_was(tmp_path):
    image = ct_image()
    image.save_as(tmp_path / "sent.dcm", enforce_file_format=True)
    with open(tmp_path / "sent.dcm", "rb") as file:
        dcmread(file, stop_before_pixels=True)
        file.seek(
            132 + 12 + dcmread(tmp_path / "sent.dcm").file_meta.FileMetaInformationGroupLength
        )
        body = file.read()

    with Spool(tmp_path, "scp-0") as box:
        box.keep(SOURCE, body)
        (item,) = scan(box.folder)

    assert dcmread(item.path) == image
