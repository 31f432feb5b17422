"""What `make hazards` tries must come out as it must."""

import pytest

from tests.e2e.day_one import HAZARDS, Hazard


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: f"H{hazard.number}")
def test_day_one(hospital, tmp_path, hazard: Hazard):
    assert hazard.attempt(hospital, tmp_path)


def test_all_twelve_are_tried():
    assert [hazard.number for hazard in HAZARDS] == list(range(1, 13))
