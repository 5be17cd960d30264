"""Everything of a run that can be known, and can be wrong, before a GPU or a process group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from llmtrain_data.manifest import Manifest
from llmtrain_kernels import float8

from llmtrain import build
from llmtrain.accounting import train_flops_per_token
from llmtrain.data.loader import TokenLoader
from llmtrain.data.prefetch import check_rows
from llmtrain.distributed import World
from llmtrain.plan import Plan, describe, make_plan
from llmtrain.train import faults
from llmtrain.train.batches import choose_micro_batch
from llmtrain.train.branch import settle
from llmtrain.train.copies import use_float8
from llmtrain.train.faults import Fault
from llmtrain.train.graphs import launch_bound, why_not
from llmtrain.train.guard import Knobs
from llmtrain.train.module import TrainModule
from llmtrain.train.muon import Muon
from llmtrain.train.optimizer import AdamW
from llmtrain.train.runlog import check_writable
from llmtrain.train.schedule import Schedule
from llmtrain.train.tracker import Tracker
from llmtrain.train.truth import OptimizerCheck
from llmtrain.train.zero import Zero0, for_ranks


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A checked run. held_out: None when the corpus has no held-out text. backends: "mixer a",
    "channel b", ... -> the kernel backend that trains it."""

    config: dict
    world: World
    device: torch.device
    plan: Plan
    micro_batch: int
    optimizer: AdamW | Muon
    schedule: Schedule
    zero: Zero0
    tracker: Tracker
    corpus: Path
    loader: TokenLoader
    held_out: TokenLoader | None
    backends: dict[str, str]
    guard: Knobs
    faults: tuple[Fault, ...]

    @classmethod
    def check(
        cls, config: dict, world: World, device: torch.device, *, elsewhere: bool = False
    ) -> Setup:
        """Build all small parts of a configuration. ValueError: what does not fit.

        elsewhere: it will run on other machines, so nothing is asked of this one's devices.
        """
        config = settle(config)
        knobs, data, guard = config["train"], config["data"], config["guard"]
        zero = build.part(config["deepspeed"], build.label(config, "deepspeed"))
        zero = for_ranks(zero, world.size)
        ask = not elsewhere or device.type == "cpu"
        if knobs["precision"] in build.SCALINGS:
            check_float8(knobs, device if ask else None)
        reason = cannot_record(knobs, world, zero, device)
        if knobs["cuda_graphs"] == "always" and reason is not None and ask:
            raise ValueError(
                f"train.cuda_graphs=always: {reason}; change that or set train.cuda_graphs=auto"
            )
        optimizer = build.part(config["optimizer"], build.label(config, "optimizer"))
        optimizer.check_stage(zero.stage)
        one_row = {**config, "train": {**knobs, "micro_batch": 1}}
        plan = make_plan(one_row, ranks=world.size, device=device.type)
        given = knobs["micro_batch"] if ask else knobs["micro_batch"] or 1
        micro_batch = choose_micro_batch(given, plan, zero.stage, device)
        chosen = {**config, "train": {**knobs, "micro_batch": micro_batch}}
        plan = make_plan(chosen, ranks=world.size, device=device.type)
        corpus = Path(data["root"]) / data["name"]
        order = {"seq_len": knobs["seq_len"], "seed": config["seed"]}
        splits = Manifest.load(corpus).splits
        loader = TokenLoader.open(corpus, "train", weights=data["weights"], **order)
        check_rows(loader, plan.rows, world.size, micro_batch)
        backends = kernel_backends(config, device, loader.vocab_size) if ask else {}
        check_writable(Path(config["run_dir"]))
        return cls(
            config=config,
            world=world,
            device=device,
            plan=plan,
            micro_batch=micro_batch,
            optimizer=optimizer,
            schedule=build.part(
                config["schedule"], build.label(config, "schedule"), total_steps=plan.steps
            ),
            zero=zero,
            tracker=build.part(config["tracker"], build.label(config, "tracker")),
            corpus=corpus,
            loader=loader,
            held_out=TokenLoader.open(corpus, "val", **order) if "val" in splits else None,
            backends=backends,
            guard=Knobs(**{key: guard[key] for key in guard if key != "inject"}),
            faults=faults.check(
                guard["inject"],
                ranks=world.size,
                steps=plan.steps,
                stage=zero.stage,
                run_dir=Path(config["run_dir"]),
            ),
        )

    @property
    def run_dir(self) -> Path:
        return Path(self.config["run_dir"])

    def build_module(self, device: torch.device | str = "cpu") -> TrainModule:
        """The model with its objective, as the configuration wants it trained."""
        knobs = self.config["train"]
        model = build.build_model(
            self.config,
            vocab_size=self.loader.vocab_size,
            device=device,
            compute_dtype=build.DTYPES[knobs["precision"]],
        )
        model.stack.activation_checkpointing = knobs["activation_checkpointing"]
        if knobs["precision"] in build.SCALINGS:
            use_float8(model, build.SCALINGS[knobs["precision"]])
        objective = build.build_objective(self.config)
        return TrainModule(model, objective, self.loader.token_bytes)

    def optimizer_check(self, module: TrainModule) -> OptimizerCheck | None:
        """The check of the first step's update; module: as build_module() gave it."""
        knobs = self.config["health"]
        if not knobs["optimizer_check"]:
            return None
        return OptimizerCheck(
            self.optimizer,
            module,
            elements=knobs["optimizer_check_elements"],
            world=self.world,
            device=self.device,
        )

    def graphs(self) -> str | None:
        """Whether micro-batches run as CUDA graphs: always, auto (where they can) or None."""
        wanted = self.config["train"]["cuda_graphs"]
        if wanted != "auto":
            return None if wanted == "never" else wanted
        if cannot_record(self.config["train"], self.world, self.zero, self.device) is not None:
            return None
        layers = len(self.build_module("meta").model.stack.layers)
        tokens = self.micro_batch * self.plan.seq_len
        return "auto" if launch_bound(self.flops(), tokens, layers, self.device) else None

    def facts(self) -> dict:
        """What a line of starts.jsonl says about how the run is computed."""
        cuda = self.device.type == "cuda"
        return {
            "ranks": self.world.size,
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "micro_batch": self.micro_batch,
            "micro_steps": self.plan.rows // self.world.size // self.micro_batch,
            "data_fingerprint": self.loader.fingerprint,
            "data_stream": self.loader.stream_hash,
            "backends": self.backends,
        }

    def flops(self) -> float:
        """FLOPs of a training token."""
        return train_flops_per_token(self.build_module("meta").model, self.plan.seq_len)

    def describe(self, rate: float | None = None) -> str:
        """The plan and the groups of the optimizer. rate: tokens per second, for the hours."""
        groups = self.optimizer.describe(self.build_module("meta"))
        chosen = ", ".join(f"{part}: {name}" for part, name in self.backends.items())
        lines = [describe(self.plan, rate), "optimizer groups", groups]
        return "\n".join(lines + ([f"kernel backends  {chosen}"] if chosen else []))


