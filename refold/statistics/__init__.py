"""Norm statistics of a domain, as far as the mix of classes does not explain them. Used by device, cloud and export.

    layout          where each norm site's channels sit in a row of all of them
    class_moments   how every site's moments depend on the class mix: measured at export, in the bundle
    belief          whether the mix that answers speak of is that of the calibration images
    expectation     what a site shows at a class mix, and how uncertain that is
    model           the three together, for one bundle
    rounds          class mix and statistics, in turn, over the same images
    posterior       observed moments and an expectation in, statistics to serve out
    contract        inputs and outputs of the statistics graph, which computes the same inside one forward pass

The observed mean of a channel differs from the exported one because the images are different (a shift: wanted) and because the
classes are mixed differently than in training (not wanted: a model normalised to its present classes cannot tell them apart).
The second part lies in a small known subspace, so both can be told apart: docs/guide/adaptation.md.
"""

from __future__ import annotations

from refold.statistics.class_moments import ClassMoments
from refold.statistics.contract import INPUTS, OUTPUTS, RATIO, ROWS
from refold.statistics.expectation import Expectation, expectation
from refold.statistics.inputs import graph_inputs, unshifted_inputs
from refold.statistics.layout import Layout
from refold.statistics.model import StatisticsModel
from refold.statistics.posterior import posterior, served_states, site_posterior
from refold.statistics.rounds import in_rounds
from refold.statistics.trust import within_trust

__all__ = [
    "INPUTS",
    "OUTPUTS",
    "RATIO",
    "ROWS",
    "ClassMoments",
    "Expectation",
    "Layout",
    "StatisticsModel",
    "expectation",
    "graph_inputs",
    "in_rounds",
    "posterior",
    "served_states",
    "site_posterior",
    "unshifted_inputs",
    "within_trust",
]
