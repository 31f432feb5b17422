"""An authority of this test run and what it signs: for peers that speak TLS."""

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.validators import need

HERE = "IP:127.0.0.1"


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, PEM."""

    cert: Path
    key: Path


class Authority:
    """Signs in its folder; another one is a stranger."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._own = self._pair(name)
        self._openssl(
            "req", "-x509", *self._new_key(self._own), "-subj", f"/CN={name}", "-days", "2",
            "-out", str(self._own.cert),
        )  # fmt: skip
        self.cert = self._own.cert

    def signs(self, name: str, *, subject_alt_name: str = HERE, days: int = 2) -> Pair:
        """A pair under this authority; expired where `days` is negative."""
        pair = self._pair(name)
        request, extensions = self._folder / f"{name}.csr", self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={subject_alt_name}\n")
        self._openssl(
            "req", "-new", *self._new_key(pair), "-subj", f"/CN={name}", "-out", str(request)
        )
        self._openssl(
            "x509", "-req", "-in", str(request), "-CA", str(self._own.cert),
            "-CAkey", str(self._own.key), "-CAcreateserial", "-days", str(days),
            "-extfile", str(extensions), "-out", str(pair.cert),
        )  # fmt: skip
        return pair

    def locked(self, pair: Pair) -> Path:
        """The pair's key under a password."""
        path = pair.key.with_suffix(".locked")
        secret = ("-aes256", "-passout", "pass:secret")
        self._openssl("pkey", "-in", str(pair.key), *secret, "-out", str(path))
        return path

    def server(
        self, pair: Pair, *, newest: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED
    ) -> ssl.SSLContext:
        """A listener's context: it wants a certificate of this authority from whoever calls."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.cert, pair.key)
        context.load_verify_locations(self.cert)
        context.verify_mode = ssl.CERT_REQUIRED
        context.maximum_version = newest
        return context

    def _pair(self, name: str) -> Pair:
        return Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")

    def _new_key(self, pair: Pair) -> list[str]:
        curve = ("-pkeyopt", "ec_paramgen_curve:prime256v1")  # quicker to make than RSA
        return ["-newkey", "ec", *curve, "-nodes", "-keyout", str(pair.key)]

    def _openssl(self, *arguments: str) -> None:
        subprocess.run([need("openssl"), *arguments], check=True, capture_output=True)
