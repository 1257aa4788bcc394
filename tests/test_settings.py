import json
import re
from pathlib import Path
from typing import Any

import pytest

from slora_dist import settings
from slora_dist.config import Config
from slora_dist.errors import ConfigError
from tests.tiny import ROOT, tiny

REGENERATE = """docs/settings.md is not what config/ says; make it anew:
    python -c "from slora_dist.settings import document; print(document(), end='')" > docs/settings.md"""


def test_every_config_of_the_repository_is_valid() -> None:
    files = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if not re.search(r"studies/|/study_", str(path))]
    assert len(files) >= 9
    for file in files:
        assert isinstance(settings.load(file), Config), file


def test_yaml_writes_numbers_as_people_do() -> None:
    assert tiny().method.sparse.lr == 3e-3


def test_overrides_are_read_as_yaml() -> None:
    config = tiny(
        "run.seed=7", "data.labels=[a, b]", "method.lowrank.lr=1e-3", "method.lowrank.ranks={pooler.dense: 3}",
        "model.config.num_hidden_layers=1", "server.eps=1e-8", "data.test_path=null", "comm.wire.values=bfloat16", "data.text=a=b",
    )  # fmt: skip
    assert config.run.seed == 7 and config.data.labels == ["a", "b"] and config.method.lowrank.lr == 1e-3
    assert config.method.lowrank.ranks == {"pooler.dense": 3} and config.server.eps == 1e-8 and config.data.test_path is None
    assert config.model.config["num_hidden_layers"] == 1 and config.model.config["model_type"] == "bert"
    assert config.comm.wire.values == "bfloat16" and config.data.text == "a=b"


def test_the_word_off_is_a_word(tmp_path: Path) -> None:
    """YAML 1.1 reads it as False."""
    path = tmp_path / "off.yaml"
    path.write_text((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8") + "network: {mode: off}\n")
    assert settings.load(path).network.mode == tiny("network.mode=off").network.mode == "off"


def test_overrides_reach_into_lists_and_the_last_one_wins() -> None:
    config = tiny(
        "method.name=custom", "method.phases=[{kind: dense}, {kind: lowrank}]", "method.phases.1.rank=2", "method.phases.1.rank=3"
    )
    assert [phase.kind for phase in config.method.resolved()] == ["dense", "lowrank"]
    assert config.method.resolved()[1].rank == 3  # type: ignore[union-attr]
    assert tiny("data.labels=[a, b]", "data.labels.1=c").data.labels == ["a", "c"]


@pytest.mark.parametrize(
    ("override", "setting", "allowed"),
    [
        ("run.seed", "run.seed", "section.key=value"),
        ("=3", "=3", "section.key=value"),
        ("data.labels=[a", "data.labels", "a list in []"),
        ("run.seed.low=3", "run.seed", "integer"),
        ("data.path.text=x", "data.path.text", "dotted name"),
        ("method.phases.0.rank=3", "method.phases", ""),
        ("runs.seed=3", "runs", "run"),
        ("run.sed=3", "run.sed", "seed"),
        ("run=3", "run", ""),
    ],
)
def test_an_override_that_fits_nowhere_is_named(override: str, setting: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(override)
    assert error.value.setting.startswith(setting) and allowed in error.value.allowed


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        (b"a: [", "is not YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"- 1", "no settings"),
        (b"", "no settings"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as error:
        settings.load(path)
    assert error.value.setting == str(path) and "\n" not in str(error.value)


def test_a_config_survives_json() -> None:
    config = tiny("method.name=custom", "method.phases=[{kind: lowrank, targets: [query]}]", "data.labels=[a, b]", "clients.away={0: [1]}")
    assert settings.validate(config.model_dump()) == config
    assert settings.validate(json.loads(json.dumps(config.model_dump()))) == config


def test_a_resumed_run_has_the_settings_it_had() -> None:
    config = tiny("method.lowrank.ranks={query: 2}")
    settings.require_equal(config, settings.override(config, ["run.seed=0"]))
    changes = {
        "run.seed": "run.seed=1",
        "method.lowrank.ranks.query": "method.lowrank.ranks={query: 3}",
        "method.lowrank.ranks.key": "method.lowrank.ranks={query: 2, key: 3}",
        "model.config.hidden_dropout_prob": "model.config.hidden_dropout_prob=0.0",
    }
    for setting, change in changes.items():
        with pytest.raises(ConfigError) as error:
            settings.require_equal(config, settings.override(config, [change]))
        assert error.value.setting == setting and "the run that is resumed has" in error.value.problem


def leaves(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict) or not tree:
        return [prefix]
    return [leaf for key, value in tree.items() if key != "kind" for leaf in leaves(value, f"{prefix}.{key}" if prefix else key)]


def documented() -> list[tuple[str, str]]:
    """(setting, meaning) of every row of the reference."""
    rows = [line.split("|") for line in settings.document().splitlines() if line.startswith("| `")]
    return [(row[1].strip(" `"), "|".join(row[3:]).strip()) for row in rows]


def test_every_setting_is_documented_once() -> None:
    names = leaves(tiny("model.config={}", "model.name=x").model_dump())
    shared = {name.removeprefix("method.dense.") for name in names if name.startswith("method.dense.")}
    kinds = re.compile(rf"^method\.(sparse|dense|lowrank|bitfit|head|houlsby|pfeiffer)\.(?=({'|'.join(shared)})$)")
    assert sorted(name for name, _ in documented()) == sorted({kinds.sub("method.<kind>.", name) for name in names})
    assert all(meaning for _, meaning in documented())


def test_settings_stay_few() -> None:
    assert len(documented()) <= 107, "a new setting takes the place of an old one"


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings.document(), REGENERATE
