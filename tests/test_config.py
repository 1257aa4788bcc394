from typing import Any

import pytest

from slora_dist.config import PRESETS, Config, DensePhase, LowrankPhase, MethodConfig, SparsePhase
from slora_dist.errors import ConfigError
from slora_dist.settings import validate

PLAIN: dict[str, Any] = {"model": {"config": {"model_type": "bert"}}, "data": {"path": "toy"}}


def config(**sections: Any) -> Config:
    return validate(PLAIN | sections)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_their_phases_from_the_sections(name: str) -> None:
    phases = config(
        method={"name": name, "sparse": {"density": 0.5, "rounds": 3}, "dense": {"rounds": 4}, "lowrank": {"rank": 2, "rounds": 5}}
    ).method.resolved()
    full = {"sparse": SparsePhase(density=0.5, rounds=3), "dense": DensePhase(rounds=4), "lowrank": LowrankPhase(rank=2, rounds=5)}
    assert phases == tuple(full.get(kind, getattr(MethodConfig(), kind)) for kind in PRESETS[name])


def test_custom_phases_differ_from_their_section_where_they_say_so() -> None:
    method = {
        "name": "custom",
        "lowrank": {"rank": 2, "lr": 0.1},
        "phases": [{"kind": "sparse"}, {"kind": "lowrank", "rank": 3}, {"kind": "lowrank"}],
    }
    assert config(method=method).method.resolved() == (SparsePhase(), LowrankPhase(rank=3, lr=0.1), LowrankPhase(rank=2, lr=0.1))


def test_a_preset_equals_its_list_of_phases() -> None:
    custom = config(method={"name": "custom", "phases": [{"kind": "sparse"}, {"kind": "lowrank"}]})
    assert custom.method.resolved() == config(method={"name": "slora"}).method.resolved()


def test_numbers_as_people_write_them() -> None:
    """YAML 1.1 reads 1e-3 as a string."""
    settings = config(method={"sparse": {"lr": "1e-3", "density": "5e-2"}}, server={"lr": 1, "eps": "1e-8"})
    assert settings.method.sparse.lr == 1e-3 and settings.method.sparse.density == 0.05
    assert settings.server.lr == 1.0 and settings.server.eps == 1e-8


def test_sampled_is_all_unless_said() -> None:
    assert config(clients={"count": 9}).sampled == 9
    assert config(clients={"count": 9, "per_round": 2}).sampled == 2


def test_settings_do_not_change_after_validation() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config().run.seed = 3  # type: ignore[misc]


