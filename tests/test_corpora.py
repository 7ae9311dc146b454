"""What each corpus keeps and drops of its package, on packages small enough to work out by hand."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.archives import deb, models, pinned, wheel
from train.artefacts import FOLDER
from train.corpora import (
    CORPORA,
    dictionary_documents,
    english_documents,
    hebrew_documents,
    maths_documents,
    plain,
)
from train.documents import TextError, is_validation, pieces, split_by_content, split_by_name


@pytest.mark.parametrize(
    ("markup", "words"),
    [
        ("<p>One.</p> <p>Two.</p>", "One.\nTwo."),
        ("<p>A <code>b</code>, an <i>c</i>.\n   d</p>", "A b, an c. d"),
        ("<ul> <li> <p>first</p> </li><li>second</li></ul>", "first\nsecond"),
        ("a &lt;b&gt; &amp;amp; &quot;c&quot; &#150;", 'a <b> &amp; "c" –'),
        ('<a href="https://example.org/?a=1&b=2">link</a><!-- hidden -->', "link"),
        ("0 < 0.5 and 1 > 0", "0 < 0.5 and 1 > 0"),
        ("<p/>", ""),
    ],
)
def test_markup_becomes_words_with_a_line_a_paragraph(markup: str, words: str) -> None:
    assert plain(markup) == words


def test_english_is_every_documentation_of_every_service_model_once() -> None:
    packed = models(
        {
            "zebra/2020-01-01": {"documentation": "<p>Zebra.</p>", "shapes": {"a": {"documentation": "Common."}}},
            "apple/2020-01-01": {"shapes": {"a": {"documentation": "Common."}, "b": [{"documentation": "Deep &amp; down."}]}},
            "apple/2021-01-01": {"documentation": "Newer.", "members": {"documentation": {"documentation": "A member."}}},
            "empty/2020-01-01": {"documentation": "<p>Common.</p>"},
        }
    )  # fmt: skip
    assert list(english_documents(packed)) == [
        ("apple", b"Common.\n\nDeep & down.\n\nNewer.\n\nA member."),
        ("zebra", b"Zebra."),
    ]


def test_hebrew_keeps_consonants_and_punctuation_and_drops_points_accents_and_tags() -> None:
    works = {
        "bible": [[["בְּרֵאשִׁ֖ית בָּרָ֣א אֱלֹהִ֑ים׃", "וְהָאָ֗רֶץ"], ["שני־שנים"]]],
        "mishnah": [[["<b>מאימתי</b> קורין"]]],
        "bavli": [[], [[["תניא"], "רבי"]]],
        "yerushalmi": [[[["א"]]]],
        "zohar": [[['<i data-overlay="x"></i>רִבִּי']]],
        "zohar-chadash": [["ראשון", "שני"]],
        "zohar-tikkunim": [["", " "]],
    }
    files = {f"scriptures/json/{name}.json": json.dumps(work).encode() for name, work in works.items()}
    found = {name: text.decode() for name, text in hebrew_documents(wheel(files))}
    assert found == {
        "bible/0/0": "בראשית ברא אלהים׃\nוהארץ", "bible/0/1": "שני־שנים", "mishnah/0/0": "מאימתי קורין", "bavli/1/0": "תניא\nרבי",
        "yerushalmi/0/0": "א", "zohar/0/0": "רבי", "zohar-chadash/0/0": "ראשון\nשני",
    }  # fmt: skip


SET_MM = b"""$( A preface. $)
$(
#*#*#*#
 Logic
#*#*#*#
$)
  $c ( $.
  ax $a |- ph $.
  $( A comment that says $= in passing. $)
  thm $p |- ps $= ( a b )
    ABC $.
$(
=-=-=
 Sets
=-=-=
$)
  two $p |- ch $= ? $.
"""


def test_maths_keeps_statements_and_comments_and_drops_proofs() -> None:
    packed = deb({"usr/share/metamath/databases/set.mm": SET_MM})
    found = list(maths_documents(packed))
    assert [name for name, _ in found] == ["set.mm/0", "set.mm/1", "set.mm/2"]
    whole = b"".join(section for _, section in found)
    assert whole == SET_MM.replace(b"$= ( a b )\n    ABC $.", b"$.").replace(b"$= ? $.", b"$.")
    assert found[2][1].startswith(b"$(\n=-=-=\n Sets")


def base64(number: int) -> str:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return (base64(number // 64) if number > 63 else "") + digits[number % 64]


def test_the_dictionary_is_whole_entries_without_those_about_itself() -> None:
    entries = {
        "00-database-info": b"About this.  \n",
        "aardvark": b"Aardvark\n   An animal.   \n" + b"x" * 40_000 + b"\n",
        "abacus": b"Abacus\n   It\x92s for counting.\n" + b"y" * 40_000 + b"\n",
        "abbey": b"Abbey\n   A house.\n",
    }
    content, index = b"\n", []
    for word, entry in entries.items():
        index.append(f"{word}\t{base64(len(content))}\t{base64(len(entry))}")
        content += entry
    index.append(index[-1].replace("abbey", "abbeys"))  # two headwords, one entry
    packed = deb({
        "usr/share/dictd/gcide.dict.dz": gzip.compress(content), "usr/share/dictd/gcide.index": "\n".join(index).encode(),
    })  # fmt: skip
    first, second = dictionary_documents(packed)
    assert first == ("gcide/0", b"Aardvark\n   An animal.\n" + b"x" * 40_000 + b"\n")
    assert second == ("gcide/1", "Abacus\n   It’s for counting.\n".encode() + b"y" * 40_000 + b"\nAbbey\n   A house.\n")


def test_a_corpus_is_read_from_its_pinned_file_and_split_by_name(tmp_path: Path) -> None:
    def read(_: bytes) -> Iterator[tuple[str, bytes]]:
        yield from ((f"document {i}", str(i).encode()) for i in range(50))

    artefact = pinned(b"packed")
    (tmp_path / FOLDER).mkdir()
    artefact.path(tmp_path).write_bytes(b"packed")
    documents = replace(CORPORA["english"], artefact=artefact, read=read).source().read(tmp_path)
    assert documents.validation == [str(i).encode() for i in range(50) if is_validation(f"document {i}")]
    assert documents.train == [str(i).encode() for i in range(50) if not is_validation(f"document {i}")]


def test_a_package_of_another_shape_is_one_line(tmp_path: Path) -> None:
    content = wheel({"nothing": b""})
    artefact = pinned(content)
    (tmp_path / FOLDER).mkdir()
    artefact.path(tmp_path).write_bytes(content)
    with pytest.raises(TextError, match=r"the text 'hebrew' can't be read from thing-1.0.pip"):
        replace(CORPORA["hebrew"], artefact=artefact).source().read(tmp_path)


def test_every_corpus_pins_its_file_and_names_its_licence() -> None:
    for corpus in CORPORA.values():
        artefact = corpus.artefact
        assert len(bytes.fromhex(artefact.sha256)) == 32
        assert artefact.version in artefact.file
        assert artefact.licence
        assert artefact.sha256 in corpus.source().sentence


def test_a_document_by_name_is_on_one_side_whatever_else_there_is() -> None:
    few, many = (split_by_name((str(i), str(i).encode()) for i in range(n)) for n in (100, 1000))
    assert set(few.validation) == set(many.validation) & {str(i).encode() for i in range(100)}


@pytest.mark.parametrize("limit", [1024, 1025, 4000])
def test_pieces_are_the_document_cut_at_line_ends_or_between_characters(limit: int) -> None:
    lines = ("שורה " * 30 + "\n") * 50 + "ארוך" * 3000 + "\nend"
    document = lines.encode()
    found = list(pieces(document, limit))
    assert b"".join(found) == document
    assert max(map(len, found)) <= limit
    for piece in found:
        piece.decode()  # no character was cut in two
    assert sum(piece.endswith(b"\n") for piece in found) >= len(found) / 3
    assert found[0].endswith(b"\n")


@pytest.mark.parametrize("count", [2, 5, 19, 20, 200])
def test_a_split_by_content_leaves_no_side_empty_and_copies_on_one_side(count: int) -> None:
    documents = [f"document {i} of {count}".encode() * 200 for i in range(count)]
    split = split_by_content([*documents, *documents])
    assert split.train
    assert split.validation
    assert not set(split.train) & set(split.validation)
    assert sorted(b"".join(split.train + split.validation)) == sorted(b"".join([*documents, *documents]))


def test_of_few_documents_that_chance_would_all_train_on_one_is_held_out() -> None:
    documents = [text for i in range(100) if not is_validation(text := f"short {i}".encode())][:3]
    split = split_by_content(documents)
    assert len(split.validation) == 1
    assert sorted(split.train + split.validation) == sorted(documents)


@pytest.mark.parametrize("count", [2, 3])
def test_of_few_documents_that_chance_would_all_hold_out_one_is_trained_on(count: int) -> None:
    """The one of the highest hash, copies of it too; one document alone is where its hash puts it, as before."""
    documents = [text for i in range(400) if is_validation(text := f"{i}\n".encode())][:count]
    split = split_by_content([*documents, *documents])
    [trained] = set(split.train)
    assert trained == max(documents, key=lambda text: hashlib.blake2b(text, digest_size=8).digest())
    assert len(split.train) == 2
    assert set(split.validation) == set(documents) - {trained}
    assert split_by_content(documents[:1]).validation == documents[:1]
