"""The page of measurements is that of the results."""

from docs import generate_vae


def test_the_page_is_in_step() -> None:
    """Else run `python -m docs.generate_vae`."""
    found = generate_vae.results()
    assert generate_vae.PAGE.read_text(encoding="utf-8") == generate_vae.page(found)


def test_tables() -> None:
    rows = [{"a": 1.234, "b": None, "c": "x | z"}, {"a": 0.0123, "b": 5, "c": "y"}]
    lines = generate_vae.table(rows, ("a", "b", "c")).splitlines()
    assert lines == ["| a | b | c |", "|---|---|---|", r"| 1.23 |  | x \| z |", "| 0.012 | 5 | y |"]
