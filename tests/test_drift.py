"""What keeps clients together, or apart: FedProx, SCAFFOLD, and coordinates that never leave a client. Legend: n coordinates."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slora_dist.audit.checks import audit
from slora_dist.client import train
from slora_dist.data.tokens import batches
from slora_dist.errors import ConfigError
from slora_dist.exchange import Exchange
from slora_dist.runfolder import RunFolder
from tests.families import build
from tests.test_client import PAD, documents, enter, recipe
from tests.test_exchange import HEAD, SUPPORT, A, B
from tests.tiny import SHORT, run, same, tiny

SGD = ("clients.optimizer=sgd", "method.sparse.lr=0.1", "method.lowrank.lr=0.1")
EVERYBODY = ("clients.per_round=6", "clients.scaffold=true", *SGD)


@pytest.mark.parametrize("kind", ["dense", "sparse", "lowrank"])
def test_fedprox_and_scaffold_add_to_the_gradients_what_the_papers_say(kind: str) -> None:
    """Three full-batch steps of plain SGD: w <- w - lr (g + mu (w - w_0) + c - c_k)."""
    net, (coordinates, start_n) = (classifier := build("bert")).net, enter(classifier, kind)
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    part, mu, lr = documents(9, 0), 0.7, 0.2
    correction_n = 0.01 * torch.randn(coordinates.numel, generator=torch.Generator().manual_seed(5))
    settings = replace(recipe(lr=lr, epochs=3, prox=mu), correction_n=correction_n)
    update = train(net, coordinates, start_n, part, settings, seed=0)
    (batch,), value_n = batches(part, len(part), PAD), start_n.clone()
    for _ in range(3):
        coordinates.write(net, value_n)
        chosen = [net.get_parameter(slot.name) for slot in coordinates.slots]
        grads = torch.autograd.grad(net(**batch).loss, chosen)
        grad_n = torch.cat([slot.take(grad) for slot, grad in zip(coordinates.slots, grads, strict=True)])
        value_n = value_n - lr * (grad_n + mu * (value_n - start_n) + correction_n)
    torch.testing.assert_close(update.delta_N, value_n - start_n, atol=2e-5, rtol=1e-3)
    plain = train(net, coordinates, start_n, part, recipe(lr=lr, epochs=3), seed=0)
    assert (plain.delta_N - update.delta_N).abs().max() > 1e-3


def states(folder: RunFolder) -> list[dict[str, torch.Tensor]]:
    """The last state of every client."""
    return [load_file(sorted(path.glob("*.safetensors"))[-1]) for path in sorted((folder.path / "clients").iterdir())]


def test_the_servers_variate_is_the_mean_of_the_clients(tmp_path: Path) -> None:
    """With all clients in every round (Karimireddy et al. 2020, option II); the variates' bytes are planned and counted."""
    folder = run(tmp_path / "run", *SHORT, *EVERYBODY)
    checkpoint = folder.latest()
    assert checkpoint
    own_Kn = torch.stack([state["variate.lowrank"] for state in states(folder)])
    assert own_Kn.abs().max() > 1e-3
    torch.testing.assert_close(checkpoint.tensors["variate"], own_Kn.mean(0), atol=1e-6, rtol=1e-4)
    by_kind = folder.summary()["payload_bytes"]["by_kind"]
    for way in ("up", "down"):
        assert by_kind[way]["variate"] == sum(count for kind, count in by_kind[way].items() if kind != "variate")
    assert [check.name for check in audit(folder) if check.faults] == []


def test_after_one_local_step_a_variate_is_the_clients_gradient(tmp_path: Path) -> None:
    """The first round has no correction, so that c_k = (w_0 - w) / lr."""
    one = ("clients.steps=1", "method.sparse.rounds=1", "method.lowrank.rounds=1", "clients.batch_size=100", "data.limit=48")
    folder = run(tmp_path / "run", *EVERYBODY, "method.name=lora", *one)
    plain = run(tmp_path / "plain", *SGD, "clients.per_round=6", "method.name=lora", *one)
    with_it, without = folder.latest(), plain.latest()
    assert with_it and without
    torch.testing.assert_close(with_it.tensors["offset"], without.tensors["offset"], atol=1e-7, rtol=1e-5)
    assert float(with_it.tensors["variate"].norm()) > 0


@pytest.mark.parametrize("overrides", [("clients.keep=[factor_b]",), ("clients.keep=[head]", "clients.per_round=6"), EVERYBODY])
def test_clients_find_what_they_keep_when_a_run_is_resumed(overrides: tuple[str, ...], tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", *SHORT, *overrides)
    broken = run(tmp_path / "broken", *SHORT, *overrides, stop_after=1)
    for last in (2, 3, 4):
        run(broken.path, resume=True, stop_after=last)
    assert same(straight, broken)
    for one, other in zip(states(straight), states(broken), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert [check.name for folder in (straight, broken) for check in audit(folder) if check.faults] == []


def test_what_is_kept_goes_down_once_and_never_up(tmp_path: Path) -> None:
    config = tiny("clients.count=9", "clients.per_round=3", "clients.keep=[factor_b, head]")
    phase = config.method.lowrank.model_copy(update={"rounds": 12})
    messages = Exchange(config, phase, 3, SUPPORT, [])
    up = [messages.sends(number).support.counts() for number in messages.numbers()]
    assert up == [{"factor_a": A}] * 12
    down = [message for number in messages.numbers() for message in messages.down(number)]
    sent = {
        kind: sum(message.part.support.counts().get(kind, 0) * len(message.clients) for message in down) for kind in ("factor_b", "head")
    }
    assert sent == {"factor_b": 9 * B, "head": 9 * HEAD}


def test_clients_keep_different_factors_and_the_servers_stay_as_they_were(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", *SHORT, "clients.keep=[factor_b]", "clients.per_round=6")
    kept = [state["kept.lowrank.factor_b"] for state in states(folder)]
    assert len(kept) == 6 and all(not torch.equal(kept[0], other) for other in kept[1:])
    assert folder.summary()["payload_bytes"]["by_kind"]["up"].keys() == {"value", "head", "factor_a"}


@pytest.mark.parametrize(
    ("setting", "overrides"),
    [
        ("clients.scaffold", ("clients.scaffold=true",)),
        ("clients.scaffold", ("clients.scaffold=true", "clients.optimizer=sgd", "method.lowrank.rule=rolora")),
        ("clients.scaffold", ("clients.scaffold=true", "clients.optimizer=sgd", "clients.keep=[head]")),
        ("server.weighting", ("clients.scaffold=true", "clients.optimizer=sgd", "server.weighting=examples")),
        ("server.aggregate", ("clients.scaffold=true", "clients.optimizer=sgd", "server.aggregate=median")),
        ("clients.keep", ("clients.keep=[head, head]",)),
        ("clients.keep", ("clients.keep=[factor_b]", "method.lowrank.rule=stack")),
        ("clients.keep", ("clients.keep=[head]", "method.name=head")),
        ("clients.keep", ("clients.keep=[head]", "model.task=causal_lm")),
        ("clients.keep", ("clients.keep=[factor_b]", "method.name=sft")),
    ],
)
def test_settings_that_do_not_go_together(setting: str, overrides: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(*overrides)
    assert caught.value.setting == setting
