"""The main job on any machine, CPU only: text -> tokenizer -> shards -> model -> evaluation.

The text is the Python standard library of the interpreter that runs this. Every stage is a command
that a user types; this script only puts them in order, shows what they print, and writes
<run_dir>/summary.json. Started again, it continues where it stopped; --restart begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
EXPERIMENT = "experiment=quickstart"
# Small enough for two cores; contexts as long as a row of the training and twice that.
EVALUATION = [
    "device=cpu",
    "bits_per_byte.stride=128",
    "next_line.items=120",
    "passkey.lengths=[128,256,512]",
    "passkey.depths=[0.1,0.5,0.9]",
    "passkey.samples=8",
]
PROMPTS = ["def test_", "class ", "    for name in ", "Return the "]
ORDER = ("model", "trigram", "bigram", "unigram")


def command(*arguments: str, ranks: int = 1) -> list[str]:
    """The command line of one stage; ranks > 1 starts that many processes."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "-m", "llmtrain.cli", *arguments]


def shown(line: list[str]) -> str:
    """The command as a user would type it."""
    text = " ".join(line)
    text = text.replace(f"{sys.executable} -m torch.distributed.run", "torchrun")
    return text.replace(f"{sys.executable} -m llmtrain.cli", "llmtrain")


def stage(title: str, line: list[str], threads: int) -> float:
    """Run one stage with its output on this console; returns its seconds."""
    print(f"\n== {title}\n$ {shown(line)}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    status = subprocess.run(line, cwd=ROOT, env=environment, check=False).returncode
    if status:
        raise SystemExit(
            f"quickstart: '{title}' ended with exit code {status}; its message is above. Run "
            "`make quickstart` again to continue, or `make quickstart-fresh` to start over."
        )
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--restart", action="store_true", help="delete the earlier run and corpus")
    parser.add_argument("overrides", nargs="*", help="key=value, for the training")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    per_rank = max(1, cores // RANKS)
    run_dir, corpus = ROOT / "runs" / "quickstart", ROOT / "data" / "quickstart"
    if arguments.restart:
        for folder in (run_dir, corpus):
            shutil.rmtree(folder, ignore_errors=True)

    seconds = {
        "prep": stage("1/4 text -> tokenizer -> shards", command("prep", EXPERIMENT), cores),
        "train": stage(
            f"2/4 pretraining on {RANKS} CPU ranks",
            command("train", EXPERIMENT, *arguments.overrides, ranks=RANKS),
            per_rank,
        ),
        "eval": stage(
            "3/4 evaluation: bits per byte against n-grams, passkey, lm-eval",
            command("eval", f"checkpoint={run_dir.relative_to(ROOT)}", *EVALUATION),
            cores,
        ),
        "generate": stage(
            "4/4 samples",
            command(
                "generate",
                f"checkpoint={run_dir.relative_to(ROOT)}",
                f"prompt={json.dumps(PROMPTS)}",
                "device=cpu",
                "max_new_tokens=48",
                "temperature=0.7",
            ),
            cores,
        ),
    }
    summary = summarise(run_dir, seconds)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(report(summary, run_dir, corpus))


def summarise(run_dir: Path, seconds: dict[str, float]) -> dict:
    """The main figures of all stages. The training's own summary.json becomes its `training`."""
    training = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    training = training.get("training", training)
    results = json.loads((run_dir / "eval" / "results.json").read_text(encoding="utf-8"))
    bits, passkey = results["bits_per_byte"], results["passkey"]
    return {
        "bits_per_byte": {name: bits[name]["bits_per_byte"] for name in ORDER},
        "passkey": {
            "generate_accuracy": passkey["generate_accuracy"],
            "likelihood_accuracy": passkey["likelihood_accuracy"],
            "likelihood_chance": passkey["chance"]["likelihood"],
        },
        "lm_eval": {"next_line": results["tasks"]["next_line"]},
        "tokens_per_s": training_rate(run_dir),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "training": training,
    }


def training_rate(run_dir: Path) -> float:
    """Tokens a second, the median of all logged intervals, those of earlier starts included."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return statistics.median(e["tokens_per_second"] for e in entries if e["kind"] == "train")


def report(summary: dict, run_dir: Path, corpus: Path) -> str:
    """The closing lines: figures, and where everything lies."""
    bits = summary["bits_per_byte"]
    lines = ["", "== done", "bits per byte on held-out files (fewer is better)"]
    lines += [f"  {name:8}{bits[name]:7.3f}" for name in ORDER]
    passkey, line = summary["passkey"], summary["lm_eval"]["next_line"]
    lines += [
        f"passkey: exact {passkey['generate_accuracy']:.2f}, by likelihood "
        f"{passkey['likelihood_accuracy']:.2f} (chance {passkey['likelihood_chance']:.2f})",
        f"lm-eval next_line: {line['acc_norm']:.2f} (chance 0.25)",
        f"tokens/s in training: {summary['tokens_per_s']:,.0f}",
    ]
    lines += [f"{name} took {value:.0f} s" for name, value in summary["seconds"].items()]
    places = {
        "corpus": corpus,
        "checkpoints": run_dir / "checkpoints",
        "training curve": run_dir / "metrics.jsonl",
        "evaluation": run_dir / "eval" / "results.md",
        "passkey grid": run_dir / "eval" / "passkey.png",
        "summary": run_dir / "summary.json",
    }
    lines += [f"{name:15}{path.relative_to(ROOT)}" for name, path in places.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
