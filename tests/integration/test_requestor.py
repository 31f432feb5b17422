"""Answers reach the sender, however late pynetdicom's own thread gets to run."""

import contextlib
import threading

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from pynetdicom import AE

from dicom_sr.requestor import sole_reader
from tests.peers import Pacs


@contextlib.contextmanager
def busy_interpreter():
    """Two threads that never rest: pynetdicom's own thread runs on late, as on a busy machine."""
    stop = threading.Event()

    def burn() -> None:
        while not stop.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=burn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def an_object() -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.PatientID = "P"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def test_every_answer_reaches_the_sender():
    # Without the gate 3 of 25 associations with 6 objects each lost an answer here.
    with Pacs() as pacs, busy_interpreter():
        entity = AE("TEST")
        entity.dimse_timeout = 5
        entity.add_requested_context(SecondaryCaptureImageStorage, ExplicitVRLittleEndian)
        association = entity.associate("127.0.0.1", pacs.port)
        assert association.is_established
        with sole_reader(association):
            answers = [association.send_c_store(an_object()) for _ in range(60)]
        association.join(10)

    assert [answer.Status for answer in answers] == [0] * 60
    assert association.is_released
    assert not association.is_alive()


def test_an_association_that_the_peer_ends_is_left_cleanly():
    with Pacs() as pacs:
        pacs.aborts_after = 1
        entity = AE("TEST")
        entity.dimse_timeout = 5
        entity.add_requested_context(SecondaryCaptureImageStorage, ExplicitVRLittleEndian)
        association = entity.associate("127.0.0.1", pacs.port)
        with sole_reader(association):
            association.send_c_store(an_object())
            answer = association.send_c_store(an_object())
        association.join(10)

    assert "Status" not in answer
    assert not association.is_alive()
