"""Passkey retrieval: a number is told once, somewhere in a long text, and asked for at the end.

    Find the pass key in this text.
    The grass is green. ... The pass key is 48213. Keep it in mind: 48213. ... There and back again.
    What is the pass key? The pass key is

(Mohtashami and Jaggi 2023, arXiv:2305.16300, section 4.2.) Two lm-eval tasks over the same prompts:
passkey_generate wants the number from greedy decoding, passkey_choice wants it to be likelier than
nine other numbers, which shows retrieval in models too small to decode it. Prompts are made from a
seed, without downloads; a prompt and its answer fill the context length as far as whole words can,
and never exceed it. All numbers have equally many digits and tokens.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

INTRODUCTION = "Find the pass key in this text.\n\n"
NEEDLE = "The pass key is {key}. Keep it in mind: {key}."
QUESTION = "\n\nWhat is the pass key? The pass key is"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DIGITS = 5
CHOICES = 10
ANSWER_TOKENS = 12  # room for the answer; max_gen_toks of tasks/passkey_generate.yaml
KINDS = ("generate", "likelihood")
TASKS = ("passkey_generate", "passkey_choice")
METRICS = ("exact_match", "acc")


def load_dataset(**metadata: object) -> dict:
    """{"test": prompts}: what lm-eval calls, with a task's metadata as keyword arguments.

    It passes more than is wanted here. Read: tokenizer_file, add_bos, and passkey (lengths,
    depths, samples, seed).
    """
    from datasets import Dataset

    wanted = metadata["passkey"]
    prompts = make_prompts(
        str(metadata["tokenizer_file"]),
        bool(metadata["add_bos"]),
        tuple(wanted["lengths"]),
        tuple(wanted["depths"]),
        wanted["samples"],
        wanted["seed"],
    )
    return {"test": Dataset.from_list(list(prompts))}


@lru_cache(maxsize=1)  # both tasks ask for the same prompts
def make_prompts(
    tokenizer_file: str,
    add_bos: bool,
    lengths: tuple[int, ...],
    depths: tuple[float, ...],
    samples: int,
    seed: int,
) -> tuple[dict, ...]:
    """Prompts of every length and depth: prompt, key, choices, gold (index of the key in them),
    length, depth, sample, tokens. Each depends on the seed and its own cell only."""
    tokenizer = Tokenizer.from_file(tokenizer_file)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    if (longest := count(" " + "8" * DIGITS)) > ANSWER_TOKENS:
        raise ValueError(
            f"passkey: the tokenizer needs {longest} tokens for a number of {DIGITS} digits, "
            f"expected at most {ANSWER_TOKENS}; passkey cannot be used with this tokenizer"
        )
    prompts = []
    for length, depth in itertools.product(lengths, depths):
        room = length - ANSWER_TOKENS - add_bos
        words = 0
        for sample in range(samples):
            draw = random.Random(f"{seed}/{length}/{depth}/{sample}")
            choices = draw_numbers(draw, count)
            key = draw.choice(choices)
            text, words = fit(key, depth, room, count, words)
            prompts.append(
                {
                    "prompt": text,
                    "key": key,
                    "choices": [f" {choice}" for choice in choices],
                    "gold": choices.index(key),
                    "length": length,
                    "depth": depth,
                    "sample": sample,
                    "tokens": count(text) + add_bos,
                }
            )
    return tuple(prompts)


def draw_numbers(draw: random.Random, count: Callable[[str], int]) -> list[str]:
    """CHOICES numbers, all as many tokens long as most numbers are: a shorter one is likelier."""
    low, high = 10 ** (DIGITS - 1), 10**DIGITS
    numbers = [str(number) for number in draw.sample(range(low, high), 20 * CHOICES)]
    tokens = {number: count(f" {number}") for number in numbers}
    usual = Counter(tokens.values()).most_common(1)[0][0]
    return [number for number in numbers if tokens[number] == usual][:CHOICES]


def fit(
    key: str, depth: float, room: int, count: Callable[[str], int], guess: int
) -> tuple[str, int]:
    """The prompt with as many filler words as fit into room tokens, and their number.

    guess: the number to try first.
    """
    bare = count(build(key, depth, 0))
    if bare > room:
        raise ValueError(
            f"passkey.lengths: the context has room for {room} tokens beside the answer, expected "
            f"at least {bare}, which introduction, key and question take; raise the length by "
            f"{bare - room}"
        )
    per_word = (count(build(key, depth, 100)) - bare) / 100
    fits, fails = 0, None
    words = guess or int((room - bare) / per_word)
    while fails is None or fails - fits > 1:
        words = max(fits + 1, words) if fails is None else min(max(fits + 1, words), fails - 1)
        left = room - count(build(key, depth, words))
        if left >= 0:
            fits = words
        else:
            fails = words
        words += round(left / per_word)
    return build(key, depth, fits), fits


def build(key: str, depth: float, words: int) -> str:
    """A prompt with that many filler words, the key between sentences at about `depth` of them.

    The filler ends with a whole sentence, so it may begin inside one.
    """
    sentences = FILLER.split()
    start = -words % len(sentences)
    filler = [sentences[(start + i) % len(sentences)] for i in range(words)]
    ends = [0, *(i + 1 for i, word in enumerate(filler) if word.endswith("."))]
    place = min(ends, key=lambda end: abs(end - depth * words))
    needle = NEEDLE.format(key=key)
    return INTRODUCTION + " ".join([*filler[:place], needle, *filler[place:]]) + QUESTION


def score_generation(doc: dict, results: list[str]) -> dict[str, float]:
    """lm-eval's process_results: 1 when the first number of the generated text is the key."""
    number = re.search(r"\d+", results[0])
    return {"exact_match": float(number is not None and number.group() == doc["key"])}


