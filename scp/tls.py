"""TLS for the listener: its context, and who a client certificate says the peer is."""

import socket
import ssl
from typing import cast

from config.settings import ScpSettings

# RFC 4514 2.3; what is not here keeps OpenSSL's long name.
_SHORT = {
    "commonName": "CN",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "localityName": "L",
    "stateOrProvinceName": "ST",
}


def context(settings: ScpSettings) -> ssl.SSLContext:
    """The listener's context. Raises OSError where a file is missing or holds no usable key."""
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    found.minimum_version = ssl.TLSVersion.TLSv1_2  # BCP 195, PS3.15 B.9
    found.load_cert_chain(settings.tls_cert, settings.tls_key)
    if settings.tls_ca:
        found.load_verify_locations(settings.tls_ca)
        found.verify_mode = ssl.CERT_REQUIRED
    return found


def subject(connection: socket.socket) -> str:
    """The subject of the peer's verified certificate as RFC 4514 writes it; empty without one."""
    certificate = connection.getpeercert() if isinstance(connection, ssl.SSLSocket) else None
    if not certificate:
        return ""
    parts: list[str] = []
    names = cast(tuple[tuple[tuple[str, str], ...], ...], certificate.get("subject", ()))
    for relative in names:
        parts += [f"{_SHORT.get(name, name)}={value}" for name, value in relative]
    return ",".join(reversed(parts))
