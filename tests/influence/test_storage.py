"""Where finished tensors wait."""

import pytest
import torch

from ideal.influence.storage import Store, opened_store

HOST = torch.device("cpu")


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_kept_comes_back(place, dtype, tmp_path):
    store = Store(HOST, place, tmp_path)
    kept = {
        (kind, name): torch.randn(3, 5, dtype=torch.float64).to(dtype)
        for name in ("first", "second")
        for kind in ("basis_O", "eigenvalues")
    }
    for key, tensor in kept.items():
        store.put(*key, tensor)
    store.drop({"first"})
    with pytest.raises(KeyError):
        store.get("basis_O", "first")
    # What takes its place must not lie where another one does.
    kept["basis_O", "first"] = torch.ones(2, dtype=dtype)
    store.put("basis_O", "first", kept["basis_O", "first"])
    del kept["eigenvalues", "first"]
    for key, tensor in kept.items():
        assert store.get(*key).dtype == dtype and torch.equal(store.get(*key), tensor)
    assert len(list(tmp_path.glob("*.safetensors"))) == (3 if place == "disk" else 0)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_spilled_files_are_removed(to, raises):
    """A model in host memory can spill to disk alone."""
    folder = None
    try:
        with opened_store(HOST, True, to) as store:
            store.put("basis_I", "a", torch.ones(2, 2))
            folder = store.folder
            assert folder is not None and len(list(folder.iterdir())) == 1
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert folder is not None and not folder.exists()
