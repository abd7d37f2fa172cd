"""Every operator one by one: LiteRT against torch with simulated codes and against ONNX Runtime; its norms in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operator_nets import CASES, integers, pictures

from export.checks import perturbed
from export.engines import infer as infer_ort
from export.engines import session
from export.operators import OPERATORS
from export.runtimes.litert import LiteRt, infer
from export.student import Student
from export.targets import TARGETS, write
from refold.errors import ModelError
from refold.tflite import TfliteFile

X = pictures()
LITERT, ORT = TARGETS["litert"], TARGETS["ort-x86-avx2"]
# Of the logits' spread. 16-bit logits alone make 0.0005; a code on a tie may fall the other way.
NEAR, TIED = 0.002, 0.02
# Here ONNX Runtime itself is not the student: it quantises float weights between quantised activations.
OWN_KERNELS = ("conv with dead channels", "conv that is silent")  # not XNNPACK's: halves are rounded away from zero
ORT_APART = ("conv in float, depthwise", "linear in float", "conv_transpose", "conv_transpose cut and padded",
             "conv_transpose padded only")  # fmt: skip


def test_every_operator_has_a_case():
    assert {name.partition(" ")[0] for name in CASES} == set(OPERATORS)


@pytest.mark.parametrize("case", CASES)
def test_an_operator(case):
    model = integers(CASES[case], X)
    artefact, onnx = write(LITERT, model), write(ORT, model)
    got = infer(artefact.model, X)
    with torch.no_grad():
        truth = Student(model).eval()(torch.from_numpy(X)).numpy()
    assert truth.std() > 1e-2 and LiteRt().fusion(artefact, model).unfused == ()
    assert np.abs(got - truth).max() < (TIED if case in OWN_KERNELS else NEAR) * truth.std()
    file, states = TfliteFile(artefact.model), perturbed(model.table, 0.2)
    assert set(file.adaptable) == set(model.table.tensors())
    assert file.patched(model.table.tensors()) == artefact.model
    changed = infer(file.patched(model.table.tensors(states)), X)
    assert np.abs(changed - got).max() > 0.1 * truth.std()
    if case not in ORT_APART:
        for ours, tensors in ((got, model.table.tensors()), (changed, model.table.tensors(states))):
            theirs = infer_ort(session(onnx.model, tensors), X)
            assert np.abs(ours - theirs).max() < TIED * theirs.std()


def test_what_cannot_be_written_is_named():
    def dilated(n):
        n.add("max_pool", kernel=(2, 2), strides=(1, 1), pads=(0,) * 4, dilations=(2, 2), ceil=False)

    with pytest.raises(ModelError, match=r"Layer layer\.max_pool2 is a dilated max pooling, which LiteRT does not have"):
        write(LITERT, integers(dilated, X))

    def grouped(n):
        n.add("conv_transpose", constants={"weight": n.weights(8, 2, 2, 2)}, strides=[2, 2], pads=[0] * 4,
              output_padding=[0, 0], groups=4, dilations=[1, 1])  # fmt: skip

    with pytest.raises(ModelError, match="grouped or dilated transposed convolution"):
        write(LITERT, integers(grouped, X))
