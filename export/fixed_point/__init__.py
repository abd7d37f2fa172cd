"""Adaptive-precision fixed-point training (AdaPT) of any captured model, and its export as integers with power-of-two scales.

    number      <WL,FL>: the grid, rounding to nearest and stochastically
    precision   the switch: push down by histogram divergence, push up by gradient diversity
    settings    what a person may choose, the paper's numbers and ours for integer engines
    network     the captured graph with every weight and every value on its own grid
    train       steps, switches between steps, epochs; `checkpoint` makes them survive a kill
    report      bits, zeros, sizes and the modelled speed-up
    deliver     codes and scales for the integer engines; `power_of_two` what rounding the folded scales would cost
    cli         `refold export fixed-point`

What is trained is what an integer engine computes: the graph is that of `export.capture` after the same rules and placement,
run by the same interpreter, and norms are folded where the engine folds them. (Kummer et al., arXiv 2107.13490.)
"""
