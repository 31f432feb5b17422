"""A C-STORE whose data set is whatever bytes one likes: what dcmtk and pynetdicom will not send."""

import time
from io import BytesIO

from pydicom import Dataset
from pynetdicom import AE, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode


def encoded(image: Dataset) -> bytes:
    """The data set as it travels in a C-STORE, in its own transfer syntax."""
    syntax = image.file_meta.TransferSyntaxUID
    body = encode(
        image, syntax.is_implicit_VR, syntax.is_little_endian, deflated=syntax.is_deflated
    )
    assert body is not None
    return body


def store(port: int, image: Dataset, body: bytes, *, called: str, calling: str) -> int:
    """The status answered to a command of the image's UIDs with `body` after it, as it stands."""
    entity = AE(ae_title=calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 60
    entity.add_requested_context(image.SOPClassUID, image.file_meta.TransferSyntaxUID)
    no_delay = (evt.EVT_CONN_OPEN, lambda event: event.assoc.dul.socket.socket.setsockopt(6, 1, 1))
    peer = entity.associate("127.0.0.1", port, ae_title=called, evt_handlers=[no_delay])
    assert peer.is_established
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID = image.SOPClassUID
    request.AffectedSOPInstanceUID = image.SOPInstanceUID
    request.DataSet = BytesIO(body)
    # As its own `send_c_store` does: or its reactor takes the answer for a request.
    peer._reactor_checkpoint.clear()
    while not peer._is_paused:
        time.sleep(0.01)
    peer.dimse.send_msg(request, peer.accepted_contexts[0].context_id)
    _, answer = peer.dimse.get_msg(block=True)
    peer._reactor_checkpoint.set()
    peer.release()
    assert answer is not None
    return answer.Status
