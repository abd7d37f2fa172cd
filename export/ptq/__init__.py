"""Post-training quantisation beyond rounding: what a practitioner tries before training again.

equalise      cross-layer equalisation: channel ranges of an activation are evened out through the weights behind it
correct_bias  the mean error that rounding leaves in every channel goes into the running mean (or the bias)
sensitivity   how far the logits move when one layer alone has few bits
mixed         bits by layer under a budget of bytes, from the sensitivities, without training
compare       float against integers, value by value: the table behind `refold inspect --compare`
shared_scale  values whose one scale loses outputs, and the graph in which they stay in float

The first two change float tensors of the captured model before it is quantised, and only where the network's own output error
falls; everything after them, a fresh export included, sees an ordinary model.
"""

from export.ptq.compare import compare
from export.ptq.correct import correct_bias
from export.ptq.equalise import equalise
from export.ptq.mixed import mixed
from export.ptq.sensitivity import LayerSensitivity, sensitivity
from export.ptq.shared_scale import SharedScale, in_float, lossy_scales

__all__ = [
    "LayerSensitivity",
    "SharedScale",
    "compare",
    "correct_bias",
    "equalise",
    "in_float",
    "lossy_scales",
    "mixed",
    "sensitivity",
]
