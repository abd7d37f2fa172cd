"""`refold demo`: the whole loop on one machine, counted by somebody who knows the labels.

cli.py ─► run.py ─► assets.py, plan.py      pictures, networks, weather; images.py and downloads.py bring CIFAR-10
                 ─► programs.py             export, cloud and device as processes (processes.py, leash.py, hold.py)
                 ─► watch.py, tally.py      answers, score, releases; view.py shows them
                 ─► report.py, page.py      report.json with its claims, report.html
"""
