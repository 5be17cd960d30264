"""Look into a prepared corpus: python -m llmtrain_data.inspect <corpus> [--verify] [--show N]."""

from __future__ import annotations

import argparse
import sys

from llmtrain_data.manifest import Manifest, open_split, verify_corpus
from llmtrain_data.tokenizer import load_tokenizer


def report(corpus: str, *, show: int = 0, verify: bool = False) -> str:
    """What the corpus holds, with the first `show` documents of every source.

    verify: also read every shard and compare its hash. Raises ValueError for a damaged corpus.
    """
    manifest = verify_corpus(corpus) if verify else Manifest.load(corpus)
    tokenizer = load_tokenizer(corpus)
    lines = [
        f"{corpus}: vocabulary {manifest.vocab_size:,}, documents open with {manifest.eot!r} "
        f"(id {manifest.eot_id})",
        f"fingerprint {manifest.fingerprint}" + (", every hash verified" if verify else ""),
    ]
    for split, sources in manifest.splits.items():
        shards = open_split(corpus, manifest, split)
        for name, source in sources.items():
            lines.append(
                f"{split}/{name}: {source.documents:,} documents, {source.tokens:,} tokens, "
                f"{source.bytes:,} bytes, {source.bytes / source.tokens:.2f} bytes a token, "
                f"{len(source.shards)} shards of {shards[name][0].tokens.dtype}"
            )
            first = shards[name][0]
            for index in range(min(show, first.documents)):
                tokens_T = first.tokens[first.starts[index] : first.starts[index + 1]]
                text = tokenizer.decode(tokens_T[:200].tolist(), skip_special_tokens=False)
                lines.append(f"  document {index}, {len(tokens_T):,} tokens: {text!r}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", help="directory made by `llmtrain prep`")
    parser.add_argument("--verify", action="store_true", help="compare the hash of every shard")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="documents a source")
    arguments = parser.parse_args()
    try:
        print(report(arguments.corpus, show=arguments.show, verify=arguments.verify))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
