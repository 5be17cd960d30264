"""Training of small models on a synthetic task: several learning rates side by side.

Models of this size leave a GPU idle between kernels. On CUDA a whole step (forward, backward,
clipping, update) is therefore one CUDA graph for each shape of a batch, and every learner replays
its own on a stream of its own. torch.compile would take longer to compile than such a run takes.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from llmtrain_eval.synthetic import Examples, accuracy
from torch import Tensor

from llmtrain import build
from llmtrain.context import SequenceContext
from llmtrain.model.language_model import LanguageModel
from mixers_learn.tasks import Task, seeded

CLIP = 1.0


class Learner:
    """A model, its optimizer and its schedule. graph: replay CUDA graphs instead of eager steps."""

    def __init__(
        self,
        config: dict,
        *,
        vocab_size: int,
        lr: float,
        steps: int,
        device: torch.device,
        graph: bool,
    ):
        self.lr, self.steps, self.device, self.graph = lr, steps, device, graph
        self.model = build.build_model(config, vocab_size=vocab_size).to(device)
        self.schedule = build.part(config["schedule"], "schedule", total_steps=steps)
        spec = build.part(config["optimizer"], "optimizer")
        decays = {"decay": spec.weight_decay, "no_decay": 0.0}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(members.values()), "weight_decay": decays[name]}
                for name, members in spec.groups(self.model).items()
                if members
            ],
            lr=torch.zeros((), device=device) if graph else 0.0,
            betas=(spec.beta1, spec.beta2),
            eps=spec.eps,
            fused=True,
            capturable=graph,
        )
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Examples, Tensor]] = {}
        self.pool = None
        self.losses: list[Tensor] = []
        if graph:
            # the weights are on their way
            self.stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self.stream):
                self.make_moments()

    def make_moments(self) -> None:
        """Let the optimizer allocate its state, which must exist before a graph is captured."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # gradient 0 at lr 0: changes nothing but the count of steps
        for state in self.optimizer.state.values():
            state["step"].zero_()

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if self.graph:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def loss(self, examples: Examples) -> Tensor:
        """Mean cross entropy of the answers, and what blocks add to it."""
        hidden_ND, aux = self.hidden_at(examples)
        logits_NO = self.model.logits(hidden_ND).float()
        loss = F.cross_entropy(logits_NO, examples.answers.flatten())
        added = [value for key, value in aux.items() if key.startswith("loss/")]
        return loss + sum(added)

    def hidden_at(self, examples: Examples) -> tuple[Tensor, dict[str, Tensor]]:
        """The last hidden vectors where questions are, and the blocks' auxiliary scalars: the head
        is dear with a large vocabulary and few questions."""
        rows, tokens = examples.tokens_BT.shape
        ctx = SequenceContext.dense(rows, tokens, device=self.device)
        hidden_BTD, _, aux = self.model(examples.tokens_BT, ctx)
        index = examples.asked[..., None].expand(-1, -1, hidden_BTD.shape[-1])
        return hidden_BTD.gather(1, index).flatten(0, 1), aux

    def update(self, examples: Examples) -> Tensor:
        """One step; the optimizer's gradients must be None."""
        loss = self.loss(examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.detach()

    def capture(self, examples: Examples) -> None:
        """Record a step for batches of this shape."""
        inputs = Examples(*(tensor.clone() for tensor in examples))
        for _ in range(2):  # lets libraries allocate their workspaces; changes no weights
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(inputs).backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            loss = self.update(inputs)
        self.pool = graph.pool()
        self.graphs[inputs.asked.shape] = graph, inputs, loss

    def step(self, number: int, examples: Examples) -> None:
        """Step `number` from 0 on, not waited for."""
        if self.stream is None:
            context = nullcontext()
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            for tensor in examples:
                tensor.record_stream(self.stream)
            context = torch.cuda.stream(self.stream)
        with context:
            self.set_lr(self.lr * self.schedule.ratio(number))
            if not self.graph:
                self.optimizer.zero_grad(set_to_none=True)
                self.losses.append(self.update(examples))
                return
            if examples.asked.shape not in self.graphs:
                self.capture(examples)
            graph, inputs, loss = self.graphs[examples.asked.shape]
            for target, source in zip(inputs, examples):
                target.copy_(source)
            graph.replay()
            self.losses.append(loss.clone())

    @torch.no_grad()
    def correct(self, examples: Examples, rows: int = 64) -> Tensor:
        """1.0 where an answer is right, [B, questions] on the CPU."""
        parts = []
        for chunk in zip(*(tensor.split(rows) for tensor in examples)):
            part = Examples(*chunk)
            logits_NO = self.model.logits(self.hidden_at(part)[0])
            parts.append(accuracy(logits_NO, part.answers.flatten()).view_as(part.answers))
        return torch.cat(parts).cpu()


def train_together(
    learners: list[Learner], task: Task, *, seed: int, seconds: float | None
) -> tuple[int, float]:
    """All steps of all learners on the same batches; stops early when the seconds are over.
    Returns the steps done and the seconds they took, making of batches included."""
    device, steps = learners[0].device, learners[0].steps
    began = time.perf_counter()
    done = 0
    while done < steps:
        examples = task.batch(done, seeded(device, seed, f"{task.name}/{done}"))
        for learner in learners:
            learner.step(done, examples)
        done += 1
        if done % 20 == 0 and device.type == "cuda":
            torch.cuda.synchronize(device)  # so that the clock and the queue know of each other
        if seconds is not None and time.perf_counter() - began > seconds:
            break
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return done, time.perf_counter() - began


def curve(losses: list[Tensor], points: int = 100) -> list[list[float]]:
    """(step, mean loss) over about so many stretches of the training; None where not finite."""
    values = torch.stack(losses).tolist()
    width = max(1, math.ceil(len(values) / points))
    means = []
    for start in range(0, len(values), width):
        part = values[start : start + width]
        mean = sum(part) / len(part)
        means.append([start + len(part), round(mean, 5) if math.isfinite(mean) else None])
    return means


def state_bytes(model: LanguageModel, tokens: int) -> int:
    """Bytes that a row keeps after that many tokens, in bfloat16 where the mixer lets choose."""
    return model.stack.state_bytes(tokens)
