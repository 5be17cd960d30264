"""Source over Hugging Face `datasets`: a hub dataset, local data files, or a saved directory."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain_data.documents import (
    ERROR_POLICIES,
    MISSING_POLICIES,
    Document,
    check_choice,
    common_base,
    describe_files,
    text_of_record,
)

log = logging.getLogger(__name__)


class HuggingFace:
    """The text field of every record of one split.

    path: a hub name ("owner/name"), a builder ("json", "parquet", "text") with data_files, or a
    directory written by save_to_disk. name: the dataset's configuration. streaming: read records
    as they arrive instead of downloading the whole split first. revision: a commit of the hub
    dataset; without it a later change of the dataset goes unnoticed.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        split: str = "train",
        text_field: str = "text",
        streaming: bool = True,
        data_files: str | Sequence[str] | Mapping[str, str] | None = None,
        revision: str | None = None,
        errors: str = "strict",
        missing: str = "error",
    ):
        self.path = path
        self.name = name
        self.split = split
        self.text_field = text_field
        self.streaming = streaming
        self.data_files = data_files
        self.revision = revision
        self.errors = check_choice("data source HuggingFace, errors", errors, ERROR_POLICIES)
        self.missing = check_choice("data source HuggingFace, missing", missing, MISSING_POLICIES)

    @property
    def saved(self) -> bool:
        """Whether path is a directory written by Dataset.save_to_disk or DatasetDict's."""
        root = Path(self.path)
        return (root / "state.json").is_file() or (root / "dataset_dict.json").is_file()

    def describe(self) -> dict[str, Any]:
        description = {
            "kind": "HuggingFace",
            "path": self.path,
            "name": self.name,
            "split": self.split,
            "text_field": self.text_field,
            "data_files": self.data_files,
            "revision": self.revision,
            "errors": self.errors,
            "missing": self.missing,
        }
        files = self._local_files()
        if files:
            description.update(describe_files(files, common_base(files)))
        return description

    def _local_files(self) -> list[Path]:
        """The files read, where they are on this machine."""
        if self.saved:
            return sorted(Path(self.path).rglob("*.arrow"))
        given = self.data_files or []
        given = given.values() if isinstance(given, Mapping) else given
        paths = [given] if isinstance(given, str) else given
        return sorted({Path(name) for path in paths for name in glob.glob(path, recursive=True)})

    def __iter__(self) -> Iterator[Document]:
        skipped = 0
        for number, record in enumerate(self._records()):
            text = text_of_record(
                record,
                self.text_field,
                where=f"{self._where()}, record {number}",
                errors=self.errors,
                missing=self.missing,
            )
            if text is None:
                skipped += 1
                continue
            yield Document(text=text, id=f"{self.split}:{number}")
        if skipped:
            log.warning("dataset %s: left out %d records", self.path, skipped)

    def _records(self) -> Iterator[Mapping[str, Any]]:
        try:
            yield from self._open()
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(
                f"{self._where()}: not found here and cannot be fetched ({error}); expected a hub "
                "dataset while online, existing data_files, or a directory of save_to_disk; set "
                "path, or fetch it on a machine with a network and save_to_disk it there"
            ) from error

    def _open(self) -> Iterable[Mapping[str, Any]]:
        # Imported here: it takes seconds, and only this source needs it.
        import datasets

        if self.saved:
            data = datasets.load_from_disk(self.path)
            if not isinstance(data, datasets.DatasetDict):
                return data
            if self.split not in data:
                raise ValueError(
                    f"{self._where()}: no such split; the directory holds "
                    f"{', '.join(map(repr, data))}; set split"
                )
            return data[self.split]
        try:
            return datasets.load_dataset(
                self.path,
                self.name,
                split=self.split,
                streaming=self.streaming,
                data_files=self.data_files,
                revision=self.revision,
            )
        except ValueError as error:
            raise ValueError(f"{self._where()}: {error}; set path, name or split") from error

    def _where(self) -> str:
        return (
            f"data source HuggingFace, path={self.path!r}, name={self.name!r}, "
            f"split={self.split!r}, data_files={self.data_files!r}"
        )