PISSA = {"kind": "lowrank", "init": "pissa"}
KEEP = {"kind": "lowrank", "residual": "keep", "remainder": "keep"}
OWN = {"path": "c{client}.csv", "test_path": "t.csv", "labels": 2}
HEAD_KEPT = {"method": {"name": "custom", "phases": [{"kind": "head"}, {"kind": "lowrank"}]}, "clients": {"keep": ["head"]}}
BAD: list[tuple[str, dict[str, Any], str]] = [  # setting, sections, what the message says is allowed
    ("metod", {"metod": {}}, "clients, comm, data, method, model, network, privacy, run, server"),
    ("clients.cuont", {"clients": {"cuont": 3}}, "batch_size, count, epochs"),
    ("method.sparse.desnity", {"method": {"sparse": {"desnity": 0.1}}}, "density, lr, lr_decay, mask, mask_documents, rounds, scope"),
    ("comm.wire.value", {"comm": {"wire": {"value": "float32"}}}, "down_values, feedback, indices, topk, up_values, values"),
    ("data.path", {"data": {}}, "csv, json(l) or parquet file"),
    ("data", {"data": "toy"}, "a valid dictionary"),
    ("clients.count", {"clients": {"count": "four"}}, "integer"),
    ("clients.count", {"clients": {"count": 2.5}}, "integer"),
    ("clients.count", {"clients": {"count": True}}, "integer"),
    ("clients.count", {"clients": {"count": 0}}, "1"),
    ("clients.weight_decay", {"clients": {"weight_decay": -0.1}}, "greater than or equal to 0"),
    ("clients.per_round", {"clients": {"count": 3, "per_round": 4}}, "1 to clients.count = 3"),
    ("data.labels", {"data": {"path": "toy", "labels": 2.5}}, "integer"),
    ("data.labels", {"data": {"path": "toy", "labels": ["a", 2]}}, "or their names in order"),
    ("data.labels", {"data": {"path": "c{client}.csv", "test_path": "t.csv"}}, "number of classes or their names"),
    ("data.test_path", {"data": {"path": "c{client}.csv", "labels": 2}}, "held-out file"),
    ("data.client_column", {"data": {"path": "toy", "partition": "natural"}}, "column"),
    ("data.client_column", {"data": {"path": "toy", "client_column": "who"}}, "empty; or data.partition natural"),
    ("model.name", {"model": {}}, "`model.config` with a `model_type`"),
    ("model.precision", {"model": {"name": "x", "precision": "fp16"}}, "'float32' or 'bfloat16'"),
    ("method.name", {"method": {"name": "s-lora"}}, "'houlsby', 'pfeiffer' or 'custom'"),
    ("method.sparse.density", {"method": {"sparse": {"density": 0}}}, "greater than 0"),
    ("method.sparse.density", {"method": {"sparse": {"density": 2}}}, "less than or equal to 1"),
    ("method.sparse.density", {"method": {"sparse": {"density": "high"}}}, "number"),
    ("method.sparse.lr", {"method": {"sparse": {"lr": float("inf")}}}, "finite"),
    ("method.sparse.lr", {"method": {"sparse": {"lr": float("nan")}}}, "greater than 0"),
    ("method.sparse.lr", {"method": {"sparse": {"lr": 0}}}, "greater than 0"),
    ("method.lowrank.rank", {"method": {"lowrank": {"rank": 0}}}, "greater than or equal to 1"),
    ("method.lowrank.targets", {"method": {"lowrank": {"targets": "some"}}}, "'all' or 'attention'"),
    ("method.lowrank.ranks.pooler", {"method": {"lowrank": {"ranks": {"pooler": "x"}}}}, "integer"),
    ("method.phases", {"method": {"name": "custom"}}, "a list of phases"),
    ("method.phases", {"method": {"name": "fft", "phases": [{"kind": "dense"}]}}, "none with a preset"),
    ("method.phases.0.kind", {"method": {"name": "custom", "phases": [{"kind": "name"}]}}, "lowrank, bitfit, head, houlsby, pfeiffer"),
    ("method.phases.0.kind", {"method": {"name": "custom", "phases": [{}]}}, "lowrank, bitfit, head, houlsby, pfeiffer"),
    ("method.phases.0.kind", {"method": {"name": "custom", "phases": [{"kind": "houlsby"}, {"kind": "dense"}]}}, "houlsby last"),
    ("method.phases.1.kind", {"method": {"name": "custom", "phases": [{"kind": "dense"}, {"kind": "pfeiffer"}]}}, "pfeiffer first"),
    (
        "comm.wire.indices",
        {"method": {"name": "sft", "sparse": {"mask": "magnitude"}}, "comm": {"wire": {"indices": "gap"}}},
        "implicit",
    ),
    ("method.phases.1.kind", {"method": {"name": "custom", "phases": [{"kind": "dense"}, {"kind": "sparse"}]}}, "sparse first"),
    ("method.phases.0.rnk", {"method": {"name": "custom", "phases": [{"kind": "lowrank", "rnk": 2}]}}, "alpha, client_ranks, dropout"),
    ("method.phases.1.density", {"method": {"name": "custom", "phases": [{"kind": "dense"}, {"kind": "sparse", "density": 9}]}}, "to 1"),
    ("method.lowrank.init", {"method": {"lowrank": {"init": "random"}}}, "'svd', 'completion', 'kaiming' or 'pissa'"),
    ("method.lowrank.init", {"method": {"name": "lora", "lowrank": {"init": "svd"}}}, "or a method with an earlier phase"),
    ("method.lowrank.init", {"method": {"name": "lora", "lowrank": {"init": "completion"}}}, "kaiming or pissa"),
    ("method.lowrank.init", {"method": {"name": "primed_fft", "lowrank": {"init": "completion"}}}, "completion after a sparse phase"),
    ("method.lowrank.init", {"method": {"name": "slora", "lowrank": {"init": "pissa"}}}, "pissa with `name: lora`"),
    ("method.lowrank.init", {"method": {"name": "lora", "lowrank": {"init": "pissa", "rule": "fedex"}}}, "kaiming, or another rule"),
    ("method.phases.0.init", {"method": {"name": "custom", "phases": [PISSA, {"kind": "dense"}]}}, "pissa with `name: lora`"),
    ("method.phases.1.init", {"method": {"name": "custom", "phases": [{"kind": "head"}, PISSA | {"init": "svd"}]}}, "kaiming or pissa"),
    ("method.phases.0.init", {"method": {"name": "custom", "phases": [{"kind": "lowrank", "init": "svd"}]}}, "kaiming or pissa"),
    ("method.phases.1.init", {"method": {"name": "custom", "phases": [{"kind": "bitfit"}, PISSA | {"init": "svd"}]}}, "kaiming or empty"),
    ("method.lowrank.residual", {"method": {"name": "lora", "lowrank": {"residual": "keep"}}}, "drop"),
    ("method.lowrank.remainder", {"method": {"name": "lora", "lowrank": {"remainder": "keep"}}}, "drop"),
    ("method.phases.1.remainder", {"method": {"name": "custom", "phases": [{"kind": "head"}, KEEP | {"residual": "drop"}]}}, "drop"),
    ("method.phases.1.residual", {"method": {"name": "custom", "phases": [{"kind": "bitfit"}, KEEP]}}, "keep after another phase"),
    ("data.partition", {"data": OWN | {"partition": "dirichlet"}}, "iid"),
    ("data.limit", {"data": OWN | {"limit": 9}}, "empty"),
    ("comm.client_timeout", {"comm": {"client_timeout": 1.5}}, "greater than or equal to 5"),
    ("network.mode", {"network": {"mode": True}}, "'off', 'virtual' or 'sleep'"),
    ("clients.keep", HEAD_KEPT | {"comm": {"wire": {"topk": 0.1, "indices": "gap"}}}, "without comm.wire.topk"),
    ("clients.keep", HEAD_KEPT | {"comm": {"sum": "exact"}}, "comm.sum float"),
    ("server.momentum", {"server": {"momentum": 1}}, "less than 1"),
    ("comm.collective", {"comm": {"collective": "reduce", "wire": {"values": "bfloat16"}}}, "gather, or uploads of float32"),
    ("run.seed", {"run": {"seed": -1}}, "greater than or equal to 0"),
    ("network.up_mbit", {"network": {"up_mbit": 0}}, "greater than 0"),
    ("network.up_mbit", {"network": {"up_mbit": 5}}, "empty; or network.mode virtual, sleep"),
    ("network.classes", {"network": {"classes": {"phone": {}}}}, "empty; or network.mode virtual, sleep"),
    ("network.server_mbit", {"network": {"server_mbit": 100}}, "empty; or network.mode virtual, sleep"),
    ("network.latency_ms", {"network": {"mode": "virtual", "latency_ms": 9, "classes": {"phone": {}}}}, "empty; or no network.classes"),
    ("server.hostile", {"server": {"hostile": 1}}, "0; or median, trimmed_mean, krum, multi_krum"),
    (
        "method.sparse.mask",
        {"method": {"name": "sft", "sparse": {"mask": "gradient"}}, "server": {"aggregate": "median"}},
        "another mask; or server.aggregate mean",
    ),
    ("network.classes.phone.latency", {"network": {"classes": {"phone": {"latency": 3}}}}, "jitter_ms, latency_ms, share, up_mbit"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "sections", "allowed"), BAD)
def test_what_does_not_fit_is_named_with_what_would(setting: str, sections: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(**sections)
    assert error.value.setting == setting
    assert allowed in error.value.allowed
    assert "\n" not in str(error.value)
