"""Weights files of every kind, and the sentence each misfit gets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from export.weights import load_weights, read_weights
from refold.errors import InputError


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items() if "tracked" not in k)


def saved(tmp_path, how: str):
    source, state = net(), net().state_dict()
    path = tmp_path / f"w{how}"
    if how == ".npz":
        np.savez(path, **{k: v.numpy() for k, v in state.items() if "tracked" not in k})
    elif how == ".safetensors":
        save_file(state, path)
    elif how == ".keras.npz":
        leaf = {"running_mean": "moving_mean", "running_var": "moving_variance"}
        arrays = {}
        for k, v in state.items():
            stem, _, last = k.rpartition(".")
            norm = stem == "1"
            last = leaf.get(last, {"weight": "gamma", "bias": "beta"}[last] if norm and last in ("weight", "bias") else last)
            arrays[f"{stem}.{'kernel' if last == 'weight' else last}"] = v.numpy()
        np.savez(path, **{k: v for k, v in arrays.items() if "tracked" not in k})
    else:
        wrapped = {".pt": state, ".pth": {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
                   ".ckpt": {"model": {"state_dict": state}}}  # fmt: skip
        torch.save(wrapped[how], path)
    return source, path


@pytest.mark.parametrize("how", [".npz", ".safetensors", ".keras.npz", ".pt", ".pth", ".ckpt"])
def test_reads(how, tmp_path):
    source, path = saved(tmp_path, how)
    target = net()
    with torch.no_grad():
        for p in target.parameters():
            p.zero_()
    load_weights(target, path)
    assert same(source, target)


class Evil:
    def __reduce__(self):
        return (print, ("never",))


def test_never_unpickles(tmp_path, capsys):
    torch.save({"state_dict": net().state_dict(), "extra": Evil()}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="never unpickles") as e:
        read_weights(tmp_path / "w.pt")
    assert e.value.code == "pickle" and "never" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["w.pt", "w.npz", "w.safetensors"])
def test_damaged_or_absent(name, tmp_path):
    with pytest.raises(InputError, match="no weights file"):
        read_weights(tmp_path / name)
    (tmp_path / name).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(InputError, match=name):
        read_weights(tmp_path / name)


def test_misfits_are_named(tmp_path):
    state = {k: v.numpy() for k, v in net().state_dict().items() if "tracked" not in k}
    state["0.weight"] = state["0.weight"][:2]
    del state["1.bias"], state["1.weight"], state["2.weight"], state["2.bias"]
    np.savez(tmp_path / "w.npz", other=np.ones(2), **state)
    with pytest.raises(InputError) as e:
        load_weights(net(), tmp_path / "w.npz")
    assert "lacks 1.weight, 1.bias, 2.weight and 1 more" in e.value.message
    assert "the model lacks other" in e.value.message and "0.weight is (2, 3, 3, 3)" in e.value.message


def test_a_file_without_tensors(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="no state dict"):
        read_weights(tmp_path / "w.pt")
