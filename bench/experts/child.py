"""`python -m bench.experts.child JOB`: one engine in a process of its own; its last line of output is the outcome."""

from __future__ import annotations

import sys

from bench.experts.job import Job
from refold.errors import RefoldError


def main(job: Job) -> int:
    try:
        if job.engine == "llama":
            from bench.experts.llama import run
        elif job.engine == "accelerate":
            from bench.experts.accelerate_disk import run
        else:
            from bench.experts.paged import run
        out = run(job)
    except RefoldError as e:
        print(e.message, file=sys.stderr)
        return e.exit_code
    sys.stdout.write(out.to_json() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Job.from_json(sys.argv[1])))
