"""Other people's verdicts on our objects: dciodvfy, PixelMed's SR validator, dcmtk's dsrdump.

Each returns what is wrong, line by line: errors, and warnings that are not on the whitelist.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

PIXELMED_JAR = Path(os.environ.get("PIXELMED_JAR", "/usr/share/java/pixelmed.jar"))
# PixelMed's style sheets are past the limits that JDK 17 puts on XPath.
_XPATH_LIMITS = [f"-Djdk.xml.xpath{name}Limit=0" for name in ("ExprOp", "TotalOp", "ExprGrp")]

#: DICOM_OUTPUT 8: dciodvfy lags behind the standard, and private schemes are no mistake.
DCIODVFY_WHITELIST = re.compile(
    r"Unrecognized defined term <99[A-Z]+>"
    r"|\(0x0018,0x1002\) UI Device UID"
    r"|this is a Standard Extended SOP Class"
)
#: Templates are extensible, and newer than these 2022 rules.
PIXELMED_WHITELIST = re.compile(
    r"\((121052,DCM|DECTHR,99VIGIL|121106,DCM|122405,DCM),\"[^\"]*\"\)"
    r": Content Item not in template$"
    # Its rule of when a title needs a modifier looks for the title among the modifiers.
    r"|Template 2010 .*\(113001,DCM,\"Rejected for Quality Reasons\"\)"
    r": Conditional content item present when condition not satisfied$"
)
#: What the de-identified head CT brings along; none of it is ours to mend.
SOURCE_WHITELIST = re.compile(
    r"needed to build DICOMDIR - Study (Date|Time|ID)"
    r"|Patient's Name  PN \[1\] = <REMOVED> - Retired Person Name form"
)


def need(tool: str, *, is_wheel: bool = False) -> str:
    """The path of a tool; skips where it is missing, or fails where peers are required.

    Only what comes as a wheel is taken from our own environment: pynetdicom puts a `storescp`
    there, and that is no stranger.
    """
    own = Path(sys.executable).parent
    others = [folder for folder in os.get_exec_path() if Path(folder) != own]
    found = shutil.which(tool, path=str(own) if is_wheel else os.pathsep.join(others))
    if found is None:
        _missing(f"{tool} is not installed")
    return str(found)


def _missing(reason: str) -> None:
    if os.environ.get("VIGIL_REQUIRE_PEERS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def dciodvfy(path: Path, *, iod: str) -> list[str]:
    """Lines that must not be there; the absence of the IOD's name is one of them."""
    run = subprocess.run(
        [need("dciodvfy", is_wheel=True), str(path)], capture_output=True, text=True, timeout=60
    )
    lines = (run.stdout + run.stderr).splitlines()
    allowed = (DCIODVFY_WHITELIST, SOURCE_WHITELIST)
    found = [
        line
        for line in lines
        if line.strip() != iod
        and (line.startswith("Error") or not any(ok.search(line) for ok in allowed))
    ]
    return (
        found if iod in (line.strip() for line in lines) else [f"not recognised as {iod}", *found]
    )


def pixelmed(paths: Sequence[Path], *, iod: str, template: str) -> dict[Path, list[str]]:
    """Verdicts on several documents; 10 to 25 s each, two at a time."""
    java = need("java")
    if not PIXELMED_JAR.is_file():
        _missing(f"PixelMed is not at {PIXELMED_JAR}")
    command = [java, *_XPATH_LIMITS, "-cp", str(PIXELMED_JAR)]
    command.append("com.pixelmed.validate.DicomSRValidator")
    verdicts = {}
    for pair in (paths[i : i + 2] for i in range(0, len(paths), 2)):
        running = {
            path: subprocess.Popen(
                [*command, str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for path in pair
        }
        for path, process in running.items():
            said, _ = process.communicate(timeout=180)
            verdicts[path] = _judge(said.splitlines(), iod, template)
    return verdicts


def _judge(lines: list[str], iod: str, template: str) -> list[str]:
    # It always exits 0, and a wrong template shows only by the line that is not there.
    expected = [
        f"Found {iod} IOD",
        f"Found Root Template {template}",
        "Root Template Validation Complete",
        "IOD validation complete",
    ]
    missing = [f"did not say: {line}" for line in expected if line not in lines]
    said = [line for line in lines if line not in expected]
    return missing + [line for line in said if not PIXELMED_WHITELIST.search(line)]


def dsrdump(path: Path) -> str:
    """The document as dcmtk reads it; fails where it cannot."""
    run = subprocess.run([need("dsrdump"), str(path)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout
