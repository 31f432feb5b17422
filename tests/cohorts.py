"""Training folders laid out as ct-ich, small and drawn, and ways to spoil them."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from weights.recipe.data import LABELS

SIDE, SLICES = 72, 2


def cohort_folder(folder: Path) -> Path:
    """14 patients of two slices; every second one bleeds on its first slice."""
    picture = np.tile(np.arange(SIDE, dtype=np.uint8), (SIDE, 1))
    lines, boxes = [], []
    for patient in range(14):
        for number in range(SLICES):
            name = f"{patient}-{number}.png"
            Image.fromarray(picture).save(folder / name)
            lines.append(slice_line(patient, number, name))
            if lines[-1]["any"] == 1:
                place = {"cx": 0.5, "cy": 0.4, "w": 0.1, "h": 0.2}
                boxes.append({"PatientNumber": patient, "SliceNumber": number} | place)
    write(folder / "manifest.csv", lines)
    write(folder / "boxes.csv", boxes)
    return folder


def slice_line(patient, number, picture):
    bleeds = patient % 2 == 0 and number == 0
    return (
        {"patient": patient, "slice": number, "brain": picture, "fracture": 0}
        | {"age_years": 30.5, "sex": ("Male", "Female")[patient % 3 == 0]}
        | {name: int(bleeds and name == "any") for name in LABELS}
    )


def write(path, lines):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def change(path, place, **values):
    """One line of a table; None takes the column out of all."""
    lines = read(path)
    lines[place] |= {name: value for name, value in values.items() if value is not None}
    gone = [name for name, value in values.items() if value is None]
    write(path, [{k: v for k, v in line.items() if k not in gone} for line in lines])
