"""The sizes of Llama models, as arguments of transformers.LlamaConfig (nothing is downloaded)."""

from typing import Any


def _llama(hidden: int, intermediate: int, blocks: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }


SHAPES = {
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, tied=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, tied=True),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, tied=False),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, tied=False),
}
