"""Pinned launch configurations, and the program that writes them."""

import sys
import tomllib
from pathlib import Path

import pytest
import torch
from llmtrain_kernels import launch

BENCH = str(Path(__file__).parents[2] / "kernels" / "bench")
TABLE = {
    "a_fwd": [{"up_to": 8, "rows": 4, "num_warps": 1}, {"rows": 1, "num_warps": 8}],
    "b_fwd": [{"num_warps": 2}],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """launch/ with a default and a device's file."""
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    launch.write(tmp_path / "default.toml", TABLE, heading="What others run.")
    launch.write(tmp_path / "h100.toml", {"b_fwd": [{"num_warps": 4}]}, heading="Measured.")
    for cached in (launch.tables, launch.pinned, launch.device_name):
        cached.cache_clear()
    yield tmp_path
    for cached in (launch.tables, launch.pinned, launch.device_name):
        cached.cache_clear()


@pytest.fixture(scope="module")
def tune():
    sys.path.insert(0, BENCH)
    import tune

    sys.path.remove(BENCH)
    return tune


def test_classes_of_shapes(folder):
    cpu = torch.device("cpu")
    assert launch.launch("a_fwd", cpu, 8) == {"rows": 4, "num_warps": 1}
    assert launch.launch("a_fwd", cpu, 9) == {"rows": 1, "num_warps": 8}
    got = launch.launch("a_fwd", cpu, 9)
    got["rows"] = 7  # a caller's own
    assert launch.launch("a_fwd", cpu, 9)["rows"] == 1


def test_device_has_its_file_and_the_default_for_the_rest(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda")
    assert launch.launch("b_fwd", cuda, 1) == {"num_warps": 4}
    assert launch.launch("a_fwd", cuda, 1) == {"rows": 4, "num_warps": 1}
    launch.device_name.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert launch.launch("b_fwd", cuda, 1) == {"num_warps": 2}


def test_what_is_written_is_read(folder):
    assert tomllib.loads((folder / "default.toml").read_text()) == TABLE
    assert (folder / "default.toml").read_text().startswith("# What others run.\n\n[[a_fwd]]\n")


@pytest.mark.parametrize("bounds", [[8, 4, None], [8, None, None], [4, 8]])
def test_classes_out_of_order_are_named(folder, bounds):
    wrong = [{"up_to": b, "num_warps": 1} if b else {"num_warps": 1} for b in bounds]
    launch.write(folder / "wrong.toml", {"a_fwd": wrong}, heading="")
    with pytest.raises(ValueError, match=r"wrong.toml: got a_fwd with up_to .*expected rising"):
        launch.tables("wrong")


def test_files_that_are_shipped():
    """Every kernel of a device's file is in the default, with the same keys."""
    default = launch.tables(launch.DEFAULT)
    for path in launch.FOLDER.glob("*.toml"):
        for kernel, entries in launch.tables(path.stem).items():
            keys = {frozenset(entry) - {"up_to"} for entry in (*entries, *default[kernel])}
            assert len(keys) == 1, (path.name, kernel)


def test_the_first_of_the_fastest_is_pinned(tune):
    found = [({"n": 1}, 2.0), ({"n": 2}, 1.005), ({"n": 3}, 1.0), ({"n": 4}, "OutOfResources: ")]
    assert tune.fastest(found) == {"n": 2}
    assert tune.fastest(found[3:]) is None


def test_neighbours_that_agree_are_one_class(tune):
    chosen = {4: {"n": 1}, 2: {"n": 1}, 8: {"n": 2}}
    assert tune.entries(chosen) == [{"up_to": 4, "n": 1}, {"n": 2}]
    assert tune.entries({4: {"n": 1}}) == [{"n": 1}]


def test_candidates_that_cannot_run_say_why(tune):
    def run(config):
        if config["n"] == 2:
            raise RuntimeError("too much shared memory\nand more")

    found = list(tune.measure([{"n": 1}, {"n": 2}], run, torch.device("cpu")))
    assert isinstance(found[0][1], float)
    assert found[1][1] == "RuntimeError: too much shared memory"
