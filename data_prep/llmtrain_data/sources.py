"""The sources a data config may name; each yields documents and describes itself."""

from llmtrain_data.documents import Document, Source
from llmtrain_data.source_files import LocalFiles, StandardLibrary
from llmtrain_data.source_hub import HuggingFace
from llmtrain_data.source_records import Jsonl, Parquet

__all__ = [
    "Document",
    "HuggingFace",
    "Jsonl",
    "LocalFiles",
    "Parquet",
    "Source",
    "StandardLibrary",
]
