"""What a run leaves of models that are not as plain as those of the contract: other heads, dtypes and tokens that pad."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from slora_dist import adapters, model
from slora_dist.config import ModelConfig
from slora_dist.data.tokens import word_tokenizer
from slora_dist.export import export
from slora_dist.model import TaskModel
from tests.families import FAMILIES, NAMES, build, documents
from tests.test_contract import Entered, leave, logits, plain

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer([" ".join(f"word{at}" for at in range(40))])


def saved(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, **settings: Any) -> TaskModel:
    """A backbone without a head on the disk, loaded as a run loads it."""
    classifier = model.load(ModelConfig(config=FAMILIES[family] | settings), NAMES, 3)
    classifier.net.base_model.to(dtype).save_pretrained(folder)  # type: ignore[operator]
    return model.load(ModelConfig(name=str(folder)), NAMES, 4)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("distilbert", ["classifier"]),
        ("roberta", ["classifier.out_proj"]),
        ("roberta", ["classifier.dense", "classifier.out_proj"]),
        ("roberta", []),
    ],
)
def test_plain_peft_loads_a_head_of_some_modules(family: str, head: list[str], tokenizer: Any, tmp_path: Path) -> None:
    """Of what stands above the backbone a part is head, another a target of LoRA."""
    entered = Entered(family, "lora", build(family, head=head))
    judged = leave(entered, tokenizer, tmp_path / "adapter")
    net = PeftModel.from_pretrained(plain(tmp_path / "adapter" / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(net), judged, **CLOSE)
    torch.testing.assert_close(logits(adapters.load(tmp_path / "adapter")), judged, **CLOSE)
    export(tmp_path / "adapter", tmp_path / "merged", merge=True)
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), judged, **CLOSE)


@pytest.mark.parametrize("name", ["head", "sft", "lora", "houlsby"])
def test_a_checkpoint_of_half_precision_is_read_as_it_was_trained(name: str, tokenizer: Any, tmp_path: Path) -> None:
    entered = Entered("bert", name, saved(tmp_path / "backbone", "bert", dtype=torch.bfloat16))
    judged = leave(entered, tokenizer, tmp_path / "adapter")
    net = adapters.load(tmp_path / "adapter")
    assert {weight.dtype for weight in net.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(net), judged, **CLOSE)


@torch.no_grad()
def padded(net: nn.Module, pad: int) -> Tensor:
    """The logits of documents of two lengths."""
    net.eval()
    ids = documents()["input_ids"].clone()
    ids[:3, -2:] = pad
    mask = torch.ones_like(ids)
    mask[:3, -2:] = 0
    said: Tensor = net(input_ids=ids, attention_mask=mask).logits
    return said


@pytest.mark.parametrize("name", ["head", "sft", "lora"])
@pytest.mark.parametrize(("family", "pad"), [("gpt2", None), ("llama", None), ("roberta", 1)])
def test_what_pads_is_known_again(family: str, pad: int | None, name: str, tokenizer: Any, tmp_path: Path) -> None:
    """GPT-2 and Llama judge the last token that is no padding, RoBERTa counts positions from that of the padding."""
    classifier = saved(tmp_path / "backbone", family, pad_token_id=pad)
    model.fit(classifier, tokenizer, 16)
    entered = Entered(family, name, classifier)
    leave(entered, tokenizer, tmp_path / "adapter")
    net = adapters.load(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "merged", merge=True)
    assert padded(net, tokenizer.pad_token_id).shape == (6, len(NAMES))
    torch.testing.assert_close(padded(plain(tmp_path / "merged"), tokenizer.pad_token_id), padded(net, tokenizer.pad_token_id), **CLOSE)


def test_a_network_built_by_its_padding_is_built_again(tokenizer: Any, tmp_path: Path) -> None:
    """The base is saved: the tokenizer's padding, which is another, must not move its positions."""
    entered = Entered("roberta", "sft")
    model.fit(entered.classifier, tokenizer, 16)
    assert entered.net.config.pad_token_id != tokenizer.pad_token_id  # type: ignore[union-attr]
    judged = leave(entered, tokenizer, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapters.load(tmp_path / "adapter")), judged, **CLOSE)


def test_a_relative_folder_is_found_from_elsewhere(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "backbone", "bert")
    monkeypatch.chdir(tmp_path)
    entered = Entered("bert", "sft", model.load(ModelConfig(name="backbone"), NAMES, 4))
    judged = leave(entered, tokenizer, tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    torch.testing.assert_close(logits(adapters.load(tmp_path / "adapter")), judged, **CLOSE)
