"""A rank of a gloo process group in a process of its own, for tests of several ranks."""

import faulthandler
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


@contextmanager
def joined(rank, ranks, folder, seconds=120):
    """Inside: this process is one rank of several, with one thread; after it the process is over.

    The process ends without being torn down: gloo's threads may abort in one whose peers have
    closed their connections. An error inside is raised as usual.

    Args:
        folder: where the ranks find each other; used once for each number of ranks.
        seconds: what a collective waits for the other ranks.
    """
    faulthandler.enable(all_threads=True)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store_of_{ranks}", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    yield
    dist.barrier()  # nobody leaves while another still reads
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
