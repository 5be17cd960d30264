"""`llmtrain eval`: everything that eval.yaml asks for, of one checkpoint.

    find checkpoint -> load tasks and held-out text -> load model -> bits per byte, n-grams,
    passkey, lm-eval tasks -> results.json, results.md, passkey.json, passkey.png

Whatever can be wrong about the request is found before the model is loaded. Results are written
after each part, so that a later failure costs no finished one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from functools import cached_property
from pathlib import Path

import torch
from llmtrain_data.manifest import FILE as MANIFEST_FILE
from llmtrain_data.manifest import TOKENIZER_FILE, Manifest
from llmtrain_data.shards import write_atomic
from llmtrain_data.tokenizer import Existing, load_tokenizer

from llmtrain import checkpoint
from llmtrain.build import DTYPES, build_model
from llmtrain.config import load as load_config
from llmtrain.data.loader import TokenLoader
from llmtrain.model.language_model import LanguageModel
from llmtrain.model.position import Learned
from llmtrain_eval import bits_per_byte, harness, passkey, ranks, report
from llmtrain_eval.adapter import LlmtrainLM, progress
from llmtrain_eval.ngram import Baselines

log = logging.getLogger(__name__)

PROBES = ("bits_per_byte", "ngram")  # what `tasks` may name beside lm-eval's tasks
PASSKEY = "passkey"  # a group of lm-eval tasks, evaluated by itself: its lengths rule


def run_eval(config: dict) -> dict:
    """Evaluate as a resolved eval.yaml says; returns what results.json holds. All ranks call it.

    ValueError for a missing or damaged checkpoint, unknown tasks, data that cannot be had,
    contexts or a depth that the model cannot take, a corpus of another tokenizer.
    """
    device = ranks.device(config["device"])
    joined = ranks.join(device)
    try:
        return Evaluation(config, device).run()
    finally:
        if joined:
            ranks.leave()


class Evaluation:
    """One evaluation: the checks in __init__, the work in run()."""

    def __init__(self, config: dict, device: torch.device):
        self.config, self.device = config, device
        self.folder = checkpoint.resolve(config["checkpoint"])
        self.trained = load_config(self.folder)
        self.outline.stack.set_depth(repeats=config["repeats"])
        self.out = Path(config["out"] or Path(config["checkpoint"]) / "eval")
        names = config["tasks"]
        self.probes = [name for name in PROBES if name in names]
        others = [name for name in names if name not in (*PROBES, PASSKEY)]
        self.warnings: list[str] = []
        if PASSKEY in names:
            grid = config["passkey"]
            self.warnings += passkey.check_grid(
                grid["lengths"], grid["depths"], limit=self.limit, trained=self.context
            )
        if self.probes or "next_line" in others:
            self.check_corpus()
        self.streams = self.held_out() if self.probes else []
        self.passkey_tasks = self.load_tasks([PASSKEY] if PASSKEY in names else [])
        self.tasks = self.load_tasks(others)
        for warning in self.warnings if ranks.rank() == 0 else ():
            log.warning("%s", warning)

    @cached_property
    def outline(self) -> LanguageModel:
        """The model without its values."""
        vocab_size = checkpoint.read_manifest(self.folder).vocab_size
        return build_model(self.trained, vocab_size=vocab_size, device="meta")

    @cached_property
    def limit(self) -> int | None:
        """The longest context that the model can read, None if there is none."""
        position = self.outline.position
        return position.max_seq_len if isinstance(position, Learned) else None

    @cached_property
    def context(self) -> int:
        """The longest context that the model was made for: a row of its training, or what its
        rotary positions are scaled to."""
        scaled = self.trained["position"].get("scaling", "none") != "none"
        model, train = self.trained["model"], self.trained["train"]
        return model["max_seq_len"] if scaled else train["seq_len"]

    @cached_property
    def max_length(self) -> int:
        """Tokens of a row in lm-eval's tasks, at most."""
        wanted = self.config["max_length"]
        if wanted is not None and self.limit is not None and wanted > self.limit:
            raise ValueError(
                f"max_length: got {wanted}, expected at most {self.limit}, the positions that this "
                "model has learned (model.max_seq_len); lower max_length"
            )
        return wanted or self.context

    @cached_property
    def corpus(self) -> Path:
        data = self.trained["data"]
        return Path(self.config["corpus"] or Path(data["root"]) / data["name"])

    def check_corpus(self) -> None:
        """ValueError unless the corpus exists and fits what is asked of it."""
        if not (self.corpus / MANIFEST_FILE).is_file():
            origin = "eval.yaml" if self.config["corpus"] else "the checkpoint's config.yaml"
            raise ValueError(
                f"corpus: got {self.corpus} (from {origin}), where no prepared corpus lies; "
                f"{', '.join(self.probes) or 'next_line'} expected the folder that `llmtrain prep` "
                "made; give corpus=DIR, or leave them out of tasks"
            )
        manifest = Manifest.load(self.corpus)
        tokenizer = hashlib.sha256((self.folder / TOKENIZER_FILE).read_bytes()).hexdigest()
        if self.probes and manifest.tokenizer_sha256 != tokenizer:
            raise ValueError(
                f"corpus: {self.corpus} holds tokens of the tokenizer "
                f"{manifest.tokenizer_sha256[:12]}, expected the checkpoint's {tokenizer[:12]}; "
                "prepare that text with the checkpoint's tokenizer "
                f"(tokenizer=existing tokenizer.path={self.folder / TOKENIZER_FILE})"
            )
        if "ngram" in self.probes and manifest.fingerprint != self.trainer["data_fingerprint"]:
            raise ValueError(
                f"ngram: {self.corpus} is the corpus {manifest.fingerprint[:12]}, expected "
                f"{self.trainer['data_fingerprint'][:12]}, which the model was trained on; "
                "n-grams are counted on the same tokens: give that corpus, or leave ngram out"
            )

    @cached_property
    def trainer(self) -> dict:
        """The checkpoint's trainer.json: how far the training was, and on which corpus."""
        return json.loads((self.folder / "trainer.json").read_text(encoding="utf-8"))

    def held_out(self) -> list[bits_per_byte.HeldOut]:
        return bits_per_byte.held_out(
            self.corpus,
            seq_len=self.trained["train"]["seq_len"],
            stride=self.config["bits_per_byte"]["stride"],
            max_tokens=self.config["bits_per_byte"]["max_tokens"],
        )

    def load_tasks(self, names: list[str]) -> dict:
        """lm-eval's tasks with their data; none for no names."""
        if not names:
            return {}
        metadata = {
            "tokenizer_file": str(self.folder / TOKENIZER_FILE),
            "tokenizer": str(self.folder),  # how lm-eval's own generated tasks (RULER) know it
            "add_bos": self.config["add_bos"],
            "max_length": self.max_length,
            "corpus": str(self.corpus),
            "passkey": self.config["passkey"],
            "next_line": self.config["next_line"],
        }
        return harness.load_tasks(
            names,
            metadata=metadata,
            include_path=self.config["include_path"],
            num_fewshot=self.config["num_fewshot"],
            others=PROBES,
        )

    def run(self) -> dict:
        """Load the model, do every part, write and print the results."""
        began = time.perf_counter()
        precision = self.config["precision"]
        loaded = checkpoint.load_model(self.folder, self.device, DTYPES[precision])
        loaded.model.stack.set_depth(repeats=self.config["repeats"])
        if ranks.rank() == 0:
            report.set_aside(self.out)
        results: dict = {
            "checkpoint": report.checkpoint_facts(self.folder, loaded.step),
            "versions": report.versions(),
            "config": self.config,
            "environment": {
                "device": device_name(self.device),
                "precision": precision,
                "ranks": ranks.world_size(),
            },
            "warnings": self.warnings,
        }
        parts = (
            ("bits_per_byte", self.probes, self.measure_bits),
            ("passkey", self.passkey_tasks, self.measure_passkey),
            ("tasks", self.tasks, self.measure_tasks),
        )
        for name, wanted, measure in parts:
            if wanted:
                results[name] = measure(loaded)
                results["environment"]["seconds"] = time.perf_counter() - began
                if ranks.rank() == 0:
                    report.write(results, self.out)
        if ranks.rank() == 0:
            print(f"\n{report.markdown(results)}\n\nwritten to {self.out}", flush=True)
        return results

    def adapter(self, loaded: checkpoint.Loaded, max_length: int) -> LlmtrainLM:
        tokenizer = load_tokenizer(loaded.tokenizer_file)
        spec = Existing(path=str(loaded.tokenizer_file), eot=self.trained["tokenizer"].get("eot"))
        return LlmtrainLM(
            loaded.model,
            tokenizer,
            eot_token_id=tokenizer.token_to_id(spec.document_token(tokenizer)),
            max_length=max_length,
            batch_tokens=self.config["batch_tokens"],
            add_bos=self.config["add_bos"],
            seed=self.config["seed"],
        )

    def measure_bits(self, loaded: checkpoint.Loaded) -> dict:
        """{"model": {...}, "unigram": {...}, ...}, each as bits_per_byte.bits_per_byte returns."""
        train = self.trained["train"]
        masked = train["mask_documents"]
        total = sum(one.scored_tokens() for one in self.streams)
        results = {}
        with progress("bits per byte, tokens", total, False) as bar:
            results["model"] = bits_per_byte.bits_per_byte(
                loaded.model,
                self.streams,
                loaded.token_bytes,
                mask_documents=masked,
                batch_tokens=self.config["batch_tokens"],
                done=bar.update,
            )
        if "ngram" in self.probes:
            counted = self.count_ngrams(results["model"]) if ranks.rank() == 0 else {}
            results |= ranks.gather(counted)[0]
        return results

    def count_ngrams(self, model: dict) -> dict:
        """What n-grams pay for the same tokens, counted on those that the model was trained on."""
        train = self.trained["train"]
        loader = TokenLoader.open(
            self.corpus,
            "train",
            seq_len=train["seq_len"],
            seed=self.trained["seed"],
            weights=self.trained["data"]["weights"],
        )
        baselines = Baselines.counted(
            loader, samples=self.trainer["next_sample"], mask_documents=train["mask_documents"]
        )
        log.info("n-grams: scoring %d held-out tokens", model["tokens"])
        return bits_per_byte.of_ngrams(
            baselines, self.streams, model, mask_documents=train["mask_documents"]
        )

    def measure_passkey(self, loaded: checkpoint.Loaded) -> dict:
        """The grid, and its mean over all cells; also passkey.json and passkey.png."""
        lm = self.adapter(loaded, max(self.config["passkey"]["lengths"]))
        scores, samples = harness.evaluate(lm, self.passkey_tasks)
        grid = passkey.grid(samples)
        for kind, task, metric in zip(passkey.KINDS, passkey.TASKS, passkey.METRICS):
            grid[f"{kind}_accuracy"] = scores[task][metric]
            grid[f"{kind}_stderr"] = scores[task][f"{metric}_stderr"]
        if ranks.rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            title = f"{self.folder.parent.parent.name}, step {loaded.step}"
            write_atomic(self.out / "passkey.json", report.to_json(grid, indent=1).encode())
            passkey.plot(grid, self.out / "passkey.png", title=title, trained=self.context)
        return grid

    def measure_tasks(self, loaded: checkpoint.Loaded) -> dict:
        """Scores by task and group."""
        lm = self.adapter(loaded, self.max_length)
        scores, samples = harness.evaluate(lm, self.tasks, limit=self.config["limit"])
        for task, count in lm.truncated.items():
            self.warnings.append(
                f"{task}: {count} requests were cut on the left to fit {self.max_length} tokens"
            )
        if ranks.rank() == 0 and self.config["log_samples"]:
            report.write_samples(samples, self.out)
        return scores


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
