"""Sources of whole files: a local tree of text, and the Python standard library's own sources."""

from __future__ import annotations

import fnmatch
import functools
import logging
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmtrain_data.documents import (
    ERROR_POLICIES,
    Document,
    check_choice,
    decode_utf8,
    describe_files,
    digest,
    read_bytes,
)

log = logging.getLogger(__name__)


class LocalFiles:
    """Every file below root that matches a pattern is a document, in the order of its path.

    root: a directory. patterns: globs relative to root ("**" crosses directories). exclude: globs
    against the path relative to root; "*" crosses directories there. errors: what to do with a
    file that is not UTF-8: strict (raise ValueError), replace, skip.
    """

    def __init__(
        self,
        root: str,
        *,
        patterns: Sequence[str] = ("**/*.txt", "**/*.md", "**/*.rst", "**/*.py"),
        exclude: Sequence[str] = (),
        errors: str = "strict",
    ):
        self.root = Path(root)
        self.patterns = tuple(patterns)
        self.exclude = tuple(exclude)
        self.errors = check_choice("data source LocalFiles, errors", errors, ERROR_POLICIES)

    @functools.cached_property
    def files(self) -> list[Path]:
        """The matching files, sorted, listed once. Raises ValueError when there is none."""
        if not self.root.is_dir():
            raise ValueError(
                f"data source LocalFiles: root {str(self.root)!r} is not a directory; "
                "expected one that holds text files; set root"
            )
        found = matching_files(self.root, self.patterns, self.exclude)
        if not found:
            raise ValueError(
                f"data source LocalFiles: no file below {str(self.root)!r} matches "
                f"{list(self.patterns)} (exclude {list(self.exclude)}); expected at least one; "
                "set root, patterns or exclude"
            )
        return found

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "LocalFiles",
            "patterns": list(self.patterns),
            "exclude": list(self.exclude),
            "errors": self.errors,
            **describe_files(self.files, self.root),
        }

    def __iter__(self) -> Iterator[Document]:
        skipped = 0
        for path in self.files:
            text = decode_utf8(read_bytes(path), where=str(path), errors=self.errors)
            if text is None:
                skipped += 1
                continue
            yield Document(text=text, id=path.relative_to(self.root).as_posix())
        if skipped:
            log.warning("%s: left out %d files that are not UTF-8", self.root, skipped)


class StandardLibrary:
    """The running interpreter's own standard library: text that every machine has.

    Its files below `sysconfig`'s stdlib directory that match a pattern, each content once, and the
    language reference that `help()` prints (pydoc_data), one document a topic. Files that are not
    UTF-8 (test data of the library itself, deliberately broken) are left out and counted.
    """

    # Installed packages, caches, tables of decimal test vectors, and files written by the build
    # that name directories of the machine; topics.py is read as topics instead.
    EXCLUDE = (
        "site-packages/*",
        "dist-packages/*",
        "*__pycache__/*",
        "*.decTest",
        "*_sysconfigdata_*",
        "config-*",
        "pydoc_data/topics.py",
    )

    def __init__(
        self,
        *,
        patterns: Sequence[str] = ("**/*.py", "**/*.txt", "**/*.md", "**/*.rst"),
        topics: bool = True,
    ):
        self.root = Path(sysconfig.get_paths()["stdlib"])
        self.patterns = tuple(patterns)
        self.topics = topics

    @functools.cached_property
    def files(self) -> list[Path]:
        found = matching_files(self.root, self.patterns, self.EXCLUDE)
        if not found and not self.topics:
            raise ValueError(
                f"data source StandardLibrary: no file of the library matches "
                f"{list(self.patterns)}; expected at least one; set patterns"
            )
        return found

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "StandardLibrary",
            "python": platform.python_version(),
            "patterns": list(self.patterns),
            "topics": self.topics,
            **describe_files(self.files, self.root),
        }

    def __iter__(self) -> Iterator[Document]:
        seen: set[bytes] = set()
        not_text = repeated = 0
        for path in self.files:
            data = read_bytes(path)
            text = decode_utf8(data, where=str(path), errors="skip")
            if text is None:
                not_text += 1
                continue
            content = digest(data)
            if content in seen:
                repeated += 1
                continue
            seen.add(content)
            yield Document(text=text, id=path.relative_to(self.root).as_posix())
        if self.topics:
            # A table of a few hundred strings, imported only when asked for.
            from pydoc_data.topics import topics

            for name in sorted(topics):
                yield Document(text=topics[name], id=f"pydoc_data/topics/{name}")
        log.info(
            "standard library: left out %d files that are not UTF-8 and %d repeated contents",
            not_text,
            repeated,
        )


def matching_files(root: Path, patterns: Sequence[str], exclude: Sequence[str]) -> list[Path]:
    """Files below root, sorted by path; links to directories are not followed.

    Broken links are among them, so that reading them complains.
    """
    wanted = re.compile("|".join(map(glob_regex, patterns)))
    excluded = re.compile("|".join(map(fnmatch.translate, exclude)) or "(?!)")
    whole = [pattern for pattern in exclude if pattern.endswith("*")]
    excluded_folder = re.compile("|".join(map(fnmatch.translate, whole)) or "(?!)")
    found = []
    for folder, folders, files in os.walk(root):
        prefix = "" if folder == str(root) else Path(folder).relative_to(root).as_posix() + "/"
        folders[:] = [name for name in folders if not excluded_folder.match(f"{prefix}{name}/")]
        names = [prefix + name for name in files]
        found += [name for name in names if wanted.match(name) and not excluded.match(name)]
    return [root / name for name in sorted(found)]


def glob_regex(pattern: str) -> str:
    """A glob of a path relative to a root: "*" stays in a directory, "**/" crosses any number."""
    special = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[!?[^]/]+\]|.", pattern)
    parts = [
        token.replace("[!", "[^") if len(token) > 2 and token[0] == "[" else special.get(token)
        for token in tokens
    ]
    joined = "".join(part or re.escape(token) for part, token in zip(parts, tokens))
    return f"(?:{joined})\\Z"