def cannot_record(knobs: dict, world: World, zero: Zero0, device: torch.device) -> str | None:
    """Why micro-batches cannot run as CUDA graphs, or None."""
    return why_not(
        ranks=world.size,
        stage=zero.stage,
        device=device,
        checkpointing=knobs["activation_checkpointing"],
    )


def check_float8(knobs: dict, device: torch.device | None) -> None:
    """ValueError for a device without float8 products (None: not known), and rows they cannot
    take."""
    place = f"train.precision={knobs['precision']}"
    reason = None if device is None else float8.unavailable(device)
    if reason is not None:
        raise ValueError(
            f"{place}: {reason}, expected an NVIDIA GPU of compute capability "
            f"{'.'.join(map(str, float8.CAPABILITY))} or later; set train.precision=bf16"
        )
    if knobs["seq_len"] % float8.MULTIPLE:
        raise ValueError(
            f"{place}: got train.seq_len={knobs['seq_len']}, expected a multiple of "
            f"{float8.MULTIPLE}; change it or set train.precision=bf16"
        )


def kernel_backends(config: dict, device: torch.device, vocab_size: int) -> dict[str, str]:
    """Group and pattern letter -> backend, of the mixers and channels that choose one, and of the
    objective when it is fused. ValueError for an impossible one.

    Asked before the start, because inside of torch.compile the error would drown.
    """
    knobs = config["train"]
    model = build.build_model(config, vocab_size=vocab_size, device="meta")
    dtype = build.DTYPES[knobs["precision"]]
    chosen = {}
    mixers, channels = (build.layer_letters(config, group) for group in ("mixer", "channel"))
    for mixer, channel, block in zip(mixers, channels, model.stack.layers):
        chosen[f"mixer {mixer}"] = block.mixer.kernel_backend(
            device=device,
            dtype=dtype,
            tokens=knobs["seq_len"],
            documents=knobs["mask_documents"],
        )
        chosen[f"channel {channel}"] = block.channel.kernel_backend(device=device, dtype=dtype)
    objective = build.build_objective(config)
    chosen["objective"] = objective.kernel_backend(device=device, dtype=dtype)
    return {part: backend for part, backend in sorted(chosen.items()) if backend is not None}
