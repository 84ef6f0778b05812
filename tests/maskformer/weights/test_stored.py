"""The complete content of a file of torch.save is what torch itself reads, and memory is taken once."""

import io
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer.weights import read
from maskformer.weights.pickles import RefusedError, load

NUMBERS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([math.nan, -0.0, 5e-324, math.inf]),
)
KEYS = st.one_of(st.text(max_size=10), st.integers(-(2**62), 2**62), st.booleans(), st.none())
TENSORS = [
    torch.arange(6.0).view(2, 3).t(),
    torch.tensor([math.nan, -0.0, 1e-45]),
    torch.tensor(5),
    torch.zeros(0, 3),
    torch.tensor([True, False]),
    torch.ones(3, dtype=torch.bfloat16),
    torch.arange(4).to(torch.uint16),
    torch.ones(2, dtype=torch.complex64),
    torch.ones(2, dtype=torch.float8_e4m3fn),
    torch.arange(10)[3:7],
    torch.nn.Parameter(torch.ones(2)),
    torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
]
# torch cannot read its own legacy files with these.
OLD = [tensor for tensor in TENSORS if tensor.dtype not in (torch.uint16, torch.float8_e4m3fn)]


def contents(tensors: list[torch.Tensor]) -> st.SearchStrategy[object]:
    return st.recursive(
        st.one_of(NUMBERS, st.sampled_from(tensors)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
            st.dictionaries(KEYS, inner, max_size=4),
            st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict),
            st.sets(st.integers(), max_size=3),
        ),
        max_leaves=12,
    )


def saved(content: object, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file, **options)
    file.seek(0)
    return file


def assert_same(found: Any, expected: Any) -> None:
    """Compare bit for bit, types included; an OrderedDict is a dict here, and a Parameter a tensor."""
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        one, other = found.detach().contiguous(), expected.detach().contiguous()
        assert one.view(-1).view(torch.uint8).tolist() == other.view(-1).view(torch.uint8).tolist()
    elif isinstance(expected, dict):
        assert type(found) is dict
        assert list(found) == list(expected)
        assert list(map(type, found)) == list(map(type, expected))
        for key in found:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert type(found) is type(expected)
        assert repr(found) == repr(expected) or found == expected


@pytest.mark.parametrize("new", [True, False])
def test_everything_is_as_torch_reads_it(new: bool) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(contents(TENSORS if new else OLD))
    def check(content: object) -> None:
        file = saved({"content": content}, _use_new_zipfile_serialization=new)
        expected = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        assert_same(load(file), expected)

    check()


def test_the_state_of_an_optimizer() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(
        [{"params": [each], "lr": 0.1 + number} for number, each in enumerate(model.parameters())]
    )
    model(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    file = saved(optimizer.state_dict())
    assert_same(load(file), torch.load(io.BytesIO(file.getvalue()), weights_only=True))


def test_tensors_of_one_storage_share_memory() -> None:
    values = torch.arange(8.0)
    found = read(saved({"a": values, "b": values[2:], "c": values.view(2, 4).t(), "d": values.clone()})).tensors
    found["a"][2] = 70
    assert found["b"][0] == 70
    assert found["c"][2, 0] == 70
    assert found["d"][2] == 2


def test_the_optimizer_of_a_foreign_checkpoint_is_not_read() -> None:
    class Counting(io.BytesIO):
        read_bytes = 0

        def readinto(self, buffer: Any, /) -> int:
            self.read_bytes += len(buffer)
            return super().readinto(buffer)

    content = {"state_dict": {"a": torch.zeros(1000)}, "optimizer": {"state": {0: torch.zeros(100_000)}}}
    file = Counting(saved(content).getvalue())
    read(file)
    assert file.read_bytes == 4000


def test_expanded_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"its tensor a cannot be read \(its elements share memory, as those of"):
        read(saved({"a": torch.zeros(1, 4).expand(3, 4)}))


def test_what_is_no_data_is_named() -> None:
    with pytest.raises(RefusedError, match=r"^torch\.nn\.modules\.linear\.Linear$"):
        load(saved(torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="sparse"):
        load(saved({"a": torch.eye(2).to_sparse()}))
    with pytest.raises(ValueError, match="unknown format"):
        load(io.BytesIO(b"hello"))
