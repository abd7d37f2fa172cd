"""The adaptation service: samples and statistics in, signed releases out.

    service.py   the three gRPC services             (thin: identity, errors, translation)
    ingest.py    samples and statistics ─► store     workers.py   store ─► distil ─► gate ─► candidate
    enrol.py     join token ─► device certificate    releases.py  candidate ─► version, signature, roll-out, rollback

`server.py` binds them to two ports and owns start and stop. Torch is loaded by worker processes only.
"""
