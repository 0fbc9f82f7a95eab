"""What is used of `torch.save` and DataLoaders beside their documentation."""

import io
import pickle
import subprocess
import sys
import warnings
from typing import Any, ClassVar

import cloudpickle
import torch
from torch.storage import TypedStorage
from torch.utils.data import DataLoader

from lightning_mgpu._compat import torch_pickling as compat


def test_torch_is_not_imported() -> None:
    code = "import lightning_mgpu._compat.torch_pickling, sys; print('torch' in sys.modules)"
    # Within the command, importing the package registers nothing.
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[0] = '-m'; {code}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_a_loader_in_use_is_pickled_without_its_iterator() -> None:
    loader = DataLoader([1, 2], batch_size=2)
    assert compat.reduce_loader(loader) is None
    loader._iterator = iter(loader)
    reduced = compat.reduce_loader(loader)
    assert reduced is not None
    copied = reduced[0](*reduced[1])
    vars(copied).update(reduced[2])
    assert copied._iterator is None
    assert [batch.tolist() for batch in copied] == [[1, 2]]
    assert loader._iterator is not None
    assert compat.reduce_loader(object()) is None


def test_a_loader_keeps_the_iterator_of_persistent_workers() -> None:
    """So that this is the attribute to leave out."""
    loader = DataLoader([1, 2], num_workers=1, persistent_workers=True)
    assert loader._iterator is None
    iterator = iter(loader)
    assert loader._iterator is iterator
    iterator._shutdown_workers()


class _Pickler(cloudpickle.Pickler):
    derived: ClassVar[list[type]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.derived.append(cls)


def test_save_derives_a_pickler_that_claims_storages() -> None:
    _Pickler.derived.clear()
    stream = io.BytesIO()
    torch.save([torch.ones(2)], stream, pickle_module=compat.pickle_module(_Pickler))
    (kind,) = _Pickler.derived
    assert "persistent_id" in vars(kind)
    stream.seek(0)
    (loaded,) = torch.load(stream, weights_only=False, pickle_module=pickle)
    assert torch.equal(loaded, torch.ones(2))


def test_save_hands_storages_with_a_dtype_to_its_pickler() -> None:
    seen: list[Any] = []

    class Noting(cloudpickle.Pickler):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            theirs = cls.persistent_id

            def persistent_id(self: Any, obj: Any) -> Any:
                if compat.is_typed(obj):
                    seen.append(obj)
                return theirs(self, obj)

            cls.persistent_id = persistent_id

    tensor = torch.ones(2)
    torch.save(tensor, io.BytesIO(), pickle_module=compat.pickle_module(Noting))
    (storage,) = seen
    assert storage.dtype == torch.float32
    storages = (compat.untyped(storage), tensor.untyped_storage())
    assert len({compat.identity_of(each) for each in storages}) == 1


def test_identities_tell_storages_apart() -> None:
    tensor, other = torch.ones(4), torch.ones(4)
    identity = compat.identity_of(tensor.untyped_storage())
    assert identity == compat.identity_of(tensor[1:].untyped_storage())
    assert identity != compat.identity_of(other.untyped_storage())


def test_storages_gain_and_lose_a_dtype_without_a_warning() -> None:
    storage = torch.tensor([1.0, 2.0]).untyped_storage()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = compat.typed(storage, torch.float32)
        assert isinstance(made, TypedStorage)
        assert compat.is_typed(made)
        assert not compat.is_typed(storage)
        assert compat.identity_of(compat.untyped(made)) == compat.identity_of(storage)
        assert torch.tensor([], dtype=torch.float32).set_(made).tolist() == [1, 2]
