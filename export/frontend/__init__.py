"""From a person's module to a program that computes the same, and the proof that it does.

reference    what the module answers, run eagerly before anything is captured
run          a captured program, operator by operator
functional   in-place operators and views of it become pure operators
writes       how the pure writes (slice_scatter and its kin) enter the graph
verify       module = program = graph, or the first layer that differs
names        names that collide with none that is there already
faults       what nobody expected, told in one sentence
"""
