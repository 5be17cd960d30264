"""Nothing is lost: trainings that are killed, stopped or moved end as undisturbed ones.

    python scripts/soak.py kill --kills 200 --seed 0 --out results/soak   # SIGKILL at any moment
    python scripts/soak.py damage --out results/soak                      # broken files, full disk
    python scripts/soak.py resume --out results/soak                      # other ranks and stages
    python scripts/soak.py report --out results/soak                      # tables and soak.json

A cell is a small training (mixer x ZeRO stage, other axes dealt: scripts/soak/cells.py) that is
started, killed at a chosen moment and started again with the same command until its kills are used
up; then it may finish, and everything it leaves is compared bit for bit with a twin that nobody
disturbed. resume stops trainings and continues them, on the same ranks bit for bit, through 1, 2, 3
and 4 ranks in any order to rounding. Rows are appended to <out>/<part>.jsonl; what is there already
is not done again. The exit code is 1 when anything was not as it must be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Before numpy: pools of threads would fight over cores, and a process with threads does not fork.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
for package in ("", "kernels", "data_prep", "eval"):  # the checkout's, before any installed ones
    sys.path.insert(0, str(ROOT / package))

from soak import corpus, damage, disk, flips, pool, ranks, report, results, resume  # noqa: E402
from soak.cells import STAGES, matrix  # noqa: E402
from soak.kill import Bench, run_cell  # noqa: E402

PARTS = ("kill", "damage", "resume", "report")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="+", choices=PARTS)
    add("--out", type=Path, required=True, help="folder of rows and tables")
    add("--work", type=Path, help="folder of the runs; default: a temporary one")
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--start", choices=("fork", "exec"), help="default: fork on a CPU, exec on a GPU")
    add("--jobs", type=int, default=2, help="cells at once")
    add("--deadline", type=float, help="seconds after which no cell is begun")
    add("--keep-runs", action="store_true", help="also those that ended as they must")
    add("--cases", help="of damage and resume: only those whose name holds this text")

    cells = parser.add_argument_group("kill")
    add = cells.add_argument
    add("--kills", type=int, default=200, help="at least, over all cells")
    add("--mixers", nargs="+", help="default: all of configs/mixer")
    add("--stages", nargs="+", type=int, default=list(STAGES), choices=STAGES)
    add("--ranks", nargs="+", type=int, default=[1, 2, 3], help="processes of a job")
    add("--survivors", type=float, default=15.0, help="seconds ranks may outlive a killed one")

    broken = parser.add_argument_group("damage")
    add = broken.add_argument
    add("--bases", nargs="+", default=["1:adamw", "3:adamw"], help="stage:optimizer")
    add("--flips", type=int, default=400, help="single bits flipped in every file")

    chains = parser.add_argument_group("resume")
    chains.add_argument("--sample", action="store_true", help="each mixer once, not at every stage")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    how = options.start or ("fork" if options.device == "cpu" else "exec")
    good = True
    if set(options.parts) - {"report"}:
        with work_folder(options.work) as work:
            ranks.preload(options.device)
            bench = Bench(
                work=work,
                corpus=corpus.prepared(work / "corpus", how),
                how=how,
                survivors=options.survivors,
                seed=options.seed,
            )
            if "kill" in options.parts:
                good &= kills(options, bench)
            if "damage" in options.parts:
                good &= damages(options, bench)
            if "resume" in options.parts:
                good &= resumes(options, bench)
    if "report" in options.parts:
        good &= report.write(options.out)
    return 0 if good else 1


def work_folder(path: Path | None) -> tempfile.TemporaryDirectory:
    """Where runs are made; a given folder stays."""
    if path is None:
        return Temporary()
    path.mkdir(parents=True, exist_ok=True)
    return Given(path.resolve())


class Given:
    """A folder that outlives the program."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *exc_info: object) -> None:
        pass


class Temporary(Given):
    """One that does not, unless a run in it is to be looked at."""

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="soak-")))

    def __exit__(self, *exc_info: object) -> None:
        if not any((self.path / "runs").glob("*")):
            shutil.rmtree(self.path)


