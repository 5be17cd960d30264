import logging
import os
from pathlib import Path

import pytest
from llmtrain_data.source_files import matching_files
from llmtrain_data.sources import LocalFiles, StandardLibrary


@pytest.fixture
def tree(tmp_path):
    for name, content in {
        "b.txt": b"second\r\nline",
        "a/x.md": "\ufefffirst \u00e9".encode(),
        "a/y.py": b"print()\n",
        "a/skip/z.txt": b"third",
        "image.png": b"\x89PNG",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def test_documents_are_the_files_in_order_and_exact(tree):
    source = LocalFiles(str(tree))
    documents = [(document.id, document.text) for document in source]
    assert documents == [
        ("a/skip/z.txt", "third"),
        ("a/x.md", "\ufefffirst \u00e9"),
        ("a/y.py", "print()\n"),
        ("b.txt", "second\r\nline"),
    ]
    assert documents == [(document.id, document.text) for document in source]


def test_patterns_and_exclude(tree):
    source = LocalFiles(str(tree), patterns=["**/*.txt", "**/*.py"], exclude=["*/skip/*", "*.py"])
    assert [document.id for document in source] == ["b.txt"]


@pytest.mark.parametrize(
    "patterns",
    [
        ["*.txt"],
        ["**/*.txt"],
        ["a/**/*.txt", "b.*"],
        ["a/*"],
        ["*/*/*"],
        ["**/[xy].[!p]?", "[!a]*"],
        ["**/*.txt", "*.txt", "a/x.md"],
        ["a.txt", "A/*.md"],
    ],
)
def test_patterns_mean_what_pathlib_means(tree, patterns):
    (tree / "a" / "c.txt").write_text("")
    (tree / ".hidden.txt").write_text("")
    expected = {path for pattern in patterns for path in tree.glob(pattern) if path.is_file()}
    assert set(matching_files(tree, patterns, ())) == expected


def test_excluded_folders_are_not_entered(tree, monkeypatch):
    entered = []
    monkeypatch.setattr("llmtrain_data.source_files.os.walk", noting(os.walk, entered))
    source = LocalFiles(str(tree), exclude=["*/skip/*"])
    assert [document.id for document in source] == ["a/x.md", "a/y.py", "b.txt"]
    assert entered == [tree, tree / "a"]


def noting(walk, entered):
    def noted(root):
        for entry in walk(root):
            entered.append(Path(entry[0]))
            yield entry

    return noted


def test_description_follows_names_sizes_and_times(tree):
    before = LocalFiles(str(tree)).describe()
    assert before == LocalFiles(str(tree)).describe()
    assert before["files"] == 4
    os.utime(tree / "b.txt", (1, 1))
    assert LocalFiles(str(tree)).describe()["listing"] != before["listing"]


def test_root_is_no_directory(tmp_path, message):
    with message("LocalFiles", "nowhere", "is not a directory", "set root"):
        LocalFiles(str(tmp_path / "nowhere")).describe()


def test_no_file_matches(tree, message):
    with message("no file below", str(tree), "*.rst", "expected at least one", "patterns"):
        list(LocalFiles(str(tree), patterns=["*.rst"]))


def test_unreadable_file(tree, message):
    (tree / "broken.txt").symlink_to(tree / "gone.txt")
    with message("broken.txt", "cannot be read", "No such file", "expected a readable file"):
        list(LocalFiles(str(tree)))
    with message("broken.txt", "cannot be read"):
        LocalFiles(str(tree)).describe()


def test_not_utf8_names_file_and_offset(tree, message):
    (tree / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with message("latin.txt", "0xe9", "offset 3", "not UTF-8", "errors=replace", "errors=skip"):
        list(LocalFiles(str(tree)))


def test_not_utf8_replaced_or_skipped(tree, caplog):
    (tree / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    replaced = {d.id: d.text for d in LocalFiles(str(tree), errors="replace")}
    assert replaced["latin.txt"] == "caf\ufffd"
    with caplog.at_level(logging.WARNING):
        skipped = [d.id for d in LocalFiles(str(tree), errors="skip")]
    assert "latin.txt" not in skipped
    assert len(skipped) == 4
    assert "left out 1 files" in caplog.text


def test_unknown_error_policy(message):
    with message("errors", "'ignore'", "strict, replace, skip"):
        LocalFiles(".", errors="ignore")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of known files."""
    for name, content in {
        "abc.py": b"import x\n",
        "same.py": b"import x\n",
        "LICENSE.txt": b"licence",
        "image.gif": b"GIF",
        "test/bad.py": b"# \xff\n",
        "test/vectors.decTest": b"1 + 1",
        "site-packages/other.py": b"not ours",
        "__pycache__/abc.py": b"cache",
        "sub/__pycache__/abc.py": b"cache",
        "_sysconfigdata__linux.py": b"/home/me",
        "pydoc_data/topics.py": b"topics = {}",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(
        "llmtrain_data.source_files.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)}
    )


@pytest.mark.usefixtures("library")
def test_standard_library_leaves_out_what_is_not_its_text(caplog):
    with caplog.at_level(logging.INFO):
        documents = [(d.id, d.text) for d in StandardLibrary(topics=False)]
    assert documents == [("LICENSE.txt", "licence"), ("abc.py", "import x\n")]
    assert "left out 1 files that are not UTF-8 and 1 repeated contents" in caplog.text


@pytest.mark.usefixtures("library")
def test_standard_library_without_match(message):
    with message("StandardLibrary", "*.rst", "set patterns"):
        StandardLibrary(patterns=["**/*.rst"], topics=False).describe()


def test_the_real_standard_library():
    documents = list(StandardLibrary())
    ids = [document.id for document in documents]
    topics = [name for name in ids if name.startswith("pydoc_data/topics/")]
    assert "argparse.py" in ids
    assert len(topics) > 50
    assert not [name for name in ids if "site-packages" in name or "__pycache__" in name]
    files = {d.text for d in documents if not d.id.startswith("pydoc_data/topics/")}
    assert len(files) == len(ids) - len(topics)
    assert sum(len(d.text) for d in documents) > 5_000_000
