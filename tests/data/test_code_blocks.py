"""Where code lies in a text: the marks of Markdown and reStructuredText, and whole source files."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi1_megatron.data.code_blocks import is_source_code, segments

lines = st.sampled_from(
    ["", " ", "Prose. More.", "    x = 1", "\ty = 2", "```", "```py", "~~~", ">>> z", "So::", "  a"]
)


def code_of(text: str) -> list[str]:
    text = textwrap.dedent(text)
    return [text[start:end] for start, end, is_code in segments(text) if is_code]


@settings(max_examples=300, deadline=None)
@given(text=st.lists(lines).map("\n".join))
def test_segments_cover_the_text_in_order_and_code_is_whole_lines(text: str) -> None:
    found = segments(text)
    assert "".join(text[start:end] for start, end, _ in found) == text
    for start, end, is_code in found:
        if is_code and len(found) > 1:
            assert start == 0 or text[start - 1] == "\n"
            assert end == len(text) or text[end] == "\n"
            assert text[start:end].strip()


@pytest.mark.parametrize("fence", ["```", "~~~~"])
def test_a_fence_runs_to_its_like(fence: str) -> None:
    block = f"{fence}python\nx. Y\n\n{fence[0] * 2}\nz\n{fence}"
    assert code_of(f"Look here.\n\n{block}\nThat was it. Good.") == [block]


def test_a_fence_without_an_end_runs_to_the_end_of_the_text() -> None:
    assert code_of("Look at this. Well.\n```\nx. Y\n\nz. A\n") == ["```\nx. Y\n\nz. A"]


def test_fences_may_be_indented_and_need_no_blank_line() -> None:
    assert code_of("1. Do this. Then:\n   ```\n   x. Y\n   ```\n2. That.") == [
        "   ```\n   x. Y\n   ```"
    ]


def test_an_indented_block_begins_after_a_blank_line_and_keeps_its_own() -> None:
    page = "As in. This:\n\n    a. B\n\n\tc. D\n\n\nor not.\n    Still the same. Yes.\n"
    assert code_of(page) == ["    a. B\n\n\tc. D"]


def test_a_paragraph_s_indented_first_line_is_prose() -> None:
    assert (
        code_of("\tIt was a bright. Cold\nday in April.\n\n    The clocks. Were\nstriking.") == []
    )
    assert code_of("See. Here:\n\n    x. Y\n    z\nand so on. Yes.") == ["    x. Y\n    z"]


def test_a_title_s_underline_is_no_fence() -> None:
    assert code_of("Title\n~~~~~\n\nSome. Prose.\n\nOther\n~~~~~\n\nMore. Prose.\n") == []


def test_a_literal_block_may_be_indented_by_less_than_four() -> None:
    page = "Like this::\n\n  a. B\n\n  c. D\n\nOn.\n\n.. code-block:: c\n   :n: 1\n\n   e. F\n"
    assert code_of(page) == ["  a. B\n\n  c. D", "   e. F"]
    assert code_of(".. note::\n\n   Mind this. Well.\n\nSo. It is.") == []


def test_an_interactive_session_runs_to_a_blank_line() -> None:
    page = "Try it. Now.\n\n>>> a. b\n3. X\n... c\n\nThat. Was it.\n  >>> d\n  4. Y\n"
    assert code_of(page) == [">>> a. b\n3. X\n... c", "  >>> d\n  4. Y"]


SOURCES = {
    "python": '"""Says so. And so. Much prose in here. It goes on and on, for long."""\n'
    "import os\n\n\ndef f(x):\n    # A comment. Two.\n    return x\n",
    "c": "/* A licence. It is\n long. Very. So very long that it outweighs the code by far. */\n"
    "#include <stdio.h>\nint main(void) {\n  return 0;\n}\n",
    "javascript": "const a = require('b');\nmodule.exports = { a };\n",
    "exercise": 'def f(x):\n    """Adds one to x. Then returns it. Simple."""\n    return x + 1\n',
    "method": "    def f(self):\n        return self.x\n",
}


@pytest.mark.parametrize("language", SOURCES)
def test_a_source_file_is_code_as_a_whole(language: str) -> None:
    text = SOURCES[language]
    assert is_source_code(text)
    assert segments(text) == [(0, len(text), True)]


PAGES = {
    "textbook": "To add one to a number, we write a function. It takes x.\n\n"
    "```python\ndef f(x):\n    return x + 1\n```\n\nThen we call it. See f(2).\n",
    "indented": "The function is short.\n\n    def f(x):\n        return x\n\n    f(2)\n    f(3)\n",
    "list of conditions": "You may:\n(a) say so;\n(b) be a duck, too;\n(c) stay.\n",
    "headings": "# Title\n\nProse. It is short.\n\n## Another\n\n* a point (of view),\n* two.\n",
    "dialogue": "'Quack', said the duck. 'Yes'.\n'No', it said; then it left.\nuse it. Well.\n",
    "nothing": "",
    "blank": "\n \n",
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_about_code_is_not_source(page: str) -> None:
    assert not is_source_code(PAGES[page])


def test_this_package_is_source_and_its_pages_are_not(repository: Path) -> None:
    for path in sorted((repository / "phi1_megatron").rglob("*.py")):
        assert is_source_code(path.read_text(encoding="utf-8")) or path.name == "__init__.py", path
    for path in [repository / "README.md", repository / "LICENSE", repository / "CONTRIBUTING.md"]:
        assert not is_source_code(path.read_text(encoding="utf-8")), path
