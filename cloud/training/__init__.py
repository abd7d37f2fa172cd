"""A training, and what is around it.

step, context, loop, strategies/    how a domain's uploads move gamma and beta: one loop, one small object for each method
answers, trial                      what teachers are worth, before they are registered
waiting                             what evidence a training still waits for
"""