def check_grid(
    lengths: Sequence[int], depths: Sequence[float], *, limit: int | None, trained: int
) -> list[str]:
    """Warnings about lengths beyond the trained context; ValueError for lengths beyond the model's
    limit, and for a grid that is none.

    limit: the longest context that the model can read, None if there is none.
    """
    if not lengths or not depths:
        raise ValueError(
            f"passkey: got lengths {list(lengths)} and depths {list(depths)}, expected at least "
            "one of each; set passkey.lengths=[512] and passkey.depths=[0.5]"
        )
    if outside := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ValueError(
            f"passkey.depths: got {outside}, expected 0 (start of the context) to 1 (end); "
            "set passkey.depths=[0.0,0.5,1.0]"
        )
    longest = max(lengths)
    if limit is not None and longest > limit:
        raise ValueError(
            f"passkey.lengths: got {longest}, expected at most {limit}, the positions that this "
            "model has learned (model.max_seq_len); lower passkey.lengths"
        )
    if longest > trained:
        beyond = [length for length in lengths if length > trained]
        return [
            f"passkey.lengths: {beyond} are longer than the {trained} tokens a row that the model "
            "was trained on; expect it to fail there unless its positions extrapolate"
        ]
    return []


def grid(samples: dict[str, list[dict]]) -> dict:
    """Accuracies by length and depth, from lm-eval's logged samples of both tasks.

    {"lengths", "depths", "samples", "chance", "generate": one list a length, "likelihood": same}
    """
    result: dict = {"chance": {"generate": 0.0, "likelihood": 1 / CHOICES}}
    for kind, task, metric in zip(KINDS, TASKS, METRICS):
        cells = defaultdict(list)
        for sample in samples[task]:
            cells[sample["doc"]["length"], sample["doc"]["depth"]].append(sample[metric])
        lengths, depths = (sorted(set(values)) for values in zip(*cells))
        result |= {"lengths": lengths, "depths": depths, "samples": len(next(iter(cells.values())))}
        result[kind] = [[float(np.mean(cells[n, d])) for d in depths] for n in lengths]
    return result


def plot(result: dict, path: Path, *, title: str, trained: int) -> None:
    """Two heat maps of a grid in one PNG: exact generation and likelihood."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths, depths = result["lengths"], result["depths"]
    panels = (
        ("generate", "greedy decoding writes the key"),
        ("likelihood", f"key likelier than {CHOICES - 1} other numbers (chance {1 / CHOICES:.0%})"),
    )
    figure = Figure(figsize=(2 * (2.2 + 0.75 * len(lengths)), 2.0 + 0.45 * len(depths)))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (name, label) in zip(axes, panels):
        values = np.array(result[name]).T
        image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            colour = "black" if value > 0.6 else "white"
            axis.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, size=8)
        axis.set_title(label, size=9)
        axis.set_xticks(range(len(lengths)), [f"{n}*" if n > trained else str(n) for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        axis.set_xlabel("context length, tokens")
    axes[0].set_ylabel("depth of the key (0%: start)")
    figure.colorbar(image, ax=axes, label="accuracy", fraction=0.03)
    note = f"   * longer than the {trained} tokens of training" if max(lengths) > trained else ""
    figure.suptitle(
        f"Passkey retrieval, {title}, {result['samples']} prompts a cell{note}", size=10
    )
    figure.savefig(path, dpi=150, bbox_inches="tight")
