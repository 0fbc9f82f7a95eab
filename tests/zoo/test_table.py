"""The table of models in the docs has the outcomes that the zoo's tests hold."""

from collections.abc import Iterator
from pathlib import Path

from rows import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def table() -> Iterator[str]:
    """The lines of the table, as docs/models.md has them."""
    yield "| Package | Model | `dp` on 2 and 3 | `mgpu_ddp` | `pipeline` on 2 and 3 | Note |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in ROWS:
        cells = (row.package, row.model, row.dp, row.ddp, row.pipeline, row.note)
        yield "| " + " | ".join(cells).rstrip() + " |"


def test_table_in_the_docs_is_that_of_the_tests() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert lines == list(table()), "\n".join(table())
