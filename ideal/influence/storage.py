"""Where finished tensors wait: beside the model, in host memory, or in memory-mapped files."""

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Store:
    """Tensors by (kind, name)."""

    def __init__(
        self, device: torch.device, place: Literal["device", "cpu", "disk"], folder: Path | None = None
    ) -> None:
        """device: what `get` returns on. folder: for "disk"."""
        self.device, self.place, self.folder = device, place, folder
        self.tensors: dict[tuple[str, str], Tensor] = {}
        self.files: dict[tuple[str, str], Path] = {}
        self.written = 0

    def put(self, kind: str, name: str, tensor: Tensor) -> None:
        """Keeps a tensor; what was kept under this name must have been dropped."""
        assert (kind, name) not in self.tensors and (kind, name) not in self.files
        if self.place == "disk":
            assert self.folder is not None
            path = self.folder / f"{self.written}.safetensors"
            self.written += 1
            save_file({"tensor": tensor.contiguous()}, path)
            self.files[kind, name] = path
        else:
            self.tensors[kind, name] = tensor.cpu() if self.place == "cpu" else tensor

    def get(self, kind: str, name: str) -> Tensor:
        """The tensor, on the model's device."""
        if self.place == "disk":
            with safe_open(self.files[kind, name], framework="pt") as file:
                tensor: Tensor = file.get_tensor("tensor")
                return tensor.to(self.device)
        return self.tensors[kind, name].to(self.device)

    def drop(self, names: Collection[str]) -> None:
        """Lets go of the tensors of these names, of all kinds."""
        for key in [key for key in self.tensors if key[1] in names]:
            del self.tensors[key]
        for key in [key for key in self.files if key[1] in names]:
            self.files.pop(key).unlink()


@contextmanager
def opened_store(device: torch.device, spilled: bool, to: Literal["cpu", "disk"]) -> Iterator[Store]:
    """A store on the model's device, or where the budget sends it; its files are removed at the end.

    A model in host memory can spill to disk alone.
    """
    if not spilled:
        yield Store(device, "device")
    elif to == "cpu" and device.type != "cpu":
        yield Store(device, "cpu")
    else:
        with tempfile.TemporaryDirectory(prefix="ideal-influence-") as folder:
            yield Store(device, "disk", Path(folder))
