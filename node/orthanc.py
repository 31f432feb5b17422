"""Orthanc, where it is installed, as the demo's PACS: `vigil demo --orthanc`."""

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from db.errors import PermanentError

START_S = 30.0


class NoOrthanc(PermanentError):
    """Orthanc is not installed, or does not start."""

    code = "no_orthanc"


class OrthancPacs:
    """A child process with its own storage; asked over its REST interface.

    It answers to any called AE title, so it keeps both hospitals' results in one place: the
    study tells them apart.
    """

    name = "Orthanc"

    def __init__(self, folder: Path, port: int, http_port: int) -> None:
        program = shutil.which("Orthanc") or shutil.which("orthanc")
        if program is None:
            raise NoOrthanc("Orthanc is not installed; leave --orthanc out to use the demo's own")
        self.port, self._url = port, f"http://127.0.0.1:{http_port}"
        folder.mkdir(parents=True)
        config = folder / "orthanc.json"
        config.write_text(json.dumps(_configuration(folder, port, http_port)), encoding="utf-8")
        with (folder / "orthanc.log").open("wb") as log:
            self._process = subprocess.Popen(
                [program, str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
            )
        self._wait()

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def count(self, *, called_ae: str, study_instance_uid: str) -> dict[str, int]:
        counts: dict[str, int] = {}
        for series in self._find(study_instance_uid):
            kind = _kind(series["MainDicomTags"])
            counts[kind] = counts.get(kind, 0) + len(series["Instances"])
        return counts

    def strays(self, *, called_ae: str, study_instance_uid: str) -> int:
        return 0  # one archive for both: nothing can stray

    def last_at(self, *, study_instance_uid: str) -> None:
        return None  # it keeps whole seconds of another clock

    def _find(self, study_instance_uid: str) -> list[dict[str, Any]]:
        query = {
            "Level": "Series",
            "Expand": True,
            "Query": {"StudyInstanceUID": study_instance_uid},
        }
        found: list[dict[str, Any]] = self._ask("/tools/find", query)
        return found

    def _ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(self._url + path, data=data, timeout=10) as answer:
            return json.load(answer)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self._ask("/system")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
            else:
                return
        self.close()
        raise NoOrthanc("Orthanc does not start")


def _configuration(folder: Path, port: int, http_port: int) -> dict[str, Any]:
    return {
        "Name": "demo",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "DicomAet": "NORTH_PACS",
        "DicomPort": port,
        "DicomCheckCalledAet": False,
        "DicomAlwaysAllowStore": True,
        "HttpPort": http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [],
    }


def _kind(tags: dict[str, str]) -> str:
    if tags.get("Modality") in ("SR", "KO"):
        return tags["Modality"]
    words = tags.get("SeriesDescription", "").lower()
    kinds = (word for word in ("summary", "overlay", "map") if word in words)
    return next(kinds, tags.get("Modality", ""))