def kills(options: argparse.Namespace, bench: Bench) -> bool:
    """The kill matrix; whether all went well."""
    cells = matrix(
        kills=options.kills,
        seed=options.seed,
        device=options.device,
        mixers=options.mixers,
        stages=tuple(options.stages),
        ranks=tuple(options.ranks),
    )
    work = [
        Piece(cell.key, cell.name, lambda folder, i=i, cell=cell: run_cell(cell, i, bench, folder))
        for i, cell in enumerate(cells)
    ]
    return do("kill", work, options, bench)


def resumes(options: argparse.Namespace, bench: Bench) -> bool:
    """Stopped and continued; whether all went well."""
    chains = (resume.sample if options.sample else resume.matrix)(options.seed)
    work = [
        Piece(chain.key, chain.name, lambda at, chain=chain: resume.run_chain(chain, bench, at))
        for chain in chains
        if not options.cases or options.cases in chain.name
    ]
    return do("resume", work, options, bench)


def damages(options: argparse.Namespace, bench: Bench) -> bool:
    """The damage part; whether all went well."""
    work = []
    for text in options.bases:
        stage, optimizer = text.split(":")
        cell = damage.base_cell(int(stage), optimizer, options.device)
        folder = bench.work / "bases" / f"{text}-{cell.key}"
        base = damage.make_base(cell, bench, folder)
        work += damage_of(base, options, bench)
    work = [piece for piece in work if not options.cases or options.cases in piece.name]
    return do("damage", work, options, bench)


def damage_of(base: damage.Base, options: argparse.Namespace, bench: Bench) -> list[Piece]:
    """All cases of one base run."""
    at, seed = f"zero{base.cell.stage} {base.cell.optimizer}", options.seed
    found = []
    for name in damage.FILES:
        found.append(
            Piece(
                flips.key_of(base, name, options.flips, seed),
                f"{at}: flips in {name}",
                lambda folder, name=name: flips.run(base, name, options.flips, seed, folder),
            )
        )
    for case in damage.cases(base.newest, seed):
        found.append(
            Piece(
                damage.key_of(case, base.cell, seed),
                f"{at}: {case.name}",
                lambda folder, case=case: damage.run_case(case, base, bench, folder),
            )
        )
    for share in disk.SHARES:
        found.append(
            Piece(
                disk.key_of(share, base.cell, seed),
                f"{at}: disk full at {share:.0%}",
                lambda folder, share=share: disk.run_case(share, base, bench, folder),
            )
        )
    return found


@dataclass(frozen=True)
class Piece:
    """Work that makes one row. run(folder for its files) -> row."""

    key: str
    name: str
    run: Callable[[Path], dict]


def do(part: str, work: list[Piece], options: argparse.Namespace, bench: Bench) -> bool:
    """Make the rows that are missing or were not as they must be; whether all are now."""
    rows = {row["key"]: row for row in results.read(options.out, part)}
    todo = [piece for piece in work if piece.key not in rows or not rows[piece.key]["equal"]]
    print(f"{part}: {len(work)} to do, {len(work) - len(todo)} done before", flush=True)

    def one(piece: Piece) -> None:
        folder = bench.work / "runs" / piece.name.replace(" ", "_").replace(":", "")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        row = piece.run(folder)
        results.append(options.out, part, row)
        if row["equal"] and not options.keep_runs:
            shutil.rmtree(folder)
        verdict = "good" if row["equal"] else f"WRONG, see {folder}: {row['problems']}"
        print(f"{piece.name}: {row['seconds']:.0f} s, {verdict}", flush=True)

    failed = pool.run(
        [(piece.name, lambda piece=piece: one(piece)) for piece in todo],
        at_once=options.jobs,
        deadline=options.deadline,
    )
    rows = {row["key"]: row for row in results.read(options.out, part)}
    return not failed and all(rows[piece.key]["equal"] for piece in work)


if __name__ == "__main__":
    sys.exit(main())
