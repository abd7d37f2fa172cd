"""Cloud strategies: how a domain's uploads move the student's gamma and beta.

A *strategy* is a small object. Shown one step (`training.step.Step`: the student's answers and what else it `needs`), it

    (a) may choose or weigh which uploads count, inside its loss
    (b) gives the loss of the step
    (c) may act after the step: restore parameters, draw them to the exported ones, go back to the start
    (d) says which values are released: the student's own, or an average it kept

A *modifier* combines with any strategy: it weighs uploads (wisdom of crowds, CEMA's two selections), adds a term to the loss
(CAFA, the teachers' predictions), or corrects the teachers' predictions before anything is learnt (label shift, weighting of
several teachers). `training.loop.run_strategy` drives any of them through the bundle's integers; statistics are measured, as
for every recipe.

    [distil]
    recipe = "roid"
    modifiers = ["wisdom-of-crowds"]
    options = { rate = 0.0005, crowd_margin = 0.05 }

One file each: its source, formula and settings. `registry` knows all by name, without loading torch; "refold" and CEMA's two
recipes are registered with the rest, and run in loops of their own in `cloud.distil`. Which is the default is decided by
`python -m bench strategies`.
"""
