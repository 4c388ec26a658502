"""Markers of a page, and what is wrong with them."""

import pytest

from qexp.report import markers

PAGE = """# Title

<!-- qexp table
records: a
-->
| x | 1 |
<!-- qexp end -->

In text <!-- qexp value {records: a} -->3.0<!-- qexp end -->, and `<!-- qexp end -->` in code.

```
<!-- qexp table
records: b
-->
```
"""


def test_blocks_have_their_query_their_body_and_their_line() -> None:
    blocks, problems = markers.parse(PAGE)
    assert not problems
    assert [(b.kind, b.query.strip(), b.body, b.line, b.body_line) for b in blocks] == [
        ("table", "records: a", "\n| x | 1 |\n", 3, 5),
        ("value", "{records: a}", "3.0", 9, 9),
    ]
    new = markers.replaced(PAGE, zip(blocks, ["\nnew\n", "4.0"], strict=True))
    assert new == PAGE.replace("| x | 1 |", "new").replace(">3.0<", ">4.0<")


@pytest.mark.parametrize(
    ("page", "line", "said"),
    [
        ("a\n<!-- qexp table\n-->\n| 1 |\n", 2, "qexp table has no end; add <!-- qexp end -->"),
        ("<!-- qexp table -->\n<!-- qexp figure -->\n<!-- qexp end -->", 1, "has no end"),
        ("a\n\n<!-- qexp end -->", 3, "ends nothing"),
        ("<!-- qexp tabel -->\n<!-- qexp end -->", 1, "qexp tabel is no marker; use table"),
        ("a\n<!-- qexp table\nrecords: a\n", 2, "is not closed; add -->"),
    ],
)
def test_a_wrong_marker_is_a_sentence_with_its_line(page, line, said) -> None:
    _, problems = markers.parse(page)
    assert problems[0].line == line and said in problems[0].said


def test_typed_tables_are_those_with_numbers_that_no_marker_makes() -> None:
    typed = """
| a | b |
|---|--:|
| x | **3.40 ± 0.10** |

| a | b |
|---|---|
| 1 | OPT, 2307.13304 |

```
| a | 3.4 |
```
"""
    start = PAGE.count("\n")
    assert markers.typed_tables(PAGE + typed) == [start + 2, start + 11]
