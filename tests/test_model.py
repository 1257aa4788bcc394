"""Classifiers of five families, built tiny with random weights. Legend: O/I out/in features."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast

from slora_dist import model
from slora_dist.config import LowrankPhase, ModelConfig
from slora_dist.data.federation import Federation
from slora_dist.data.tokens import word_tokenizer
from slora_dist.errors import ConfigError
from slora_dist.model import TaskModel
from tests.families import FAMILIES, NAMES, build
from tests.tiny import tiny

every_family = pytest.mark.parametrize("family", FAMILIES)

# head modules, dense layers by name ending -> (O, I), the layers that hold attention, how many layers there are
EXPECTED: dict[str, tuple[set[str], dict[str, tuple[int, int]], set[str], int]] = {
    "bert": (
        {"classifier"},
        {"query": (16, 16), "intermediate.dense": (24, 16), "output.dense": (16, 24), "pooler.dense": (16, 16)},
        {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"},
        2 * 6 + 1,
    ),
    "roberta": (
        {"classifier"},
        {"query": (16, 16), "intermediate.dense": (24, 16)},
        {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"},
        2 * 6,
    ),
    "albert": (
        {"classifier"},
        {"query": (16, 16), "ffn": (24, 16), "ffn_output": (16, 24), "embedding_hidden_mapping_in": (16, 8), "pooler": (16, 16)},
        {"attention.query", "attention.key", "attention.value", "attention.dense"},
        6 + 2,  # one layer, whatever the depth
    ),
    "distilbert": (
        {"pre_classifier", "classifier"},
        {"q_lin": (16, 16), "lin1": (24, 16), "lin2": (16, 24)},
        {"attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"},
        2 * 6,
    ),
    "gpt2": (
        {"score"},
        {"c_attn": (48, 16), "c_fc": (24, 16), "mlp.c_proj": (16, 24)},
        {"attn.c_attn", "attn.c_proj"},
        2 * 4,
    ),
    "llama": (
        {"score"},
        {"q_proj": (16, 16), "gate_proj": (24, 16), "down_proj": (16, 24)},
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
        2 * 7,
    ),
}


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
NO_SUCH: list[dict[str, Any]] = [  # settings of a BERT that none can have
    {"hidden_size": "abc"},
    {"hidden_size": -4},
    {"vocab_size": 0},
    {"hidden_act": "foo"},
    {"num_attention_heads": 0},
]


def ending(name: str, endings: Any) -> bool:
    return any(name.endswith(f".{end}") or name == end for end in endings)


@every_family
def test_the_head_is_what_stands_above_the_backbone(family: str) -> None:
    classifier = build(family)
    assert set(classifier.head) == EXPECTED[family][0]
    backbone = {name for name, _ in classifier.net.named_parameters() if name.startswith(f"{classifier.net.base_model_prefix}.")}
    every = {name for name, _ in classifier.net.named_parameters()}
    assert set(model.head_parameters(classifier)) == every - backbone and backbone


def test_the_head_can_be_named() -> None:
    classifier = build("distilbert", head=["classifier"])
    assert model.head_parameters(classifier) == ["classifier.weight", "classifier.bias"]
    assert "pre_classifier" in model.dense_layers(classifier)
    with pytest.raises(ConfigError, match=r"^model.head: no module is named 'clasifier'\. Allowed: .*classifier"):
        build("distilbert", head=["clasifier"])


@every_family
def test_dense_layers_are_those_between_embeddings_and_head(family: str) -> None:
    head, shapes, _, count = EXPECTED[family]
    layers = model.dense_layers(build(family))
    if family == "albert":  # its factorised embedding has a dense layer: part of the embedding
        shapes, count = {end: shape for end, shape in shapes.items() if "embedding" not in end}, count - 1
    assert len(layers) == count and not [name for name in layers if name.split(".")[0] in head]
    for end, shape in shapes.items():
        assert {layers[name] for name in layers if ending(name, [end]) and "attention.output" not in name} == {shape}


@every_family
def test_only_gpt2_stores_its_weights_transposed(family: str) -> None:
    classifier = build(family)
    for layer, shape in model.dense_layers(classifier).items():
        stored = tuple(classifier.net.get_submodule(layer).weight.shape)
        assert model.is_transposed(classifier, layer) == (family == "gpt2")
        assert stored == (shape[::-1] if family == "gpt2" else shape)


@every_family
def test_targets(family: str) -> None:
    classifier, attention = build(family), EXPECTED[family][2]
    layers = model.dense_layers(classifier)
    assert model.ranks(classifier, LowrankPhase(rank=2)) == dict.fromkeys(layers, 2)
    found = model.ranks(classifier, LowrankPhase(rank=2, targets="attention"))
    assert list(found) == [name for name in layers if ending(name, attention)] and found
    one = sorted(attention)[0].split(".")[-1]
    listed = model.ranks(classifier, LowrankPhase(rank=2, targets=[one]))
    assert list(listed) == [name for name in layers if name.split(".")[-1] == one]


def test_ranks_by_module() -> None:
    """The paper's setting: another rank for the layer before the classifier."""
    found = model.ranks(build("bert"), LowrankPhase(rank=3, ranks={"pooler.dense": 5, "query": 2}))
    assert found["bert.pooler.dense"] == 5 and found["bert.encoder.layer.1.attention.self.query"] == 2
    assert found["bert.encoder.layer.0.attention.self.key"] == 3


