"""Tokenizers: training a byte-level BPE, taking an existing one, and their exact byte lengths.

Both specs (`Bpe`, `Existing`) turn a sample of text into the bytes of a tokenizer.json, which is
what a corpus keeps; `transformers` loads the same directory. A document is encoded without special
tokens, and special tokens spelt in a text are ordinary text.
BPE: Sennrich et al. 2016; bytes as base alphabet: Radford et al. 2019.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

log = logging.getLogger(__name__)
EOT = "<|endoftext|>"
KNOWN_EOTS = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
BYTE_CHARACTERS = frozenset(pre_tokenizers.ByteLevel.alphabet())
MAX_UTF8_BYTES = 4  # of one character


class TokenizerSpec(Protocol):
    sample_bytes: int  # text that build() wants to see; 0: none

    def describe(self) -> dict[str, Any]: ...

    def build(self, texts: Sequence[str]) -> bytes:
        """The content of tokenizer.json."""
        ...

    def document_token(self, tokenizer: Tokenizer) -> str:
        """The token that opens every document."""
        ...


@dataclass(frozen=True, kw_only=True)
class Bpe:
    """Byte-level BPE trained on the corpus itself.

    vocab_size: special tokens and the 256 bytes included. min_frequency: of a merge, in the
    sample. sample_bytes: text to train on. special_tokens: ids from 0 on; the first is the one
    that opens documents. pattern: regular expression (Oniguruma) that splits text into pieces,
    which merges never cross; null: `split_pattern`. max_piece_bytes: longest piece, so that a line
    without spaces stays cheap.
    """

    vocab_size: int
    min_frequency: int = 2
    sample_bytes: int = 200_000_000
    special_tokens: Sequence[str] = (EOT,)
    pattern: str | None = None
    max_piece_bytes: int = 256

    def __post_init__(self) -> None:
        smallest = len(BYTE_CHARACTERS) + len(self.special_tokens)
        if self.vocab_size < smallest:
            raise ValueError(
                f"tokenizer=bpe: vocab_size={self.vocab_size}, expected at least {smallest} (256 "
                f"bytes and {len(self.special_tokens)} special tokens); set tokenizer.vocab_size"
            )
        if not self.special_tokens or self.special_tokens[0] != EOT:
            raise ValueError(
                f"tokenizer=bpe: special_tokens={list(self.special_tokens)}, expected {EOT!r} "
                "first (id 0 opens every document); set tokenizer.special_tokens"
            )
        for name, value, least in (
            ("min_frequency", self.min_frequency, 1),
            ("sample_bytes", self.sample_bytes, 1),
            ("max_piece_bytes", self.max_piece_bytes, 4 * MAX_UTF8_BYTES),
        ):
            if value < least:
                raise ValueError(
                    f"tokenizer=bpe: {name}={value}, expected at least {least}; "
                    f"set tokenizer.{name}"
                )

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "Bpe",
            "vocab_size": self.vocab_size,
            "min_frequency": self.min_frequency,
            "sample_bytes": self.sample_bytes,
            "special_tokens": list(self.special_tokens),
            "pattern": self.pattern,
            "max_piece_bytes": self.max_piece_bytes,
        }

    def build(self, texts: Sequence[str]) -> bytes:
        tokenizer = train_bpe(texts, self)
        if (size := vocab_span(tokenizer)) < self.vocab_size:
            log.warning(
                "tokenizer=bpe: the sample has merges for %d tokens only, vocab_size=%d was asked "
                "for; the smaller vocabulary is used",
                size,
                self.vocab_size,
            )
        return tokenizer.to_str().encode()

    def document_token(self, tokenizer: Tokenizer) -> str:
        return EOT


@dataclass(frozen=True, kw_only=True)
class Existing:
    """A tokenizer that exists: path is a tokenizer.json or a directory that holds one.

    eot: the token that opens documents; null: the one of `KNOWN_EOTS` that it has.
    """

    path: str
    eot: str | None = None

    sample_bytes: ClassVar[int] = 0

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "Existing",
            "eot": self.document_token(load_tokenizer(self.path)),
            "sha256": hashlib.sha256(self.build(())).hexdigest(),
        }

    def build(self, texts: Sequence[str]) -> bytes:
        return tokenizer_file(self.path).read_bytes()

    def document_token(self, tokenizer: Tokenizer) -> str:
        wanted = KNOWN_EOTS if self.eot is None else (self.eot,)
        for token in wanted:
            if tokenizer.token_to_id(token) is not None:
                return token
        raise ValueError(
            f"tokenizer=existing, path={self.path!r}: it has none of {list(wanted)}; expected a "
            "special token that opens documents; set tokenizer.eot to one that it has"
        )


def split_pattern(max_chars: int) -> str:
    """The split of GPT-4's tokenizer (cl100k) with every repetition bounded by max_chars.

    Contractions; a word with the character before it; up to three digits; punctuation with its
    line ends; line ends with the blanks before them; blanks, less the last if a word follows.
    """
    head, tail = max_chars * 3 // 4 - 1, max_chars // 4
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        rf"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}{{1,{max_chars - 1}}}"
        r"|\p{N}{1,3}"
        rf"| ?[^\s\p{{L}}\p{{N}}]{{1,{head}}}[\r\n]{{0,{tail}}}"
        rf"|\s{{0,{head}}}[\r\n]{{1,{tail}}}"
        rf"|\s{{1,{max_chars}}}(?!\S)"
        rf"|\s{{1,{max_chars}}}"
    )


def train_bpe(texts: Sequence[str], spec: Bpe) -> Tokenizer:
    """Train on texts. Raises ValueError when they are empty.

    A sample too small for vocab_size gives a smaller vocabulary: read it from the result.
    """
    if not any(texts):
        raise ValueError(
            "tokenizer=bpe: the sample to train on is empty; expected text; check the sources"
        )
    max_chars = spec.max_piece_bytes // MAX_UTF8_BYTES
    if spec.pattern is None:
        splits = [pre_tokenizers.Split(Regex(split_pattern(max_chars)), "isolated")]
    else:  # an unknown expression is bounded by a second split, which costs a third more time
        cap = Regex(rf"(?m).{{1,{max_chars}}}")
        splits = [
            pre_tokenizers.Split(Regex(spec.pattern), "isolated"),
            pre_tokenizers.Split(cap, "isolated"),
        ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        min_frequency=spec.min_frequency,
        special_tokens=list(spec.special_tokens),
        initial_alphabet=sorted(BYTE_CHARACTERS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer, length=len(texts))
    return tokenizer


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json that path is or holds."""
    path = Path(path)
    return path / "tokenizer.json" if path.is_dir() else path


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer that neither truncates nor pads, and reads special tokens in a text as text."""
    file = tokenizer_file(path)
    try:
        content = file.read_text(encoding="utf-8")
        fields = json.loads(content)
    except OSError as error:
        raise ValueError(
            f"tokenizer {str(path)!r}: cannot read {file} ({error.strerror}); expected a "
            "tokenizer.json or a directory that holds one (transformers' save_pretrained of a "
            "fast tokenizer writes it)"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"tokenizer {file}: not JSON ({error}); expected a tokenizer.json of `tokenizers`"
        ) from error
    if not isinstance(fields, dict) or "model" not in fields:
        raise ValueError(
            f"tokenizer {file}: not a tokenizer (no field 'model'); expected a tokenizer.json of "
            "`tokenizers`"
        )
    tokenizer = Tokenizer.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocab_span(tokenizer: Tokenizer) -> int:
    """Largest token id + 1: the rows that an embedding needs."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def is_plain_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether encoding acts on the bytes alone: no normaliser, no prefix space. Then the tokens of
    two texts, one after the other, always decode to the concatenation of the texts."""
    config = json.loads(tokenizer.to_str())
    return (
        config["normalizer"] is None
        and (config["decoder"] or {}).get("type") == "ByteLevel"
        and '"add_prefix_space": true' not in json.dumps(config["pre_tokenizer"])
    )


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [vocab_span]: bytes of text that each token stands for; special tokens 0.

    Exact for byte-level tokenizers, and for those that fall back to bytes ("<0x0A>") with "_"
    (U+2581) for blanks, save the blank some of them put before a text. Raises ValueError for others
    (WordPiece and the like), whose tokens do not determine the text.
    """
    decoder = json.dumps(json.loads(tokenizer.to_str())["decoder"])
    if '"ByteLevel"' in decoder:
        length = byte_level_length
    elif '"ByteFallback"' in decoder:
        length = byte_fallback_length
    else:
        raise ValueError(
            f"tokenizer: decoder {decoder}; expected ByteLevel or ByteFallback, whose tokens have "
            "a number of bytes; take a byte-level BPE"
        )
    added = tokenizer.get_added_tokens_decoder()
    lengths_O = np.zeros(vocab_span(tokenizer), dtype=np.int32)
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index in added:
            lengths_O[index] = 0 if added[index].special else len(token.encode("utf-8"))
        else:
            lengths_O[index] = length(token)
    return lengths_O


def byte_level_length(token: str) -> int:
    if not BYTE_CHARACTERS.issuperset(token):
        raise ValueError(
            f"tokenizer: token {token!r} has characters outside the byte alphabet; expected a "
            "byte-level vocabulary"
        )
    return len(token)


def byte_fallback_length(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\u2581", " ").encode("utf-8"))
