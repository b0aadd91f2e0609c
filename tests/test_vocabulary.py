"""Ids as runs, the rows they have, and what a prompt may hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmcut.errors import BundleError
from vlmcut.vocabulary import LOW, Vocabulary, read_runs, write_runs


@given(st.sets(st.integers(0, 300), min_size=1))
def test_runs_come_back(ids: set[int]) -> None:
    text = write_runs(sorted(ids))
    assert read_runs(text, 301).tolist() == sorted(ids)
    assert write_runs(read_runs(text, 301)) == text
    assert text.count(",") + 1 == sum(i - 1 not in ids for i in ids)


def test_runs_by_hand() -> None:
    assert write_runs([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert write_runs(np.arange(152_000)) == "0-151999"


BAD = {
    "": "no id and no run",
    "1,": "no id and no run",
    "a-b": "no id and no run",
    "1 - 2": "no id and no run",
    "-3": "no id and no run",
    "٣": "no id and no run",
    "3,3": "ids ascend",
    "5,2": "ids ascend",
    "4-2": "ids ascend",
    "0-4,4-6": "ids ascend",
    "0-10": "is not below the 10 ids",
    "0-999999999999": "is not below the 10 ids",
}


@pytest.mark.parametrize("text", BAD)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=BAD[text]):
        read_runs(text, 10)


def test_every_id_has_a_row_or_none() -> None:
    vocabulary = Vocabulary(size=7, kept="0-1,4,6")
    assert vocabulary.ids.tolist() == [0, 1, 4, 6]
    assert vocabulary.rows.tolist() == [0, 1, 4, 4, 2, 4, 3]  # 4: the row behind the last one
    assert vocabulary.readable.tolist() == [0, 1, 4, 6]
    assert Vocabulary(size=7, kept="0-1,4,6", unknown=4).readable.tolist() == list(range(7))
    with pytest.raises(ValueError, match="token 5 stands for unknown ones and is not kept"):
        _ = Vocabulary(size=7, kept="0-1,4,6", unknown=5).ids


def test_unknown_ids_are_refused_by_name() -> None:
    vocabulary = Vocabulary(size=7, kept="0-1,4,6")
    vocabulary.check(np.array([[0, 6], [4, 1]]))
    with pytest.raises(
        BundleError, match=r"3 of the prompt's tokens .* first '<5>' \(id 5\); 4 of 7 ids have one"
    ) as caught:
        vocabulary.check(np.array([[0, 5, 3, 3]]), lambda i: f"<{i}>")
    assert "unseen" in (caught.value.hint or "")
    with pytest.raises(BundleError, match=r"first \(id 9\)"):  # an id that never was
        vocabulary.check(np.array([9]))
    Vocabulary(size=7, kept="0-1,4,6", unknown=0).check(np.array([0, 5, 3]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_low_logit_is_the_same_number_in_every_dtype(dtype: type) -> None:
    assert float(dtype(LOW)) == LOW
