"""Words that no text of this package uses, the length of the README, and first lines of module docstrings."""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "trl_sppo").rglob("*.py"))
PAGES = [ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")] + sorted(
    (ROOT / "docs").glob("*.md")
)
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

# Phrases, and what to write instead
BANNED = {
    r"(?:goes|went|going) on\b(?! GPU)": "continues",
    r"to go on\b": "to continue",
    r"(?:to|can) be had\b": "available",
    r"at best\b(?!-)": "ideally, at most",
    r"shall\b": "must, does",
    r"for ever\b": "name the time",
    r"(?:is|are) told of\b": "is reported",
    r"(?:minds|reckons?)\b": "checks, takes into account",
    r"whatever becomes of": "name the cases",
    r"what (?:it|they|these|those) (?:\w+ ){0,4}(?:is|are)\b": "a noun",
    r"in whose eyes": "according to which judge",
    r"wants\b": "needs, requires",
    r"said otherwise|otherwise said": "unless set",
    r"nobody\b": "no process, no user, nothing",
    r"in vain\b": "without effect",
    r"lest\b": "so that ... not",
    r"(?:is|are|was|were|be) asked of\b": "must",
    r"those of\b": "repeat the noun",
    r"ones? (?:that|who|which)\b[^.:;]*\bones? (?:that|who|which)\b": "one relative clause",
    r"answer(?:s|ed|ing)?\b": "completion; of an oracle, verdict",
}
# File and phrase, each for a reason
ALLOWED = {
    ("trl_sppo/judges/llm.py", "answer"),  # the question put to a judge, which other words could change
    ("trl_sppo/judges/llm.py", "answers"),
    ("trl_sppo/judges/ranking.py", "answers"),  # the same
    ("trl_sppo/preferences.py", "answers"),  # a public name
    ("docs/choosing.md", "answers"),  # of problems in mathematics, and of a game
    ("docs/method.md", "answer"),  # of a game
    ("docs/judges.md", "answer"),  # of an attack, quoted
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Texts of a file that people read, without code, and the line that each begins in."""
    text = path.read_text()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            # A single word is a name
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 1:
                yield node.lineno, without_code(node.value)
    elif path.suffix == ".yaml":
        yield 1, "\n".join(line.partition("#")[2] for line in text.splitlines())
    else:
        yield 1, without_code(text)


def without_code(text: str) -> str:
    """Blank out code blocks, code and the addresses of links, and keep the lines."""
    for pattern in (r"```.*?```", r"`[^`\n]*`", r"\]\([^)]*\)"):
        text = re.sub(pattern, lambda found: re.sub(r"[^\n]", "_", found[0]), text, flags=re.DOTALL)
    return text


def banned(path: Path) -> Iterator[str]:
    name = path.relative_to(ROOT).as_posix()
    for start, text in texts(path):
        for pattern, instead in BANNED.items():
            for found in re.finditer(rf"(?<![\w-])(?:{pattern})".replace(" ", r"\s+"), text, flags=re.IGNORECASE):
                phrase = " ".join(found[0].split())
                if (name, phrase.lower()) not in ALLOWED:
                    yield f"{name}:{start + text[: found.start()].count(chr(10))}: {phrase!r} (write: {instead})"


@pytest.mark.parametrize("path", [*PAGES, *RECIPES, *MODULES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_banned_phrase(path):
    found = list(banned(path))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_docstrings_begin_with_a_noun_phrase(path):
    with tokenize.open(path) as file:
        first = (ast.get_docstring(ast.parse(file.read())) or "").partition("\n")[0]
    assert first, f"{path}:1: no module docstring"
    assert len(first) <= 119, f"{path}:1: first line of {len(first)} characters"
    assert not re.match(r"(What|How|Where|Whether)\b", first), f"{path}:1: {first!r} is no noun phrase"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_allowed_phrases_are_used():
    """An entry that is no longer needed must go."""
    everything = {name: (ROOT / name).read_text().lower() for name, _ in ALLOWED}
    assert not [f"{name}: {phrase}" for name, phrase in ALLOWED if phrase not in everything[name]]