@pytest.mark.parametrize(
    ("phase", "setting", "allowed"),
    [
        (LowrankPhase(targets=["query", "quary"]), "method.lowrank.targets", "dense, key, query, value"),
        (LowrankPhase(rank=2, ranks={"querry": 2}), "method.lowrank.ranks.querry", "query"),
        (LowrankPhase(rank=2, targets=["query"], ranks={"key": 2}), "method.lowrank.ranks.key", "query"),
        (LowrankPhase(rank=17), "method.lowrank.rank", "1 to 16"),
        (LowrankPhase(rank=2, ranks={"key": 99}), "method.lowrank.ranks", "1 to 16"),
        (LowrankPhase(rank=2, ranks={"key": 0}), "method.lowrank.ranks", "1 to 16"),
    ],
)
def test_targets_and_ranks_that_do_not_fit_are_named(phase: LowrankPhase, setting: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as error:
        model.ranks(build("bert"), phase)
    assert error.value.setting == setting and allowed in error.value.allowed


@every_family
def test_weights_come_from_the_seed_and_a_shell_has_their_shapes(family: str) -> None:
    one, same, other = build(family, seed=1), build(family, seed=1), build(family, seed=2)
    shapes = {name: parameter.shape for name, parameter in model.shell(one_config(family), NAMES).net.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in one.net.named_parameters()}
    assert all(torch.equal(weights, same.net.get_parameter(name)) for name, weights in one.net.named_parameters())
    assert not all(torch.equal(weights, other.net.get_parameter(name)) for name, weights in one.net.named_parameters())


def one_config(family: str) -> ModelConfig:
    return ModelConfig(config=FAMILIES[family])


def test_loading_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    build("bert")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_is_loaded_bit_for_bit_and_only_a_new_head_is_drawn(tmp_path: Path) -> None:
    saved = build("bert")
    saved.net.base_model.save_pretrained(tmp_path / "backbone")  # type: ignore[union-attr, operator]
    loaded, again = (model.load(ModelConfig(name=str(tmp_path / "backbone")), NAMES, seed=5) for _ in range(2))
    for name, weights in loaded.net.named_parameters():
        from_saved = torch.equal(weights, saved.net.get_parameter(name))
        assert from_saved == (name != "classifier.weight") and torch.equal(weights, again.net.get_parameter(name))
    assert loaded.source == str(tmp_path / "backbone"), "plain transformers can load the base from there"


def test_a_network_that_settings_have_changed_is_no_source(tmp_path: Path) -> None:
    build("bert").net.base_model.save_pretrained(tmp_path / "m")  # type: ignore[union-attr, operator]
    assert model.load(ModelConfig(name=str(tmp_path / "m"), config={"num_hidden_layers": 1}), NAMES, seed=5).source is None


def test_a_backbone_that_lacks_weights_is_no_source(tmp_path: Path) -> None:
    net = build("bert").net
    kept = {name: weights for name, weights in net.state_dict().items() if "pooler" not in name}
    net.save_pretrained(tmp_path / "m", state_dict=kept)  # type: ignore[operator]
    assert model.load(ModelConfig(name=str(tmp_path / "m")), NAMES, seed=5).source is None


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (ModelConfig(config={"model_type": "brt"}), "model.config"),
        (ModelConfig(config={"model_type": "vit"}), "model.config"),
        (ModelConfig(name="/no/such/folder"), "model.name"),
        *((ModelConfig(config={"model_type": "bert"} | SMALL | change), "model.config") for change in NO_SUCH),
    ],
)
def test_what_is_no_classifier_is_named(config: ModelConfig, setting: str) -> None:
    with pytest.raises(ConfigError) as error:
        model.load(config, NAMES, 0)
    assert error.value.setting == setting and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=f"^{setting}: "):
        model.shell(config, NAMES)


