"""The directory of a corpus while it is being made: <corpus>.partial.

It keeps the request and, line by line in progress.jsonl, every shard that is whole, so that the
same request continues where it was interrupted. Other requests start over. It is renamed to the
corpus at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain_data.encode import Encoded
from llmtrain_data.manifest import TOKENIZER_FILE
from llmtrain_data.shards import ShardInfo, ShardWriter, explained, sync_directory, write_atomic

log = logging.getLogger(__name__)
Target = tuple[str, str]  # split, source
LOCK, REQUEST, PROGRESS = "lock", "request.json", "progress.jsonl"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A whole shard. contents: sha256 of its documents' digests, to recognise them again."""

    info: ShardInfo
    contents: str


class Partial:
    """Open with the request; write documents with add(); finish() makes it the corpus."""

    def __init__(self, corpus: Path, request: dict[str, Any]):
        self.corpus = corpus
        self.root = corpus.with_name(corpus.name + ".partial")
        self.left_behind = f"the shards finished so far stay in {self.root} and are used again"
        if self.root.is_dir() and any(self.root.iterdir()) and not (self.root / LOCK).exists():
            raise ValueError(
                f"corpus {corpus}: {self.root}, where it is made, exists and no preparation wrote "
                "it, so it is left alone; expected a free path; move it away, or set another "
                "data.name"
            )
        with explained(self.root, "nothing was written"):
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = (self.root / LOCK).open("w")
        self._take_lock()
        self.finished: dict[Target, list[Finished]] = defaultdict(list)
        with explained(self.root, "nothing was written"):
            if self._same_request(request):
                self._read_progress()
            else:
                self._clear()
                write_atomic(self.root / REQUEST, json.dumps(request).encode())

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"corpus {self.corpus}: another process is preparing it (lock {self.root / LOCK}); "
                "wait until it ends, or set another data.name"
            ) from error

    def _same_request(self, request: dict[str, Any]) -> bool:
        path = self.root / REQUEST
        return path.is_file() and json.loads(path.read_bytes()) == request

    def _clear(self) -> None:
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _read_progress(self) -> None:
        path = self.root / PROGRESS
        lines = path.read_text().splitlines() if path.is_file() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the line being written when the power went; its shard is made again
            info = ShardInfo(**entry["info"])
            self.finished[entry["split"], entry["source"]].append(
                Finished(info=info, contents=entry["contents"])
            )
        if lines:
            log.info("%s: continuing an interrupted run, %d shards done", self.root, len(lines))
        # Drop a torn line, so that what is appended next starts on a line of its own.
        kept = [self._line(target, shard) for target, all in self.finished.items() for shard in all]
        write_atomic(path, "".join(kept).encode())

    def _line(self, target: Target, shard: Finished) -> str:
        split, source = target
        entry = {"split": split, "source": source, "contents": shard.contents}
        return json.dumps({**entry, "info": asdict(shard.info)}) + "\n"

    def record(self, target: Target, shard: Finished) -> None:
        """Note a shard that is whole on the disk."""
        with (self.root / PROGRESS).open("a") as file:
            file.write(self._line(target, shard))
            file.flush()
            os.fsync(file.fileno())
        self.finished[target].append(shard)

    def finish(self) -> None:
        """Make this directory the corpus; an older one is deleted only afterwards."""
        old = self.root.with_name(self.root.name + ".replaced")
        with explained(self.root, self.left_behind):
            for name in (REQUEST, PROGRESS, LOCK):
                (self.root / name).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)
            if self.corpus.exists():
                os.replace(self.corpus, old)
            os.replace(self.root, self.corpus)
            sync_directory(self.corpus.parent)
            shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        """Let others in. A directory without even a tokenizer, of no use to a later run, goes."""
        if not (self.root / TOKENIZER_FILE).exists():
            shutil.rmtree(self.root, ignore_errors=True)
        self._lock.close()


class CorpusWriter:
    """Appends encoded documents to the shards of their targets.

    A shard is closed by the first document that finds shard_tokens tokens in it, and at the end
    of its source, so where shards end depends on the documents alone.
    """

    def __init__(
        self,
        partial: Partial,
        *,
        dtype: np.dtype,
        eot_id: int,
        tokenizer_sha256: str,
        shard_tokens: int,
    ):
        self.partial = partial
        self.eot_T = np.array([eot_id], dtype=dtype)
        self.tokenizer_sha256 = tokenizer_sha256
        self.shard_tokens = shard_tokens
        self._open: dict[Target, tuple[ShardWriter, Any]] = {}

    def add(self, encoded: Encoded) -> None:
        segment = encoded.segment
        target = segment.target
        with explained(self.partial.root / target[0] / target[1], self.partial.left_behind):
            if segment.content is not None:
                writer, contents = self._writer(target)
                contents.update(segment.content)
                writer.begin_document()
                writer.append(self.eot_T, 0)
            self._open[target][0].append(encoded.tokens_T, segment.bytes)

    def _writer(self, target: Target) -> tuple[ShardWriter, Any]:
        if any(source != target[1] for _, source in self._open):
            self._close_all()
        if target in self._open and self._open[target][0].tokens >= self.shard_tokens:
            self._close(target)
        if target not in self._open:
            directory = self.partial.root / target[0] / target[1]
            directory.mkdir(parents=True, exist_ok=True)
            name = f"shard-{len(self.partial.finished[target]):05d}.bin"
            writer = ShardWriter(
                directory / name, dtype=self.eot_T.dtype, tokenizer_sha256=self.tokenizer_sha256
            )
            self._open[target] = writer, hashlib.sha256()
        return self._open[target]

    def _close(self, target: Target) -> None:
        writer, contents = self._open[target]
        finished = Finished(info=writer.close(), contents=contents.hexdigest())
        del self._open[target]
        self.partial.record(target, finished)

    def _close_all(self) -> None:
        for target in list(self._open):
            self._close(target)

    def close(self) -> None:
        with explained(self.partial.root, self.partial.left_behind):
            self._close_all()

    def abort(self) -> None:
        """Remove the shards that are not whole."""
        for writer, _ in self._open.values():
            writer.abort()
        self._open.clear()


class Skipper:
    """Recognises the documents of one target that finished shards already hold."""

    def __init__(self, partial: Partial, target: Target):
        self.root = partial.root
        self.target = target
        self._left = list(partial.finished[target])
        self._seen = 0
        self._contents = hashlib.sha256()

    def done(self, content: bytes) -> bool:
        """Whether the next document is already written. Raises ValueError when the documents are
        not those of the interrupted run."""
        if not self._left:
            return False
        self._seen += 1
        self._contents.update(content)
        if self._seen == self._left[0].info.documents:
            if self._contents.hexdigest() != self._left[0].contents:
                raise self._changed()
            self._left.pop(0)
            self._seen, self._contents = 0, hashlib.sha256()
        return True

    def finish(self) -> None:
        """Raises ValueError when there were fewer documents than finished shards hold."""
        if self._left:
            raise self._changed()

    def _changed(self) -> ValueError:
        return ValueError(
            f"source {self.target[1]!r}, split {self.target[0]!r}: the documents of "
            f"{self._left[0].info.file} are not those of the interrupted run, expected the same "
            f"documents in the same order; delete {self.root} to start over"
        )
