"""WikiText as pages, with its tokenisation undone: what lm-eval's `wikitext` task scores."""

import re

TITLE = re.compile(r"= (?!= ).*(?<!=) =")  # " = Title = ", not " = = Section = = "
MARKS = ":;.!?,"
PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
LAST = ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))


def pages(text: str) -> list[str]:
    """The text cut before each level-1 heading; pages without any word are left out."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if TITLE.fullmatch(line.strip()):
            found.append([])
        found[-1].append(line)
    whole = ["\n".join(lines) for lines in found]
    return [page for page in whole if page.strip()]


def words(page: str) -> int:
    """Pieces between runs of white space. The empty pieces before and after a page's outer white
    space count as well, as they do in lm-eval."""
    return len(re.split(r"\s+", page))


def detokenize(page: str) -> str:
    """English as it was before WikiText set spaces around its tokens, following lm-eval's rules.

    The order of the rules matters: each sees what the ones before it left.
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
