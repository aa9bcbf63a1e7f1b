"""Which device computes. There is no GPU here: what is said of one is what torch would say."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from srmu.engine import devices
from srmu.engine.activation_cache import open_activations
from srmu.engine.devices import find_device, name_gpu
from srmu.errors import SrmuError
from srmu.methods.importance import describe_importance, measure_features, sum_features


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac whose GPU holds nothing yet."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 7)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)


def test_auto_takes_the_gpu_there_is(apple: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (find_device("auto"), find_device("mps"), find_device("cpu")) == ("mps", "mps", "cpu")
    assert name_gpu() == "Apple MPS"
    assert devices.reset_peak_memory("mps") == devices.read_peak_memory("mps") == 7
    assert devices.free_bytes("mps") > 0
    with monkeypatch.context() as patch:  # several processes, of which none could hear of another's tensors
        patch.setattr(devices, "get_size", lambda: 2)
        assert find_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (find_device("auto"), find_device("cuda:1")) == ("cuda", "cuda:1")


@pytest.mark.parametrize("name", ["", "gpu", "mps", "cuda:99", "cpu:1", "meta", "hip", "hpu", "mkldnn", "CPU"])
def test_a_device_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "list_devices", lambda: ["cpu"])
    with pytest.raises(SrmuError, match=f"^device {name} is not there; expected auto, or cpu$"):
        find_device(name)


def test_a_device_that_cannot_be_used(apple: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*size: int, device: str) -> None:
        raise RuntimeError("all devices are busy\nmore of it")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(SrmuError, match=r"^device mps cannot be used: all devices are busy; device=cpu "):
        find_device("auto")


def test_activations_of_a_gpu_are_no_others(apple: None) -> None:
    folders: set[Path] = set()
    for device in ("cpu", "mps"):
        store = open_activations("disk", {}, torch.device(device), pytest.fail)
        folders.add(store.folder)
        assert (store.room > 0) == (device == "mps")
    assert len(folders) == 2


class OnApple(Tensor):
    """A tensor that says it lies on Apple's GPU, where float64 does not exist."""

    device = property(lambda self: torch.device("mps"))  # type: ignore[assignment]

    def double(self) -> Tensor:  # type: ignore[override]
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor)


def test_maps_without_float64() -> None:
    hidden, mask = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 5).bool()
    here, there = sum_features(hidden, mask), sum_features(hidden.as_subclass(OnApple), mask)
    assert (here.dtype, there.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(there.as_subclass(Tensor).double(), here, rtol=1e-6, atol=0)
    map_ = measure_features([here])[0]
    assert describe_importance(map_.as_subclass(OnApple)) == describe_importance(map_)
