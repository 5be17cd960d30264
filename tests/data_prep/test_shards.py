import numpy as np
import pytest
from llmtrain_data.shards import HEADER_BYTES, Shard, ShardWriter, token_dtype, write_atomic

SHA = "ab" * 32
DOCUMENTS = [[0, 5, 6], [0], [0, 1, 2, 3, 65535]]
FLAT = [token for document in DOCUMENTS for token in document]


@pytest.fixture(params=["<u2", "<u4"])
def shard(tmp_path, request):
    """(path, info) of a shard of DOCUMENTS."""
    dtype = np.dtype(request.param)
    writer = ShardWriter(tmp_path / "shard-00000.bin", dtype=dtype, tokenizer_sha256=SHA)
    for document in DOCUMENTS:
        writer.begin_document()
        writer.append(np.array(document[:1], dtype=dtype), 0)
        writer.append(np.array(document[1:], dtype=dtype), 7)
        assert not writer.path.exists()
    return writer.path, writer.close()


def test_round_trip(shard):
    path, info = shard
    opened = Shard.open(path)
    assert (info.tokens, info.documents, info.bytes) == (9, 3, 21)
    assert opened.starts.tolist() == [0, 3, 4, 9]
    assert opened.tokens.tolist() == FLAT
    assert opened.documents == 3
    assert (opened.sha256, opened.tokenizer_sha256) == (info.sha256, SHA)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    opened.verify()


def test_layout_is_the_documented_one(shard):
    path, info = shard
    content = path.read_bytes()
    itemsize = int.from_bytes(content[12:16], "little")
    assert content[:8] == b"LLMTOKS\0"
    assert int.from_bytes(content[8:12], "little") == 1
    assert int.from_bytes(content[16:24], "little") == 9
    assert int.from_bytes(content[24:32], "little") == 3
    assert content[32:64].hex() == info.sha256
    assert content[64:96].hex() == SHA
    tokens = np.frombuffer(content, dtype=f"<u{itemsize}", count=9, offset=128)
    assert tokens.tolist() == FLAT
    starts_at = -(-(128 + 9 * itemsize) // 8) * 8
    assert np.frombuffer(content, dtype="<i8", offset=starts_at).tolist() == [0, 3, 4, 9]


def test_aborted_shard_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path / "x.bin", dtype=np.dtype("<u2"), tokenizer_sha256=SHA)
    writer.begin_document()
    writer.append(np.zeros(1000, dtype="<u2"), 0)
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 8, 40])
def test_truncated(shard, message, cut):
    path, _ = shard
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    size = len(content)
    with message(path.name, f"{size - cut} bytes", f"expected {size}", "truncated", "overwrite"):
        Shard.open(path)


def test_shorter_than_a_header(shard, message):
    path, _ = shard
    path.write_bytes(b"LLM")
    with message(path.name, "3 bytes", f"at least {HEADER_BYTES}", "truncated"):
        Shard.open(path)


def test_missing(tmp_path, message):
    with message("gone.bin", "cannot be opened", "No such file"):
        Shard.open(tmp_path / "gone.bin")


def patched(path, offset, value):
    content = bytearray(path.read_bytes())
    content[offset] ^= value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "parts"),
    [
        (0, ["not a shard", "LLMTOKS"]),
        (8, ["format version 0", "expected version 1"]),
        (12, ["bytes a token"]),
        (16, ["truncated or altered"]),
        (24, ["truncated or altered"]),
    ],
)
def test_altered_header(shard, message, offset, parts):
    path, _ = shard
    patched(path, offset, 1)
    with message(path.name, *parts):
        Shard.open(path)


@pytest.mark.parametrize("offset", [HEADER_BYTES, HEADER_BYTES + 9, -1])
def test_altered_content_is_found_by_verify(shard, message, offset):
    path, info = shard
    patched(path, offset, 0x10)
    opened = Shard.open(path)
    with message(path.name, "sha256", info.sha256[:16], "altered"):
        opened.verify()


def test_token_dtype():
    assert token_dtype(65536).itemsize == 2
    assert token_dtype(65537).itemsize == 4


def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr("llmtrain_data.shards.os.fsync", fails)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def fails(descriptor):
    raise OSError(28, "No space left on device")
