"""`refold export experts`: a Hugging Face mixture-of-experts checkpoint becomes one paged bundle.

    pipeline.py     the story: open, quantise, choose bits, put together
    families.py     the supported architectures, as data
    checkpoint.py   safetensors on disk, one file or many shards, read tensor by tensor
    source.py       a checkpoint seen as transformers' model: resident tensors by their names there, and experts
    agreement.py    the checkpoint against its own config.json
    work.py         the folder beside the output: records written so far, measurements made so far
    tokens.py       calibration text as windows of tokens
    measure.py      perplexity, routing and output errors of the model with experts of any bits
    search.py       which expert gets how many bits: arithmetic
    choose.py       ... with real measurements
    report.py       what came of it: table, JSON, heat-map
    factor*.py      a dense model cut into experts first
    cli.py          the command

Only one expert is in memory at a time while quantising, and the resident part while measuring.
"""
