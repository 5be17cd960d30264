import random

from llmtrain_data.documents import digest
from llmtrain_data.sample import CHUNK_CHARS, Sample


def sample(texts, budget):
    taken = Sample(budget)
    for text in texts:
        taken.add(digest(text.encode()), text)
    return taken


def test_everything_when_it_fits(texts):
    assert sorted(sample(texts, 10**9).texts) == sorted(texts)


def test_budget_is_kept_and_used(texts):
    total = sum(len(text.encode()) for text in texts)
    taken = sample(texts, total // 3)
    size = sum(len(text.encode()) for text in taken.texts)
    assert size == taken.bytes
    assert total // 3 - 2000 < size <= total // 3


def test_order_of_documents_does_not_matter(texts):
    """Also when a small document would fit where a large one was crowded out."""
    sized = [text * (1 + index % 13) for index, text in enumerate(texts)]
    wanted = sample(sized, 20_000).texts
    for seed in range(30):
        shuffled = random.Random(seed).sample(sized, len(sized))
        assert sample(shuffled, 20_000).texts == wanted


def test_every_part_of_the_corpus_is_drawn(texts):
    """A long document gets its share of bytes, not more; early and late documents alike."""
    long = "".join(chr(0x4E00 + n % 997) for n in range(40 * CHUNK_CHARS))
    many = [f"{n} " * 2000 for n in range(4000)]
    total = sum(len(text.encode()) for text in [long, *many])
    taken = sample([*many[:2000], long, *many[2000:]], total // 4)
    of_long = sum(len(text.encode()) for text in taken.texts if text[0] > "\u4e00")
    assert 0.5 < of_long / taken.bytes / (len(long.encode()) / total) < 1.5
    numbers = [int(text.split()[0]) for text in taken.texts if text[0] <= "\u4e00"]
    early = sum(number < 2000 for number in numbers)
    assert 0.4 < early / len(numbers) < 0.6
