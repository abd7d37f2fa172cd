"""The pure half of the release gate: comparisons of two engines on the same images, and what they are enough for.

comparison.py   how much better or worse, image by image, and the smallest change that so many images can show
verdict.py      pass, refuse, or wait for more evidence
kept.py         undecided candidates: when they are judged again, and when no more
"""
