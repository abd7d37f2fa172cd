"""Does a strength for each norm site, learnt without labels, adapt better than 1 everywhere? It does not: docs/adr/023.

    degradations   domains made of calibration images, without CIFAR-10-C
    served         what a network answers behind a domain's kept images at given strengths
    learn          strengths that keep the clean answers on those domains
    judge          accuracy on the development corruptions; one strength for a domain chosen by its kept images

`python -m bench.strength learn|judge` runs them.
"""
