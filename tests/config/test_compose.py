"""Composition: every option composes, everything is resolved, and what was typed is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain import build, config, groups

COMMANDS = {
    "prep": [],
    "train": [],
    "plan": [],
    "eval": ["checkpoint=runs/x"],
    "generate": ["checkpoint=runs/x"],
}
OPTIONS = [(group, name) for group, names in groups.options().items() for name in names]
# What an option cannot do without.
WITH = {
    ("tokenizer", "existing"): ["tokenizer.path=tokenizer.json", "model.vocab_size=50257"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_resolved(command):
    made = config.compose(command, COMMANDS[command])
    for place, value in config.leaves({key: made[key] for key in made if key != "overrides"}):
        assert value is None or type(value) in (bool, int, float, str, list, dict), place
        assert "${" not in str(value), place
        assert "???" not in str(value), place


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=[f"{g}={n}" for g, n in OPTIONS])
def test_every_option_composes(group, name):
    """compose() also builds the model on meta and compares knobs with signatures."""
    made = config.compose("train", [f"{group}={name}", *WITH.get((group, name), [])])
    assert made["choices"][group] == name


@pytest.mark.parametrize("stack", groups.options()["stack"])
@pytest.mark.parametrize("mixer", groups.options()["mixer"])
def test_the_quickstart_takes_every_mixer_in_every_stack(mixer, stack):
    """With one channel each, so that all of them come up."""
    channels = groups.options()["channel"]
    index = groups.options()["mixer"].index(mixer) + groups.options()["stack"].index(stack)
    channel = channels[index % len(channels)]
    chosen = {"mixer": mixer, "stack": stack, "channel": channel, "experiment": "quickstart"}
    made = config.compose("train", [f"{group}={name}" for group, name in chosen.items()])
    assert made["choices"].items() >= chosen.items()


def test_a_default_position_without_effect_gives_way():
    plain, rotated = config.compose("train", ["mixer=mamba2"]), config.compose("train")
    assert (plain["choices"]["position"], rotated["choices"]["position"]) == ("none", "rope")
    assert plain["overrides"] == ["mixer=mamba2"]
    hybrid = config.compose("train", ["mixer=mamba2", "stack=hybrid"])
    assert hybrid["choices"]["position"] == "rope"
    for typed in ("position=rope", "position.theta=5.0"):
        with pytest.raises(ValueError, match="position=rope: has no effect"):
            config.compose("train", ["mixer=mamba2", typed])


@pytest.mark.parametrize("command", ["train", "prep", "plan"])
def test_every_group_has_a_default(command):
    assert set(groups.defaults(command)) == set(groups.options())


def test_prep_needs_the_text_and_train_does_not():
    assert config.compose("train", ["data=text"])["data"]["name"] == "text"
    with pytest.raises(ValueError, match=r"data.sources.text.root: no value.*llmtrain prep --help"):
        config.compose("prep", ["data=text"])
    made = config.compose("prep", ["data=text", "data.sources.text.root=books"])
    assert made["data"]["sources"]["text"]["root"] == "books"


def test_overrides_win_and_are_kept():
    typed = ["mixer=mha", "train.seq_len=512", "optimizer.lr=1e-3"]
    made = config.compose("train", typed)
    assert made["overrides"] == typed
    assert made["choices"]["mixer"] == "mha"
    assert made["train"]["seq_len"] == 512
    assert made["optimizer"]["lr"] == 1e-3


def test_hybrid():
    hybrid = ["+mixer@mixers.b=sliding_window", "stack.pattern=aaab", "mixers.b.window=32"]
    made = config.compose("train", ["model.n_layers=4", *hybrid])
    assert made["choices"]["mixer@mixers.b"] == "sliding_window"
    assert build.layer_letters(made) == ["a", "a", "a", "b"]
    model = build.build_model(made, vocab_size=256, device="meta")
    assert [block.mixer.window for block in model.stack.blocks] == [None, None, None, 32]


def test_hybrid_by_a_list_and_by_an_experiment(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /mixer@mixers.b: sliding_window\n"
        "  - override /model: tiny\nmodel: {n_layers: 3}\nstack: {pattern: [b, a, b]}\n"
    )
    made = config.compose("train", ["experiment=mine"], config_dirs=[tmp_path])
    assert build.layer_letters(made) == ["b", "a", "b"]
    assert config.compose("prep", ["experiment=mine"], config_dirs=[tmp_path])["data"]


def test_channels_by_letter():
    typed = ["+channel@channels.b=none", "stack.channel_pattern=ab"]
    made = config.compose("train", typed)
    assert made["choices"]["channel@channels.b"] == "none"
    model = build.build_model(made, vocab_size=256, device="meta")
    assert [block.norm2 is None for block in model.stack.blocks] == [False, True] * 2


def test_a_stack_mounts_a_mixer_that_can_be_changed():
    made = config.compose("train", ["stack=hybrid", "mixer=mqa"])
    assert made["choices"]["mixer@mixers.b"] == "attention"
    assert build.layer_letters(made) == ["a", "a", "a", "b"]
    assert made["mixers"]["b"]["n_kv_heads"] == made["model"]["n_kv_heads"]
    typed = ["stack=hybrid", "mixer@mixers.b=sliding_window", "mixers.b.window=7"]
    made = config.compose("train", typed)
    assert made["choices"]["mixer@mixers.b"] == "sliding_window"
    assert made["mixers"]["b"]["window"] == 7
    more = ["+mixer@mixers.c=mha", "stack.pattern=abca"]
    assert set(config.compose("train", [*typed, *more])["mixers"]) == {"b", "c"}


def test_an_experiment_may_choose_the_stack_that_mounts(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /stack: hybrid\n"
        "  - override /mixer@mixers.b: mha\n"
    )
    made = config.compose("train", ["experiment=mine"], config_dirs=[tmp_path])
    assert made["choices"]["mixer@mixers.b"] == "mha"
    typed = ["experiment=mine", "mixer@mixers.b=mqa"]
    made = config.compose("train", typed, config_dirs=[tmp_path])
    assert made["choices"]["mixer@mixers.b"] == "mqa"


def test_layers_of_a_shared_letter_are_one_block():
    typed = ["stack.pattern=abab", "+mixer@mixers.b=mqa", "stack.shared=b"]
    model = build.build_model(config.compose("train", typed), vocab_size=256, device="meta")
    a, b, c, d = model.stack.layers
    assert b is d
    assert a is not c
    assert len(model.stack.blocks) == 3


def test_options_of_the_users_own_folder(tmp_path):
    (tmp_path / "model").mkdir()
    text = (groups.config_root() / "model" / "tiny.yaml").read_text()
    (tmp_path / "model" / "mine.yaml").write_text(text)
    made = config.compose("train", ["model=mine"], config_dirs=[tmp_path])
    assert made["choices"]["model"] == "mine"
    with pytest.raises(ValueError, match="no such option"):
        config.compose("train", ["model=mine"])


def test_save_and_load(tmp_path):
    made = config.compose("train", ["seed=3"])
    config.save(made, tmp_path / "run")
    assert config.load(tmp_path / "run") == made
    assert config.load(tmp_path / "run" / "config.yaml") == made
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_diff():
    old = config.compose("train", ["seed=3"])
    new = config.compose("train", ["optimizer.lr=0.5", "seed=3"])
    changed = config.diff(old, new)
    assert changed["optimizer.lr"] == (old["optimizer"]["lr"], 0.5)
    assert set(changed) == {"optimizer.lr", "overrides"}
    assert config.diff({"a": {"b": 1}}, {"a": {}}) == {"a": (None, {}), "a.b": (1, None)}


def test_only_build_instantiates():
    package = Path(build.__file__).parent
    users = [file for file in package.rglob("*.py") if "hydra.utils" in file.read_text()]
    assert users == [package / "build.py"]


def test_model_does_not_depend_on_other_parts():
    """Initialisation is keyed by name: another mixer leaves the channel's weights as they were."""
    models = []
    for mixer in ("attention", "mha"):
        made = config.compose("train", [f"mixer={mixer}", "model=tiny"])
        models.append(build.build_model(made, vocab_size=256))
    one, two = (dict(model.named_parameters()) for model in models)
    for name in one:
        if ".mixer." not in name:
            assert one[name].equal(two[name]), name
