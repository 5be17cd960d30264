"""Writing checkpoints: every rank its own file, in parallel, and all of it or nothing.

    1. rank 0 makes checkpoints/.tmp-step-N; every rank writes its fragments into it, hashing on
       the way, and syncs the file to the disk
    2. ranks exchange sizes and hashes, or what went wrong
    3. rank 0 adds the small files and the manifest, syncs, renames the folder to step-N, and only
       then points `latest` at it and deletes checkpoints beyond `keep`

A failure before the rename leaves nothing but the earlier checkpoints, untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml
from torch import Tensor

import llmtrain
from llmtrain.checkpoint import Manifest, list_checkpoints, sha256_of, step_name
from llmtrain.distributed import World, broadcast_object, gather_objects
from llmtrain.train.partitions import Fragment

DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict:
    """Write a safetensors file one tensor at a time, synced; returns its size and sha256.

    tensors: 1-D; on any device, copied to the host one by one.
    """
    tensors = list(tensors)
    header, end = {}, 0
    for key, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # data is aligned to 8 bytes
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            nonlocal size
            file.write(data)
            digest.update(data)
            size += len(data)

        put(len(encoded).to_bytes(8, "little"))
        put(encoded)
        for _, tensor in tensors:
            put(memoryview(tensor.detach().cpu().contiguous().numpy()).cast("B"))
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


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
    """Saves the checkpoints of one run; every method is called by all ranks together.

    corpus_files: name -> path of files that go along (tokenizer.json, token_bytes.npy).
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
    ):
        self.run_dir, self.world, self.config, self.keep = run_dir, world, config, keep
        self.vocab_size, self.parameters = vocab_size, parameters
        self.corpus_files = corpus_files
        self.folder = run_dir / "checkpoints"
        self.suspect: int | None = None

    def save(
        self, step: int, fragments: list[Fragment], generators: dict[str, Tensor], trainer: dict
    ) -> Path:
        """Write checkpoints/step-<step>; ValueError on all ranks when any rank could not.

        generators: this rank's random generator states; trainer: the content of trainer.json.
        """
        temporary = self.folder / f".tmp-{step_name(step)}"
        self.together(lambda: self.prepare(temporary), step)
        name = f"rank-{self.world.rank:05d}.safetensors"
        tensors = [
            (f"{kind}|{fragment.name}|{fragment.offset}", view)
            for fragment in fragments
            for kind, view in fragment.views.items()
        ]
        tensors += [(f"{kind}|{self.world.rank}|0", state) for kind, state in generators.items()]
        entry, failure = None, None
        try:
            entry = write_tensors(temporary / name, tensors)
        except OSError as error:
            failure = f"rank {self.world.rank}: {error}"
        results = gather_objects((name, entry, failure), self.world)
        failures = [failure for _, _, failure in results if failure]
        if failures:
            self.give_up(temporary, step, failures)
        files = {name: entry for name, entry, _ in results}
        self.together(lambda: self.commit(temporary, step, files, trainer), step)
        return self.path(step)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / step_name(step)

    def together(self, action, step: int) -> None:
        """Rank 0 acts; all ranks go on, or all raise."""
        failure = None
        if self.world.rank == 0:
            try:
                action()
            except OSError as error:
                failure = str(error)
        failure = broadcast_object(failure, self.world)
        if failure:
            self.give_up(self.folder / f".tmp-{step_name(step)}", step, [failure])

    def give_up(self, temporary: Path, step: int, failures: list[str]) -> None:
        if self.world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        earlier = list_checkpoints(self.run_dir)
        kept = f"the last one is {earlier[-1][1]}" if earlier else "there is none yet"
        raise ValueError(
            f"checkpoint of step {step}: could not be written to {self.folder}: "
            f"{'; '.join(failures)}. Earlier checkpoints are untouched ({kept}); free space or "
            "make the folder writable, then start the same command again to continue"
        )

    def prepare(self, temporary: Path) -> None:
        """An empty folder to write into; leftovers of interrupted saves go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".tmp-*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        temporary.mkdir()

    def commit(self, temporary: Path, step: int, files: dict[str, dict], trainer: dict) -> None:
        """The small files, the manifest, and the renames that make the checkpoint exist."""
        write_text(temporary / "trainer.json", json.dumps(trainer, indent=1))
        write_text(temporary / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        for name, source in self.corpus_files.items():
            shutil.copyfile(source, temporary / name)
            sync_folder(temporary / name)
        for name in ("trainer.json", "config.yaml", *self.corpus_files):
            path = temporary / name
            files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        manifest = Manifest(
            step=step,
            world_size=self.world.size,
            vocab_size=self.vocab_size,
            code_version=llmtrain.__version__,
            parameters={name: list(shape) for name, shape in self.parameters.items()},
            files=files,
        )
        write_text(temporary / "manifest.json", manifest.to_json())
        sync_folder(temporary)
        final = self.path(step)
        temporary.rename(final)
        sync_folder(self.folder)
        pointer = self.folder / ".tmp-latest"
        write_text(pointer, final.name + "\n")
        pointer.replace(self.folder / "latest")
        sync_folder(self.folder)
        self.delete_old(step)

    def delete_old(self, step: int) -> None:
        """Delete all but the `keep` newest up to the one just written, which is good.

        What the run would go back to if steps from `suspect` on had to be undone stays too.
        """
        written = [(at, path) for at, path in list_checkpoints(self.run_dir) if at <= step]
        sound = [path for at, path in written if self.suspect is not None and at < self.suspect]
        for _, path in written[: -self.keep]:
            if path not in sound[-1:]:
                shutil.rmtree(path)
