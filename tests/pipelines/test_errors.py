"""Messages of errors are one paragraph, whatever was put into them."""

import pickle

import pytest

from pipelines.errors import RunFailedError, StorageRefusedError, StorageUnavailableError, UserError


@pytest.mark.parametrize("kind", [UserError, StorageRefusedError, RunFailedError, StorageUnavailableError])
def test_a_message_is_one_printable_line(kind: type[Exception]) -> None:
    error = kind("bad\n  indent\r\nat:  here\x1b[2J猫\u202e\udcff")
    assert str(error) == r"bad indent at:  here\x1b[2J猫\u202e\udcff"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, str(error))
