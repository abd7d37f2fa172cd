"""EQ-Net (Xu et al., ICCV 2023): one supernet, trained once, from which any bit-width, granularity and symmetry can be taken.

    capture ─► rules ─► place ─► layout ─► initialise ─► train ─► search ─► deliver ─► `refold export --from`
     (the same graph the exporter writes)   initial      train    search    deliver

The supernet *is* the exporter's graph: weights pass an elastic quantiser at each integer layer, activations one at each value
that has a scale of its own (residual sums included), so what is trained is what the integer engine computes. Float weights are
shared by all configurations; only steps and zero points are kept for each form.

    space        what may be chosen: forms, configurations, sampling
    layout       what of a network it is chosen for, and what a choice costs
    rounding     the quantiser and its gradients          quantisers   steps and zero points of every form
    supernet     graph + quantisers                       frozen       one configuration as integers, norms re-estimated
    regular      weight distribution regularisation       guidance     group progressive guidance
    predictor    accuracy of a configuration, guessed     search       the best one within a budget
"""
