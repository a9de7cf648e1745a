"""Functions called on the machines of a Ray cluster, each call by itself.

Scheduling, retries and what to do about dead machines are Ray's. The process that joins the cluster
is one of our own (`courier`): Ray ends it when the cluster is lost, and writes where it likes.
What is called takes JSON values and returns None; files in a folder that all machines see hold
what comes of it.
"""

from slimfuse.cluster.answers import answer, packed, unpacked
from slimfuse.cluster.calling import LOCAL, Answer, Needs, answered, check_address

__all__ = [
    "LOCAL", "Answer", "Needs", "answer", "answered", "check_address", "packed",
    "unpacked",
]  # fmt: skip
