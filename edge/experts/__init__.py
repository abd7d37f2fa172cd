"""Mixture-of-experts models that do not fit: experts stay in the bundle on disk and come into a byte budget when the router
asks.

    raw.py       one aligned read of a file, O_DIRECT where the file system permits it; faulty.py is its double for tests
    buffers.py   the memory that records live in: aligned, reused, never more than the budget
    store.py     reader threads: demand reads overtake read-ahead, digests are checked
    policies.py  which record is worth least
    cache.py     which records are in memory, and which leave when one must come
    paths.py     what the path of a token so far says of its next experts, learnt while running
    predict.py   which hints are worth a read
    memory.py    how records come into the budget, are held, waited for and given back
    pager.py     all of it together: `with pager.use(layer, experts) as records`
    trace.py     the routing of a run, as a file
    replay.py    any policy over such a file, without a model, beside Belady's optimum
    plan.py      what a memory and a disk will give, before anything runs
    budget.py    how many bytes there are

None of these imports torch. What computes does:

    kernel/            one expert from its packed record
    weights/           experts modules checked against records; which embeddings share a tensor
    decode/            from logits to a token, from tokens to text
    openai/            what OpenAI's clients send and expect
    implementation*.py transformers' experts, computed from the pager's records
    model*.py          a transformers model around a pager: `load(path, settings)`
    generate*.py       tokens and text; `refold edge generate`
    serve*.py          OpenAI's API on loopback; `refold edge serve-llm`
    release.py         releases of a language model: the gains of its norms
"""
