"""Writing checkpoints: every rank its own file, in parallel, and all of it or nothing.

    1. every rank writes its fragments into checkpoints/.tmp-step-N, hashing chunks in threads
       meanwhile, and syncs file and folder to the disk
    2. ranks exchange sizes and hashes, or what went wrong
    3. rank 0 adds the small files and the manifest, checks that the fragments of all files cover
       every tensor, syncs, renames the folder to step-N, and only then points `latest` at it
    4. ranks learn the outcome; rank 0 deletes what retention.py says

A failure before the rename leaves nothing but the earlier checkpoints, untouched.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import yaml
from torch import Tensor
from torch.distributed import ProcessGroup

import llmtrain
from llmtrain.checkpoint import list_checkpoints, refuse
from llmtrain.distributed import World, broadcast_object, gather_objects
from llmtrain.exits import RunFailed
from llmtrain.fragments import read_index, uncovered
from llmtrain.manifest import (
    CHUNK_BYTES,
    BadCheckpoint,
    Manifest,
    hash_file,
    incomplete,
    rank_file,
    step_name,
)
from llmtrain.train.image import ALIGNMENT, Image, Streamed
from llmtrain.train.partitions import Fragment
from llmtrain.train.resume import free_name
from llmtrain.train.retention import Retention

log = logging.getLogger(__name__)

# Threads that hash; one makes 0.5 to 2 GB/s.
HASHERS = 4


class SaveFailed(RunFailed):
    """A checkpoint could not be written, for a reason that lies outside (a full disk)."""


def write_file(
    path: Path,
    size: int,
    chunk_at: Callable[[int, int], memoryview],
    pool: ThreadPoolExecutor,
    *,
    ahead: int | None,
) -> dict:
    """Write and sync a file while the pool hashes its chunks; returns its entry in a manifest.

    chunk_at(start, end) gives those bytes; they stay valid until it was called `ahead` more times,
    None: for good. Past the page cache (O_DIRECT) where the file system and the memory's alignment
    allow: several times faster, and what is cached of the training data stays.
    """
    digests: list[Future[str]] = []
    descriptor = open_direct(path)
    try:
        for start in range(0, size, CHUNK_BYTES):
            if ahead is not None and len(digests) >= ahead:
                digests[-ahead].result()
            chunk = chunk_at(start, min(size, start + CHUNK_BYTES))
            digests.append(pool.submit(hash_chunk, chunk))
            write_all(descriptor, chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": [digest.result() for digest in digests]}


def open_direct(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def write_all(descriptor: int, data: memoryview) -> None:
    """All of data; what direct I/O does not take, such as the odd end of a file, without it."""
    while data:
        whole = len(data) - len(data) % ALIGNMENT or len(data)
        try:
            data = data[os.write(descriptor, data[:whole]) :]
        except OSError as error:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def hash_chunk(chunk: memoryview) -> str:
    return hashlib.sha256(chunk).hexdigest()


def write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make creations and renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointWriter:
    """Writes the checkpoints of one run; every method but path is called by all ranks together.

    corpus_files: name -> path of files that go along (tokenizer.json, token_bytes.npy). group: the
    process group in which ranks talk about a save; None: the training's, if none is written in the
    background. keep, keep_every: how many
    of the newest good checkpoints stay, and of which steps all do.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        *,
        config: dict,
        keep: int,
        vocab_size: int,
        parameters: dict[str, tuple[int, ...]],
        corpus_files: dict[str, Path],
        keep_every: int | None = None,
        group: ProcessGroup | None = None,
    ):
        self.run_dir, self.world, self.config, self.group = run_dir, world, config, group
        self.vocab_size, self.parameters = vocab_size, parameters
        self.corpus_files = corpus_files
        self.folder = run_dir / "checkpoints"
        self.retention = Retention(run_dir, keep=keep, keep_every=keep_every)
        self.pool = ThreadPoolExecutor(HASHERS, thread_name_prefix="hash")
        if world.rank == 0:
            self.delete_leftovers()
        broadcast_object(None, world, group)  # nobody writes before that

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / step_name(step)

    def delete_leftovers(self) -> None:
        """What an interrupted save left."""
        for leftover in self.folder.glob(".tmp-*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        pointer = self.folder / "latest"
        if pointer.is_dir() and not pointer.is_symlink():  # no save could replace it
            aside = free_name(pointer)
            pointer.rename(aside)
            log.warning("%s is a folder, expected a file, and now named %s", pointer, aside.name)

    def save(
        self, step: int, fragments: list[Fragment], generators: dict[str, Tensor], trainer: dict
    ) -> Path:
        """Write checkpoints/step-<step> from live tensors, which must not change meanwhile.

        generators: this rank's random generator states; trainer: the content of trainer.json.
        SaveFailed on all ranks when any rank could not.
        """
        image = Image.of(fragments, generators, self.world.rank)
        self.write(step, image, Streamed(image), trainer)
        self.delete_old(step)
        return self.path(step)

    def write(self, step: int, image: Image, source: Streamed, trainer: dict) -> int:
        """Write an image of this rank's file, and commit what all ranks wrote; its bytes.

        SaveFailed on all ranks when any rank could not.
        """
        temporary = self.folder / f".tmp-{step_name(step)}"
        entry, failure = None, None
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            file = temporary / rank_file(self.world.rank)
            entry = write_file(file, image.size, source.chunk, self.pool, ahead=source.ahead)
            sync_folder(temporary)
        except OSError as error:
            failure = f"rank {self.world.rank}: {error}"
        results = gather_objects((entry, image.kinds, failure), self.world, self.group)
        failures = [failure for _, _, failure in results if failure]
        if self.world.rank == 0:
            if not failures:
                try:
                    self.commit(temporary, step, results, trainer)
                except (OSError, BadCheckpoint) as error:
                    failures = [str(error)]
            if failures:
                shutil.rmtree(temporary, ignore_errors=True)
        failures = broadcast_object(failures, self.world, self.group)
        if failures:
            raise self.failed(step, failures)
        return sum(entry["size"] for entry, _, _ in results)

    def failed(self, step: int, failures: list[str]) -> SaveFailed:
        earlier = list_checkpoints(self.run_dir)
        kept = f"the last one is {earlier[-1][1]}" if earlier else "there is none yet"
        return SaveFailed(
            f"checkpoint of step {step}: could not be written to {self.folder}: "
            f"{'; '.join(failures)}. Earlier checkpoints are untouched ({kept}); free space or "
            "make the folder writable, then start the same command again to continue"
        )

    def commit(self, temporary: Path, step: int, results: list[tuple], trainer: dict) -> None:
        """The small files, the manifest, and the renames that make the checkpoint exist.

        results: (entry of the file, kinds of its fragments, _) of each rank.
        """
        write_text(temporary / "trainer.json", json.dumps(trainer, indent=1))
        write_text(temporary / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        for name, source in self.corpus_files.items():
            shutil.copyfile(source, temporary / name)
            sync_folder(temporary / name)
        files = {rank_file(rank): entry for rank, (entry, _, _) in enumerate(results)}
        for name in ("trainer.json", "config.yaml", *self.corpus_files):
            files[name] = hash_file(temporary / name)
        manifest = Manifest(
            step=step,
            world_size=self.world.size,
            vocab_size=self.vocab_size,
            code_version=llmtrain.__version__,
            parameters={name: list(shape) for name, shape in self.parameters.items()},
            kinds={name: kinds for _, all_kinds, _ in results for name, kinds in all_kinds.items()},
            files=files,
            chunk_bytes=CHUNK_BYTES,
        )
        # Files of ranks on other machines are looked at through this one: the folder is shared.
        refuse(temporary, list(incomplete(temporary, manifest).values()))
        refuse(temporary, uncovered(manifest, read_index(temporary, manifest)))
        write_text(temporary / "manifest.json", manifest.to_json())
        sync_folder(temporary)
        final = self.path(step)
        temporary.rename(final)
        sync_folder(self.folder)
        pointer = self.folder / ".tmp-latest"
        write_text(pointer, final.name + "\n")
        pointer.replace(self.folder / "latest")
        sync_folder(self.folder)
        self.retention.written(final)

    def delete_old(self, step: int) -> None:
        """What need not be kept after the checkpoint of this step."""
        if self.world.rank == 0:
            self.retention.apply(step)

    def close(self) -> None:
        self.pool.shutdown()