@pytest.mark.parametrize("change", NO_SUCH)
def test_what_is_changed_of_a_model_and_does_not_fit_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    AutoConfig.for_model("bert", **SMALL).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^model\.config: "):
        model.shell(ModelConfig(name=str(tmp_path), config=change), NAMES)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (None, "no tokenizer at "),
        ("{}", "no tokenizer at "),
        ('{"model": 7}', "no tokenizer at "),
        ("words", "has neither a pad nor an eos token"),
    ],
)
def test_a_folder_without_a_tokenizer_of_use_is_named(written: str | None, problem: str, tmp_path: Path) -> None:
    if written == "words":
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "?": 1}, "?"))).save_pretrained(tmp_path)
    elif written is not None:
        (tmp_path / "tokenizer.json").write_text(written)
    with pytest.raises(ConfigError, match=rf"^model.tokenizer: .*{problem}"):
        model.tokenizer(ModelConfig(tokenizer=str(tmp_path), config={"model_type": "bert"}))


def test_a_checkpoint_for_other_classes_gets_a_new_head(tmp_path: Path) -> None:
    """Whatever it was for: its own classes, several labels at once, a number."""
    build("bert").net.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = ModelConfig(name=str(tmp_path))
    classes = [f"class {at}" for at in range(len(NAMES) + 3)]
    one, two, kept = (model.load(config, names, seed) for names, seed in ((classes, 1), (classes, 1), (NAMES, 1)))
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "labels": torch.tensor([0, len(classes) - 1])}
    assert one.net(**batch).loss.item() == two.net(**batch).loss.item() > 0
    assert one.source is None and kept.source == str(tmp_path), "a base that plain transformers cannot load is saved"
    for name, weight in one.net.named_parameters():
        assert name.startswith("classifier") or torch.equal(weight, kept.net.get_parameter(name))
    with pytest.raises(ConfigError, match=r"^model\.config: bert\.embeddings\.word_embeddings\.weight is \(50, 16\) in "):
        model.load(ModelConfig(name=str(tmp_path), config={"vocab_size": 60}), NAMES, 1)


def test_tokens_that_were_added_may_lie_beyond_the_model() -> None:
    classifier, words = build("bert"), word_tokenizer([" ".join(f"w{at}" for at in range(30))])
    words.add_special_tokens({"additional_special_tokens": [f"<{at}>" for at in range(50)]})
    assert len(words) > classifier.net.config.vocab_size  # type: ignore[union-attr,operator]
    model.fit(classifier, words, 16)
    words.pad_token = "<49>"
    with pytest.raises(ConfigError, match=r"^model\.tokenizer: "):
        model.fit(classifier, words, 16)


def test_documents_have_no_token_that_the_model_does_not_know() -> None:
    federation = Federation(tiny(), None)
    assert len(federation.client(0)) > 0
    federation.vocabulary = 5
    with pytest.raises(ConfigError, match=r"^model\.tokenizer: token \d+ of the document '.*' for a model of 5"):
        federation.client(1)


def test_positions_without_end() -> None:
    classifier = build("bert")
    classifier.net.config.max_position_embeddings = -1  # type: ignore[union-attr]
    model.fit(classifier, word_tokenizer(["a b c"]), 10_000)


def test_tokenizer_and_model_have_to_fit() -> None:
    classifier, words = build("bert"), word_tokenizer([" ".join(f"w{at}" for at in range(30))])
    model.fit(classifier, words, 16)
    assert classifier.net.config.pad_token_id == words.pad_token_id  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"^data.max_length: 33 tokens for a model of 32\. Allowed: 2 to 32"):
        model.fit(classifier, words, 33)
    model.fit(build("roberta"), words, 32)
    with pytest.raises(ConfigError, match=r"^data.max_length: 33 tokens for a model of 32"):  # of 34 positions
        model.fit(build("roberta"), words, 33)
    with pytest.raises(ConfigError, match=r"^model.tokenizer: 104 tokens for a model of 50"):
        model.fit(classifier, word_tokenizer([" ".join(f"w{at}" for at in range(100))]), 16)


@every_family
def test_every_family_classifies_padded_documents(family: str) -> None:
    """GPT-2 takes the last token that is no padding: it must know which is."""
    classifier: TaskModel = build(family)
    model.fit(classifier, word_tokenizer(["a b c"]), 16)
    ids = torch.tensor([[5, 6, 4, 0, 0], [5, 6, 4, 5, 6]])
    classifier.net.eval()
    with torch.no_grad():
        both = classifier.net(input_ids=ids, attention_mask=(ids != 0).long()).logits
        alone = classifier.net(input_ids=ids[:1, :3], attention_mask=torch.ones(1, 3).long()).logits
    assert both.shape == (2, len(NAMES))
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-5)
