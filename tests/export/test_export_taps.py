"""What the taps report, unfolded, is what the float network's norms really see."""

from __future__ import annotations

import export_nets
import numpy as np
import torch
from torch import nn

from export.checks import perturbed
from export.engines import infer, session
from refold.norms import unfold_moments


def test_unfolded_moments_are_those_of_the_norms_inputs(residual, x):
    net = export_nets.make("residual")
    seen = {}
    for name, m in net.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_pre_hook(lambda m, given, name=name: seen.__setitem__(name, given[0]))
    with torch.no_grad():
        net(torch.from_numpy(x))
    table, part = residual.bundle.norms, residual.bundle.target().taps
    for states in ({}, perturbed(table, 0.1)):
        moments = infer(session(residual.bundle.read(part), table.tensors(states)), x).mean(0)
        start = 0
        for site in table.norms[: 6 if not states else 1]:
            mean, square = moments[:, start : start + site.channels]
            start += site.channels
            got_mean, got_variance = unfold_moments(site, states.get(site.name, site.exported), mean, square)
            truth = seen[site.name].transpose(0, 1).flatten(1)
            spread = truth.std(1).numpy()
            assert np.abs(got_mean - truth.mean(1).numpy()).max() < 0.1 * spread.max()
            assert np.abs(np.sqrt(got_variance) / spread - 1).max() < 0.1
