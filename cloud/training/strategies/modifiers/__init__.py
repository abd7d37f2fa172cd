"""Modifiers: what combines with any strategy. Three kinds, told by `registry.MODIFIERS`:

    weights    of the images of a step: wisdom of crowds, CEMA's two selections of uploads
    penalty    a term of the loss: the teachers' predictions, CAFA
    targets    the teachers' predictions, corrected before anything is learnt: label shift, weights of several teachers

Names of settings are unique among modifiers, because `[distil] options` names them without telling whose they are.
"""
