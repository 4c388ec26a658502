"""WikiText pages and their detokenization, as in lm-eval's task `wikitext`."""

import re

TITLE = re.compile(r"= (?!= ).*(?<!=) =")  # " = Title = ", not " = = Section = = "
MARKS = ":;.!?,"
PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
LAST = ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))


def pages(text: str) -> list[str]:
    """The text split before each level-1 heading; empty pages are removed."""
    sections: list[list[str]] = [[]]
    for line in text.split("\n"):
        if TITLE.fullmatch(line.strip()):
            sections.append([])
        sections[-1].append(line)
    joined = ["\n".join(lines) for lines in sections]
    return [page for page in joined if page.strip()]


def words(page: str) -> int:
    """The number of words as lm-eval counts them: parts between runs of white space.

    An empty part before or after outer white space counts as well.
    """
    return len(re.split(r"\s+", page))


def detokenize(page: str) -> str:
    """Removes the spaces that WikiText has around its tokens, by lm-eval's rules.

    The order of the rules matters: each is applied to the result of the previous ones.
    """
    page = page.replace("s '", "s'")
    for mark in "-,.":
        page = page.replace(f" @{mark}@ ", mark)
    for mark in MARKS:
        page = page.replace(f" {mark} ", f"{mark} ")
    for opening, closing in PAIRS:
        start, end = re.escape(opening), re.escape(closing)
        inside = re.compile(rf"{start}\s*([^{end}]*?)\s*{end}")
        page = inside.sub(rf"{opening}\1{closing}", page)
    for level in (4, 3, 2):
        page = page.replace(" ".join("=" * level), "=" * level)
    for before, after in LAST:
        page = page.replace(before, after)
    return page
