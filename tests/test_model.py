"""What is written is what was trained, once, in the data type asked for."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ideal import demo
from ideal.model import save_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_once_in_the_data_type_asked_for(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=tied, **sizes))
    save_model(model, AutoTokenizer.from_pretrained(demo.BASE_MODEL), tmp_path, dtype)

    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert all(file.get_tensor(name).dtype == dtype for name in names)
    assert ("lm_head.weight" in names) == (not tied), "a tied weight is written once"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(dtype))
