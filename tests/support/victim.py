"""A process that uses a store without a pause until it is killed: publish, promote, roll back, copy, collect.

Started by tests/store/test_kills.py with the stores' folders and a seed.
"""

from __future__ import annotations

import sys

import numpy as np

from tests.support.store import bundle
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.errors import Conflict, NotFound
from vllm_edits.edit_store.upkeep.collect import collect
from vllm_edits.edit_store.upkeep.transfer import copy


def one_of_each(store: EditStore, other: EditStore, label: str) -> None:
    """Every command once; what it leaves is whole, wherever it is cut off."""
    version = store.publish(bundle(label))
    store.promote(f"polite@{version}")
    store.promote(f"polite@{version}", tag=f"tag-{label}")
    try:
        store.rollback("polite")
    except NotFound:  # the first promotion has nothing before it
        store.promote(f"polite@{version}", tag="beta")
    copy(store, other, [f"polite@{version}"])
    store.publish(bundle(f"garbage-{label}"))
    collect(store, grace_hours=0)
    other.promote(f"polite@{version}")


def main(url: str, copy_url: str, seed: str) -> None:
    """Go on for ever."""
    store, other = EditStore(url, create=True), EditStore(copy_url, create=True)
    choose = np.random.default_rng(int(seed))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        try:
            one_of_each(store, other, f"{seed}-{choose.integers(10**9)}")
        except Conflict:  # a collection that was killed left its marks: finish it, as the message says
            for each in (store, other):
                collect(each, grace_hours=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
