"""The repository's shape: names that are contracts, and rules no linter knows."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("config", "db", "scp", "inference", "dicom_sr", "dashboard", "node", "weights")
DISEASE = re.compile(r"ha?emorrhag|bleed|intracranial", re.IGNORECASE)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_stranger_has_our_packages_name(package):
    found = find_spec(package)

    assert found is not None
    assert found.origin == str(ROOT / package / "__init__.py")


def test_the_domain_types_load_nothing_but_the_standard_library():
    code = (
        "import sys; import db.study, db.job, db.result, db.errors, db.header;"
        "print([m for m in ('sqlalchemy', 'numpy', 'pydicom', 'pydantic') if m in sys.modules])"
    )

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("package", PACKAGES[:-1])
def test_no_module_knows_which_disease_it_is_about(package):
    sources = [*(ROOT / package).rglob("*.py"), *(ROOT / package).rglob("*.html")]

    found = [str(path) for path in sources if DISEASE.search(path.read_text(encoding="utf-8"))]

    assert sources
    assert found == []


def test_the_customers_names_stand_at_the_top():
    names = {"scp", "inference", "dicom_sr", "dashboard", "db", "config", "weights", "tests"}

    assert all((ROOT / name).is_dir() for name in names)
    assert (ROOT / "pyproject.toml").is_file()
    assert (ROOT / "README.md").is_file()
