from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenq.calibration.documents import Document
from qwenq.calibration.sequences import Sizes, check_vocabulary, pack, read_pool, shuffled
from qwenq.errors import CalibrationError

SEPARATOR = 0
# every token names its document (thousands) and its place in it
DOCUMENTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).map(
    lambda sizes: [[1000 * (i + 1) + j for j in range(size)] for i, size in enumerate(sizes)]
)
SIZES = st.builds(Sizes, samples=st.integers(1, 4), held_out=st.integers(0, 3), seq_len=st.integers(2, 9))


@given(DOCUMENTS, SIZES)
def test_sequences_are_runs_of_the_joined_documents(documents: list[list[int]], wanted: Sizes) -> None:
    joined = [token for document in documents for token in [*document, SEPARATOR]]
    if len(joined) < wanted.tokens:
        with pytest.raises(CalibrationError, match=f"{len(joined):,} tokens, but {wanted.tokens:,}"):
            pack(documents, wanted, [SEPARATOR], where="here")
        return
    packed = pack(documents, wanted, [SEPARATOR], where="here")
    assert packed.tokens.shape == (wanted.samples, wanted.seq_len)
    assert packed.held_out.shape == (wanted.held_out, wanted.seq_len)
    held, main = packed.held_out.flatten().tolist(), packed.tokens.flatten().tolist()
    assert joined[: len(held)] == held
    if packed.held_out_from == "other documents":
        assert not {t // 1000 for t in held if t} & {t // 1000 for t in main if t}
    start = (
        len(held) if packed.held_out_from == "the same documents" else _next_document(documents, len(held))
    )
    assert joined[start : start + len(main)] == main


def _next_document(documents: list[list[int]], tokens: int) -> int:
    """Where the first document begins of which nothing is among the first ``tokens``."""
    begin = 0
    for document in documents:
        if begin >= tokens:
            break
        begin += len(document) + 1
    return begin


def test_held_out_shares_documents_only_where_it_must() -> None:
    wanted = Sizes(samples=2, held_out=1, seq_len=4)
    one = [list(range(1, 30))]
    assert pack(one, wanted, [], where="here").held_out_from == "the same documents"
    assert pack([*one, *one], wanted, [], where="here").held_out_from == "other documents"
    assert pack(one, Sizes(2, 0, 4), [], where="here").held_out_from == "none"


def test_too_little_text_says_what_would_fit() -> None:
    with pytest.raises(CalibrationError) as caught:
        pack([list(range(50))], Sizes(samples=100, held_out=2, seq_len=8), [], where="notes.txt")
    assert "50 tokens, but 816 are needed for 100 + 2 sequences of 8" in str(caught.value)
    assert "notes.txt" in str(caught.value) and "lower --samples to 4" in str(caught.value)
    assert pack([list(range(50))], Sizes(4, 2, 8), [], where="notes.txt").tokens.shape == (4, 8)


def test_only_as_many_documents_are_tokenised_as_needed() -> None:
    asked: list[int] = []

    def documents():
        for number in range(1000):
            asked.append(number)
            yield [number] * 10

    packed = pack(documents(), Sizes(samples=3, held_out=1, seq_len=16), [], where="here")
    assert packed.documents == len(asked) == 2 + 5


def test_progress_ends_at_the_total() -> None:
    seen: list[tuple[int, int]] = []
    documents = [list(range(30))] * 4
    pack(documents, Sizes(2, 1, 16), [0], where="here", progress=lambda *now: seen.append(now))
    assert seen[-1] == (48, 48) and sorted(seen) == seen


def test_the_order_depends_on_the_seed_alone() -> None:
    documents = [Document(str(i), f"line {i}") for i in range(20)]
    first = shuffled(documents, 0)
    assert first == shuffled(documents, 0) != shuffled(documents, 1)
    assert sorted(first, key=documents.index) == documents
    assert [d.content for d in first[:6]] == ["11", "1", "0", "18", "2", "16"]  # on every platform


def test_the_pool_stops_reading() -> None:
    stream = iter([Document("x" * 10, str(i)) for i in range(10)])
    pool, ended = read_pool(stream, 35)
    assert len(pool) == 4 and not ended
    assert len(list(stream)) == 5  # one more was looked at, to know that there is more
    assert read_pool(iter([Document("x" * 10, "0")]), 10)[1]


def test_ids_outside_the_vocabulary_are_named() -> None:
    check_vocabulary(torch.tensor([[0, 9]]), 10, "here")
    check_vocabulary(torch.empty(0, 4, dtype=torch.int64), 10, "here")
    with pytest.raises(CalibrationError, match="token id 12 is outside the model's vocabulary of 10"):
        check_vocabulary(torch.tensor([[0, 12]]), 10, "here")
    with pytest.raises(CalibrationError, match="token id -1 "):
        check_vocabulary(torch.tensor([[-1, 3]]), 10, "here")
