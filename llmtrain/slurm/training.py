"""A training that is to be submitted: the checks of `llmtrain train`, on a machine without GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain import build, checkpoint, groups, plan
from llmtrain.distributed import World
from llmtrain.plan import Plan
from llmtrain.prep import check_tokenizer, corpus_dir
from llmtrain.slurm.resources import Resources
from llmtrain.train import resume
from llmtrain.train.runlog import check_writable
from llmtrain.train.setup import Setup


@dataclass(frozen=True, kw_only=True)
class Training:
    """sizes: the numbers of nodes whose ranks the rows of a step divide among. setup: None where
    the corpus is still to be made."""

    config: dict
    resources: Resources
    plan: Plan
    setup: Setup | None
    sizes: list[int]

    @classmethod
    def check(cls, config: dict, resources: Resources, *, corpus_comes: bool = False) -> Training:
        """ValueError for whatever the ranks would refuse, at any number of nodes they may get.

        corpus_comes: a job before this one makes the corpus.
        """
        sizes = usable_sizes(config, resources)
        ranks = resources.nodes * resources.tasks_per_node
        if corpus_comes and not corpus_dir(config).exists():
            for group in ("optimizer", "deepspeed", "tracker"):
                build.part(config[group], build.label(config, group))
            check_writable(Path(config["run_dir"]))
            planned = plan.make_plan(config, ranks=ranks)
            return cls(config=config, resources=resources, plan=planned, setup=None, sizes=sizes)
        check_tokenizer(config)
        device = torch.device("cuda" if resources.gpus else "cpu")
        world = World(rank=0, size=ranks, local_rank=0)
        setup = Setup.check(config, world, device, elsewhere=True)
        check_resume(config, setup)
        return cls(config=config, resources=resources, plan=setup.plan, setup=setup, sizes=sizes)

    def describe(self, rate: float | None = None) -> str:
        """The plan, and what of the nodes can be used. rate: tokens per second, for the hours."""
        text = plan.describe(self.plan, rate) if self.setup is None else self.setup.describe(rate)
        resources, rows = self.resources, self.plan.rows
        unit = f"{resources.gpus} GPUs" if resources.gpus else f"{resources.tasks_per_node} ranks"
        lines = [text, f"nodes       {resources.node_range}, {unit} each"]
        for size in sorted(set(resources.sizes) - set(self.sizes)):
            used = max(usable for usable in self.sizes if usable < size)
            lines.append(
                f"            of {size} nodes only {used} would work: {rows} rows a step do not "
                f"divide among {size * resources.tasks_per_node} ranks"
            )
        return "\n".join(lines)

    def brief(self) -> str:
        """The plan in a line."""
        planned = self.plan
        memory = ""
        if planned.stage is not None:
            memory = f", {planned.memory[planned.stage].total / 2**30:.2f} GiB a rank"
        return (
            f"{self.config['name']}: {planned.parameters['total']:,} parameters{memory}, "
            f"{planned.steps:,} steps, {planned.train_flops * planned.tokens:.3g} FLOPs"
        )


def usable_sizes(config: dict, resources: Resources) -> list[int]:
    """The numbers of nodes, of those the job may get, that can share the rows of a step. ValueError
    when the largest or the smallest is not among them."""
    usable, refusals = [], {}
    for nodes in resources.sizes:
        try:
            plan.check_ranks(config, nodes * resources.tasks_per_node)
        except ValueError as error:
            refusals[nodes] = str(error)
        else:
            usable.append(nodes)
    for key in ("nodes", "min_nodes"):
        nodes = getattr(resources, key)
        if nodes in refusals:
            raise ValueError(f"{key}={nodes}: {refusals[nodes]}")
    return usable


def check_resume(config: dict, setup: Setup) -> None:
    """ValueError when the checkpoint that the ranks would continue from is of another training.
    Its files are verified by them, not here: they may be large."""
    wish, run_dir = config["train"]["resume"], Path(config["run_dir"])
    if wish == "never":
        return
    found = checkpoint.list_checkpoints(run_dir)
    if wish == "auto" and not found:
        return
    path = found[-1][1] if wish == "auto" else checkpoint.resolve(wish)
    resume.check_config(path, setup.config)
    trainer = resume.read_trainer(path)
    resume.check_corpus(path, trainer, setup.loader.fingerprint)


def with_device(overrides: Sequence[str], resources: Resources) -> list[str]:
    """The overrides with the device that the job's resources mean: ranks that find no GPU must not
    train on a CPU. ValueError when the overrides name another."""
    device = f"train.device={'cuda' if resources.gpus else 'cpu'}"
    typed = groups.given(groups.parse(overrides), "train.device")
    if typed is not None and typed.value() not in ("auto", device.partition("=")[2]):
        raise ValueError(
            f"{typed.input_line}: got this for a job of gpus={resources.gpus} a node, expected "
            f"{device}; set gpus to the GPUs of a node (0: CPU ranks), or remove it"
        )
    without = [text for text in overrides if not text.startswith("train.device=")]
    return [*without, device]
