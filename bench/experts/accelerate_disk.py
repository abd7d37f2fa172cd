"""accelerate's disk offload: transformers' own model, every layer on disk, read whole when it runs."""

from __future__ import annotations

import time
from pathlib import Path

from bench.experts.job import F32, Job, Outcome, drive

__all__ = ["run"]


def run(job: Job) -> Outcome:
    """`job.model` is a folder with a checkpoint in bfloat16. Options: threads."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(job.options.get("threads", 2)))
    started = time.perf_counter()
    layers = int(job.options["layers"])
    where = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    where |= {f"model.layers.{i}": "disk" for i in range(layers)}
    offload = str(Path(job.model) / "offload")
    net = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16, device_map=where, offload_folder=offload).eval()
    cache = DynamicCache(config=net.config)

    def step(word: int) -> F32:
        with torch.inference_mode():
            out = net(input_ids=torch.tensor([[word]]), cache=cache, use_cache=True, logits_to_keep=1)
        logits: F32 = out.logits[0, -1].float().numpy()
        return logits

    return drive(job, step, int(net.config.vocab_size), time.perf_counter() - started)
