"""The scopes of all slots as arrays say the same as each scope by itself."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import cheaply
from vllm_edits.edit_store import Scope
from vllm_edits.plugin.graph.scope_tables import ScopeTables

SCOPE_ROWS, SLOTS = 3, 4
windows = st.one_of(st.none(), st.integers(1, 4))
ids = st.one_of(st.none(), st.sets(st.integers(0, 5), min_size=1).map(lambda found: tuple(sorted(found))))
scopes = st.one_of(
    st.builds(Scope, segment=st.sampled_from(["all", "prompt"]), first=windows, last=windows, tokens=ids),
    st.builds(Scope, segment=st.just("generated"), tokens=ids),
)
of_slots = st.dictionaries(st.integers(1, SLOTS), st.lists(scopes, max_size=SCOPE_ROWS - 1))


@cheaply
@given(of_slots, st.lists(st.tuples(st.integers(0, SLOTS), st.integers(0, 9), st.integers(0, 6), st.integers(-1, 6)),
                          min_size=1))  # fmt: skip
def test_a_token_is_covered_where_its_slots_scope_says_so(
    own: dict[int, list[Scope]], tokens: list[tuple[int, int, int, int]]
) -> None:
    """Tokens of any slot, position, length of prompt and id; an id of -1, a placeholder, is no id that is named."""
    tables = ScopeTables(own, SLOTS, SCOPE_ROWS)
    slots, positions, prompts, token_ids = (np.array(each) for each in zip(*tokens, strict=True))
    covered = tables.covered(slots, positions, prompts)
    named = tables.named_ids(torch.device("cpu"))
    met = named.met(torch.from_numpy(slots).int(), torch.from_numpy(token_ids).int()).numpy()
    for row, (slot, position, prompt, token_id) in enumerate(tokens):
        for scope_row in range(SCOPE_ROWS):
            beyond = scope_row == 0 or scope_row > len(own.get(slot, ()))
            scope = Scope() if beyond else own[slot][scope_row - 1]
            assert covered[row, scope_row] == scope.covers(np.array([position]), prompt)[0], (slot, scope_row)
            assert met[row, scope_row] == (scope.tokens is None or token_id in scope.tokens), (slot, scope_row)
    assert tables.names_ids.tolist() == [
        any(scope.tokens is not None for scope in own.get(slot, ())) for slot in range(SLOTS + 1)
    ]
