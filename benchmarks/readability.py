"""Sentence length of README and documentation: mean words per sentence, and the share of sentences above 25 words.

    python benchmarks/readability.py
    python benchmarks/readability.py --revision HEAD~20     # of an earlier commit

Code, tables, headings, list markers and link targets do not count. A sentence ends with a period, question mark,
exclamation mark or colon before a space, with a list item, or with a paragraph.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

MAX_WORDS = 25
SKIPPED = ("docs/explanation/decisions/", "docs/reference/cli.md", "docs/reference/configuration.md")
ROOT = Path(__file__).parents[1]


def prose(markdown: str) -> list[str]:
    """Paragraphs and list items of a page, as plain text."""
    text = re.sub(r"^---\n.*?\n---\n|```.*?```|<!--.*?-->", "\n\n", markdown, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not re.match(r"\s*(#|\||!\[|<)", line)]
    blocks = re.split(r"\n\s*\n|\n\s*(?=[-*] |\d+\. )", "\n".join(lines))
    plain = [re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", block) for block in blocks]
    return [" ".join(re.sub(r"[*_`]|^\s*([-*]|\d+\.) ", " ", block).split()) for block in plain if block.strip()]


def sentence_lengths(markdown: str) -> list[int]:
    """Number of words of each sentence."""
    sentences = [s for block in prose(markdown) for s in re.split(r"(?<=[.!?:])\s+", block)]
    return [words for sentence in sentences if (words := len(re.findall(r"[\w%$.,'/-]*\w[\w%$.,'/-]*", sentence)))]


def read_pages(revision: str | None) -> dict[str, str]:
    """README and the pages under docs/, by path; of a git revision, or of the working tree."""
    if revision is None:
        paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
        return {str(path.relative_to(ROOT)): path.read_text() for path in paths}

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    names = git("ls-tree", "-r", "--name-only", revision, "README.md", "docs").split()
    return {name: git("show", f"{revision}:{name}") for name in names if name.endswith(".md")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", help="git revision; default: the working tree")
    pages = {
        name: text for name, text in read_pages(parser.parse_args().revision).items() if not name.startswith(SKIPPED)
    }
    everything: list[int] = []
    print(f"{'page':<50} sentences  words each  above {MAX_WORDS}")
    for name, text in pages.items():
        lengths = sentence_lengths(text)
        everything += lengths
        print_row(name, lengths)
    print_row("all pages", everything)


def print_row(name: str, lengths: list[int]) -> None:
    if lengths:
        share = sum(length > MAX_WORDS for length in lengths) / len(lengths)
        print(f"{name:<50} {len(lengths):>9}  {sum(lengths) / len(lengths):>10.1f}  {share:>8.0%}")


if __name__ == "__main__":
    main()
