"""What kept results depend on beside their names."""

import pytest

from weights.recipe.sources import INFERENCE, RECIPE, code_digest

SOURCE = '''"""What it is."""


def twice(x):
    """Of it."""
    return 2 * x
'''


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (SOURCE.replace("What it is.", "Something else."), True),
        (SOURCE.replace('    """Of it."""\n', ""), True),
        (SOURCE.replace("return 2 * x", "return 2*x  # doubled"), True),
        (SOURCE.replace("2 * x", "3 * x"), False),
        (SOURCE.replace("twice(x)", "twice(x, y=1)"), False),
    ],
)
def test_only_what_code_does_counts(tmp_path, other, same):
    path = tmp_path / "code.py"
    path.write_text(SOURCE)
    before = code_digest([path])

    path.write_text(other)

    assert (code_digest([path]) == before) is same


def test_files_count_with_their_names(tmp_path):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text(SOURCE)
    other.write_text(SOURCE)

    assert code_digest([one]) != code_digest([other])
    assert code_digest([one, other]) == code_digest([other, one])


def test_the_recipe_and_the_served_code_are_found():
    assert (RECIPE / "fitting.py").is_file()
    assert (INFERENCE / "evidence.py").is_file()
