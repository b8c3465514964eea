"""Models and tokenizers: loaded, wrapped with LoRA, saved."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, TaskType, get_peft_model
from pydantic import Field
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ideal.distributed import world_size
from ideal.errors import UserError
from ideal.settings import STRICT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Loaded = TypeVar("Loaded")


@dataclass
class LoraConfig:
    """`model.lora.*`: train low-rank adapters instead of all weights (peft)."""

    __pydantic_config__ = STRICT

    rank: Annotated[int, Field(ge=0)] = 0
    """rank of the adapters; 0: full fine-tuning"""
    alpha: Annotated[float, Field(gt=0)] = 16
    """scale: the adapter's output is multiplied by alpha / rank"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout on the adapter's input, in training"""
    target_modules: list[str] | str = "all-linear"
    """names of the modules that get adapters, or peft's all-linear"""


@dataclass
class ModelConfig:
    """`model.*`: the base model, and how it is held."""

    __pydantic_config__ = STRICT

    name_or_path: str | None = None
    """hub name or folder of the base model; none: the embedded demo's"""
    revision: str | None = None
    """the hub's branch, tag or commit"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the weights in training; with float32 and train.bf16 the Trainer computes in bfloat16 (mixed precision)"""
    attn_implementation: str | None = None
    """transformers' attention kernel (sdpa, eager, flash_attention_2); none: transformers' choice"""
    trust_remote_code: bool = False
    """run code that comes with the model"""
    lora: LoraConfig = field(default_factory=LoraConfig)


def _load(load: Callable[..., Loaded], config: ModelConfig, what: str, **options: Any) -> Loaded:
    source = str(config.name_or_path)
    if Path(source).expanduser().exists() and not Path(source).is_dir():
        raise UserError(f"model.name_or_path: {source} is a file; give the model's folder or hub name")
    try:
        return load(source, revision=config.revision or "main", trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"model.name_or_path: no {what} could be loaded from {source!r}: {reason}") from error


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the end token as padding where it has none.

    Raises UserError where there is none, or none that can tell characters from tokens.
    """
    folder = Path(str(config.name_or_path))
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        raise UserError(
            f"model.name_or_path: {folder} has no tokenizer (no tokenizer.json); "
            "copy the tokenizer's files of the base model into it"
        )
    tokenizer = _load(AutoTokenizer.from_pretrained, config, "tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.name_or_path: the tokenizer of {config.name_or_path} has no end token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def checkpoint_config(config: ModelConfig) -> Any:
    """The base model's transformers configuration: shapes, and the data type its weights are stored in.

    Raises UserError where there is no such model.
    """
    return _load(AutoConfig.from_pretrained, config, "model configuration")


def stored_dtype(config: ModelConfig) -> torch.dtype:
    """The data type of the base checkpoint, in which trained models are saved too."""
    dtype = getattr(checkpoint_config(config), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else DTYPES[config.dtype]


def load_model(
    config: ModelConfig, checkpoint: Path | None, dtype: torch.dtype, *, trainable: bool = False
) -> PreTrainedModel | PeftModel:
    """The base model, or what a round trained.

    checkpoint: a folder written by `save_model`; None: the base model. trainable: with LoRA, put adapters on the
    base model where there are none yet. Raises UserError where nothing can be loaded.
    """
    lora = config.lora.rank > 0
    where = config.name_or_path if lora or checkpoint is None else str(checkpoint)
    source = ModelConfig(
        name_or_path=where,
        revision=config.revision if where == config.name_or_path else None,
        trust_remote_code=config.trust_remote_code,
    )
    options = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    model = _load(AutoModelForCausalLM.from_pretrained, source, "model", dtype=dtype, **options)
    if lora and checkpoint is not None:
        return PeftModel.from_pretrained(model, str(checkpoint), is_trainable=trainable)
    return with_adapters(model, config.lora) if trainable else model


def with_adapters(model: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel | PeftModel:
    """The model with new LoRA adapters as its only trainable parameters; as it is without LoRA."""
    if lora.rank == 0:
        return model
    adapters = PeftLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft takes fractions too
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    with warnings.catch_warnings():
        # peft asks transformers for what has another name there by now.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, adapters)


def shard(model: PreTrainedModel | PeftModel, device: torch.device) -> None:
    """Splits the weights among all ranks, in place (FSDP2): a block's are whole only while it runs.

    Blocks move to `device` one at a time, so that no device ever holds more than its part and one block.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    blocks = set(cast(list[str], base._no_split_modules or []))
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes weights (adapters alone with LoRA) in `dtype`, the configuration and the tokenizer to `folder`.

    state: the full state dict where the model itself holds only shards.
    """
    cast: dict[int, torch.Tensor] = {}  # by address, so that tied weights stay one tensor and are written once
    whole = model.state_dict() if state is None else state
    for tensor in whole.values():
        cast.setdefault(tensor.data_ptr(), tensor.to(dtype) if tensor.is_floating_point() else tensor)
    model.save_pretrained(str(folder), state_dict={name: cast[t.data_ptr()] for name, t in whole.items()})
    if (folder / "config.json").is_file():
        # save_pretrained notes the data type of the model in memory, not that of what it wrote.
        model.config.dtype = dtype
        model.config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def merge_adapters(config: ModelConfig, checkpoint: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the base model with the adapters of `checkpoint` added to its weights, loadable by itself."""
    dtype = stored_dtype(config)
    model = load_model(config, checkpoint, torch.float32)
    assert isinstance(model, PeftModel)
    merged = model.merge_and_unload()
    save_model(merged, tokenizer, folder, dtype)
