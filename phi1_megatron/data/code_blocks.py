"""Where code lies in a text, so that sentence splitting leaves it whole.

Blocks are found by lines, as Markdown and reStructuredText mark them:

- fences of ``` or ~~~, to the closing fence or, without one, to the end;
- lines indented by four spaces or a tab after a blank line, blank lines between them included;
- what is indented after a line that ends in ``::`` (or a code directive) and a blank line;
- interactive sessions, from ``>>>`` to a blank line.

A single indented line with text right under it is a paragraph's first line, not code. A ~~~ right
under a line of text is a title's underline, not a fence.

A text most of whose lines look like code is source code as a whole. Comments, doc strings and
fenced blocks count for neither side, so a documented module is source, a page about code is not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """A stretch of a text, ``text[start:end]``."""

    start: int
    end: int
    is_code: bool


_ANY_MARK = re.compile(r"```|~~~|>>>|::[ \t\r]*(?:\n|$)|(?:^|\n)(?: {4}| {0,3}\t)")
_FENCE = re.compile(r"[ \t]*(`{3,})[^`]*$|[ \t]*(~{3,})")
_INDENTED = re.compile(r"(?: {4}| {0,3}\t)[ \t]*\S")
_SESSION = re.compile(r"[ \t]*>>>(?: |\r?$)")
_CODE_DIRECTIVE = re.compile(
    r"[ \t]*\.\. (?:code|code-block|sourcecode|parsed-literal|testcode|testoutput|doctest|prompt)::"
)

_COMMENT = re.compile(r"#(?!\s*(?:include|define|if|ifdef|ifndef|else|endif|pragma)\b)|//|--")
_DOC_STRING = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*"""|' r"'''(?:[^'\\]|\\.|'(?!''))*'''", re.DOTALL
)
_BLOCK_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)

_CALL = re.compile(r"\w\(")
_SIGN = re.compile(r"\w\(|[=\[\]{}<>_*]|->|::")
_NAME = r"[\w.\[\]'\"*&$-]+"
_STATEMENT = re.compile(
    rf"""
    (?:(?:const|let|var|val|static|export|auto|mut|int|bool|float|double|char|string)\s+)*
    {_NAME}(?:\s*,\s*{_NAME})*\s*(?::\s*[\w.\[\], |]+)?\s*[-+*/|&%^:]?=(?!=)  # an assignment
  | (?:from\s+[\w.]+\s+)?import\s+[\w.*{{("']+(?:\s+as\s+\w+|\s*,\s*\w+)*[\s;(,]*$
  | \#\s*\w                                                # not a comment: see above
  | @\w[\w.]*(?:\(.*)?$                                    # a decorator
  | (?:return|raise|yield|assert|del|throw|await|global|nonlocal|package|using|use)
    (?:\s+[\w.:]*\w)?;?$
  | (?:break|continue|pass|else|end|done|fi);?$
  | ['"][^'"]*['"]\s*(?::|,$)                              # an entry
    """,
    re.VERBOSE,
)
_OPENER = re.compile(
    r"(?:async\s+)?(?:def|class|fn|func|function|struct|enum|interface|namespace|if|elif|else|for"
    r"|while|with|try|except|finally|switch|case|do)\b"
)


def segments(text: str) -> list[Segment]:
    """Code and what is not, in order, covering ``text``; a code segment begins at a line's start.

    The line end after a code segment belongs to what follows it.
    """
    if is_source_code(text):
        return [Segment(0, len(text), is_code=True)]
    blocks = _blocks(text) if _ANY_MARK.search(text) else []
    found, at = [], 0
    for start, end in blocks:
        if start > at:
            found.append(Segment(at, start, is_code=False))
        found.append(Segment(start, end, is_code=True))
        at = end
    if at < len(text) or not found:
        found.append(Segment(at, len(text), is_code=False))
    return found


def is_source_code(text: str) -> bool:
    """Whether most of the text's outermost lines, by their characters, look like code.

    Only lines that are not indented count (all, where all are indented): a page whose code is
    indented is no source, and the lines that hold a source file together stand at its margin.
    """
    code, total = [0, 0], [0, 0]  # at the margin, indented
    fenced = False
    for line in _without_comments(text).split("\n"):
        stripped = line.strip()
        if stripped.startswith("```") and _FENCE.match(stripped):
            fenced = not fenced
            continue
        if fenced or not stripped or _COMMENT.match(stripped):
            continue
        indented = _INDENTED.match(line) is not None
        total[indented] += len(stripped)
        if _looks_like_code(stripped):
            code[indented] += len(stripped)
    margin = 0 if total[0] else 1
    return 2 * code[margin] > total[margin]


def _without_comments(text: str) -> str:
    if '"""' in text or "'''" in text:
        text = _DOC_STRING.sub('""', text)
    last = text.rfind("*/")  # beyond it nothing closes, and a search would be quadratic
    if last >= 0:
        text = _BLOCK_COMMENT.sub("", text[: last + 2]) + text[last + 2 :]
    return text


def _looks_like_code(line: str) -> bool:
    first, last = line[0], line[-1]
    if last in "{}" or first in "})]":
        return True
    if last == ";" and _SIGN.search(line):  # some prose ends so, too
        return True
    if last in ":{" and _OPENER.match(line):
        return True
    if last in "),(:[" and _CALL.search(line):
        return True
    # Lines of prose can be very long, and their beginning is enough.
    return _STATEMENT.match(line[:200]) is not None


def _blocks(text: str) -> list[tuple[int, int]]:
    """Start and end of every block: whole lines, without the last one's line end."""
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    found = []
    number, after_blank = 0, True
    literal: int | None = None  # indentation of a line that announced a literal block
    while number < len(lines):
        line = lines[number]
        if not line.strip():
            number, after_blank = number + 1, True
            continue
        end = _block_end(lines, number, after_blank, literal)
        if end > number:
            found.append((starts[number], starts[end] - 1))
            number, after_blank, literal = end, False, None
            continue
        if _announces(line):
            literal = _indentation(line)
        elif literal is not None and (after_blank or _indentation(line) <= literal):
            literal = None
        number, after_blank = number + 1, False
    return found


def _block_end(lines: Sequence[str], first: int, after_blank: bool, literal: int | None) -> int:
    """The line after a block of code that begins at ``first``, or ``first`` where none does."""
    line = lines[first]
    fence = _FENCE.match(line)
    if fence is not None and (fence[1] or after_blank):
        marker = fence[1] or fence[2]
        for number in range(first + 1, len(lines)):
            closing = lines[number].strip()
            if len(closing) >= len(marker) and closing == marker[0] * len(closing):
                return number + 1
        return _without_blank_end(lines, first, len(lines))
    if _SESSION.match(line):
        end = first
        while end < len(lines) and lines[end].strip():
            end += 1
        return end
    if not after_blank:
        return first
    if literal is not None and _indentation(line) > literal:
        end = first
        while end < len(lines) and (not lines[end].strip() or _indentation(lines[end]) > literal):
            end += 1
        return _without_blank_end(lines, first, end)
    if _INDENTED.match(line):
        end = first
        while end < len(lines) and (not lines[end].strip() or _INDENTED.match(lines[end])):
            end += 1
        beginning_of_paragraph = end == first + 1 and end < len(lines)
        return first if beginning_of_paragraph else _without_blank_end(lines, first, end)
    return first


def _without_blank_end(lines: Sequence[str], first: int, end: int) -> int:
    while end > first + 1 and not lines[end - 1].strip():
        end -= 1
    return end


def _announces(line: str) -> bool:
    """Whether an indented block after this line is literal text."""
    if line.lstrip().startswith(".. "):
        return _CODE_DIRECTIVE.match(line) is not None
    return line.rstrip().endswith("::")


def _indentation(line: str) -> int:
    expanded = line.expandtabs(4)
    return len(expanded) - len(expanded.lstrip())
