"""next_line: which of four lines follows? Multiple choice made from a corpus' held-out text.

The context is up to `context_lines` lines of a held-out document; the answers are the line that
follows and three lines from other held-out documents, chosen to be about as long (a language model
prefers short texts). Everything is drawn from a seed. Lines longer than LONGEST characters, as in
prose, count with their beginning. The text is decoded with the corpus' own tokenizer, so that a
model with any tokenizer can be asked.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain_data.manifest import TOKENIZER_FILE, Manifest, open_split
from llmtrain_data.tokenizer import load_tokenizer
from tokenizers import Tokenizer

log = logging.getLogger(__name__)

DISTRACTORS = 3
CANDIDATES = 30  # lines of which the ones nearest in length become distractors
SHORTEST = 12  # characters of an answer, blanks around it not counted
LONGEST = 160
DOCUMENT_TOKENS = 1 << 16  # what is read of a document


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line that can be an answer. document, number: where it is; text: its beginning."""

    document: int
    number: int
    text: str


def load_dataset(**metadata: object) -> dict:
    """{"test": questions}: what lm-eval calls, with a task's metadata as keyword arguments.

    It passes more than is wanted here. Read: corpus, tokenizer_file, add_bos, max_length, and
    next_line (items, context_lines, seed).
    """
    from datasets import Dataset

    wanted = metadata["next_line"]
    questions = make_questions(
        str(metadata["corpus"]),
        load_tokenizer(str(metadata["tokenizer_file"])),
        room=int(metadata["max_length"]) - bool(metadata["add_bos"]),
        items=wanted["items"],
        context_lines=wanted["context_lines"],
        seed=wanted["seed"],
    )
    return {"test": Dataset.from_list(questions)}


def make_questions(
    corpus: str, tokenizer: Tokenizer, *, room: int, items: int, context_lines: int, seed: int
) -> list[dict]:
    """Questions: context, choices (each begins with its line end), gold, source.

    tokenizer: the model's; room: tokens for context and answer. Fewer than `items` where the
    held-out text does not give more, which is logged. ValueError when it gives none.
    """
    draw = random.Random(seed)
    documents = held_out_documents(corpus, draw, at_most=max(items, 64))
    texts = [text.split("\n") for _, text in documents]
    answers = [answer_lines(index, lines) for index, lines in enumerate(texts)]
    pool = [line for lines in answers for line in lines]
    questions: list[dict] = []
    for line in in_turns(answers, draw):
        if len(questions) == items:
            break
        lines = texts[line.document]
        context = lines[max(0, line.number - context_lines) : line.number]
        others = distractors(line, context, pool, draw, apart=context_lines)
        choices = [f"\n{text}" for text in (line.text, *others)]
        context = shorten(context, choices, tokenizer, room)
        if len(others) == DISTRACTORS and context:
            gold = draw.randrange(DISTRACTORS + 1)
            choices.insert(gold, choices.pop(0))
            source = documents[line.document][0]
            questions.append(
                {"context": context, "choices": choices, "gold": gold, "source": source}
            )
    if not questions:
        raise ValueError(
            f"next_line: the held-out text of corpus {corpus} gives no question, expected a line "
            f"of {SHORTEST} characters after others, and {DISTRACTORS} such lines elsewhere; "
            "prepare more held-out text (data.val_fraction) or leave next_line out"
        )
    if len(questions) < items:
        log.warning(
            "next_line: the held-out text gives %d questions, not %d", len(questions), items
        )
    return questions


def held_out_documents(corpus: str, draw: random.Random, *, at_most: int) -> list[tuple[str, str]]:
    """(source, text) of documents of the val split, drawn at random."""
    manifest = Manifest.load(corpus)
    tokenizer = load_tokenizer(Path(corpus) / TOKENIZER_FILE)
    places = [
        (source, shard, index)
        for source, shards in open_split(corpus, manifest, "val").items()
        for shard in shards
        for index in range(shard.documents)
    ]
    documents = []
    for source, shard, index in draw.sample(places, min(at_most, len(places))):
        first, last = shard.starts[index], shard.starts[index + 1]
        tokens = shard.tokens[first:last][:DOCUMENT_TOKENS]
        documents.append((source, tokenizer.decode(tokens.tolist(), skip_special_tokens=True)))
    return documents


def answer_lines(document: int, lines: Sequence[str]) -> list[Line]:
    """The lines of a document that can be answers: not blank, not very short, not the first."""
    return [
        Line(document=document, number=number, text=text[:LONGEST].rstrip())
        for number, text in enumerate(lines)
        if number > 0
        and len(text[:LONGEST].strip()) >= SHORTEST
        and any(before.strip() for before in lines[max(0, number - 2) : number])
    ]


def in_turns(answers: Sequence[list[Line]], draw: random.Random) -> Iterator[Line]:
    """One line of each document, another one of each, and so on."""
    shuffled = [draw.sample(lines, len(lines)) for lines in answers]
    for turn in itertools.zip_longest(*shuffled):
        yield from (line for line in turn if line is not None)


def distractors(
    answer: Line, context: Sequence[str], pool: Sequence[Line], draw: random.Random, *, apart: int
) -> list[str]:
    """Lines of other documents (or far off in the only one), about as long as the answer.

    None of them is the answer or in its context.
    """
    only = all(line.document == answer.document for line in pool)
    taken = {answer.text.strip(), *(text[:LONGEST].strip() for text in context)}
    found: dict[str, Line] = {}
    for line in draw.sample(pool, min(len(pool), 4 * CANDIDATES)):
        near = only and abs(line.number - answer.number) <= apart
        if near or (line.document == answer.document and not only) or line.text.strip() in taken:
            continue
        found.setdefault(line.text.strip(), line)
        if len(found) == CANDIDATES:
            break
    length = len(answer.text.encode())
    texts = sorted(
        (line.text for line in found.values()), key=lambda t: abs(len(t.encode()) - length)
    )
    return texts[:DISTRACTORS]


def shorten(context: Sequence[str], choices: Sequence[str], tokenizer: Tokenizer, room: int) -> str:
    """The last lines of the context that fit into room tokens with any of the choices."""
    answer = max(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in choices)
    for first in range(len(context)):
        text = "\n".join(context[first:])
        if text.strip() and len(tokenizer.encode(text).ids) + answer <= room:
            return text
    return ""
