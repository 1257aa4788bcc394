import pytest
import torch
from torch import Tensor, nn

from slora_dist.masks import Pattern
from slora_dist.support import KINDS, Slot, Support

SLOTS = (
    Slot.whole("2.weight", (3, 4), "head"),
    Slot("0.weight", (4, 5), "value", 7, mask_seed=11),
    Slot.whole("0.bias", (4,), "factor_b"),
    Slot("2.bias", (3,), "value", 0, mask_seed=12),
)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_kinds_are_contiguous_and_empty_slots_are_left_out() -> None:
    support = Support(SLOTS)
    assert [slot.name for slot in support.slots] == ["0.weight", "0.bias", "2.weight"]
    assert support.counts() == {"value": 7, "factor_b": 4, "head": 12} and support.numel == 23
    spans = [span for _, span in support.spans()]
    assert [(span.start, span.stop) for span in spans] == [(0, 7), (7, 11), (11, 23)]
    assert list(support.counts()) == [kind for kind in KINDS if kind in support.counts()]


def test_what_is_written_is_read_back(net: nn.Module) -> None:
    support, values_N = Support(SLOTS), torch.randn(23)
    support.write(net, values_N)
    assert same_bits(support.read(net), values_N)


def test_no_other_weight_moves_by_one_bit(net: nn.Module) -> None:
    support = Support(SLOTS)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    support.write(net, torch.full((23,), 9.0))
    moved = {name: parameter.detach() != before[name] for name, parameter in net.named_parameters()}
    expected = {name: mask != 0 for name, mask in support.densify(torch.ones(23)).items()}
    expected["2.bias"] = torch.zeros(3, dtype=torch.bool)
    assert all(torch.equal(moved[name], expected[name]) for name in before)
    assert all(same_bits(parameter.detach()[~moved[name]], before[name][~moved[name]]) for name, parameter in net.named_parameters())


def test_densify_puts_each_value_at_its_place() -> None:
    support, offset_N = Support(SLOTS), torch.arange(1.0, 24.0)
    dense = support.densify(offset_N)
    assert {name: tuple(tensor.shape) for name, tensor in dense.items()} == {"0.weight": (4, 5), "0.bias": (4,), "2.weight": (3, 4)}
    for slot, span in support.spans():
        assert same_bits(slot.take(dense[slot.name]), offset_N[span])
        assert dense[slot.name].count_nonzero() == slot.count


def test_offsets_are_from_the_weight_but_from_zero_for_factors(net: nn.Module) -> None:
    reference_N = Support(SLOTS).reference(net)
    assert not reference_N[7:11].any()
    assert same_bits(reference_N[11:], net.get_parameter("2.weight").detach().reshape(-1))


def test_fingerprints_tell_whatever_two_ranks_could_differ_in(net: nn.Module) -> None:
    support = Support(SLOTS)
    reference_N = support.reference(net)
    base = support.fingerprint(reference_N)
    assert len(base) == 32 and base == Support(SLOTS).fingerprint(reference_N.clone())
    nudged_N = reference_N.clone()
    nudged_N[3] = torch.nextafter(nudged_N[3], torch.tensor(9.0))
    others = [
        Support([Slot("0.weight", (4, 5), "value", 7, mask_seed=12), *SLOTS[2:3], SLOTS[0]]),
        Support([Slot("0.weight", (5, 4), "value", 7, mask_seed=11), *SLOTS[2:3], SLOTS[0]]),
        Support([Slot("0.other", (4, 5), "value", 7, mask_seed=11), *SLOTS[2:3], SLOTS[0]]),
    ]
    assert len({base, support.fingerprint(nudged_N), *(other.fingerprint(reference_N) for other in others)}) == 5


@pytest.mark.parametrize("pattern", ["rows", "columns", "product"])
def test_a_structured_slot_keeps_the_crossings_of_its_axes(pattern: Pattern) -> None:
    slot = Slot.masked("0.weight", (40, 50), 0.04, pattern, 5)
    assert slot.axes is not None and slot.index is not None and slot.count == slot.index.numel()
    rows_r, columns_c = slot.axes
    mask = torch.zeros(40, 50)
    mask[rows_r[:, None], columns_c] = 1
    assert torch.equal(slot.index, mask.reshape(-1).nonzero().squeeze(1)), "ascending, and nothing else"
    assert not torch.equal(slot.index, Slot.masked("0.weight", (40, 50), 0.04, pattern, 6).index)
