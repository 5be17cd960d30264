import gzip
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from llmtrain_data.source_records import numbered_lines
from llmtrain_data.sources import Jsonl, Parquet


def lines(*texts, field="text"):
    return "".join(json.dumps({field: text, "n": 1}) + "\n" for text in texts).encode()


@pytest.fixture
def folder(tmp_path):
    """a.jsonl, b.jsonl.gz, sub/c.jsonl.zst (two frames) with texts 0..5."""
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_bytes(lines("0", "1\u00e9\n") + b"\n  \n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines("2", "3")))
    (tmp_path / "sub" / "c.jsonl.zst").write_bytes(compress(lines("4")) + compress(lines("5")))
    (tmp_path / "other.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    "paths",
    [
        "{root}",
        "{root}/**/*.jsonl*",
        ["{root}/sub", "{root}/b.jsonl.gz", "{root}/a.jsonl", "{root}/a.*"],
    ],
)
def test_jsonl_directory_glob_and_list(folder, paths):
    filled = json.loads(json.dumps(paths).replace("{root}", str(folder)))
    source = Jsonl(filled)
    assert [document.text for document in source] == ["0", "1\u00e9\n", "2", "3", "4", "5"]
    assert [document.text for document in source] == ["0", "1\u00e9\n", "2", "3", "4", "5"]
    assert next(iter(source)).id == "a.jsonl:1"
    assert source.describe() == Jsonl(str(folder)).describe()


def test_jsonl_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("x", field="content"))
    assert [d.text for d in Jsonl(str(tmp_path), text_field="content")] == ["x"]


def test_jsonl_no_file_matches(tmp_path, message):
    with message("Jsonl", "no file matches", "nothing*.jsonl", "set the source's paths"):
        Jsonl(str(tmp_path / "nothing*.jsonl")).describe()
    with message("Jsonl", "paths is empty"):
        Jsonl([]).describe()


def test_jsonl_unknown_field(folder, message):
    with message("a.jsonl, line 1", "no field 'body'", "'text', 'n'", "text_field", "missing=skip"):
        list(Jsonl(str(folder), text_field="body"))


def test_jsonl_field_is_no_string(tmp_path, message, caplog):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": null}\n{"text": "good"}\n{"text": 3}\n{}\n')
    with message("line 1", "'text' is NoneType", "expected a string", "missing=skip"):
        list(Jsonl(str(tmp_path)))
    with caplog.at_level(logging.WARNING):
        assert [d.text for d in Jsonl(str(tmp_path), missing="skip")] == ["good"]
    assert "left out 3 records" in caplog.text


@pytest.mark.parametrize(
    ("line", "says"), [(b'{"text": "a\n', "not JSON"), (b'["a"]\n', "a JSON list")]
)
def test_jsonl_bad_line(tmp_path, message, line, says):
    (tmp_path / "a.jsonl").write_bytes(lines("fine") + line)
    with message("a.jsonl, line 2", says, "expected", "leave it out"):
        list(Jsonl(str(tmp_path)))


def test_jsonl_not_utf8_offset_counts_decompressed_bytes(tmp_path, message):
    first = lines("fine")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(first + b'{"text": "\xff"}\n'))
    with message("a.jsonl.gz", "0xff", f"offset {len(first) + 10}", "errors=replace"):
        list(Jsonl(str(tmp_path)))
    assert [d.text for d in Jsonl(str(tmp_path), errors="replace")] == ["fine", "\ufffd"]
    assert [d.text for d in Jsonl(str(tmp_path), errors="skip")] == ["fine"]


def test_jsonl_lone_surrogate(tmp_path, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n')
    with message("a.jsonl, line 1", "character 1", "U+D800", "errors=replace"):
        list(Jsonl(str(tmp_path)))
    assert [d.text for d in Jsonl(str(tmp_path), errors="replace")] == ["a?b"]
    assert list(Jsonl(str(tmp_path), errors="skip")) == []


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_jsonl_cut_off_or_no_archive(tmp_path, message, suffix):
    compress = gzip.compress if suffix.endswith("gz") else zstandard.ZstdCompressor().compress
    whole = compress(lines(*(f"{n} {n * n * n}" for n in range(50_000))))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    with message(path.name, "damaged or truncated", "fetch or write it again"):
        list(Jsonl(str(path)))
    path.write_bytes(b"no archive at all")
    with message(path.name, "damaged or truncated"):
        list(Jsonl(str(path)))


def test_zstd_frames_across_reads(tmp_path):
    compress = zstandard.ZstdCompressor().compress
    wanted = [f"{n} {n**9}" for n in range(40_000)]
    frames = [compress(lines(*wanted[i : i + 9_000])) for i in range(0, len(wanted), 9_000)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert [d.text for d in Jsonl(str(tmp_path))] == wanted


def test_unreadable_jsonl(tmp_path, message):
    with message("gone.jsonl", "cannot be read"):
        list(numbered_lines(tmp_path / "gone.jsonl"))


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_parquet_in_order(tmp_path):
    wanted = [f"row {n}" for n in range(3000)]
    write_parquet(tmp_path / "0.parquet", text=wanted[:2500], n=list(range(2500)))
    write_parquet(tmp_path / "1.parquet", text=wanted[2500:])
    source = Parquet(str(tmp_path))
    assert [d.text for d in source] == wanted
    assert source.describe()["files"] == 2


def test_parquet_unknown_column(tmp_path, message):
    write_parquet(tmp_path / "a.parquet", title=["x"], body=["y"])
    with message("a.parquet", "no column 'text'", "'title', 'body'", "text_field"):
        list(Parquet(str(tmp_path)))


def test_parquet_null(tmp_path, message):
    write_parquet(tmp_path / "a.parquet", text=["x", None])
    with message("a.parquet, row 1", "NoneType", "missing=skip"):
        list(Parquet(str(tmp_path)))
    assert [d.text for d in Parquet(str(tmp_path), missing="skip")] == ["x"]


def test_parquet_damaged(tmp_path, message):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 or not")
    with message("a.parquet", "not a readable Parquet file"):
        list(Parquet(str(tmp_path)))
