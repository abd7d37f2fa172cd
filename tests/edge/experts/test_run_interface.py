"""Experts modules that ask for another arithmetic than records have are refused; every model computes on its own threads."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import run_models
import torch
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from edge.experts.decode.sampling import Sampling
from edge.experts.implementation import Paging, take_seat
from edge.experts.model import Settings, load
from edge.experts.weights.interface import check_dense
from refold.errors import ModelError

GEOMETRY = run_models.Geometry("mixtral", (0, 1), 4, 2, 32, 48, True, "silu", 32)


def module(activation="silu", decorate=True, own_gate=False, extra=None, intermediate=48, first="gate_up_proj", **flags):
    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.act_fn = ACT2FN[activation]
            rows = 2 * intermediate if first == "gate_up_proj" else intermediate
            setattr(self, first, torch.nn.Parameter(torch.empty(4, rows, 32, device="meta")))
            self.down_proj = torch.nn.Parameter(torch.empty(4, 32, intermediate, device="meta"))
            if extra:
                setattr(self, extra, torch.nn.Parameter(torch.empty(4, 1, device="meta")))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AssertionError

    if own_gate:
        Experts._apply_gate = lambda self, x: x
    if decorate:
        Experts = use_experts_implementation(**flags)(Experts)
    return Experts(SimpleNamespace(_experts_implementation="refold"))


def test_a_module_that_asks_for_what_records_have_takes_its_seat():
    made = module()
    take_seat(made, Paging(None, GEOMETRY), 0)
    assert not list(made.parameters())


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"has_bias": True}, "has_bias"),
        ({"is_transposed": True}, "is_transposed"),
        ({"is_concatenated": False}, "is_concatenated"),
        ({"has_gate": False}, "has_gate"),
        ({"has_post_expert_norm": True}, "has_post_expert_norm"),
        ({"own_gate": True}, "_apply_gate"),
        ({"activation": "gelu"}, "activation"),
        ({"activation": "xielu"}, "activation"),
        ({"extra": "gate_up_proj_bias"}, "gate_up_proj_bias"),
        ({"intermediate": 40}, "down_proj"),
        ({"first": "up_proj"}, "gate_up_proj"),
        ({"decorate": False}, "interface"),
    ],
)
def test_every_flag_that_asks_for_more_is_refused_by_name(asked, word):
    made = module(**asked)
    with pytest.raises(ModelError, match=word) as e:
        take_seat(made, Paging(None, GEOMETRY), 0)
    assert e.value.code == "experts-interface" and "mixtral" in e.value.message
    assert any(True for _ in made.parameters())  # nothing was taken away


def test_a_flag_of_a_later_transformers_is_refused_unless_it_is_off(monkeypatch):
    from transformers.integrations import moe

    def newer(experts_class=None, *, has_bias=False, has_gate=True, has_something=False):
        raise AssertionError

    made = module()
    monkeypatch.setattr(moe, "use_experts_implementation", newer)
    with pytest.raises(ModelError, match="do not say has_something"):
        take_seat(made, Paging(None, GEOMETRY), 0)
    made.has_something = True
    with pytest.raises(ModelError, match="has_something=True"):
        take_seat(made, Paging(None, GEOMETRY), 0)
    made.has_something = False
    take_seat(made, Paging(None, GEOMETRY), 0)


def test_experts_spread_over_processes_are_refused():
    made = module()
    made._is_expert_parallel = True
    with pytest.raises(ModelError, match="several processes"):
        take_seat(made, Paging(None, GEOMETRY), 0)


@pytest.mark.parametrize(("bias", "activation", "count"), [(True, "relu", 4), (False, "gelu", 4), (False, "relu", 3)])
def test_experts_that_are_modules_are_asked_too(bias, activation, count):
    geometry = run_models.Geometry("switch_transformers", (0,), 4, 1, 32, 48, False, "relu", 32)

    def dense(bias, activation):
        one = torch.nn.Module()
        one.wi, one.wo = torch.nn.Linear(32, 48, bias=bias), torch.nn.Linear(48, 32, bias=bias)
        one.act = ACT2FN[activation]
        return one

    check_dense({str(i): dense(False, "relu") for i in range(4)}, geometry)
    with pytest.raises(ModelError) as e:
        check_dense({str(i): dense(bias, activation) for i in range(count)}, geometry)
    assert e.value.code == "experts-interface"


def tokens(running, count=24):
    writing = running.generate("Hello", Sampling(max_tokens=count))
    list(writing)
    return writing.tokens


def test_two_models_compute_on_threads_of_their_own_and_closing_one_leaves_the_other(paged):
    with load(paged.path, Settings(memory=paged.index.total, threads=1)) as running:
        wanted = tokens(running)
    first = load(paged.path, Settings(memory=paged.index.total // 2, threads=3))
    second = load(paged.path, Settings(memory=paged.index.total // 2, threads=2))
    third = load(paged.path, Settings(memory=paged.index.total // 2, threads=1))
    assert (first._crew.threads, second._crew.threads, third._crew) == (3, 2, None)
    got, begun, closed = {}, threading.Barrier(3, timeout=60), threading.Event()

    def write(name, running):
        writing = running.generate("Hello", Sampling(max_tokens=24))
        out = [next(writing).token]
        begun.wait()
        if name == "first":
            assert closed.wait(60)
        out += [piece.token for piece in writing]
        got[name] = out

    threads = [threading.Thread(target=write, args=pair) for pair in (("first", first), ("third", third))]
    for t in threads:
        t.start()
    begun.wait()
    second.close()  # with other threads than the models that go on
    closed.set()
    for t in threads:
        t.join(60)
    assert got == {"first": wanted, "third": wanted}
    assert tokens(first) == wanted
    first.close()
    third.close()
