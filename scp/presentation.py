"""Presentation contexts: every storage class is supported, in every transfer syntax proposed."""

from collections.abc import Sequence

from pydicom.uid import UID
from pynetdicom.presentation import PresentationContext
from pynetdicom.service_class import (
    NonPatientObjectStorageServiceClass,
    ServiceClass,
    StorageServiceClass,
)
from pynetdicom.sop_class import uid_to_service_class

from db import transaction

VERIFICATION = "1.2.840.10008.1.1"
_STANDARD_ROOT = "1.2.840.10008."
_STORAGE_ROOT = "1.2.840.10008.5.1.4.1.1."


def is_storage(sop_class: str) -> bool:
    """Whether a SOP class is stored: known storage, unknown storage, or private (PS3.4 B.1)."""
    service = uid_to_service_class(UID(sop_class))
    if service in (StorageServiceClass, NonPatientObjectStorageServiceClass):
        return True
    if service is not ServiceClass:  # a known service of another kind
        return False
    # A storage class younger than pynetdicom's dictionary, or a manufacturer's own.
    return sop_class.startswith(_STORAGE_ROOT) or not sop_class.startswith(_STANDARD_ROOT)


def is_verification_only(requested: Sequence[PresentationContext]) -> bool:
    """Whether nothing is to be stored: an echo, or what belongs to storage commitment."""
    return all(c.abstract_syntax in (VERIFICATION, transaction.SOP_CLASS) for c in requested)


def supported(
    requested: Sequence[PresentationContext], *, storage: bool, commitment: bool = False
) -> list[PresentationContext]:
    """What we support of what is requested, for pynetdicom's own negotiation.

    A context is supported in every transfer syntax that was proposed for its class: bytes are kept
    as they come. Of several in one context the first is taken, as the requestor ordered them.
    Messages of storage commitment are read, so they come uncompressed, in either role: who asks is
    its SCU, and who reports its SCP (PS3.4 J.3.3).
    """
    syntaxes: dict[str, list[str]] = {}
    for context in requested:
        name = str(context.abstract_syntax)
        is_commitment = commitment and name == transaction.SOP_CLASS
        if name == VERIFICATION or is_commitment or (storage and is_storage(name)):
            known = syntaxes.setdefault(name, [])
            known += [
                syntax
                for syntax in context.transfer_syntax
                if syntax not in known and (not is_commitment or syntax in transaction.SYNTAXES)
            ]
    return [_context(name, known) for name, known in syntaxes.items() if known]


def well_formed(requested: Sequence[PresentationContext]) -> list[PresentationContext]:
    """Without contexts that name no class or propose no syntax: those cannot be answered."""
    return [c for c in requested if c.abstract_syntax and c.transfer_syntax]


def _context(abstract_syntax: str, transfer_syntaxes: list[str]) -> PresentationContext:
    context = PresentationContext()
    context.abstract_syntax = UID(abstract_syntax)
    context.transfer_syntax = list(transfer_syntaxes)
    if abstract_syntax == transaction.SOP_CLASS:
        context.scu_role = context.scp_role = True
    return context
